"""Build the site: Quarto's, in _docs, where `quarto` is on the PATH, and otherwise a smoke build of the same pages and the
same configuration with smalldocs, in _site. No notebook is executed but for its imports and exported cells, which nbdev runs
to describe functions. The build fails when a chapter has no page, or when a page shows an error, a formula that is
not one, or a link or picture that leads nowhere."""
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

PARTS = {"0": "Model", "1": "Training", "2": "Data", "3": "Search and evaluation", "4": "Sources and jobs", "5": "Jobs, executed", "6": "Case studies"}


def write_sidebar(nbs):
    "Chapters in the part that the first digit of their number names, so that a new chapter needs no edit here."
    contents = ["index.ipynb"]
    for digit, title in PARTS.items():
        if chapters := sorted(p.name for p in nbs.glob(f"{digit}[0-9]_*.ipynb")): contents.append({"section": title, "contents": chapters})
    (nbs / "sidebar.yml").write_text(yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False))


def smalldocs(staged, site):
    "A smoke build; formulas become MathML here, which Quarto does by itself (`html-math-method: mathml`)."
    from latex2mathml.converter import convert
    from smalldocs.config import load
    from smalldocs.site import Site
    project = Site(load(staged), quiet=True)
    project.out = site
    project.build()
    bad = []
    def formula(m):
        try: return convert(unescape(m[2]), display="block" if m[1] == "display" else "inline")
        except Exception as e: bad.append(f"{page.name}: not a formula: {unescape(m[2])} ({type(e).__name__})")
    for page in site.glob("*.html"):
        text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page.read_text(encoding="utf-8"), flags=re.S)
        page.write_text(re.sub(r"<(?:link|script)[^>]*katex[^>]*>(?:</script>)?", "", text), encoding="utf-8")
    return bad + [w for w in project.warnings if "broken link" in w]


class Page(HTMLParser):
    "What is checked of a page: its ids, its links and pictures, its headings and formulas."
    def __init__(self, file):
        super().__init__()
        self.file, self.ids, self.refs, self.titles, self.formulas = file, set(), [], 0, 0
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag in ("a", "link") and attrs.get("href"): self.refs.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"): self.refs.append(attrs["src"])
        self.titles += tag == "h1"
        self.formulas += tag == "math"


def check(site, notebooks):
    "Everything that is wrong with the pages, and what was looked at."
    pages = {p.resolve(): Page(p) for p in site.rglob("*.html")}
    bad, local = [], 0
    for nb in notebooks:
        names = {nb.stem, re.sub(r"^\d\d_", "", nb.stem)}
        made = [p for f, p in pages.items() if f.stem in names and f.parent == site.resolve()]
        if not made or not made[0].titles: bad.append(f"{nb.name}: no page was made of it")
    for page in pages.values():
        if "cell-output-error" in page.text: bad.append(f"{page.file.name}: an output is an error")
        for ref in page.refs:
            path, _, anchor = ref.partition("#")
            if re.match(r"\w+:|//", ref) or ref == "#": continue
            local += 1
            target = (page.file.parent / unquote(path.split("?")[0])).resolve() if path else page.file.resolve()
            if target.is_dir(): target = target / "index.html"
            if not target.is_file(): bad.append(f"{page.file.name}: {ref} leads nowhere")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids: bad.append(f"{page.file.name}: {ref}: no such heading")
    formulas = sum(p.formulas for p in pages.values())
    return bad, f"{len(pages)} pages, {formulas} formulas, {local} local links and pictures"


def main():
    cfg = get_config()
    refresh_quarto_yml()
    _build_modidx()
    write_sidebar(cfg.nbs_path)
    staged = Path(proc_nbs(cfg.nbs_path, n_workers=2, force=True))
    if shutil.which("quarto"):
        shutil.rmtree(cfg.doc_path, ignore_errors=True)
        subprocess.run(["quarto", "render", "--no-cache"], cwd=staged, check=True)
        site, by, bad = Path(shutil.move(staged / cfg.doc_path.name, cfg.doc_path)), "Quarto", []
    else:
        site, by = cfg.config_path / "_site", "smalldocs, a smoke build: the published site is Quarto's"
        shutil.rmtree(site, ignore_errors=True)
        bad = smalldocs(staged, site)
    wrong, summary = check(site, sorted(cfg.nbs_path.glob("*.ipynb")))
    for problem in bad + wrong: print(problem, file=sys.stderr)
    print(f"{site.name}/index.html ({by}): {summary}, {len(bad + wrong)} problems")
    if by == "Quarto": wrong = [w for w in wrong if "no page was made" in w or "is an error" in w]  # Quarto checks its own links
    sys.exit(bool(bad + wrong))


if __name__ == "__main__": main()
