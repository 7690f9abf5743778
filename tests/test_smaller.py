"""A trimmed model gives the whole one's numbers on covered text, here and in the libraries that open it."""
import numpy as np
import pytest
import torch
from conftest import REPO  # noqa: F401
from tiny_run import tiny_model

from bgem3_nb.adapters import restrict_to_texts
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.model import ExpansionHead, ProjectionHead
from bgem3_nb.projection import M3WithHead
from bgem3_nb.smaller import coverage, trim_vocabulary
from bgem3_nb.text import set_steps

TEXTS = ["Nhân viên được nghỉ mười hai ngày phép mỗi năm.", "nghi\u0309 phép", "", "  hai   dấu cách ",
         "</s> <mask> trong câu", "يا أيها الذين آمنوا", "photosynthesis 2024, 3.14 %"]


@pytest.fixture(scope="module")
def model(): return tiny_model()


def encode(model, texts=TEXTS):
    return M3Encoder(model, max_length=40, dtype=torch.float32, device="cpu", progress=False).encode(texts)


def check_same(a, b, big, small):
    for mode in ("dense", "multi"): np.testing.assert_allclose(getattr(a, mode), getattr(b, mode), atol=1e-6)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    for i in range(len(a)):
        rows = [{e.tokenizer.convert_ids_to_tokens(t): w for t, w in zip(x.lexical[[i]].indices.tolist(),
                                                                         x.lexical[[i]].data.tolist())}
                for e, x in ((big, a), (small, b))]
        assert rows[0] == pytest.approx(rows[1], abs=1e-6)


def test_equal_on_covered_text_in_every_kind_of_model(model):
    narrow = M3WithHead(model, ProjectionHead(16, 8))
    for whole in (model, narrow):
        small = trim_vocabulary(whole, TEXTS, ["vi"])
        assert small.encoder.config.vocab_size < 15_000 and whole.encoder.config.vocab_size == 250_037
        check_same(encode(whole), encode(small), whole, small)
        assert coverage(whole, small, TEXTS) | {"tokens": 0} == {
            "texts": 7, "covered": 7, "tokens": 0, "unknown": 0, "texts_with_unknown": 0}


def test_an_expanding_head_keeps_its_terms(model):
    whole = tiny_model()
    whole.config.lexical, whole.config.lexical_terms = "expansion", 6
    whole.lexical_head = ExpansionHead(16, torch.arange(4, 250_000))
    restrict_to_texts(whole, TEXTS, 40)
    torch.nn.init.normal_(whole.lexical_head.bias)
    small = trim_vocabulary(whole, TEXTS)
    assert len(small.lexical_head.vocabulary) == len(whole.lexical_head.vocabulary)
    check_same(encode(whole), encode(small), whole, small)


def test_unknown_text_is_encoded_and_counted(model):
    small = trim_vocabulary(model, TEXTS, ["en"])
    found = coverage(model, small, ["Кошка спит", "the cat", TEXTS[0]])
    assert found["covered"] == 2 and found["texts_with_unknown"] == 1 and found["unknown"] >= 1
    out = encode(small, ["Кошка спит"])
    assert np.isfinite(out.dense).all() and small.tokenizer.unk_token_id not in out.lexical.indices
    with pytest.raises(ValueError, match="'xx' is not known"): trim_vocabulary(model, TEXTS, ["xx"])


def test_saved_it_opens_everywhere(model, tmp_path):
    "With steps of normalisation, which stay in the tokenizer."
    whole = tiny_model()
    whole.config.normalize = ["arabic_marks", "digits"]
    set_steps(whole.tokenizer, whole.config.normalize)
    texts = [*TEXTS, "عَام ٢٠٢٤"]
    small = trim_vocabulary(whole, texts)
    small.save_pretrained(tmp_path / "small")
    again = M3Encoder.from_pretrained(tmp_path / "small", max_length=40, dtype=torch.float32, device="cpu",
                                      progress=False)
    a = encode(whole, texts)
    check_same(a, again.encode(texts), whole, again.model)
    assert again.model.config.normalize == whole.config.normalize
    plain = [t for t in texts if "</s>" not in t and "nghi\u0309" not in t and t]   # which others read in another way
    wanted = encode(whole, plain)
    from sentence_transformers import SentenceTransformer
    there = SentenceTransformer(str(tmp_path / "small"), device="cpu").encode(plain)
    np.testing.assert_allclose(there, wanted.dense, atol=1e-5)
    flag = pytest.importorskip("FlagEmbedding").BGEM3FlagModel(
        str(tmp_path / "small"), use_fp16=False, devices=["cpu"], pooling_method="mean")
    found = flag.encode(plain, return_dense=True, return_sparse=True, return_colbert_vecs=True, max_length=40)
    np.testing.assert_allclose(found["dense_vecs"], wanted.dense, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([v[:] for v in found["colbert_vecs"]]), wanted.multi, atol=1e-5)
    np.testing.assert_allclose(sorted(w for d in found["lexical_weights"] for w in d.values()),
                               sorted(wanted.lexical.data), atol=1e-5)
