"""Build the site: Quarto's, in _docs, where `quarto` is on the PATH, and otherwise a smoke build of the same pages
and the same configuration with smalldocs, in _site. No notebook is executed but for its imports and exported cells,
which nbdev runs to describe functions. The build fails when two notebooks would become the same page, when a chapter
has no page, or when a page shows an error, a formula that is not one, Markdown that was not read as such, a link or
picture that leads nowhere, a picture without a text in its place, or anything that another host would have to send."""
import ast
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import yaml
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

LINK = r"\[(`[^`\n]*`)\]\(([^()\s]*)\)"   # a name in backticks, as nbdev links it


def page_name(notebook):
    "The page of a notebook: its name without the number, as nbdev names it."
    return re.sub(r"^\d\d_", "", Path(notebook).stem)


def same_pages(notebooks):
    "Sentences that name the notebooks that would become one page; Quarto fails on them only after all other pages."
    by_page = {}
    for nb in notebooks: by_page.setdefault(page_name(nb), []).append(Path(nb).name)
    return [f"{' and '.join(names)} would both become {page}.html; rename one" for page, names in by_page.items()
            if len(names) > 1]


def without_extra_links(markdown, leads_nowhere=lambda url: False):
    """The Markdown without the links that nbdev put where none can be: it links names in backticks line by line, in an
    output also within fenced code (the comments of a signature), in prose also within the text of another link, and
    to names that have no heading on their page."""
    out, fenced = [], False
    for line in markdown.splitlines(keepends=True):
        if line.lstrip().startswith("```"): fenced = not fenced
        else: line = re.sub(LINK, lambda m: m[1] if fenced or leads_nowhere(m[2]) else m[0], line)
        nested = rf"\[([^\[\]\n]*){LINK}([^\[\]\n]*)\](?=\()"
        while (plain := re.sub(nested, r"[\1\2\4]", line)) != line: line = plain
        out.append(line)
    return "".join(out)


def markdown_parts(nb):
    "(holder, key) of each Markdown text of a notebook: its prose, and outputs such as nbdev's signatures."
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown": yield cell, "source"
        for data in (o.get("data", {}) for o in cell.get("outputs", ())):
            if "text/markdown" in data: yield data, "text/markdown"


def mend_links(staged, url):
    "Takes the links that cannot be out of the notebooks that nbdev has processed."
    notebooks = {path: json.loads(path.read_text(encoding="utf-8")) for path in staged.glob("*.ipynb")}
    headings = {f"{url}/{page_name(path)}.html#{h.strip().lower()}" for path, nb in notebooks.items()
                for part, key in markdown_parts(nb) for h in re.findall(r"^#+ (.+)$", "".join(part[key]), re.M)}
    def leads_nowhere(link): return link.startswith(url) and "#" in link and link not in headings
    for path, nb in notebooks.items():
        for part, key in markdown_parts(nb):   # a list of lines: Quarto takes a text in one piece for one line
            part[key] = without_extra_links("".join(part[key]), leads_nowhere).splitlines(keepends=True)
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


BADGE = re.compile(r"\[!\[Open In Colab\]\(\S+\)\]\((\S+)\)")


def shown_name(cell):
    "The name that a cell of nbdev documents, `f` or `C.f`, or nothing."
    found = re.search(r"^show_doc\(([\w.]+)\)$", "".join(cell["source"]), re.M)
    return found and found[1]


