"""What the notebook 03_scoring cannot hold: parity with the reference's `compute_score`, random shapes, memory of
pairs."""
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.sparse import csr_matrix

from bgem3_nb.encoding import Embeddings, M3Encoder
from bgem3_nb.model import M3Config, M3Model, init_heads
from bgem3_nb.scoring import all_scores, explain, fuse, lexical_scores, maxsim_scores, pair_scores, text_blocks

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PAIRS = [("lương thử việc là bao nhiêu",
          "Tiền lương trong thời gian thử việc ít nhất phải bằng 85% mức lương của công việc đó."),
         ("when is the harbour closed", "The port authority closes the harbour during storms."),
         ("الصلاة", "إن الصلاة كانت على المؤمنين كتابا موقوتا"),
         ("工资", "试用期的工资不得低于百分之八十。"), ("a", "b c d " * 40),
         ("Wie lange dauert die Probezeit?", "Die Probezeit beträgt höchstens sechs Monate."),
         ("congé annuel", "Le salarié a droit à un congé."), ("отпуск", "Ежегодный отпуск составляет 28 дней."),
         ("有給休暇", "労働者には年次有給休暇がある。"), ("연차 휴가", "근로자는 유급 휴가를 받는다.")]


def embeddings(lengths, seed, d=8, vocabulary=30, dense=True):
    "Random unit vectors and lexical weights for texts of these lengths."
    rng = np.random.default_rng(seed)
    def unit(n):
        x = rng.normal(size=(n, d)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    weights = rng.random((len(lengths), vocabulary), np.float32) * (rng.random((len(lengths), vocabulary)) < .3)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    return Embeddings(unit(len(lengths)), csr_matrix(weights), unit(sum(lengths)), offsets)


def loop(q, p):
    "MaxSim by its definition."
    one = lambda a, b: np.mean([max(float(x @ y) for y in b) for x in a]) if len(a) and len(b) else 0
    scores = [[one(q.vectors(i), p.vectors(j)) for j in range(len(p))] for i in range(len(q))]
    return np.array(scores).reshape(len(q), len(p))


shapes, some = (st.lists(st.integers(0, 6), min_size=n, max_size=7) for n in (0, 1))


@FEW
@given(shapes, shapes, st.integers(1, 40), st.integers(0, 9))
def test_maxsim_is_its_definition(queries, passages, block, seed):
    q, p = embeddings(queries, seed), embeddings(passages, seed + 1)
    np.testing.assert_allclose(maxsim_scores(q, p, block_tokens=block), loop(q, p), atol=1e-6)


@FEW
@given(shapes, st.integers(1, 40))
def test_blocks_cover_every_text_once(lengths, tokens):
    offsets = np.append(0, np.cumsum(lengths)).astype(int)
    blocks = text_blocks(offsets, tokens)
    assert [t for a, b in blocks for t in range(a, b)] == list(range(len(lengths)))
    assert all(offsets[b] - offsets[a] <= tokens or b == a + 1 for a, b in blocks)


@FEW
@given(shapes, shapes, st.integers(0, 9))
def test_a_passage_scores_the_same_beside_any_others(queries, passages, seed):
    q, p = embeddings(queries, seed), embeddings(passages, seed + 1)
    order = np.random.default_rng(seed).permutation(len(p))
    np.testing.assert_allclose(maxsim_scores(q, p[order]), maxsim_scores(q, p)[:, order], atol=1e-6)


@FEW
@given(shapes, shapes, st.integers(0, 9))
def test_lexical_is_the_sum_over_shared_tokens(queries, passages, seed):
    q, p = embeddings(queries, seed), embeddings(passages, seed + 1)
    words = lambda e: [dict(zip(e.lexical[i].indices, e.lexical[i].data)) for i in range(len(e))]
    want = [[sum(w * b[t] for t, w in a.items() if t in b) for b in words(p)] for a in words(q)]
    np.testing.assert_allclose(lexical_scores(q, p), np.reshape(want, (len(q), len(p))), atol=1e-5)


@FEW
@given(shapes, st.integers(0, 9))
def test_pairs_are_the_diagonal_of_all_pairs(lengths, seed):
    q, p = embeddings(lengths, seed), embeddings(lengths[::-1], seed + 1)
    every = all_scores(q, p)
    for mode, s in pair_scores(q, p).items(): np.testing.assert_allclose(s, np.diagonal(every[mode]), atol=1e-6)


@FEW
@given(some, some, st.integers(0, 40), st.integers(0, 9))
def test_any_pairs_are_cells_of_all_pairs(queries, passages, n, seed):
    q, p, rng = embeddings(queries, seed), embeddings(passages, seed + 1), np.random.default_rng(seed)
    i, j = rng.integers(0, len(q), n), rng.integers(0, len(p), n)
    every = all_scores(q, p)
    for mode, s in pair_scores(q, p, i, j).items(): np.testing.assert_allclose(s, every[mode][i, j], atol=1e-6)


def test_the_rounded_top_is_exact():
    q, p = embeddings([20] * 10, 0, d=64), embeddings([40] * 500, 1, d=64)
    exact, rounded = maxsim_scores(q, p), maxsim_scores(q, p, dtype=torch.bfloat16)
    top = lambda s: np.argsort(-s, axis=1, kind="stable")[:, :10]
    assert (top(exact) == top(rounded)).all()
    np.testing.assert_allclose(exact, rounded, atol=5e-3)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)                # whatever the machine has
    try:
        maxsim_scores(embeddings([5] * 9, 0), embeddings([5] * 9, 1), block_tokens=5)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)


