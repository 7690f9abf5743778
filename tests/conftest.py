"""What all tests share: no network, job notebooks made on the spot, the command line as a process."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import process_time

import pytest
from hypothesis import settings
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from forks import Server, run_forked

REPO = Path(__file__).parent.parent
OFFLINE = REPO / "tests" / "offline"
LAUNCHER = [sys.executable, "-c", "import sys; from bgem3_nb.chains import main; sys.exit(main())"]
SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false"}

os.environ.update(SETTINGS)
settings.register_profile("no clock", deadline=None)     # on a busy machine an example may take any time
settings.load_profile("no clock")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:     # started in a shell's background; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(REPO))
if "sitecustomize" not in sys.modules or not hasattr(sys.modules["sitecustomize"], "is_local"):  # pytest run by hand
    sys.path.insert(0, str(OFFLINE))
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # noqa: F401

# Tests of these files take longest. They begin first, so that at the end no process waits for one of them.
FIRST = {f"test_{name}" for name in ("chains", "cases", "specialist_job", "several", "cluster", "serving", "reranking",
                                     "project_job", "train_job", "families", "hybrid_index")}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in FIRST)     # the others stay in their order


def processor_seconds(task):
    "The least processor time of three runs of a task: what others do on the machine hardly moves it."
    def once():
        start = process_time()
        task()
        return process_time() - start
    return min(once() for _ in range(3))


@pytest.fixture
def env(tmp_path, monkeypatch):
    "The environment of a child process: offline, the clone on its path, jobs from `tmp_path` beside the project's own."
    path = os.pathsep.join([str(OFFLINE), str(REPO)])
    return {**os.environ, **SETTINGS, "PYTHONPATH": path, "BGEM3_NB_JOBS": str(tmp_path), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def job(tmp_path):
    "A function that writes a job notebook: `job('50_toy', parameters, cell, cell)`."
    def make(name, parameters, *cells, tags=("parameters",)):
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        first = new_code_cell(parameters)
        first.metadata["tags"] = list(tags)
        write(new_notebook(cells=[new_markdown_cell(f"# {name}\n\n> A toy."), first, *map(new_code_cell, cells)]), path)
        return path
    return make


@pytest.fixture(scope="session")
def forks():
    "The process that has loaded the libraries and forks others, where forking is safe; see forks.py."
    if sys.platform != "linux": return (yield None)
    path, warnings = os.pathsep.join([str(OFFLINE), str(REPO)]), "ignore:IProgress not found"
    server = Server({**os.environ, **SETTINGS, "PYTHONPATH": path, "PYTHONWARNINGS": warnings})
    yield server.address
    server.close()


@pytest.fixture
def python(tmp_path, env, forks):
    """A function that runs a command of Python with its libraries loaded, in `tmp_path`; with a variable of its own, or
    with `forked=False`, as a process that has loaded nothing."""
    def run(*words, forked=True, **more):
        if forked and forks and not more: return run_forked(forks, [sys.executable, *words], cwd=tmp_path, env=env)
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env={**env, **more}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=1800)
    return run


@pytest.fixture
def launch(python):
    "A function that runs `bgem3-job` with these arguments, in `tmp_path`."
    return lambda *args, **more: python(*LAUNCHER[1:], *args, **more)
