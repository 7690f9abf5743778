"""Forked processes are processes as Python starts them: what the other tests may rely on."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_words import tiny_tokenizer
from transformers import AutoTokenizer

from forks import Forked, keep_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked there")
SEEN = """import json, os, sys
print(json.dumps({"argv": sys.argv, "name": __name__, "cwd": os.getcwd(), "own": os.environ.get("OWN"),
                  "path": sys.path[0], "package": [m for m in sys.modules if m.startswith("bgem3_nb")],
                  "here": __import__("bgem3_nb").__file__, "input": sys.stdin.read(), "pid": os.getpid()}))
print("xin chào", file=sys.stderr)"""


def test_streams_environment_and_place_are_its_own(python, env, tmp_path):
    "As a process that is started anew; the package is not loaded before."
    forked, started = python("-c", SEEN, "a", "b c"), python("-c", SEEN, "a", "b c", forked=False)
    assert (forked.returncode, started.returncode) == (0, 0)
    assert forked.stderr == started.stderr == "xin chào\n"
    a, b = json.loads(forked.stdout), json.loads(started.stdout)
    assert a.pop("pid") != b.pop("pid") and a == b
    assert (a["argv"], a["cwd"], a["package"], a["own"]) == (["-c", "a", "b c"], str(tmp_path), [], None)
    env["OWN"] = "1"
    assert json.loads(python("-c", SEEN).stdout)["own"] == "1"


@pytest.mark.parametrize("code, returned, said", [
    ("import sys; sys.exit(3)", 3, ""), ("import sys; sys.exit('no file')", 1, "no file\n"),
    ("import atexit; atexit.register(print, 'end')", 0, ""), ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ("import socket; socket.create_connection(('example.org', 80))", 1, "example.org was asked for")])
def test_ends_as_python_ends(python, env, code, returned, said):
    env["BGEM3_NB_NET_LOG"] = ""       # what is tried here on purpose is no attempt of a test
    forked, started = python("-c", code), python("-c", code, forked=False)
    assert forked.returncode == started.returncode == returned
    assert said in forked.stderr and said in started.stderr
    assert forked.stdout == started.stdout


def test_a_file_and_a_module(python, tmp_path):
    (tmp_path / "a.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    assert python("a.py", "x").stdout == python("-m", "a", "x").stdout == "__main__ ['x']\n"


def test_signals_reach_it_and_it_dies_with_the_one_who_asked(forks, env, tmp_path):
    wait = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    def begin():
        process = Forked(forks, wait, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"begun\n" and process.poll() is None
        return process
    killed = begin()
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    def forget(process):
        process.connection.close()
        process.answers.close()           # the last reference to the connection
    def state(process):
        "Its letter, and its parent; Z for one that has ended and that nobody waits for."
        try: return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError): return "Z", None
    def kill_parent(process): os.kill(int(state(process)[1]), signal.SIGKILL)
    for end_it in (forget, kill_parent):
        left, until = begin(), time.monotonic() + 600
        end_it(left)
        while state(left)[0] != "Z":
            assert time.monotonic() < until
            time.sleep(.01)
        left.stdout.close()
        left.returncode = 0


def test_a_kept_tokenizer_is_given_once_and_while_its_files_are_the_same(tmp_path, monkeypatch):
    load, tokenizer = AutoTokenizer.from_pretrained, tiny_tokenizer()
    def known(**settings): return AutoTokenizer.from_pretrained(tmp_path, **settings).convert_tokens_to_ids("new")
    def keep():
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
        keep_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    keep()
    first, second = (AutoTokenizer.from_pretrained(str(tmp_path)) for _ in range(2))
    assert first is not second and first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    keep()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path)
    assert known() == known(trust_remote_code=False) == len(tokenizer) - 1


def test_the_embedded_tokenizer_is_that_of_a_process_that_loads_it(python):
    code = ("import hashlib, sys\nfrom bgem3_nb.backbone import load_backbone\n_, t = load_backbone()\n"
            "rules = hashlib.md5(t.backend_tokenizer.to_str().encode()).hexdigest()\n"
            "print(type(t), rules, t.special_tokens_map, t.padding_side, t.model_max_length, t.init_kwargs)")
    forked, started = python("-c", code), python("-c", code, forked=False)
    assert forked.returncode == 0, forked.stderr
    assert forked.stdout == started.stdout
