"""What `make test` runs: every check, each timed, and a last line with the count. It goes on after a failure.

    python tools/test.py                    all checks
    python tools/test.py notebooks jobs     some of them
    python tools/test.py lowest_versions    the core with the lowest versions that settings.ini allows; only by name

As many processes run side by side as there are cores, up to four, each with two threads for its arithmetic.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from threading import BoundedSemaphore, Lock

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tests"))
from forks import run_forked, Server  # noqa: E402

bin = Path(sys.executable).parent
SIDE_BY_SIDE = min(os.cpu_count() or 1, 4)   # a process with a model needs up to 3 GB
MOST = max(1, SIDE_BY_SIDE - 1)   # places of chapters or tests: one other command fills the cores while they wait
IGNORED = shutil.ignore_patterns(".venv", ".git", "_*", "*.egg-info", "__pycache__", "build", "dist", "runs", "cache",
                                 ".*_cache", ".ipynb_checkpoints")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# The processes side by side share the cores: a waiting thread must not spin. There are two in each, not one, since what
# the encoder does in several threads would otherwise not be tested.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
places, building = BoundedSemaphore(SIDE_BY_SIDE), Lock()


def shown(words):
    "A command as it is printed: without the program code that it passes on, and the project's own path."
    return " ".join(str(w).replace(f"{root}/", "") for w in words if "\n" not in str(w))


def call(*words, cwd=root, env=None, quiet=False, run=subprocess.run, taking=1):
    """Run a command when there are the places that it takes; its failure is an exception. A quiet one prints only when
    it fails."""
    with ExitStack() as taken:
        for _ in range(taking): taken.enter_context(places)
        print("$", shown(words), flush=True)
        start = time.perf_counter()
        done = run([str(w) for w in words], cwd=cwd, env=env or offline, text=True,
                   stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None)
    if done.returncode and quiet: print(f"{shown(words)} printed:\n{done.stdout}", flush=True)
    done.check_returncode()
    return time.perf_counter() - start


def side_by_side(task, names):
    "Run a task for each name, some at a time; say how long each took, and name those that failed."
    def run(name):
        try: seconds = task(name)
        except (AssertionError, OSError, subprocess.CalledProcessError) as e: return f"{name} ({e})"
        print(f"   {name} passed in {seconds:.0f} s", flush=True)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool: failed = list(filter(None, pool.map(run, names)))
    if failed: raise AssertionError(f"these fail: {', '.join(failed)}")


def plain_environment():
    "The environment without what would lend a fresh installation the modules of this one."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def copy_tree(target):
    "A copy of the project as it was when the checks began, so that no check changes the project itself."
    return shutil.copytree(as_it_was(), target)


@cache
def as_it_was():
    "A copy of the project without what is ignored."
    target = work / "as_it_was"
    if (root / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True)
    if not (root / ".git").exists() or listing.returncode:  # no clone, or no git
        shutil.copytree(root, target, ignore=lambda d, names: IGNORED(d, names) - {"_quarto.yml", "_modidx.py"})
        return target
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def generated(top):
    "The content of each notebook and module below a folder."
    files = (p for folder in ("nbs", "bgem3_nb") for p in (top / folder).rglob("*") if p.suffix in (".ipynb", ".py"))
    return {p.relative_to(top): p.read_bytes() for p in files if ".ipynb_checkpoints" not in p.parts}


def modules_equal_notebooks():
    "Exporting and cleaning the notebooks again changes no file, and README.md is the index notebook's."
    copy = copy_tree(work / "copy")
    call(bin / "nbdev_export", cwd=copy)
    call(bin / "nbdev_clean", cwd=copy)
    call(sys.executable, "tools/readme.py", "--check", cwd=copy)
    after, before = generated(copy), generated(root)
    changed = sorted(str(n) for n in after.keys() | before.keys() if after.get(n) != before.get(n))
    if changed: raise AssertionError(f"run nbdev_export and nbdev_clean; these differ: {', '.join(changed)}")


def house_rules():
    "The notebooks show their code, in cells and lines of the size that CONTRIBUTING.md says."
    call(sys.executable, "tools/house.py", "--check", quiet=True)


def notebooks():
    "Every cell of every chapter runs and its tests hold, each chapter in a process of its own; jobs are run below."
    call(sys.executable, "tools/notebooks.py", SIDE_BY_SIDE, *sorted((root / "nbs").glob("*.ipynb")), taking=MOST)


def processes_and_files():
    "What notebooks cannot hold: processes, kills, the command line."
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", SIDE_BY_SIDE, "--dist", "worksteal",
         "--basetemp", work / "pytest", "-o", "tmp_path_retention_policy=failed", "tests", taking=MOST)
    shutil.rmtree(work / "pytest", ignore_errors=True)


@cache
def sdist_and_wheel():
    copy = copy_tree(work / "package")
    call(sys.executable, "-m", "build", "--outdir", work / "dist", cwd=copy, env=plain_environment(), quiet=True)
    [sdist], [wheel] = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    return sdist, wheel


def built():
    "The sdist, and the wheel that was made from it; built once."
    with building: return sdist_and_wheel()


def jobs():
    """Every job at its smallest, from the wheel and in an empty directory; `compare`, which needs benchmarks/peers.py,
    from the clone."""
    installed, empty = work / "installed", work / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
         "--target", installed, built()[1], quiet=True)
    env, clone = (offline | {"PYTHONPATH": f"{top}{os.pathsep}{offline['PYTHONPATH']}"} for top in (installed, root))
    there = f"import bgem3_nb; assert bgem3_nb.__file__.startswith({str(installed)!r}), bgem3_nb.__file__"
    call(sys.executable, "-c", there, cwd=empty, env=env)
    found = "from bgem3_nb.jobs import find_jobs; print(*find_jobs())"
    names = subprocess.check_output([sys.executable, "-c", found], cwd=empty, env=env, text=True).split()
    for name in names:
        if not (root / "params" / f"{name}_smoke.yaml").is_file():
            raise AssertionError(f"the job {name} has no params/{name}_smoke.yaml")

    # The libraries are loaded once, and each job and its kernel forked from the process that has them; `packages` runs
    # the command as a user does. Forking a process that has loaded torch is safe on Linux alone.
    server = Server(offline) if sys.platform == "linux" else None
    forked = partial(run_forked, server.address, timeout=None) if server else subprocess.run

    def run(name):
        seconds = call(sys.executable, installed / "bin" / "bgem3-job", name, "-f", f"{name}_smoke", "--out",
                       f"runs/{name}", cwd=empty, env=clone if name == "compare" else env, quiet=True, run=forked)
        for file in (f"{name}.ipynb", f"{name}.html"):
            if not (empty / "runs" / name / file).is_file(): raise AssertionError(f"the job {name} left no {file}")
        return seconds
    try: side_by_side(run, names)
    finally:
        if server: server.close()


def site():
    "The site builds, and every page, formula and link of it holds."
    if sys.version_info < (3, 11) and not shutil.which("quarto"):
        return print("not built here: smalldocs needs Python 3.11, and there is no Quarto")
    copy = copy_tree(work / "site")
    path = f"{offline['PYTHONPATH']}{os.pathsep}{copy}"
    call(sys.executable, "tools/docs.py", cwd=copy, env=offline | {"PYTHONPATH": path}, quiet=True)


def nothing_asked_the_network():
    "No notebook, test or job above tried to reach another machine."
    if net_log.exists(): raise AssertionError(f"connections were tried:\n{net_log.read_text()}")


ALONE = """
import sys, bgem3_nb
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, f"import bgem3_nb loads {heavy}"
assert "site-packages" in bgem3_nb.__file__, bgem3_nb.__file__
"""
INSTALLED = ALONE + "for name in bgem3_nb.__all__: getattr(bgem3_nb, name)\n"


def packages():
    "sdist, a wheel from it, each installed in an empty environment, alone and with what it needs, and used from there."
    env, (sdist, wheel) = plain_environment(), built()
    for file, needs in ((sdist, False), (wheel, True)):
        venv = work / f"venv-{file.suffix[1:]}"
        python, what = venv / "bin" / "python", ["--no-deps", file]
        if needs: what = ["-c", root / "constraints.txt", f"{file}[all]"]
        call(sys.executable, "-m", "venv", venv, env=env)
        call(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what, cwd=work, env=env, quiet=True)
        call(python, "-c", INSTALLED if needs else ALONE, cwd=work, env=env)
        call(venv / "bin" / "bgem3-job", "list", cwd=work, env=env, quiet=True)
        for name in ("prepare", "project") if needs else ():
            call(venv / "bin" / "bgem3-job", name, "-f", f"{name}_smoke", "--out", venv / name, cwd=work,
                 env=env | OFFLINE | THREADS, quiet=True)
        shutil.rmtree(venv)


def release():
    "`make release` in a repository made for it: everything but the push."
    copy, env, version = copy_tree(work / "release"), plain_environment(), "99.0.0"
    env |= {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "before"]):
        call("git", *words, cwd=copy, env=env)
    call(sys.executable, "tools/release.py", version, cwd=copy, env=env, quiet=True)
    git = lambda *words: subprocess.run(["git", *words], cwd=copy, env=env, capture_output=True, text=True).stdout
    assert git("tag", "--points-at", "HEAD") == f"v{version}\n", "the tag is not on the last commit"
    assert git("status", "--porcelain") == "", "the release leaves something uncommitted"
    changed = {"settings.ini", "CITATION.cff", "CHANGELOG.md", "bgem3_nb/__init__.py"}
    assert set(git("diff", "--name-only", "HEAD~").split()) == changed, "other files than those with a version changed"
    assert {f.name for f in (copy / "dist").iterdir()} == {
        f"bgem3_nb-{version}.tar.gz", f"bgem3_nb-{version}-py3-none-any.whl"}, "dist does not hold the two packages"


CORE = ["00_backbone", "01_model", "02_encoding", "10_losses", "11_distillation", "14_training", "97_embedded",
        "98_packed"]


def lowest_versions():
    """The core's chapters and tests, with the lowest versions that settings.ini allows (on Python 3.10 or 3.11, which
    have wheels of them)."""
    from importlib.metadata import version
    lines = (root / "settings.ini").read_text(encoding="utf-8").splitlines()
    names = dict(line.split(" = ", 1) for line in lines if " = " in line)
    lowest = {n: v for n, v in (need.split(">=") for need in names["requirements"].split())}
    lowest["torch"] = version("torch").split("+")[0]  # as here: earlier ones bring CUDA's libraries on Linux, gigabytes
    (work / "lowest.txt").write_text("".join(f"{n}=={v}\n" for n, v in lowest.items()))
    env, venv, copy = plain_environment(), work / "venv-lowest", copy_tree(work / "lowest")
    call(sys.executable, "-m", "venv", venv, env=env)
    call(venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
         "-c", work / "lowest.txt", "ipython<9.19", f"{copy}[dev]", env=env, quiet=True)
    below = offline | {"PYTHONPATH": f"{copy}{os.pathsep}{offline['PYTHONPATH']}"}
    versions = f"from importlib.metadata import version\nfor n, v in {lowest}.items(): print(n, version(n))"
    call(venv / "bin" / "python", "-c", versions, env=below)

    def test(name):
        return call(venv / "bin" / "nbdev_test", "--path", copy / "nbs" / f"{name}.ipynb", "--n_workers", "0", cwd=copy,
                    env=below, quiet=True)
    side_by_side(test, CORE)
    tests = [copy / "tests" / f"test_{name}.py" for name in ("backbone", "loading", "encoding", "training")]
    call(venv / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=copy, env=below)


# The checks of one list run at the same time. Chapters and tests run in as many processes as there are cores, which
# often wait for others, and beside them one command of another check. What asked the network is looked at when
# everything that could ask has ended.
WAVES = [[modules_equal_notebooks, house_rules], [notebooks, site, packages, release], [processes_and_files, jobs],
         [nothing_asked_the_network]]
ON_REQUEST = [lowest_versions]  # not part of the whole


def passes(check):
    "Whether a check passes; says so, and how long it took."
    print(f"== {check.__name__}: {' '.join(check.__doc__.split())}", flush=True)
    start, end = time.perf_counter(), "passed"
    try: check()
    except (AssertionError, subprocess.CalledProcessError, OSError, ValueError) as e:
        end = "failed"
        print(f"FAILED {check.__name__}: {e}", flush=True)
    print(f"-- {check.__name__}: {end} in {time.perf_counter() - start:.0f} s\n", flush=True)
    return end == "passed"


def main():
    known = {check.__name__: check for check in sum(WAVES, ON_REQUEST)}
    if unknown := set(sys.argv[1:]) - known.keys():
        sys.exit(f"no such check: {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = set(sys.argv[1:]) or known.keys() - {c.__name__ for c in ON_REQUEST}
    waves = [[check for check in wave if check.__name__ in wanted] for wave in [*WAVES, ON_REQUEST]]
    began, results = time.perf_counter(), {}
    as_it_was()      # before chapters and tests write files
    for wave in filter(None, waves):
        with ThreadPoolExecutor(len(wave)) as pool: results |= zip(wave, pool.map(passes, wave))
    failed = [check.__name__ for check, passed in results.items() if not passed]
    if failed: print(f"failed: {', '.join(failed)}")
    used = os.times()
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed in {time.perf_counter() - began:.0f} s "
          f"({used.children_user + used.children_system:.0f} s of processor time)", flush=True)
    return bool(failed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bgem3_nb-test-") as folder:
        work = Path(folder)
        net_log = work / "network.log"
        offline = os.environ | OFFLINE | THREADS | {"PYTHONPATH": str(root / "tests" / "offline"),
                                                    "BGEM3_NB_NET_LOG": str(net_log), "TMPDIR": folder}
        offline.pop("MPLBACKEND", None)
        code = main()
    sys.exit(code)
