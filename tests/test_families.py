"""Encoders of every family load, encode, train, save and open elsewhere; poolings, projections, scores and searches on
a device give what they give everywhere."""
import warnings

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartModel
from transformers.utils import logging

from bgem3_nb.adapters import add_lora, merge_lora
from bgem3_nb.encoders import FAMILIES, tiny_checkpoint
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.model import M3Model, max_positions, POOLINGS
from bgem3_nb.training import M3Trainer, M3TrainingArguments

logging.disable_progress_bar()
TEXTS = ["Người lao động được nghỉ hằng năm mười hai ngày.", "How many days of leave are there?", "nghỉ phép",
         "للعامل الحق في إجازة سنوية", "nghỉ nghỉ nghỉ"]
ROWS = [{"query": "How many days", "pos": [TEXTS[1]]}, {"query": "Người lao động", "pos": [TEXTS[0]]},
        {"query": "في إجازة", "pos": [TEXTS[3]]}, {"query": "nghỉ", "pos": [TEXTS[2]]}]
DECODERS = ("Qwen3", "GPT-2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A function that gives the directory of a family's checkpoint, made once."
    made = {}

    def path(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("family") / family.lower()
            tiny_checkpoint(family, made[family], TEXTS)
        return made[family]
    return path


def load(path, family, **settings):
    pooling = settings.pop("pooling", "last" if family in DECODERS else "mean")
    return M3Model.from_pretrained(path, new_heads="identity", pooling=pooling, **settings)


def encoder_of(model, **settings):
    return M3Encoder(model, **{"dtype": torch.float32, "device": "cpu", "progress": False, **settings})


def padded(model, ids, side):
    n, pad = max(map(len, ids)), model.tokenizer.pad_token_id or 0
    def row(values, filler):
        filling = [filler] * (n - len(values))
        return filling + values if side == "left" else values + filling
    return torch.tensor([row(i, pad) for i in ids]), torch.tensor([row([1] * len(i), 0) for i in ids])


def check_forward(model, found, ids):
    "The forward pass, with its padding on either side, gives what encoding gives."
    for side in ("left", "right"):
        with torch.no_grad(): out = model.eval()(*padded(model, ids, side))
        np.testing.assert_allclose(out.dense.numpy(), found.dense, atol=2e-6)
        np.testing.assert_allclose(out.multi[out.mask.bool()].numpy(), found.multi, atol=2e-6)
        for i in range(len(ids)):
            weights = found.lexical[i].toarray().ravel()
            best = np.zeros_like(weights)
            np.maximum.at(best, out.ids[i].numpy(), out.lexical[i].numpy())
            np.testing.assert_allclose(best, weights, atol=2e-6)


def train(model, path, **settings):
    "One step of all outputs; gives the log."
    args = M3TrainingArguments(**{**dict(
        output_dir=str(path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=0,
        passage_length=48, query_length=48, search_length=64, precision="fp32", report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_steps=1, lr_scheduler_type="constant"), **settings})
    trainer = M3Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_loading_to_another_library(family, checkpoint, tmp_path):
    path = checkpoint(family)
    model = load(path, family, query_prompt="Instruct: find it\nQuery: ", max_length=48)
    encoder = encoder_of(model)
    ids, found = encoder.tokenize(TEXTS), encoder.encode(TEXTS)
    check_forward(model, found, ids)
    framed = FAMILIES[family][1].split()[0] != "$A"
    assert np.diff(found.offsets).tolist() == [len(i) - framed for i in ids]       # no first word is dropped
    names = {model.tokenizer.convert_tokens_to_ids(t) for t in FAMILIES[family][1].split() if t != "$A"}
    assert not set(found.lexical.indices) & names and found.lexical.nnz > 8
    assert abs(encoder.encode_queries(TEXTS).dense - found.dense).max() > 1e-3     # the instruction is read

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    log = train(model, tmp_path / "run").state.log_history[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert np.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert {"lexical_head.weight", "multi_head.weight"} <= changed and len(changed) > 15
    assert not any("word_embeddings" in n or "embed_tokens" in n or "wte" in n or "tok_emb" in n for n in changed)

    model.save_pretrained(tmp_path / "saved")
    found = encoder_of(model).encode_queries(TEXTS)
    again = M3Encoder.from_pretrained(tmp_path / "saved", dtype=torch.float32, device="cpu", progress=False)
    for part in ("dense", "multi"):
        np.testing.assert_allclose(getattr(again.encode_queries(TEXTS), part), getattr(found, part), atol=1e-6)
    library = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
        np.testing.assert_allclose(theirs.encode_query(TEXTS), found.dense, atol=1e-5)
        if not hasattr(library, "MultiVectorEncoder"): return
        theirs = library.MultiVectorEncoder(str(tmp_path / "saved" / "multi_vector"), device="cpu")
        for i, vectors in enumerate(theirs.encode_query(TEXTS)):
            np.testing.assert_allclose(vectors, found.vectors(i), atol=1e-5)
