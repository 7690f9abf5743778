"""The tools that build the site: what they mend in nbdev's pages, and what they find wrong with a page."""
import json
import sys

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
    ("<script>f = '](https://x'</script> a[0](x)", None), ('<a href="other.html">x</a>', "other.html leads nowhere")])
def test_a_page_is_checked(tmp_path, body, wrong):
    (tmp_path / "20_rows.html").write_text(f'<h1 id="there">Rows</h1>{body}')
    (tmp_path / "index.html").write_text("<h1>Book</h1>")
    found, _ = docs.check(tmp_path, [REPO / "nbs" / "20_rows.ipynb", REPO / "nbs" / "index.ipynb"], URL)
    assert (len(found) == 1 and wrong in found[0]) if wrong else found == [], found


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
