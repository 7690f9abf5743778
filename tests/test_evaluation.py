"""Metrics, words and intervals where the notebook 40_evaluation has no room: names, permutations, spellings, broken
input."""
import math
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgem3_nb.evaluation import (
    Evaluation, QueryTable, bm25_scores, compare_queries, evaluate_modes, evaluate_scores, evaluate_top, fit_weights,
    holm, metrics_table, paired, query_results, should_fine_tune, verdict, word_tokens, write_query_results,
    wrong_queries)
from bgem3_nb.rows import language_code
from bgem3_nb.splits import RetrievalSet


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


def search_set(rng, n_q, n_p, graded):
    "Random queries; every relevant passage has a grade of 1 to 3, or all have 1."
    grades = [{int(p): int(rng.integers(1, 4)) for p in rng.choice(n_p, rng.integers(1, n_p), replace=False)}
              for _ in range(n_q)]
    return RetrievalSet([f"query {i}" for i in range(n_q)], [f"id {i}" for i in range(n_q)],
                        [f"passage {i}" for i in range(n_p)], [f"p {i}" for i in range(n_p)], list(map(set, grades)),
                        domains=[f"domain {i % 2}" for i in range(n_q)], grades=grades if graded else [])


@settings(max_examples=25, deadline=None)
@given(MATRICES, st.booleans())
def test_the_kept_queries_have_the_metrics_of_the_table(tmp_path_factory, rng, graded):
    data = search_set(rng, int(rng.integers(1, 6)), int(rng.integers(2, 30)), graded)
    scores = {m: rng.integers(0, 4, (len(data), len(data.passages))).astype(np.float32) for m in ("dense", "lexical")}
    evals, file = evaluate_modes(scores, data.judgements), tmp_path_factory.mktemp("kept") / "per_query.parquet"
    write_query_results(query_results(evals, data, "after"), file)
    kept = pd.read_parquet(file)
    assert kept["query_id"].tolist() == data.query_ids * 2
    assert kept["domain"].tolist() == data.domains * 2
    for mode, rows in kept.groupby("mode"):
        for metric in evals[mode].per_query: assert rows[metric].to_numpy().mean() == evals[mode].mean(metric)
        assert (rows["nDCG@10"].mean() == pytest.approx(metrics_table(evals).loc[mode, "nDCG@10"], abs=5e-4))
        assert [1 / r if r <= 10 else 0 for r in rows["rank"]] == pytest.approx(rows["RR@10"].tolist())
        for (_, row), s, rel in zip(rows.iterrows(), scores[mode], data.qrels):
            assert set(row["relevant_ids"]) == {f"p {p}" for p in rel}
            if pd.isna(row["first_id"]):
                assert (s == s[0]).all()
                continue
            first = int(row["first_id"].split()[1])
            assert s[first] == s.max() == row["first_score"]
            assert row["first_text"] == data.passages[first]
            if len(rel) < len(s): assert (first in rel) == (row["rank"] == 1)


def test_the_right_passage_has_the_highest_grade():
    data = RetrievalSet(["q"], ["1"], ["so so", "best", "no"], ["a", "b", "c"], [{0, 1}], grades=[{0: 1, 1: 3}])
    row = query_results({"dense": evaluate_scores([[.1, .2, .9]], data.judgements)}, data).iloc[0]
    assert (row["relevant_ids"], row["relevant_text"], row["first_text"], row["rank"]) == (["b", "a"], "best", "no", 2)
    assert "domain" not in row


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.booleans())
def test_a_list_as_deep_as_the_metrics_gives_what_the_matrix_gives(rng, graded):
    data = search_set(rng, 4, int(rng.integers(8, 30)), graded)
    n_p = len(data.passages)
    scores = rng.permuted(np.tile(np.arange(n_p, dtype=np.float32), (4, 1)), axis=1)     # no ties
    k = int(rng.integers(5, n_p + 1))
    best = np.argsort(-scores, axis=1)[:, :k]
    names = ("nDCG@5", "RR@5", "R@1")
    top = evaluate_top(np.take_along_axis(scores, best, 1), best, data.judgements, names)
    full = evaluate_scores(scores, data.judgements, names)
    for name in names: assert (top.values(name) == full.values(name)).all()
    assert (top.rank == np.where(full.rank > k, 0, full.rank)).all()
    assert (top.first == full.first).all() and (top.first_score == full.first_score).all()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "per_query.parquet"
    write_query_results(pd.DataFrame({"query": ["a"]}), file)
    with pytest.raises(Exception): write_query_results(pd.DataFrame({"query": ["a", object()]}), file)
    assert pd.read_parquet(file)["query"].tolist() == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["per_query.parquet"]


