"""The job `project`: configuration from JSON and flags, what it leaves behind, resume, wrong input."""
import json

import pandas as pd
from conftest import REPO

LAW = {"data": str(REPO / "data" / "law_mini.jsonl"), "name": "law", "max_queries": 5, "max_passages": 12}
RENTAL = str(REPO / "data" / "rental" / "listings.json")
SMALL = {"source": RENTAL, "max_rows": 30, "epochs": 3, "d_out": 8, "batch_size": 8, "warmup_steps": 2,
         "messy_copies": 1, "train_split": 0.6, "test_split": 0.2, "ablations": 0,
         "save_model": False, "panel": [], "check": False, "progress": False, "learning_rate": 1e-3}


def test_json_and_flags_are_checked(tmp_path, launch):
    config = tmp_path / "mine.json"
    config.write_text(json.dumps(SMALL, indent=1))
    done = launch("project", "-f", str(config), "-p", "d_out", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    plan = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:] if len(line.split()) > 1}
    assert (plan["d_out"], plan["learning_rate"], plan["max_rows"]) == ("4", "0.001", "30")
    assert "mine.json" in done.stdout
    config.write_text(json.dumps(SMALL | {"learning_rates": 1}))
    done = launch("project", "-f", str(config), "--dry-run")
    assert done.returncode == 1
    assert ": unknown parameter 'learning_rates'" in done.stderr
    assert "'learning_rate'" in done.stderr
    done = launch("project", "-p", "use_hard_negs", "true", "--dry-run")
    assert done.returncode == 1
    assert "'use_hard_neg'" in done.stderr


def test_a_run_and_its_resume(tmp_path, launch):
    features = tmp_path / "features"
    (tmp_path / "mine.json").write_text(json.dumps(SMALL | {
        "features": str(features), "learn_weights": True, "panel": [LAW]}))
    done = launch("project", "-f", "mine.json", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    left = {p.name for p in run.iterdir()}
    assert {"best.safetensors", "final.safetensors", "checkpoint.safetensors", "config.json", "loss_history.json",
            "metrics.json", "curves.png", "project.ipynb", "project.html"} <= left
    assert not [n for n in left if n.endswith(".tmp")]
    kept, metrics = pd.read_parquet(run / "per_query.parquet"), json.loads((run / "metrics.json").read_text())
    found = {key: rows["RR"].to_numpy().mean() for key, rows in kept.groupby(["model", "form"])}
    assert found == {("", "clean"): metrics["BM25"]["RR"]["mean"]} | {
        (name, form): metrics[name][form]["search"]["RR"]["mean"] for name in ("zero-shot", "head to 8")
        for form in ("clean", "messy")}
    (name, panel), = metrics["panel"].items()
    assert (name, panel["queries"], panel["passages"]) == ("law, 12 passages", 5, 12)
    assert (panel["before"].keys(), panel["after"].keys()) == ({"BM25", "dense"}, {"dense"})
    assert panel["before"]["dense"]["RR"]["mean"] > panel["after"]["dense"]["RR"]["mean"]    # 8 numbers of 384
    assert any(line.startswith(f"panel, {name}: ") for line in metrics["verdict"])
    assert "wrong with the head to 8" in (run / "project.html").read_text()
    history, config = (json.loads((run / f).read_text()) for f in ("loss_history.json", "config.json"))
    assert [h["epoch"] for h in history] == [1, 2, 3]
    assert (config["parameters"], config["epochs"]) == (8 * 384, 3)
    def times(): return [f.stat().st_mtime_ns for f in sorted(features.glob("*/*.safetensors"))]
    encoded = times()
    assert encoded
    again = launch("project", "-f", "mine.json", "--out", "run", "--force", "-p", "resume", "true")
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "loss_history.json").read_text()) == history        # all epochs were there
    assert times() == encoded                            # and no text was encoded again
    other = launch("project", "-f", "mine.json", "--out", "run", "--force", "-p", "resume", "true",
                   "-p", "search_length", "64")
    assert other.returncode == 1
    assert "this run was begun with search_length 128, not 64" in other.stderr
    assert json.loads((run / "loss_history.json").read_text()) == history


def test_wrong_rows(tmp_path, launch):
    near = {"text": "Phòng Quận 4, giá 5tr", "type": ["location"], "weight": 0}
    good = {"query": "phòng q3 5tr", "pos": "Phòng Quận 3, giá 5tr", "hard_neg": [near]}
    bad = good | {"hard_neg": [{"text": "x", "type": ["price"], "wieght": 1}]}
    (tmp_path / "rooms.json").write_text(json.dumps([good, bad]))
    done = launch("project", "-p", "source", "rooms.json", "--out", "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("rooms.json", "hard_neg", "wieght"): assert part in done.stderr, done.stderr
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
