"""Rules: measures against plain definitions, invariances of the comparison, counts that add up, files of a person."""
import csv
import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from bgem3_nb.denoising import (
    Rule, apply_labels, calibrate, containment, denoise, existing_pairs, filtered_rows, jaccard, minhash, mode_ratio,
    precision_recall_curve, read_review, relative_score, same_text, score_ratio, words_of, write_review)
from bgem3_nb.encoding import Embeddings
from bgem3_nb.mining import SampledPairs, corpus_set
from bgem3_nb.rows import RowError, make_rows
from bgem3_nb.splits import RetrievalSet

WORDS = "người lao động được nghỉ hằng năm hòa bình قال رسول الله".split()
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def pairs_of(n):
    return pd.DataFrame({"query": 0, "passage": np.arange(1, n), "rank": 1, "score": .5, "pos_score": .8, "part": "0-9",
                         "turn": 0, "reason": ""})


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6))
def test_overlap_is_what_it_says(texts):
    sets, known, pairs = [set(words_of(t)) for t in texts], [{0, len(texts) - 1}], pairs_of(len(texts))
    positives = [sets[p] for p in known[0]]
    contained = lambda a, b: 0 if min(len(a), len(b)) < 3 else len(a & b) / min(len(a), len(b))
    j = [max(len(s & p) / max(1, len(s | p)) for p in positives) for s in sets[1:]]
    c = [max(contained(s, p) for p in positives) for s in sets[1:]]
    same = [float(any(words_of(t) == words_of(texts[p]) for p in known[0])) for t in texts[1:]]
    np.testing.assert_allclose(jaccard(texts, known)(pairs), j, atol=1e-6)
    np.testing.assert_allclose(containment(texts, known, 3)(pairs), c, atol=1e-6)
    np.testing.assert_array_equal(same_text(texts, known)(pairs), same)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.sampled_from(["NFC", "NFD"]), st.sampled_from(["", ".", " !"]))
def test_spelling_does_not_count(text, form, end):
    assert words_of(unicodedata.normalize(form, text.upper()) + end) == words_of(text)


@pytest.mark.parametrize("a, b", [("hoà thuỷ", "hòa thủy"), ("قُلْ هُوَ ٱللَّهُ أَحَدٌ", "قل هو الله احد"),
                                  ("الصـــلاة", "الصلاه"), ("Điều 5.", "điều 5")])
def test_two_spellings(a, b): assert words_of(a) == words_of(b)


@pytest.mark.parametrize("a, b", [("má", "mà"), ("đường", "dường"), ("lợi", "lời")])
def test_two_words(a, b): assert words_of(a) != words_of(b)


def test_minhash_estimates_the_similarity_of_sequences():
    rng, base = np.random.default_rng(0), [f"w{i}" for i in range(200)]
    texts = [" ".join(base)]
    for part in (0, .02, .05, .1, .3):
        kept = rng.random(200) >= part
        texts.append(" ".join(w if keep else f"x{i}" for i, (w, keep) in enumerate(zip(base, kept))))
    sets = [{tuple(t.split()[i:i + 3]) for i in range(198)} for t in texts]
    true = [len(s & sets[0]) / len(s | sets[0]) for s in sets[1:]]
    np.testing.assert_allclose(minhash(texts, [{0}], slots=512)(pairs_of(6)), true, atol=.08)


def test_ratio_keeps_the_order_where_scores_are_negative():
    s, pos = np.linspace(-3, 3, 50), np.full(50, -1.)
    assert (np.diff(relative_score(s, pos)) > 0).all() and relative_score(np.array([-1.]), np.array([-1.]))[0] == 1
    np.testing.assert_allclose(relative_score(s, np.full(50, 2.)), s / 2)


def test_multi_vector_judge_is_the_ratio_of_maxsims():
    from bgem3_nb.scoring import maxsim_scores
    rng = np.random.default_rng(0)
    unit = lambda n: (x := rng.standard_normal((n, 8), np.float32)) / np.linalg.norm(x, axis=1, keepdims=True)
    q = Embeddings(multi=unit(6), offsets=np.array([0, 3, 6]))
    p = Embeddings(multi=unit(20), offsets=np.arange(0, 21, 4))
    s, known = maxsim_scores(q, p), [{0, 1}, {4}]
    pairs = pd.DataFrame({"query": [0, 0, 1], "passage": [2, 3, 0]})
    wanted = [s[0, 2] / min(s[0, :2]), s[0, 3] / min(s[0, :2]), s[1, 0] / s[1, 4]]
    np.testing.assert_allclose(mode_ratio(q, p, known)(pairs), wanted, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40)
       .filter(lambda x: len({b for _, b in x}) == 2), st.floats(0, .5))
def test_curve_counts_what_a_rule_would_do(sample, lost):
    values, labels = (np.array(x) for x in zip(*sample))
    c = precision_recall_curve(values, labels)
    for line in c.itertuples():
        dropped = values >= line.limit
        wanted = [labels[dropped].mean(), dropped[labels].mean(), dropped[~labels].mean()]
        np.testing.assert_allclose([line.precision, line.recall, line.lost], wanted)
    limit = calibrate(values, labels, lost=lost)
    assert (values >= limit)[~labels].mean() <= lost


