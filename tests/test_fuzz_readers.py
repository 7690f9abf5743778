"Every reader on files that nobody would write: an answer or one sentence, never a traceback, and no record is lost."
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bgem3_nb.formats import WeightConfig, detect_format, load_data
from bgem3_nb.readers import read_rows
from bgem3_nb.rows import Rejected, RowError

FEW = settings(max_examples=50, deadline=None, database=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
WORDS = st.sampled_from([
    "", " ", "a", "b", "Điều 7", '"', '"mở', 'đóng"', '"a ""b"" c"', "a,b", "['a', 'b']", "['a' 'b']", '["a"]', "[]",
    "[1]", "['", "\ud800", "\x00", "\u2028", "é", "0", "1", "2", "5", "nan", "1e400", "-", "entailment", "neutral",
    "contradiction", "sep=,", "{", "[", "null", "=1+1"])
TEXT = st.one_of(WORDS, st.text(max_size=4))
LARGE = st.sampled_from([10**30, -10**400, 2**63])
LEAF = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), TEXT, LARGE)
NESTED = lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2))
VALUE = st.recursive(LEAF, NESTED, max_leaves=4)
RAW = st.sampled_from([
    b"", b" ", b"{", b"[", b"]", b"null", b"5", b'"a"', b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe\x00",
    b"\xef\xbb\xbf{}", b"caf\xe9", b'{"query": "a", "query": "b"}', b'{"query": "q", "pos": [' + b"1" * 5000 + b"]}",
    b"a\tb", b"a,b\r", b'"a', b"\x1f\x8b\x08"])


def records(good, *more):
    "A record that is mostly good, with some of its fields replaced, and others added or left out."
    fields = st.fixed_dictionaries({}, optional={n: st.one_of(st.just(v), st.just(v), VALUE) for n, v in good.items()})
    others = st.dictionaries(st.one_of(st.sampled_from(["x", *more]), TEXT), VALUE, max_size=1)
    return st.builds(lambda whole, some, other: (good if whole else some) | other, st.booleans(), fields, others)


def dumped(value):
    "A value as JSON, as bytes: lone surrogates are escapes."
    return json.dumps(value).encode()


def lines_of(record):
    line = st.one_of(record.map(dumped), record.map(dumped), RAW)
    return st.lists(line, max_size=5).map(b"\n".join)


def answered(read, *args, **options):
    "What a reader returns; None if it raises one sentence."
    try: return read(*args, **options)
    except (RowError, ValueError) as e:
        assert type(e) in (RowError, ValueError), repr(e)
        assert " " in str(e) and "Traceback" not in str(e), str(e)


def checked(path, format, tmp_path, **options):
    "A data set read strictly and with bad records set aside; the second account must add up."
    answered(load_data, path, format, **options)
    rejected = Rejected(tmp_path/"rejected.jsonl")
    with rejected: c = answered(load_data, path, format, rejected, **options)
    if c is None: return None, 0
    assert all(n["in"] == n["out"] + n["rejected"] for n in c.counts.values()), c.counts
    assert sum(n["rejected"] for n in c.counts.values()) == rejected.count
    assert len(rejected.path.read_text(encoding="utf-8").splitlines()) >= rejected.count
    c.rows.to_list()
    answered(c.retrieval_set)
    c.evaluation_rows()
    return c, rejected.count


ROW = records({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [.5], "neg_types": [["a"]], "query_id": "1",
               "language": "vi"},
              "score", "category", "negative_1", "anchor", "prompt")
PAIR = records({"sentence1": "a", "sentence2": "b", "label": 1}, "score", "split")
FLAT = {  # format -> records of its files
    "rows": ROW, "triplets": records({"anchor": "a", "positive": "b", "negative": "c"}),
    "sentence-transformers": st.one_of(PAIR, records({"premise": "a", "hypothesis": "b", "label": 2}),
                                       records({"title": "a", "body": "b", "more": "c"})),
    "instruction": records({"instruction": "a", "input": "b", "output": "c"}, "id", "language"),
    "islamic": records({"query": "q", "positive": "p", "source": "s", "language": "ar", "query_type": "t"}),
    "rental": records({"query": "q", "pos": "p", "hard_neg": [{"text": "n", "type": ["a"], "weight": 1}]}),
}


