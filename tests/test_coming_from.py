"""The page for those who come from elsewhere: every call on the right of its tables runs, every command is one."""
import json
import re
import shlex
from configparser import ConfigParser
from importlib import import_module

import pytest
import torch
from conftest import REPO

CELLS = {c["id"]: "".join(c["source"]) for c in json.loads(
    (REPO / "nbs" / "92_coming_from.ipynb").read_text(encoding="utf-8"))["cells"]}
TABLES = {id: [re.split(r" \| ", line.strip("| ")) for line in text.splitlines()[2:] if line.startswith("| ")]
          for id, text in CELLS.items() if "\n| there | here |\n" in text}
ROWS = [row for rows in TABLES.values() for row in rows if row != ["there", "here"]]
SPANS = list(dict.fromkeys(span for _, ours in ROWS for span in re.findall(r"`([^`]+)`", ours)))
COMMANDS = [s for s in SPANS if s.startswith("bgem3-job ")]
CALLS = [s for s in SPANS if s not in COMMANDS]


def test_there_are_four_tables_and_no_row_without_an_answer():
    assert len(TABLES) == 4 and all(len(rows) > 20 for rows in TABLES.values())
    for row in ROWS:
        assert len(row) == 2, row
        assert "`" in row[1] or row[1].startswith("no setting: "), row


@pytest.mark.parametrize("name", [
    "return_dense", "encode_sparse", "granularity=", "colbert", "--base_model", "--epochs", "--no_wandb",
    "EmbeddingSimilarityEvaluator", "--config", "--batch-size", "bgem3_projection_best.pt", "BGEM3WithHead(d_out=256)",
    "--use-matryoshka", "--threshold", "--start-rank", "--arabic-target", "--export-review", "evaluate-model.ts"])
def test_the_names_that_people_arrive_with(name):
    assert any(name in theirs for theirs, _ in ROWS)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A directory with the files that the commands and calls name."
    folder = tmp_path_factory.mktemp("coming")
    rows = [{"query": f"câu hỏi {i}", "pos": [f"trả lời {i}"], "neg": [f"sai {i}"]} for i in range(3)]
    for name in ("my_rows", "my_valid", "my_test", "other_rows", "gold_standard_v2"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "my_triplets.csv").write_text("anchor,positive,negative\na,b,c\n", encoding="utf-8")
    for run in ("project", "islamic"): (folder / "data" / "runs" / run / "model").mkdir(parents=True)
    (folder / "review.csv").write_text("query,candidate,label\n", encoding="utf-8")
    (folder / "my_config.json").write_text('{"d_out": 256, "batch_size": 64, "epochs": 10}', encoding="utf-8")
    steps = "steps:\n  - {job: prepare, data: my_rows.jsonl}\n  - {job: train, source: $prepare}\n"
    (folder / "chain.yaml").write_text(steps, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def names(here, tmp_path_factory):
    "What the page defines for its calls, with a model of BGE-M3's layout in the place of BGE-M3."
    from bgem3_nb.model import save_model, write_tensors
    found = {}
    for id in ("92c0a005", "92c0a007"): exec(CELLS[id], found)
    project = here / "data" / "runs" / "project"
    save_model(found["with_head"], project / "model")
    head = found["with_head"].dense_head
    tensors = {f"head.{k}": v for k, v in head.state_dict().items()}
    for file in ("best", "final"): write_tensors(project / f"{file}.safetensors", tensors, {"head": head.settings})
    base = tmp_path_factory.mktemp("base") / "bge-m3"
    save_model(found["model"], base)
    return found | {"BAAI/bge-m3": str(base)}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_runs(call, names, here, monkeypatch):
    monkeypatch.chdir(here)
    with torch.random.fork_rng():
        eval(compile(call.replace("BAAI/bge-m3", names["BAAI/bge-m3"]), call, "eval"), dict(names))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command, here, monkeypatch, capsys):
    "Job, parameters, their types and files are checked by the launcher itself, which then stops."
    settings = ConfigParser()
    settings.read(REPO / "settings.ini", encoding="utf-8")
    module, main = re.search(r"bgem3-job=([\w.]+):(\w+)", settings["DEFAULT"]["console_scripts"]).groups()
    monkeypatch.chdir(here)
    code = getattr(import_module(module), main)([*shlex.split(command)[1:], "--dry-run"])
    assert code == 0, capsys.readouterr().err