class Cells(HTMLParser):
    "The cells of a table, and the tags that are open at its end."
    def __init__(self):
        super().__init__()
        self.open, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "col": self.open.append(tag)
        if tag in ("td", "th"): self.cells.append({**dict(attrs), "text": ""})

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"): self.cells[-1]["text"] += data


def test_the_page_of_wrong_questions_shows_every_script_as_it_is():
    queries = ["<b>&amp;</b> ما حكم الصيام؟", "q\nwith  a line"]
    data = RetrievalSet(queries, ["1", "2"], ["كتاب الصيام", "x" * 5000], ["a", "b"], [{1}, {0}])
    wrong = wrong_queries(query_results({"dense": evaluate_scores([[1, 0], [0, 1]], data.qrels)}, data))
    parser = Cells()
    parser.feed(QueryTable(wrong, "wrong")._repr_html_())
    assert parser.open == []
    assert all(cell["dir"] == "auto" and "white-space:normal" in cell["style"] for cell in parser.cells)
    texts = [cell["text"] for cell in parser.cells]
    assert texts[:4] == ["rank", "query", "right passage", "came first"]
    assert {queries[0], "q with a line", "كتاب الصيام", "x" * 299 + "…"} <= set(texts)


def test_queries_are_compared_whatever_their_order():
    rng = np.random.default_rng(0)
    data = search_set(rng, 6, 9, False)
    before, after = (query_results({"dense": evaluate_scores(rng.random((6, 9)), data.qrels)}, data) for _ in "ab")
    a = compare_queries(before, after).set_index("query_id")
    b = compare_queries(before.sample(frac=1, random_state=1), after.sample(frac=1, random_state=2))
    columns = ["change", "rank", "rank_before", "first_text_before"]
    pd.testing.assert_frame_equal(a[columns], b.set_index("query_id").loc[a.index, columns])
    right = {"before": before.set_index("query_id")["rank"].eq(1), "after": after.set_index("query_id")["rank"].eq(1)}
    for id, change in a["change"].items():
        assert change == {(1, 0): "broken", (0, 0): "still wrong", (0, 1): "fixed", (1, 1): "still right"}[
            int(right["before"][id]), int(right["after"][id])]


def test_a_verdict_by_its_thresholds():
    def of(*values): return Evaluation({"nDCG@10": np.array(values * 20, float)})
    same, better = of(.2, .4, .6, .8), of(.3, .5, .7, .9)
    assert [verdict(*pair).outcome for pair in ((same, better), (same, same), (better, same))] == [
        "gain", "no gain", "loss"]
    for pair in ((same, same), (better, same)): assert "do not deploy this" in verdict(*pair).sentence
    assert "do not deploy" not in verdict(same, better).sentence
    why = verdict(same, same, train_queries=199, n_passages=99, bm25=of(.91)).reasons
    assert len(why) == 3 and "199 training queries" in why[0]
    assert not any("training queries" in r for r in verdict(same, same, train_queries=200).reasons)
    high = of(.89, .9, .92, .95)
    assert "already good" in verdict(high, high).reasons[0]
    assert should_fine_tune({"dense": high}, {"dense": of(.99, .99, .99, .99)}, "dense")[0].startswith("Hardly")
    one = Evaluation({"nDCG@10": np.array([0.])}), Evaluation({"nDCG@10": np.array([1.])})
    assert verdict(*one).outcome == "no gain"                           # one query proves nothing
