"""The project's own shape: what keeps the frame together and no notebook can check."""
import ast
import json
import os
import re
import socket
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata

import pytest
from conftest import REPO

import bgem3_nb

CONFIG = ConfigParser()
CONFIG.read(REPO / "settings.ini", encoding="utf-8")
CONFIG = CONFIG["DEFAULT"]
TEXT = {".py", ".ipynb", ".md", ".yml", ".yaml", ".ini", ".txt", ".jsonl", ".in", ".css", ""}


def project_files():
    "The files of the project, without what git ignores; from an unpacked sdist, all files."
    try: names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPO, capture_output=True,
                                text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError): pytest.skip("not a git clone")
    return [REPO / name for name in names if name and (REPO / name).is_file()]


def chapters(): return {p.stem[3:]: p for p in sorted((REPO / "nbs").glob("[0-9][0-9]_*.ipynb"))}


def test_one_version():
    assert bgem3_nb.__version__ == CONFIG["version"]


def test_top_level():
    expected = {"nbs", "bgem3_nb", "data", "params", "tests", "settings.ini", "setup.py", "_quarto.yml", "README.md",
                "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt", ".gitignore", ".ci"}
    assert expected <= {p.name for p in REPO.iterdir()}


def test_import_is_light_and_names_resolve():
    code = ("import sys, bgem3_nb; print([m for m in "
            "('torch', 'transformers', 'numpy', 'datasets', "
            "'matplotlib') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
    for name in bgem3_nb.__all__: assert getattr(bgem3_nb, name) is not None


def test_a_chapter_imports_only_lower_ones():
    "The appendix, 90 and above, is what all others may use."
    number, imports = {n: int(p.stem[:2]) % 90 - 10*(p.stem >= "90") for n, p in chapters().items()}, []
    for module in (REPO / "bgem3_nb").glob("[a-z]*.py"):
        used = re.findall(r"^\s*from (?:bgem3_nb)?\.(\w+) import", module.read_text(encoding="utf-8"), re.M)
        for name in used: assert number[name] < number[module.stem], f"{module.stem} imports {name}"
        imports += used
    assert len(imports) > 50     # the pattern still finds them


def test_page_names_are_unique():
    "nbdev drops the number from the name of a page."
    names = [p.stem[3:] for p in (REPO / "nbs").glob("[0-9][0-9]_*.ipynb")]
    assert len(names) == len(set(names))


def markdown(path):
    "The prose of a notebook, a text for each cell."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


def defined(module):
    "Names of functions, classes and constants that a module defines."
    tree = ast.parse((REPO / "bgem3_nb" / f"{module}.py").read_text(encoding="utf-8"))
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef | ast.ClassDef): yield n.name
        if isinstance(n, ast.Assign): yield from (t.id for t in n.targets if isinstance(t, ast.Name))


def test_links_lead_to_the_chapter_that_they_name():
    "The title of a chapter, and the name of a function, are links to where they are and nowhere else."
    titles = {re.sub(r"^(Job|Study): ", "", markdown(path)[0].splitlines()[0][2:]): name
              for name, path in chapters().items()}
    assert len(titles) == len(chapters())
    homes = {}
    for path in (REPO / "bgem3_nb").glob("[a-z]*.py"):
        for name in defined(path.stem): homes.setdefault(f"`{name}`", set()).add(path.stem)
    links = [(path.name, m[1], m[2]) for path in chapters().values() for text in markdown(path)
             for m in re.finditer(r"\[([^\]]+)\]\(\d\d_(\w+)\.ipynb[^)]*\)", text)]
    assert len(links) > 200
    assert [x for x in links if x[2] not in homes.get(x[1], {titles.get(x[1], x[2])})] == []


@pytest.mark.parametrize("name", chapters())
def test_a_chapter_is_built_like_the_others(name):
    """Title and line below it, badge that opens this notebook, install cell that is not evaluated, one line with level
    and minutes, exported imports alone."""
    cells = [{**c, "source": "".join(c["source"])}
             for c in json.loads(chapters()[name].read_text(encoding="utf-8"))["cells"]]
    assert re.match(r"# .+\n\n> .+", cells[0]["source"])
    assert f"/nbs/{chapters()[name].name})" in cells[1]["source"]
    assert "#| eval: false" in cells[2]["source"]
    level = r"^\*\*Level:\*\* (?:beginner|intermediate|advanced) · \*\*Reading time:\*\* \d+ minutes$"
    assert len(re.findall(level, "\n".join(markdown(chapters()[name])), re.M)) == 1
    for c in cells:
        if c["cell_type"] != "code" or not c["source"].startswith("#| export"): continue
        lines = [line for line in c["source"].splitlines() if line.strip() and not line.startswith(("#", " ", ")"))]
        if any(line.startswith(("import ", "from ")) for line in lines):
            assert all(line.startswith(("import ", "from "))
                       for line in lines), f"imports and other code in one cell of {name}:\n{c['source']}"


