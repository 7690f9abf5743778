"Every format there and back, also with awkward texts; broken files named with line and field; rejected rows add up."
import json
import re
import shutil
from inspect import signature
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgem3_nb.formats as formats
from bgem3_nb.formats import (
    FORMAT_OPTIONS, FORMATS, HUB, METHODS, WeightConfig, detect_format, fill_weights, load_data, negative_weights,
    save_data)
from bgem3_nb.evaluation import evaluate_scores
from bgem3_nb.rows import Rejected, RowError, make_rows
from bgem3_nb.splits import merge_queries, retrieval_set
from bgem3_nb.text import fold

REPO = Path(__file__).parent.parent
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=6).filter(str.strip)
LABEL = st.sampled_from(["vi", "ar", 'a "quoted", label', "x\ty"])


@st.composite
def row_sets(draw):
    "Rows with distinct queries and passages, as formats without ids can tell apart."
    n = draw(st.integers(1, 4))
    queries = draw(st.lists(TEXTS, min_size=n, max_size=n, unique_by=fold))
    texts = iter(draw(st.lists(TEXTS, min_size=4 * n, max_size=4 * n, unique_by=fold)))
    rows = []
    for i, q in enumerate(queries):
        pos = [next(texts) for _ in range(draw(st.integers(1, 2)))]
        neg = [next(texts) for _ in range(draw(st.integers(0, 2)))]
        rows.append({
            "query": q, "pos": pos, "neg": neg, "query_id": f"q{i}",
            "pos_ids": [f"p{i}{j}" for j in range(len(pos))], "neg_ids": [f"n{i}{j}" for j in range(len(neg))],
            "neg_types": [[draw(LABEL)] for _ in neg], "neg_weights": [draw(st.floats(.5, 4)) for _ in neg],
            "language": draw(LABEL), "query_type": draw(LABEL), "source": draw(LABEL)})
    return make_rows(rows)


