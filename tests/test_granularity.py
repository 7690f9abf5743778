"Spans of any text: sentences, passages and windows leave nothing out, and long texts are split in linear time."
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import processor_seconds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from bgem3_nb.backbone import TextTokenizer
from bgem3_nb.encoding import EncoderPool, M3Encoder
from bgem3_nb.model import M3Model
from bgem3_nb.scoring import read_tokens
from bgem3_nb.granularity import (LEVELS, mcls_embeddings, passage_spans, pool_spans, sentence_spans, span_embeddings,
                                  token_states, windows)

TEXT = st.one_of(st.text(max_size=80), st.text("aÁ1.)! \n\r؟۔。…\"»é\u200bﷺ", max_size=80),
                 st.text("aB. \n", max_size=200))


@pytest.fixture(scope="module")
def encoder():
    return M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False, device="cpu",
                                     dtype=torch.float32)


def check_cover(text, spans):
    "In order, not empty, without overlap; white space alone lies outside."
    ends = [0, *(b for _, b in spans)]
    starts = [*(a for a, _ in spans), len(text)]
    assert all(e <= s and not text[e:s].strip() for e, s in zip(ends, starts))
    assert all(text[a:b].strip() == text[a:b] != "" for a, b in spans)


@given(TEXT)
@settings(max_examples=500, deadline=None)
def test_every_character_is_in_one_sentence(text):
    check_cover(text, sentence_spans(text))


@given(TEXT, st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_passages_cover_the_text_and_keep_their_size(text, size):
    tokens = np.array([m.span() for m in re.finditer(r"\w+|[^\w\s]", text)]).reshape(-1, 2)
    spans = passage_spans(text, tokens, size)
    check_cover(text, spans)
    assert all(((tokens[:, 0] >= a) & (tokens[:, 0] < b)).sum() <= size for a, b in spans)
    cuts, joints = {a for a, _ in spans}, {a for a, _ in sentence_spans(text)}
    for a, b in sentence_spans(text):   # a sentence that fits is whole
        if ((tokens[:, 0] >= a) & (tokens[:, 0] < b)).sum() <= size:
            assert not cuts & (set(range(a + 1, b)) - joints)


@given(st.integers(0, 400), st.integers(1, 50), st.data())
def test_windows_cover_every_token(n, size, data):
    starts, owner = windows(n, size, data.draw(st.integers(1, size)))
    assert len(owner) == n and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] == max(0, n - size)
    place = np.arange(n) - starts[owner]
    assert ((0 <= place) & (place < size)).all() and set(owner) == set(range(len(starts)) if n else [])


@given(st.lists(TEXT, max_size=4), st.sampled_from(["", "passage: ", "ab"]))
@example(["\x1f0"], "")
@settings(max_examples=40, deadline=None)
def test_levels_agree_on_any_text(encoder, texts, prompt):
    states = token_states(encoder, texts, prompt)
    whole, plain = pool_spans(states, "document"), encoder.encode(states.texts, prompt)
    np.testing.assert_allclose(whole.embeddings.dense, plain.dense, atol=1e-5)
    np.testing.assert_allclose(whole.embeddings.multi, plain.multi, atol=1e-5)
    np.testing.assert_allclose(whole.embeddings.lexical.toarray(), plain.lexical.toarray(), atol=1e-5)
    for level in LEVELS:
        part = pool_spans(states, level, outputs=("multi",), max_tokens=8)
        own = sum(o.stop - o.start for o in states.own)
        assert len(part.embeddings.multi) == (own if level in ("sentence", "passage") else len(plain.multi))


def test_a_removed_character_moves_no_token(encoder):
    text = "\x1f\x1f0 rồi.\nHai"    # the tokenizer removes the two, and counts the 0 as their first
    states = token_states(encoder, ["\x1f0", text])
    assert states.spans[0][states.own[0]].tolist() == [[1, 2]]
    assert [text[a:b] for a, b in states.spans[1][states.own[1]]] == ["0", "rồi", ".", "Hai"]
    sentences = pool_spans(states, "sentence")
    assert sentences.spans.tolist() == [[1, 2], [2, 8], [9, 12]]


def test_a_token_of_a_decomposed_text_has_its_marks(encoder):
    text = unicodedata.normalize("NFD", "nghỉ phép, Điều bảy: xả lũ")
    states = token_states(encoder, [text], "query: ")
    assert "".join(text[a:b] for a, b in states.spans[0][states.own[0]]) == text.replace(" ", "")
    words = [t.word for t in read_tokens(encoder, text, "query: ") if t.part == "text"]
    assert words[0] == unicodedata.normalize("NFD", "nghỉ")


