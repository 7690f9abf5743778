"""What the job `compare` rests on: the reference's lexical head with less memory, and sentences for bad input."""
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from peers import lean_sparse_embedding  # noqa: E402


def reference(lean):
    "The reference's model for training, tiny, and a batch."
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
    from transformers import XLMRobertaConfig, XLMRobertaModel
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    encoder = XLMRobertaModel(config, add_pooling_layer=False)
    parts = {"model": encoder, "colbert_linear": torch.nn.Linear(16, 16), "sparse_linear": torch.nn.Linear(16, 1)}
    torch.nn.init.constant_(parts["sparse_linear"].bias, .5)
    special = SimpleNamespace(cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3, padding_side="right")
    model = EncoderOnlyEmbedderM3Model(
        parts, special, temperature=.02, sentence_pooling_method="mean", normalize_embeddings=True,
        use_self_distill=True)
    if lean: model._sparse_embedding = MethodType(lean_sparse_embedding, model)
    def batch(length):
        ids = torch.randint(4, 20, (6, length))     # few ids, so that terms repeat within a text and between texts
        mask = (torch.arange(length) < torch.randint(4, length + 1, (6, 1))).long()
        ids[:, 0] = 0
        return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}
    return model.train(), batch(9), batch(14)


def test_lean_lexical_head_is_the_references():
    found = {}
    for lean in (False, True):
        model, queries, passages = reference(lean)
        loss = model(queries, passages).loss
        loss.backward()
        found[lean] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True][0], found[False][0])
    assert found[True][1].keys() == found[False][1].keys() >= {"sparse_linear.weight", "colbert_linear.weight"}
    assert found[False][1]["sparse_linear.weight"].abs().sum() > 0
    for name, grad in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("words, wanted", [
    (["-p", "grid", '{"theirs": [{}]}'], ["theirs", "FlagEmbedding", "sentence-transformers"]),
    (["-p", "redo", "[theirs]"], ["theirs", "'start', 'ours'"]),
    (["-p", "redo", '["FlagEmbedding, own heads"]'], ["FlagEmbedding, own heads", "start, ours"]),
    (["-p", "data", "{law: {source: data/law_mini.jsonl}}"], ["data.law has no test"]),
])
def test_bad_input(words, wanted, tmp_path, launch):
    done = launch("compare", "-f", "compare_smoke", *words, "--out", str(tmp_path / "run"), "--no-progress")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in wanted: assert part in done.stderr, done.stderr
