"""Run every cell of the named chapters, each in a process of its own, some side by side.

    python tools/notebooks.py 2 nbs/20_rows.ipynb nbs/40_evaluation.ipynb      # two at a time

The libraries that nearly every chapter needs, and the tokenizer of the embedded model, are loaded once, before the
processes are forked from this one: loading them takes as long as many a chapter runs. The package itself is loaded by
each chapter anew.
"""
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import scipy.stats  # noqa: F401
import sentence_transformers  # noqa: F401
import torch  # noqa: F401
from book import hide_others
from nbdev.config import get_config
from nbdev.test import test_nb
from transformers import Trainer  # noqa: F401
from transformers.models.xlm_roberta import modeling_xlm_roberta  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from forks import embedded_folder, keep_tokenizer  # noqa: E402
sys.path.pop(0)


def run(path, log):
    "Run one chapter in this process, with what it prints in a file; give its exit code."
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try: passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
    except BaseException:
        traceback.print_exc()
        passed = False
    sys.stdout.flush()
    sys.stderr.flush()
    return 0 if passed else 1


def start(path):
    "Fork a process that runs one chapter; give its number, the file with what it prints, and when it began."
    log = tempfile.TemporaryFile("w+")
    if pid := os.fork(): return pid, (path, log, time.perf_counter())
    os._exit(run(path, log))


def main(places, paths):
    "Run chapters, so many at a time; name those that failed."
    waiting, running, failed = list(paths), {}, []
    while waiting or running:
        while waiting and len(running) < places: running.update([start(waiting.pop(0))])
        pid, status = os.wait()
        path, log, began = running.pop(pid)
        if status:
            failed.append(path.name)
            log.seek(0)
            print(f"{path.name} printed:\n{log.read()}")
        seconds = time.perf_counter() - began
        print(f"   {path.name} {'failed' if status else 'passed'} in {seconds:.0f} s", flush=True)
    if failed: sys.exit(f"these fail: {', '.join(failed)}")


if __name__ == "__main__":
    keep_tokenizer(embedded_folder())
    hide_others()      # a chapter has what its first cell installs on Colab
    main(int(sys.argv[1]), [Path(p).absolute() for p in sys.argv[2:]])
