"""Several processes and machines: one training divided, failures named, checkpoints elsewhere, the files in deploy."""
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import LAUNCHER, REPO
from safetensors.torch import load_file
from tiny_run import tiny_model

from bgem3_nb.chains import main
from bgem3_nb.several_gpus import CheckpointStore, Processes, lost_connection
from bgem3_nb.training import _score_shared, check_same, from_first, leave_to_first, share_weights

PARAMETERS = "bad: int = -1  # process that fails\nhow: str = ''  # 'killed', 'waits'\nout: str = 'x'  # where"
CELLS = ("import os, signal, sys, time\nimport torch\nimport torch.distributed as dist\n"
         "rank = int(os.environ['RANK'])\ndist.init_process_group('gloo')",
         "print('process', rank, 'of', dist.get_world_size())\n"
         "if rank == bad and how == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
         "if rank == bad: raise ValueError('data/x.jsonl, line 7: no positive')\n"
         "if how == 'waits': open(f'{out}/waits-{rank}', 'w').close()\n"
         "if how == 'waits': time.sleep(0 if rank else 60)\n"
         "total = torch.ones(1)\ndist.all_reduce(total)",
         "#| echo: false\nassert rank == 0",     # figures are the first process's
         "def leave_to_first():\n    dist.barrier()\n    if rank: raise SystemExit(0)",
         "leave_to_first()\nopen(f'{out}/total', 'a').write(f'{rank}: {total.item():g}')")


@pytest.fixture
def toy(job, monkeypatch, tmp_path):
    job("50_toy", PARAMETERS, *CELLS)
    monkeypatch.setenv("BGEM3_NB_JOBS", str(tmp_path))


