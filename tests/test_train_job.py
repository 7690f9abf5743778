"""Wrong input to the training job: one sentence with file, line and field, exit code 1, nothing half-written."""
import importlib.util
import json

import pandas as pd
import pytest
import torch
from conftest import REPO

GOOD = {"query": "nghỉ hằng năm", "pos": ["Người lao động được nghỉ hằng năm."], "domain": "a"}


def cases(tmp_path):
    "Name of a case to the words of the command line and what the message must hold."
    def rows(name, *lines):
        path = tmp_path / name
        every = (GOOD, GOOD | {"domain": "b"}, *lines)
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in every), encoding="utf-8")
        return ["-p", "source", str(path), "-p", "test", "[b]"]
    return {
        "empty positive": (rows("empty.jsonl", GOOD | {"pos": [""]}), ["empty.jsonl", "line 3", "pos"]),
        "missing column": (rows("missing.jsonl", {"query": "q"}), ["missing.jsonl", "line 3", "pos"]),
        "not a string": (rows("number.jsonl", GOOD | {"query": 7}), ["number.jsonl", "line 3", "query"]),
        "no such file": (["-p", "source", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        "no such domain": (rows("fine.jsonl")[:3] + ["-p", "test", "[c]"], ["'c'", "there are 'a', 'b'"]),
        "no heads": (rows("more.jsonl", GOOD | {"query": "ngày phép"}) + ["-p", "new_heads", ""],
                     ["no trained heads", "new_heads="]),
    }


@pytest.mark.parametrize("name", ["empty positive", "missing column", "not a string", "no such file", "no such domain",
                                  "no heads"])
def test_bad_input(name, tmp_path, launch):
    words, wanted = cases(tmp_path)[name]
    done = launch("train", *words, "-p", "valid", "0.5", "-p", "panel", "[]",
                  "--out", str(tmp_path / "run"), "--no-progress")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in wanted: assert part in done.stderr, done.stderr
    if name == "no such file":                       # seen before anything runs
        assert not (tmp_path / "run").exists()
        return
    left = sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock")
    assert left == ["run.json", "train.failed.ipynb"], left


def test_trained_heads_stay_and_replacing_them_is_printed(tmp_path, launch):
    "A lexical head that came with the model is not warmed up again; `replace_heads` starts it anew and says so."
    from tiny_run import tiny_model
    model = tiny_model()
    model.lexical_head.bias.data.fill_(.7)                       # a trained head, as far as anyone can tell
    model.save_pretrained(tmp_path / "model")
    rows = [{"query": f"điều {i}", "pos": [f"nội dung của điều {i}"], "domain": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    given = {"source": str(tmp_path / "rows.jsonl"), "test": "[b]", "valid": "0.3", "model": str(tmp_path / "model"),
             "steps": "1", "batch_size": "4", "validations": "1", "lexical_warm_up": "20", "check": "false",
             "lexical_learning_rate": "0", "passage_length": "60", "search_length": "60"}
    said = {}
    panel = json.dumps([{"data": str(REPO / "data" / "rental" / "listings.json"), "name": "rooms", "max_queries": 6,
                         "max_passages": 12}, str(tmp_path / "rows.jsonl")])
    watching = ["-p", "panel", panel, "-p", "watch", "rooms", "-p", "retained_share", ".5"]
    for name, words in {"kept": watching, "replaced": ["-p", "replace_heads", "true", "-p", "panel", "[]"]}.items():
        parameters = [word for k, v in given.items() for word in ("-p", k, v)]
        done = launch("train", *parameters, *words, "--out", str(tmp_path / name), "--no-progress")
        assert done.returncode == 0, done.stderr[-2000:]
        head = torch.load(tmp_path / name / "model" / "sparse_linear.pt", weights_only=True)
        said[name], bias = done.stdout, head["bias"].item()
        assert (abs(bias - .7) < 1e-6) == (name == "kept"), bias
    assert "lexical head alone" not in said["kept"]
    assert "replaced" not in said["kept"]
    assert "the trained heads of sparse_linear.pt and colbert_linear.pt are replaced by new ones" in said["replaced"]
    assert "lexical head alone" in said["replaced"]
    check_report(tmp_path / "replaced")
    check_panel(tmp_path / "kept", said["kept"])
    check_package(tmp_path / "kept")


def check_package(run):
    "What is handed over has the numbers of the run, and its card is one that the hub reads."
    from huggingface_hub import ModelCard
    from sentence_transformers import SentenceTransformer
    from bgem3_nb.encoding import M3Encoder
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    found = json.loads((run / "model" / "evaluation_results" / "performance_metrics.json").read_text(encoding="utf-8"))
    assert metrics.items() <= found.items() and found["measured"]["passages_per_second"] > 0
    after = metrics["after"]["all"]["nDCG@10"]["mean"]
    card = ModelCard.load(run / "model" / "README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["nDCG@10, all"] == round(after, 4)
    assert "not known" in card.text and "## Intended use" in card.text      # licences that nobody stated
    guide = (run / "model" / "deployment_guide.md").read_text(encoding="utf-8")
    for part in (f"{after:.3f}", "60 tokens", "bgem3-serve", "## Migration", "## Rollback", "SentenceTransformer"):
        assert part in guide, part
    args = json.loads((run / "model" / "training_args.json").read_text(encoding="utf-8"))
    assert args["stages"]["unified"]["max_steps"] == 1 and args["parameters"]["search_length"] == 60
    if importlib.util.find_spec("typst"):
        assert (run / "model" / "comparison_report.pdf").read_bytes().startswith(b"%PDF")
    own = M3Encoder.from_pretrained(run / "model", dtype=torch.float32, progress=False).encode("nội dung")
    assert abs(SentenceTransformer(str(run / "model"), device="cpu").encode("nội dung") - own).max() < 1e-5


def test_where_nothing_can_be_uploaded_it_is_said_before_the_training(launch, tmp_path):
    done = launch("train", "-p", "source", str(REPO / "data" / "law_mini.jsonl"), "-p", "push_to_hub", "user/model",
                  "--out", str(tmp_path / "run"), "--no-progress")
    assert done.returncode == 1 and "push_to_hub needs the network" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model").exists()


def check_panel(run, said):
    "A panel set is asked before and after, for the table, the numbers and the verdict; the training's rows are none."
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    (name, panel), = metrics["panel"].items()
    assert (name, panel["queries"]) == ("rooms, 31 passages", 6)
    assert panel["before"].keys() == panel["after"].keys() | {"BM25"} and "all" in panel["after"]
    compared = metrics["paired"][f"{name}, all after − all before"]
    assert compared["difference"] == pytest.approx(
        panel["after"]["all"]["nDCG@10"]["mean"] - panel["before"]["all"]["nDCG@10"]["mean"])
    assert any(line.startswith(f"panel, {name}: ") for line in metrics["verdict"])
    assert any("no question is left" in note for note in metrics["panel_notes"])
    assert f"all, {name} " in said and "The panel took" in said and metrics["panel_seconds"] > 0
    watched = [h for h in metrics["training"]["unified"] if "general_all_nDCG@10" in h]
    assert len(watched) == 2                                  # at the start and at the one validation


def check_report(run):
    "The settings are all parameters that the result depends on; the page begins with the summary, its set-up folded."
    from bgem3_nb.jobs import find_jobs, job_params
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    aside = {"out", "progress", "resume", "check", "report_to", "price_per_hour", "push_to_hub",
             "checkpoints"}
    assert config.keys() == job_params(find_jobs()["train"]).keys() - aside
    assert (config["replace_heads"], config["search_length"]) == (True, 60)
    page = (run / "train.html").read_text(encoding="utf-8")
    parameter = page.index("number of tokens to which texts are truncated in search</td>")
    assert page.index("came out") < parameter < page.index("The model before training")
    assert "<details><summary>Code</summary>" in page
    check_questions(run, page)


def check_questions(run, page):
    "Every test query is kept, before and after, and its metrics are those of `metrics.json`, exactly."
    kept = pd.read_parquet(run / "per_query.parquet")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    groups = {(model, mode): rows for (model, mode), rows in kept.groupby(["model", "mode"])}
    modes = metrics["after"].keys()
    assert groups.keys() == {("", "BM25"), *((model, mode) for model in ("before", "after") for mode in modes)}
    for (model, mode), rows in groups.items():
        said = metrics["after" if model == "after" else "before"][mode]
        assert len(rows) == metrics["queries"]
        for name in said.keys() - {"n_queries"}: assert rows[name].to_numpy().mean() == said[name]["mean"]
    wrong = groups["after", "all"]["rank"].ne(1).sum()
    assert f"wrong after training (rank before → after): {wrong}" in page
    assert ('dir="auto"' in page) == bool(wrong)
    assert metrics["seconds"] > 0 and metrics["peak_memory_gb"] > .1 and metrics["cost"] is None
    assert metrics["should_fine_tune"][0] in page
    assert "too few rows" in page.lower()