def defined_names(cell):
    "The functions and classes that an exported cell defines, in its order."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code" or '"Exported source"' not in source: return []
    return [n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def order_documentation(nb):
    """Put the documentation of a cell's functions before the cell, in its order: nbdev puts one after it, and the
    others before it from the last to the first."""
    cells = nb["cells"]
    for cell in [c for c in cells if defined_names(c)]:
        names, at = defined_names(cell), next(i for i, c in enumerate(cells) if c is cell)
        def belongs(c): return (shown_name(c) or "").split(".")[-1] in names
        first, last = at, at
        while first and belongs(cells[first - 1]): first -= 1
        while last + 1 < len(cells) and belongs(cells[last + 1]): last += 1
        shown = cells[first:at] + cells[at + 1:last + 1]
        shown.sort(key=lambda c: names.index(shown_name(c).split(".")[-1]))
        cells[first:last + 1] = [*shown, cell]


def own_arguments(nb, package, longest=20):
    """Document a class as one, which nbdev writes like a function, and one that inherits many arguments by its own
    ones, as its source writes them; what a long line of inherited ones says stands where they come from."""
    classes = {n.name: (n, text) for f in package.glob("[a-z]*.py") for text in [f.read_text(encoding="utf-8")]
               for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    for cell in nb["cells"]:
        name = shown_name(cell)
        for data in (o.get("data", {}) for o in cell.get("outputs", ())) if name in classes else ():
            text = "".join(data.get("text/markdown", ""))
            text = re.sub(r"```python\ndef (.*?)\)(?:->None)?:\n```", r"```python\nclass \1)\n```", text,
                          count=1, flags=re.S)
            data["text/markdown"] = text
            signature = re.search(r"```python\n(.*?)\n```", text, re.S)
            node, source = classes[name]
            own = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            if not signature or signature[1].count("\n") < longest or not own: continue
            lines = source.splitlines()[own[0].lineno - 1:own[-1].end_lineno]
            bases = " and ".join(ast.unparse(b) for b in node.bases)
            body = "\n".join([f"class {name}(", *lines, f"    **others,   # those of {bases}", ")"])
            data["text/markdown"] = text.replace(signature[1], body)


LONG_DEFAULT = re.compile(r"^(    \w+:[^=\n]*=).{121,}?(?=,(?: #.*)?$)", re.M)   # a parameter whose default fills lines


def slanted(markdown):
    "Set the whole first paragraph of a docstring in italics: nbdev does so with its first line."
    return re.sub(r"^\*(?!\*)([^\n]+)\*\n(?=\S)(.+?)(?=\n\n|\Z)", r"*\1\n\2*", markdown, flags=re.S | re.M)


def mend_pages(staged, package):
    """What nbdev leaves for us to do in the notebooks that it has processed: the order of the documentation, the
    arguments of a class, italics, defaults that fill lines, outputs without a letter, and the badge, which Quarto would
    show as a figure with a caption, from another host."""
    for path in staged.glob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        order_documentation(nb)
        own_arguments(nb, package)
        for cell in nb["cells"]:
            for data in (o.get("data", {}) for o in cell.get("outputs", ())) if shown_name(cell) else ():
                if not (said := "".join(data.get("text/markdown", ""))): continue
                data["text/markdown"] = LONG_DEFAULT.sub(r"\1…", slanted(said))
            printed = [o for o in cell.get("outputs", ()) if o["output_type"] == "stream"]
            blank = [o for o in printed if not "".join(o["text"]).strip()]   # would be a bar beside nothing
            if blank: cell["outputs"] = [o for o in cell["outputs"] if o not in blank]
            if cell["cell_type"] == "markdown" and (badge := BADGE.fullmatch("".join(cell["source"]).strip())):
                cell["source"] = [f'<a class="colab" href="{badge[1]}">Open in Colab</a>']
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


def without_alt(nbs):
    "Sentences that name the cells that show a picture and say nothing for those who do not see it (`#| fig-alt`)."
    bad = []
    for path in sorted(nbs.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            pictures = [k for o in cell.get("outputs", ()) for k in o.get("data", {}) if k.startswith("image/")]
            alt = re.search(r"^#\|\s*fig-alt:\s*\"(.{20,})\"$", "".join(cell["source"]), re.M)
            if pictures and not alt:
                bad.append(f"{path.name}: the cell {cell['id']} shows a picture and has no line `#| fig-alt: \"…\"`")
            picture = re.search(r"!\[\]\(\S+\)", "".join(cell["source"]))
            if cell["cell_type"] == "markdown" and picture: bad.append(f"{path.name}: {picture[0]} has no text")
    return bad


MATH = [(0x20, 0x7e), (0xa0, 0xff), (0x300, 0x338), (0x391, 0x3f6), (0x2010, 0x2064), (0x20d0, 0x20f0),
        (0x2102, 0x2134), (0x2190, 0x21ff), (0x2200, 0x22ff), (0x2308, 0x230b), (0x23b4, 0x23e1), (0x27e6, 0x27eb),
        (0x1d400, 0x1d4cf), (0x1d538, 0x1d56b), (0x1d6a4, 0x1d755)]


def math_font(target):
    """Write the letters and signs of formulas to `target`, from the font STIX Two Math that the package ziamath
    brings: a browser that finds no mathematics font on its machine draws no square roots. Its licence, OFL, lets it
    be passed on."""
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont
    spec = find_spec("ziamath")
    if not spec: sys.exit("the formulas need a mathematics font: pip install ziamath (extra: dev)")
    font = TTFont(Path(spec.submodule_search_locations[0]) / "fonts" / "STIXTwoMath-Regular.ttf")
    subsetter = Subsetter(Options(layout_features=["ssty", "dtls"], notdef_outline=True, hinting=False))
    subsetter.populate(unicodes=[c for a, b in MATH for c in range(a, b + 1)])
    subsetter.subset(font)
    font.flavor = "woff"
    font.save(target)


WIDGETS = re.compile(r"<script[^>]*src=\"https://cdn\.jsdelivr\.net/npm/(?:requirejs|jquery)@[^>]*></script>\s*|"
                     r"<script[^>]*>define\('jquery'[^<]*</script>\s*")


FONTS = re.compile(r"""@import\s*(?:url\()?["']?https?://[^"')]*["']?\)?;""")   # a theme's letters, from another host


def without_other_hosts(site):
    """Take out of the site what other hosts would have to send: the libraries of Jupyter's widgets, which Quarto links
    wherever an output is HTML (no page has a widget), and the fonts of its themes, for which the reader's own stand."""
    for page in site.glob("*.html"):
        page.write_text(WIDGETS.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    for style in site.rglob("*.css"):
        style.write_text(FONTS.sub("", style.read_text(encoding="utf-8")), encoding="utf-8")


HOME = ("index.ipynb", "index_vi.ipynb")   # the first page, and the same in Vietnamese


def reading_order(nbs):
    "The parts of the book and their pages, as `sidebar.yml` lists them: {part: [file]}."
    sidebar = yaml.safe_load((nbs / "sidebar.yml").read_text(encoding="utf-8"))
    return {part["section"]: part["contents"] for part in sidebar["website"]["sidebar"]["contents"]}


def out_of_order(nbs):
    """Sentences about what does not follow the order of reading: a notebook that is not in it, a chapter whose last
    section does not lead to the next one, a chapter that the table on the first page leaves out."""
    order = [page for pages in reading_order(nbs).values() for page in pages]
    there = sorted(p.name for p in nbs.glob("*.ipynb"))
    bad = [f"{name} is not in sidebar.yml" for name in there if order.count(name) != 1]
    bad += [f"sidebar.yml lists {name}, which is not there" for name in order
            if name.endswith(".ipynb") and name not in there]
    prose = {name: ["".join(c["source"]) for c in json.loads((nbs / name).read_text(encoding="utf-8"))["cells"]
                    if c["cell_type"] == "markdown"] for name in there}
    chapters = [name for name in order if name in prose and name not in HOME]
    first_page = "\n".join(prose.get("index.ipynb", ()))
    bad += [f"the first page does not lead to {name}" for name in chapters if f"]({name})" not in first_page]
    for name, following in zip(chapters, [*chapters[1:], None]):
        last = prose[name][-1]
        links = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", last)
        if not last.startswith("## What to read next"): bad.append(f"{name} does not end with what to read next")
        elif following and links[:1] != [following]: bad.append(f"{name} leads to {links[:1]} first, and {following} "
                                                                f"comes next")
    return bad


def summary_of(node):
    "The first paragraph of a docstring on one line, or nothing."
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def public_names(module):
    """(name, what its docstring says first) of the functions and classes in a module's `__all__`, in their order on
    the page."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    listed = next((ast.literal_eval(n.value) for n in tree.body
                   if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
    return [(n.name, summary_of(n)) for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in listed]


def api_page(nbs, package):
    """The Markdown of the page of public names: those of `import bgem3_nb` first, then every module in the order of
    reading."""
    init = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    front = next(ast.literal_eval(n.value) for n in init.body
                 if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "_PUBLIC")
    modules = {m: dict(public_names(package / f"{m}.py")) for m in sorted(p.stem for p in package.glob("[a-z]*.py"))}
    order = [re.sub(r"^\d\d_|\.\w+$", "", page) for pages in reading_order(nbs).values() for page in pages]
    notebook = {page_name(p): p.name for p in nbs.glob("[0-9]*.ipynb")}
    def row(name, module, says):
        escaped = says.replace("|", chr(92) + "|")
        return f"| [`{name}`]({notebook[module]}#{name.lower()}) | {escaped} |"
    out = ["---", "title: Public names", "description: What can be imported, and where it is explained.", "---", "",
           "## `from bgem3_nb import …`", "", "| name | |", "|---|---|"]
    out += [row(name, module, modules[module].get(name, "")) for name, module in front.items()]
    for module in order:
        if not modules.get(module): continue
        out += ["", f"## `bgem3_nb.{module}`", "", "| name | |", "|---|---|"]
        out += [row(name, module, says) for name, says in modules[module].items()]
    return "\n".join(out) + "\n"


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
        text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula,
                      page.read_text(encoding="utf-8"), flags=re.S)
        page.write_text(re.sub(r"<(?:link|script)[^>]*katex[^>]*>(?:</script>)?", "", text), encoding="utf-8")
    return bad + [w for w in project.warnings if "broken link" in w]


class Page(HTMLParser):
    """What is checked of a page: its ids, its links and pictures, its headings and formulas, and the links that are
    shown as Markdown."""
    def __init__(self, file):
        super().__init__()
        self.file, self.ids, self.refs, self.titles, self.formulas = file, set(), [], 0, 0
        self.raw, self.silent = [], ""   # silent: within a script or a style
        self.mute, self.foreign = [], []   # pictures without a text; what other hosts would have to send
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "style"): self.silent = tag
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag in ("a", "link") and attrs.get("href"): self.refs.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"): self.refs.append(attrs["src"])
        if tag == "img" and not (attrs.get("alt") or "").strip(): self.mute.append(attrs.get("src", "")[:60])
        source = attrs.get("src") or tag == "link" and "stylesheet" in attrs.get("rel", "") and attrs.get("href") or ""
        if re.match("(?:https?:)?//", source): self.foreign.append(source)
        self.titles += tag == "h1"
        self.formulas += tag == "math"

    def handle_endtag(self, tag):
        if tag == self.silent: self.silent = ""

    def handle_data(self, data):
        if not self.silent: self.raw += re.findall(r".{0,40}\]\((?:https?:|[\w./-]+\.(?:ipynb|html)\b).{0,20}", data)


def check(site, notebooks, url):
    "Everything that is wrong with the pages, and what was looked at. The site's own `url` is followed as a local link."
    pages = {p.resolve(): Page(p) for p in site.rglob("*.html")}
    named = {page_name(f): f for f in pages if f.parent == site.resolve()}   # a smoke build keeps the numbers
    bad, local = same_pages(notebooks), 0
    for nb in notebooks:
        names = {nb.stem, page_name(nb)}
        made = [p for f, p in pages.items() if f.stem in names and f.parent == site.resolve()]
        if not made or not made[0].titles: bad.append(f"{nb.name}: no page was made of it")
    for page in pages.values():
        if "cell-output-error" in page.text: bad.append(f"{page.file.name}: an output is an error")
        bad += [f"{page.file.name}: shows Markdown: {raw}" for raw in page.raw]
        bad += [f"{page.file.name}: the picture {src} has no text in its place" for src in page.mute]
        bad += [f"{page.file.name}: needs another host: {src}" for src in page.foreign]
        for ref in page.refs:
            own = ref.startswith(url + "/")
            path, _, anchor = ref.removeprefix(url + "/").partition("#")
            if not own and re.match(r"\w+:|//", ref) or ref == "#": continue
            local += 1
            target = ((
                site if own
                else page.file.parent) / unquote(path.split("?")[0])).resolve() if path or own else page.file.resolve()
            if own and not target.exists(): target = named.get(page_name(path), target)
            if target.is_dir(): target = target / "index.html"
            if not target.is_file(): bad.append(f"{page.file.name}: {ref} leads nowhere")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids: bad.append(
                f"{page.file.name}: {ref}: no such heading")
    for style in site.rglob("*.css"):
        foreign = re.findall(r"""(?:@import\s*|url\()["']?(?:https?:)?(//[^"')]+)""", style.read_text(encoding="utf-8"))
        bad += [f"{style.name}: needs another host: {source}" for source in foreign]
    formulas = sum(p.formulas for p in pages.values())
    return bad, f"{len(pages)} pages, {formulas} formulas, {local} local links and pictures"


def main():
    cfg = get_config()
    notebooks = sorted(cfg.nbs_path.glob("*.ipynb"))
    if same := same_pages(notebooks): sys.exit("\n".join(same))
    refresh_quarto_yml()
    _build_modidx()
    if bad := out_of_order(cfg.nbs_path) + without_alt(cfg.nbs_path): sys.exit("\n".join(bad))
    staged = Path(proc_nbs(cfg.nbs_path, n_workers=2, force=True))
    (staged / "api.md").write_text(api_page(cfg.nbs_path, cfg.lib_path), encoding="utf-8")
    url = f"{cfg.doc_host}{cfg.doc_baseurl}"
    mend_links(staged, url)
    mend_pages(staged, cfg.lib_path)
    math_font(staged / "math.woff")
    shutil.copytree(cfg.nbs_path / "images", staged / "images", dirs_exist_ok=True)   # nbdev copies no pictures
    if shutil.which("quarto"):
        shutil.rmtree(cfg.doc_path, ignore_errors=True)
        subprocess.run(["quarto", "render", "--no-cache"], cwd=staged, check=True)
        site, by, bad = Path(shutil.move(staged / cfg.doc_path.name, cfg.doc_path)), "Quarto", []
    else:
        site, by = cfg.config_path / "_site", "smalldocs, a smoke build: the published site is Quarto's"
        shutil.rmtree(site, ignore_errors=True)
        bad = smalldocs(staged, site)
    without_other_hosts(site)
    wrong, summary = check(site, notebooks, url)
    for problem in bad + wrong: print(problem, file=sys.stderr)
    print(f"{site.name}/index.html ({by}): {summary}, {len(bad + wrong)} problems")
    sys.exit(bool(bad + wrong))


if __name__ == "__main__": main()
