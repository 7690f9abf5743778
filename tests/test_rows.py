"Rows and sources at their edges: bad files, interrupted writes, what a fresh process leaves behind."
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgem3_nb.readers as readers
import bgem3_nb.rows as rows_module
import bgem3_nb.splits as splits
from bgem3_nb.readers import read_batches, read_rows, write_rows
from bgem3_nb.rows import Rejected, RowError, make_rows
from bgem3_nb.splits import merge_queries, split_rows
from bgem3_nb.sources import load_source

REPO = Path(__file__).parent.parent
GOOD = '{"query": "q", "pos": ["p"]}\n'
ROW = {"query": "q", "pos": ["p"]}

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 8\n"


def line(**fields): return json.dumps({**ROW, **fields}) + "\n"


BAD_FILES = {  # name -> content, line, field, part of the sentence
    "missing.jsonl": (GOOD + '{"query": "q"}\n', 2, "pos", "missing column"),
    "no_query.jsonl": ('{"pos": ["p"]}\n', 1, "query", "missing column; the row has 'pos'"),
    "empty_list.jsonl": (GOOD + GOOD + line(pos=[]), 3, "pos", "no positive passage"),
    "empty_pos.jsonl": (line(pos=["p", " "]), 1, "pos", "item 2: the text is empty"),
    "null_pos.jsonl": (line(pos=None), 1, "pos", "no positive passage"),
    "null_item.jsonl": (line(pos=["p", None]), 1, "pos", "item 2: expected text but found NoneType"),
    "blank_query.jsonl": (line(query=" "), 1, "query", "the text is empty"),
    "number.jsonl": (line(query=5), 1, "query", "expected text but found int '5'"),
    "object_neg.jsonl": (GOOD + line(neg={"a": 1}), 2, "neg", "expected a list but found dict"),
    "blank_neg.jsonl": (line(neg=["n", ""]), 1, "neg", "item 2: the text is empty"),
    "twice.jsonl": (GOOD + '{"query": "q", "query": "r", "pos": ["p"]}\n', 2, "", "the field 'query' stands twice"),
    "digits.jsonl": (GOOD + '{"query": "q", "pos": ["p"], "pos_scores": [' + "1" * 5000 + "]}\n" + GOOD,
                     2, "pos_scores", "expected a number"),
    "deep.jsonl": (GOOD + "[" * 100_000 + "\n" + GOOD, 2, "", "too many brackets"),
    "numpy.jsonl": (GOOD + line(pos="['a' 'b']"), 2, "pos", "cannot be read with certainty"),
    "scores.jsonl": (line(pos_scores=[1, 2]), 1, "pos_scores", "2 values for the 1 texts of 'pos'"),
    "text_score.jsonl": (line(pos_scores=["high"]), 1, "pos_scores", "expected a number but found str 'high'"),
    "nan_score.jsonl": ('{"query": "q", "pos": ["p"], "pos_scores": [NaN]}\n', 1, "pos_scores", "expected a number"),
    "typo.jsonl": (GOOD + line(negs=["n"]), 2, "negs", "did you mean 'neg'?"),
    "extra.jsonl": (line(page=4), 1, "page", "ignore=['page']"),
    "surrogate.jsonl": ('{"query": "\\ud800", "pos": ["p"]}\n', 1, "query", "surrogate"),
    "array_line.jsonl": (GOOD + '["q", "p"]\n', 2, "", "expected an object with fields but found list"),
    "half.jsonl": (GOOD + '{"query": "q", "po', 2, "", "not valid JSON at column"),
    "latin.jsonl": (GOOD.encode() + b'{"query": "caf\xe9", "pos": ["p"]}\n', 2, "", "not UTF-8"),
    "gzip.jsonl": (b"\x1f\x8b\x08\x00", 1, "", "not UTF-8"),
    "empty.jsonl": ("", None, "", "holds no rows"),
    "array.json": ('[\n{"query": "q", "pos": "p"},\n{"query": "q"}]', 2, "pos", "row 2, field 'pos': missing column"),
    "broken.json": ('[\n{"query": "q",\n"pos"}]', 3, "", "not valid JSON"),
    "column.csv": ("query,text\nq,p\n", 2, "text", "unknown column"),
    "cell.csv": ("query,positive\nq,p\nq,\n", 3, "pos", "no positive passage"),
    "bytes.csv": (b"query,positive\nq,p\nq,caf\xe9\nq,p\n", 3, "", "not UTF-8"),
    "multiline.csv": ('query,positive\n"q\nq",p\n,p\n', 4, "query", "the text is empty"),
    "cells.tsv": ("query\tpos\nq\tp\tx\n", 2, "", "3 cells under a header of 2"),
    "twice.csv": ("query,pos,pos\nq,p,p\n", 1, "pos", "two columns have this name"),
    "quotes.csv": ('query,pos\nq,p\nq,"p\n', 3, "", "check the quotes"),
    "header.csv": ("query,pos\n", None, "", "holds no rows"),
    "broken.parquet": (b"PAR1 and no more", None, "", "not a readable Parquet file"),
    **{f"pointer{ending}": (POINTER, None, "", "a Git LFS pointer, not the file itself; run git lfs pull")
       for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet")},
    "rows.txt": (GOOD, None, "", "unknown format '.txt'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_line_and_field(name, tmp_path):
    content, line, field, text = BAD_FILES[name]
    path = tmp_path/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_rows, load_source):
        with pytest.raises(RowError) as error: read(path)
        e = error.value
        assert (e.file, e.line, e.field) == (str(path), line, field)
        message = str(e)
        assert text in message and message.startswith(str(path)) and "\n" not in message
        if line: assert f"line {line}" in message or f"row {line}" in message
        if field: assert f"field '{field}'" in message


def test_bad_parquet_row(tmp_path):
    path = tmp_path/"rows.parquet"
    pq.write_table(pa.table({"query": ["q", "q"], "pos": pa.array([["p"], []], pa.list_(pa.string()))}), path)
    with pytest.raises(RowError, match="row 2, field 'pos': no positive passage"): read_rows(path)


def test_wrong_path(tmp_path):
    write_rows([ROW], tmp_path/"train.jsonl")
    guess = r"no such file; did you mean 'train\.jsonl'\?"
    with pytest.raises(RowError, match=guess): read_rows(tmp_path/"trian.jsonl")
    with pytest.raises(RowError, match="no such file; check the path"): read_rows(tmp_path/"away"/"x.jsonl")
    with pytest.raises(RowError, match="directory"): read_rows(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_rows([ROW], tmp_path/"rows.jsonl")
    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(readers, "open", refuse, raising=False)
    with pytest.raises(RowError, match=r"rows\.jsonl: cannot be read \(Permission denied\)"): read_rows(path)


def test_round_trip_of_every_column(tmp_path):
    full = {"query": "q\u2028\n\"", "pos": ["p", "ế"], "neg": ["n"],
            "pos_scores": [0.1, 1e-30], "neg_scores": [1 / 3], "neg_weights": [2.0],
            "neg_types": [["price", "area"]], "prompt": "query: ",
            "language": "vi", "query_type": "t", "source": "s", "domain": "d",
            "difficulty": "hard", "query_id": "1", "pos_ids": ["a", "b"], "neg_ids": ["c"]}
    path = write_rows([full, ROW], tmp_path/"new"/"rows.jsonl")
    assert read_rows(path)[0] == full
    assert read_rows(path, source_name="").to_list() == make_rows([full, ROW]).to_list()


def test_sentence_transformers_and_flagembedding_columns(tmp_path):
    path = tmp_path/"t.csv"
    path.write_text("anchor,positive,negative_1,negative_2\na,b,c,d\na,b,c,\n")
    assert read_rows(path)["neg"][:] == [["c", "d"], ["c"]]
    path = tmp_path/"f.jsonl"
    path.write_text(json.dumps({"id": 7, "query": "a", "pos": ["b"], "neg": [], "pos_scores": [1], "neg_scores": [],
                                "prompt": None, "type": "x"}))
    row = read_rows(path)[0]
    assert (row["query_id"], row["prompt"], row["query_type"]) == ("7", "", "x")
    assert (row["pos_scores"], row["source"]) == ([1.0], "f")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = write_rows([ROW], tmp_path/"rows.jsonl")
    before, real, calls = path.read_bytes(), json.dumps, []
    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2: raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(readers.json, "dumps", fails)
    with pytest.raises(type(error)): write_rows([ROW] * 5, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_row_writes_nothing(tmp_path):
    with pytest.raises(RowError): write_rows([ROW, {"query": "q"}], tmp_path/"new"/"rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_killed_write_leaves_the_old_file(tmp_path):
    path = write_rows([ROW], tmp_path/"rows.jsonl")
    before = path.read_bytes()
    script = f"""
import json
import time
from bgem3_nb.readers import write_rows
from bgem3_nb.rows import make_rows
rows, real = make_rows([{ROW!r}] * 1000), json.dumps
def slow(*a, **k):
    print("writing", flush=True)
    time.sleep(.2)
    return real(*a, **k)
json.dumps = slow
write_rows(rows, {str(path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == before
    assert len(read_rows(write_rows([ROW] * 2, path))) == 2


def test_nothing_is_left_on_disk_or_printed(tmp_path):
    script = f"""
from bgem3_nb.sources import load_source
from bgem3_nb.splits import merge_queries, retrieval_set, split_rows
rows = load_source({str(REPO/"data"/"law_mini.jsonl")!r})
parts = split_rows(merge_queries(rows), test="Bộ luật Lao động 2019")
rs = retrieval_set(parts["test"], corpus=parts["train"])
assert (len(rs), len(rs.passages)) == (60, 114), (len(rs), len(rs.passages))
"""
    folders = {name: str(tmp_path/name) for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "BGEM3_NB_CACHE")}
    for folder in folders.values(): Path(folder).mkdir()
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=REPO, env={**os.environ, **folders},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_killed_extraction_leaves_no_cache(tmp_path, monkeypatch):
    import whoosh  # noqa: F401
    import bgem3_nb.sources as sources
    monkeypatch.setenv("BGEM3_NB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_read_index", lambda folder: [{"id": "1:1"}])
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): sources.quran_verses()
    assert list(tmp_path.iterdir()) == []


# Batches, streams, and rows that are rejected

VALUES = st.one_of(st.none(), st.text(max_size=3), st.integers(-3, 3), st.floats(allow_nan=True, allow_infinity=True),
                   st.booleans(), st.sampled_from([" ", "\u3000", "\x1c", "2020-01-01", "é"]))
LISTS = st.one_of(VALUES, st.lists(VALUES, max_size=3), st.lists(st.text(min_size=1, max_size=2), max_size=3),
                  st.lists(st.lists(st.text(max_size=2), max_size=2), max_size=2))
LIST_COLUMNS = ("neg", "pos_scores", "neg_scores", "neg_types", "pos_ids", "language", "query_id", "negative_1")
ROWS = st.fixed_dictionaries({"query": st.one_of(st.just("q"), VALUES), "pos": st.one_of(st.just(["p"]), LISTS)},
                             optional=dict.fromkeys(LIST_COLUMNS, LISTS))


def outcome(read):
    exact = lambda row: row | {name: list(map(repr, row[name])) for name in ("pos_scores", "neg_scores")}
    try: return [exact(row) for row in read().to_list()]
    except RowError as e: return e.line, e.field, e.what


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=3), good=st.integers(0, 1), nfc=st.booleans())
def test_the_check_of_a_batch_agrees_with_the_check_of_its_rows(rows, good, nfc, tmp_path):
    "Both readings of the same bytes give the same rows, or the same error at the same place."
    path = tmp_path/"rows.jsonl"
    path.write_text((GOOD * good) + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    quick = outcome(lambda: read_rows(path, nfc=nfc))
    whole, readers._arrow_json = readers._arrow_json, lambda *a: None
    try: assert outcome(lambda: read_rows(path, nfc=nfc)) == quick
    finally: readers._arrow_json = whole


@pytest.mark.parametrize("name", BAD_FILES)
def test_rows_in_are_rows_out_and_rows_rejected(name, tmp_path):
    content, line, field, text = BAD_FILES[name]
    path = tmp_path/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    whole_file = line is None or name in ("twice.csv", "broken.json",   # nothing can be read behind the mistake
                                          "extra.jsonl", "column.csv")  # it is one of all rows
    if whole_file:
        with pytest.raises(RowError), Rejected(tmp_path/"rejected.jsonl") as rejected:
            read_rows(path, rejected=rejected)
        assert [p.name for p in tmp_path.iterdir()] == [name]
        return
    with Rejected(tmp_path/"rejected.jsonl") as rejected: rows = read_rows(path, rejected=rejected)
    records = [json.loads(s) for s in rejected.path.read_text(encoding="utf-8").splitlines()]
    given = len(content.splitlines()) - (path.suffix in (".csv", ".tsv")) if path.suffix != ".json" else 2
    if name == "multiline.csv": given = 2
    assert len(rows) + rejected.count == len(rows) + len(records) == given
    bad = records[0]
    assert (bad["file"], bad["line"], bad["field"]) == (str(path), line, field)
    assert text.split(": ")[-1] in bad["reason"] and bad["row"]


def test_good_rows_around_bad_ones_in_every_block(tmp_path, monkeypatch):
    blocks = readers._blocks
    monkeypatch.setattr(readers, "_blocks", lambda path: blocks(path, 500))
    path = tmp_path/"rows.jsonl"
    lines = [line(query=f"q{i}", **({"pos": [""]} if i % 97 == 5 else {}), query_id=f"{i}\u2028") for i in range(1000)]
    path.write_text("".join(lines), encoding="utf-8")
    with Rejected(tmp_path/"bad"/"rejected.jsonl") as rejected: rows = read_rows(path, rejected=rejected)
    assert rows["query"][:] == [f"q{i}" for i in range(1000) if i % 97 != 5]
    bad = [json.loads(s)["line"] for s in open(rejected.path, encoding="utf-8")]
    assert bad == [i + 1 for i in range(1000) if i % 97 == 5]
    assert rejected.reasons == {"pos: the text is empty; fill it in, or remove the row": rejected.count}
    with pytest.raises(RowError, match="line 6, field 'pos'"): read_rows(path)


def test_a_stream_is_never_held(tmp_path):
    "Batches go from file to file; at no time is more than a few of them in memory."
    path = tmp_path/"rows.jsonl"
    with open(path, "w") as f: f.writelines(line(query=f"q{i}", pos=["x" * 900]) for i in range(30_000))
    pa.default_memory_pool().release_unused()
    before, peak, n = pa.total_allocated_bytes(), 0, 0
    def watched():
        nonlocal peak, n
        for batch in read_batches(path):
            peak, n = max(peak, pa.total_allocated_bytes() - before), n + len(batch)
            yield batch
    write_rows(watched(), tmp_path/"rows.parquet")
    assert n == 30_000 and peak < path.stat().st_size * .8
    assert read_rows(tmp_path/"rows.parquet", source_name="rows").to_list() == read_rows(path).to_list()


def test_merge_and_split_are_the_same_in_any_batches(monkeypatch):
    rows = make_rows({"query": f"q {i % 70}", "pos": [f"p{i}"], "neg": [f"n{i % 3}"], "domain": "ab"[i % 2]}
                     for i in range(300))
    merged, parts = merge_queries(rows, within=None).to_list(), split_rows(rows, test="b", valid=.2)
    real, asked = rows_module.row_batches, []
    def small(rows, columns=None, size=7):
        asked.append(columns)
        return real(rows, columns, 7)
    for module in (rows_module, splits): monkeypatch.setattr(module, "row_batches", small)
    assert merge_queries(rows, within=None).to_list() == merged and len(merged) == 70
    assert [r["pos"] for r in merged][:2] == [[f"p{i}" for i in range(j, 300, 70)] for j in (0, 1)]
    again = split_rows(rows, test="b", valid=.2)
    assert asked
    assert all(again[k].to_list() == parts[k].to_list() for k in parts)


@pytest.mark.parametrize("share, queries, held", [(.1, 15, 2), (.3, 11, 4), (.01, 7, 1), (.25, 8, 2), (0, 9, 0)])
def test_a_share_is_rounded_up_to_whole_queries(share, queries, held):
    rows = make_rows({"query": f"q{i}", "pos": "p"} for i in range(queries))
    assert len(split_rows(rows, valid=share)["valid"]) == held
    if share: assert len(split_rows(rows, test=share, valid=0)["test"]) == held


def test_arabic_keeps_the_order_of_its_marks_on_both_paths(tmp_path):
    apart = unicodedata.normalize("NFD", "Điều khoản ")
    arabic = "\u0631\u064e\u0628\u0651\u064f"                             # shadda, then the vowel
    texts = [apart, arabic, apart + arabic, "plain"]
    expected = ["Điều khoản ", arabic, "Điều khoản " + arabic, "plain"]
    assert unicodedata.normalize("NFC", arabic) != arabic
    path = tmp_path/"rows.jsonl"
    path.write_text("".join(line(query=t, neg=[t]) for t in texts), encoding="utf-8")
    quick, slow = read_rows(path), make_rows({"query": t, "pos": "p", "neg": [t]} for t in texts)
    for rows in (quick, slow): assert (rows["query"][:], [n[0] for n in rows["neg"]]) == (expected, expected)
    assert read_rows(path, nfc=False)["query"][:] == texts
