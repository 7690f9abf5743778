"""The options of the job `train`: contradictions end it before any data is read, the others do what they say."""
import json
import re
from contextlib import ExitStack
from types import SimpleNamespace

import pandas as pd
import pytest
from tiny_run import tiny_model

from bgem3_nb.jobs import JobError, find_jobs, job_params, plan_job

TINY = {"steps": "2", "batch_size": "4", "validations": "1", "lexical_warm_up": "3", "passage_length": "40",
        "search_length": "40", "check": "false", "panel": "[]", "valid": "0.3", "distractors": "4"}


def settings_cell(tmp_path, **changed):
    "Run the cell that brings the settings together, with these parameters; its names."
    cells = json.loads(find_jobs()["train"].read_text(encoding="utf-8"))["cells"]
    params = job_params(find_jobs()["train"])
    from bgem3_nb.queries import check_kinds
    from bgem3_nb.stages import stage_plan
    from bgem3_nb.training import M3TrainingArguments, check_same
    names = {k: p.default for k, p in params.items()} | changed | {
        "out": tmp_path, "check_kinds": check_kinds, "stage_plan": stage_plan,
        "M3TrainingArguments": M3TrainingArguments, "check_same": check_same, "settings": {}, "ExitStack": ExitStack,
        "report": SimpleNamespace(params=params)}
    exec("".join(next(c for c in cells if c["id"] == "52a00002")["source"]), names)
    return names


@pytest.mark.parametrize("changed, said", [
    (dict(epochs=2., steps=50), "epochs is 2.0 and steps is 50"),
    (dict(epochs=-1.), "num_train_epochs=-1.0 trains nothing"),
    (dict(steps=0), "max_steps=0"),
    (dict(stages={"unified": {"num_train_epochs": 2., "max_steps": 9}}), "leave one out"),
    (dict(accumulation=0), "gradient_accumulation_steps must be at least 1"),
    (dict(patience=-1), "patience must be at least 0"),
    (dict(modes=[]), "modes names no output"),
    (dict(stages={"unified": {"modes": ["dense", "sparse"]}}), "'sparse', which is no output"),
    (dict(modes=["dense"], distill="guided"), "needs the modes lexical and multi"),
    (dict(freeze_layers=-1, stages={"foundation": {}}), "nothing would be trained"),
    (dict(lora_rank=8, freeze_layers=2), "lora_rank puts adapters beside every layer"),
    (dict(teacher="embedded"), "teacher is about hard negatives"),
    (dict(mine_every=1), "mine_every is about hard negatives"),
    (dict(mine_every=1, teacher="rows", negatives=2), "set one of the two"),
    (dict(cluster="local"), "cluster is for mining between epochs"),
    (dict(watch="quran", panel=[]), "watch is 'quran', and the panel has no set"),
    (dict(watch="quran", retained_share=1.1), "retained_share must be above 0 and at most 1"),
    (dict(query_kinds={"rhymes": .1}), "there is no kind 'rhymes' of queries"),
    (dict(query_kinds={"shortened": .6, "hurried": .4}), "leave some rows as they are"),
    (dict(hardest=-1), "hardest must be at least 0"),
    (dict(stages={"unified": {"lr_scheduler_type": "cosin"}}), "cosin is not a valid SchedulerType"),
])
def test_contradictions_end_it_at_once(changed, said, tmp_path):
    with pytest.raises(ValueError, match=said): settings_cell(tmp_path, **changed)


def test_epochs_in_a_stage_are_used(tmp_path):
    "A stage's epochs count before the steps of all stages, whose default stays; `epochs` counts for all."
    def planned(**changed):
        return [own for _, own, _ in settings_cell(tmp_path, **changed)["plan"]]
    own, = planned(stages={"unified": {"num_train_epochs": 2.}})
    assert (own["max_steps"], own["num_train_epochs"]) == (-1, 2.)
    foundation, unified = planned(stages={"foundation": {"max_steps": 5}, "unified": {}}, epochs=1.5)
    assert foundation["max_steps"] == 5
    assert (unified["max_steps"], unified["num_train_epochs"]) == (-1, 1.5)
    default, = planned()
    assert (default["max_steps"], default["lr_scheduler_type"], default["weight_decay"]) == (40, "cosine", .01)