def test_a_long_text_loses_nothing(encoder):
    small = M3Encoder(encoder.model, max_length=32, device="cpu", dtype=torch.float32, progress=False)
    text = "Người lao động được nghỉ hằng năm. " * 40
    for stride in (5, None):
        states = token_states(small, [text, "ngắn"], "passage: ", stride)
        ids = encoder.tokenizer("passage: " + text, verbose=False)["input_ids"]
        assert len(states.states[0]) == len(states.spans[0]) == len(ids)
        assert len(pool_spans(states, "sentence")[:40]) == 40
        assert pool_spans(states, "document").embeddings.dense.shape == (2, 384)


def test_document_of_a_cls_model_is_its_cls(encoder):
    model = encoder.model
    kept, model.config = model.config, type(model.config)(pooling="cls")
    try:
        text = ["Người lao động được nghỉ. Tàu biển."]
        np.testing.assert_allclose(span_embeddings(encoder, text, "document").embeddings.dense,
                                   encoder.encode(text).dense, atol=1e-5)
        sentence, states = span_embeddings(encoder, text), encoder.hidden(encoder.tokenize(text))[0]
        mean = states[1:len(sentence.embeddings.vectors(0)) + 1].mean(0)
        np.testing.assert_allclose(sentence.embeddings.dense[0], (mean / mean.norm()).numpy(), atol=1e-5)
    finally:
        model.config = kept


def test_spans_select_like_embeddings(encoder):
    part = span_embeddings(encoder, ["Một. Hai.", "Ba."])
    back = part[::-1]
    assert back.text_index.tolist() == [1, 0, 0] and back.spans.tolist() == [[0, 3], [5, 9], [0, 4]]
    np.testing.assert_array_equal(back.embeddings.vectors(0), part.embeddings.vectors(2))
    assert len(part[part.text_index == 1]) == 1 and len(part[[]]) == 0


@pytest.mark.parametrize("lexical", ["terms", "expansion"])
def test_lexical_weights_of_spans(encoder, lexical):
    "Of a whole document as `encode` gives them; of a sentence, the largest of its tokens' weights."
    model = M3Model.from_pretrained("embedded", new_heads="random", lexical=lexical)
    mine, texts = M3Encoder(model, dtype=torch.float32, progress=False), ["Một. Hai một.", "", "Ba."]
    found = mine.encode(texts, granularity=["token", "sentence", "document"])
    whole = mine.encode(texts, outputs=("lexical",)).lexical
    assert abs(found["document"].embeddings.lexical - whole).max() < 1e-5 and whole.nnz
    token, sentence = found["token"], found["sentence"]
    weights = token.embeddings.lexical.toarray()
    for k, (i, (a, b)) in enumerate(zip(sentence.text_index, sentence.spans)):
        inside = (token.text_index == i) & (a <= token.spans[:, 0]) & (token.spans[:, 1] <= b)
        row = sentence.embeddings.lexical[[k]].toarray()[0]
        if lexical == "terms": np.testing.assert_allclose(row, weights[inside].max(0), atol=1e-5)
        else: assert (row <= weights[inside].max(0) + 1e-5).all() and row.any()
    assert sentence[1:].embeddings.lexical.shape == (2, whole.shape[1])


def test_a_pool_has_no_spans(encoder):
    with EncoderPool(encoder.model, ["cpu"], dtype=torch.float32, progress=False) as pool:
        with pytest.raises(ValueError, match="granularity needs an M3Encoder"): pool.encode(["a"], granularity="token")


def test_a_lone_surrogate_keeps_its_place(encoder):
    part = span_embeddings(encoder, ["a\ud800. Hai."])
    assert part.spans.tolist() == [[0, 3], [4, 8]]


def test_a_generator_of_texts(encoder):
    texts = ["Một. Hai.", "Ba."]
    for given in (iter(texts), pd.Series(texts, index=[5, 6])):
        assert span_embeddings(encoder, given).text_index.tolist() == [0, 0, 1]
    assert len(mcls_embeddings(encoder, iter(texts))) == 2


def test_a_text_of_special_tokens_is_all_there(encoder):
    text = "Thẻ <s> và </s>. <pad><mask> <unk>"
    states = token_states(encoder, [text])
    covered = {i for a, b in states.spans[0][states.own[0]] for i in range(a, b)}
    assert covered == {i for i, c in enumerate(text) if c != " "}
    np.testing.assert_allclose(pool_spans(states, "document").embeddings.dense, encoder.encode([text]).dense, atol=1e-5)


def test_a_tokenizer_without_characters_is_named(encoder):
    slow = SimpleNamespace(text_tokenizer=TextTokenizer(ByT5Tokenizer()), max_length=8, tokenize=lambda texts: [])
    with pytest.raises(ValueError, match="load its fast version"):
        token_states(slow, ["a"])


@pytest.mark.parametrize("unit", ["a. b ", "a.\n", "Mr. ", "1) ", "....", " \n", "word "])
def test_splitting_takes_linear_time(unit):
    few, many = (processor_seconds(lambda: sentence_spans(unit * n)) for n in (8_000, 32_000))
    assert many < 12 * few       # four times the text; quadratic time would be sixteen times as long