@pytest.mark.parametrize("format", FLAT)
def test_json_lines(format, tmp_path):
    path = tmp_path/"f.jsonl"
    @FEW
    @given(lines_of(FLAT[format]))
    def run(content):
        path.write_bytes(content)
        answered(detect_format, path)
        c, bad = checked(path, format, tmp_path)
        given = sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        if c is not None: assert c.counts["f.jsonl"]["in"] == given
        if c is not None and format not in ("sentence-transformers",): assert len(c.rows) + bad == given
    run()


@pytest.mark.parametrize("format", ["rows", "rental", "sentence-transformers", "instruction"])
def test_json(format, tmp_path):
    path = tmp_path/"f.json"
    record = FLAT[format]
    @FEW
    @given(st.one_of(st.lists(st.one_of(record, VALUE), max_size=4).map(dumped), VALUE.map(dumped), lines_of(record),
                     record.map(lambda r: dumped({"data": [r]})),
                     record.map(lambda r: json.dumps([r], indent=1).encode())))
    def run(content):
        path.write_bytes(content)
        answered(detect_format, path)
        checked(path, format, tmp_path)
    run()


CELLS = st.lists(TEXT, min_size=1, max_size=3)
HEADERS = st.sampled_from([
    ["query", "pos"], ["anchor", "positive", "negative"], ["sentence1", "sentence2", "label"],
    ["query", "passage", "score"], ["premise", "hypothesis", "label"], ["query", "pos", "query"], ["a", "b"],
    ["query;pos"], ["query", "pos", "pos_scores"]])


@pytest.mark.parametrize("ending,separator", [("csv", ","), ("tsv", "\t")])
def test_tables(ending, separator, tmp_path):
    path = tmp_path/f"f.{ending}"
    line = CELLS.map(lambda cells: separator.join(cells).encode(errors="surrogatepass"))
    @settings(FEW, max_examples=150)
    @given(HEADERS, st.lists(st.one_of(line, RAW), max_size=5), st.sampled_from([b"\n", b"\r\n", b"\r"]))
    def run(header, lines, end):
        content = end.join([separator.join(header).encode(), *lines])
        path.write_bytes(content)
        answered(detect_format, path)
        for format in ("rows", "sentence-transformers"):
            c, bad = checked(path, format, tmp_path)
            given = sum(bool(line) for line in content.replace(b"\r", b"\n").split(b"\n")) - 1
            if c is not None and ending == "tsv": assert c.counts[path.name]["in"] == given
    run()


COLUMN = st.one_of(
    st.lists(TEXT.map(lambda t: t.encode(errors="replace").decode()), min_size=2, max_size=2),
    st.sampled_from([
        [None, None], [1, 2], [.5, float("nan")], [True, None], [b"\xff", b"a"], [["a"], None], [["a", None], []],
        [[1], [2]], [{"text": "a"}, None], [[{"text": "a"}], []], [["a"], ["b"]], [[["a"]], []]]))


def test_parquet(tmp_path):
    path = tmp_path/"f.parquet"
    @settings(FEW, max_examples=100)
    @given(HEADERS, st.lists(COLUMN, min_size=3, max_size=3), st.integers(0, 60), st.booleans())
    def run(header, columns, cut, dictionary):
        arrays = [pa.array(c) for c in columns[:len(header)]]
        if dictionary: arrays = [a.dictionary_encode() if pa.types.is_string(a.type) else a for a in arrays]
        if pa.types.is_binary(arrays[0].type): arrays[0] = arrays[0].view(pa.string())   # text that is no UTF-8
        pq.write_table(pa.Table.from_arrays(arrays, names=header[:len(arrays)]), path)
        if cut > 40: path.write_bytes(path.read_bytes()[:cut])
        if 30 < cut <= 40: path.write_bytes(bytes(b ^ (i % 97 == cut) for i, b in enumerate(path.read_bytes())))
        answered(detect_format, path)
        for format in ("rows", "sentence-transformers"):
            c, bad = checked(path, format, tmp_path)
            if c is not None: assert c.counts[path.name]["in"] == 2
    run()


