"""Chains as a user runs them: the project's own at their smallest, from files to a model, and what stops one."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import LAUNCHER, REPO

from bgem3_nb.chains import SMOKE, plan_chain
from bgem3_nb.jobs import JobError

# The sets of the last step. The chain `company` is run and checked so by test_cases.py, from its page.
JUDGED = {"rental": ["test", "rental"], "law": ["test", "law"], "islamic": ["test", "quran", "hadith"],
          "rental_vectors": ["test", "rental"]}


def check_steps(out, steps):
    "Every step has finished, and the page of the chain says what came out."
    record = json.loads((out / "chain.json").read_text(encoding="utf-8"))["steps"]
    assert {name: about["state"] for name, about in record.items()} == dict.fromkeys(steps, "finished")
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in steps: assert f'href="{name}/' in page, name
    assert "nDCG@10" in page
    assert (out / "train" / "model" / "config.json").is_file()


def check_judged(out, sets):
    "The last step has asked the model of the chain, its start and BM25 the test and the gold questions."
    found = json.loads((out / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    assert not found["failures"]
    assert [name.split(",")[0].removeprefix("prepare/") for name in found["evaluations"]] == sets
    for of in found["evaluations"].values():
        assert {"embedded all", "BM25", "train all"} <= of.keys()


@pytest.mark.parametrize("chain", JUDGED)
def test_a_case_runs_from_files_to_a_model(chain, tmp_path, launch):
    done = launch("run", chain, "--smoke", "--out", "run", "--no-progress")
    assert done.returncode == 0, done.stderr[-3000:]
    check_steps(tmp_path / "run", plan_chain(chain).plans)
    check_judged(tmp_path / "run", JUDGED[chain])


def test_a_folder_of_documents_is_enough(tmp_path, launch):
    "Nothing but the folder is said; the steps are only made small."
    folder = REPO / "data" / "company" / "documents"
    done = launch("run", str(folder), "--smoke", "--no-progress")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "data" / "runs" / "documents_smoke"
    check_steps(out, ["prepare", "mine", "train", "evaluate"])
    check_judged(out, ["test"])
    again = launch("run", str(folder), "--smoke", "--no-progress")
    assert again.returncode == 0
    assert again.stderr.count("done before") == 4, again.stderr


def test_rows_need_nothing_else(tmp_path, launch):
    "`mine` and `train` with a source and no other parameter of the data; no domains, no languages, two formats."
    lines = [{"query": f"câu hỏi số {i} về điều {i * 7}", "positive": f"Điều {i * 7} nói rằng số {i} được nghỉ."}
             for i in range(30)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines), "utf-8")
    small = {job: [w for k, v in SMOKE[job].items() for w in ("-p", k, str(v))] for job in ("mine", "train")}
    for job, source in (("mine", "my.jsonl"), ("train", "my.jsonl"), ("train", "data/runs/mine")):
        name = job if source == "my.jsonl" else "again"
        done = launch(job, "-p", "source", source, *small[job], "--out", f"data/runs/{name}", "--no-progress")
        assert done.returncode == 0, (job, source, done.stderr[-2000:])
    assert "BM25" in done.stdout


def test_a_stopped_chain_goes_on(tmp_path, job, env):
    "Ctrl-C ends it with 130; the step that had ended is not run again, the other one is."
    job("50_first", "out: str = ''", "from pathlib import Path\nPath(out, 'a.txt').write_text('a')")
    job("51_second", "source: str = ''\nout: str = ''", "from pathlib import Path\nimport time\n"
        "Path(out, 'begun').touch()\nwhile not Path('go').exists(): time.sleep(.05)\n"
        "Path(out, 'b.txt').write_text(Path(source, 'a.txt').read_text() + 'b')")
    (tmp_path / "two.yaml").write_text("steps:\n- job: first\n- {job: second, source: $first}\n")
    command = [*LAUNCHER, "run", "two.yaml", "--out", "two"]
    run = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not (tmp_path / "two" / "second" / "begun").exists():
        assert run.poll() is None and time.monotonic() - started < 600
        time.sleep(.05)
    os.kill(run.pid, signal.SIGINT)
    said = run.communicate(timeout=600)[1]
    assert run.returncode == 130, said
    record = json.loads((tmp_path / "two" / "chain.json").read_text())["steps"]
    assert [record[s]["state"] for s in ("first", "second")] == ["finished", "failed"]
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "step 1 of 2: first: done before" in again.stderr
    assert (tmp_path / "two" / "second" / "b.txt").read_text() == "ab"
    for step in ("first", "second"): shutil.rmtree(tmp_path / "two" / step)    # deleted to have them run again
    anew = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert anew.returncode == 0 and "done before" not in anew.stderr, anew.stderr
    assert (tmp_path / "two" / "second" / "b.txt").read_text() == "ab"


def test_every_chain_of_the_project_fits_its_jobs(tmp_path):
    for path in sorted((REPO / "chains").glob("*.yaml")): assert plan_chain(path).plans, path.name
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps:\n- job: train\n  stages: {unified: {learning_rate: fast}}\n")
    with pytest.raises(JobError, match=r"bad.yaml, line 3: parameter 'stages.unified.learning_rate'"): plan_chain(bad)
