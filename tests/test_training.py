"""What one process cannot show: a run killed at any moment, and the gradient of several processes."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from tiny_run import half_settings, tiny_model, trainer

from bgem3_nb.model import M3Config, M3Model
from bgem3_nb.training import _check_settings, M3Trainer, M3TrainingArguments

RUN = [str(Path(__file__).parent / "tiny_run.py")]
HERE = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE / "offline"), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}


def start(*words, launcher=()):
    command = [sys.executable, *launcher, *RUN, *map(str, words)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def unfinished(out):
    "A checkpoint that is being written."
    return [p for p in Path(out).glob("checkpoint-*") if not (p / "trainer_state.json").exists()]


def kill_when(process, condition, patience=600):
    end = time.time() + patience
    while process.poll() is None and not condition():
        assert time.time() < end
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_and_resumed(tmp_path):
    "Killed while it writes a checkpoint, and once more between two: the same log, metrics and weights as never killed."
    finish(start("whole", tmp_path / "whole"))
    out, draw = tmp_path / "killed", random.Random(0)
    kill_when(start("whole", out), lambda: (out / "checkpoint-3").exists() and unfinished(out))
    process, after = start("whole", out), draw.uniform(0, .2)
    kill_when(process, lambda: (out / "checkpoint-5").exists() and not time.sleep(after))
    finish(start("whole", out))
    a, b = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "killed"))
    assert [h.get("step") for h in a["log"]] == [h.get("step") for h in b["log"]]
    assert a == b


def test_a_tracker_gets_the_log(tmp_path):
    "TensorBoard's events hold the parts of the loss and the validations; early stopping and grouped batches run along."
    finish(start("tracked", tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_dense", "train/loss_lexical_distill", "eval/dense_R@1"} <= tags
    assert len(events.Scalars("train/loss")) == 3


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    finish(start("gradients", out, "plain"))
    return torch.load(out / "gradients-1-0.pt", weights_only=True)


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes(tmp_path, alone, cached):
    """Two processes with half a batch each have the loss and the gradient, on every head, of one with the whole batch;
    each encodes half of a validation set, and finds what one finds."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]     # on a port that is free
    finish(start("gradients", tmp_path, "cached" if cached else "plain", launcher=torchrun))
    both = torch.load(tmp_path / f"gradients-2-{int(cached)}.pt", weights_only=True)
    assert alone.keys() == both.keys() and {"lexical_head.weight", "multi_head.weight"} < alone.keys()
    gradients = {name: g for name, g in alone.items() if name != "found"}
    assert len(alone["found"]) == 3 and torch.equal(both["found"], alone["found"])
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, g in gradients.items():
        if "key.bias" not in name:   # its gradient is 0, as softmax does not see it
            ratio = (both[name].flatten() @ g.flatten() / g.square().sum()).item()
            assert abs(ratio - 1) < 1e-3, (name, ratio)
        assert torch.allclose(both[name], g, rtol=1e-3, atol=1e-6 * largest), name


def test_two_processes_in_half_precision(tmp_path):
    """fp16 with a gradient scaler: both processes skip a step whose gradient overflows in one or in both, have the
    same weights and, resumed from a checkpoint, the same bits; within a hundredth of the change they are those of one
    process with the whole batch. A validation is shared: no text is encoded and no query scored by both."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    first = start("half", tmp_path / "two", launcher=torchrun)
    finish(start("half", tmp_path / "one"))
    finish(first)
    alone, a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True)
                   for name in ("one/half-1-0", "two/half-2-0", "two/half-2-1"))
    assert a["skipped"] == b["skipped"] == alone["skipped"] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert a["scale"] == b["scale"] == alone["scale"] == 2**7
    for part in ("before", "after", "resumed"):
        for name, w in a[part].items(): assert torch.equal(w, b[part][name]), (part, name)
    for run in (alone, a, b):
        for name, w in run["after"].items(): assert torch.equal(w, run["resumed"][name]), name
        assert run["resumed_skipped"] == run["skipped"] and run["resumed_scale"] == run["scale"]
    def whole(difference): return torch.cat([difference(n).flatten() for n in alone["after"]]).norm()
    moved = whole(lambda n: alone["after"][n] - alone["before"][n])
    assert moved > 0 and whole(lambda n: a["after"][n] - alone["after"][n]) < .01 * moved
    assert torch.equal(a["found"], alone["found"]) and torch.equal(b["found"], alone["found"])
    for part in ("encoded", "scored"): assert a[part] == b[part] == alone[part] / 2, part
    fewer = trainer(tmp_path / "fewer", **half_settings(2)).args
    with pytest.raises(ValueError, match="was trained with per_device_train_batch_size=8, and now it is 4"):
        _check_settings(tmp_path / "two" / "checkpoint-4", fewer)
    _check_settings(tmp_path / "two" / "checkpoint-4", trainer(tmp_path / "whole", **half_settings(1)).args)


@pytest.mark.parametrize("kind", ["XLMRoberta", "Bert", "DistilBert", "ModernBert"])
@pytest.mark.parametrize("length", [64, 600])
def test_without_dropout_there_is_none(kind, length, tmp_path):
    "`dropout=False` turns off what attention keeps as a plain number too, and puts it back afterwards."
    names = {"DistilBert": dict(dim=16, hidden_dim=32, n_layers=1, n_heads=2, dropout=.4, attention_dropout=.4)}
    sizes = names.get(kind, dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=.4,
        attention_probs_dropout_prob=.4, attention_dropout=.4, pad_token_id=1))
    config = getattr(transformers, f"{kind}Config")(vocab_size=250002, max_position_embeddings=700, **sizes)
    encoder = getattr(transformers, f"{kind}Model")(config)
    model = M3Model(encoder, tiny_model().tokenizer, M3Config("mean"))
    batch = {"input_ids": torch.arange(5, 45)[None], "attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    for dropout in (False, True):
        args = M3TrainingArguments(output_dir=str(tmp_path), dropout=dropout, passage_length=length,
                                   search_length=length, report_to="none", use_cpu=True)
        with M3Trainer(model, args, train_dataset=[{"query": "a", "pos": ["b"]}]).quick_layers():
            a, b = (model.train()(**batch).multi.detach() for _ in range(2))
        assert torch.equal(a, b) == (not dropout)
    assert not torch.equal(model.train()(**batch).multi, model(**batch).multi)
