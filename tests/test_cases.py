"""The case studies: each page runs one chain, shows it whole, and its stored output is of that chain as it is now."""
import json
import re

import pytest
from conftest import REPO
from test_chains import check_judged, check_steps

from bgem3_nb.chains import chain_mark, plan_chain

PAGES = {path.stem: path for path in sorted((REPO / "nbs").glob("7[0-9]_*.ipynb"))}


def code_cells(path):
    "The code cells of a page: (source, text of its outputs)."
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] != "code": continue
        shown = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in c["outputs"]]
        yield "".join(c["source"]), "\n".join("".join(text) for text in shown)


def chains_of(path):
    "Name -> what the page printed of the chain after it ran."
    found = {}
    for source, shown in code_cells(path):
        for name in re.findall(r'plan_chain\("(\w+)"', source): found[name] = shown
    return found


def test_there_are_five_cases():
    assert list(PAGES) == ["70_law", "71_company", "72_rental", "73_islamic", "74_own_data"]


@pytest.mark.parametrize("page", PAGES)
def test_the_stored_run_of_a_case_is_of_its_chain_as_it_is(page):
    "The page shows the chain's file, every step of it has run, and the mark is that of the files now."
    found = chains_of(PAGES[page])
    assert found
    everything = "\n".join(shown for _, shown in code_cells(PAGES[page]))
    for name, shown in found.items():
        chain = plan_chain(name)
        assert f"{chain.file.name}, {chain_mark(chain)}: {', '.join(chain.plans)}" in shown, f"execute {page} anew"
        assert chain.file.read_text(encoding="utf-8").strip() in everything


@pytest.mark.parametrize("page", PAGES)
def test_a_case_says_what_did_not_work_and_what_to_do(page):
    cells = json.loads(PAGES[page].read_text(encoding="utf-8"))["cells"]
    titles = re.findall(r"^## (.+)$", "\n".join("".join(c["source"]) for c in cells), re.M)
    assert {"What did not work", "What to do next"} <= set(titles)
    assert not any(o["output_type"] == "error" for c in cells for o in c.get("outputs", []))
    shown = [c for c in cells if c["cell_type"] == "code" and not "".join(c["source"]).startswith("#| hide")]
    assert all(c["outputs"] for c in shown[:1] + [c for c in shown if "gains(" in "".join(c["source"])])


def test_a_case_can_be_executed_at_its_smallest(tmp_path, env, python):
    "Every cell of a page runs, in a process of its own, on a chain whose steps are as small as they can be."
    code = "\n\n".join(source for source, _ in code_cells(PAGES["71_company"]) if "#| eval: false" not in source)
    env |= {"MPLBACKEND": "agg", "BGEM3_NB_SMOKE": str(tmp_path / "run")}
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    check_steps(tmp_path / "run", plan_chain("company").plans)
    check_judged(tmp_path / "run", ["test", "company"])
    assert "prepare/test" in done.stdout