def test_counts_add_up_and_each_pair_has_one_reason():
    pairs, numbers = pairs_of(200).assign(score=np.linspace(0, 1, 199)), range(200)
    data = RetrievalSet(["q"], ["q"], [f"t {i}" for i in numbers], [str(i) for i in numbers], [{0}])
    d = SampledPairs(pairs, {"0-9": 3}, [{0}], "dense", {"top_up": "none"})
    rules = [Rule("high", lambda p: p.score.to_numpy(), .9), Rule("ratio", score_ratio, .95),
             Rule("odd", lambda p: p.passage.to_numpy() % 2, 1)]
    report = denoise(d, rules, data)
    t = report.table.set_index("rule")
    each = t.dropped["high"] + t.dropped["ratio"] + t.dropped["odd"]
    assert each == t.dropped["all"] == (pairs.reason != "").sum()
    assert t.tested["ratio"] == t.tested["high"] - t.dropped["high"]
    assert (pairs.reason[pairs.score >= .9] == "high").all()
    assert (pairs.reason[(pairs.score < .9) & (pairs.score >= .76)] == "ratio").all()
    assert len(report.examples("ratio", 2)) == 4


def test_filter_mode_computes_scores_and_keeps_the_rest():
    rows = make_rows([{"query": "a b", "pos": "một hai ba bốn", "neg": ["MỘT hai ba bốn.", "năm sáu", "bảy"],
                       "neg_scores": [1, 1, 1], "neg_weights": [.1, .2, .3], "neg_types": [["x"], ["y"], []]},
                      {"query": "A b", "pos": "bảy", "neg": ["năm sáu"]}, {"query": "c", "pos": "d"}])
    data = corpus_set(rows)
    both = data.qrels[0] | data.qrels[1]
    known = [both, both, data.qrels[2]]
    score = lambda i, j: (j / 10).astype(np.float32)
    d = existing_pairs(rows, data, known, score)
    denoise(d, [Rule("same text", same_text(data.passages, known), 1)], data)
    assert d.pairs.reason.tolist() == ["same text", "", "known positive", ""]
    out = filtered_rows(rows, d, data, score)
    assert [r["neg"] for r in out] == [["năm sáu"], ["năm sáu"], []]
    assert (out[0]["neg_weights"], out[0]["neg_types"]) == ([.2], [["y"]])
    assert out[0]["neg_scores"] == pytest.approx([data.passages.index("năm sáu") / 10])
    assert out[2]["pos_scores"] == pytest.approx([data.passages.index("d") / 10])


def test_a_labelled_hard_negative_is_dropped_only_where_asked():
    """Labels of companies and listings stay; what was mined, drawn or skipped, and a positive under another case, do
    not."""
    types = [["hard"], ["price"], ["random"], ["dense", "0-50", "rank 3"], ["skipped"], ["hard"]]
    texts = ["năm sáu", "bảy", "tám", "chín", "mười", "MỘT hai ba bốn"]
    rows = make_rows([{"query": "q", "pos": "một hai ba bốn", "neg": texts, "neg_types": types}])
    data = corpus_set(rows)
    def kept(**more):
        d = existing_pairs(rows, data, data.qrels, lambda i, j: np.ones(len(j), np.float32), **more)
        report = denoise(d, [Rule("ratio", score_ratio, .95)], data)
        assert report.table.tested[0] == len(texts) and d.pairs["ratio"].notna().all()
        return filtered_rows(rows, d, data, lambda i, j: np.ones(len(j)))["neg"][0]
    assert kept() == texts[:2]
    assert kept(spare_labelled=False) == []


def test_a_review_survives_a_spreadsheet(tmp_path):
    texts = ["mốc", 'có "dấu", phẩy\nvà xuống dòng', "=1+1; chấm phẩy", "قال رسول الله"]
    data = RetrievalSet(["hỏi, gì?"], ["q"], texts, list("abcd"), [{0}])
    d = SampledPairs(pairs_of(4).assign(score=[.7, .68, .66]), {"0-9": 3}, [{0}], "dense", {"top_up": "none"})
    assert write_review(tmp_path/"r.csv", d, data) == 3
    table = pd.read_csv(tmp_path/"r.csv", encoding="utf-8-sig", keep_default_na=False)
    table["label"] = ["positive", "", "Negative"]
    table.to_csv(tmp_path/"r.csv", index=False)
    d.pairs["reason"] = "ratio"
    wanted = {"labelled positive": 1, "labelled negative": 1, "labels without a pair": 0}
    assert apply_labels(d, data, read_review(tmp_path/"r.csv")) == wanted
    assert d.pairs.reason.tolist() == ["labelled positive", "ratio", ""]
    (tmp_path/"bad.csv").write_text("query,candidate,label\na,b,ja\n")
    with pytest.raises(RowError, match="bad.csv, line 2, field 'label'"): read_review(tmp_path/"bad.csv")


def test_no_text_is_a_formula_in_a_spreadsheet(tmp_path):
    "Cells that a spreadsheet would run get an apostrophe, also where the text had one; labels still meet their pairs."
    texts = ["=HYPERLINK(\"http://x\")", "@SUM(1)", "+1", "-1", "'=1", "'tis = fine", "1-1"]
    data = RetrievalSet(["=cmd|' /C calc'!A0"], ["q"], texts, list("abcdefg"), [{0}])
    d = SampledPairs(pairs_of(7).assign(score=.68), {"0-9": 6}, [{0}], "dense", {"top_up": "none"})
    n = write_review(tmp_path/"r.csv", d, data, from_ratio=0, to_ratio=9)
    with open(tmp_path/"r.csv", encoding="utf-8-sig", newline="") as f: table = list(csv.DictReader(f))
    assert all(row[name][:1] not in set("=+-@\t\r") for row in table for name in ("query", "positive", "candidate"))
    assert {row["candidate"] for row in table} >= {"'@SUM(1)", "'+1", "'-1", "''=1", "'tis = fine", "1-1"}
    with open(tmp_path/"r.csv", "w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, list(table[0]))
        out.writeheader()
        out.writerows(row | {"label": "negative"} for row in table)
    wanted = {"labelled positive": 0, "labelled negative": n, "labels without a pair": 0}
    assert apply_labels(d, data, read_review(tmp_path/"r.csv")) == wanted