def test_memory_of_pairs_is_linear():
    "20 000 pairs of 20 000 texts: their square would be 1.6 GB in fp32 for each mode."
    code = """if True:
        import resource, numpy as np, sys
        sys.path.insert(0, "tests")
        from test_scoring import embeddings
        from bgem3_nb.scoring import pair_scores
        e = embeddings([2] * 20_000, 0)
        pair_scores(e[:10], e[:10])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scores = pair_scores(e, e[::-1])
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(grown / 1024, {m: s.shape for m, s in scores.items()}, file=sys.stderr)
        assert grown < 100 * 1024
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr


# ---- the reference ----

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    M3Model.from_pretrained("embedded", new_heads="identity").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint): return M3Encoder.from_pretrained(checkpoint, dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def reference(checkpoint):
    from FlagEmbedding import BGEM3FlagModel   # without it these tests fail: they are why it is in `dev`
    return BGEM3FlagModel(str(checkpoint), use_fp16=False, devices="cpu", pooling_method="mean")


def ours(encoder, weights=(1, 1, 1)):
    "The reference's five scores of `PAIRS`; its mixtures are divided by the sum of the weights."
    s = pair_scores(encoder.encode([q for q, _ in PAIRS]), encoder.encode([p for _, p in PAIRS]))
    d, l, m = weights
    mixed = {"sparse+dense": {"dense": d, "lexical": l}, "colbert+sparse+dense": {"dense": d, "lexical": l, "multi": m}}
    mixed = {k: fuse(s, w) / sum(w.values()) for k, w in mixed.items()}
    return {"dense": s["dense"], "sparse": s["lexical"], "colbert": s["multi"]} | mixed


@pytest.mark.parametrize("batch", [3, 256])
def test_compute_score(encoder, reference, batch):
    theirs = reference.compute_score(PAIRS, batch_size=batch)
    mine = ours(encoder)
    assert set(mine) == set(theirs)
    for mode, s in mine.items(): np.testing.assert_allclose(s, theirs[mode], atol=1e-4, err_msg=mode)


def test_compute_score_with_weights(encoder, reference):
    weights = [.4, .2, .4]
    theirs, mine = reference.compute_score(PAIRS, weights_for_different_modes=weights), ours(encoder, weights)
    for mode, s in mine.items(): np.testing.assert_allclose(s, theirs[mode], atol=1e-4, err_msg=mode)


def test_where_the_reference_is_wrong():
    "A head that turns the passage away from the query: below 0 alone, and lifted to 0 by the reference's padding."
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
    q, p = embeddings([3], 0), embeddings([1, 4], 1)
    q.multi[:] = -p.vectors(0)
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(p.vectors(i)) for i in range(2)], batch_first=True)
    holder = type("Model", (), {"temperature": 1})
    batched = EncoderOnlyEmbedderM3Model.compute_colbert_score(
        holder, torch.from_numpy(q.multi)[None], padded, torch.ones(1, 4))
    assert maxsim_scores(q, p)[0, 0] == pytest.approx(-1, abs=1e-6)
    assert batched[0, 0] == 0


# ---- explain ----

@pytest.mark.filterwarnings("ignore:Glyph")     # the fonts of this machine
@pytest.mark.parametrize("pair", PAIRS + [("", ""), ("<b>&\ud800 $x$", "x" * 3000)])
def test_parts_add_up(encoder, pair):
    e = explain(encoder, *pair)
    usual = all_scores(encoder.encode_queries([pair[0]]), encoder.encode_passages([pair[1]]))
    for mode, score in e.scores.items():
        assert score == pytest.approx(usual[mode][0, 0], abs=1e-5)
        for side, tokens in zip(e.contributions(mode), e.tokens):
            assert len(side) == len(tokens)
            assert side.sum() == pytest.approx(score, abs=1e-5)
    assert sum(t.product for t in e.terms) == pytest.approx(e.scores["lexical"], abs=1e-5)
    assert not e.terms or sum(t.share for t in e.terms) == pytest.approx(1)
    assert sum(m.contribution for m in e.matches) == pytest.approx(e.scores["multi"], abs=1e-5)
    for text, prompt, tokens in zip(e.texts, e.prompts, e.tokens):
        source = {"text": text, "prompt": prompt}
        for t in tokens:
            if t.part == "special": continue
            assert source[t.part][t.start:t.end] == t.text.removeprefix("##")
    html = e._repr_html_()
    assert "<b>" not in html
    assert html.count("<table>") == 3
    e.heatmap()


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_dense_without_parts(encoder, pooling):
    model = encoder.model
    other = M3Model(model.encoder, model.tokenizer, M3Config(pooling=pooling))
    other = M3Encoder(other, dtype=torch.float32, progress=False)
    init_heads(other.model)
    e = explain(other, *PAIRS[0])
    assert e.dense is None
    assert e.prompts == ("", "")
    assert "only the total is known" in e._repr_html_()
    with pytest.raises(ValueError, match="only the total"): e.contributions("dense")
    assert e.contributions("multi")[0].sum() == pytest.approx(e.scores["multi"], abs=1e-5)


def test_expansion_has_terms_that_no_text_has(encoder):
    model = encoder.model
    other = M3Model(model.encoder, model.tokenizer, M3Config(pooling="mean", lexical="expansion"))
    other = M3Encoder(other, dtype=torch.float32, progress=False)
    init_heads(other.model)
    e = explain(other, *PAIRS[0])
    assert sum(t.product for t in e.terms) == pytest.approx(e.scores["lexical"], abs=1e-4)
