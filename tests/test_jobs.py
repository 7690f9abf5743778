"""The launcher as a process: what it prints, how it exits, what it leaves on disk."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import LAUNCHER, REPO
from nbformat import read

PARAMETERS = '''steps: int = 3           # how many
lr: float = 1e-3         # learning rate
note: str | None = None  # a remark
out: str = "data/runs/toy"  # where the results go'''


def one_sentence(result, *words):
    "The command failed before anything ran, with one line on stderr that has these words in it."
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words: assert word in result.stderr, result.stderr


def files(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file())


# ---- the project's own jobs

def test_every_job_has_its_parameters_tag_after_cleaning():
    "nbdev_clean strips tags unless settings.ini keeps them; papermill would then run the defaults, and exit with 0."
    for path in sorted((REPO / "nbs").glob("5[0-9]_*.ipynb")):
        tags = [t for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for t in c["metadata"].get("tags", [])]
        assert tags == ["parameters"], path.name


def test_every_parameter_file_fits_a_job():
    from bgem3_nb.jobs import JobError, find_jobs, plan_job
    jobs = [name for name, path in find_jobs().items() if path.parent.parent == REPO]
    for path in sorted((REPO / "params").glob("*.yaml")):
        def fits(job):
            try: return plan_job(job, [str(path)])
            except JobError as e: return print(e)
        assert any(map(fits, jobs)), path.name


def test_tags_survive_cleaning(tmp_path, env):
    "On a copy of this project's settings."
    from shutil import copy
    (tmp_path / "nbs").mkdir()
    copy(REPO / "settings.ini", tmp_path)
    for path in (REPO / "nbs").glob("5[0-9]_*.ipynb"): copy(path, tmp_path / "nbs")
    before = [p.read_bytes() for p in sorted((tmp_path / "nbs").iterdir())]
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"], cwd=tmp_path, env=env, check=True)
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
    job("50_toy", PARAMETERS, "print(f'{steps=} {lr=} {note=} {out=}')", "{'a table': steps}")
    (tmp_path / "small.yaml").write_text("lr: 1e-2\nsteps: 7\n")
    result = launch("toy", "-f", "small.yaml", "-p", "steps", "2", "--out", "run")
    assert result.returncode == 0, result.stderr
    assert "steps=2 lr=0.01 note=None out='run'" in result.stdout and "{'a table': 2}" in result.stdout
    assert files(tmp_path / "run") == ["toy.html", "toy.ipynb"]
    page = (tmp_path / "run" / "toy.html").read_text(encoding="utf-8")
    assert "steps=2" in page and "50_toy" in page
    assert str(tmp_path) not in json.dumps(read(tmp_path / "run" / "toy.ipynb", 4).metadata)


def test_kernel_is_this_interpreter_and_stands_here(job, launch, tmp_path):
    "Whatever is registered as `python3` on the machine, and with the clone on its path."
    fake = tmp_path / "jupyter" / "kernels" / "python3"
    fake.mkdir(parents=True)
    (fake / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    job("50_toy", PARAMETERS, "import os, sys, bgem3_nb\nprint(sys.executable, os.getcwd(), bgem3_nb.__file__, sep='|')")
    result = launch("toy", "--no-progress", JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert result.returncode == 0, result.stderr
    executable, here, package = result.stdout.strip().split("|")
    assert executable == sys.executable and os.path.samefile(here, tmp_path)
    assert package == str(REPO / "bgem3_nb" / "__init__.py")


def test_no_progress_is_quiet(job, launch):
    job("50_toy", PARAMETERS + "\nprogress: bool = True", "from tqdm.auto import tqdm\nfor i in tqdm([1]): pass\nprint(progress)")
    loud, quiet = launch("toy", "--out", "loud"), launch("toy", "--out", "quiet", "--no-progress")
    assert loud.stdout == "True\n" and "50_toy" in loud.stderr and "1/1" in loud.stderr and "IProgress" not in loud.stderr
    assert quiet.stdout == "False\n" and quiet.stderr.count("\n") == 1, quiet.stderr


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
    job("50_toy", PARAMETERS, "open(out + '/part.txt', 'w').write('done')", "raise ValueError('x.jsonl, line 7: no positive')", "print('after')")
    result = launch("toy", "--out", "run", "--no-progress")
    assert result.returncode == 1 and "after" not in result.stdout and "Traceback" not in result.stderr
    assert "failed: ValueError: x.jsonl, line 7: no positive" in result.stderr and "run/toy.failed.ipynb" in result.stderr
    assert files(tmp_path / "run") == ["part.txt", "toy.failed.ipynb"]
    errors = [o for c in read(tmp_path / "run" / "toy.failed.ipynb", 4).cells for o in c.get("outputs", []) if o.output_type == "error"]
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
    job("50_toy", PARAMETERS, "import os, time\ntry:\n    print('kernel', os.getpid(), flush=True)\n    time.sleep(60)\n"
        "finally: open(out + '/cleaned.txt', 'w').close()", "print('after')")
    process, kernel = started()
    process.send_signal(sig)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    assert "after" not in stdout and "Traceback" not in stderr and sig.name in stderr
    assert files(tmp_path / "run") == ["cleaned.txt", "toy.failed.ipynb"]
    assert gone(kernel)


def test_stopped_at_once(job, tmp_path, started):
    "A cell that takes no notice of Ctrl-C does not outlive the second one."
    job("50_toy", PARAMETERS, "import os, time\nprint('kernel', os.getpid(), flush=True)\nwhile True:\n"
        "    try: time.sleep(60)\n    except KeyboardInterrupt: print('no', flush=True)")
    process, kernel = started()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert files(tmp_path / "run") == ["toy.failed.ipynb"] and gone(kernel)
