"""What options do, seen in the training itself: when it stops, how fast it learns, what it is resumed to."""
import json
from math import cos, pi

import pytest
import torch
from tiny_run import LAW, tiny_model, trainer
from transformers import TrainerCallback

from bgem3_nb.online_mining import MineBetweenEpochs
from bgem3_nb.rows import make_rows
from bgem3_nb.stages import add_safeguards, SAFEGUARDS
from bgem3_nb.training import M3Trainer, M3TrainingArguments

STEADY = dict(learning_rate=0, lexical_learning_rate=0, multi_learning_rate=0)
WATCHED = dict(eval_strategy="steps", eval_steps=1, save_strategy="no", metric_for_best_model="dense_R@1")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "So small a model is slower on two; and the runs that are compared bit by bit have as many."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("patience, ends", [(0, 6), (1, 2), (3, 4)])
def test_patience_stops_where_nothing_is_gained(patience, ends, tmp_path):
    "Weights that do not move gain nothing: after the first validation it waits for so many more."
    run = trainer(tmp_path, max_steps=6, patience=patience, **STEADY, **WATCHED)
    run.train()
    assert run.state.global_step == ends


def test_patience_begins_anew_with_every_gain(tmp_path):
    run, values = trainer(tmp_path, max_steps=12, patience=2, **STEADY, **WATCHED), [.1, .1, .3, .3, .4, .2, .4, .9]
    run.search_metrics = lambda scores, qrels: {"dense_R@1": values[run.state.global_step - 1]}
    run.train()
    assert run.state.global_step == 7                    # the .9 behind it is not reached
    assert run.state.best_metric == .4


class Rates(TrainerCallback):
    "The learning rates of the groups at each step."
    def __init__(self): self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([g["lr"] for g in optimizer.param_groups])


@pytest.mark.parametrize("schedule, share", [
    ("constant", lambda k: 1), ("constant_with_warmup", lambda k: min(1, k / 2)),
    ("linear", lambda k: k / 2 if k < 2 else (8 - k) / 6),
    ("cosine", lambda k: k / 2 if k < 2 else (1 + cos(pi * (k - 2) / 6)) / 2)])
def test_schedule_sets_the_learning_rates(schedule, share, tmp_path):
    "Two steps of warm-up of eight; encoder and heads fall together, each from its own rate."
    from test_train_options import settings_cell
    (_, own, _), = settings_cell(tmp_path, schedule=schedule)["plan"]
    rates = Rates()
    run = trainer(tmp_path, max_steps=8, warmup_steps=2, save_strategy="no", learning_rate=1e-3,
                  lexical_learning_rate=2e-3, multi_learning_rate=4e-3, lr_scheduler_type=own["lr_scheduler_type"])
    run.add_callback(rates)
    run.train()
    bases = sorted({g["initial_lr"] for g in run.optimizer.param_groups})
    assert bases == [1e-3, 2e-3, 4e-3]
    for k, seen in enumerate(rates.seen):
        assert sorted(set(seen)) == pytest.approx(sorted({b * share(k) for b in bases}))
    assert len(rates.seen) == 8


class Stop(TrainerCallback):
    "Ends a training after a step as Ctrl-C would."
    def __init__(self, step): self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step: raise KeyboardInterrupt


def mined_run(out, stop=None):
    "Three epochs of three steps with fresh negatives before each but the first; weights, and what was mined."
    records = [json.loads(line) for line in LAW.read_text(encoding="utf-8").splitlines()[:24]]
    rows = make_rows([{"query": r["query"], "pos": r["pos"], "neg": [records[i - 5]["pos"][0]]}
                      for i, r in enumerate(records)], "law")
    args = M3TrainingArguments(
        output_dir=str(out), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=2e-2, negatives=2,
        passage_length=48, search_length=48, precision="fp32", report_to="none", disable_tqdm=True, use_cpu=True,
        seed=3, save_strategy="steps", save_steps=1, dataloader_drop_last=True)
    run = M3Trainer(tiny_model(), args, train_dataset=rows)
    miner = MineBetweenEpochs(rows, 1, 1, 48, num_negatives=2, mix="1-8")
    run.add_callback(miner)
    if stop: run.add_callback(Stop(stop))
    try: run.train(resume_from_checkpoint=True)
    except KeyboardInterrupt: return None
    return run, {p.name: p.read_bytes() for p in sorted(out.glob("mined-*"))}


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_with_mining_is_resumed_in_the_middle(stop, whole_mined, tmp_path):
    "Stopped at the end of an epoch, and within one: weights and negatives of a run that never stopped."
    assert mined_run(tmp_path, stop) is None
    run, mined = mined_run(tmp_path)
    whole, expected = whole_mined
    assert run.state.global_step == whole.state.global_step == 9
    assert mined == expected and [*mined] == ["mined-1.parquet", "mined-2.parquet"]
    assert mined["mined-1.parquet"] != mined["mined-2.parquet"]         # the model has moved in between
    theirs = whole.model.state_dict()
    for name, p in run.model.state_dict().items(): assert torch.equal(p, theirs[name]), name


@pytest.fixture(scope="module")
def whole_mined(tmp_path_factory): return mined_run(tmp_path_factory.mktemp("whole"))


def test_the_guard_watches_a_set_of_the_panel(tmp_path, capsys):
    "A training that ruins a set of the panel is stopped, and the model is as at the last good validation."
    from bgem3_nb.panel import open_panel
    panel = open_panel([{"data": str(LAW), "max_queries": 20, "max_passages": 30}], [], "vi")
    def reciprocal(scores, qrels):
        at = [min(1 + (row > row[p]).sum() for p in rel) for row, rel in zip(scores["dense"], qrels)]
        return {"dense_R@1": float(sum(1 / a for a in at) / len(at))}
    ends = {}
    for share in (0., 1.):
        run = trainer(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="no", learning_rate=.5)
        run.search_metrics = reciprocal
        finish = add_safeguards(run, SAFEGUARDS | {"retained_share": share}, panel.named("law_mini"), "dense_R@1")
        run.train()
        finish()
        ends[share] = run
    start = [h["general_dense_R@1"] for h in ends[0.].state.log_history if "general_dense_R@1" in h]
    assert min(start[1:]) < start[0]                                   # unwatched, it forgets
    assert ends[1.].state.global_step < 6
    fresh = tiny_model().state_dict()
    for name, p in ends[1.].model.state_dict().items(): assert torch.equal(p, fresh[name]), name
    assert f"guard: dense_R@1 on {panel.sets[0].name} is" in capsys.readouterr().out
