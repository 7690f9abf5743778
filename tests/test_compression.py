"""Token pooling beside sentence-transformers' own, and properties over random shapes."""
import numpy as np
import pytest
from scipy.sparse import random as random_csr

from bgem3_nb.compression import fit_pca, keep_top, pool_tokens, reduce_dim, token_counts
from bgem3_nb.encoding import Embeddings
from bgem3_nb.scoring import maxsim_scores


def ragged(counts, d=16, seed=0):
    rng = np.random.default_rng(seed)
    multi = rng.normal(size=(sum(counts), d)).astype(np.float32) + .5
    return Embeddings(dense=np.ones((len(counts), 2), np.float32),
                      lexical=random_csr(len(counts), 30, .2, "csr", np.float32, random_state=seed),
                      multi=multi/np.linalg.norm(multi, axis=1, keepdims=True),
                      offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_pooling_equals_sentence_transformers(factor):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules.token_pooling",
                               reason="sentence-transformers 6.2 or newer").HierarchicalTokenPooling
    # multiples of the factors: the peer rounds the number of groups down, we round up
    emb = ragged([6, 12, 60, 240])
    ours = pool_tokens(emb, factor, progress=False)
    theirs = peer(pool_factor=factor,
                  num_protected_tokens=0).pool([torch.from_numpy(emb.vectors(i)) for i in range(len(emb))])
    for i, expected in enumerate(theirs):    # the same set of vectors; the order of the groups is free
        found = ours.vectors(i)
        assert found.shape == expected.shape
        assert np.abs((found @ expected.numpy().T).max(1) - 1).max() < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_properties(seed):
    rng = np.random.default_rng(seed)
    emb, factor, share = ragged(rng.integers(0, 40, 12).tolist(), seed=seed), rng.uniform(1, 9), rng.uniform(.01, 1)
    importance = rng.random(len(emb.multi))
    top, pooled = keep_top(emb, importance, share=share), pool_tokens(emb, factor, progress=False)
    for out in (top, pooled, reduce_dim(emb, fit_pca(emb, 5))):
        assert out.dense is emb.dense and out.lexical is emb.lexical and len(out) == len(emb)
        assert out.offsets.dtype == np.int64 and out.offsets[-1] == len(out.multi) and out.multi.dtype == np.float32
        assert np.allclose(np.linalg.norm(out.multi, axis=1), 1, atol=1e-5)
    counts = token_counts(emb)
    assert (token_counts(top) == np.ceil(counts * share)).all()
    assert (token_counts(pooled) == np.ceil(counts / factor)).all()
    for i in range(len(emb)):                # by the definition: the largest numbers of each text, in order
        a, b = emb.offsets[i:i + 2]
        kept = np.sort(np.argsort(-importance[a:b])[:token_counts(top)[i]])
        assert (top.vectors(i) == emb.vectors(i)[kept]).all()
    # a score can only fall when tokens are dropped
    q = ragged([3, 5], seed=99)
    filled = counts > 0
    assert (maxsim_scores(q, top)[:, filled] <= maxsim_scores(q, emb)[:, filled] + 1e-6).all()


def test_inputs_stay_as_they_were():
    emb = ragged([7, 3])
    before, offsets = emb.multi.copy(), emb.offsets.copy()
    keep_top(emb, np.arange(10), k=2)
    pool_tokens(emb, 2)
    reduce_dim(emb, fit_pca(emb, 4))
    assert (emb.multi == before).all() and (emb.offsets == offsets).all()
