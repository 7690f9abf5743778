"""The exported graph gives the model's numbers at any size and in every reading, and needs no torch to be read."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO
from tiny_words import expanding, projected, TEXTS, tiny, tiny_tokenizer

from bgem3_nb.encoding import M3Encoder
from bgem3_nb.onnx_encoder import OnnxEncoder, onnx_scores
from bgem3_nb.onnx_export import export_onnx, PRECISIONS, reduce_precision
from bgem3_nb.scoring import all_scores

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer(): return tiny_tokenizer()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    "The model, and its directory in full precision; exporting takes seconds."
    model, path = tiny(tokenizer, positions=8200, heads=1), tmp_path_factory.mktemp("onnx")
    export_onnx(model, path, "fp32")
    return model, path


def encoder_of(model): return M3Encoder(model, dtype=torch.float32, device="cpu", progress=False)


def close(a, b, atol):
    np.testing.assert_allclose(a.dense, b.dense, atol=atol)
    np.testing.assert_allclose(a.lexical.toarray(), b.lexical.toarray(), atol=atol)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    np.testing.assert_allclose(a.multi, b.multi, atol=atol)


def test_all_sizes(exported):
    "Batches from 1 to 64, lengths from 1 to 8,192 tokens."
    model, path = exported
    session = onnxruntime.InferenceSession(path / "model.onnx")
    assert b"site-packages" not in (path / "model.onnx").read_bytes()      # no path of this machine
    for texts, tokens in ((1, 1), (1, 2), (2, 3), (5, 17), (64, 40), (2, 1024), (1, 8192)):
        ids = torch.randint(4, 44, (texts, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones_like(ids)
        mask[-1, (tokens + 1) // 2:] = 0
        ids[mask == 0] = 1
        with torch.no_grad(): out = model(ids, mask)
        found = session.run(["dense", "lexical", "multi"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        for a, b in zip(found, (out.dense, out.lexical, out.multi)): np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_and_the_interface(precision, exported, tmp_path):
    model, full = exported
    path = tmp_path / precision
    shutil.copytree(full, path)
    if precision != "fp32": reduce_precision(path / "model.onnx", precision)
    ours, light = encoder_of(model), OnnxEncoder.from_pretrained(path, threads=1)
    assert light.max_length == ours.max_length == 12
    assert light.tokenize(TEXTS) == ours.tokenize(TEXTS)
    atol = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2}[precision]
    q, p = light.encode_queries(TEXTS), light.encode_passages(TEXTS)
    close(q, ours.encode_queries(TEXTS), atol)
    close(p, ours.encode_passages(TEXTS), atol)
    close(light.encode(TEXTS, max_length=5, batch_size=1), ours.encode(TEXTS, max_length=5), atol)
    np.testing.assert_allclose(light.encode("w5"), ours.encode("w5"), atol=atol)
    wanted = all_scores(q.to_embeddings(), p.to_embeddings())
    for mode, scores in onnx_scores(q, p).items(): np.testing.assert_allclose(scores, wanted[mode], atol=1e-5)


def other_reading(tokenizer):
    "The last token, a projection with everything, narrower multi-vectors."
    model = projected(tokenizer, True)
    narrow = tiny(tokenizer, "last", multi_dim=8)
    model.multi_head, model.config = narrow.multi_head, narrow.config
    return model


@pytest.mark.parametrize("make, opset", [(other_reading, 18), (expanding, 20)])
def test_other_readings_and_opsets(make, opset, tokenizer, tmp_path):
    model = make(tokenizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, tmp_path, "fp32", opset)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    found = OnnxEncoder(tmp_path).encode_queries(TEXTS)
    close(found, encoder_of(model).encode_queries(TEXTS), 1e-5)
    if make is other_reading: assert (found.dense.shape[1], found.multi.shape[1]) == (12, 8)


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "fastcore", "safetensors"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
from bgem3_nb import OnnxEncoder
from bgem3_nb.onnx_encoder import onnx_scores
import numpy as np, json
encoder = OnnxEncoder(sys.argv[1])
texts = json.loads(sys.argv[2])
q, p = encoder.encode_queries(texts), encoder.encode_passages(texts)
np.savez(sys.argv[1] + "/out.npz", dense=q.dense, lexical=q.lexical.toarray(), multi=q.multi, **{
    f"s_{k}": v for k, v in onnx_scores(q, p).items()})
try: q.to_embeddings()
except ImportError: print("no torch")
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_it_needs_neither_torch_nor_transformers(exported):
    model, path = exported
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT, str(path), json.dumps(TEXTS)],
                         env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "no torch\n"
    ours, found = encoder_of(model), np.load(path / "out.npz")
    q, p = ours.encode_queries(TEXTS), ours.encode_passages(TEXTS)
    for name, wanted in (("dense", q.dense), ("lexical", q.lexical.toarray()), ("multi", q.multi)):
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    for mode, scores in all_scores(q, p).items(): np.testing.assert_allclose(found[f"s_{mode}"], scores, atol=1e-5)


def test_what_is_missing_is_named(exported, tmp_path):
    _, path = exported
    with pytest.raises(ValueError, match="no exported model there .onnx_encoder.json, tokenizer.json, model.onnx"):
        OnnxEncoder(tmp_path)
    shutil.copytree(path, tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"\(tokenizer.json missing\)"): OnnxEncoder(tmp_path / "half")
    light = OnnxEncoder(path)
    with pytest.raises(ValueError, match="3 to 8198 tokens"): light.encode(TEXTS, max_length=9000)
    with pytest.raises(ValueError, match="text 1 is NoneType"): light.encode(["a", None])
    assert light.encode([]).lexical.shape == (0, 44)
