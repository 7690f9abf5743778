"""Python processes that are forked from one that has loaded the libraries and the embedded model's tokenizer, since
loading them takes longer than most jobs of the tests run. The package itself is loaded by each process anew.

`Forked` is `subprocess.Popen` for `[python, "-c", code, …]`, `[python, "-m", module, …]` and `[python, file, …]`: a
process of its own with its own environment, directory, streams and signals. Kernels that it starts are forked from the
same process. When the one who asked for it is gone, it is killed.
"""
import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType


class Forked(subprocess.Popen):
    "A process that the server at `address` forks; streams, signals and results as those of any `Popen`."
    def __init__(self, address, args, **more):
        self.address = address
        super().__init__(args, **more)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, *process_group):
        assert args[0] == sys.executable, args
        streams = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        asked = [list(map(str, args[1:])), str(cwd or os.getcwd()), dict(os.environ if env is None else env),
                 bool(start_new_session)]
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(self.address)
        socket.send_fds(self.connection, [b"+"], streams)
        self.connection.sendall(json.dumps(asked).encode() + b"\n")
        self.answers = self.connection.makefile("r")
        self.pid, self._child_created = int(self.answers.readline()), True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _wait(self, timeout):
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.answers.readline() or -signal.SIGKILL)   # nothing: the server is gone
            self.answers.close()
            self.connection.close()
        return self.returncode

    def _internal_poll(self, *ignored, **also_ignored):
        try: return self._wait(0) if self._child_created else None
        except subprocess.TimeoutExpired: return None


def run_forked(address, args, timeout=1800, **more):
    "Run a command as `subprocess.run` does; what it prints is caught if nothing else is said."
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with Forked(address, args, **{**pipes, **more}) as process:
        try: out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


class Server:
    "The process that forks the others; it ends with the one that started it."
    def __init__(self, env):
        self.folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.address = f"{self.folder.name}/socket"
        self.process = subprocess.Popen([sys.executable, __file__, self.address], env=env, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        if self.process.stdout.readline() != b"ready\n": raise OSError("the process that forks others did not start")

    def close(self):
        self.process.communicate()
        self.folder.cleanup()


def load():
    "Load what jobs, kernels and the launcher load."
    import accelerate, bm25s, datasets, ir_measures, matplotlib.backends.backend_agg, matplotlib.figure   # noqa: E401
    import pandas, scipy.sparse, scipy.stats, torch, tqdm.auto                             # noqa: E401, F401
    import ipykernel.kernelapp, nbconvert.exporters, nbformat, papermill                   # noqa: E401, F401
    from jupyter_client import launcher, AsyncKernelManager                                # noqa: F401
    from transformers import AutoModel, Trainer                                            # noqa: F401
    from transformers.models.xlm_roberta import modeling_xlm_roberta                       # noqa: F401
    keep_tokenizer(embedded_folder())
    return launcher


def embedded_folder():
    "The directory of the embedded model. The package that tells it is forgotten, so that each process loads its own."
    from bgem3_nb.embedded import embedded_path
    path = embedded_path(progress=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "bgem3_nb"]: del sys.modules[name]
    return path


def keep_tokenizer(path):
    """Load a directory's tokenizer now. Each process forked from this one gets it where it would load it first, if no
    file of the directory has changed; it loads all others, and this one a second time, as always."""
    from transformers import AutoTokenizer
    load = AutoTokenizer.from_pretrained

    def state(): return [(p.name, s.st_mtime_ns, s.st_size) for p in sorted(Path(path).iterdir()) for s in [p.stat()]]
    then, kept = state(), [load(path, trust_remote_code=False)]

    def from_pretrained(name, *more, **settings):
        same = str(name) == str(path) and not more and settings in ({}, {"trust_remote_code": False})
        if same and kept and Path(path).is_dir() and state() == then: return kept.pop()
        return load(name, *more, **settings)
    AutoTokenizer.from_pretrained = from_pretrained


def take_over(cwd, env, streams):
    "Give this process the directory, environment and streams, and what libraries read from them when they are loaded."
    for own, fd in enumerate(streams): os.dup2(fd, own)
    for fd in streams: os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(fd, mode, encoding="utf-8", errors="backslashreplace" if fd == 2 else "strict", closefd=False)
        if fd: stream.reconfigure(write_through=bool(env.get("PYTHONUNBUFFERED")), line_buffering=fd == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[:] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    import matplotlib
    import numpy
    import tqdm
    numpy.random.seed()
    if backend := env.get("MPLBACKEND"): matplotlib.rcParams["backend"] = backend
    if env.get("TQDM_DISABLE"): tqdm.std.tqdm.__init__ = partial_method(tqdm.std.tqdm.__init__, disable=True)


def partial_method(function, **defaults):
    "A method with other defaults."
    return lambda self, *args, **more: function(self, *args, **{**defaults, **more})


def run(words):
    "Run the code, the module or the file that the words name, as `python` does; give the exit code."
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__builtins__ = __builtins__
    kind, what, *rest = words if words[0] in ("-c", "-m") else ("", *words)
    sys.argv = [kind if kind == "-c" else what, *rest]
    code = 0
    try:
        if kind == "-c": exec(compile(what, "<string>", "exec"), main.__dict__)
        elif kind == "-m": runpy.run_module(what, run_name="__main__", alter_sys=True)
        else: runpy.run_path(what, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, (int, type(None))): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try: stream.flush()
        except (OSError, ValueError): pass
    return code


def supervise(connection):
    "Fork the process that was asked for, and wait for it; it dies with the one who asked."
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    words, cwd, env, new_session = json.loads(connection.makefile("r").readline())
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)     # PR_SET_PDEATHSIG: it dies with the one who waits for it, too
        if new_session: os.setsid()
        connection.sendall(f"{os.getpid()}\n".encode())
        connection.close()
        take_over(cwd, env, streams)
        os._exit(run(words))
    for fd in streams: os.close(fd)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        if select.select([connection], [], [], .02)[0]: os.kill(pid, signal.SIGKILL)


def reap():
    "Take note of the processes that have ended, with their processor time."
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0): pass
    except ChildProcessError: pass   # there are no others


def serve(address):
    "Fork a process for each that is asked for, until the standard input ends."
    launcher = load()
    launcher.Popen = partial(Forked, address)    # a kernel is forked too
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            reap()
            if sys.stdin in ready: return
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                try: supervise(connection)
                except OSError: pass              # the one who asked is gone
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.path[:] = [p for p in sys.path if p != here]
    serve(sys.argv[1])
