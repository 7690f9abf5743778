"""What `make test` runs: every check in turn, each timed, and a closing line with the count. Stops at nothing, fails if anything failed."""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).parent.parent
bin = Path(sys.executable).parent
work = Path(tempfile.mkdtemp(prefix="bgem3_nb-test-"))
net_log = work / "network.log"
offline = os.environ | {"PYTHONPATH": str(root / "tests" / "offline"), "BGEM3_NB_NET_LOG": str(net_log), "MPLBACKEND": "agg"}


def call(*words, cwd=root, env=offline):
    "Run a command; its failure is an exception."
    subprocess.run([str(w) for w in words], cwd=cwd, env=env, check=True)


def copy_tree(target):
    "The tracked and the new files of the project, without what is ignored."
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, check=True).stdout
    for name in filter(None, listing.decode().split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def modules_equal_notebooks():
    "Exporting and cleaning the notebooks again changes no file, and README.md is the index notebook's."
    copy = work / "copy"
    copy_tree(copy)
    call(bin / "nbdev_export", cwd=copy)
    call(bin / "nbdev_clean", cwd=copy)
    names = [p.relative_to(copy) for folder in ("nbs", "bgem3_nb") for p in sorted((copy / folder).rglob("*")) if p.suffix in (".ipynb", ".py")]
    changed = [str(n) for n in names if not (root / n).is_file() or not filecmp.cmp(root / n, copy / n, shallow=False)]
    if changed: raise AssertionError(f"run nbdev_export and nbdev_clean; these differ: {', '.join(changed)}")
    call(sys.executable, "tools/readme.py", "--check")


def notebooks():
    "Every cell of every chapter runs and its tests hold."
    call(bin / "nbdev_test", "--n_workers", "2", "--timing")


def processes_and_files():
    "What notebooks can not hold: processes, kills, the command line."
    call(sys.executable, "-m", "pytest", "-q", "tests")


def jobs():
    "Every job through the launcher, at its smallest."
    sys.path.insert(0, str(root))
    from bgem3_nb.jobs import jobs as all_jobs
    for name in all_jobs():
        smoke = root / "params" / f"{name}_smoke.yaml"
        if not smoke.is_file(): raise AssertionError(f"the job {name} has no {smoke.relative_to(root)}")
        call(bin / "bgem3-job", name, "-f", smoke, "--out", work / "runs" / name)


def nothing_asked_the_network():
    "No notebook, test or job tried to reach another machine."
    if net_log.exists(): raise AssertionError(f"connections were tried:\n{net_log.read_text()}")


LIGHT = """
import sys, bgem3_nb
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, f"import bgem3_nb loads {heavy}"
assert "site-packages" in bgem3_nb.__file__, bgem3_nb.__file__
from bgem3_nb import M3Encoder, M3Trainer, load_source
"""


def packages():
    "sdist, a wheel from it, both installed in empty environments, the package used from there."
    copy, env = work / "package", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    copy_tree(copy)
    call(sys.executable, "-m", "build", "--outdir", work / "dist", cwd=copy, env=env)
    for pattern, extra in (("*.whl", "[jobs]"), ("*.tar.gz", "")):
        venv, file = work / f"venv{pattern[-3:]}", next((work / "dist").glob(pattern))
        call(sys.executable, "-m", "venv", venv, env=env)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", root / "constraints.txt"]
        call(*pip, "torch", env=env)
        call(*pip, f"{file}{extra}", env=env)
        call(venv / "bin" / "python", "-c", LIGHT, cwd=work, env=env)
        call(venv / "bin" / "bgem3-job", "list", cwd=work, env=env)
        call(venv / "bin" / "bgem3-job", "train", "-f", "quran.yaml", "--dry-run", cwd=work, env=env)
        shutil.rmtree(venv)


def main():
    checks = [modules_equal_notebooks, notebooks, processes_and_files, jobs, nothing_asked_the_network, packages]
    if names := sys.argv[1:]: checks = [c for c in checks if c.__name__ in names]
    failed = []
    for check in checks:
        print(f"== {check.__name__}: {check.__doc__}", flush=True)
        start = time.perf_counter()
        try: check()
        except (AssertionError, subprocess.CalledProcessError, OSError) as e:
            failed.append(check.__name__)
            print(f"FAILED {check.__name__}: {e}", flush=True)
        print(f"-- {check.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print(f"failed: {', '.join(failed)}" if failed else "all checks hold")
    print(f"{len(checks) - len(failed)} passed, {len(failed)} failed", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__": main()
