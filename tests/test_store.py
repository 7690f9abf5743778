"""What the notebook 41_store cannot hold: kills, a second writer, a full disk, and many random searches."""
import json, os, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from bgem3_nb.encoding import Embeddings, M3Encoder, row_numbers
from bgem3_nb.store import EmbeddingStore, encode_corpus, search, shard_file
from bgem3_nb.exact_search import scores_of, search_candidates
from bgem3_nb.model import M3Config, M3Model, init_heads
from bgem3_nb.scoring import all_scores, fuse

TEXTS = [f"w{i % 50} w{i * 7 % 50} w{i * i % 50}" + " w1" * (i % 9) for i in range(100)]
SHARD = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A model of one small layer and sixty words."
    path = tmp_path_factory.mktemp("model")
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(56))]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", cls_token="<s>",
                                        sep_token="</s>", pad_token="<pad>", unk_token="<unk>")
    config = XLMRobertaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=64, max_position_embeddings=66, type_vocab_size=1,
                              bos_token_id=0, pad_token_id=1, eos_token_id=2)
    backbone = XLMRobertaModel(config, add_pooling_layer=False)
    model = M3Model(backbone, tokenizer, M3Config(pooling="mean", passage_prompt="w5 "))
    init_heads(model, "random")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint): return M3Encoder.from_pretrained(checkpoint, max_length=64, progress=False)


def run(code, env, *words, **kwargs):
    "A Python process with the words as arguments."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def equal(a, b):
    "Whether all arrays are the same, bit for bit."
    pairs = ((a.dense, b.dense), (a.multi, b.multi), (a.offsets, b.offsets))
    return (all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)
            and (a.lexical != b.lexical).nnz == 0)


def marks(path): return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in path.glob("*.safetensors")}


# A run that the system kills

SLOW = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_store import TEXTS, SHARD
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.store import encode_corpus
def slowly():
    for i, t in enumerate(TEXTS):
        if i % SHARD == 0: print(i, flush=True)
        time.sleep(float(sys.argv[4]))
        yield t
