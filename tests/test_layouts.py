"""One saved directory opens right in every installed library: new heads, training, a projection, merged adapters,
fewer layers. A trimmed vocabulary is in `test_smaller.py`, since it needs a tokenizer that can be trimmed."""
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from tiny_words import expanding, projected, TEXTS, tiny, tiny_tokenizer

from bgem3_nb.adapters import add_lora, merge_lora
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.layers import take_layers
from bgem3_nb.layouts import flag_arguments
from bgem3_nb.model import M3Model

warnings.filterwarnings("ignore")
sentence_transformers = pytest.importorskip("sentence_transformers")
flag_embedding = pytest.importorskip("FlagEmbedding")


@pytest.fixture(scope="module")
def tokenizer(): return tiny_tokenizer()


def trained(tokenizer):
    "Three steps of all three outputs, whatever they learn."
    model = tiny(tokenizer, "cls").train()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    optimizer = torch.optim.SGD(model.parameters(), lr=.01)
    for _ in range(3):
        out = model(**inputs)
        (out.dense.sum() - out.lexical.sum() + out.multi.mean()).backward()
        optimizer.step()
    return model.eval()


def merged(tokenizer):
    model = tiny(tokenizer)
    pytest.importorskip("peft")
    add_lora(model, 2)
    for name, p in model.encoder.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p)
    merge_lora(model.encoder)
    return model


MODELS = {
    "mean": tiny, "last": lambda t: tiny(t, "last"), "cls, narrow multi-vectors": lambda t: tiny(t, "cls", multi_dim=8),
    "projection": lambda t: projected(t, False), "projection with bias and norm": lambda t: projected(t, True),
    "trained": trained, "adapters merged": merged, "expansion": expanding,
    "fewer layers": lambda t: take_layers(tiny(t), 1),
}


def largest(sparse): return np.asarray(abs(sparse).max())


@pytest.mark.parametrize("name", MODELS)
def test_every_library_opens_what_is_saved(name, tmp_path, tokenizer):
    model, path = MODELS[name](tokenizer), str(tmp_path / "model")
    for _ in range(2): model.save_pretrained(path)                 # the second replaces the first
    ours = M3Encoder.from_pretrained(path, dtype=torch.float32, device="cpu", progress=False)
    q, p = ours.encode_queries(TEXTS), ours.encode_passages(TEXTS)
    assert ours.max_length == 12 and largest(q.lexical) > 0

    dense = sentence_transformers.SentenceTransformer(path, device="cpu", local_files_only=True)
    assert dense.max_seq_length == 12 and dense.similarity_fn_name == "cosine"
    np.testing.assert_allclose(dense.encode_query(TEXTS), q.dense, atol=1e-6)
    np.testing.assert_allclose(dense.encode_document(TEXTS), p.dense, atol=1e-6)
    np.testing.assert_allclose(dense.encode(TEXTS), ours.encode(TEXTS).dense, atol=1e-6)

    sparse = sentence_transformers.SparseEncoder(path + "/sparse", device="cpu", trust_remote_code=True)
    for theirs, mine in ((sparse.encode_query(TEXTS), q), (sparse.encode_document(TEXTS), p)):
        np.testing.assert_allclose(theirs.to_dense().numpy(), mine.lexical.toarray(), atol=1e-6)

    if hasattr(sentence_transformers, "MultiVectorEncoder"):       # from 6.0; those before trust a directory's code
        with pytest.raises(ValueError, match="trust_remote_code"):
            sentence_transformers.SparseEncoder(path + "/sparse", device="cpu")
        multi = sentence_transformers.MultiVectorEncoder(path + "/multi_vector", device="cpu")
        for theirs, mine in ((multi.encode_query(TEXTS), q), (multi.encode_document(TEXTS), p)):
            for i, vectors in enumerate(theirs):
                np.testing.assert_allclose(vectors.numpy(), mine.vectors(i), atol=2e-6)
        assert multi.similarity_fn_name == "meanmaxsim"

    known = name != "expansion"     # without BGE-M3's lexical head, FlagEmbedding starts both heads at random
    flag = flag_embedding.BGEM3FlagModel(path, devices="cpu", use_fp16=False, return_sparse=known,
                                         return_colbert_vecs=known, **flag_arguments(model, 12))
    for theirs, mine in ((flag.encode_queries(TEXTS), q), (flag.encode_corpus(TEXTS), p)):
        theirs, mine = {k: v for k, v in theirs.items() if v is not None}, mine.to_dict()
        if model.dense_head is None: np.testing.assert_allclose(theirs["dense_vecs"], mine["dense_vecs"], atol=1e-6)
        for a, b in zip(theirs.get("colbert_vecs", ()), mine["colbert_vecs"]):
            np.testing.assert_allclose(a, b, atol=2e-6)
        for a, b in zip(theirs.get("lexical_weights", ()), mine["lexical_weights"]):
            assert {k: pytest.approx(v, abs=1e-6) for k, v in b.items()} == {k: float(v) for k, v in a.items()}