def begin(env, tmp_path, *args):
    return subprocess.Popen([*LAUNCHER, *map(str, args)], cwd=tmp_path, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def in_two(work, *args):
    "Call a function in two processes that are connected; return what each puts into a queue, by number."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        try: queue.put((rank, work(rank, *args)))
        except BaseException as e: queue.put((rank, f"{type(e).__name__}: {e}"))
        queue.close()
        queue.join_thread()
        os._exit(0)     # its threads can abort a process that ends in the usual way
    processes = [context.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for p in processes: p.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for p in processes: p.join(60)
    return found


def test_what_processes_share():
    "The first computes for all; other settings are refused by name; weights and scores are the same everywhere."
    from bgem3_nb.encoding import Embeddings
    draw = np.random.default_rng(0)
    sides = [Embeddings(dense=draw.normal(size=(n, 4)).astype(np.float32)) for n in (5, 7)]

    def work(rank):
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(layer.weight, rank + 1.)
        share_weights(layer)
        scores = _score_shared(*sides, shared=True, dtype=torch.float32, device="cpu")["dense"]
        return from_first(lambda: f"made by {rank}"), layer.weight.sum().item(), scores
    for made, weight, scores in in_two(work).values():
        assert (made, weight) == ("made by 0", 4.)
        assert np.allclose(scores, sides[0].dense @ sides[1].dense.T, atol=1e-6)

    said = in_two(lambda rank: check_same({"steps": 3, "seed": rank}))
    assert said[0] is None and "process 1 has another seed than process 0" in said[1]

    def leaving(rank):
        leave_to_first()
        return "goes on alone" if not dist.is_initialized() else ""
    assert in_two(leaving) == {0: "goes on alone", 1: "SystemExit: 0"}


def test_one_process_fails(toy, env, tmp_path):
    "All end, with the sentence of the one that failed first and exit code 1; its traceback is in its log."
    done = {name: begin(env, tmp_path, "toy", "--nproc", 2, "-p", "bad", bad, "-p", "how", how, "--out", name)
            for name, bad, how in [("first", 0, ""), ("other", 1, ""), ("killed", 1, "killed")]}
    said = {name: p.communicate(timeout=300)[1] for name, p in done.items()}
    assert {name: p.returncode for name, p in done.items()} == dict.fromkeys(done, 1), said
    assert "job 'toy' failed: ValueError: data/x.jsonl, line 7: no positive\n" in said["first"]
    assert "job 'toy' failed: process 1: ValueError: data/x.jsonl, line 7: no positive\n" in said["other"]
    assert "job 'toy' failed: process 1 was ended by SIGKILL (out of memory?)\n" in said["killed"]
    assert "the output of its processes: other/logs/process-1.log\n" in said["other"]
    assert "line 7: no positive" in (tmp_path / "other" / "logs" / "process-1.log").read_text()
    for name in done:
        assert not {"Traceback", "KeyboardInterrupt", "stopping"} & {*re.findall(r"\w+", said[name])}, said[name]
        assert {p.name for p in (tmp_path / name).iterdir()} - {".lock"} == {"logs", "run.json", "toy.failed.ipynb"}


def test_two_machines(toy, env, tmp_path):
    "Two launchers on this machine, with one process each: machine 0 has the results, machine 1 a log."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ["--nproc", 1, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{s.getsockname()[1]}"]
    machines = [begin(env, tmp_path, "toy", *meet, "--node-rank", rank, "--out", f"m{rank}") for rank in (1, 0)]
    said = [p.communicate(timeout=300)[1] for p in machines]
    assert [p.returncode for p in machines] == [0, 0], said
    assert (tmp_path / "m0" / "total").read_text() == "0: 2"
    assert "this machine's part has ended" in said[0]
    assert [p.name for p in (tmp_path / "m1").rglob("*")] == ["logs", "process-1.log"]
    assert "process 1 of 2" in (tmp_path / "m1" / "logs" / "process-1.log").read_text()


def children(pid):
    "All processes below one."
    found = [int(p) for t in Path(f"/proc/{pid}/task").glob("*") for p in (t / "children").read_text().split()]
    return found + [p for child in found for p in children(child)]


def test_ctrl_c_ends_all(toy, env, tmp_path):
    "The directory is locked while they run; Ctrl-C leaves a failed notebook, exit code 130 and no process."
    run = begin(env, tmp_path, "toy", "--nproc", 2, "-p", "how", "waits", "--out", "run")
    end = time.time() + 200
    while not all((tmp_path / "run" / f"waits-{rank}").exists() for rank in (0, 1)):
        assert run.poll() is None and time.time() < end, run.communicate()
        time.sleep(.1)
    second = begin(env, tmp_path, "toy", "--out", "run").communicate(timeout=100)[1]
    assert "in use by another job" in second
    started = children(run.pid)
    assert len(started) >= 3     # two processes and a kernel
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=100)[1]
    assert run.returncode == 130 and "was stopped by SIGINT" in said and "Traceback" not in said, said
    assert (tmp_path / "run" / "toy.failed.ipynb").exists()
    end = time.time() + 20
    while any(Path(f"/proc/{p}").exists() for p in started) and time.time() < end: time.sleep(.1)
    assert not [p for p in started if Path(f"/proc/{p}").exists()]


REFUSED = {
    "mine": (["mine", "--nproc", "2"], "'mine' runs in one process, as its work is not divided; --nproc is for: "),
    "project": (["project", "--nproc", "2"], "'project' runs in one process"),
    "specialist": (["specialist", "--nproc", "2"], "'specialist' runs in one process"),
    "a chain": (["run", "law", "--nproc", "2"], "--nproc is for one job"),
    "none": (["train", "--nproc", "0"], "must be at least 1"),
    "no address": (["train", "--nproc", "2", "--nnodes", "2"], "--rdzv-endpoint HOST:PORT"),
    "no such machine": (["train", "--nproc", "2", "--node-rank", "2"], "--node-rank must be from 0 to 0"),
    "out elsewhere": (["train", "--out", "s3://bucket/x"], "-p checkpoints URL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, capsys):
    words, wanted = REFUSED[name]
    assert main([*words, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1
    if name == "mine": assert "train" in said.split("--nproc is for: ")[1]


def test_a_lost_connection_is_no_other_error():
    assert lost_connection("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321")
    assert not lost_connection("HTTPConnectionPool(host='localhost'): Connection refused")
    assert "16 processes, 8 on each of 2" in str(Processes(8, 2, 0, "a:1"))


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    url = f"file://{tmp_path}/bucket/run" if request.param == "file" else f"memory://{tmp_path.name}/run"
    yield (made := CheckpointStore(url))
    if made.fs.exists(made.root): made.fs.rm(made.root, recursive=True)


def checkpoint(folder, step, text="weights"):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_text(f"{text} {step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path.name


def test_copies_of_checkpoints(store, tmp_path):
    "What the directory holds is what the store holds; another machine gets it, and nothing that is not whole."
    here, there = tmp_path / "here", tmp_path / "there"
    store.check()
    assert store.names() == {} and store.restore(there) == []
    for step in (5, 40, 100): store.keep(here, checkpoint(here, step))
    (here / "mined-1.parquet").write_text("rows")
    shutil.rmtree(here / "checkpoint-5")
    store.keep(here, checkpoint(here, 100, "other weights"))
    assert store.names().keys() == {"checkpoint-40", "checkpoint-100"}
    places = {p.split("/")[-1] for p in store.fs.ls(store.root, detail=False)}
    assert places == {f"{n}.json" for n in store.names()} | {m["place"] for m in store.names().values()}

    assert store.restore(there) == ["checkpoint-100", "checkpoint-40"]      # the newest first
    assert (there / "checkpoint-100" / "model.safetensors").read_text() == "other weights 100"
    assert (there / "mined-1.parquet").read_text() == "rows" and store.restore(there) == []
    assert not [p for p in there.iterdir() if p.name.startswith(".")]

    with pytest.warns(UserWarning, match="checkpoint-100 was not fetched: .*model.safetensors is damaged"):
        damaged = store.names()["checkpoint-100"]["place"]
        store.fs.pipe_file(f"{store.root}/{damaged}/checkpoint-100/model.safetensors", b"other weights 1O0")
        assert store.restore(tmp_path / "third") == ["checkpoint-40"]


def test_an_upload_that_is_cut_off(store, tmp_path, monkeypatch):
    "Cut off after any file, a copy is not seen, that of before stays whole, and the next one clears up."
    checkpoint(tmp_path, 7)
    store.put("checkpoint-7", tmp_path, ["checkpoint-7"])
    before = store.names()
    checkpoint(tmp_path, 7, "new weights")
    put_file = type(store.fs).put_file
    for files in (0, 1):
        left = [files]

        def cut_off(self, *args, **kwargs):
            if not left[0]: raise OSError("the machine is gone")
            left[0] -= 1
            return put_file(self, *args, **kwargs)
        with monkeypatch.context() as m:
            m.setattr(type(store.fs), "put_file", cut_off)
            with pytest.raises(OSError): store.put("checkpoint-7", tmp_path, ["checkpoint-7"])
            with pytest.warns(UserWarning, match="checkpoint-7 was not copied"): store.keep(tmp_path, "checkpoint-7")
        left[0] = files
        assert store.names() == before
        store.get("checkpoint-7", tmp_path / str(files))
        assert (tmp_path / str(files) / "checkpoint-7" / "model.safetensors").read_text() == "weights 7"
    store._write(f"{store.root}/checkpoint-9.json", b'{"place": "checkpo')
    assert store.names() == before
    store.keep(tmp_path, "checkpoint-7")
    assert len(store.fs.glob(f"{store.root}/checkpoint-7.*")) == 2      # one manifest, one place
    store.get("checkpoint-7", tmp_path / "last")
    assert (tmp_path / "last" / "checkpoint-7" / "model.safetensors").read_text() == "new weights 7"


def test_where_no_copy_can_be_made(tmp_path, monkeypatch):
    for url, package in {"s3://bucket/x": "s3fs", "gs://bucket/x": "gcsfs"}.items():
        monkeypatch.setitem(sys.modules, package, None)      # as where it is not installed
        with pytest.raises(ValueError, match=f"needs the package {package}.*pip install {package}"):
            CheckpointStore(url)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to .*check the address"):
        CheckpointStore(f"file://{tmp_path}/file/below").check()


def test_kubernetes(capsys):
    "The Service and the Job fit Kubernetes' schema and each other; the command is one that runs."
    import kubernetes_validate
    service, train = yaml.safe_load_all((REPO / "deploy" / "k8s_train.yaml").read_text())
    for one in (service, train): kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    pod, name = train["spec"]["template"]["spec"], train["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    container, = pod["containers"]
    assert container["command"] == ["bgem3-job"]
    words = [w.replace("$(JOB_COMPLETION_INDEX)", "1") for w in container["args"]]
    assert main([*words, "--dry-run"]) == 0
    said, port = capsys.readouterr().out, service["spec"]["ports"][0]["port"]
    gpus, nodes = container["resources"]["limits"]["nvidia.com/gpu"], train["spec"]["completions"]
    assert train["spec"]["parallelism"] == nodes and train["spec"]["completionMode"] == "Indexed"
    assert (f"{gpus * nodes} processes, {gpus} on each of {nodes} machines; this is machine 1, and they meet at "
            f"{name}-0.{service['metadata']['name']}:{port}") in said
    assert " resume               True " in said and "'s3://BUCKET/law'" in said


def test_slurm(env, tmp_path):
    "The script is read by bash and ShellCheck, and each node's command is one that runs."
    script = REPO / "deploy" / "slurm_train.sh"
    subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", "--severity=style", script],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    programs = {"scontrol": "printf 'node-a\\nnode-b\\n'", "srun": 'shift; exec "$@"',
                "bgem3-job": f'exec {LAUNCHER[0]} -c "{LAUNCHER[2]}" "$@"'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
             "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}{os.pathsep}{env['PATH']}"}
    done = subprocess.run(["bash", script, "-f", "law", "-p", "steps", "7", "--dry-run"], env=env | given, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 processes, 4 on each of 2 machines; this is machine 1, and they meet at node-a:20123" in done.stdout
    assert " steps                7 " in done.stdout and " resume               True " in done.stdout


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    "A tiny model and a few rows."
    path = tmp_path_factory.mktemp("material")
    tiny_model().save_pretrained(path / "model")
    rows = [{"query": f"điều {i} nói gì về {i * 7} ngày phép", "domain": "ab"[i % 3 == 0],
             "pos": [f"nội dung của điều {i}: nghỉ phép {i * 7} ngày"]} for i in range(36)]
    (path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return path


def train(material, out, *more, **other):
    "The command of a short training."
    given = {"source": material / "rows.jsonl", "model": material / "model", "test": "[b]", "valid": "0.3",
             "steps": 8, "batch_size": 4, "validations": 2, "lexical_warm_up": 5, "passage_length": 60,
             "search_length": 60, "panel": "[]", "precision": "fp32", "learning_rate": 1e-3, **other}
    return ["train", *(w for k, v in given.items() for w in ("-p", k, v)), "--no-progress", "--out", out, *more]


def results(run):
    "Numbers of a run, and its weights."
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    log = [h for h in metrics["training"]["unified"] if "loss" in h or "eval_all_nDCG@10" in h]
    numbers = [{k: v for k, v in h.items() if k.startswith(("loss", "eval_", "grad_norm")) and "runtime" not in k}
               for h in log]
    means = {f"{when} {m}": of["nDCG@10"]["mean"] for when in ("before", "after") for m, of in metrics[when].items()}
    return means, [h["step"] for h in log], numbers, load_file(run / "model" / "model.safetensors")


def equal(a, b):
    "Compare two runs: metrics and steps exactly, losses and weights up to rounding."
    assert a[0] == pytest.approx(b[0], abs=1e-6) and a[1] == b[1]
    for x, y in zip(a[2], b[2], strict=True): assert x == pytest.approx(y, rel=1e-3, abs=1e-4)
    for name, w in a[3].items(): assert torch.allclose(w, b[3][name], atol=2e-5), name


def test_two_processes_train_as_one(material, env, tmp_path):
    """Two processes make the run of one, with negatives mined in every epoch: the same metrics, losses and weights. So
    does one process that goes on, on another machine, from the checkpoints of two that SIGTERM has ended."""
    bucket = f"file://{tmp_path}/bucket"
    long = dict(steps=24, validations=12, negatives=2, mine_every=1)

    def run(name, *more, stop=False, **settings):
        process = begin(env, tmp_path, *train(material, name, *more, **settings))
        end = time.time() + 400
        while stop and process.poll() is None and time.time() < end:
            if list(tmp_path.glob("bucket/*/checkpoint-*.json")):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(.02)
        said = process.communicate(timeout=500)
        return process.returncode, said[0] + said[1]

    for name, more in {"one": [], "two": ["--nproc", 2]}.items():
        code, said = run(name, *more, **long)
        assert code == 0, said
    equal(results(tmp_path / "one"), results(tmp_path / "two"))
    mined = [{p.name: pq.read_table(p)["neg"].to_pylist() for p in (tmp_path / name).rglob("mined-*")}
             for name in ("one", "two")]
    assert mined[0] == mined[1] and len(mined[0]) > 3
    assert len({str(negatives) for negatives in mined[0].values()}) > 1      # an epoch's are its own
    log = (tmp_path / "two" / "logs" / "process-1.log").read_text()
    assert "step   24  validation" in log and "nDCG@10 on" not in log     # it trains, and does not report
    wrote = json.loads((tmp_path / "two" / "run.json").read_text())["wrote"]
    assert {"train.ipynb", "train.html", "model/model.safetensors", "logs/process-1.log"} <= wrote.keys()

    code, said = run("stopped", "--nproc", 2, "-p", "checkpoints", bucket, stop=True, **long)
    assert code == 143 and (tmp_path / "stopped" / "train.failed.ipynb").exists(), said
    shutil.rmtree(tmp_path / "stopped")          # the machine is gone
    code, said = run("resumed", "-p", "checkpoints", bucket, "-p", "resume", "true", **long)
    assert code == 0 and "fetched checkpoint-" in said, said
    equal(results(tmp_path / "one"), results(tmp_path / "resumed"))
    CheckpointStore(bucket).get("result", tmp_path / "fetched")
    assert (tmp_path / "fetched" / "model" / "config.json").exists()


def test_two_processes_learn_from_a_teacher_as_one(material, launch, env, tmp_path):
    "The first process mines and scores for all; the same metrics, losses and weights."
    how = dict(steps=3, validations=1, negatives=2, teacher=material / "model", lexical_warm_up=0)
    two = begin(env, tmp_path, *train(material, "two", "--nproc", 2, **how))
    one, said = launch(*train(material, "one", **how)), two.communicate(timeout=400)
    assert (one.returncode, two.returncode) == (0, 0), (one.stderr, said)
    equal(results(tmp_path / "one"), results(tmp_path / "two"))
    log = json.loads((tmp_path / "two" / "metrics.json").read_text())["training"]["unified"]
    assert any("teacher" in key for line in log for key in line), log


def test_a_batch_that_cannot_be_shared(material, env, tmp_path):
    process = begin(env, tmp_path, *train(material, "run", "--nproc", 2, batch_size=5))
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 1 and "batch_size is 5, which 2 processes cannot share evenly" in said, said