@pytest.mark.parametrize("english, vietnamese", [("start", "95_start_vi"), ("index", "index_vi")])
def test_a_vietnamese_page_keeps_step(english, vietnamese):
    "The same cells in the same order, the same code, outputs and headings, the same numbers and links in the prose."
    start, other = (json.loads((REPO / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
                    for name in (english, vietnamese))
    assert [c["cell_type"] for c in start] == [c["cell_type"] for c in other]
    for a, b in zip(start[2:], other[2:]):
        if a["cell_type"] == "code":
            assert (a["source"], a["outputs"]) == (b["source"], b["outputs"])
            continue
        a, b = ("".join(c["source"]).replace(",", ".") for c in (a, b))
        assert re.findall(r"^#+", a, re.M) == re.findall(r"^#+", b, re.M)
        skip = r"\]\((?!start|95_start_vi|index)\S+\)"      # each leads to the other one
        assert re.findall(skip, a) == re.findall(skip, b), b
        a, b = (re.sub(r"\]\(\S+\)", "]", text) for text in (a, b))
        numbers = r"\d+(?:\.\d+)?|`[^`\n]+`"
        assert re.findall(numbers, a) == re.findall(numbers, b), b


def test_no_path_of_a_machine_in_a_committed_file():
    pattern = re.compile(r"(?<![\w.…/<>-])/(?:work|tmp|root|home)/\w")
    found = [f"{f.relative_to(REPO)}:{n}: {m[0]}" for f in project_files() if f.suffix in TEXT
             for n, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1) if (m := pattern.search(line))]
    assert found == []


def distributions(names):
    "Installed distributions by name, and all that they need."
    found, todo = set(), [re.match(r"[\w.-]+", n)[0] for n in names]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found: continue
        found.add(name)
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        todo += [re.match(r"[\w.-]+", n)[0] for n in needs if "extra ==" not in n]
    return found


def test_a_page_installs_what_it_imports():
    "The cell that Colab runs is the same on every page, and the extra `book` has every package that a cell imports."
    cells = {name: [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
             for name, path in [*chapters().items(), ("start", REPO / "nbs" / "start.ipynb")]}
    assert len({"".join(own[0]["source"]) for own in cells.values()}) == 1
    asked = [r for k, v in CONFIG.items() if k.endswith("requirements") and k != "dev_requirements" for r in v.split()]
    there, of = distributions(asked), metadata.packages_distributions()
    for name, own in cells.items():
        for c in own[1:]:
            lines = [line for line in "".join(c["source"]).splitlines() if not line.lstrip().startswith(("!", "%"))]
            for node in ast.walk(ast.parse("\n".join(lines))):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
                for top in {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) - {"bgem3_nb"}:
                    homes = {re.sub(r"[-_.]+", "-", d).lower() for d in of.get(top, [])}
                    assert not homes or homes & there, f"{name} imports {top}, which the extra book lacks"


def test_extras_are_declared():
    "Every extra that a message names can be installed."
    extras = {k.removesuffix("_requirements") for k in CONFIG if k.endswith("_requirements")} | {"all"}
    named = {e for f in (REPO / "bgem3_nb").glob("*.py")
             for group in re.findall(r"bgem3_nb\[([\w,]+)\]", f.read_text(encoding="utf-8")) for e in group.split(",")}
    assert named <= extras


def test_constraints_pin_every_direct_requirement():
    norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
    pinned = {norm(line.split("==")[0]) for line in (REPO / "constraints.txt").read_text().splitlines()
              if line and not line.startswith("#")}
    asked = {norm(re.match(r"[\w.-]+", r)[0]) for k, v in CONFIG.items()
             if k == "requirements" or k.endswith("_requirements") for r in v.split()}
    assert asked <= pinned, asked - pinned


def test_readme_is_the_index_notebook():
    assert subprocess.run([sys.executable, REPO / "tools" / "readme.py", "--check"]).returncode == 0


def test_the_checks_that_can_be_run_alone_are_named():
    "README and CONTRIBUTING name each check of tools/test.py, and no other."
    tree = ast.parse((REPO / "tools" / "test.py").read_text(encoding="utf-8"))
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign)
             and ast.unparse(node.targets[0]) in ("WAVES", "ON_REQUEST")]
    checks = sorted(n.id for values in lists for n in ast.walk(values) if isinstance(n, ast.Name))
    assert {"notebooks", "lowest_versions"} < set(checks)
    said = re.search("only the checks that it names, of (.*?);", (REPO / "README.md").read_text(encoding="utf-8"))[1]
    assert sorted(re.findall(r"`(\w+)`", said)) == checks
    table = re.findall(r"^\| `(\w+)` \|", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert sorted(table) == checks


def test_the_network_is_refused_and_the_attempt_written_down(tmp_path):
    "The guard that the other tests rely on."
    log = tmp_path / "log"
    code = ("import socket\ntry: socket.create_connection(('example.org', 80), 1)\n"
            "except OSError as e: print(e)")
    env = {**os.environ, "PYTHONPATH": str(REPO / "tests" / "offline"), "BGEM3_NB_NET_LOG": str(log)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "example.org was asked for" in run.stdout and log.read_text().startswith("example.org from")
    with socket.create_server(("127.0.0.1", 0)) as server: socket.create_connection(server.getsockname()).close()