def test_pylate_opens_it(tmp_path, tokenizer):
    "Also in an environment with PyLate, which wants an older sentence-transformers."
    pylate = pytest.importorskip("pylate.models")
    tiny(tokenizer, "cls", multi_dim=8).save_pretrained(tmp_path)
    ours = M3Encoder.from_pretrained(tmp_path, dtype=torch.float32, device="cpu", progress=False)
    theirs = pylate.ColBERT(str(tmp_path / "pylate"), device="cpu")
    queries = theirs.encode(TEXTS, is_query=True, prompt_name="query")
    passages = theirs.encode(TEXTS, is_query=False, prompt_name="document")
    q, p = ours.encode_queries(TEXTS), ours.encode_passages(TEXTS)
    for i in range(len(TEXTS)):
        np.testing.assert_allclose(queries[i][1:], q.vectors(i), atol=2e-6)
        np.testing.assert_allclose(passages[i], p.vectors(i), atol=2e-6)


def test_the_guide_runs(tmp_path, tokenizer):
    "Each block of code in the guide, but PyLate's, runs as it stands and gives our numbers."
    model, path = tiny(tokenizer), str(tmp_path / "m")
    encoder = M3Encoder(model, dtype=torch.float32, device="cpu", progress=False)
    model.save_pretrained(path)
    guide = encoder.how_to_open(path)
    assert guide.replace(path, "my_model") in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall("```python\n(.*?)```", guide, re.S):
        if "pylate" not in block: exec(block, names)
    wanted = encoder.encode_queries(["…"])
    np.testing.assert_allclose(names["dense"], wanted.dense, atol=1e-6)
    np.testing.assert_allclose(names["multi"][0].numpy(), wanted.multi, atol=2e-6)
    np.testing.assert_allclose(names["lexical"].to_dense().numpy(), wanted.lexical.toarray(), atol=1e-6)
    assert "projection" in M3Encoder(projected(tokenizer, False), progress=False).how_to_open()
    assert "dense vectors only" in M3Encoder(expanding(tokenizer), progress=False).how_to_open()


def test_a_card_of_somebody_else_stays_and_no_file_is_in_the_way(tmp_path, tokenizer):
    model = tiny(tokenizer)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "FlagEmbedding" in card.read_text(encoding="utf-8")
    card.write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "mine"
    copy = tmp_path / "copy"                                       # links are files of their own in a copy
    shutil.copytree(tmp_path / "sparse", copy / "sparse")
    shutil.copy(tmp_path / "model.safetensors", copy)
    sentence_transformers.SparseEncoder(str(copy / "sparse"), device="cpu", trust_remote_code=True)


def test_a_directory_from_before_loads(tmp_path, tokenizer):
    "Without the files of other libraries, as an earlier state of this package saved it."
    model = tiny(tokenizer, "cls", multi_dim=8)
    model.save_pretrained(tmp_path)
    for f in tmp_path.iterdir():
        if f.is_dir(): shutil.rmtree(f)
    for f in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "README.md"):
        (tmp_path / f).unlink()
    again = M3Model.from_pretrained(tmp_path)
    assert again.config == model.config
    assert json.loads((tmp_path / "bgem3_nb.json").read_text())["pooling"] == "cls"
    for a, b in zip(again.state_dict().values(), model.state_dict().values()): assert torch.equal(a, b)
