"""A checkpoint's own settings: sentence-transformers' files give sentence-transformers' vectors, what is not stated is
asked for, trained heads stay."""
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models as token_models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from bgem3_nb.encoding import EncoderPool, M3Encoder
from bgem3_nb.model import M3Config, M3Model

D = 32
TEXTS = ["w5 w6 w7", "w9", "w1 w2 w3 w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w8 w8", "unknown words"]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    "A directory with a small random encoder and a tokenizer of 40 words; nothing in it states a pooling."
    path, special = tmp_path_factory.mktemp("body"), ["<s>", "<pad>", "</s>", "<unk>"]
    words = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(40))])}
    rules = Tokenizer(token_models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
                                                         special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>", cls_token="<s>",
                            sep_token="</s>", pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    XLMRobertaModel(XLMRobertaConfig(
        vocab_size=len(words), hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=42, pad_token_id=1, bos_token_id=0, eos_token_id=2)).save_pretrained(path)
    return path


def library():
    "sentence-transformers and its modules; newer versions have another place for them and say so."
    st = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import models
    return st, models


def dense(models, bias, out=12, activation=None):
    torch.manual_seed(1)
    return models.Dense(D, out, bias=bias, activation_function=activation or torch.nn.Identity())


def saved(path, body, pooling="mean", after=lambda models: [models.Normalize()], length=9, **settings):
    "A checkpoint as sentence-transformers saves it, and the model that it came from."
    st, models = library()
    modules = [models.Transformer(str(body), max_seq_length=length), models.Pooling(D, pooling), *after(models)]
    model = st.SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save(str(path))
    return model.eval()


AFTER = {
    "mean": lambda m: [m.Normalize()],
    "cls": lambda m: [m.Normalize()],
    "lasttoken": lambda m: [],
    "mean, Dense": lambda m: [dense(m, False), m.Normalize()],
    "cls, Normalize, Dense with a bias": lambda m: [m.Normalize(), dense(m, True), m.Dropout(.5), m.Normalize()],
    "max": lambda m: [m.Normalize()],
    "weightedmean": lambda m: [m.Normalize()],
    "mean_sqrt_len_tokens": lambda m: [m.Normalize()],
    "cls, Dense with tanh": lambda m: [dense(m, True, D, torch.nn.Tanh()), m.Normalize()],
    "mean, Dense with a bias": lambda m: [dense(m, True), m.Normalize()],
    "mean, two Dense": lambda m: [dense(m, False, 48), m.Dense(48, 12, False, torch.nn.Identity()), m.Normalize()],
    "mean, Normalize, Dense, LayerNorm": lambda m: [m.Normalize(), dense(m, True), m.LayerNorm(12), m.Normalize()],
}


def unit(x): return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("name", AFTER)
def test_vectors_are_those_of_sentence_transformers(name, tmp_path, body):
    theirs = saved(tmp_path, body, name.split(",")[0], AFTER[name], prompts={"query": "w11 w12 ", "document": "w13 "})
    ours = M3Encoder.from_pretrained(tmp_path, new_heads="identity", dtype=torch.float32, progress=False)
    assert ours.max_length == theirs.max_seq_length == 9
    assert max(map(len, ours.tokenize(TEXTS))) == 9
    np.testing.assert_allclose(ours.encode(TEXTS).dense, unit(theirs.encode(TEXTS)), atol=1e-5)
    np.testing.assert_allclose(ours.encode_queries(TEXTS).dense, unit(theirs.encode_query(TEXTS)), atol=1e-5)
    np.testing.assert_allclose(ours.encode_passages(TEXTS).dense, unit(theirs.encode_document(TEXTS)), atol=1e-5)
    without_prompt = ours.encode(TEXTS).dense
    assert abs(without_prompt - ours.encode_queries(TEXTS).dense).max() > 1e-3

    ours.model.save_pretrained(tmp_path / "again")        # in our own layout, with the same settings
    again = M3Encoder.from_pretrained(tmp_path / "again", dtype=torch.float32, progress=False)
    assert again.model.config == ours.model.config
    assert again.max_length == 9
    np.testing.assert_allclose(again.encode_queries(TEXTS).dense, ours.encode_queries(TEXTS).dense, atol=1e-6)


FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def as_older_versions(path, body, out):
    """The same checkpoint in the layout of older versions: flags for the pooling, the length in its own file, the
    encoder in a directory, pickled weights."""
    shutil.copytree(path, out)
    modules = json.loads((out / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (out / "modules.json").write_text(json.dumps(modules))
    mode = json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode"]
    flags = {f"pooling_mode_{f}": f.startswith(mode) and "sqrt" not in f for f in FLAGS}
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": D} | flags))
    (out / "0_Transformer").mkdir()
    for file in body.iterdir(): (out / file.name).replace(out / "0_Transformer" / file.name)
    config = json.loads((out / "0_Transformer" / "tokenizer_config.json").read_text()) | {"model_max_length": 10**30}
    (out / "0_Transformer" / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "sentence_bert_config.json").unlink()
    (out / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    torch.save(load_file(out / "2_Dense" / "model.safetensors"), out / "2_Dense" / "pytorch_model.bin")
    (out / "2_Dense" / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_the_layout_of_older_versions(mode, tmp_path, body):
    saved(tmp_path / "new", body, mode, AFTER["mean, Dense"], prompts={"query": "w11 w12 ", "passage": "w13 "})
    old = as_older_versions(tmp_path / "new", body, tmp_path / "old")
    theirs = library()[0].SentenceTransformer(str(old), device="cpu", local_files_only=True)
    ours = M3Encoder.from_pretrained(old, new_heads="identity", dtype=torch.float32, progress=False)
    assert ours.max_length == theirs.max_seq_length == 9
    assert ours.model.config.passage_prompt == "w13 "
    np.testing.assert_allclose(ours.encode_queries(TEXTS).dense, theirs.encode_query(TEXTS), atol=1e-5)
    wanted = theirs.encode(TEXTS, prompt_name="passage")
    np.testing.assert_allclose(ours.encode_passages(TEXTS).dense, wanted, atol=1e-5)


REFUSED = {
    "two modes": (("cls", "mean"), AFTER["mean"], {}, "the pooling mode cls and mean is not one"),
    "an activation": ("mean", lambda m: [m.Normalize(), dense(m, False, activation=torch.nn.Softsign())], {},
                      r"2_.*Dense.*Softsign|3_.*Softsign"),
    "an activation between": ("mean", lambda m: [dense(m, True, D, torch.nn.Tanh()), dense(m, False)], {},
                              "2_Dense/config.json: the activation Tanh stands between two Dense"),
    "two norms": ("mean", lambda m: [dense(m, False, D), m.LayerNorm(D), dense(m, False)], {},
                  "Dense, LayerNorm, Dense cannot be read"),
    "other lengths": ("mean", lambda m: [], {"similarity_fn_name": "dot"},
                      "no module Normalize, and the checkpoint compares vectors by dot"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_express_is_named(name, tmp_path, body):
    pooling, after, settings, message = REFUSED[name]
    saved(tmp_path, body, pooling, after, **settings)
    with pytest.raises(ValueError, match=message) as error: M3Model.from_pretrained(tmp_path, new_heads="identity")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    if name == "two modes":
        chosen = M3Model.from_pretrained(tmp_path, new_heads="identity", pooling="mean")
        assert chosen.config.pooling == "mean"


@pytest.mark.parametrize("file, change, message", [
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is true"),
    ("2_Dense/config.json", {"use_residual": True}, "without residual"),
    ("2_Dense/config.json", {"module_input_name": "token_embeddings"},
     "only a Dense from and to the sentence embedding"),
    ("2_Dense/config.json", {"in_features": 7}, "not the Dense of its config.json"),
    ("2_Dense/config.json", {"out_features": "many"}, "not the Dense of its config.json"),
    ("modules.json", [{"type": "sentence_transformers.models.CNN", "path": ""}], "the module CNN cannot be expressed"),
    ("modules.json", [{"type": 5}], "every module needs a type and a path"),
    ("modules.json", {}, "a list is wanted, not a dict"),
    ("1_Pooling/config.json", None, "1_Pooling/config.json: the pooling mode .none. is not one"),
    ("2_Dense/model.safetensors", None, "2_Dense: the weights of the module Dense are missing"),
])
def test_settings_that_cannot_be_read(file, change, message, tmp_path, body):
    saved(tmp_path, body, "mean", AFTER["mean, Dense"])
    if change is None: (tmp_path / file).unlink()
    else:
        old = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(old | change if isinstance(old, dict) else change))
    with pytest.raises(ValueError, match=message) as error: M3Model.from_pretrained(tmp_path, new_heads="identity")
    assert "\n" not in str(error.value)


# Where nothing is stated

def test_a_pooling_that_nothing_states_is_asked_for(tmp_path, body):
    shutil.copytree(body, tmp_path, dirs_exist_ok=True)
    for load in (M3Model.from_pretrained, M3Encoder.from_pretrained):
        message = 'nothing here states how the dense vector is pooled.*pooling="cls", "mean"'
        with pytest.raises(ValueError, match=message): load(tmp_path, new_heads="identity")
    vectors = {}
    for pooling in ("cls", "mean", "last"):
        encoder = M3Encoder.from_pretrained(tmp_path, new_heads="identity", pooling=pooling, dtype=torch.float32,
                                            progress=False)
        assert encoder.model.config == M3Config(pooling)
        assert encoder.max_length == 40                        # its positions, since nothing states less
        vectors[pooling] = encoder.encode(TEXTS[:2]).dense
    for other in ("cls", "last"): assert abs(vectors[other] - vectors["mean"]).max() > .01
    with EncoderPool(encoder.model, ["cpu"], dtype=torch.float32, progress=False, pooling="mean") as pool:
        np.testing.assert_allclose(pool.encode(TEXTS[:2]).dense, vectors["mean"], atol=1e-6)


@pytest.mark.parametrize("kept", ["sparse_linear.pt", "colbert_linear.pt"])
def test_heads_of_bge_m3_mean_cls(kept, tmp_path, body):
    model = M3Model.from_pretrained(body, new_heads="random", pooling="mean", seed=7)
    model.save_pretrained(tmp_path)
    for file in {"sparse_linear.pt", "colbert_linear.pt", "bgem3_nb.json", "modules.json"} - {kept}:
        (tmp_path / file).unlink()
    again = M3Model.from_pretrained(tmp_path, new_heads="identity")
    assert again.config == M3Config("cls")
    assert again.started_heads == (("multi_head",) if kept == "sparse_linear.pt" else ("lexical_head",))
    assert torch.equal(again.lexical_head.weight, model.lexical_head.weight) == (kept == "sparse_linear.pt")
    assert torch.equal(again.multi_head.weight, model.multi_head.weight) == (kept == "colbert_linear.pt")


# Trained heads

def test_trained_heads_stay_until_replacing_is_asked_for(tmp_path, body, capsys):
    model = M3Model.from_pretrained(body, new_heads="random", pooling="cls", seed=5)
    model.save_pretrained(tmp_path)
    for start in ("", "identity", "random"):
        by_encoder = lambda *a, **kw: M3Encoder.from_pretrained(*a, **kw, device="cpu", progress=False).model
        for load in (M3Model.from_pretrained, by_encoder):
            again = load(tmp_path, new_heads=start)
            assert again.started_heads == ()
            assert torch.equal(again.multi_head.weight, model.multi_head.weight)
            assert torch.equal(again.lexical_head.weight, model.lexical_head.weight)
    assert capsys.readouterr().out == ""
    anew = M3Encoder.from_pretrained(tmp_path, new_heads="identity", replace_heads=True, device="cpu",
                                     progress=False).model
    assert torch.equal(anew.multi_head.weight, torch.eye(D))
    assert not torch.equal(anew.lexical_head.weight, model.lexical_head.weight)
    said = "the trained heads of sparse_linear.pt and colbert_linear.pt are replaced by new ones"
    assert capsys.readouterr().out == f"{tmp_path}: {said}\n"
    with pytest.raises(ValueError, match="choose one of identity, random"):
        M3Model.from_pretrained(tmp_path, new_heads="zeros")
