"""Encoding and mining with the workers of a Ray cluster on this machine: workers that die, a killed run, a full disk,
texts that kill, workers that never come, and the candidates and rules of one process."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from conftest import REPO
from ray.cluster_utils import Cluster
from scipy.sparse import csr_matrix
from tiny_words import tiny, tiny_tokenizer

from bgem3_nb.adapters import adapter_weights, add_lora
from bgem3_nb.cluster import (
    TEXT_RULES, ClusterError, candidates_on_cluster, cluster_session, count_workers, encode_on_cluster, find_on_cluster,
    rule_on_cluster, search_on_cluster, start_workers)
from bgem3_nb.encoding import Embeddings, M3Encoder
from bgem3_nb.exact_search import search_candidates
from bgem3_nb.mining import mine_hard_negatives, search_deeper
from bgem3_nb.rows import make_rows
from bgem3_nb.store import EmbeddingStore, _write_info, _write_shard, encode_corpus, search, shard_file

TEXTS = [" ".join(f"w{i * j % 37}" for j in range(1, 8)) + f" w{i % 40}" for i in range(48)]
SETTINGS = {"shard_size": 4, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny(tiny_tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def nodes():
    "One small cluster for all tests of this file: one core, so room for two workers, whatever the machine has."
    # a cluster that says nothing reports that; here to a port on which nobody listens
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "include_dashboard": False, "_system_config": {"health_check_timeout_ms": 60_000}})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def session(nodes):
    "This process as a part of the cluster, so that no test starts one."
    with cluster_session(nodes.address) as ray: yield ray


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    "The store that one process makes."
    path = tmp_path_factory.mktemp("one") / "store"
    encode_corpus(M3Encoder.from_pretrained(model), TEXTS, path, **SETTINGS)
    return path


def shards(path): return {p.name: p.read_bytes() for p in sorted(path.glob("*.safetensors"))}


class Odd(M3Encoder):
    "An encoder that some texts break, that takes its time, and whose disk is full after `room` shards."
    slow, room = 0., 1000

    def encode_counted(self, texts, **kwargs):
        time.sleep(self.slow)
        if any("overflow" in t for t in texts): raise ValueError("the embeddings of text 0 are not finite")
        self.room -= 1
        if self.room < 0: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))   # of this process alone
        return super().encode_counted(texts, **kwargs)


def open_odd(path, slow=0., room=1000, note=None):
    if note: Path(note).write_text(str(os.getpid()))
    encoder = Odd(M3Encoder.from_pretrained(path).model)
    encoder.slow, encoder.room = slow, room
    return encoder


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
    failed, open_slowly = [], partial(open_odd, str(model), .1, note=str(tmp_path/"pid"))
    def run():
        try: encode_on_cluster(open_slowly, TEXTS, tmp_path/"store", threads=1, **SETTINGS)
        except BaseException as e: failed.append(e)
    thread = Thread(target=run)
    thread.start()
    while thread.is_alive() and len(list((tmp_path/"store").glob("*.safetensors"))) < 4: time.sleep(.02)
    os.kill(int((tmp_path/"pid").read_text()), signal.SIGKILL)
    thread.join(300)
    assert not failed and not thread.is_alive()
    assert shards(tmp_path/"store") == shards(undisturbed)
    assert (tmp_path/"store"/"store.json").read_bytes() == (undisturbed/"store.json").read_bytes()
    assert not list((tmp_path/"store").glob("*.tmp"))
    queries = M3Encoder.from_pretrained(model).encode_queries(TEXTS[:5])
    weights = {"dense": 1., "lexical": .3, "multi": 1.}
    scores, passages = search(queries, EmbeddingStore(undisturbed), 7, weights)
    found = search_on_cluster(queries, tmp_path/"store", 7, weights, part=1)
    assert (found.passages == passages).all()
    assert (found.scores == scores).all()


def test_the_run_is_killed_and_goes_on(nodes, session, model, undisturbed, tmp_path):
    "SIGKILL for the process that reads; the next run encodes what is missing, and only that."
    script = ("from functools import partial; from bgem3_nb.cluster import encode_on_cluster\n"
              "from bgem3_nb.encoding import M3Encoder\n"
              "def slowly():\n"
              "    import time\n"
              f"    for n, t in enumerate({TEXTS!r}):\n"
              "        if n > 16: time.sleep(.2)\n"
              "        yield t\n"
              f"encode_on_cluster(partial(M3Encoder.from_pretrained, {str(model)!r}), slowly(), "
              f"{str(tmp_path / 'store')!r}, {nodes.address!r}, threads=1, **{SETTINGS!r})\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO/"tests"/"offline"), str(REPO)])}
    run = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)
    while run.poll() is None and len(list((tmp_path/"store").glob("*.safetensors"))) < 5: time.sleep(.05)
    assert run.poll() is None, run.stderr.read().decode()[-2000:]
    run.kill()
    run.wait()
    goes_on(model, undisturbed, tmp_path/"store")


def goes_on(model, undisturbed, store):
    "What an ended run left is kept, and one process completes it."
    there = {p: p.stat().st_mtime_ns for p in store.glob("*.safetensors")}
    assert there
    with pytest.raises(ValueError, match="not finished"): EmbeddingStore(store)
    encode_corpus(M3Encoder.from_pretrained(model), TEXTS, store, **SETTINGS)
    assert shards(store) == shards(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in there} == there
    assert sorted(p.name for p in store.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def test_a_full_disk_ends_the_run_which_goes_on(session, model, undisturbed, tmp_path):
    "The worker may write no more after three shards, by a limit of the system; no text is blamed for it."
    with pytest.raises(OSError, match="000003.safetensors: this shard could not be written"):
        encode_on_cluster(partial(open_odd, str(model), room=3), TEXTS, tmp_path/"store", threads=1, **SETTINGS)
    goes_on(model, undisturbed, tmp_path/"store")


def test_a_text_that_cannot_be_encoded_is_set_aside(session, model, undisturbed, tmp_path):
    "All others are as in the undisturbed store; where nothing may be set aside, the run ends."
    texts = [t + {5: " overflow"}.get(i, "") for i, t in enumerate(TEXTS[:24])]
    store = encode_on_cluster(partial(open_odd, str(model)), texts, tmp_path/"store", threads=1, **SETTINGS)
    [aside] = [json.loads(line) for line in (tmp_path/"store"/"set_aside.jsonl").read_text().splitlines()]
    assert (aside["number"], aside["text"]) == (5, texts[5])
    assert "not finite" in aside["reason"]
    whole = EmbeddingStore(undisturbed)
    for shard in (0, 2, 3, 4, 5): assert store.shard(shard).dense.tobytes() == whole.shard(shard).dense.tobytes()
    good = [i for i in range(24) if i != 5]
    assert abs(store.read(good).dense - whole.read(good).dense).max() < 1e-6
    with pytest.raises(ValueError, match="not finite"):
        encode_on_cluster(partial(open_odd, str(model)), texts[:8], tmp_path/"strict", threads=1, set_aside=False,
                          **SETTINGS)


def test_what_waits_is_said(session, model, tmp_path, monkeypatch):
    "Nothing is free, and where GPUs are asked for, there is none: Ray waits, and the run says what for."
    holder = ray.remote(num_cpus=1)(Held).remote()
    assert ray.get(holder.ready.remote())
    wanted = "Asked for: 3 workers with half a core each; the cluster has 1 CPU, 0 GPU, of which 0 CPU, 0 GPU are free"
    with pytest.raises(ClusterError, match=wanted):
        encode_on_cluster(partial(open_odd, str(model)), TEXTS, tmp_path/"a", workers=3, stall_seconds=1, **SETTINGS)
    with pytest.raises(ClusterError, match="Asked for: 3 tasks with half a core each; the cluster has 1 CPU"):
        rule_on_cluster("jaccard", TEXTS, [{0}], workers=3, stall_seconds=1)(
            pd.DataFrame({"query": [0], "passage": [1]}))
    ray.kill(holder)
    monkeypatch.setattr("bgem3_nb.cluster.count_workers", lambda resources: (1, 1))
    with pytest.raises(ClusterError, match="Asked for: 1 workers with half a core and a GPU each; the cluster has 1 C"):
        encode_on_cluster(partial(open_odd, str(model)), TEXTS, tmp_path/"b", stall_seconds=1, **SETTINGS)


class Held:
    def ready(self): return True


def test_gpus_that_nodes_declare_are_given_out_one_to_a_worker(nodes, session, model):
    "Ray believes what a node declares, so its account can be read without a GPU."
    node = nodes.add_node(num_cpus=1, num_gpus=2)
    try:
        assert count_workers(ray.cluster_resources()) == (2, 1)
        actors, asked = start_workers(ray, partial(open_odd, str(model)))
        assert asked == "2 workers with half a core and a GPU each" and len(actors) == 2
        end = time.monotonic() + 300
        while ray.available_resources().get("GPU") and time.monotonic() < end: time.sleep(.05)
        assert not ray.available_resources().get("GPU")
        for actor in actors: ray.kill(actor)
    finally: nodes.remove_node(node)


def test_what_does_not_fit_is_said(session, model, tmp_path, capfd):
    "One error is raised, though two workers have it; Ray prints none."
    with pytest.raises(ClusterError, match="differ in model, marks"):
        encode_on_cluster(partial(open_own, str(model)), TEXTS, tmp_path/"b", workers=2, threads=1, **SETTINGS)
    with pytest.raises(ValueError, match="/nowhere/at/all: there is no such directory"):
        encode_on_cluster(partial(M3Encoder.from_pretrained, "/nowhere/at/all"), TEXTS, tmp_path/"c", workers=2,
                          threads=1, **SETTINGS)
    assert "Unhandled error" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    "A store of 20 000 passages with few different vectors, so that most scores are tied, and queries for it."
    path, rng, n = tmp_path_factory.mktemp("tied"), np.random.default_rng(0), 20_000
    def some(n):
        dense = rng.integers(-2, 3, (n, 4)).astype(np.float32) / 3
        lexical = csr_matrix((rng.integers(1, 3, 2 * n) / np.float32(7), rng.integers(0, 9, 2 * n).astype(np.int32),
                              np.arange(0, 2 * n + 1, 2)), (n, 9))
        multi = rng.integers(-1, 2, (2 * n, 4)).astype(np.float32)
        return Embeddings(dense, lexical, multi, np.arange(0, 2 * n + 1, 2))
    size = 4000
    for i in range(n // size): _write_shard(shard_file(path, i), some(size), np.arange(size), "float32")
    _write_info(path, {"format": 1, "n": n, "shard_size": size, "outputs": ["dense", "lexical", "multi"],
                       "multi_dtype": "float32", "truncated": 0})
    return EmbeddingStore(path), some(9)


@pytest.mark.parametrize("weights, candidates", [
    ({"dense": 1.}, 0), ({"lexical": 1.}, 0), ({"dense": 1., "lexical": .3, "multi": 1.}, 0),
    ({"dense": 1., "multi": .5}, 120)])
def test_mining_over_parts_finds_what_one_process_finds(session, tied, weights, candidates):
    "Same candidates, same order, ties included; one query has 100 positives, so it is searched deeper."
    store, queries = tied
    known = [{1, 2}] * 8 + [set(range(0, 20_000, 200))]
    one = search_candidates(queries, store, 90, weights, candidates, progress=False)
    one = search_deeper(one, queries, store, known, weights, candidates)
    assert (one.scores[:, 1:] == one.scores[:, :-1]).mean() > .3
    many = candidates_on_cluster(queries, store.path, 90, weights, candidates, known, part=8192)
    whole = candidates_on_cluster(queries, store.path, 90, weights, candidates, known)      # in one part
    for found in (many, whole):
        assert (found.passages == one.passages).all() and (found.scores == one.scores).all()
        assert found.mode == one.mode


def test_rules_over_parts_measure_what_one_process_measures(session):
    rng = np.random.default_rng(0)
    passages = TEXTS + [t.upper() for t in TEXTS[::3]] + [f"{t} w0" for t in TEXTS[::5]]
    known = [{int(i)} | {int(i) % 7} for i in rng.integers(0, len(passages), 20)]
    pairs = pd.DataFrame({"query": rng.integers(0, 20, 300), "passage": rng.integers(0, len(passages), 300)})
    for rule, make in TEXT_RULES.items():
        one, many = make(passages, known)(pairs), rule_on_cluster(rule, passages, known, group=64)(pairs)
        assert one.any() and (one == many).all(), rule


def test_mining_in_training_takes_a_cluster(session, model, tmp_path):
    "The same rows as in memory, by the model as it is in a training with adapters, which keeps them."
    pytest.importorskip("peft")
    rows = make_rows([{"query": f"w{i % 40} w{i // 40}", "pos": [t]} for i, t in enumerate(TEXTS)])
    net = M3Encoder.from_pretrained(model).model
    add_lora(net, 2)
    for weights in adapter_weights(net.encoder).values(): torch.nn.init.normal_(weights, std=.1)
    encoder = M3Encoder(net, max_length=12, dtype=torch.float32, progress=False)
    how = dict(mix="0-9", num_negatives=3, progress=False)
    one, counts = mine_hard_negatives(encoder, rows, **how)
    find = find_on_cluster(tmp_path, threads=1, shard_size=16, multi_dtype="float32")
    many, same = mine_hard_negatives(encoder, rows, find=find, **how)
    assert many["neg_ids"] == one["neg_ids"] and same == counts
    assert abs(np.array(many["neg_scores"]) - np.array(one["neg_scores"])).max() < 1e-5
    assert adapter_weights(net.encoder)