DOCUMENT = records({"_id": "d", "title": "t", "text": "x"}, "metadata", "id")
QUERY = records({"_id": "q", "text": "x"}, "id")
QREL = st.one_of(st.sampled_from(["q\td\t1", "q 0 d 2", "q\td\t0", "q d", "query-id\tcorpus-id\tscore",
                                  "qid\tdocid\trelevance", "q\td\tyes", "", "x\ty\tz\tw\tv"]),
                 st.lists(TEXT, max_size=4).map("\t".join)).map(lambda t: t.encode(errors="surrogatepass"))


def test_beir(tmp_path):
    folder = tmp_path/"beir"
    (folder/"qrels").mkdir(parents=True)
    good = st.just(b'{"_id": "d", "text": "x"}\n'), st.just(b'{"_id": "q", "text": "x"}\n')
    @settings(FEW, max_examples=120)
    @given(st.one_of(good[0], lines_of(DOCUMENT)), st.one_of(good[1], lines_of(QUERY)),
           st.lists(QREL, max_size=5).map(b"\n".join), st.booleans())
    def run(corpus, queries, qrels, as_json):
        for p in (folder/"qrels").iterdir(): p.unlink()
        (folder/"corpus.jsonl").write_bytes(corpus)
        (folder/"queries.jsonl").write_bytes(queries)
        if as_json: (folder/"qrels"/"test.jsonl").write_bytes(b'{"qid": "q", "docid": "d", "relevance": 2}')
        else: (folder/"qrels"/"test.tsv").write_bytes(qrels)
        assert detect_format(folder) == "beir"
        checked(folder, None, tmp_path)
    run()


CHUNK = {"chunk_id": "c", "text": "p"}
CHUNKS = st.one_of(st.just([CHUNK]), VALUE, st.lists(records(CHUNK, "page"), max_size=3))
OTHER_FIELDS = ("document_id", "title", "tags", "department", "text", "x")
DOCUMENTS = st.fixed_dictionaries({"chunks": CHUNKS}, optional=dict.fromkeys(OTHER_FIELDS, VALUE))


def test_company(tmp_path):
    folder = tmp_path/"company"
    folder.mkdir()
    pairs = records({"query": "q", "positive": "p", "chunk_id": "c"}, "query_type", "domain")
    hard = records({"query": "q", "positive": "p", "hard_negative": "n", "negative_score": .5})
    nested = st.lists(DOCUMENTS, max_size=2).map(lambda d: dumped({"documents": d}))
    @settings(FEW, max_examples=120)
    @given(st.one_of(st.just(b'{"query": "q", "positive": "p"}'), lines_of(pairs)), lines_of(hard), lines_of(pairs),
           st.one_of(nested, VALUE.map(dumped), RAW))
    def run(positives, negatives, evaluation, documents):
        (folder/"positive_pairs.jsonl").write_bytes(positives)
        (folder/"hard_negatives.jsonl").write_bytes(negatives)
        (folder/"eval_pairs.jsonl").write_bytes(evaluation)
        (folder/"document_metadata.json").write_bytes(documents)
        checked(folder, "company", tmp_path)
    run()


def test_weights(tmp_path):
    path = tmp_path/"weight-config.json"
    known = st.fixed_dictionaries({}, optional=dict.fromkeys(("method", "increment_ratio", "cap"), VALUE))
    config = st.fixed_dictionaries({"price": VALUE}, optional={"_metadata": st.one_of(VALUE, known)})
    @settings(FEW, max_examples=150)
    @given(st.one_of(RAW, VALUE.map(dumped), config.map(dumped)))
    def run(content):
        path.write_bytes(content)
        answered(WeightConfig.load, path)
    run()


def test_deep_json_in_the_second_line_does_not_end_the_process(tmp_path):
    path = tmp_path/"f.jsonl"
    for deep in ("[" * 1_000_000, '{"a":' * 200_000):
        path.write_text('{"query": "q", "pos": ["p"]}\n' + deep + "\n" + '{"query": "r", "pos": ["p"]}\n')
        with Rejected(tmp_path/"rejected.jsonl") as rejected: rows = read_rows(path, rejected=rejected)
        assert rows["query"][:] == ["q", "r"] and rejected.count == 1