@pytest.mark.parametrize("name, value, said", [
    ("schedule", "cosin", "must be one of"), ("modes", "dense,sparse", "parameter 'modes"),
    ("epochs", "two", "must be float"), ("matryoshka", "[a]", "matryoshka"), ("lexical", "splade", "must be one of"),
    ("stages", "{unified: {learning_rate: fast}}", "'stages.unified.learning_rate' of job 'train' must be float"),
    ("stages", "{unified: {matryoshka: [a]}}", "'stages.unified.matryoshka\\[0\\]' of job 'train' must be int"),
    ("stages", "{unified: {num_epochs: 2}}", "'stages.unified.num_epochs' of job 'train' is unknown; did you mean"),
])
def test_types_are_checked_before_anything_runs(name, value, said):
    with pytest.raises(JobError, match=said): plan_job("train", words=[(name, value)])


def test_numbers_in_nested_settings_are_numbers(tmp_path):
    "YAML 1.1 reads 2e-5 as text; here it is the number, at any depth. A word that it reads as false is named."
    file = tmp_path / "p.yaml"
    file.write_text("stages:\n  unified: {learning_rate: 2e-5, weight_decay: 1E-2, matryoshka: [8]}\n")
    stages = plan_job("train", files=[str(file)]).values["stages"]
    assert stages == {"unified": {"learning_rate": 2e-5, "weight_decay": .01, "matryoshka": [8]}}
    file.write_text("labels:\n  language: no\n")
    with pytest.raises(JobError, match="p.yaml, line 2: parameter 'labels.language'.*write \"no\" in quotes"):
        plan_job("prepare", files=[str(file)])
    file.write_text("stages:\n  unified:\n    learning_rate: no\n")
    with pytest.raises(JobError, match="p.yaml, line 3: parameter 'stages.unified.learning_rate'"):
        plan_job("train", files=[str(file)])


def run(launch, tmp_path, name="run", **given):
    "Run the job on a tiny model and a few rows; what it printed, and its numbers."
    tiny_model().save_pretrained(tmp_path / "tiny")
    rows = [{"query": f"điều {i}", "pos": [f"nội dung của điều {i} về việc {i % 7}"], "domain": "ab"[i % 3 == 0]}
            for i in range(36)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    given = TINY | {"source": str(tmp_path / "rows.jsonl"), "test": "[b]", "model": str(tmp_path / "tiny")} | given
    words = [word for k, v in given.items() if v for word in ("-p", k, v)]
    done = launch("train", *words, "--out", str(tmp_path / name), "--no-progress")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))


def test_options_together(tmp_path, launch):
    "Epochs, widths, an expanding head with sparsity, adapters, mining and the hardest negatives in one run."
    said, metrics = run(
        launch, tmp_path, steps="", epochs="2.5", accumulation="2", schedule="linear", weight_decay="0.1",
        matryoshka="[8]", patience="1", modes="lexical,dense", lexical="expansion", lexical_sparsity="0.001",
        lora_rank="2", negatives="2", mine_every="1", hardest="2", validations="2")
    log = metrics["training"]["unified"]
    batches = 17 // 4                                   # 24 rows of the domain a, 0.3 of them for validation
    steps = -(-5 * -(-batches // 2) // 2)               # 2.5 epochs, a step has up to 2 batches
    assert f"for {steps} steps" in said
    assert [h["step"] for h in log if "eval_dense_nDCG@10" in h] == [-(-steps // 2), steps]     # two validations
    losses = [h for h in log if "loss" in h]
    assert {"loss_dense", "loss_lexical", "loss_sparsity"} <= losses[0].keys()
    assert "loss_multi" not in losses[0]
    assert metrics["after"].keys() == {"dense", "lexical", "dense@8", "dense+lexical", "all"}
    mined = sorted((tmp_path / "run").rglob("mined-*"))
    assert [p.name for p in mined] == ["mined-0.parquet", "mined-1.parquet", "mined-2.parquet"]
    last = pd.read_parquet(mined[-1])                   # 16 passages: the positive and ranks 0 to 9 are not taken
    assert [len(n) for n in last["neg"]] == [5] * 16
    assert not any(set(p) & set(n) for p, n in zip(last["pos"], last["neg"]))
    config = json.loads((tmp_path / "run" / "model" / "bgem3_nb.json").read_text(encoding="utf-8"))
    assert config["lexical"] == "expansion"


def test_a_large_model_teaches_a_small_one(tmp_path, launch):
    """Rows without negatives get them from the teacher, whose scores are a term of the loss; quotations join the
    17 rows to train on, and have them too."""
    said, metrics = run(launch, tmp_path, teacher="embedded", negatives="3", modes="dense",
                        query_kinds="{quotation: 0.5}")
    assert 24 < int(re.search(r"train (\d+) queries", said)[1]) <= 34
    losses = [h for h in metrics["training"]["unified"] if "loss" in h]
    assert losses and all(h["loss_teacher"] > 0 for h in losses)
    assert metrics["after"].keys() == {"dense", "all"}
