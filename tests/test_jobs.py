"""The launcher as a process: what it prints, how it exits, what it leaves on disk."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from html import unescape

import pytest
from conftest import LAUNCHER, REPO
from nbformat import read

from bgem3_nb.jobs import RENAMED, JobError, find_jobs, fit_value, job_params, plan_job, read_params

PARAMETERS = '''steps: int = 3           # how many
lr: float = 1e-3         # learning rate
note: str | None = None  # a remark
labels: "Fields['rows.LABELS']" = {}  # of rows that have none
settings: "dict[str, {'rate': float, 'most': int}]" = {}  # of each step
out: str = "data/runs/toy"  # where the results go'''


def one_sentence(result, *words):
    "The command failed before anything ran, with one line on stderr that has these words in it."
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words: assert word in result.stderr, result.stderr


def files(folder):
    "Names of the files below a folder, without those by which the launcher looks after it."
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "run.json"))


# ---- the project's own jobs

def own_jobs():
    "The project's jobs: name to notebook."
    return {name: path for name, path in find_jobs().items() if path.parent.parent == REPO}


def own_params():
    "Name of a parameter to (job, `JobParam`) of every job that has it."
    found = defaultdict(list)
    for job, path in own_jobs().items():
        for param in job_params(path).values(): found[param.name].append((job, param))
    return found


def test_every_job_has_its_parameters_tag_after_cleaning():
    "nbdev_clean strips tags unless settings.ini keeps them; a notebook without the tag is no job any more."
    assert list(own_jobs()) == ["prepare", "mine", "train", "project", "evaluate", "index", "encode", "distil",
                                "specialist", "compare", "ablation", "negatives", "recipe"]
    for path in own_jobs().values():
        tags = [t for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for t in c["metadata"].get("tags", [])]
        assert tags == ["parameters"], path.name


def test_every_parameter_file_fits_a_job():
    for path in sorted((REPO / "params").glob("*.yaml")):
        def fits(job):
            try: return plan_job(job, [str(path)])
            except JobError as e: return print(e)
        assert any(map(fits, own_jobs())), path.name


# What a name means in one job alone; everywhere else it means what it means in all other jobs.
OWN_MEANING = {("compare", "data"), ("prepare", "test"), ("project", "source"), ("negatives", "source_options"),
               ("index", "source"), ("encode", "source"), ("distil", "source"), ("mine", "distractors"),
               ("distil", "batch_size"),
               ("project", "learning_rate"), ("compare", "passage_length"),
               ("train", "test"), ("train", "valid"), ("train", "cluster"), ("specialist", "language"),
               ("project", "epochs"), ("evaluate", "modes"), ("project", "matryoshka")}


def test_a_name_means_the_same_in_every_job():
    for name, uses in own_params().items():
        shared = {(p.type_name, p.help) for job, p in uses if (job, name) not in OWN_MEANING}
        assert len(shared) <= 1, (name, shared)
    for job, name in OWN_MEANING:   # none of them is stale
        others = {(p.type_name, p.help) for other, p in own_params()[name] if other != job}
        mine = {(p.type_name, p.help) for other, p in own_params()[name] if other == job}
        assert others and not mine & others, (job, name)


def test_every_parameter_is_described():
    for name, uses in own_params().items():
        for job, p in uses: assert p.help, (job, name)


def test_lengths_have_one_set_of_names():
    names = {name for name in own_params() if "length" in name}
    assert names <= {"query_length", "passage_length", "search_length"}
    assert RENAMED.keys() & own_params().keys() == {"by", "labels"}   # which mean the split's label and rows' labels
    assert {job for old in ("by", "labels") for job, _ in own_params()[old]} == {"prepare", "train"}


@pytest.mark.parametrize("job, old, new", [
    ("train", "max_length", "search_length"),
    ("index", "corpus", "source"),
    ("mine", "low", "min_score"),
    ("mine", "order", "sampling_strategy"),
    ("compare", "length", "passage_length"),
    ("negatives", "ways.x.order", "sampling_strategy"),
    ("specialist", "variants.x.anchor", "l2_sp"),
    ("train", "stages.specialised.keep", "retained_share"),
])
def test_old_names_are_refused_with_the_new_one(job, old, new, tmp_path):
    value = 1
    for key in reversed(old.split(".")): value = {key: value}
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(value))
    with pytest.raises(JobError, match=f"old.yaml, line 1: .*called '{new}' now"): plan_job(job, [str(path)])


@pytest.mark.parametrize("job", own_jobs())
def test_the_stored_run_of_a_page_has_the_parameters_of_the_job(job):
    "Those that there are, and where a value does not stand out, the default as it is now."
    path = own_jobs()[job]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    html = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    row = r"<td[^>]*><(b|span)>(\w+)</\1></td><td[^>]*><\1><code>(.*?)</code></\1></td>"
    shown = {name: (mark == "b", json.loads(unescape(value))) for mark, name, value in re.findall(row, html)}
    params = job_params(path)
    assert list(shown) == list(params)
    assert {k: v for k, (changed, v) in shown.items() if not changed and v != params[k].default} == {}


# Parameter files that say that they are a job's defaults, written out: the job, and what they change.
DEFAULTS = {"compare": ("compare", set()), "project_rental": ("project", {"matryoshka", "learn_weights", "check"})}


def test_defaults_that_are_written_out_are_the_defaults():
    files = (REPO / "params").glob("*.yaml")
    assert {p.stem for p in files if "the job's defaults" in p.read_text(encoding="utf-8")} == DEFAULTS.keys()
    for name, (job, changed) in DEFAULTS.items():
        params = job_params(find_jobs()[job])
        written = {k: v for k, (v, _) in read_params(REPO / "params" / f"{name}.yaml").items()}
        other = {k for k, v in written.items() if k != "out" and fit_value(v, params[k].type) != params[k].default}
        assert other == changed, name


def test_a_job_is_a_notebook_with_parameters(job, launch, tmp_path):
    "Whatever its number, or without one; other notebooks are not even read as JSON."
    job("73_case", PARAMETERS)
    job("mine_own", PARAMETERS)
    job("10_chapter", "x = 1", tags=())
    (tmp_path / "nbs" / "11_broken.ipynb").write_text('{"cells": [{"source": "\\"tags\\": [\\"parameters\\"]"}')
    (tmp_path / "nbs" / "50_toy.failed.ipynb").write_text(job("50_toy", PARAMETERS).read_text())
    listed = [line.split()[0] for line in launch("list").stdout.splitlines() if line]
    assert listed[:3] == ["toy", "case", "mine_own"]
    assert not {"chapter", "broken", "toy.failed"} & set(listed)
    one_sentence(launch("chapter"), "10_chapter.ipynb", "tagged `parameters`")


def test_the_wheel_has_the_jobs_that_are_found(tmp_path):
    words = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib",
             str(tmp_path / "lib")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(words, cwd=REPO, env=env, check=True, capture_output=True)
    packed = sorted((tmp_path / "lib" / "bgem3_nb" / "job_files" / "nbs").iterdir())
    assert [p.name for p in packed] == [p.name for p in own_jobs().values()]


def test_every_job_shows_a_summary_and_its_parameters():
    for name, path in own_jobs().items():
        cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        shows = [i for i, s in enumerate(cells) if f'JobReport("{name}", globals())\nreport.show()' in s]
        ends = [i for i, s in enumerate(cells) if "report.finish(" in s]
        titles = [i for i, s in enumerate(cells) if s.startswith("## ")]
        assert len(shows) == len(ends) == 1, name
        assert shows[0] < titles[0] < ends[0], name


def test_tags_survive_cleaning(tmp_path, env):
    "On a copy of this project's settings."
    from shutil import copy
    (tmp_path / "nbs").mkdir()
    copy(REPO / "settings.ini", tmp_path)
    for path in own_jobs().values(): copy(path, tmp_path / "nbs")
    before = [p.read_bytes() for p in sorted((tmp_path / "nbs").iterdir())]
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", clean], cwd=tmp_path, env=env, check=True)
    assert before == [p.read_bytes() for p in sorted((tmp_path / "nbs").iterdir())]


# ---- listing

def test_lists_jobs(job, launch):
    job("50_toy", PARAMETERS)
    for args in ([], ["list"]):
        result = launch(*args)
        assert result.returncode == 0 and "A toy." in result.stdout and "toy" in result.stdout.split()


def test_lists_parameters(job, launch):
    job("50_toy", PARAMETERS)
    first, second = launch("toy", "--help"), launch("params", "toy")
    assert first.returncode == 0 and first.stdout == second.stdout
    for word in ("steps", "int", "3", "how many", "str | None", "a remark"): assert word in first.stdout


# ---- refusals

@pytest.mark.parametrize("args, words", [
    (["-p", "stepz", "5"], ["unknown parameter 'stepz' of job 'toy'; did you mean 'steps'?"]),
    (["-p", "steps", "many"], ["'steps'", "must be int", "'many'"]),
    (["-p", "steps", "2.5"], ["must be int", "'2.5'"]),
    (["-p", "lr", "fast"], ["'lr'", "must be float", "'fast'"]),
    (["-p", "steps", "1", "-p", "steps", "2"], ["'steps' is given twice"]),
    (["-p", "steps"], ["-p takes a name and a value"]),
    (["-f", "nowhere.yaml"], ["no parameter file 'nowhere.yaml'"]),
    (["--fast"], ["--fast"]),
    (["--p", "steps", "9"], ["--p"]),
    (["-psteps", "9"], ["-p/--param: expected 2 arguments"]),
    (["-p", "labels", "{language: no}"], ["'labels.language'", "must be str", 'write "no" in quotes']),
    (["-p", "labels", "{langauge: vi}"], ["'labels.langauge'", "is unknown; did you mean 'language'?"]),
])
def test_refuses(job, launch, tmp_path, args, words):
    job("50_toy", PARAMETERS)
    one_sentence(launch("toy", *args), *words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text, words", [
    ("lr: 0.1\nstepz: 3\n", ["bad.yaml, line 2", "unknown parameter 'stepz'", "'steps'"]),
    ("lr: 0.1\nsteps: true\n", ["bad.yaml, line 2", "'steps'", "must be int", "True"]),
    ("# c\nnote: [1]\n", ["bad.yaml, line 2", "must be str | None", "[1]"]),
    ("- steps\n", ["bad.yaml, line 1", "mapping"]),
    ("steps: 1\nlr: 'x\n", ["bad.yaml, line", "not YAML"]),
    ("steps: 1\nsteps: 2\n", ["bad.yaml, line 2", "given twice"]),
    ("labels: {language: vi}\nlr: 1\nsettings:\n  first: {rate: 1e-5}\n  second:\n    rate: fast\n",
     ["bad.yaml, line 6", "'settings.second.rate'", "must be float, not 'fast'"]),
    ("settings:\n  first: {rat: 1}\n",
     ["bad.yaml, line 2", "'settings.first.rat'", "is unknown; did you mean 'rate'?"]),
    ("labels:\n  source: x\n  domain: 2024\n",
     ["bad.yaml, line 3", "'labels.domain'", "must be str, not 2024", 'write "2024" in quotes']),
    ("labels: {language: no}\n",
     ["bad.yaml, line 1", "'labels.language'", "must be str, not 'no'", 'write "no" in quotes']),
    ("labels: {domain: 2024-05-01}\n", ["'labels.domain'", "must be str, not '2024-05-01'", "in quotes"]),
])
def test_refuses_file(job, launch, tmp_path, text, words):
    job("50_toy", PARAMETERS)
    (tmp_path / "bad.yaml").write_text(text)
    one_sentence(launch("toy", "-f", "bad.yaml"), *words)


def test_refuses_what_is_no_job(job, launch):
    job("50_toy", PARAMETERS)
    one_sentence(launch("toyy"), "no job 'toyy'; did you mean 'toy'?")
    job("51_untagged", PARAMETERS, tags=())
    one_sentence(launch("untagged"), "51_untagged.ipynb", "tagged `parameters`")
    job("52_homeless", "steps = 3")
    one_sentence(launch("homeless"), "no parameter `out: str`")


def test_dry_run_runs_nothing(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "raise SystemError")
    (tmp_path / "small.yaml").write_text("lr: 1e-2\nsteps: 7\n")
    result = launch("toy", "-f", "small.yaml", "-p", "steps", "2", "--dry-run")
    assert result.returncode == 0 and "small.yaml, line 1" in result.stdout
    assert "data/runs/small/toy.ipynb" in result.stdout and not (tmp_path / "data").exists()


# ---- runs

def test_runs_with_files_and_overrides(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "print(f'{steps=} {lr=} {note=} {out=}', settings)", "{'a table': steps}")
    (tmp_path / "small.yaml").write_text("lr: 1e-2\nsteps: 7\nsettings: {first: {rate: 1e-5}}\n")
    result = launch("toy", "-f", "small.yaml", "-p", "steps", "2", "--out", "run")
    assert result.returncode == 0, result.stderr
    assert "steps=2 lr=0.01 note=None out='run' {'first': {'rate': 1e-05}}" in result.stdout
    assert "{'a table': 2}" in result.stdout
    assert files(tmp_path / "run") == ["toy.html", "toy.ipynb"]
    page = (tmp_path / "run" / "toy.html").read_text(encoding="utf-8")
    assert "steps=2" in page and "50_toy" in page
    assert str(tmp_path) not in json.dumps(read(tmp_path / "run" / "toy.ipynb", 4).metadata)


def test_kernel_is_this_interpreter_and_stands_here(job, launch, tmp_path):
    "Whatever is registered as `python3` on the machine, and with the clone on its path."
    fake = tmp_path / "jupyter" / "kernels" / "python3"
    fake.mkdir(parents=True)
    (fake / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    tells = "import os, sys, bgem3_nb\nprint(sys.executable, os.getcwd(), bgem3_nb.__file__, sep='|')"
    job("50_toy", PARAMETERS, tells)
    result = launch("toy", "--no-progress", JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert result.returncode == 0, result.stderr
    executable, here, package = result.stdout.strip().split("|")
    assert executable == sys.executable and os.path.samefile(here, tmp_path)
    assert package == str(REPO / "bgem3_nb" / "__init__.py")


def test_no_progress_is_quiet(job, launch):
    shows_a_bar = "from tqdm.auto import tqdm\nfor i in tqdm([1]): pass\nprint(progress)"
    job("50_toy", PARAMETERS + "\nprogress: bool = True", shows_a_bar)
    loud, quiet = launch("toy", "--out", "loud"), launch("toy", "--out", "quiet", "--no-progress")
    assert (loud.stdout, quiet.stdout) == ("True\n", "False\n")
    for said in ("50_toy", "1/1"): assert said in loud.stderr
    assert "IProgress" not in loud.stderr
    assert quiet.stderr.count("\n") == 1, quiet.stderr


def test_leaves_out_cells_that_are_not_evaluated(job, launch):
    job("50_toy", PARAMETERS, "#| hide\n#| eval: false\nraise SystemError", "print('here')")
    result = launch("toy")
    assert result.returncode == 0 and "here" in result.stdout


def test_figures_are_in_the_page(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "import matplotlib.pyplot as plt", "plt.figure(figsize=(1, 1)); plt.plot([1, 2]);")
    result = launch("toy", "--out", "run {steps}", "--hide-code", MPLBACKEND="agg")  # papermill formats braces in paths
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "run {steps}" / "toy.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page and "plt.figure" not in page


def test_failure_is_one_sentence_and_the_notebook_is_kept(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "open(out + '/part.txt', 'w').write('done')",
        "raise ValueError('x.jsonl, line 7: no positive')", "print('after')")
    result = launch("toy", "--out", "run", "--no-progress")
    assert result.returncode == 1
    assert "after" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "failed: ValueError: x.jsonl, line 7: no positive" in result.stderr
    assert "run/toy.failed.ipynb" in result.stderr
    assert files(tmp_path / "run") == ["part.txt", "toy.failed.ipynb"]
    cells = read(tmp_path / "run" / "toy.failed.ipynb", 4).cells
    errors = [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert errors[0].ename == "ValueError" and errors[0].traceback


def test_a_kernel_that_dies_is_a_failure(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result = launch("toy", "--out", "run")
    assert result.returncode == 1 and "kernel is gone" in result.stderr and "Traceback" not in result.stderr
    assert files(tmp_path / "run") == ["toy.failed.ipynb"]


def test_a_finished_run_is_not_run_over(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "1 / 0")
    assert launch("toy", "--out", "run").returncode == 1
    job("50_toy", PARAMETERS, "print('ran')")
    assert launch("toy", "--out", "run").returncode == 0  # a failed run is no obstacle, and leaves no trace
    assert files(tmp_path / "run") == ["toy.html", "toy.ipynb"]
    one_sentence(launch("toy", "--out", "run"), "run/toy.ipynb is a finished run", "--force")
    job("50_toy", PARAMETERS, "1 / 0")
    assert launch("toy", "--out", "run", "--force").returncode == 1
    assert files(tmp_path / "run") == ["toy.failed.ipynb"]  # nor is the run that failed taken for the one before


def test_out_that_cannot_be_a_directory(job, launch):
    job("50_toy", PARAMETERS)
    one_sentence(launch("toy", "--out", "nbs/50_toy.ipynb"), "nbs/50_toy.ipynb cannot be made")


def test_needs_the_extra(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "print('ran')")
    (tmp_path / "papermill.py").write_text("raise ImportError('gone', name='papermill')")
    one_sentence(launch("toy", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPO}"), 'papermill', 'pip install "bgem3_nb[jobs]"')


def test_a_terminal_without_unicode(job, launch):
    job("50_toy", PARAMETERS, "print('Bộ luật Lao động')")
    assert launch("toy", PYTHONIOENCODING="ascii").returncode == 0


# ---- stopping

@pytest.fixture
def started(tmp_path, env):
    "A function that starts the job `toy`: the launcher's process, and the kernel's id once its cell runs."
    processes = []
    def start():
        process = subprocess.Popen([*LAUNCHER, "toy", "--out", "run"], cwd=tmp_path, env=env,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, int(process.stdout.readline().split()[1])
    yield start
    for p in processes: p.kill()


def gone(pid):
    "Whether a process has ended, within a minute."
    for _ in range(600):
        try: os.kill(pid, 0)
        except ProcessLookupError: return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped(job, tmp_path, started, sig, code):
    "The cell is interrupted, its own clean-up runs, the kernel is gone, the partial notebook is kept."
    job("50_toy", PARAMETERS, "import os, time\ntry:\n    print('kernel', os.getpid(), flush=True)\n"
        "    time.sleep(60)\nfinally: open(out + '/cleaned.txt', 'w').close()", "print('after')")
    process, kernel = started()
    process.send_signal(sig)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    assert "after" not in stdout and "Traceback" not in stderr and sig.name in stderr
    assert files(tmp_path / "run") == ["cleaned.txt", "toy.failed.ipynb"]
    assert gone(kernel)


def test_stopped_at_once(job, tmp_path, started):
    "A cell that takes no notice of Ctrl-C does not outlive the second one."
    job("50_toy", PARAMETERS, "import os, time\nsaid = False\nwhile True:\n    try:\n"
        "        if not said: print('kernel', os.getpid(), flush=True)\n"
        "        said = True\n"
        "        time.sleep(60)\n    except KeyboardInterrupt: print('no', flush=True)")
    process, kernel = started()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert files(tmp_path / "run") == ["toy.failed.ipynb"] and gone(kernel)


# ---- the run's directory

WRITES = '''from pathlib import Path
for i in range(steps): Path(out, f'{i}.txt').write_text(str(i))
Path(out, 'parts').mkdir(exist_ok=True)
Path(out, 'parts', 'x-1').touch()'''


def test_a_directory_of_somebody_else(job, launch, tmp_path):
    "What no job wrote is not touched, with or without --force."
    job("50_toy", PARAMETERS, WRITES)
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    (tmp_path / "mine" / "runs" / "thesis.txt").write_text("years of work")
    for words in ([], ["--force"]):
        refused = launch("toy", "--out", "mine", *words)
        one_sentence(refused, "mine holds runs, and no run.json says that a job wrote that", "--out")
        assert sorted(p.name for p in (tmp_path / "mine").rglob("*")) == ["runs", "thesis.txt"]


def test_the_project_s_jobs_delete_nothing_of_yours(launch, tmp_path):
    "`compare --out data` emptied data/runs, `train --out X` removed X/checkpoints."
    for name, folder in (("compare", "runs"), ("train", "checkpoints"), ("prepare", "queries")):
        (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / folder / "thesis.txt").write_text("years of work")
        refused = launch(name, "-f", f"{name}_smoke", "--out", name, "--force")
        one_sentence(refused, f"{name} holds {folder}, and no run.json")
        assert (tmp_path / name / folder / "thesis.txt").read_text() == "years of work"


def test_forcing_leaves_nothing_of_the_run_before(job, launch, tmp_path):
    job("50_toy", PARAMETERS, WRITES)
    assert launch("toy", "--out", "run").returncode == 0
    (tmp_path / "run" / "notes.md").write_text("mine")
    assert launch("toy", "--out", "run", "--force", "-p", "steps", "1").returncode == 0
    assert files(tmp_path / "run") == ["0.txt", "notes.md", "toy.html", "toy.ipynb", "x-1"]   # parts may be used again
    marker = json.loads((tmp_path / "run" / "run.json").read_text())
    assert marker["state"] == "finished"
    assert sorted(marker["wrote"]) == ["0.txt", "parts", "parts/x-1", "toy.html", "toy.ipynb"]


@pytest.mark.parametrize("resume, left", [("false", ["0.txt"]), ("true", ["0.txt", "1.txt", "2.txt"])])
def test_resuming_keeps_what_a_fresh_run_deletes(job, launch, tmp_path, resume, left):
    job("50_toy", PARAMETERS + "\nresume: bool = False", WRITES)
    assert launch("toy", "--out", "run").returncode == 0
    lists = "from pathlib import Path\nprint(sorted(p.name for p in Path(out, 'parts').glob('*')))\n"
    job("50_toy", PARAMETERS + "\nresume: bool = False", lists + WRITES)
    again = launch("toy", "--out", "run", "--force", "-p", "steps", "1", "-p", "resume", resume)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == ("['x-1']" if resume == "true" else "[]")
    assert [f for f in files(tmp_path / "run") if f.endswith(".txt")] == left


def test_wrong_parameters_delete_nothing(job, launch, tmp_path):
    job("50_toy", PARAMETERS, WRITES)
    assert launch("toy", "--out", "run").returncode == 0
    before = files(tmp_path / "run")
    refused = launch("toy", "--out", "run", "--force", "-p", "settings", "{first: {most: 1.5}}")
    one_sentence(refused, "'settings.first.most'", "must be int")
    assert files(tmp_path / "run") == before


def test_what_a_run_would_delete_is_not_its_input(job, launch, tmp_path):
    job("50_toy", PARAMETERS, WRITES)
    assert launch("toy", "--out", "run").returncode == 0
    refused = launch("toy", "--out", "run", "--force", "-p", "note", "run/2.txt")
    one_sentence(refused, "'note' names run/2.txt", "copy it elsewhere")
    (tmp_path / "run" / "2.txt").write_text("labelled by hand")
    one_sentence(launch("toy", "--out", "run", "--force"), "run/2.txt was changed after the job had written it")
    assert (tmp_path / "run" / "2.txt").read_text() == "labelled by hand"
    assert (tmp_path / "run" / "0.txt").exists()


def test_a_directory_of_another_job(job, launch, tmp_path):
    job("50_toy", PARAMETERS, WRITES)
    job("51_other", PARAMETERS, WRITES)
    assert launch("toy", "--out", "run").returncode == 0
    one_sentence(launch("other", "--out", "run", "--force"), "run is the directory of a run of the job 'toy'")


def test_two_jobs_at_once(job, launch, tmp_path, started):
    "The second one says so, and leaves the first alone."
    job("50_toy", PARAMETERS, "import os, time\nfrom pathlib import Path\nprint('kernel', os.getpid(), flush=True)\n"
        "while not Path('go').exists(): time.sleep(.05)\nPath(out, 'done.txt').touch()")
    process, _ = started()
    for words in ([], ["--force"]):
        one_sentence(launch("toy", "--out", "run", *words), "run is in use by another job", "--out")
    (tmp_path / "go").touch()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert files(tmp_path / "run") == ["done.txt", "toy.html", "toy.ipynb"]


def test_a_killed_job_leaves_no_lock(job, launch, tmp_path, started):
    "Its list is kept while it runs, so that the next run can clear what it left."
    job("50_toy", PARAMETERS, "import os, time\nfrom pathlib import Path\nPath(out, 'old.txt').touch()\n"
        "print('kernel', os.getpid(), flush=True)\ntime.sleep(600)")
    process, kernel = started()
    for _ in range(600):
        if "old.txt" in json.loads((tmp_path / "run" / "run.json").read_text())["wrote"]: break
        time.sleep(0.1)
    process.kill()
    process.wait()
    job("50_toy", PARAMETERS, WRITES)
    result = launch("toy", "--out", "run", "-p", "steps", "1")
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "run") == ["0.txt", "toy.html", "toy.ipynb", "x-1"] and gone(kernel)


def test_the_home_directory_in_out(job, launch, tmp_path):
    job("50_toy", PARAMETERS, "print(out)")
    result = launch("toy", "--out", "~/run", HOME=str(tmp_path / "home"))
    assert result.returncode == 0 and result.stdout.strip() == str(tmp_path / "home" / "run"), result.stderr
    assert files(tmp_path / "home" / "run") == ["toy.html", "toy.ipynb"] and not (tmp_path / "~").exists()