KEPT = {  # format -> file, columns that come back as they were
    "rows": ("r.jsonl", None), "rows ": ("r.parquet", None),
    "triplets": ("t.jsonl", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
    "triplets ": ("t.csv", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
    "triplets  ": ("t.tsv", ("query", "pos", "neg", "language")),
    "triplets   ": ("t.parquet", ("query", "pos", "neg", "language")),
    "sentence-transformers": ("st.parquet", ("query", "pos")),
    "instruction": ("i.jsonl", ("query", "pos", "language", "query_type", "source", "query_id")),
    "beir": ("beir", ("query", "pos", "neg", "pos_ids", "neg_ids", "query_id")),
    "company": ("company", ("query", "pos", "language", "query_type", "query_id", "pos_ids")),
    "rental": ("l.json", ("query", "pos", "neg", "neg_types", "neg_weights", "language", "query_id")),
    "rental ": ("l.jsonl", ("query", "pos", "neg", "neg_types", "neg_weights", "language", "query_id")),
    "islamic": ("islamic.jsonl", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
}


def untabbed(value):
    return re.sub(r"[\t\r\n]", " ", value) if isinstance(value, str) else [*map(untabbed, value)]


@pytest.mark.parametrize("name", KEPT)
@settings(max_examples=15, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=row_sets())
def test_round_trip(name, rows, tmp_path):
    file, columns = KEPT[name]
    path = tmp_path/file
    lost = save_data(rows, path, name.strip())
    if file == "t.tsv":   # has no place for tabs and line ends within a text, and says so
        clean = rows.map(lambda row: {c: untabbed(row[c]) for c in columns})
        assert any("tabs and line ends" in note for note in lost) or clean.to_list() == rows.to_list()
        rows = clean
    back = merge_queries(load_data(path, name.strip()).rows, within=None)
    assert len(back) == len(rows)
    for column in columns or rows.column_names: assert list(back[column]) == list(rows[column]), column
    if not columns: assert not lost
    elif "neg_weights" not in columns and any(rows["neg"]): assert any("neg_weights" in s for s in lost)
    for part in ([path] if path.is_file() else list(path.rglob("*"))): assert not part.name.endswith(".tmp")


def test_no_line_is_lost_between_the_chunks_of_a_parquet_file(tmp_path):
    rows = make_rows({"query": f"q{i}", "pos": "p"} for i in range(20_003))
    save_data(rows, tmp_path/"t.parquet", "triplets")
    assert load_data(tmp_path/"t.parquet", "triplets").rows["query"][:] == rows["query"][:]


@pytest.mark.parametrize("name", KEPT)
def test_a_text_that_looks_like_a_printed_list_stays_a_text(name, tmp_path):
    file, columns = KEPT[name]
    more = {"neg_types": [["x"], ["y"]], "neg_weights": [1., 2.], "source": "s", "query_type": "t", "language": "vi"}
    rows = make_rows([{"query": '["q"]', "pos": ["[]"], "neg": ["['a']", '["b", "c"]']} | more,
                      {"query": "[]", "pos": ["['a' 'b']"], "neg": ["['a', 'b']", "[]"]} | more])
    save_data(rows, tmp_path/file, name.strip())
    back = merge_queries(load_data(tmp_path/file, name.strip()).rows, within=None)
    for column in {"query", "pos", "neg"} & {*(columns or rows.column_names)}:
        assert list(back[column]) == list(rows[column])


def test_a_language_is_one_code_in_every_format(tmp_path):
    def language_of(file, text, format):
        (tmp_path/file).write_text(text, encoding="utf-8")
        return {*load_data(tmp_path/file, format).rows["language"]}
    pair = {"query": "hỏi", "pos": "đáp"}
    lines = "".join(json.dumps(pair | {"language": x}) + "\n" for x in ("vi-VN", "vi", "VI", "vie_Latn"))
    assert language_of("a.jsonl", lines, "rows") == {"vi"}
    assert language_of("b.csv", "query,pos,language\na,b,vi-VN\nc,d,vi_vn\n", "rows") == {"vi"}
    task = {"instruction": "a", "output": "b", "language": "vi-VN"}
    assert language_of("c.jsonl", json.dumps(task), "instruction") == {"vi"}
    assert language_of("d.jsonl", json.dumps(pair | {"hard_neg": [], "language": "vi-VN"}), "rental") == {"vi"}
    rows = make_rows([pair | {"language": "Vietnamese"}, pair | {"language": "zh-Hant"}])
    assert rows["language"][:] == ["Vietnamese", "zh"]


def test_the_company_set_survives_a_round_trip(tmp_path):
    first = load_data(REPO/"data"/"company")
    assert detect_format(REPO/"data"/"company") == "company" and len(first.rows) >= 120 and len(first.corpus) >= 40
    save_data(first, tmp_path/"company", "company")
    again = load_data(tmp_path/"company")
    assert again.corpus.to_list() == first.corpus.to_list()
    assert again.qrels.to_list() == first.qrels.to_list() and again.queries.to_list() == first.queries.to_list()
    same = [i for i, t in enumerate(first.rows["neg_types"]) if t == [["hard"]]]
    a, b = (c.rows.select(same).to_list() for c in (first, again))
    assert a == b
    assert repr(first.retrieval_set()) == repr(again.retrieval_set())
    assert all(n[0] not in p for n, p in zip(first.rows["neg"], first.rows["pos"]))
    save_data(first, tmp_path/"beir", "beir", split="test")
    beir = load_data(tmp_path/"beir")
    assert beir.retrieval_set().qrels == first.retrieval_set().qrels


@pytest.mark.parametrize("format", ["beir", "company"])
def test_each_file_of_a_directory_may_be_a_git_lfs_pointer(format, tmp_path):
    save_data(load_data(REPO/"data"/"company"), tmp_path/"good", format)
    files = [p.relative_to(tmp_path/"good") for p in (tmp_path/"good").rglob("*") if p.is_file()]
    assert len(files) >= 3
    for i, file in enumerate(files):
        bad = shutil.copytree(tmp_path/"good", tmp_path/str(i))
        (bad/file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
        with pytest.raises(RowError, match=rf"{file.name}: a Git LFS pointer.*run git lfs pull"): load_data(bad)


LINE = {"query": "q", "positive": "p"}
HARD = LINE | {"hard_negative": "n", "negative_score": "high"}
CORPUS, QUERIES = [{"_id": "d", "text": "t"}], [{"_id": "q", "text": "t"}]
HEADER = "query-id\tcorpus-id\tscore\n"
BROKEN = {  # name -> {file: content}, format, file of the error, line, field, part of the sentence
    "pairs": (
        {"positive_pairs.jsonl": [LINE, {"query": "q"}]},
        "company", "positive_pairs.jsonl", 2, "positive", "missing field; the record has 'query'"),
    "score": (
        {"positive_pairs.jsonl": [LINE], "hard_negatives.jsonl": [HARD]},
        "company", "hard_negatives.jsonl", 1, "negative_score", "expected a number"),
    "chunks": (
        {"positive_pairs.jsonl": [LINE],
         "document_metadata.json": {"documents": [{"id": "a", "chunks": ["x", " "]}]}},
        "company", "document_metadata.json", 1, "chunks", "chunk 2 has no text"),
    "gold": (
        {"gold.jsonl": [{"query": "q", "relevant": ["d"]}, {"query": "r", "relevant": ["e"]}], "corpus.jsonl": CORPUS},
        "gold", "gold.jsonl", 2, "relevant", "the corpus has no passage 'e'"),
    "search log": (
        {"log.jsonl": [{"query": "q", "shown": ["a"], "clicked": ["a"]},
                       {"query": "r", "shown": ["a"], "clicked": "b"}]},
        "search_log", "log.jsonl", 2, "clicked", "'b' was clicked and not shown"),
    "passage": (
        {"c.jsonl": [{"text": "t"}, {"text": " ", "id": 1}]},
        "corpus", "c.jsonl", 2, "text", "neither a text nor a title"),
    "corpus id": (
        {"corpus.jsonl": [*CORPUS, {"_id": "d", "text": "u"}], "queries.jsonl": QUERIES,
         "qrels/test.tsv": HEADER + "q\td\t1\n"},
        "beir", "corpus.jsonl", 2, "_id", "has stood before"),
    "query id": (
        {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": HEADER + "q\td\t1\nr\td\t1\n"},
        "beir", "test.tsv", 3, "query-id", "queries.jsonl has no _id 'r'"),
    "relevance": (
        {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": HEADER + "q\td\tyes\n"},
        "beir", "test.tsv", 2, "score", "expected a number"),
    "rental": (
        {"l.jsonl": [{"query": "q", "pos": "p", "hard_neg": []},
                     {"query": "q", "pos": "p", "hard_neg": [{"text": "n", "type": [7]}]}]},
        "rental", "l.jsonl", 2, "hard_neg", "item 1, 'type'"),
    "islamic": (
        {"i.jsonl": [LINE | {"source": "s", "language": "ar", "query_type": "t"},
                     LINE | {"source": "s", "language": ""}]},
        "islamic", "i.jsonl", 2, "language", "the field is empty"),
    "instruction": (
        {"i.jsonl": [{"instruction": "a", "input": 5, "output": "b"}]},
        "instruction", "i.jsonl", 1, "input", "expected text but found int '5'"),
}


def written(folder, files):
    for name, content in files.items():
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"): content = json.dumps(content)
        elif not isinstance(content, str): content = "".join(json.dumps(r) + "\n" for r in content)
        path.write_text(content, encoding="utf-8")
    return folder if len(files) > 1 or "positive_pairs.jsonl" in files else folder/next(iter(files))


FULL = ("Nhân viên chính thức làm đủ mười hai tháng được hưởng 14 ngày phép năm, nguyên lương, "
        "và mỗi ba năm thêm một ngày.")


def company(folder, **more):
    """The four files as companies have them: previews of chunks, a document that was not exported, two answers to one
    question of which one has a hard negative with its score."""
    chunks = [{"chunk_id": "hr-0", "text": FULL[:60] + "…"}, {"chunk_id": "hr-1", "text": "Nghỉ ốm cần giấy."}]
    pairs = [{"query": "phép", "positive": FULL, "query_type": "question", "domain": "HR"},
             {"query": "phép", "positive": "Ba năm thêm một ngày phép thâm niên.", "domain": "HR"}]
    evaluation = [{"query": "mấy ngày", "positive": FULL, "chunk_id": "hr-0"},
                  {"query": "vpn", "positive": "Tải VPN ở cổng CNTT.", "chunk_id": "it-9"},
                  {"query": "vpn chậm", "positive": "Đổi máy chủ VPN.", "chunk_id": "it-9"}]
    return written(folder, {
        "positive_pairs.jsonl": pairs, "eval_pairs.jsonl": evaluation,
        "hard_negatives.jsonl": [pairs[0] | {"hard_negative": "Nghỉ ốm cần giấy.", "negative_score": 0.71}],
        "document_metadata.json": {"documents": [{"document_id": "hr", "title": "Phép", "chunks": chunks}]}} | more)


def test_an_evaluation_pair_of_no_document_is_a_passage_of_its_own(tmp_path):
    c = load_data(company(tmp_path))
    assert [(r["query_id"], r["corpus_id"]) for r in c.qrels] == [("e0", "hr-0"), ("e1", "it-9"), ("e2", "it-9#2")]
    assert c.corpus["text"][2:] == ["Tải VPN ở cổng CNTT.", "Đổi máy chủ VPN."]
    assert any("2 positives of eval_pairs.jsonl are no chunk" in note for note in c.notes)
    assert c.counts["eval_pairs.jsonl"] == {"in": 3, "out": 3, "rejected": 0}
    found = retrieval_set(c.evaluation_rows(), corpus=c.rows)   # what training searches: no id stands for two texts
    assert len(found) == 3 and [*map(len, found.qrels)] == [1, 1, 1]


def test_a_chunk_that_is_cut_off_does_not_replace_the_full_text(tmp_path):
    c = load_data(company(tmp_path/"a"))
    assert c.corpus["text"][0] == FULL == c.evaluation_rows()["pos"][0][0] == c.rows["pos"][0][0]
    assert c.rows["pos_ids"][0] == ["hr-0"]
    assert "1 chunks of document_metadata.json are cut off; 1 were completed from the pairs" in c.notes
    other = [{"query": "mấy ngày", "positive": "Phần sau của đoạn này.", "chunk_id": "hr-0"}]
    c = load_data(company(tmp_path/"b", **{"eval_pairs.jsonl": other}))   # begins otherwise: it stands beside the chunk
    assert c.evaluation_rows()["pos"][:] == [["Phần sau của đoạn này."]]
    assert len(set(c.corpus["id"])) == len(c.corpus)


def test_a_negative_score_survives_merging(tmp_path):
    rows = load_data(company(tmp_path)).rows
    assert rows["neg_types"][:] == [[["hard"]], [["random"]]]
    merged = merge_queries(rows)
    assert (merged["neg"][:], merged["neg_scores"][:]) == ([["Nghỉ ốm cần giấy."]], [[0.71]])


def test_folders_and_files_of_passages_alone(tmp_path):
    files = {"a.jsonl": [{"id": 1, "text": "x", "language": "vi-VN"}], "b.jsonl": [{"passage": "y", "title": "T"}]}
    folder = written(tmp_path/"two", files)
    assert detect_format(folder) == detect_format(folder/"b.jsonl") == "corpus"
    c = load_data(folder)
    assert (c.corpus["id"][:], c.corpus["text"][:], len(c.rows)) == (["1", "b-1"], ["x", "T\ny"], 0)
    assert c.corpus["language"][0] == "vi"
    assert detect_format(written(tmp_path/"one", {"corpus.jsonl": CORPUS, "notes.txt": ""})) == "corpus"


def test_gold_questions_over_a_named_corpus(tmp_path):
    company(tmp_path/"co")
    question = {"query": "Nghỉ phép?", "relevant": {"hr-0": 2, "hr-1": 1}, "category": "leave", "difficulty": "hard",
                "language": "vi", "corpus": "co"}
    gold = written(tmp_path, {"gold.jsonl": [question, question | {"query": "Ốm?", "relevant": "hr-1"}]})
    assert detect_format(gold) == "gold"
    c = load_data(gold)
    row = c.rows[0]
    assert (row["pos_ids"], row["domain"], row["difficulty"]) == (["hr-0", "hr-1"], "leave", "hard")
    assert c.retrieval_set().grades == [{0: 2, 1: 1}, {1: 1}]
    other = written(tmp_path, {"other.jsonl": [{"query": "q", "expected": ["p1"]}]})
    assert load_data(other, corpus=make_rows([{"query": "x", "pos": "y", "pos_ids": ["p1"]}])).rows["pos"][0] == ["y"]


def test_clicks_become_positives_and_what_stood_above_them_candidates(tmp_path):
    shown = [{"id": i, "text": f"text {i}"} for i in "abcd"]
    searches = [{"query": "q", "shown": shown, "clicked": ["c"]}, {"query": "q ", "shown": shown, "clicked": "b"},
                {"query": "r", "shown": shown, "clicked": []}]
    log = written(tmp_path, {"log.jsonl": searches})
    assert detect_format(log) == "search_log"
    c = load_data(log)
    [row] = c.rows
    assert (row["pos_ids"], row["neg_ids"], row["neg_types"]) == (["c", "b"], ["a"], [["skipped"]])
    assert any("1 of 3 searches have no click" in note for note in c.notes)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name, tmp_path):
    files, format, file, line, field, text = BROKEN[name]
    path = written(tmp_path, files)
    with pytest.raises(RowError) as error: load_data(path, format)
    e = error.value
    assert Path(e.file).name == file and e.line == line and e.field == field and text in str(e), str(e)
    with Rejected(tmp_path/"rejected.jsonl") as rejected: c = load_data(path, format, rejected)
    assert rejected.count == 1 and sum(n["rejected"] for n in c.counts.values()) == 1
    assert all(n["in"] == n["out"] + n["rejected"] for n in c.counts.values())
    record = json.loads(rejected.path.read_text())
    assert Path(record["file"]).name == file and record["line"] == line and text in record["reason"]


def test_recognised_by_their_first_record(tmp_path):
    cases = {"rows": {"query": "q", "pos": ["p"]},
             "triplets": {"anchor": "a", "positive": "p", "negative": "n"},
             "instruction": {"instruction": "a", "output": "b"},
             "rental": {"query": "q", "pos": "p", "hard_neg": []},
             "islamic": LINE | {"source": "s", "language": "ar", "query_type": "t"},
             "sentence-transformers": {"sentence1": "a", "sentence2": "b", "label": 1}}
    for name, record in cases.items(): assert detect_format(written(tmp_path, {f"{name}.jsonl": [record]})) == name
    assert detect_format("miracl") == "hub"
    with pytest.raises(RowError, match="expected one file"): detect_format(tmp_path)


def test_a_pair_only_among_hard_negatives_is_added(tmp_path):
    negatives = [{"query": "r", "positive": "s", "hard_negative": n} for n in "ab"]
    c = load_data(written(tmp_path, {"positive_pairs.jsonl": [LINE], "hard_negatives.jsonl": negatives}), seed=1)
    found = [(r["query"], r["neg"], r["neg_types"]) for r in c.rows]
    assert (found == [("q", [], []), ("r", ["a", "b"], [["hard"], ["hard"]])]
            or c.rows["neg_types"][0] == [["random"]])
    assert any("1 pairs stand only in hard_negatives.jsonl" in n for n in c.notes)


def test_scores_beside_sentence_transformers_columns(tmp_path):
    pairs = pa.table({"sentence1": ["a", "a", "b"], "sentence2": ["x", "y", "z"], "score": [.9, .1, .8]})
    pq.write_table(pairs, tmp_path/"pairs.parquet")
    rows = load_data(tmp_path/"pairs.parquet").rows
    assert rows["pos"][:] == [["x"], ["z"]] and rows["neg"][:] == [["y"], []]


@pytest.mark.parametrize("name", [n for n in HUB if n != "rlhn"])
def test_hub_recipes_on_data_of_their_layout(name, tmp_path):
    recipe = formats._filled_recipe(name, "ar", {})
    absent = {"mr-tydi": "query", "miracl": "query", "msmarco": "anchor", "mmarco": "anchor"}.get(name)
    config, columns = recipe["name"], [c for c in recipe["columns"] if c != absent]
    (tmp_path/config).mkdir()
    (tmp_path/"README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n"
                                      f"    path: {config}/train-*\n---\n")
    table = pa.table({c: [f"{c} {i}" for i in range(5)] for c in columns})
    pq.write_table(table, tmp_path/config/"train-00000-of-00001.parquet")
    c = load_data(name, "hub", language="ar", path=str(tmp_path), max_rows=3)
    assert len(c.rows) == 3
    assert c.rows[0]["language"] == recipe["labels"]["language"]
    assert c.rows[2]["pos"] == [f"{columns[1]} 2"]


def test_a_recipe_with_passages_as_objects(tmp_path):
    passages = lambda s, n: [{"docid": f"{s}{i}", "text": f"text {s}{i}", "title": ""} for i in range(n)]
    records = [{"query_id": "1", "query": "a", "positive_passages": passages("p", 2),
                "negative_passages": passages("n", 3), "subset": "msmarco"},
               {"query_id": "2", "query": "b", "positive_passages": passages("r", 1),
                "negative_passages": [], "subset": "nq"}]
    file = tmp_path/"train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(records), file)
    rows = load_data("rlhn", "hub", path=str(tmp_path)).rows
    assert rows[0]["pos"] == ["text p0", "text p1"]
    assert rows[0]["neg_ids"] == ["n0", "n1", "n2"]
    assert rows["source"][:] == ["msmarco", "nq"]
    assert rows[1]["neg"] == []
    bare = {"query": ["a", "b"], "positive_passages": [passages("p", 1), []], "query_id": ["1", "2"]}
    with Rejected(tmp_path/"rejected.jsonl") as rejected:
        pq.write_table(pa.table(bare), file)
        assert len(load_data("rlhn", "hub", rejected, path=str(tmp_path)).rows) == rejected.count == 1


@settings(max_examples=60, deadline=None, database=None)
@given(types=st.lists(st.lists(st.sampled_from(["a", "b", "c", "?"]), max_size=4), max_size=5),
       method=st.sampled_from(METHODS), ratio=st.floats(0, 1), cap=st.floats(0, 5))
def test_weights_are_the_formula(types, method, ratio, cap):
    features = {"a": 2.5, "b": 2.0, "c": .5, "other": .75}
    def one(ts):
        w = sorted((features.get(t, .75) for t in ts), reverse=True)
        if not w: return .75
        return {"max_incremental": min(cap, w[0] + ratio * sum(w[1:])), "capped_linear": min(cap, sum(w)),
                "average": sum(w) / len(w), "sum": sum(w)}[method]
    found = negative_weights(types, WeightConfig(features, method, ratio, cap))
    np.testing.assert_allclose(found, [one(t) for t in types])


def test_weight_config_file(tmp_path):
    path = tmp_path/"weight-config.json"
    path.write_text('{"price": 2, "_metadata": {"method": "average", "increment_ratio": 0.5, "cap": 3}}')
    assert WeightConfig.load(path) == WeightConfig({"other": 1.0, "price": 2}, "average", .5, 3)
    for text, wrong in (('{"price": 2', "not valid JSON"), ('{"price": "2"}', "weight of 'price'"),
                        ('{"_metadata": {"method": "max"}}', "must be one of")):
        path.write_text(text)
        with pytest.raises(RowError, match=wrong): WeightConfig.load(path)
    rows = make_rows([{"query": "q", "pos": "p", "neg": list("abcd"), "neg_weights": [0, 1, 2, 0]}])
    rows, counts = fill_weights(rows, WeightConfig())
    assert rows["neg_weights"][:] == [[1.0, 1.0, 2.0, 1.0]]
    assert (counts["given"], counts["filled"]) == (2, 2)


def test_a_list_of_formats_without_gaps():
    assert set(FORMATS) == {"rows", "triplets", "sentence-transformers", "instruction", "beir", "company", "rental",
                            "islamic", "hub", "corpus", "gold", "search_log"}
    assert len(retrieval_set(load_data(REPO/"data"/"law_mini.jsonl").rows)) > 100


# What a label means, and which columns are texts

def table(path, header, *lines):
    path.write_text("".join("\t".join(map(str, cells)) + "\n" for cells in (header, *lines)), encoding="utf-8")
    return path


NLI = ["premise", "hypothesis", "label"]


@pytest.mark.parametrize("names", [(0, 1, 2), ("entailment", "neutral", "contradiction")])
@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_entailment_is_the_positive(names, ending, tmp_path):
    lines = [("một người", "một sinh vật", names[0]), ("một người", "một bác sĩ", names[1]),
             ("một người", "một con mèo", names[2])]
    path = tmp_path/f"nli.{ending}"
    if ending == "tsv": table(path, NLI, *lines)
    elif ending == "jsonl": path.write_text("".join(json.dumps(dict(zip(NLI, line))) + "\n" for line in lines))
    else: pq.write_table(pa.table(dict(zip(NLI, map(list, zip(*lines))))), path)
    c = load_data(path)
    assert [(r["query"], r["pos"], r["neg"]) for r in c.rows] == [("một người", ["một sinh vật"], ["một con mèo"])]
    assert any("1 pairs are neither positive nor negative" in note for note in c.notes)
    assert c.counts[path.name] == {"in": 3, "out": 3, "rejected": 0}


def test_labels_that_could_be_read_both_ways_are_asked_for(tmp_path):
    path = table(tmp_path/"nli.tsv", NLI, ("a", "b", 0), ("a", "c", 1))
    with pytest.raises(RowError, match="labels '0' and '1' do not say"): load_data(path)
    assert load_data(path, labels={0: 1, 1: 0}).rows["pos"][:] == [["b"]]
    assert load_data(path, labels={"0": 0, "1": 1}).rows["pos"][:] == [["c"]]


STS = ["split", "genre", "dataset", "year", "sid", "score", "sentence1", "sentence2"]


def test_scores_out_of_0_to_1_ask_for_a_mapping_and_other_columns_are_no_texts(tmp_path):
    lines = [["train", "news", "MSRpar", 2012, f"{i:04}", score, "a", f"b{score}"]
             for i, score in enumerate((0, 1.5, 3, 4.2, 5))]
    path = table(tmp_path/"sts.tsv", STS, *lines)
    assert detect_format(path) == "sentence-transformers"
    with pytest.raises(RowError, match=r"field 'score': the labels .* give labels=\[2, 4\]"): load_data(path)
    c = load_data(path, labels=[2, 4])
    assert [(r["query"], r["pos"], r["neg"]) for r in c.rows] == [("a", ["b4.2", "b5"], ["b0", "b1.5"])]
    for wrong in ([4, 2], [1], "high", [1, "x"]):
        with pytest.raises(ValueError, match="labels="): load_data(path, labels=wrong)
    unit = table(tmp_path/"unit.tsv", STS, *([*line[:5], line[5] / 5, *line[6:]] for line in lines))
    assert load_data(unit).rows["pos"][:] == [["b3", "b4.2", "b5"]]


def test_duplicate_questions(tmp_path):
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    path = table(tmp_path/"quora.tsv", header, (0, 1, 2, "a", "b", 1), (1, 1, 3, "a", "c", 0))
    c = load_data(path)
    assert [(r["query"], r["pos"], r["neg"], r["query_id"]) for r in c.rows] == [("a", ["b"], ["c"], "")]


@pytest.mark.parametrize("header,known", [
    (["question", "answer", "label"], True), (["query", "passage", "relevance"], True),
    (["sentence_A", "sentence_B", "score"], True), (["idx", "text_a", "text_b", "label"], True),
    (["anything", "else", "label"], True), (["title", "abstract", "body", "label"], False),
    (["question", "context", "answer", "score"], False)])
def test_texts_of_a_labelled_pair(header, known, tmp_path):
    line = [7 if n == "idx" else 1 if n == header[-1] else n for n in header]
    path = table(tmp_path/"f.tsv", header, line)
    if known: return check_pair(load_data(path).rows, *[n for n in header if n not in ("idx", header[-1])])
    rename = f"rename={{'{header[0]}': 'query', '{header[1]}': 'pos'}}"
    with pytest.raises(RowError, match=f"the columns are '{header[0]}'.*{rename}"): load_data(path)
    check_pair(load_data(path, rename={header[0]: "query", header[2]: "pos"}).rows, header[0], header[2])


def check_pair(rows, query, passage):
    assert [(r["query"], r["pos"], r["neg"]) for r in rows] == [(query, [passage], [])]


def test_a_missing_or_unknown_label_is_rejected_and_not_a_negative(tmp_path):
    lines = ("a", "b", 1), ("a", "c", ""), ("a", "d", "x"), ("a", "e", 0)
    path = table(tmp_path/"f.tsv", ["sentence1", "sentence2", "label"], *lines)
    with Rejected(tmp_path/"rejected.jsonl") as rejected: c = load_data(path, rejected=rejected)
    assert (c.rows["pos"][:], c.rows["neg"][:], rejected.count) == ([["b"]], [["e"]], 2)
    assert [json.loads(line)["line"] for line in open(rejected.path)] == [3, 4]


def test_a_score_beside_lists_or_negatives_is_no_label(tmp_path):
    record = {"query": "q", "pos": ["p"], "neg": [""], "score": 3.5, "category": "math"}
    c = load_data(written(tmp_path, {"fe.jsonl": [record]}))
    assert c.rows[0]["pos"] == ["p"] and c.rows[0]["domain"] == "math" and "score" in c.notes[0]
    path = table(tmp_path/"margin.tsv", ["query", "positive", "negative", "score"], ("q", "p", "n", 7.2))
    assert detect_format(path) == "triplets" and load_data(path).rows[0]["neg"] == ["n"]


# BEIR as it is published

def beir(folder, qrels, corpus=None, file="qrels/test.tsv"):
    corpus = corpus or [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(6)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)]
    return written(folder/"beir", {"corpus.jsonl": corpus, "queries.jsonl": queries, file: qrels})


JUDGED = [("q0", "d0", 2), ("q0", "d1", 1), ("q1", "d2", 1), ("q1", "d3", 0)]
QRELS = {
    "BEIR": "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in JUDGED),
    "without a header": "".join(f"{q}\t{d}\t{s}\n" for q, d, s in JUDGED),
    "TREC": "".join(f"{q} 0 {d} {s}\n" for q, d, s in JUDGED),
    "TREC with tabs": "".join(f"{q}\tQ0\t{d}\t{s}\n" for q, d, s in JUDGED),
    "other names": "qid\tdocid\trelevance\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in JUDGED),
    "another order": "score\tcorpus_id\tquery_id\n" + "".join(f"{s}\t{d}\t{q}\n" for q, d, s in JUDGED),
    "unknown names": "Frage\tText\tUrteil\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in JUDGED),
}


@pytest.mark.parametrize("name", QRELS)
def test_judgements_in_every_layout(name, tmp_path):
    c = load_data(beir(tmp_path, QRELS[name]))
    assert [(r["query_id"], r["corpus_id"], r["score"]) for r in c.qrels] == JUDGED
    ids = [(r["query_id"], r["pos_ids"], r["neg_ids"]) for r in c.rows]
    assert ids == [("q0", ["d0", "d1"], []), ("q1", ["d2"], ["d3"])]
    assert c.counts["test.tsv"] == {"in": 4, "out": 4, "rejected": 0}


def test_a_title_alone_is_the_text(tmp_path):
    corpus = [{"_id": "d0", "title": "Điều 7", "text": ""}, {"_id": "d1", "title": "Điều 8", "text": "Nghỉ."},
              {"_id": "d2", "title": None, "text": "Làm."}, {"_id": "d3", "title": "", "text": " "}]
    with Rejected(tmp_path/"rejected.jsonl") as rejected:
        c = load_data(beir(tmp_path, QRELS["BEIR"], corpus), rejected=rejected)
    assert c.corpus["text"][:] == ["Điều 7", "Điều 8\nNghỉ.", "Làm."]
    assert c.rows["pos"][:] == [["Điều 7", "Điều 8\nNghỉ."], ["Làm."]]
    assert rejected.count == 2   # the empty document and its judgement
    save_data(c, tmp_path/"again", "beir", split="test")
    again = load_data(tmp_path/"again")
    assert again.corpus.to_list() == c.corpus.to_list() and again.qrels.to_list() == c.qrels.to_list()


def test_the_same_twice_is_one_and_a_contradiction_is_rejected(tmp_path):
    good = [{"_id": f"d{i}", "text": f"text {i}"} for i in range(4)]
    c = load_data(beir(tmp_path, QRELS["BEIR"] + "q0\td0\t2\n", [*good, good[0]]))
    assert len(c.corpus) == 4 and len(c.qrels) == 4 and c.rows["pos_ids"][0] == ["d0", "d1"]
    assert c.counts["corpus.jsonl"] == {"in": 5, "out": 5, "rejected": 0}
    assert sum("repeat another one" in note for note in c.notes) == 2
    before = r"corpus\.jsonl, line 5, field '_id': the id 'd0' has stood before, with another text"
    with pytest.raises(RowError, match=before):
        load_data(beir(tmp_path, QRELS["BEIR"], [*good, {"_id": "d0", "text": "other"}]))
    folder = beir(tmp_path, QRELS["BEIR"] + "q0\td0\t1\n")
    before = r"test\.tsv, line 6, field 'score': query 'q0' and document 'd0' have been judged before"
    with pytest.raises(RowError, match=before): load_data(folder)
    with Rejected(tmp_path/"rejected.jsonl") as rejected: c = load_data(folder, rejected=rejected)
    assert rejected.count == 1 and len(c.qrels) == 4
    assert c.counts["test.tsv"] == {"in": 5, "out": 4, "rejected": 1}


def test_the_evaluation_data_of_flagembedding(tmp_path):
    path = written(tmp_path/"fe", {
        "corpus.jsonl": [{"id": "d1", "title": "T", "text": "x"}, {"id": "d2", "title": "", "text": "y"}],
        "test_queries.jsonl": [{"id": "q1", "text": "a"}],
        "test_qrels.jsonl": [{"qid": "q1", "docid": "d1", "relevance": 1}]})
    c = load_data(path)
    assert detect_format(path) == "beir" and c.rows["pos"][:] == [["T\nx"]] and len(c.corpus) == 2


def test_graded_ndcg_is_that_of_the_raw_judgements(tmp_path):
    rng = np.random.default_rng(0)
    judged = {(f"q{q}", f"d{d}"): int(rng.integers(0, 4))
              for q in range(8) for d in rng.choice(40, 12, replace=False)}
    folder = written(tmp_path/"beir", {
        "corpus.jsonl": [{"_id": f"d{i}", "text": f"text {i}"} for i in range(40)],
        "queries.jsonl": [{"_id": f"q{i}", "text": f"query {i}"} for i in range(8)],
        "qrels/test.tsv": "".join(f"{q} 0 {d} {s}\n" for (q, d), s in judged.items())})
    found = load_data(folder).retrieval_set()
    scores = rng.permutation(len(found) * 40).reshape(len(found), 40) / 7
    raw, run = {}, {}
    for (q, d), s in judged.items(): raw.setdefault(q, {})[d] = s
    for i, q in enumerate(found.query_ids): run[q] = {d: float(scores[i, j]) for j, d in enumerate(found.passage_ids)}
    for metric in ("nDCG@10", "nDCG@3", "RR@10", "R@5", "AP"):
        expected = {r.query_id: r.value for r in ir_measures.iter_calc([ir_measures.parse_measure(metric)], raw, run)}
        ours = evaluate_scores(scores, found.judgements, (metric,)).per_query[metric]
        assert ours == pytest.approx([expected[q] for q in found.query_ids], abs=1e-9), metric
    flat = evaluate_scores(scores, found.qrels, ("nDCG@10",)).mean("nDCG@10")
    assert abs(flat - evaluate_scores(scores, found.judgements, ("nDCG@10",)).mean("nDCG@10")) > .01
    assert found.qrels == [set(grades) for grades in found.grades]
    with pytest.raises(ValueError, match="whole numbers"): evaluate_scores(scores[:1], [{0: .5}])


def test_of_tied_grades_the_lower_counts_first():
    found = evaluate_scores([[1., 1., 0.]], [{0: 3, 1: 1}], ("nDCG@10",)).mean("nDCG@10")
    assert found == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))


def test_tags_as_one_text_are_one_tag(tmp_path):
    def tagged(tags):
        document = {"id": "a", "tags": tags, "chunks": ["p"]}
        path = written(tmp_path, {"positive_pairs.jsonl": [LINE], "document_metadata.json": {"documents": [document]}})
        return load_data(path, "company")
    for tags, expected in (("nhân sự", ["nhân sự"]), (["a", 5], ["a", "5"]), (None, [])):
        assert tagged(tags).corpus[0]["tags"] == expected
    with pytest.raises(RowError, match="document 1, field 'tags': expected a list of tags but found int"): tagged(5)


@pytest.mark.parametrize("content,text", [
    (b"[1]", "expected an object of features"), (b'{"_metadata": 5}', "expected an object with method"),
    (b"caf\xe9", "not UTF-8"), (b"[" * 100_000, "too many brackets"), (b'{"a": 1, "a": 2}', "stands twice"),
    (b'{"a": ' + b"1" * 5000 + b"}", "'a' must be a number"), (b'{"a": 1', "not valid JSON")])
def test_broken_weight_config(content, text, tmp_path):
    path = tmp_path/"weight-config.json"
    path.write_bytes(content)
    with pytest.raises(RowError, match=re.escape(text)) as error: WeightConfig.load(path)
    assert error.value.file == str(path)


def test_a_wrong_option_is_refused_before_a_record_is_read(tmp_path):
    "The second line is no JSON; a wrong name or type of an option comes first, and all that a reader takes is known."
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "pos": ["p"]}\n{broken\n')
    with pytest.raises(ValueError, match="'rows' has no option 'renam'; did you mean 'rename'.*rename, ignore"):
        load_data(path, renam={})
    with pytest.raises(ValueError, match="'nfc' of the format 'rows' must be true or false, not 'no'"):
        load_data(path, nfc="no")
    with pytest.raises(RowError, match="line 2"): load_data(path, nfc=None)
    for name, options in FORMAT_OPTIONS.items():
        known = signature(FORMATS[name].read).parameters
        own = {k for k, p in known.items() if p.default is not p.empty}
        assert own - {"required"} <= set(options), name
        assert set(options) <= set(known) or any(p.kind is p.VAR_KEYWORD for p in known.values()), name
