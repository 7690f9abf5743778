"""Metrics, words and intervals where the notebook 40_evaluation has no room: names, permutations, spellings, broken
input."""
import math
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgem3_nb.evaluation import bm25_scores, evaluate_scores, fit_weights, holm, paired, word_tokens
from bgem3_nb.rows import language_code


def ndcg(row, relevant, k=10):
    "nDCG by its formula, a relevant passage behind all that tie with it."
    order = sorted(range(len(row)), key=lambda j: (-row[j], j in relevant))
    gains = [1 / math.log2(rank + 1) for rank, j in enumerate(order[:k], 1) if j in relevant]
    return sum(gains) / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))


MATRICES = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_metrics_follow_their_formulas_and_no_order_of_the_corpus(rng):
    n_q, n_p = rng.integers(1, 5), rng.integers(2, 30)
    scores = rng.integers(0, 6, (n_q, n_p)).astype(np.float32)          # many ties
    qrels = [set(rng.choice(n_p, rng.integers(1, n_p), replace=False).tolist()) for _ in range(n_q)]
    found = evaluate_scores(scores, qrels, ("nDCG@10", "R@5", "RR@10"))
    assert found.values() == pytest.approx([ndcg(row, rel) for row, rel in zip(scores, qrels)])
    moved = rng.permutation(n_p)
    place = np.argsort(moved)
    again = evaluate_scores(scores[:, moved], [{int(place[j]) for j in rel} for rel in qrels],
                            ("nDCG@10", "R@5", "RR@10"))
    for metric in found.per_query: assert (found.values(metric) == again.values(metric)).all()


def test_one_metric_under_two_names_has_both():
    found = evaluate_scores([[.9, .5, .1], [.1, .5, .9]], [{0, 2}, {0}], ("R@1", "Recall@1", "RR@10", "MRR@10", "R@1"))
    assert {name: found.values(name).tolist() for name in found.per_query} == {
        "R@1": [.5, 0], "Recall@1": [.5, 0], "RR@10": [1, 1 / 3], "MRR@10": [1, 1 / 3]}


@pytest.mark.parametrize("a, b, language", [
    ("hoà", "hòa", "vi"), ("Khoẻ", "khỏe", "vi-VN"), ("THUÝ", "thúy", "VI"), ("Ðiều", "Điều", "vi_VN"),
    ("lao\u200bđộng", "laođộng", "vi"), ("hợp\u00adđồng", "hợpđồng", "vi"), ("١٢", "12", "ar"), ("۱۲", "12", "fa"),
    ("کتاب", "كتاب", "ar"), ("علی", "علي", "ar"), ("كتابًا", "كتاباً", "ar"), ("كتاباً", "كتابا", "ar-SA"),
    ("كتاباﹰ", "كتابا", "ar"), ("كتابٌ", "كتاب", "AR")])
def test_spellings_of_one_word_are_one_term(a, b, language):
    assert word_tokens(a, language) == word_tokens(b, language) != []
    assert bm25_scores([a, "x"], [b], language=language)[0].argmax() == 0


def test_words_that_only_look_alike_stay_apart():
    assert word_tokens("quý", "vi") == ["quý"]
    assert word_tokens("hoàn", "vi") == ["hoàn"]
    assert word_tokens("hoà", "en") != word_tokens("hòa", "en")
    assert word_tokens("ð", "is") != word_tokens("đ", "is")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["vi", "en", "ar", "th", "zh-Hans"]))
def test_words_do_not_depend_on_the_form_of_unicode(text, language):
    assert word_tokens(unicodedata.normalize("NFD", text),
                       language) == word_tokens(unicodedata.normalize("NFC", text), language)
    assert all(term.strip() for term in word_tokens(text, language))


@pytest.mark.parametrize("written", ["vi", "VI", "vi-VN", "vi_VN", "vie", "vie_Latn", " vi "])
def test_a_language_has_one_code(written): assert language_code(written) == "vi"


def test_broken_scores_are_named():
    with pytest.raises(ValueError, match="query 1 contain NaN"): evaluate_scores([[.1, .2], [.1, math.nan]], [{0}, {1}])
    with pytest.raises(ValueError, match="not all finite"): fit_weights({"dense": [[.1, math.inf]]}, [{0}])


def test_comparison_and_correction_by_hand():
    a, b = (evaluate_scores(s, [{0}] * 4, ("R@1",)) for s in ([[1, 0]] * 4, [[1, 0], [1, 0], [0, 1], [0, 1]]))
    found = paired(a, b, "R@1")
    assert (found.difference, found.wins, found.losses, found.n) == (.5, 2, 0, 4)
    assert found.p_value == pytest.approx(.5)                            # of 16 sign flips, 8 are as far from 0
    assert holm([.01, .04, .03]) == pytest.approx([.03, .06, .06])


JAX = """
import sys
from bgem3_nb.evaluation import bm25_scores
assert bm25_scores(["a b", "c"], ["a"], language="en").argmax() == 0
assert "bm25s" in sys.modules and "jax" not in sys.modules
print("scored")
import jax
"""


def test_bm25_does_not_start_jax(env, tmp_path):
    "Where JAX is installed, an import of bm25s starts it, and JAX takes three quarters of the memory of a GPU."
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('jax was started')")
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", JAX], env=env, capture_output=True, text=True)
    assert done.stdout == "scored\n" and done.stderr == "jax was started\n", done.stderr      # by the last line alone
