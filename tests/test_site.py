"""The tools that build the site: what they mend in nbdev's pages, and what they find wrong with a page."""
import json
import sys
from importlib.util import find_spec

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "tools"))
pytest.importorskip("nbdev", reason="nbdev (extra: dev) builds the site")
import docs  # noqa: E402

URL = "https://x.github.io/book"


def test_two_notebooks_are_not_one_page():
    names = ["30_index.ipynb", "index.ipynb", "20_rows.ipynb"]
    assert docs.same_pages(names) == ["30_index.ipynb and index.ipynb would both become index.html; rename one"]
    assert docs.same_pages(sorted((REPO / "nbs").glob("*.ipynb"))) == []


def test_links_that_nbdev_puts_where_none_can_be(tmp_path):
    "In the comments of a signature, within another link, and to names that have no heading."
    link = f"[`f`]({URL}/rows.html#f)"
    signature = (f"### f\n\n```python\ndef f(\n    x, # as "
                 f"{link} writes it\n):\n```\n\n*Like "
                 f"{link}, not [`g`]({URL}/rows.html#g).*")
    prose = f"See {link}, [{link}](20_rows.ipynb), [what {link} does](20_rows.ipynb) and [`x`](https://example.com/#x)."
    cells = [{"cell_type": "markdown", "source": [prose]}, {
        "cell_type": "code", "source": "",
        "outputs": [{"data": {"text/markdown": signature.splitlines(keepends=True)}}]}]
    (tmp_path / "20_rows.ipynb").write_text(json.dumps({"cells": cells}))
    docs.mend_links(tmp_path, URL)
    cells = json.loads((tmp_path / "20_rows.ipynb").read_text())["cells"]
    assert cells[0]["source"] == [f"See {link}, [`f`](20_rows.ipynb), [what `f` does](20_rows.ipynb) and "
                                  f"[`x`](https://example.com/#x)."]
    # lines, as Quarto reads them
    assert cells[1]["outputs"][0]["data"]["text/markdown"] == ["### f\n", "\n", "```python\n", "def f(\n",
                                                               "    x, # as `f` writes it\n", "):\n", "```\n", "\n",
                                                               f"*Like {link}, not `g`.*"]


@pytest.mark.parametrize("body, wrong", [
    (f'<a href="{URL}/losses.html">x</a>', "losses.html leads nowhere"),
    (f'<a href="{URL}/rows.html#there">x</a>', None), (f'<a href="{URL}/rows.html#nowhere">x</a>',
                                                       "no such heading"), (f'<a href="{URL}/">x</a>', None),
    ("<code># as [`f`](https://x.github.io/book/rows.html)</code>",
     "shows Markdown"), ("[<code>f</code>](10_losses.ipynb)", "shows Markdown"),
    ('<img src="https://x.org/a.svg" alt="a">', "needs another host"), ('<a href="https://x.org">x</a>', None),
    ('<link rel="stylesheet" href="//x.org/a.css">', "needs another host"),
    ('<script src="https://x.org/a.js"></script>', "needs another host"),
    ('<img src="data:image/png;base64,x" alt="Bars">', None),
    ('<img src="data:image/png;base64,x" alt="">', "has no text in its place"),
    ("<script>f = '](https://x'</script> a[0](x)", None), ('<a href="other.html">x</a>', "other.html leads nowhere")])
def test_a_page_is_checked(tmp_path, body, wrong):
    (tmp_path / "20_rows.html").write_text(f'<h1 id="there">Rows</h1>{body}')
    (tmp_path / "index.html").write_text("<h1>Book</h1>")
    found, _ = docs.check(tmp_path, [REPO / "nbs" / "20_rows.ipynb", REPO / "nbs" / "index.ipynb"], URL)
    assert (len(found) == 1 and wrong in found[0]) if wrong else found == [], found


# ---- what nbdev leaves to do, and what a page is made of

def code(source, markdown=None):
    outputs = [{"output_type": "execute_result", "data": {"text/markdown": markdown}}] if markdown else []
    return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": outputs}


