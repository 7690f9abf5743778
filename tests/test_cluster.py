"""Encoding with the workers of a Ray cluster on this machine: workers that die, a killed run, texts that kill, and
workers that never come."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import ray
import torch
from conftest import REPO
from tiny_run import tiny_model

from bgem3_nb.cluster import ClusterError, cluster_session, encode_on_cluster, search_on_cluster
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.store import EmbeddingStore, encode_corpus, search

TEXTS = [f"Điều {i}. Người lao động làm việc {i * 7} ngày được nghỉ {i} ngày." for i in range(48)]
SETTINGS = {"shard_size": 4, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def session():
    "One small cluster for all tests of this file: one core, so room for two workers, whatever the machine has."
    with cluster_session("local", cores=1) as ray: yield ray


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    "The store that one process makes."
    path = tmp_path_factory.mktemp("one") / "store"
    encode_corpus(M3Encoder.from_pretrained(model), TEXTS, path, **SETTINGS)
    return path


def shards(path): return {p.name: p.read_bytes() for p in sorted(path.glob("*.safetensors"))}

def workers_of_ray():
    "Process ids of the actors that encode."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: name = path.read_bytes()
        except OSError: continue
        if name.startswith(b"ray::_ShardWorker"): found.append(int(path.parent.name))
    return found


class Odd(M3Encoder):
    "An encoder that some texts break, and that takes its time."
    def encode_counted(self, texts, **kwargs):
        self.stumble(texts)
        return super().encode_counted(texts, **kwargs)

    def stumble(self, texts):
        time.sleep(float(os.environ.get("SLOW", "0")))
        if any("overflow" in t for t in texts): raise ValueError("the embeddings of text 0 are not finite")


def open_odd(path, slow=0.):
    os.environ["SLOW"] = str(slow)
    return Odd(M3Encoder.from_pretrained(path).model)


def open_own(path):
    "A model that is another in every process."
    encoder = M3Encoder.from_pretrained(path)
    with torch.no_grad(): encoder.model.encoder.embeddings.word_embeddings.weight.mul_(1 + os.getpid() % 97)
    return encoder


@pytest.fixture(scope="module", autouse=True)
def by_value():
    "Workers do not know this file: what it defines travels with the call."
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_worker_is_killed_and_the_store_is_the_same(session, model, undisturbed, tmp_path):
    failed = []
    def run():
        try: encode_on_cluster(partial(open_odd, str(model), .2), TEXTS, tmp_path/"store", threads=2, **SETTINGS)
        except BaseException as e: failed.append(e)
    thread = Thread(target=run)
    thread.start()
    while thread.is_alive() and len(list((tmp_path/"store").glob("*.safetensors"))) < 4: time.sleep(.05)
    [pid] = workers_of_ray()
    os.kill(pid, signal.SIGKILL)
    thread.join(300)
    assert not failed and not thread.is_alive()
    assert shards(tmp_path/"store") == shards(undisturbed)
    assert (tmp_path/"store"/"store.json").read_bytes() == (undisturbed/"store.json").read_bytes()
    assert not list((tmp_path/"store").glob("*.tmp"))
    queries = M3Encoder.from_pretrained(model).encode_queries(TEXTS[:5])
    weights = {"dense": 1., "lexical": .3, "multi": 1.}
    scores, passages = search(queries, EmbeddingStore(undisturbed), 7, weights)
    found = search_on_cluster(queries, tmp_path/"store", partial(M3Encoder.from_pretrained, str(model)), 7, weights,
                              part=1)
    assert (found.passages == passages).all()
    assert (found.scores == scores).all()


def test_the_run_is_killed_and_goes_on(model, undisturbed, tmp_path):
    "SIGKILL for the process that reads; the next run encodes what is missing, and only that."
    script = ("import sys; from functools import partial; from bgem3_nb.cluster import encode_on_cluster\n"
              "from bgem3_nb.encoding import M3Encoder; from test_cluster import TEXTS, SETTINGS\n"
              "def slowly():\n"
              "    import time\n"
              "    for n, t in enumerate(TEXTS):\n"
              "        if n > 16: time.sleep(.2)\n"
              "        yield t\n"
              f"encode_on_cluster(partial(M3Encoder.from_pretrained, {str(model)!r}), slowly(), "
              f"{str(tmp_path / 'store')!r}, threads=2, **SETTINGS)\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO/"tests"/"offline"), str(REPO), str(REPO/"tests")])}
    run = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)
    while run.poll() is None and len(list((tmp_path/"store").glob("*.safetensors"))) < 5: time.sleep(.05)
    assert run.poll() is None, run.stderr.read().decode()[-2000:]
    run.kill()
    run.wait()
    there = {p: p.stat().st_mtime_ns for p in (tmp_path/"store").glob("*.safetensors")}
    with pytest.raises(ValueError, match="not finished"): EmbeddingStore(tmp_path/"store")
    encode_corpus(M3Encoder.from_pretrained(model), TEXTS, tmp_path/"store", **SETTINGS)
    assert shards(tmp_path/"store") == shards(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in there} == there


def test_a_text_that_cannot_be_encoded_is_set_aside(session, model, undisturbed, tmp_path):
    "All others are as in the undisturbed store; where nothing may be set aside, the run ends."
    texts = [t + {5: " overflow"}.get(i, "") for i, t in enumerate(TEXTS[:24])]
    store = encode_on_cluster(partial(open_odd, str(model)), texts, tmp_path/"store", threads=2, **SETTINGS)
    [aside] = [json.loads(line) for line in (tmp_path/"store"/"set_aside.jsonl").read_text().splitlines()]
    assert (aside["number"], aside["text"]) == (5, texts[5])
    assert "not finite" in aside["reason"]
    whole = EmbeddingStore(undisturbed)
    for shard in (0, 2, 3, 4, 5): assert store.shard(shard).dense.tobytes() == whole.shard(shard).dense.tobytes()
    good = [i for i in range(24) if i != 5]
    assert abs(store.read(good).dense - whole.read(good).dense).max() < 1e-6
    with pytest.raises(ValueError, match="not finite"):
        encode_on_cluster(partial(open_odd, str(model)), texts[:8], tmp_path/"strict", set_aside=False, **SETTINGS)


def test_what_waits_and_what_does_not_fit_is_said(session, model, tmp_path):
    open_encoder = partial(M3Encoder.from_pretrained, str(model))
    with pytest.raises(ClusterError, match="Asked for: 3 workers with half a core each; the cluster has 1 CPU"):
        encode_on_cluster(open_encoder, TEXTS, tmp_path/"a", workers=3, stall_seconds=3, **SETTINGS)
    with pytest.raises(ClusterError, match="differ in model, marks"):
        encode_on_cluster(partial(open_own, str(model)), TEXTS, tmp_path/"b", workers=2, **SETTINGS)
    with pytest.raises(ValueError, match="/nowhere/at/all: there is no such directory"):
        encode_on_cluster(partial(M3Encoder.from_pretrained, "/nowhere/at/all"), TEXTS, tmp_path/"c", **SETTINGS)
