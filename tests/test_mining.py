"""Mining: exactness against brute force over many shapes, stores, threads, processes; what must not be mined."""
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse import random as sparse_random

from bgem3_nb.scoring import all_scores, fuse
from bgem3_nb.encoding import Embeddings
from bgem3_nb.exact_search import Candidates, scores_of, search_candidates, top_dense
from bgem3_nb.mining import (
    Bounds, bm25_candidates, corpus_set, index_candidates, known_positives, mined_rows, parts_of_mix, read_run,
    sample_pairs, search_deeper, search_depth, take_negatives)
from bgem3_nb.rows import make_rows


def vectors(n, d, seed, common=1.):
    x = np.random.default_rng(seed).standard_normal((n, d), np.float32) + common
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute(q, p, k):
    "The best scores in double precision, and the scores of all pairs."
    s = q.dense.astype(np.float64) @ p.dense.astype(np.float64).T
    return np.sort(s, axis=1)[:, ::-1][:, :k], s


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 70), st.integers(1, 600), st.integers(0, 9),
       st.sampled_from([0., 1., 4.]), st.sampled_from([torch.bfloat16, torch.float32]))
def test_the_best_are_the_best(n, m, d, k, seed, common, dtype):
    q, p = Embeddings(dense=vectors(n, d, seed, common)), Embeddings(dense=vectors(m, d, seed + 100, common))
    found, (best, s) = top_dense(q, p, k, dtype), brute(q, p, k)
    np.testing.assert_allclose(found.scores, best, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(s, found.passages, 1), found.scores, atol=2e-6)
    assert all(len(set(row)) == min(k, m) for row in found.passages.tolist())


@pytest.mark.parametrize("case", ["sorted", "copies", "one outlier", "long vectors", "negative", "zeros"])
def test_corpora_that_mislead_the_guess(case):
    q, p = vectors(60, 24, 0), vectors(9000, 24, 1)
    if case == "sorted": p = p[np.argsort(p @ q[0])]
    if case == "copies": p[100:7000] = p[0]
    if case == "one outlier": p[4321] *= 1000
    if case == "long vectors": p *= np.random.default_rng(0).gamma(1, 5, (9000, 1)).astype(np.float32)
    if case == "negative": p = -np.abs(p)
    if case == "zeros": p[::2] = 0
    q, p = Embeddings(dense=q), Embeddings(dense=p)
    found, (best, s) = top_dense(q, p, 150, torch.bfloat16), brute(q, p, 150)
    np.testing.assert_allclose(found.scores, best, rtol=2e-6, atol=2e-6)
    order = np.lexsort((found.passages, -found.scores), axis=1)
    assert (order == np.arange(150)).all()          # of equal scores the lower number comes first


def test_a_store_gives_what_memory_gives():
    class Store:
        "The interface of an opened store."
        def __init__(self, e): self.e = e
        def __len__(self): return len(self.e)
        def read(self, rows, outputs=None):
            wanted = {*outputs, *(["offsets"] if "multi" in outputs else [])}
            return Embeddings(**{k: v for k, v in vars(self.e).items() if k in wanted})[rows]
    lengths = np.random.default_rng(0).integers(1, 5, 3000)
    lexical = sparse_random(3000, 40, .1, "csr", np.float32, np.random.default_rng(1))
    multi = vectors(lengths.sum(), 16, 2)
    p = Embeddings(vectors(3000, 16, 0), lexical, multi, np.append(0, np.cumsum(lengths)))
    q = p[:25]
    for weights in ({"dense": 1.}, {"lexical": 1.}, "all"):
        a, b = (search_candidates(q, c, 30, weights, progress=False) for c in (p, Store(p)))
        np.testing.assert_array_equal(a.passages, b.passages)
        np.testing.assert_array_equal(a.scores, b.scores)
    i, j = np.arange(25), np.arange(25) * 100
    np.testing.assert_array_equal(scores_of(q, p, i, j, "all"), scores_of(q, Store(p), i, j, "all"))


RUN = """
import sys, numpy as np, torch
torch.set_num_threads(int(sys.argv[1])); sys.path.insert(0, "tests")
from test_mining import vectors
from bgem3_nb.encoding import Embeddings
from bgem3_nb.mining import sample_pairs, scores_of, take_negatives, top_dense
q, p = Embeddings(dense=vectors(300, 48, 0)), Embeddings(dense=vectors(12_000, 48, 1))
found = top_dense(q, p, 120)
texts, score = [f"q{i}" for i in range(300)], lambda i, j: scores_of(q, p, i, j)
d = sample_pairs(found, [{i} for i in range(300)], texts, 12_000, score, 7, {"10-50": .3, "50-100": .4, "random": .3})
from hashlib import blake2b
table = take_negatives(d)[0].to_csv()
print(blake2b(found.scores.tobytes() + found.passages.tobytes() + table.encode()).hexdigest())
"""


