"""The report as a PDF: it opens, its text can be read and searched in every script, and no text of a set becomes part
of the program that sets it."""
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPO
from pypdfium2 import PdfDocument

from bgem3_nb import report
from bgem3_nb.eval_sets import eval_set, sample_set
from bgem3_nb.evaluation import Evaluation, query_results
from bgem3_nb.experiments import paired_tests

VIETNAMESE = "Người lao động đơn phương chấm dứt hợp đồng phải báo trước bao nhiêu ngày?"
PLAIN = "كتب عليكم الصيام كما كتب على الذين من قبلكم"
ARABIC = "إِنَّمَا الْأَعْمَالُ بِالنِّيَّاتِ وَإِنَّمَا لِكُلِّ امْرِئٍ مَا نَوَى"
HOSTILE = ['#panic("x")', '"); #eval("1+1")', "*bold* _it_ $x^2$ `raw` @ref <label>",
           "]]} // /* \\ #import \"a.typ\": *", "= heading\n+ list\n#set page(width: 1cm)",
           '{"t": "x"}, \u2028\u2029 \\u0000 \x00\x1b\ud800\ufffe']


def pdf_texts(pdf):
    "The text of each page with single spaces."
    return [" ".join(page.get_textpage().get_text_range().split()) for page in PdfDocument(pdf)]


def bare(text):
    "Arabic letters alone."
    return "".join(c for c in text if "\u0621" <= c <= "\u064a" and c != "\u0640")


@pytest.fixture(scope="module")
def results():
    "Two systems on 40 questions of the company, the first of them better, with made cost."
    data = sample_set(eval_set(REPO / "data" / "gold" / "company.jsonl"), 30)
    hostile = [q.replace("\ud800", "") for q in HOSTILE]     # pandas refuses half of a surrogate pair
    data = replace(data, queries=[VIETNAMESE, ARABIC, *hostile, *data.queries[8:]])
    rng, evals, n = np.random.default_rng(0), {}, len(data)
    for system, shift in (("mine all", .2), ("BM25", 0)):
        values = np.clip(rng.random(n) * .8 + shift, 0, 1)
        evals[system] = Evaluation({"nDCG@10": values}, np.ones(n, int), np.zeros(n, int), values)
    tests = paired_tests({("company", "mine all", "BM25"): tuple(evals.values())})
    costs = {m: {"parameters": None, "bytes": {}, "dimensions": {}, "systems": {}} for m in ("mine", "BM25")}
    r = report.Results({"company": data}, {"company": evals}, {"mine all": "mine", "BM25": "BM25"}, tests, costs,
                       slices=("category",), date="1 January 2026")
    of = dict(iter(query_results({s: evals[s] for s in r.contenders()}, data, labels={}).groupby("mode")))
    r.examples = report.pick_examples({"company": report.changed_queries(*(of[s] for s in r.contenders()))})
    return r


def test_the_pdf_opens_and_its_text_can_be_searched(results, tmp_path):
    results = replace(results, examples=[
        {**results.examples[n], "query": q, "right": VIETNAMESE, "first": [PLAIN, None], "first_id": ["x", None],
         "rank": [2, None], "why": [f"most from {ARABIC.split()[0]}", ""]} for n, q in enumerate((VIETNAMESE, ARABIC))])
    path = tmp_path / "report.pdf"
    report.write_report(results, path, "Tìm kiếm nào trả lời tốt hơn?")
    pages = pdf_texts(path)
    assert 2 <= len(pages) <= 6
    whole = " ".join(pages)
    assert "Tìm kiếm nào trả lời tốt hơn?" in pages[0] and "1 January 2026" in pages[0]
    assert VIETNAMESE in whole and PLAIN in whole and "(nothing was found)" in whole
    assert set(bare(ARABIC)) <= set(bare(whole)) and "\u0651" in whole     # letters with vowels are stored twice
    low, high = results.evals["company"]["mine all"].interval()
    assert f"{results.average('mine all'):.3f}" in whole and f"{low:.3f} – {high:.3f}" in whole
    for rule in report.RULES: assert rule in whole
    assert report.recommend(results).sentences[0] in whole


def test_no_text_becomes_markup(results, tmp_path):
    "Hostile names of sets, systems and failures, and hostile questions, come out as they went in."
    (data,), (of,) = results.sets.values(), results.evals.values()
    evil = "#panic() $x$ [*a*]"
    systems = {s: f"{s} {evil}" for s in of}
    tests = {(evil, *(systems[s] for s in key[1:])): t for key, t in results.tests.items()}
    examples = [{**results.examples[0], "set": evil, "query": q, "right": q, "first": [q, q], "first_id": ["x", "x"],
                 "why": [q, q]} for q in HOSTILE]
    r = report.Results({evil: data}, {evil: {systems[s]: e for s, e in of.items()}}, {v: v for v in systems.values()},
                       tests, {}, examples=examples, failures={evil: HOSTILE[0]}, slices=("category",))
    report.write_report(r, tmp_path / "r.pdf", evil)
    whole = " ".join(pdf_texts(tmp_path / "r.pdf"))
    for text in (*HOSTILE[:4], "set page(width: 1cm)", f"mine all {evil}", f"{evil}: {HOSTILE[0]}"):
        assert report.clean_text(text) in whole, text
    assert not any(text in report.TEMPLATE for text in HOSTILE)


@pytest.mark.parametrize("width", [1, 3])
def test_signs_that_no_font_has_do_not_stop_the_report(width):
    "Typst panics where a line with such a sign is broken from right to left; the pages are then set without the sign."
    quran = "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ ۝ ذَٰلِكَ ٱلْكِتَٰبُ لَا رَيْبَ ۛ فِيهِ \U0001fae0 \U00030000"
    block = {"kind": "table", "widths": [width, 17 - width], "head": [report.text_cell("a")] * 2, "left": 2,
             "rows": [[report.text_cell(quran), report.text_cell(VIETNAMESE)]]}
    (page,) = pdf_texts(report.set_pages("x", [block]))
    assert VIETNAMESE in page and set(bare(quran)) <= set(bare(page))


def test_without_typst_it_is_one_sentence_and_everything_else_is_there(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(ImportError, match=r"pip install 'bgem3_nb\[report\]'"):
        report.write_report(results, tmp_path / "r.pdf")
    assert not (tmp_path / "r.pdf").exists()


def test_importing_the_chapter_needs_neither_typst_nor_fonts():
    code = ("import sys, bgem3_nb.report; "
            "print(json.dumps([m for m in ('typst', 'psutil', 'matplotlib') if m in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], cwd=REPO, capture_output=True, text=True)
    assert "typst" not in json.loads(done.stdout), done.stderr


def test_a_manager_reads_what_the_ways_to_search_are(results):
    "Each way by its name as in the tables; findings are a note, which takes no page of its own."
    costs = {"parameters": 118e6, "bytes": {"dense": 1, "lexical": 1, "multi": 1}}
    words = report.model_in_words("mine", costs)
    for way in ("dense: a vector per text", "lexical: weighted terms", "multi: one per token"): assert way in words
    assert len(words) < 92     # one line of the table
    blocks = report.report_blocks(results)
    assert "“all” mixes the others" in str(blocks)
    results.sets["company"].amiss["rows that are odd"] = ["line 1"]
    last = report.report_blocks(results)[-1]
    assert last["kind"] == "text" and "Found in the sets: company: 1 rows that are odd." in str(last)