def test_documentation_stands_before_its_cell_in_the_order_of_the_cell():
    cell = code('#| code-summary: "Exported source"\ndef f(): 1\n\ndef g(): 2\n\n@patch\ndef h(self: C): 3')
    f, g, h, other = (code(f"#| echo: false\nshow_doc({name})") for name in ("f", "g", "C.h", "k"))
    prose = {"cell_type": "markdown", "source": ["f"]}
    nb = {"cells": [prose, other, h, cell, g, f, other, cell]}
    docs.order_documentation(nb)
    assert nb["cells"] == [prose, other, f, g, h, cell, other, cell]


def test_a_class_is_shown_by_its_own_arguments(tmp_path):
    own = "    x: int = 1   # one\n    y: str = ''  # two\n"
    (tmp_path / "m.py").write_text(f"class A(Base):\n{own}    def f(self): ...")
    signature = "### A\n\n```python\ndef A(\n" + "    a:int=0,\n" * 30 + "    x:int=1\n)\n```\n\nText"
    nb = {"cells": [code("show_doc(A)", signature), code("show_doc(B)", signature)]}
    docs.own_arguments(nb, tmp_path)
    a, b = ("".join(c["outputs"][0]["data"]["text/markdown"]) for c in nb["cells"])
    assert a == f"### A\n\n```python\nclass A(\n{own}    **others,   # those of Base\n)\n```\n\nText"
    assert b == signature
    nb = {"cells": [code("show_doc(A)", "### A\n\n```python\ndef A(\n    x:int=1\n)->None:\n```\n\n*One.*")]}
    docs.own_arguments(nb, tmp_path)
    assert "".join(nb["cells"][0]["outputs"][0]["data"]["text/markdown"]) == (
        "### A\n\n```python\nclass A(\n    x:int=1\n)\n```\n\n*One.*")


def test_the_first_paragraph_of_a_docstring_is_in_italics():
    assert docs.slanted("```python\ndef f():\n```\n\n*One,*\ntwo.\n\nThree.") == (
        "```python\ndef f():\n```\n\n*One,\ntwo.*\n\nThree.")
    assert docs.slanted("*One.*\n\n- two\n- three") == "*One.*\n\n- two\n- three"