def test_same_negatives_in_other_processes_and_thread_counts():
    def run(threads):
        env = os.environ | {"PYTHONPATH": ".", "PYTHONHASHSEED": str(threads)}
        return subprocess.run([sys.executable, "-c", RUN, str(threads)], capture_output=True, text=True, env=env)
    done = [run(threads) for threads in (1, 2)]
    assert done[0].returncode == 0, done[0].stderr
    assert len({d.stdout for d in done}) == 1
    assert done[0].stdout.strip()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from(["0-10", "5-30", "graded", {"0-5": .5, "random": .5}]),
       st.sampled_from(["spare", "random", "none"]))
def test_nothing_known_is_drawn_and_counts_add_up(seed, n, mix, top_up):
    rng = np.random.default_rng(seed)
    queries, m = 15, 300
    scores = np.sort(rng.random((queries, 210), np.float32))[:, ::-1]
    found = Candidates(scores, np.argsort(rng.random((queries, m)), axis=1)[:, :210])
    known = [set(rng.integers(0, m, rng.integers(1, 10)).tolist()) for _ in range(queries)]
    score = lambda i, j: np.zeros(len(i), np.float32)
    texts = [f"q{i}" for i in range(queries)]
    d = sample_pairs(found, known, texts, m, score, n, mix, top_up=top_up, seed=seed)
    d.pairs.loc[rng.random(len(d.pairs)) < .4, "reason"] = "dropped"
    chosen, counts = take_negatives(d)
    assert not any(p in known[q] for q, p in zip(d.pairs["query"], d.pairs.passage))
    assert not chosen.duplicated(["query", "passage"]).any()
    assert (chosen.reason == "").all()
    got = chosen.groupby("query").size().reindex(range(queries), fill_value=0)
    assert (got <= n).all()
    assert counts["chosen"] == len(chosen) == sum(counts["by part"].values())
    assert counts["queries with too few"] == (got < n).sum()
    for part, w in parts_of_mix(mix, n).items():
        lo, hi = map(int, part.split("-")) if part != "random" else (0, 0)
        here = chosen[chosen.part == part]
        assert len(here) <= w * queries
        assert (here["rank"] > lo).all() | (part == "random")
        assert (here["rank"] <= hi).all()


def test_bounds_hold_for_every_negative():
    q, p = Embeddings(dense=vectors(40, 8, 0)), Embeddings(dense=vectors(500, 8, 1))
    score = lambda i, j: scores_of(q, p, i, j)
    bounds = Bounds(min_score=.2, max_score=.95, relative_margin=.02, absolute_margin=.01)
    known, texts = [{i} for i in range(40)], [str(i) for i in range(40)]
    mix = {"0-50": .6, "random": .4}
    d = sample_pairs(top_dense(q, p, 60), known, texts, 500, score, 5, mix, bounds, top_up="random")
    assert len(d.pairs)
    assert (d.pairs.score >= .2).all()
    assert (d.pairs.score <= .95).all()
    query, passage = d.pairs["query"].to_numpy(), d.pairs.passage.to_numpy()
    weakest = scores_of(q, p, query, query)
    assert (d.pairs.score <= weakest - .01 + 1e-6).all()
    assert (d.pairs.score <= weakest - .02 * np.abs(weakest) + 1e-6).all()
    np.testing.assert_allclose(d.pairs.score, score(query, passage), atol=1e-6)       # none is assumed


def test_rows_carry_fresh_scores_and_where_they_came_from():
    six = [{"query": f"câu hỏi {i}", "pos": [f"đáp án {i}", f"đáp án khác {i}"], "neg": ["cũ"], "neg_scores": [7.],
            "query_id": f"id{i}"} for i in range(6)]
    rows = make_rows(six + [{"query": "Câu  hỏi 0", "pos": "đáp án 0 nữa"}])
    data = corpus_set(rows)
    known, m = known_positives(data), len(data.passages)
    e = Embeddings(dense=vectors(len(data), 8, 0)), Embeddings(dense=vectors(m, 8, 1))
    score = lambda i, j: scores_of(*e, i, j)
    assert known[0] == known[data.queries.index("Câu  hỏi 0")]          # other case and spaces: equivalent
    assert len(known[0]) == 3
    chosen, _ = take_negatives(sample_pairs(top_dense(*e, m), known, data.queries, m, score, 4, "0-20"))
    out = mined_rows(rows, data, chosen, "dense", score)
    assert len(out) == 7
    assert out.column_names == rows.column_names
    for row in out:
        assert {len(row[name]) for name in ("neg", "neg_scores", "neg_types", "neg_ids")} == {4}
        assert row["neg_weights"] == []
        assert not set(row["neg"]) & set(row["pos"])
        assert all(kind[0] == "dense" and kind[2].startswith("rank ") for kind in row["neg_types"])
        q = data.queries.index(row["query"])
        for name in ("neg", "pos"):
            places = np.array([data.passages.index(t) for t in row[name]])
            np.testing.assert_allclose(row[f"{name}_scores"], score(np.full(len(places), q), places), atol=1e-6)
    assert json.loads(json.dumps(out[0]))


