"""The steps by which a model normalises texts: carried by its tokenizer's file, the same in every program, and with
spans that point into the text as it was written."""
import json
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from bgem3_nb.backbone import E5_NORMALIZE, embedded_path
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.evaluation import bm25_scores, word_tokens
from bgem3_nb.granularity import text_tokens
from bgem3_nb.model import M3Config, M3Model
from bgem3_nb.scoring import check_model, explain, read_tokens
from bgem3_nb.text import STEPS, carries_steps, normalize_text, set_steps

VERSE = "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ"
# a text, and one that the steps must make equal to it
PAIRS = [(VERSE, "بسم الله الرحمن الرحيم"), ("كتـــابٌ ٢٥٥", "كتاب 255"), ("مدرسة أحمد", "مدرسه احمد"),
         (unicodedata.normalize("NFD", "Người lao động được nghỉ"), "Người lao động được nghỉ"),
         (unicodedata.normalize("NFD", "Điều ٥ của قَانُون"), "Điều 5 của قانون"),
         ("co\u00adng\u200b ty\ufeff", "cong ty"), ("hoà thuận, KHOẺ", "hòa thuận, KHỎE")]


@pytest.fixture(scope="module")
def model(): return M3Model.from_pretrained("embedded", new_heads="identity", normalize=list(STEPS))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    model.save_pretrained(path := tmp_path_factory.mktemp("steps"))
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint): return M3Encoder.from_pretrained(checkpoint, dtype=torch.float32, progress=False)


def test_the_saved_model_gives_one_vector_in_every_program(encoder, checkpoint):
    from FlagEmbedding import BGEM3FlagModel
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    texts = [t for pair in PAIRS for t in pair]
    ours = encoder.encode(texts)
    flag = BGEM3FlagModel(str(checkpoint), use_fp16=False, devices="cpu", pooling_method="mean")
    theirs = flag.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    assert abs(ours.dense - theirs["dense_vecs"]).max() < 1e-4
    for i, vectors in enumerate(theirs["colbert_vecs"]): np.testing.assert_allclose(ours.vectors(i), vectors, atol=1e-4)
    parts = [Transformer(str(checkpoint)), Pooling(ours.dense.shape[1], "mean"), Normalize()]
    assert abs(SentenceTransformer(modules=parts, device="cpu").encode(texts) - ours.dense).max() < 1e-4
    for i in range(0, len(texts), 2): np.testing.assert_allclose(ours.dense[i], ours.dense[i + 1], atol=1e-6)


@pytest.mark.parametrize(("written", "plain"), PAIRS)
def test_texts_that_differ_by_a_step_are_the_same_tokens(encoder, written, plain):
    assert encoder.tokenize([written]) == encoder.tokenize([plain])
    assert normalize_text(written, list(STEPS)) == normalize_text(plain, list(STEPS))
    assert word_tokens(written, "en", list(STEPS)) == word_tokens(plain, "en", list(STEPS)) != []


@pytest.mark.parametrize(("written", "plain"), PAIRS)
def test_spans_point_into_the_text_as_it_was_written(encoder, written, plain):
    tokens = [t for t in read_tokens(encoder, written) if t.part == "text"]
    words = list(dict.fromkeys(t.word for t in tokens))
    assert [w.strip("\u200b\ufeff") for w in words] == [w.strip("\u200b\ufeff") for w in written.split()]
    assert all(written[t.start:t.end] == t.text.removeprefix("##") for t in tokens)
    _, spans, own = text_tokens(encoder, written, "query: ")
    assert len(spans[own]) == len(tokens)
    assert all(written[a:b].strip() for a, b in spans[own])
    e = explain(encoder, written, plain)
    assert {t.text for t in e.tokens[0] if t.part == "text"} >= {t.text for t in e.terms if t.text in written}


def test_a_checkpoint_without_steps_is_read_as_before(tmp_path):
    plain = M3Model.from_pretrained("embedded", new_heads="identity", normalize=[])
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path/"bgem3_nb.json").read_text(encoding="utf-8"))
    (tmp_path/"bgem3_nb.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "normalize"}))
    own, texts = AutoTokenizer.from_pretrained(embedded_path()), [t for t, _ in PAIRS]
    loaded = M3Encoder.from_pretrained(tmp_path, progress=False)
    assert loaded.model.config.normalize == [] and not carries_steps(loaded.tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == own(texts)["input_ids"]
    states = [t.backend_tokenizer.normalizer.__getstate__() for t in (loaded.tokenizer, own)]
    assert states[0] == states[1]
    assert loaded.tokenize(PAIRS[0]) != [loaded.tokenize(PAIRS[0])[0]] * 2


def test_steps_are_chosen_when_a_model_is_loaded(checkpoint, tmp_path):
    assert M3Config.load(checkpoint).normalize == list(STEPS)
    assert M3Model.from_pretrained("embedded", new_heads="identity").config.normalize == E5_NORMALIZE
    without = M3Model.from_pretrained(checkpoint, normalize=[])
    assert not carries_steps(without.tokenizer)
    other = M3Encoder.from_pretrained(checkpoint, normalize=["digits", "nfc"], progress=False)
    assert other.model.config.normalize == ["nfc", "digits"]
    assert other.tokenize(["٢ كِتاب"]) == other.tokenize(["2 كِتاب"]) != other.tokenize(["2 كتاب"])
    with pytest.raises(ValueError, match="'tones'"): M3Model.from_pretrained(checkpoint, normalize=["tones"])
    with pytest.raises(ValueError, match="fast version"): set_steps(ByT5Tokenizer(), ["nfc"])
    a, b = (e.encode(["٢"]) for e in (other, M3Encoder(without, progress=False)))
    with pytest.raises(ValueError, match="normalize"): check_model(a, b)


def test_a_tokenizer_that_lost_its_steps_gets_them_again(checkpoint, encoder, tmp_path):
    shutil.copytree(checkpoint, tmp_path/"m")
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(embedded_path()/name, tmp_path/"m"/name)
    again = M3Encoder.from_pretrained(tmp_path/"m", progress=False)
    assert again.tokenize([VERSE]) == encoder.tokenize([VERSE])


def test_bm25_uses_the_steps_of_the_model():
    passages = ["بسم الله الرحمن الرحيم", "الحمد لله رب العالمين"]
    assert bm25_scores(passages, [VERSE], "en").max() == 0
    assert bm25_scores(passages, [VERSE], "en", normalize=["arabic_marks", "arabic_letters"])[0].argmax() == 0
