"""On a GPU: the numbers of the CPU, any batch size, memory that runs out, a resumed training. Skipped without CUDA, but
that BGEM3_TEST_DEVICE=cpu runs it on the CPU: then it shows no more than that the tests themselves still run."""
import os

import numpy as np
import pytest
import torch
from scipy.sparse import random as random_sparse
from test_encoding import random_texts, same
from test_scoring import embeddings
from tiny_run import trainer
from transformers import TrainerCallback

from bgem3_nb.encoding import Embeddings, M3Encoder, read_states
from bgem3_nb.exact_search import top_by_blocks, top_dense, top_multi
from bgem3_nb.model import M3Model, OUTPUTS
from bgem3_nb.projection import Examples, TopLayers
from bgem3_nb.scoring import lexical_scores, maxsim_pairs, maxsim_scores

DEVICE = os.environ.get("BGEM3_TEST_DEVICE", "cuda")
ON_CPU = DEVICE == "cpu"
pytestmark = [pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="there is no CUDA device"),
              pytest.mark.filterwarnings("ignore:.*were truncated")]


def encoder_on(device, dtype=torch.float32, **settings):
    model = M3Model.from_pretrained("embedded", new_heads="identity")
    return M3Encoder(model, device=device, dtype=dtype, progress=False, **settings)


@pytest.fixture(scope="module")
def gpu(): return encoder_on(DEVICE)


@pytest.fixture(scope="module")
def texts(gpu): return random_texts(gpu, 60, seed=7)


@pytest.fixture(scope="module")
def wanted(texts): return encoder_on("cpu").encode(texts)


def check_close(found, wanted, atol):
    assert (found.offsets == wanted.offsets).all() and found.lexical.nnz == wanted.lexical.nnz
    np.testing.assert_allclose(found.dense, wanted.dense, atol=atol)
    np.testing.assert_allclose(found.multi, wanted.multi, atol=atol)
    assert abs(found.lexical - wanted.lexical).max() < atol


def test_fp32_is_the_cpus(gpu, texts, wanted): check_close(gpu.encode(texts), wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(texts, wanted, dtype):
    found = encoder_on(DEVICE, dtype).encode(texts)
    assert (found.dense * wanted.dense).sum(1).min() > .999
    assert (found.multi * wanted.multi).sum(1).mean() > .999


@pytest.mark.parametrize("budget", [1, 700, 100_000])
def test_company_does_not_matter(gpu, texts, wanted, budget):
    other = M3Encoder(gpu.model, dtype=torch.float32, batch_tokens=budget, device=DEVICE, progress=False)
    check_close(other.encode(texts), wanted, 1e-4)


def test_states_may_lie_on_the_cpu(gpu, texts, wanted):
    ids = gpu.tokenize(texts)
    with torch.inference_mode(): found = read_states(gpu.model, torch.cat(gpu.hidden(ids)), ids, OUTPUTS)
    check_close(found, wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(texts, dtype):
    "Else a store that was killed and finished would differ from one that never stopped. The pooling is a mean."
    encoder = encoder_on(DEVICE, dtype)
    first = encoder.encode(texts * 8)
    for _ in range(3): assert same(encoder.encode(texts * 8), first)


def test_last_layers_are_the_whole_encoders(texts, gpu):
    data = Examples.from_rows([{"query": texts[5], "pos": texts[6:8], "neg": texts[8:]}])
    model = M3Model.from_pretrained("embedded", new_heads="identity", device=DEVICE)
    top = TopLayers(model, 2, data, dtype=torch.float32)
    found = top.passages(torch.arange(len(data.passages)))
    wanted = gpu.encode_passages(data.passages, outputs=("dense",), max_length=128).dense
    assert found.device.type == DEVICE
    np.testing.assert_allclose(found.detach().cpu(), wanted, atol=3e-3)


def test_memory_runs_out_and_the_batch_is_halved(gpu, texts, wanted):
    "The process may take 300 MB more than it holds; the first batch wants gigabytes. The CPU is told that it has none."
    large, tried = M3Encoder(gpu.model, dtype=torch.float32, batch_tokens=200_000, device=DEVICE, progress=False), []
    states = large._batch_states

    def noted(ids, layers):
        tried.append(len(ids))
        if ON_CPU and len(ids) > 99: raise torch.OutOfMemoryError("CUDA out of memory")
        return states(ids, layers)
    large._batch_states = noted
    if not ON_CPU:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total)
    try: found = large.encode(texts * 6)
    finally:
        if not ON_CPU: torch.cuda.set_per_process_memory_fraction(1.)
    assert len(tried) > 2 and tried[0] > 2 * tried[-1] and large.batch_tokens == 200_000, tried
    for i in range(6): check_close(found[i * len(texts):(i + 1) * len(texts)], wanted, 1e-4)


def test_attention_needs_no_plan_for_each_shape(texts):
    "In bf16, a GPU of the newest kind would go to cuDNN, which prepares one for every shape in every thread."
    encoder = encoder_on(DEVICE, torch.bfloat16)
    layers, ids = encoder._evaluation_layers(), encoder.tokenize(texts)
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with torch.inference_mode(), recorder as seen: encoder._batch_states(ids, layers)
    kinds = {e.key for e in seen.key_averages() if "attention" in e.key}
    assert (kinds or ON_CPU) and not any("cudnn" in k for k in kinds), kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maxsim_proposed_in_half_precision_finds_the_same(dtype):
    q, p = embeddings([5, 9, 30], 0, d=64), embeddings([40, 1, 7, 12] * 300, 1, d=64)
    wanted, found = top_by_blocks(q, p, 20, {"multi": 1.}), top_multi(q, p, 20, dtype, device=DEVICE)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    every = maxsim_scores(q, p)
    np.testing.assert_allclose(np.take_along_axis(every, found.passages, 1), wanted.scores, atol=1e-6)


def test_searches_are_the_cpus():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(4000, 48)).astype(np.float32)
    p = Embeddings(dense / np.linalg.norm(dense, axis=1, keepdims=True))
    q = Embeddings(p.dense[:70] + .1 * rng.normal(size=(70, 48)).astype(np.float32))
    wanted, found = top_dense(q, p, 30, device="cpu"), top_dense(q, p, 30, device=DEVICE)
    assert (found.passages == wanted.passages).all() and (found.scores == wanted.scores).all()
    lexical = random_sparse(300, 500, .05, "csr", np.float32, rng)
    a, b = Embeddings(lexical=lexical[:40]), Embeddings(lexical=lexical)
    np.testing.assert_allclose(lexical_scores(a, b, DEVICE), lexical_scores(a, b), atol=1e-5)


