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
    signature = f"### f\n\n```python\ndef f(\n    x, # as {link} writes it\n):\n```\n\n*Like {link}, not [`g`]({URL}/rows.html#g).*"
    prose = f"See {link}, [{link}](20_rows.ipynb), [what {link} does](20_rows.ipynb) and [`x`](https://example.com/#x)."
    cells = [{"cell_type": "markdown", "source": [prose]}, {"cell_type": "code", "source": "", "outputs": [{"data": {"text/markdown": signature.splitlines(keepends=True)}}]}]
    (tmp_path / "20_rows.ipynb").write_text(json.dumps({"cells": cells}))
    docs.mend_links(tmp_path, URL)
    cells = json.loads((tmp_path / "20_rows.ipynb").read_text())["cells"]
    assert cells[0]["source"] == [f"See {link}, [`f`](20_rows.ipynb), [what `f` does](20_rows.ipynb) and [`x`](https://example.com/#x)."]
    assert cells[1]["outputs"][0]["data"]["text/markdown"] == ["### f\n", "\n", "```python\n", "def f(\n", "    x, # as `f` writes it\n", "):\n", "```\n", "\n", f"*Like {link}, not `g`.*"]   # lines, as Quarto reads them


@pytest.mark.parametrize("body, wrong", [
    (f'<a href="{URL}/losses.html">x</a>', "losses.html leads nowhere"),
    (f'<a href="{URL}/rows.html#there">x</a>', None), (f'<a href="{URL}/rows.html#nowhere">x</a>', "no such heading"), (f'<a href="{URL}/">x</a>', None),
    ("<code># as [`f`](https://x.github.io/book/rows.html)</code>", "shows Markdown"), ("[<code>f</code>](10_losses.ipynb)", "shows Markdown"),
    ("<script>f = '](https://x'</script> a[0](x)", None), ('<a href="other.html">x</a>', "other.html leads nowhere")])
def test_a_page_is_checked(tmp_path, body, wrong):
    (tmp_path / "20_rows.html").write_text(f'<h1 id="there">Rows</h1>{body}')
    (tmp_path / "index.html").write_text("<h1>Book</h1>")
    found, _ = docs.check(tmp_path, [REPO / "nbs" / "20_rows.ipynb", REPO / "nbs" / "index.ipynb"], URL)
    assert (len(found) == 1 and wrong in found[0]) if wrong else found == [], found