def test_scores_of_takes_only_what_the_pairs_name():
    rng = np.random.default_rng(0)
    q, p = (Embeddings(dense=rng.standard_normal((20_000, 256), np.float32)) for _ in range(2))
    i, j = rng.integers(0, 20_000, (2, 3000))
    scores_of(q, p, i, j)
    tracemalloc.start()
    scores = scores_of(q, p, i, j)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(scores, (q.dense[i] * p.dense[j]).sum(1), atol=1e-3)
    assert peak < q.dense.nbytes / 2, peak


def test_memory_of_a_mixture_does_not_grow_with_scores_of_all_queries():
    rng = np.random.default_rng(0)
    dense = lambda n: rng.normal(size=(n, 8)).astype(np.float32)
    texts = lambda n: Embeddings(dense(n), sparse_random(n, 50, .1, "csr", np.float32, rng))
    corpus, peaks = texts(8192), {}
    for n in (1_000, 4_000):
        asked = texts(n)
        tracemalloc.start()
        found = search_candidates(asked, corpus, 5, {"dense": 1., "lexical": .3}, progress=False)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[4_000] - peaks[1_000] < 3_000 * 8192          # a byte for each score would be that much; one is 4
    s = fuse(all_scores(asked[:50], corpus), {"dense": 1., "lexical": .3})
    assert (found.passages[:50] == np.argsort(-s, axis=1, kind="stable")[:, :5]).all()


def test_one_query_with_many_positives_does_not_deepen_the_others():
    rng = np.random.default_rng(1)
    corpus, asked = (Embeddings(rng.normal(size=(n, 8)).astype(np.float32)) for n in (3_000, 4))
    best = np.argsort(-asked.dense @ corpus.dense.T, axis=1)
    known = [{0}, set(best[1, :900].tolist()), {1}, {2}]
    depth = search_depth("0-20", known, 3_000)
    found = search_deeper(search_candidates(asked, corpus, depth, progress=False), asked, corpus, known)
    assert found.passages.shape == (4, depth) and depth == 20 + 64
    assert (found.passages[1] == best[1, 900:900 + depth]).all()                  # those behind its positives
    assert (found.passages[[0, 2, 3]] == best[[0, 2, 3], :depth]).all()
    drawn = sample_pairs(found, known, list("abcd"), 3_000, num_negatives=7, mix="0-20")
    assert (np.bincount(drawn.pairs["query"]) >= 7).all()


def test_every_search_looks_behind_many_positives(tmp_path):
    "BM25, an index and a run file: the query with 300 positives gets those behind them, the others what they had."
    rng, n, k, many = np.random.default_rng(2), 1_000, 30, 300
    corpus, asked = (Embeddings(rng.normal(size=(m, 8)).astype(np.float32)) for m in (n, 3))
    texts = [" ".join(rng.choice([f"w{i}" for i in range(40)], 12)) for _ in range(n)]
    queries = [" ".join(f"w{i}" for i in range(a, a + 8)) for a in (0, 10, 20)]
    ids, run = [f"p{i}" for i in range(n)], tmp_path / "a.run"
    best = np.argsort(-asked.dense @ corpus.dense.T, axis=1, kind="stable")
    lines = (f"q{i} Q0 p{p} {r} {-r} x\n" for i, row in enumerate(best) for r, p in enumerate(row[:700]))
    run.write_text("".join(lines))
    searches = {"bm25": lambda k, known=(): bm25_candidates(queries, texts, k, progress=False, known=known),
                "index": lambda k, known=(): index_candidates(asked, corpus, k, "Flat", known=known),
                "run": lambda k, known=(): read_run(run, ["q0", "q1", "q2"], ids, k, known=known)}
    for name, search in searches.items():
        deep, plain = search(700), search(k)
        known = [{0}, set(deep.passages[1, :many].tolist()), set(range(64))]
        found = search(k, known)
        assert found.passages.shape == (3, k), name
        assert (found.passages[1] == deep.passages[1, many:many + k]).all(), name
        assert (found.passages[[0, 2]] == plain.passages[[0, 2]]).all(), name
        np.testing.assert_allclose(found.scores[1], deep.scores[1, many:many + k], rtol=1e-6)


def test_old_names_are_refused_with_the_new_ones():
    found = Candidates(np.ones((1, 5), np.float32), np.arange(5)[None])
    for call, word in ((lambda: sample_pairs(found, [{0}], ["q"], 5, n=3), "num_negatives"),
                       (lambda: sample_pairs(found, [{0}], ["q"], 5, order="top"), "sampling_strategy"),
                       (lambda: Bounds(low=.1), "min_score"), (lambda: Bounds(high=.1), "max_score"),
                       (lambda: Bounds(margin=.1), "absolute_margin"), (lambda: Bounds(ratio=.9), "relative_margin"),
                       (lambda: search_candidates(Embeddings(), Embeddings(), pool=3), "candidates")):
        with pytest.raises(TypeError, match=f"any more; use {word}"): call()