def test_maxsim_is_the_cpus():
    q, p = embeddings([5, 0, 9, 30], 0, d=64), embeddings([40, 1, 0, 7] * 50, 1, d=64)
    wanted, i, j = maxsim_scores(q, p), np.arange(200) % 4, np.arange(200)
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        np.testing.assert_allclose(maxsim_scores(q, p, dtype=dtype, device=DEVICE, block_tokens=64), wanted, atol=atol)
        np.testing.assert_allclose(maxsim_pairs(q, p, i, j, dtype, DEVICE), wanted[i, j], atol=atol)


def gradients(out, **settings):
    "The gradient of one step, and its loss."
    settings |= dict(max_steps=1, save_strategy="no", max_grad_norm=0, symmetric=True, chunk_tokens=200)
    kept, run = {}, trainer(out, **settings)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.update({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    run.add_callback(Keep())
    run.train()
    return kept, run.state.log_history[0]["loss"], run.args.device.type


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_are_the_cpus(tmp_path, cached):
    wanted, loss, _ = gradients(tmp_path / "cpu")
    found, other, device = gradients(tmp_path / "cuda", use_cpu=ON_CPU, cached=cached)
    assert device == DEVICE and abs(loss - other) < 1e-4 and wanted.keys() == found.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, g in wanted.items(): torch.testing.assert_close(found[name], g, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_in_fp16_are_near(tmp_path, cached):
    wanted, _, _ = gradients(tmp_path / "cpu")
    found, _, _ = gradients(tmp_path / "cuda", use_cpu=ON_CPU, cached=cached, precision="fp16")
    off = sum((found[n] - g).square().sum() for n, g in wanted.items()).sqrt()
    assert off < .02 * sum(g.square().sum() for g in wanted.values()).sqrt()


def test_one_process_trains_on_one_gpu(tmp_path):
    assert trainer(tmp_path, use_cpu=ON_CPU).args.n_gpu == (0 if ON_CPU else 1)


def test_dropout_is_the_same_in_both_passes(tmp_path):
    "Cached gradients run each chunk twice; the second pass has the random numbers of the first."
    once, loss, _ = gradients(tmp_path / "a", use_cpu=ON_CPU, cached=True, dropout=True)
    whole, other, _ = gradients(tmp_path / "b", use_cpu=ON_CPU, dropout=True)
    assert abs(loss - other) < 1e-4
    largest = max(g.abs().max().item() for g in whole.values())
    for name, g in whole.items(): torch.testing.assert_close(once[name], g, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path, precision):
    "But for the order in which a GPU adds: two runs that never stop differ by as much."
    settings = dict(max_steps=9, use_cpu=ON_CPU, precision=precision, dropout=True, cached=True,
                    save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    first = trainer(tmp_path / "stopped", **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop |= state.global_step == 6
    first.add_callback(Stop())
    first.train()
    again = trainer(tmp_path / "stopped", **settings)
    again.train(resume_from_checkpoint=True)
    losses = [[h["loss"] for h in run.state.log_history if "loss" in h] for run in (whole, again)]
    assert len(losses[0]) == 9
    np.testing.assert_allclose(*losses, rtol=1e-3 if precision == "fp32" else 2e-2)
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        atol = 1e-4 if precision == "fp32" else 5e-3
        if a.is_floating_point(): torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_falls(tmp_path, precision):
    settings = dict(precision=precision, cached=True, learning_rate=3e-3, save_strategy="no")
    run = trainer(tmp_path, max_steps=30, use_cpu=ON_CPU, **settings)
    run.train()
    losses = [h["loss"] for h in run.state.log_history if "loss" in h]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
