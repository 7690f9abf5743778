"""The projection head: sentence-transformers gives the same vectors, a killed run resumes bit for bit, random rows."""
import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from hypothesis import given, settings, strategies as st
from transformers import XLMRobertaConfig, XLMRobertaModel

from bgem3_nb.backbone import embedded_path
from bgem3_nb.encoding import EncoderPool, M3Encoder
from bgem3_nb.losses import info_nce
from bgem3_nb.model import M3Config, M3Model, read_tensors
from bgem3_nb.model import ProjectionHead
from bgem3_nb.projection import (
    batch_columns, Examples, M3WithHead, ProjectionArguments, TopLayers,
    export_sentence_transformers, listing_groups, messy_copy, projection_loss, split_listings)
from bgem3_nb.text import set_steps

TEXTS = ["Phòng trọ 25m² Quận 10, wc riêng", "q10", "a",
         "Căn hộ mini có ban công, giá 5tr5, không chung chủ, gần chợ và bến xe"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(embedded_path())


def small_model(tokenizer, pooling):
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=130, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    ours = M3Config(pooling=pooling, query_prompt="query: ", passage_prompt="passage: ")
    return M3Model(XLMRobertaModel(config, add_pooling_layer=False), tokenizer, ours).eval()


def small_encoder(model):
    return M3Encoder(model, max_length=64, dtype=torch.float32, progress=False)


@pytest.mark.parametrize("pooling,bias,layer_norm",
                         [("mean", False, False), ("cls", True, True), ("last", True, False)])
def test_sentence_transformers_gives_the_same_vectors(tmp_path, tokenizer, pooling, bias, layer_norm):
    import sentence_transformers as st_lib
    head = ProjectionHead(32, 12, bias, layer_norm)
    for name, p in head.named_parameters():
        if name != "linear.weight": torch.nn.init.normal_(p)
    model = M3WithHead(small_model(tokenizer, pooling), head)
    for _ in range(2):   # the second replaces the first
        export_sentence_transformers(model, tmp_path / "st", max_length=64)
    theirs = st_lib.SentenceTransformer(str(tmp_path / "st"), device="cpu", local_files_only=True)
    names = [type(m).__name__ for m in theirs]
    assert names[:2] == ["Transformer", "Pooling"] and names[-1] == "Normalize" and "Dense" in names
    if not bias: assert names == ["Transformer", "Pooling", "Dense", "Normalize"]
    ours = small_encoder(model)
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS).dense, atol=1e-5)
    for name, encode in (("query", ours.encode_queries), ("passage", ours.encode_passages)):
        np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name=name), encode(TEXTS).dense, atol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"st"}          # nothing temporary is left
    # And we read our own export.
    again = M3Encoder.from_pretrained(tmp_path / "st", new_heads="identity", dtype=torch.float32, progress=False)
    assert again.max_length == 64
    assert replace(again.model.config, max_length=0) == model.config
    assert again.model.dense_head.settings == head.settings
    for how in ("encode", "encode_queries", "encode_passages"):
        np.testing.assert_allclose(getattr(again, how)(TEXTS).dense, getattr(ours, how)(TEXTS).dense, atol=1e-6)


def test_an_export_normalizes_as_the_model_does(tmp_path, tokenizer):
    import sentence_transformers as st_lib
    model = small_model(tokenizer, "mean")
    model.tokenizer = deepcopy(tokenizer)                          # the steps change a tokenizer
    set_steps(model.tokenizer, ["nfc", "arabic_marks"])
    plain, vocalized = "الحمد لله رب العالمين", "الْحَمْدُ لِلَّهِ رَبِّ الْعَالَمِينَ"
    export_sentence_transformers(model, tmp_path / "st", max_length=64)
    theirs = st_lib.SentenceTransformer(str(tmp_path / "st"), device="cpu", local_files_only=True)
    wanted = small_encoder(model).encode([plain, vocalized]).dense
    np.testing.assert_array_equal(wanted[0], wanted[1])
    np.testing.assert_allclose(theirs.encode([plain, vocalized]), wanted, atol=1e-5)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_an_export_has_the_permissions_of_the_umask(tmp_path, tokenizer, umask):
    before = os.umask(umask)
    try: export_sentence_transformers(M3WithHead(small_model(tokenizer, "cls"), ProjectionHead(32, 8)), tmp_path / "st")
    finally: os.umask(before)
    files = [f for f in (tmp_path / "st").rglob("*")] + [tmp_path / "st"]
    assert all(f.stat().st_mode & 0o777 == (0o777 if f.is_dir() else 0o666) & ~umask for f in files) and len(files) > 8