encoder = M3Encoder.from_pretrained(sys.argv[1], max_length=64, progress=False)
encode_corpus(encoder, slowly(), sys.argv[2], shard_size=SHARD, progress=False)
"""


def wait_for(condition, process, seconds=600):
    "Until the condition holds; a process that ended before is an error."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "took too long"
        time.sleep(.005)


def test_killed_runs_are_finished_bit_for_bit(tmp_path, checkpoint, encoder, env):
    path, here = tmp_path / "store", os.path.dirname(__file__)
    for shards in (2, 4):
        process = run(SLOW, env, checkpoint, path, here, .02)
        wait_for(lambda: len(marks(path)) >= shards, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="not finished"): EmbeddingStore(path)
    (path / "000005.tmp").write_bytes(b"half a shard")          # as a kill inside a write leaves it
    before = marks(path)
    process = run(SLOW, env, checkpoint, path, here, 0)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    after = marks(path)
    assert len(before) >= 4 and len(after) == 7 and {k: after[k] for k in before} == before
    assert not list(path.glob("*.tmp"))
    whole = encode_corpus(encoder, TEXTS, tmp_path / "whole", shard_size=SHARD, progress=False)
    assert equal(EmbeddingStore(path).embeddings(), whole.embeddings())
    files = [sorted(folder.glob("*.safetensors")) for folder in (path, whole.path)]
    for a, b in zip(*files): assert a.read_bytes() == b.read_bytes()


def test_truncated_texts_are_counted_over_all_runs(tmp_path, encoder):
    long = [" ".join(["w3"] * (30 if i % 10 == 0 else 3)) for i in range(100)]
    def stopped():
        yield from long[:40]
        raise KeyboardInterrupt
    settings = {"shard_size": SHARD, "progress": False}
    encode = lambda texts: encode_corpus(encoder, texts, tmp_path / "store", max_length=20, **settings)
    with pytest.raises(KeyboardInterrupt): encode(stopped())
    with pytest.warns(UserWarning, match="10 of 100 texts are longer than 20 tokens") as said:
        store = encode(pd.Series(long))
    assert len(said) == 1
    assert store.info["truncated"] == 10
    assert json.loads((tmp_path / "store" / "store.json").read_text())["truncated"] == 10
    with pytest.warns(UserWarning, match="10 of 100 texts"):                     # complete: said again
        assert encode(iter(long)).info == store.info
    assert encode_corpus(encoder, long, tmp_path / "whole", shard_size=SHARD, progress=False).info["truncated"] == 0
    for given in ("w1", {"w1": 1}, pd.DataFrame({"w1": long})):
        with pytest.raises(ValueError, match="texts must be a list"): encode(given)


def test_files_have_the_permissions_of_the_umask(tmp_path, encoder):
    before = os.umask(0o027)
    try: encode_corpus(encoder, TEXTS[:20], tmp_path / "store", shard_size=SHARD, progress=False)
    finally: os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "store").iterdir() if f.name != ".lock"} == {0o640}


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path, checkpoint, encoder, env):
    path = tmp_path / "store"
    process = run(SLOW, env, checkpoint, path, os.path.dirname(__file__), 1)
    assert process.stdout.readline() == "0\n", process.communicate()[1]
    try:
        with pytest.raises(ValueError, match="another process is writing this store"):
            encode_corpus(encoder, TEXTS, path, shard_size=SHARD, progress=False)
    finally:
        process.kill()
        process.communicate()
    assert len(encode_corpus(encoder, TEXTS, path, shard_size=SHARD, progress=False)) == len(TEXTS)


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from test_store import TEXTS, SHARD
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.store import encode_corpus
encoder = M3Encoder.from_pretrained(sys.argv[1], max_length=64, progress=False)
def texts():
    for i, t in enumerate(TEXTS):
        if i == 2 * SHARD: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))   # no file may be larger now
        yield t
encode_corpus(encoder, texts(), sys.argv[2], shard_size=SHARD, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_leaves_finished_shards(tmp_path, checkpoint, encoder, env):
    path = tmp_path / "store"
    process = run(FULL, env, checkpoint, path, os.path.dirname(__file__))
    error = process.communicate()[1]
    assert process.returncode == 1, error
    assert f"OSError: {path / '000002.safetensors'}: this shard could not be written" in error, error
    before = marks(path)
    assert len(before) == 2 and not list(path.glob("*.tmp"))
    encode_corpus(encoder, TEXTS, path, shard_size=SHARD, progress=False)
    assert {k: marks(path)[k] for k in before} == before


# What is there already

@pytest.fixture
def store(tmp_path, encoder): return encode_corpus(encoder, TEXTS, tmp_path / "store", shard_size=SHARD, progress=False)


def test_a_finished_store_is_not_touched(store, encoder, monkeypatch):
    monkeypatch.setattr(M3Encoder, "encode", lambda *a, **k: pytest.fail("encoded again"))
    before = marks(store.path), (store.path / "store.json").stat().st_mtime_ns
    encode_corpus(encoder, iter(TEXTS), store.path, shard_size=SHARD, progress=False)
    assert (marks(store.path), (store.path / "store.json").stat().st_mtime_ns) == before


@pytest.mark.parametrize("change, words", [
    (dict(prompt=""), "prompt 'w5 ', not ''"), (dict(max_length=32), "max_length 64, not 32"),
    (dict(outputs=("dense", "multi")), "outputs"),
    (dict(multi_dtype="int8"), "multi_dtype 'float16', not 'int8'"), (dict(shard_size=8), "shard_size 16, not 8")])
def test_another_setting_is_refused(store, encoder, change, words):
    with pytest.raises(ValueError, match="Encode with these settings") as error:
        encode_corpus(encoder, TEXTS, store.path, **dict(shard_size=SHARD, progress=False) | change)
    assert words in str(error.value)


@pytest.mark.parametrize("part", ["encoder", "lexical_head", "multi_head", "pooling"])
def test_another_model_is_refused(store, checkpoint, part):
    model = M3Model.from_pretrained(checkpoint)
    if part == "pooling": model.config.pooling = "cls"
    else: next(getattr(model, part).parameters()).data[0] += 1e-3
    with pytest.raises(ValueError, match=part):
        other = M3Encoder(model, max_length=64, progress=False)
        encode_corpus(other, TEXTS, store.path, shard_size=SHARD, progress=False)


@pytest.mark.parametrize("texts, words", [
    ([*TEXTS[:50], "w3", *TEXTS[51:]], "000003.safetensors: text 50 is not the one"),
    (TEXTS[1:], "text 0 is not the one"), (TEXTS[:97], "more texts than the 97"),
    (TEXTS[:96], "more texts than the 96"), ([], "more texts than the 0"), ([*TEXTS[:20], 7], "text 20 is int")])
def test_other_texts_are_refused(store, encoder, texts, words):
    before = marks(store.path)
    with pytest.raises(ValueError, match=words):
        encode_corpus(encoder, texts, store.path, shard_size=SHARD, progress=False)
    assert marks(store.path) == before and len(EmbeddingStore(store.path)) == len(TEXTS)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty", "missing", "another"])
def test_a_damaged_shard_is_named(store, encoder, damage):
    file = shard_file(store.path, 3)
    data = file.read_bytes()
    whole = store.embeddings()
    if damage == "missing": file.unlink()
    else:
        damaged = {"cut": data[:-1], "longer": data + b"x", "header": b"\xff" * 8 + data[8:], "empty": b"",
                   "another": shard_file(store.path, 6).read_bytes()}
        file.write_bytes(damaged[damage])
    assert len(store[:48]) == 48                             # the others can be read
    with pytest.raises(ValueError, match="000003.safetensors"): store[[10, 48]]
    if damage != "missing":
        with pytest.raises(ValueError, match="000003.safetensors"):
            encode_corpus(encoder, TEXTS, store.path, shard_size=SHARD, progress=False)
        file.unlink()
    assert equal(encode_corpus(encoder, TEXTS, store.path, shard_size=SHARD, progress=False).embeddings(), whole)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
def test_a_damaged_description_is_named(store, text):
    (store.path / "store.json").write_text(text)
    with pytest.raises(ValueError, match="store.json: not "): EmbeddingStore(store.path)


def test_a_setting_that_fails_can_be_mended(tmp_path, encoder):
    with pytest.raises(ValueError, match="max_length"):
        encode_corpus(encoder, TEXTS, tmp_path / "store", max_length=1000, progress=False)
    assert len(encode_corpus(encoder, TEXTS, tmp_path / "store", progress=False)) == len(TEXTS)


def test_a_corpus_that_has_grown(store, encoder):
    before, grown = marks(store.path), [*TEXTS, *(f"w{i}" for i in range(20))]
    bigger = encode_corpus(encoder, grown, store.path, shard_size=SHARD, progress=False)
    changed = {k for k, v in marks(store.path).items() if before.get(k) != v}
    assert changed == {"000006.safetensors", "000007.safetensors"}
    whole = encode_corpus(encoder, grown, store.path.parent / "whole", shard_size=SHARD, progress=False)
    assert equal(bigger.embeddings(), whole.embeddings())


# What is read

@pytest.mark.parametrize("dtype, error", [("float32", 0), ("float16", 2.5e-4), ("int8", 1 / 254)])
def test_round_trip(tmp_path, encoder, dtype, error):
    store = encode_corpus(encoder, TEXTS, tmp_path / "store", shard_size=SHARD, multi_dtype=dtype, progress=False)
    read = store.embeddings()
    wanted = Embeddings.concat([encoder.encode_passages(TEXTS[i:i + SHARD]) for i in range(0, len(TEXTS), SHARD)])
    assert np.abs(read.multi - wanted.multi).max() <= error and read.multi.dtype == np.float32
    assert np.array_equal(read.dense, wanted.dense)
    assert np.array_equal(read.offsets, wanted.offsets)
    assert (read.lexical != wanted.lexical).nnz == 0
    assert sum(map(len, store.shards())) == len(store) == len(TEXTS)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(-100, 99), max_size=40))
def test_any_rows_in_any_order(store, rows): assert equal(store[rows], store.embeddings()[rows])


@pytest.mark.parametrize("outputs", [("dense",), ("lexical",), ("multi",), ("lexical", "dense")])
def test_some_outputs(tmp_path, encoder, outputs):
    e = encode_corpus(encoder, TEXTS, tmp_path / "store", outputs=outputs, shard_size=SHARD, progress=False)[3:40]
    assert {k for k, v in vars(e).items() if v is not None} - {"offsets", "model"} == set(outputs) and len(e) == 37


def test_an_empty_corpus(tmp_path, encoder):
    store = encode_corpus(encoder, iter(()), tmp_path / "store", progress=False)
    e = store.embeddings()
    assert len(store) == len(e) == 0
    assert (e.dense.shape, e.lexical.shape, e.multi.shape) == ((0, 32), (0, 60), (0, 32))
    assert [len(s) for s in store.shards()] == [0] and len(store[:]) == 0
    assert search(encoder.encode_queries(["w1"]), store)[1].shape == (1, 0)
    assert len(encode_corpus(encoder, TEXTS[:3], store.path, progress=False)) == 3       # and it can grow


# Search against sorting the whole matrix

MODES = ("dense", "lexical", "multi")
GRID = st.integers(0, 2 ** 31)


def coarse(n, seed, d=4, vocabulary=6):
    "Embeddings whose numbers are few and whose sums are exact in float32: every score ties with others."
    rng = np.random.default_rng(seed)
    lengths = 2 ** rng.integers(0, 3, n)          # means over 1, 2 or 4 tokens are exact too
    grid = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32) / 4
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Embeddings(grid(n, d), csr_matrix(np.abs(grid(n, vocabulary))), grid(lengths.sum(), d), offsets)


@settings(max_examples=150, deadline=None)
@given(seed=GRID, n_q=st.integers(0, 4), n=st.integers(0, 40), k=st.integers(1, 50), block=st.integers(1, 50),
       weights=st.dictionaries(st.sampled_from(MODES), st.sampled_from([-.5, .5, 1., 2.]), min_size=1))
def test_search_is_sorting(seed, n_q, n, k, block, weights):
    queries, passages = coarse(n_q, seed), coarse(n, seed + 1)
    matrix = fuse(all_scores(queries, passages), weights)
    wanted = np.argsort(-matrix, axis=1, kind="stable")[:, :k]           # equal scores in the order of their indices
    scores, indices = search(queries, passages, k, weights, block=block)
    assert np.array_equal(indices, wanted) and np.array_equal(scores, np.take_along_axis(matrix, wanted, 1))
    assert scores.dtype == np.float32 and indices.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(seed=GRID, n=st.integers(1, 40), k=st.integers(1, 10), more=st.integers(0, 40), block=st.integers(1, 50),
       lexical=st.sampled_from([0., .5]))
def test_two_stages(seed, n, k, more, block, lexical):
    queries, passages = coarse(3, seed), coarse(n, seed + 1)
    weights = {"dense": 1., "lexical": lexical, "multi": 2.}
    modes = all_scores(queries, passages)
    first, full = fuse(modes, {"dense": 1., "lexical": lexical}), fuse(modes, weights)
    scores, indices = search(queries, passages, k, weights, candidates=k + more, block=block)
    for i in range(3):
        chosen = np.sort(np.argsort(-first[i], kind="stable")[:k + more])
        wanted = chosen[np.argsort(-full[i, chosen], kind="stable")][:k]
        assert np.array_equal(indices[i], wanted) and np.array_equal(scores[i], full[i, wanted])


@settings(max_examples=30, deadline=None)
@given(seed=GRID, n=st.integers(1, 300), block=st.integers(1, 310))
def test_search_with_ordinary_numbers(seed, n, block):
    "A block's shape may move the last bit of a product, no more."
    rng = np.random.default_rng(seed)
    queries, passages = (Embeddings(dense=rng.normal(size=(m, 16)).astype(np.float32)) for m in (3, n))
    matrix = queries.dense @ passages.dense.T
    scores, indices = search(queries, passages, 10, block=block)
    assert np.allclose(scores, -np.sort(-matrix, 1)[:, :10], atol=1e-5)
    assert np.allclose(np.take_along_axis(matrix, indices, 1), scores, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in indices)


def test_search_on_disk_is_search_in_memory(store, encoder):
    queries, memory = encoder.encode_queries(["w1 w7", "w30", "w2 w2 w9"]), store.embeddings()
    for weights in ({"dense": 1.}, {"lexical": 1.}, {"dense": 1., "lexical": .3, "multi": 1.}):
        for candidates in (0, 30) if len(weights) == 3 else (0,):
            (a, i), (b, j) = (search(queries, c, 12, weights, candidates, block=40) for c in (store, memory))
            assert np.array_equal(a, b) and np.array_equal(i, j)


# What a search refuses, and what a read touches

def test_queries_of_another_model_are_refused_where_that_is_known(encoder, checkpoint, tmp_path):
    other = M3Encoder.from_pretrained(checkpoint, max_length=64, progress=False)
    store = encode_corpus(encoder, TEXTS, tmp_path/"s", shard_size=SHARD, progress=False)
    with torch.no_grad(): other.model.multi_head.weight.mul_(1.5)
    asked = other.encode_queries(TEXTS[:3])
    for corpus in (store, store.embeddings()):
        with pytest.raises(ValueError, match="another model than the passages, which differs in weights of"):
            search(asked, corpus)
        with pytest.raises(ValueError, match="another model"): search_candidates(asked, corpus, 3, progress=False)
    same = M3Encoder.from_pretrained(checkpoint, max_length=64, progress=False)
    assert search(same.encode_queries(TEXTS[:3]), store)[1].shape == (3, 10)
    unknown = Embeddings(asked.dense)                           # made elsewhere: nothing is known, nothing refused
    assert search(unknown, store)[1].shape == (3, 10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_named(value):
    dense = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    asked, corpus = Embeddings(dense[:4].copy()), Embeddings(dense.copy())
    corpus.dense[37, 2] = value
    with pytest.raises(ValueError, match="passage 37"): search(asked, corpus, block=10)
    asked.dense[2, 0] = value
    with pytest.raises(ValueError, match="query 2"): search(asked, Embeddings(dense))
    with pytest.raises(ValueError, match="query 0 and passage 37"):
        scores_of(Embeddings(dense), corpus, np.array([0]), np.array([37]))


def test_a_model_that_gives_nan_writes_no_shard(checkpoint, tmp_path):
    broken = M3Encoder.from_pretrained(checkpoint, max_length=64, progress=False)
    word = broken.tokenizer.convert_tokens_to_ids("w44")
    with torch.no_grad(): broken.model.encoder.embeddings.word_embeddings.weight[word] = np.nan
    with pytest.raises(ValueError, match="text 17 are not finite"):
        encode_corpus(broken, ["w2"] * 17 + ["w44"] + ["w2"] * 3, tmp_path/"s", shard_size=SHARD, progress=False)
    assert [f.name for f in (tmp_path/"s").glob("*.safetensors")] == ["000000.safetensors"]


def test_a_read_does_not_depend_on_the_size_of_the_store(encoder, tmp_path):
    store = encode_corpus(encoder, TEXTS, tmp_path/"s", shard_size=SHARD, progress=False)
    store.info["n"] = 10**12                                              # a list of all rows would need 8 TB
    whole = encoder.encode_passages(TEXTS)
    for index, same in ((slice(3, 40), slice(3, 40)), ([5, 80, 17, 5], [5, 80, 17, 5]), (7, [7]), ([-10**12], [0])):
        assert np.allclose(store.read(index, ("dense",)).dense, whole[same].dense, atol=1e-6)
    with pytest.raises(IndexError): store.read([10**12])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(n), st.one_of(
    st.slices(n), st.lists(st.integers(-n, n - 1), max_size=9) if n else st.just([]),
    st.lists(st.booleans(), min_size=n, max_size=n)))))
def test_row_numbers_are_those_of_numpy(case):
    n, index = case
    rows = index
    if isinstance(index, list): rows = np.array(index, bool if index and isinstance(index[0], bool) else int)
    expected = np.arange(n)[rows]
    assert row_numbers(index, n).tolist() == expected.tolist()


def test_a_query_that_is_not_finite_is_named_among_many():
    "Queries are scored in blocks, and the number is that of all."
    rng = np.random.default_rng(0)
    asked, corpus = (rng.normal(size=(n, 4)).astype(np.float32) for n in (600, 9000))
    asked[555] = np.nan
    with pytest.raises(ValueError, match="query 555"): search(Embeddings(asked), Embeddings(corpus))
