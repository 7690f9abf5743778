"""Encoders of every family load, encode, train, save and open elsewhere; poolings, projections, scores and searches on
a device give what they give everywhere."""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import random as random_sparse
from tiny_run import found_first
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, BartConfig, BartModel, RobertaConfig, RobertaModel, TrainerCallback
from transformers.utils import logging

from bgem3_nb import exact_search, scoring
from bgem3_nb.adapters import add_lora, merge_lora
from bgem3_nb.backbone import pick_device, resolve_device
from bgem3_nb.encoders import FAMILIES, layer_stack, tiny_checkpoint
from bgem3_nb.encoding import Embeddings, is_out_of_memory, M3Encoder
from bgem3_nb.exact_search import top_dense
from bgem3_nb.model import M3Model, max_positions, POOLINGS
from bgem3_nb.projection import Examples, TopLayers
from bgem3_nb.scoring import _best_matches, _lexical_on, _segment_maxima, lexical_scores, maxsim_scores
from bgem3_nb.text import save_tokenizer
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


def model_arguments(path, **settings):
    return M3TrainingArguments(**{**dict(
        output_dir=str(path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=0,
        passage_length=48, query_length=48, search_length=64, precision="fp32", report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_steps=1, lr_scheduler_type="constant"), **settings})


def train(model, path, callback=None, **settings):
    "One step of all outputs."
    trainer = M3Trainer(model, model_arguments(path, **settings), train_dataset=ROWS)
    if callback is not None: trainer.add_callback(callback)
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


# Poolings and projections

def dense_module(models, out, bias, activation):
    torch.manual_seed(1)
    return models.Dense(32, out, bias=bias, activation_function=activation)


PROJECTIONS = {
    "none": lambda m: [m.Normalize()],
    "Dense": lambda m: [dense_module(m, 12, False, torch.nn.Identity()), m.Normalize()],
    "Dense with tanh": lambda m: [dense_module(m, 12, True, torch.nn.Tanh()), m.Normalize()],
}


@pytest.mark.parametrize("family", ["BERT", "Qwen3"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_pooling_and_a_projection_are_those_of_sentence_transformers(pooling, family, checkpoint, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import models
    for name, after in PROJECTIONS.items():
        body = models.Transformer(str(checkpoint(family)), max_seq_length=20)
        mode = {"last": "lasttoken"}.get(pooling, pooling)
        theirs = library.SentenceTransformer(modules=[body, models.Pooling(32, mode), *after(models)], device="cpu")
        theirs.save(str(tmp_path / name))
        model = M3Model.from_pretrained(tmp_path / name, new_heads="identity")
        encoder, wanted = encoder_of(model), theirs.encode(TEXTS)
        np.testing.assert_allclose(encoder.encode(TEXTS).dense, wanted, atol=1e-5)
        with torch.no_grad(): out = model(*padded(model, encoder.tokenize(TEXTS), "left"), outputs=("dense",))
        np.testing.assert_allclose(out.dense.numpy(), wanted, atol=1e-5)


def test_a_projection_is_trained_saved_and_resumed(checkpoint, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import models
    body = models.Transformer(str(checkpoint("BERT")), max_seq_length=20)
    modules = [body, models.Pooling(32, "cls"), *PROJECTIONS["Dense with tanh"](models)]
    library.SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "theirs"))
    settings = dict(save_strategy="steps", save_steps=1, max_steps=2, modes=("dense",), distill="")
    model = M3Model.from_pretrained(tmp_path / "theirs", new_heads="identity")
    start = model.dense_head.linear.weight.detach().clone()
    train(model, tmp_path / "run", **settings)
    assert (model.dense_head.linear.weight - start).abs().max() > 1e-4
    again = M3Model.from_pretrained(tmp_path / "theirs", new_heads="identity")
    trainer = M3Trainer(again, model_arguments(tmp_path / "run", **settings), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    for name, p in model.named_parameters(): assert torch.equal(p, again.get_parameter(name)), name
    theirs = library.SentenceTransformer(str(tmp_path / "run" / "checkpoint-2"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder_of(model, max_length=20).encode(TEXTS).dense, atol=1e-5)


# Freezing and adapters

@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_frozen_and_adapters_merged(family, checkpoint, tmp_path):
    model = load(checkpoint(family), family)
    if family == "ALBERT":
        with pytest.raises(ValueError, match="freeze_layers"): train(model, tmp_path, freeze_layers=1)
    else:
        train(model, tmp_path, freeze_layers=1)
        frozen, free = (sum(not p.requires_grad for p in layer.parameters())
                        for layer in layer_stack(model.encoder))
        assert frozen > 3 and free == 0
        assert not model.encoder.get_input_embeddings().weight.requires_grad
    model = load(checkpoint(family), family)
    if family == "GPT-2":
        with pytest.raises(ValueError, match="no linear layer"): add_lora(model, 2)
        return
    names = {n for n, _ in model.encoder.named_parameters()}
    add_lora(model, 2)
    for name, p in model.encoder.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p)
    adapted = encoder_of(model).encode(TEXTS).dense
    merge_lora(model.encoder)
    assert {n for n, _ in model.encoder.named_parameters()} == names
    np.testing.assert_allclose(encoder_of(model).encode(TEXTS).dense, adapted, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_trained_on_kept_states(family, checkpoint):
    """From states that were read once, the last layer gives the vectors of the whole encoder, and it alone has a
    gradient; the encoder uses what it learns."""
    model = load(checkpoint(family), family)
    data = Examples.from_rows([{"query": r["query"], "pos": r["pos"], "neg": [TEXTS[4]]} for r in ROWS])
    if refused := {"ALBERT": "no layers that can", "T5": "computes what the others take"}.get(family):
        with pytest.raises(ValueError, match=refused): TopLayers(model, 1, data, dtype=torch.float32)
        return
    wanted = encoder_of(model, max_length=48).encode(data.passages).dense
    top = TopLayers(model, 1, data, max_length=48, dtype=torch.float32)
    found = top.passages(torch.arange(len(data.passages)))
    np.testing.assert_allclose(found.detach(), wanted, atol=2e-3)      # the states are kept in fp16
    np.testing.assert_allclose(top.passages(torch.tensor([2])).detach(), found[2:3].detach(), atol=1e-5)
    (found @ torch.randn(found.shape[1])).sum().backward()
    learning = {p for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning and learning <= set(layer_stack(model.encoder)[-1].parameters())
    with torch.no_grad():
        for p in layer_stack(model.encoder)[-1].parameters(): p.add_(.1 * torch.randn_like(p))
    changed = encoder_of(model, max_length=48).encode(data.passages).dense
    assert abs(changed - wanted).max() > 1e-2
    np.testing.assert_allclose(top.passages(torch.arange(len(data.passages))).detach(), changed, atol=5e-3)


# What cannot be, and what is passed on

def test_an_encoder_with_a_decoder_is_refused_in_a_sentence(checkpoint, tmp_path):
    config = BartConfig(vocab_size=400, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1)
    BartModel(config).save_pretrained(tmp_path)
    load(checkpoint("RoBERTa"), "RoBERTa").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an encoder with a decoder"): load(tmp_path, "BART")


def test_embeddings_of_another_width_cannot_expand(checkpoint):
    with pytest.raises(ValueError, match="embeddings are 16 wide and whose states 32"):
        load(checkpoint("ALBERT"), "ALBERT", lexical="expansion")
    assert load(checkpoint("Qwen3"), "Qwen3", lexical="expansion").config.lexical == "expansion"


@pytest.mark.parametrize("family", ["CamemBERT", "MPNet", "RoBERTa"])
def test_positions_behind_the_paddings_are_counted(family, checkpoint):
    encoder = encoder_of(load(checkpoint(family), family))
    assert max_positions(encoder.model.encoder) == encoder.max_length == 64      # of 66 rows
    with pytest.warns(UserWarning, match="longer than 64 tokens"): encoder.encode(["nghỉ phép " * 80])


def test_lengths_beyond_the_positions_are_lowered_before_the_first_step(checkpoint, tmp_path):
    "258 rows of positions, as PhoBERT has them, are 256 tokens; the defaults ask for 512 in a validation."
    tokenizer = load(checkpoint("RoBERTa"), "RoBERTa").tokenizer
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=258, pad_token_id=tokenizer.pad_token_id)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "phobert")
    tokenizer.save_pretrained(tmp_path / "phobert")
    model = load(tmp_path / "phobert", "RoBERTa")
    assert encoder_of(model).max_length == 256
    rows = [{"query": r["query"], "pos": [r["pos"][0] + " nghỉ phép" * 400]} for r in ROWS]
    search = SimpleNamespace(queries=[r["query"] for r in rows], passages=[r["pos"][0] for r in rows],
                             qrels=[{i} for i in range(len(rows))])
    asked = [{"search_length": M3TrainingArguments.search_length}, {"passage_length": 300}]
    for settings in asked:
        [(name, length)] = settings.items()
        args = model_arguments(tmp_path / "run", **settings)
        with pytest.warns(UserWarning, match=f"^{name} is 256, not {length}: this model has no more positions$"):
            trainer = M3Trainer(model, args, train_dataset=rows, eval_dataset=search, compute_metrics=found_first)
        assert trainer.state.global_step == 0 and getattr(trainer.args, name) == 256
        trainer.train()
        assert "eval_dense_R@1" in trainer.evaluate()
    with pytest.warns(UserWarning, match="^max_length is 256, not 512: this model has no more positions$"):
        assert encoder_of(model, max_length=512).max_length == 256
    with pytest.raises(ValueError, match="max_length 300 is not possible: .* for 3 to 256 tokens"):
        encoder_of(model).encode(TEXTS, max_length=300)


def test_dtype_and_attention_are_passed_on(checkpoint):
    load = dict(new_heads="identity", pooling="mean", device="cpu", progress=False, dtype=torch.float32)
    plain = M3Encoder.from_pretrained(checkpoint("BERT"), **load)
    half = M3Encoder.from_pretrained(checkpoint("BERT"), weights_dtype=torch.bfloat16, attn_implementation="eager",
                                     **load)
    assert half.model.encoder.dtype == torch.bfloat16 and half.model.multi_head.weight.dtype == torch.float32
    assert half.model.encoder.config._attn_implementation == "eager"
    assert plain.model.encoder.config._attn_implementation == "sdpa"
    assert (half.encode(TEXTS).dense * plain.encode(TEXTS).dense).sum(1).min() > .999


@pytest.mark.parametrize("message", [
    "MPS backend out of memory (MPS allocated: 9.05 GB)", "Invalid buffer size: 12.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_what_devices_say_when_memory_runs_out(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_a_device_is_meant_once():
    assert resolve_device("cpu") == torch.device("cpu") and resolve_device("meta").type == "meta"
    assert resolve_device() == resolve_device(pick_device())


# Memory that runs out while training

class Keep(TrainerCallback):
    "Keeps the gradients of the last step."
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def out_of_memory(at):
    "A hook that once finds no memory, at its call of that number."
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == at: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    hook.calls = calls
    return hook


@pytest.mark.parametrize("cached, at, backward", [
    (False, 1, False), (False, 3, True), (False, 4, False), (True, 3, True)])
def test_the_gradient_is_the_same_in_halved_chunks(cached, at, backward, checkpoint, tmp_path, capsys):
    settings = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, cached=cached, chunk_tokens=128,
                    max_grad_norm=0)
    wanted, kept = Keep(), Keep()
    calm = train(load(checkpoint("Qwen3"), "Qwen3"), tmp_path / "calm", wanted, **settings)
    model, hook = load(checkpoint("Qwen3"), "Qwen3"), out_of_memory(at)
    layer = layer_stack(model.encoder)[0]
    if backward: layer.register_full_backward_hook(hook)
    else: layer.register_forward_hook(hook)
    trainer = train(model, tmp_path / "short", kept, **settings)
    assert len(hook.calls) > at and trainer.args.cached
    assert "step 0: memory ran out; from here on cached gradients, chunks of" in capsys.readouterr().out
    assert trainer.args.chunk_tokens == trainer.data_collator.chunk_tokens < 128
    assert kept.found.keys() == wanted.found.keys()
    for name, g in kept.found.items():     # but for rounding, as a share of the whole gradient of a weight
        assert (g - wanted.found[name]).norm() <= 1e-5 * wanted.found[name].norm() + 1e-9, name
    a, b = (t.state.log_history[0] for t in (trainer, calm))
    assert {k for k in a if "loss" in k} and all(abs(a[k] - b[k]) < 1e-3 for k in a if "loss" in k)


# Scores and searches on a device

def ragged(lengths, d=16, seed=0):
    rng = np.random.default_rng(seed)
    multi = rng.normal(size=(sum(lengths), d)).astype(np.float32)
    multi /= np.linalg.norm(multi, axis=1, keepdims=True)
    dense, offsets = rng.normal(size=(len(lengths), d)).astype(np.float32), np.append(0, np.cumsum(lengths))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    lexical = random_sparse(len(lengths), 200, .05, "csr", np.float32, rng)
    return Embeddings(dense, lexical, multi, offsets.astype(np.int64))


class Largest(TorchDispatchMode):
    "Counts the bytes of the largest tensor that anything makes."
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_long_text_among_listings_does_not_pad_the_others(dtype):
    q, p = ragged([7, 12, 5], seed=1), ragged([20] * 200 + [8192] + [20] * 200)
    tokens, vectors = (torch.from_numpy(side.multi).to(dtype) for side in (q, p))
    with Largest() as largest: found = _segment_maxima(tokens, vectors, p.offsets[:-1])
    assert largest.bytes == len(vectors) * len(tokens) * dtype.itemsize      # the product of both sides, no padding
    padded_bytes = 401 * 8192 * len(tokens) * dtype.itemsize
    assert largest.bytes < padded_bytes / 100
    wanted = _best_matches(tokens, vectors, p.offsets[:-1])
    np.testing.assert_allclose(found.T.float().numpy(), wanted, atol=1e-6)


def test_a_block_of_similarities_is_halved_until_it_fits(monkeypatch):
    q, p = ragged([7, 12, 5], seed=1), ragged([20] * 30 + [400] + [20] * 30)
    wanted, best = maxsim_scores(q, p), scoring._best_matches

    def tight(tokens, vectors, starts):
        if len(tokens) * len(vectors) > 5000: raise torch.OutOfMemoryError("CUDA out of memory")
        return best(tokens, vectors, starts)
    monkeypatch.setattr(scoring, "_best_matches", tight)
    np.testing.assert_allclose(maxsim_scores(q, p, block_tokens=1000), wanted, atol=1e-6)
    with pytest.raises(MemoryError, match="query 0 and passage 0"): maxsim_scores(ragged([80]), ragged([80]))


def test_products_on_a_device_are_those_of_the_processor():
    q, p = ragged([3] * 40, seed=1), ragged([2] * 300)
    np.testing.assert_allclose(_lexical_on(q.lexical, p.lexical, "cpu"), lexical_scores(q, p), atol=1e-6)
    assert _lexical_on(q.lexical[:0], p.lexical, "cpu").shape == (0, 300)


@pytest.mark.parametrize("case", ["plain", "copies", "few", "nearly alike"])
def test_a_search_on_a_device_gives_the_same_bits(case, monkeypatch):
    rng, k = np.random.default_rng(0), 20
    dense = rng.normal(size=(3000, 32)).astype(np.float32)
    if case == "copies": dense[1000:] = dense[rng.integers(0, 40, 2000)]
    if case == "few": dense = dense[:15]
    if case == "nearly alike": dense = dense[:1] + 1e-6 * dense
    p = Embeddings(dense / np.linalg.norm(dense, axis=1, keepdims=True))
    q = Embeddings(p.dense[:50] + rng.normal(size=(len(p.dense[:50]), 32)).astype(np.float32))
    wanted, cores, asked = top_dense(q, p, k, device="cpu"), exact_search._top_on_cores, []
    on_device = exact_search._top_on_device

    def counted(queries, *more):
        asked.append(len(queries))
        return cores(queries, *more)
    monkeypatch.setattr(exact_search, "_ON_DEVICE", 2**15)               # many blocks
    monkeypatch.setattr(exact_search, "_top_on_cores", counted)
    monkeypatch.setattr(exact_search, "search_device", lambda device: SimpleNamespace(type="a GPU"))
    monkeypatch.setattr(exact_search, "_top_on_device", lambda *given: on_device(*given[:3], torch.device("cpu")))
    found = top_dense(q, p, k)
    assert (found.passages == wanted.passages).all() and (found.scores == wanted.scores).all()
    assert asked == ([50] if case == "nearly alike" else [])       # the processor is asked where too many are near



def test_an_instruction_that_leaves_no_room_for_the_query_is_refused(checkpoint, tmp_path):
    model = load(checkpoint("Qwen3"), "Qwen3", query_prompt="Instruct: find what answers the question\nQuery: ")
    with pytest.raises(ValueError, match="query_length is 16, and query_prompt alone has .* tokens"):
        train(model, tmp_path, query_length=16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_is_the_one_that_was_saved(family, checkpoint, tmp_path):
    "With the list of added tokens, which transformers 5 leaves out, it is loaded as without."
    own = AutoTokenizer.from_pretrained(checkpoint(family))
    own.add_tokens(["khoản"])
    own.add_special_tokens({"additional_special_tokens": ["[điều]"]})
    own.save_pretrained(tmp_path / "plain")
    save_tokenizer(own, tmp_path / "listed")
    plain, listed = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("plain", "listed"))
    assert type(plain) is type(listed) and len(plain) == len(listed)
    assert plain.special_tokens_map == listed.special_tokens_map
    assert plain.added_tokens_decoder == listed.added_tokens_decoder
    assert plain.all_special_ids == listed.all_special_ids
    assert plain.backend_tokenizer.to_str() == listed.backend_tokenizer.to_str()
    text = f"{TEXTS[0]} khoản [điều] {own.mask_token or ''}"
    assert plain(text)["input_ids"] == listed(text)["input_ids"] == own(text)["input_ids"]