def test_every_encoder_that_opens_the_directory_projects(tmp_path, tokenizer):
    model = M3WithHead(small_model(tokenizer, "cls"), ProjectionHead(32, 12))
    model.save_pretrained(tmp_path)
    wanted = small_encoder(model).encode(TEXTS).dense
    settings = dict(max_length=64, dtype=torch.float32, progress=False)
    assert wanted.shape[1] == 12
    opened = M3Encoder.from_pretrained(str(tmp_path), **settings)
    np.testing.assert_allclose(opened.encode(TEXTS).dense, wanted, atol=1e-6)
    with EncoderPool(model, ["cpu"], **settings) as pool:
        np.testing.assert_allclose(pool.encode(TEXTS).dense, wanted, atol=1e-6)


def test_export_does_not_touch_what_is_not_an_export(tmp_path, tokenizer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    model = small_model(tokenizer, "cls")
    with pytest.raises(ValueError, match="holds something else"):
        export_sentence_transformers(M3WithHead(model, ProjectionHead(32, 8)), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    export_sentence_transformers(model, tmp_path / "plain")                      # no projection is needed
    listed = json.loads((tmp_path / "plain" / "modules.json").read_text(encoding="utf-8"))
    assert [m["path"] for m in listed] == ["", "1_Pooling", "2_Normalize"]
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "plain"}


@pytest.mark.parametrize("layers,dtype,atol",
                         [(1, torch.float32, 3e-3), (3, torch.float32, 3e-3), (2, torch.bfloat16, 3e-2)])
def test_last_layers_equal_the_whole_encoder(tokenizer, layers, dtype, atol):
    model = small_model(tokenizer, "mean")
    many = [f"phòng {i} " * (i % 7) + "tr" for i in range(80)]   # more than one part
    data = Examples.from_rows([{"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [*TEXTS[2:], *many]}])
    top = TopLayers(model, layers, data, dtype=dtype)
    whole = M3WithHead(model, ProjectionHead(32, 32))
    whole = M3Encoder(whole, device="cpu", max_length=64, dtype=torch.float32, progress=False)
    with torch.no_grad(): whole.model.dense_head.linear.weight.copy_(torch.eye(32))
    passages, queries = top.passages(torch.arange(len(data.passages))).detach(), top.queries(torch.arange(1)).detach()
    np.testing.assert_allclose(passages, whole.encode_passages(data.passages).dense, atol=atol)
    np.testing.assert_allclose(queries, whole.encode_queries(data.queries).dense, atol=atol)


words = st.sampled_from([f"t{i}" for i in range(12)])
negatives = st.lists(st.tuples(words, st.sampled_from([0., .5, 1., 2.5])), max_size=4)
rows = st.lists(st.tuples(words, words, negatives), min_size=1, max_size=16).map(
    lambda x: [{"query": q, "pos": [p], "neg": [n for n, _ in neg], "neg_weights": [w for _, w in neg]}
               for q, p, neg in x])


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 99))
def test_loss_of_ragged_rows_is_the_formula(rows, seed):
    "The batch of places and weights, against a matrix filled in by loops over the rows."
    data, gen = Examples.from_rows(rows), torch.Generator().manual_seed(seed)
    Q, P = torch.randn(len(data.queries), 5, generator=gen), torch.randn(len(data.passages), 5, generator=gen)
    at = torch.randperm(len(rows), generator=gen)[:10]
    query, columns, weights = batch_columns(data, at)
    known = {(r["query"], p) for r in rows for p in r["pos"]}
    chosen, passages, expected = [rows[i] for i in at], [], []
    passages = [r["pos"][0] for r in chosen] + [n for r in chosen for n in r["neg"]]
    for i, r in enumerate(chosen):
        line = [1.] * len(chosen)
        line += [w if j == i else 1. for j, other in enumerate(chosen) for w in other["neg_weights"]]
        expected.append([0. if (r["query"], p) in known else w for p, w in zip(passages, line)])
    assert [data.passages[c] for c in columns] == passages
    assert torch.equal(weights, torch.tensor(expected))
    q, p = F.normalize(Q[query], dim=-1), F.normalize(P[columns], dim=-1)
    by_hand = info_nce(q @ p.T, torch.arange(len(at)), .02, torch.tensor(expected), symmetric=True)
    torch.testing.assert_close(projection_loss(Q[query], P[columns], weights), by_hand)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_no_text_is_on_two_sides(rows):
    data = Examples.from_rows(rows)
    groups = listing_groups(data)
    positives = {p for r in rows for p in r["pos"]}
    for key in (lambda r: {r["query"]}, lambda r: set(r["pos"]), lambda r: (set(r["pos"]) | set(r["neg"])) & positives):
        of = {}
        for r, g in zip(rows, groups):
            for text in key(r): assert of.setdefault(text, g) == g or key(r) == {r["query"]}
    try: parts = split_listings(data, .5, .25)
    except ValueError as e:
        assert "nothing is left" in str(e)
        return
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(rows)))
    seen = [{data.pos[i].item() for i in at} for at in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


SCRIPT = """
import sys, torch
from pathlib import Path
from bgem3_nb.model import ProjectionHead
from bgem3_nb.projection import CachedVectors, Examples, LearnedWeights, ProjectionArguments, ProjectionTrainer
torch.set_num_threads(int(sys.argv[3]))
gen = torch.Generator().manual_seed(0)
Q, P = (torch.nn.functional.normalize(torch.randn(n, 64, generator=gen), dim=-1) for n in (800, 1600))
data = Examples.from_rows([{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"],
                            "neg_types": [["a" if i % 2 else "b"]]} for i in range(800)])
learned = LearnedWeights({"a": 1., "b": 2.}, lambda types, values: [values[t[0]] for t in types])
args = ProjectionArguments(epochs=25, batch_size=16, warmup_steps=5)
train, valid = data.select(range(700)), data.select(range(700, 800))
t = ProjectionTrainer(ProjectionHead(64, 16), CachedVectors(Q, P), train, args, valid, learned, Path(sys.argv[1]))
t.train(resume=sys.argv[2] == "resume")
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path, env):
    def start(folder, how, threads):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / folder), how, str(threads)], env=env)
    whole = start("whole", "new", 1)
    killed = start("killed", "new", 2)
    file = tmp_path / "killed" / "checkpoint.safetensors"
    while not file.exists() and killed.poll() is None: time.sleep(.01)
    killed.kill()
    killed.wait()
    assert 0 < read_tensors(file)[1]["epoch"] < 25
    assert start("killed", "resume", 2).wait() == 0 and whole.wait() == 0
    for name in ("final", "best", "checkpoint"):
        a, b = (read_tensors(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "killed"))
        assert a[1] == b[1] and a[0].keys() == b[0].keys()
        for k in a[0]: assert torch.equal(a[0][k], b[0][k]), (name, k)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available(): pytest.skip("there is one")
    with pytest.raises(ValueError, match="device 'cuda'"): ProjectionArguments(device="cuda")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.integers(0, 5))
def test_messy_takes_any_text(text, seed):
    out = messy_copy(text, seed)
    assert out == messy_copy(text, seed) and isinstance(out, str)
    out.encode("utf-8", "surrogatepass")


def test_the_rental_set_is_what_its_generator_writes(tmp_path):
    folder = REPO / "data" / "rental"
    subprocess.run([sys.executable, str(folder / "generate.py"), "--to", str(tmp_path / "again.json")], check=True)
    assert (tmp_path / "again.json").read_bytes() == (folder / "listings.json").read_bytes()
    rows = json.loads((folder / "listings.json").read_text(encoding="utf-8"))
    known = json.loads((folder / "weight-config.json").read_text(encoding="utf-8"))
    for r in rows:
        assert 2 <= len(r["hard_neg"]) <= 5 and all(n["text"] != r["pos"] and n["type"] for n in r["hard_neg"])
    assert {t for r in rows for n in r["hard_neg"] for t in n["type"]} <= set(known) | {"requirement"}
