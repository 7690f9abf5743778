"Every format there and back, also with awkward texts; broken files named with line and field; what is rejected adds up."
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgem3_nb.formats as formats
from bgem3_nb.formats import (FORMATS, HUB, METHODS, WeightConfig, fill_weights, load_data, negative_weights, recognise, save_data)
from bgem3_nb.rows import Rejected, RowError, fold, make_rows, merge_queries, retrieval_set

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
        pos, neg = [next(texts) for _ in range(draw(st.integers(1, 2)))], [next(texts) for _ in range(draw(st.integers(0, 2)))]
        rows.append({"query": q, "pos": pos, "neg": neg, "pos_ids": [f"p{i}{j}" for j in range(len(pos))], "neg_ids": [f"n{i}{j}" for j in range(len(neg))], "query_id": f"q{i}",
                     "neg_types": [[draw(LABEL)] for _ in neg], "neg_weights": [draw(st.floats(.5, 4)) for _ in neg], "language": draw(LABEL), "query_type": draw(LABEL), "source": draw(LABEL)})
    return make_rows(rows)


KEPT = {  # format -> file, columns that come back as they were
    "rows": ("r.jsonl", None), "rows ": ("r.parquet", None),
    "triplets": ("t.jsonl", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
    "triplets ": ("t.csv", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
    "triplets  ": ("t.tsv", ("query", "pos", "neg", "language")), "triplets   ": ("t.parquet", ("query", "pos", "neg", "language")),
    "sentence-transformers": ("st.parquet", ("query", "pos")),
    "instruction": ("i.jsonl", ("query", "pos", "language", "query_type", "source", "query_id")),
    "beir": ("beir", ("query", "pos", "neg", "pos_ids", "neg_ids", "query_id")),
    "company": ("company", ("query", "pos", "language", "query_type", "query_id", "pos_ids")),
    "rental": ("l.json", ("query", "pos", "neg", "neg_types", "neg_weights", "language", "query_id")),
    "rental ": ("l.jsonl", ("query", "pos", "neg", "neg_types", "neg_weights", "language", "query_id")),
    "islamic": ("islamic.jsonl", ("query", "pos", "neg", "language", "query_type", "source", "query_id")),
}


@pytest.mark.parametrize("name", KEPT)
@settings(max_examples=15, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=row_sets())
def test_round_trip(name, rows, tmp_path):
    file, columns = KEPT[name]
    path = tmp_path/file
    lost = save_data(rows, path, name.strip())
    back = merge_queries(load_data(path, name.strip()).rows, within=None)
    assert len(back) == len(rows)
    for column in columns or rows.column_names: assert list(back[column]) == list(rows[column]), column
    if not columns: assert not lost
    elif "neg_weights" not in columns and any(rows["neg"]): assert any("neg_weights" in s for s in lost)
    for part in ([path] if path.is_file() else list(path.rglob("*"))): assert not part.name.endswith(".tmp")


def test_the_company_set_survives_a_round_trip(tmp_path):
    first = load_data(REPO/"data"/"company")
    assert recognise(REPO/"data"/"company") == "company" and len(first.rows) >= 120 and len(first.corpus) >= 40
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


LINE = {"query": "q", "positive": "p"}
BROKEN = {  # name -> {file: content}, format, file of the error, line, field, part of the sentence
    "pairs": ({"positive_pairs.jsonl": [LINE, {"query": "q"}]}, "company", "positive_pairs.jsonl", 2, "positive", "missing field; the record has 'query'"),
    "score": ({"positive_pairs.jsonl": [LINE], "hard_negatives.jsonl": [LINE | {"hard_negative": "n", "negative_score": "high"}]}, "company", "hard_negatives.jsonl", 1, "negative_score", "expected a number"),
    "chunks": ({"positive_pairs.jsonl": [LINE], "document_metadata.json": {"documents": [{"id": "a", "chunks": ["x", " "]}]}}, "company", "document_metadata.json", 1, "chunks", "chunk 2 has no text"),
    "chunk id": ({"positive_pairs.jsonl": [LINE], "document_metadata.json": [{"id": "a", "chunks": ["p"]}], "eval_pairs.jsonl": [LINE | {"chunk_id": "b"}]}, "company", "eval_pairs.jsonl", 1, "chunk_id", "no document has the chunk 'b'"),
    "corpus id": ({"corpus.jsonl": [{"_id": "d", "text": "t"}, {"_id": "d", "text": "u"}], "queries.jsonl": [{"_id": "q", "text": "t"}], "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n"}, "beir", "corpus.jsonl", 2, "_id", "has stood before"),
    "query id": ({"corpus.jsonl": [{"_id": "d", "text": "t"}], "queries.jsonl": [{"_id": "q", "text": "t"}], "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\nr\td\t1\n"}, "beir", "test.tsv", 3, "query-id", "queries.jsonl has no _id 'r'"),
    "relevance": ({"corpus.jsonl": [{"_id": "d", "text": "t"}], "queries.jsonl": [{"_id": "q", "text": "t"}], "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\td\tyes\n"}, "beir", "test.tsv", 2, "score", "expected a number"),
    "rental": ({"l.jsonl": [{"query": "q", "pos": "p", "hard_neg": []}, {"query": "q", "pos": "p", "hard_neg": [{"text": "n", "type": [7]}]}]}, "rental", "l.jsonl", 2, "hard_neg", "item 1, 'type'"),
    "islamic": ({"i.jsonl": [LINE | {"source": "s", "language": "ar", "query_type": "t"}, LINE | {"source": "s", "language": ""}]}, "islamic", "i.jsonl", 2, "language", "the field is empty"),
    "instruction": ({"i.jsonl": [{"instruction": "a", "input": 5, "output": "b"}]}, "instruction", "i.jsonl", 1, "input", "expected text but found int '5'"),
}


def written(folder, files):
    for name, content in files.items():
        path = folder/name; path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")
    return folder if len(files) > 1 or "positive_pairs.jsonl" in files else folder/next(iter(files))


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
    cases = {"rows": {"query": "q", "pos": ["p"]}, "triplets": {"anchor": "a", "positive": "p", "negative": "n"}, "instruction": {"instruction": "a", "output": "b"},
             "rental": {"query": "q", "pos": "p", "hard_neg": []}, "islamic": LINE | {"source": "s", "language": "ar", "query_type": "t"}, "sentence-transformers": {"sentence1": "a", "sentence2": "b", "label": 1}}
    for name, record in cases.items(): assert recognise(written(tmp_path, {f"{name}.jsonl": [record]})) == name
    assert recognise("miracl") == "hub"
    with pytest.raises(RowError, match="expected one file"): recognise(tmp_path)


def test_a_pair_only_among_hard_negatives_is_added(tmp_path):
    path = written(tmp_path, {"positive_pairs.jsonl": [LINE], "hard_negatives.jsonl": [{"query": "r", "positive": "s", "hard_negative": n} for n in "ab"]})
    c = load_data(path, seed=1)
    assert [(r["query"], r["neg"], r["neg_types"]) for r in c.rows] == [("q", [], []), ("r", ["a", "b"], [["hard"], ["hard"]])] or c.rows["neg_types"][0] == [["random"]]
    assert any("1 pairs stand only in hard_negatives.jsonl" in n for n in c.notes)


def test_scores_beside_sentence_transformers_columns(tmp_path):
    pq.write_table(pa.table({"sentence1": ["a", "a", "b"], "sentence2": ["x", "y", "z"], "score": [.9, .1, .8]}), tmp_path/"pairs.parquet")
    rows = load_data(tmp_path/"pairs.parquet").rows
    assert rows["pos"][:] == [["x"], ["z"]] and rows["neg"][:] == [["y"], []]


@pytest.mark.parametrize("name", [n for n in HUB if n != "rlhn"])
def test_hub_recipes_on_data_of_their_layout(name, tmp_path):
    recipe = formats._recipe(name, "ar", {})
    config, columns = recipe["name"], [c for c in recipe["columns"] if not (c == "query" and name in ("mr-tydi", "miracl")) and not (c == "anchor" and name in ("msmarco", "mmarco"))]
    (tmp_path/config).mkdir()
    (tmp_path/"README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n---\n")
    pq.write_table(pa.table({c: [f"{c} {i}" for i in range(5)] for c in columns}), tmp_path/config/"train-00000-of-00001.parquet")
    c = load_data(name, "hub", language="ar", path=str(tmp_path), max_rows=3)
    assert len(c.rows) == 3 and c.rows[0]["language"] == recipe["labels"]["language"] and c.rows[2]["pos"] == [f"{columns[1]} 2"]


def test_a_recipe_with_passages_as_objects(tmp_path):
    passages = lambda s, n: [{"docid": f"{s}{i}", "text": f"text {s}{i}", "title": ""} for i in range(n)]
    pq.write_table(pa.Table.from_pylist([{"query_id": "1", "query": "a", "positive_passages": passages("p", 2), "negative_passages": passages("n", 3), "subset": "msmarco"},
                                         {"query_id": "2", "query": "b", "positive_passages": passages("r", 1), "negative_passages": [], "subset": "nq"}]), tmp_path/"train-00000-of-00001.parquet")
    rows = load_data("rlhn", "hub", path=str(tmp_path)).rows
    assert rows[0]["pos"] == ["text p0", "text p1"] and rows[0]["neg_ids"] == ["n0", "n1", "n2"] and rows["source"][:] == ["msmarco", "nq"] and rows[1]["neg"] == []
    with Rejected(tmp_path/"rejected.jsonl") as rejected:
        pq.write_table(pa.table({"query": ["a", "b"], "positive_passages": [passages("p", 1), []], "query_id": ["1", "2"]}), tmp_path/"train-00000-of-00001.parquet")
        assert len(load_data("rlhn", "hub", rejected, path=str(tmp_path)).rows) == rejected.count == 1


@settings(max_examples=60, deadline=None, database=None)
@given(types=st.lists(st.lists(st.sampled_from(["a", "b", "c", "?"]), max_size=4), max_size=5), method=st.sampled_from(METHODS), ratio=st.floats(0, 1), cap=st.floats(0, 5))
def test_weights_are_the_formula(types, method, ratio, cap):
    features = {"a": 2.5, "b": 2.0, "c": .5, "other": .75}
    def one(ts):
        w = sorted((features.get(t, .75) for t in ts), reverse=True)
        if not w: return .75
        return {"max_incremental": min(cap, w[0] + ratio * sum(w[1:])), "capped_linear": min(cap, sum(w)), "average": sum(w) / len(w), "sum": sum(w)}[method]
    np.testing.assert_allclose(negative_weights(types, WeightConfig(features, method, ratio, cap)), [one(t) for t in types])


def test_weight_config_file(tmp_path):
    path = tmp_path/"weight-config.json"
    path.write_text('{"price": 2, "_metadata": {"method": "average", "increment_ratio": 0.5, "cap": 3}}')
    assert WeightConfig.load(path) == WeightConfig({"other": 1.0, "price": 2}, "average", .5, 3)
    for text, wrong in (('{"price": 2', "not valid JSON"), ('{"price": "2"}', "weight of 'price'"), ('{"_metadata": {"method": "max"}}', "must be one of")):
        path.write_text(text)
        with pytest.raises(RowError, match=wrong): WeightConfig.load(path)
    rows, counts = fill_weights(make_rows([{"query": "q", "pos": "p", "neg": list("abcd"), "neg_weights": [0, 1, 2, 0]}]), WeightConfig())
    assert rows["neg_weights"][:] == [[1.0, 1.0, 2.0, 1.0]] and (counts["given"], counts["filled"]) == (2, 2)


def test_a_list_of_formats_without_gaps():
    assert set(FORMATS) == {"rows", "triplets", "sentence-transformers", "instruction", "beir", "company", "rental", "islamic", "hub"}
    assert len(retrieval_set(load_data(REPO/"data"/"law_mini.jsonl").rows)) > 100