def test_the_badge_is_a_link_and_no_figure(tmp_path):
    badge = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://c.example/x.ipynb)"
    (tmp_path / "20_rows.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [badge]}]}))
    docs.mend_pages(tmp_path, tmp_path)
    cell = json.loads((tmp_path / "20_rows.ipynb").read_text())["cells"][0]
    assert cell["source"] == ['<a class="colab" href="https://c.example/x.ipynb">Open in Colab</a>']


def test_a_default_that_fills_lines_is_left_out():
    long = "    a:dict={" + "'x': 1, " * 30 + "}, # what\n    b:int=1,\n"
    assert docs.LONG_DEFAULT.sub(r"\1…", long) == "    a:dict=…, # what\n    b:int=1,\n"


def test_an_output_without_a_letter_is_left_out(tmp_path):
    printed = [{"output_type": "stream", "name": "stdout", "text": [text]} for text in ("\n", "one\n")]
    (tmp_path / "20_rows.ipynb").write_text(json.dumps({"cells": [code("f()") | {"outputs": printed}]}))
    docs.mend_pages(tmp_path, tmp_path)
    assert json.loads((tmp_path / "20_rows.ipynb").read_text())["cells"][0]["outputs"] == printed[1:]


def test_every_picture_has_a_text(tmp_path):
    assert docs.without_alt(REPO / "nbs") == []
    picture = {"output_type": "display_data", "data": {"image/png": "x"}}
    cells = {"a": '#| fig-alt: "Bars: nDCG@10 of each mode"\nplot()', "b": "plot()",
             "c": '#| fig-alt: "bars"\nplot()'}
    (tmp_path / "20_rows.ipynb").write_text(json.dumps({"cells": [
        *({"cell_type": "code", "id": i, "source": [s], "outputs": [picture]} for i, s in cells.items()),
        {"cell_type": "markdown", "source": ["![](images/x.png)"]}]}))
    bad = docs.without_alt(tmp_path)
    assert [b.split(" shows")[0] for b in bad[:2]] == ["20_rows.ipynb: the cell b", "20_rows.ipynb: the cell c"]
    assert bad[2] == "20_rows.ipynb: ![](images/x.png) has no text"


def test_what_other_hosts_would_send_is_taken_out(tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<head><script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" integrity="x">'
                    '</script>\n<script src="own.js"></script>\n<script type="application/javascript">'
                    "define('jquery', [],function() {return window.jQuery;})</script></head>")
    style = tmp_path / "libs" / "theme.css"
    style.parent.mkdir()
    own = """:root{color:#fff}a{background:url('data:image/svg+xml,<svg xmlns="http://www.w3.org/2000/svg"/>')}"""
    style.write_text('@import"https://fonts.example.com/css2?family=Lato:wght@400;700&display=swap";' + own)
    assert [b for b in docs.check(tmp_path, [], "https://b.example")[0] if b.startswith("theme.css: needs")]
    docs.without_other_hosts(tmp_path)
    assert page.read_text() == '<head><script src="own.js"></script>\n</head>'
    assert style.read_text() == own
    assert not [b for b in docs.check(tmp_path, [], "https://b.example")[0] if "needs another host" in b]


def test_the_font_has_what_formulas_need(tmp_path):
    if find_spec("ziamath") is None: pytest.skip("ziamath (extra: dev) brings the font")
    from fontTools.ttLib import TTFont
    docs.math_font(tmp_path / "math.woff")
    font = TTFont(tmp_path / "math.woff")
    assert "MATH" in font and font.flavor == "woff"
    assert set("√∑∫∈∩≤·→αβλτ𝑥𝐪ℝ𝒩") <= set(map(chr, font.getBestCmap()))
    assert (tmp_path / "math.woff").stat().st_size < 300_000


# ---- the order of reading

def book(folder, chapters, sidebar):
    "Notebooks that hold only prose, {name: its last section}, and the order they are read in."
    (folder / "sidebar.yml").write_text(docs.yaml.safe_dump({"website": {"sidebar": {"contents": [
        {"section": "All", "contents": sidebar}]}}}))
    for name, last in chapters.items():
        cells = [{"cell_type": "markdown", "source": [text]} for text in ("# Title", last)]
        (folder / name).write_text(json.dumps({"cells": cells}))
    return folder


def test_chapters_follow_the_order_of_reading(tmp_path):
    assert docs.out_of_order(REPO / "nbs") == []
    first = "[A](20_a.ipynb), [B](10_b.ipynb)"
    good = {"index.ipynb": first, "20_a.ipynb": "## What to read next\n\n[B](10_b.ipynb)",
            "10_b.ipynb": "## What to read next\n\n"}
    order = ["index.ipynb", "20_a.ipynb", "10_b.ipynb"]
    assert docs.out_of_order(book(tmp_path, good, order)) == []
    assert docs.out_of_order(book(tmp_path, good, order[:2])) == ["10_b.ipynb is not in sidebar.yml"]
    assert docs.out_of_order(book(tmp_path, good,
                                  [*order, "11_c.ipynb"])) == ["sidebar.yml lists 11_c.ipynb, which is not there"]
    assert docs.out_of_order(book(tmp_path, good | {"index.ipynb": "[A](20_a.ipynb)"}, order)) == [
        "the first page does not lead to 10_b.ipynb"]
    elsewhere = good | {"20_a.ipynb": "## What to read next\n\n[A](20_a.ipynb)", "10_b.ipynb": "The end."}
    assert docs.out_of_order(book(tmp_path, elsewhere, order)) == [
        "20_a.ipynb leads to ['20_a.ipynb'] first, and 10_b.ipynb comes next",
        "10_b.ipynb does not end with what to read next"]


def test_the_page_of_public_names():
    page = docs.api_page(REPO / "nbs", REPO / "bgem3_nb")
    front, *modules = page.split("\n## ")[1:]
    import bgem3_nb
    assert [name for name in bgem3_nb.__all__ if not name.startswith("__") and f"| [`{name}`](" not in front] == []
    assert [m.split("`")[1] for m in modules][:3] == ["bgem3_nb.backbone", "bgem3_nb.model", "bgem3_nb.encoding"]
    files = next(m for m in modules if m.startswith("`bgem3_nb.files`"))
    assert "[`replacing`](90_files.ipynb#replacing)" in files
