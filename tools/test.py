"""What `make test` runs: every check in turn, each timed, and a last line with the count. Stops at nothing, fails if anything failed.

    python tools/test.py                    all checks
    python tools/test.py notebooks jobs     some of them
    python tools/test.py lowest_versions    the core with the lowest versions that settings.ini allows; only by name
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
IGNORED = shutil.ignore_patterns(".venv", ".git", "_*", "*.egg-info", "__pycache__", "build", "dist", "runs", "cache", ".*_cache", ".ipynb_checkpoints")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
           "OMP_WAIT_POLICY": "PASSIVE"}  # several processes share the cores: waiting threads must not spin


def call(*words, cwd=root, env=None, quiet=False):
    "Run a command; its failure is an exception. A quiet one prints only when it fails."
    print("$", *(str(w).replace(str(root) + "/", "") for w in words if "\n" not in str(w)), flush=True)
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env or offline, stdout=subprocess.PIPE if quiet else None,
                          stderr=subprocess.STDOUT if quiet else None, text=True)
    if done.returncode and quiet: print(done.stdout)
    done.check_returncode()


def copy_tree(target):
    "A copy of the project without what is ignored, so that no check changes the project itself."
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True) if (root / ".git").exists() else None
    if listing is None or listing.returncode:  # no git, or no clone
        shutil.copytree(root, target, ignore=lambda d, names: IGNORED(d, names) - {"_quarto.yml", "_modidx.py"})
        return target
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def modules_equal_notebooks():
    "Exporting and cleaning the notebooks again changes no file, and README.md is the index notebook's."
    copy = copy_tree(work / "copy")
    call(bin / "nbdev_export", cwd=copy)
    call(bin / "nbdev_clean", cwd=copy)
    call(sys.executable, "tools/readme.py", "--check", cwd=copy)
    after, before = ({p.relative_to(top): p.read_bytes() for folder in ("nbs", "bgem3_nb") for p in (top / folder).rglob("*")
                      if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts} for top in (copy, root))
    changed = sorted(str(n) for n in after.keys() | before.keys() if after.get(n) != before.get(n))
    if changed: raise AssertionError(f"run nbdev_export and nbdev_clean; these differ: {', '.join(changed)}")


def notebooks():
    "Every cell of every chapter runs and its tests hold, each chapter in a process of its own; the jobs among them are run below."
    def test(path):
        start = time.perf_counter()
        try: call(bin / "nbdev_test", "--path", path, "--n_workers", "0", quiet=True)
        except subprocess.CalledProcessError: return path.name
        print(f"   {path.name} passed in {time.perf_counter() - start:.0f} s", flush=True)
    with ThreadPoolExecutor(2) as pool: failed = list(filter(None, pool.map(test, sorted((root / "nbs").glob("*.ipynb")))))
    if failed: raise AssertionError(f"these chapters fail: {', '.join(failed)}")


def processes_and_files():
    "What notebooks cannot hold: processes, kills, the command line."
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")


@cache
def built(ending):
    "The built sdist (.gz), or the wheel that was made from it (.whl)."
    copy, env = copy_tree(work / "package"), {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if not (work / "dist").exists(): call(sys.executable, "-m", "build", "--outdir", work / "dist", cwd=copy, env=env, quiet=True)
    return next((work / "dist").glob(f"*{ending}"))


def jobs():
    "Every job at its smallest, from the wheel and in an empty directory; `compare`, which needs benchmarks/peers.py, from the clone."
    installed, empty = work / "installed", work / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", installed, built(".whl"), quiet=True)
    env, clone = (offline | {"PYTHONPATH": f"{folder}{os.pathsep}{offline['PYTHONPATH']}"} for folder in (installed, root))
    call(sys.executable, "-c", f"import bgem3_nb; assert bgem3_nb.__file__.startswith({str(installed)!r}), bgem3_nb.__file__", cwd=empty, env=env)
    for path in sorted((root / "nbs").glob("[56][0-9]_*.ipynb")):
        name = path.stem[3:]
        if not (root / "params" / f"{name}_smoke.yaml").is_file(): raise AssertionError(f"the job {name} has no params/{name}_smoke.yaml")
        call(installed / "bin" / "bgem3-job", name, "-f", f"{name}_smoke", "--out", f"runs/{name}", cwd=empty, env=clone if name == "compare" else env)
        for file in (f"{name}.ipynb", f"{name}.html"):
            if not (empty / "runs" / name / file).is_file(): raise AssertionError(f"the job {name} left no {file}")


def site():
    "The site builds, and every page, formula and link of it holds."
    if sys.version_info < (3, 11) and not shutil.which("quarto"): return print("not built here: smalldocs needs Python 3.11, and there is no Quarto")
    copy = copy_tree(work / "site")
    call(sys.executable, "tools/docs.py", cwd=copy, env=offline | {"PYTHONPATH": f"{offline['PYTHONPATH']}{os.pathsep}{copy}"})


def nothing_asked_the_network():
    "No notebook, test or job above tried to reach another machine."
    if net_log.exists(): raise AssertionError(f"connections were tried:\n{net_log.read_text()}")


ALONE = """
import sys, bgem3_nb
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, f"import bgem3_nb loads {heavy}"
assert "site-packages" in bgem3_nb.__file__, bgem3_nb.__file__
"""
INSTALLED = ALONE + "for name in bgem3_nb.__all__: getattr(bgem3_nb, name)\n"


def packages():
    "sdist, a wheel from it, each installed in an empty environment, alone and with what it needs, and used from there."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for file, needs in ((built(".gz"), False), (built(".whl"), True)):
        venv = work / f"venv-{file.suffix[1:]}"
        python, pip = venv / "bin" / "python", ["-m", "pip", "install", "-q", "--disable-pip-version-check"]
        call(sys.executable, "-m", "venv", venv, env=env)
        call(python, *pip, *(["-c", root / "constraints.txt", f"{file}[all]"] if needs else ["--no-deps", file]), cwd=work, env=env, quiet=True)
        call(python, "-c", INSTALLED if needs else ALONE, cwd=work, env=env)
        call(venv / "bin" / "bgem3-job", "list", cwd=work, env=env)
        for name in ("prepare", "project") if needs else (): call(venv / "bin" / "bgem3-job", name, "-f", f"{name}_smoke", "--out", venv / name, cwd=work, env=env | OFFLINE)
        shutil.rmtree(venv)


CORE = ["00_backbone", "01_model", "02_encoding", "10_losses", "11_distillation", "14_training"]


def lowest_versions():
    "The core's chapters and tests, with the lowest versions that settings.ini allows (on Python 3.10 or 3.11, which have wheels of them)."
    from importlib.metadata import version
    names = dict(line.split(" = ", 1) for line in (root / "settings.ini").read_text(encoding="utf-8").splitlines() if " = " in line)
    lowest = {n: v for n, v in (need.split(">=") for need in names["requirements"].split())}
    lowest["torch"] = version("torch").split("+")[0]  # as here: earlier ones bring CUDA's libraries on Linux, which are gigabytes
    (work / "lowest.txt").write_text("".join(f"{n}=={v}\n" for n, v in lowest.items()))
    env, venv = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}, work / "venv-lowest"
    call(sys.executable, "-m", "venv", venv, env=env)
    call(venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", work / "lowest.txt", "ipython<9.19",
         f"{copy_tree(work / 'lowest')}[dev]", env=env, quiet=True)
    copy = work / "lowest"
    below = offline | {"PYTHONPATH": f"{copy}{os.pathsep}{offline['PYTHONPATH']}"}
    call(venv / "bin" / "python", "-c", f"from importlib.metadata import version\nfor n, v in {lowest}.items(): print(n, version(n))", env=below)
    for name in CORE: call(venv / "bin" / "nbdev_test", "--path", copy / "nbs" / f"{name}.ipynb", "--n_workers", "0", cwd=copy, env=below, quiet=True)
    tests = [copy / "tests" / f"test_{name}.py" for name in ("backbone", "loading", "encoding", "training")]
    call(venv / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=copy, env=below)


CHECKS = [modules_equal_notebooks, notebooks, processes_and_files, jobs, site, nothing_asked_the_network, packages]
ON_REQUEST = [lowest_versions]  # not part of the whole


def main():
    unknown = set(sys.argv[1:]) - {c.__name__ for c in CHECKS + ON_REQUEST}
    if unknown: sys.exit(f"no such check: {', '.join(unknown)}; there are {', '.join(c.__name__ for c in CHECKS + ON_REQUEST)}")
    checks, failed, began = [c for c in CHECKS + ON_REQUEST if c.__name__ in sys.argv[1:]] or CHECKS, [], time.perf_counter()
    for check in checks:
        print(f"== {check.__name__}: {check.__doc__}", flush=True)
        start = time.perf_counter()
        try: check()
        except (AssertionError, subprocess.CalledProcessError, OSError, StopIteration) as e:
            failed.append(check.__name__)
            print(f"FAILED {check.__name__}: {e}", flush=True)
        print(f"-- {check.__name__}: {'failed' if check.__name__ in failed else 'passed'} in {time.perf_counter() - start:.0f} s\n", flush=True)
    if failed: print(f"failed: {', '.join(failed)}")
    print(f"{len(checks) - len(failed)} passed, {len(failed)} failed in {time.perf_counter() - began:.0f}s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bgem3_nb-test-") as folder:
        work = Path(folder)
        net_log = work / "network.log"
        offline = os.environ | OFFLINE | {"PYTHONPATH": str(root / "tests" / "offline"), "BGEM3_NB_NET_LOG": str(net_log)}
        offline.pop("MPLBACKEND", None)
        code = main()
    sys.exit(code)
