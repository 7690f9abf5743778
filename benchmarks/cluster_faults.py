"""Whether a store that many workers encode survives what happens to machines: faults at random points of runs, after
which the store must be, byte for byte, the one that a single process makes without any.

    python benchmarks/cluster_faults.py                     thirty points
    python benchmarks/cluster_faults.py --points 8 --seed 1
    python benchmarks/cluster_faults.py --only 2 4          of the stores that suffer them, the third and the fourth

A cluster of a head and two nodes is started on this machine, and a random model of two layers encodes 192 short texts
into 24 shards, with one worker or, every third time, with two. A store suffers four faults, each at a random shard and
a random moment after it:
    driver   the process that began the run is killed, and the run is begun again;
    disk     the store's file system is full, the run ends, room is made, and the run is begun again. It is a real file
             system, in memory, which only some users may mount; where that is not allowed, the kind is left out;
    worker   the process of one worker is killed;
    node     a node that has a worker is removed, without notice, and a new one is added.
Stops at the first store that differs, and names the store and the seed, which make it happen again.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0",
               "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
from bgem3_nb.cluster import encode_on_cluster   # noqa: E402
from bgem3_nb.encoding import M3Encoder          # noqa: E402
from bgem3_nb.store import encode_corpus         # noqa: E402

TEXTS = [" ".join(f"w{i * j % 37}" for j in range(1, 9)) for i in range(192)]
SETTINGS, SHARDS, STALL, PAGE = {"shard_size": 8, "multi_dtype": "float32", "progress": False}, 24, 300, 4096


def open_slowly(folder, seconds):
    "An encoder that takes its time for each shard, and writes down its process, so that it can be killed."
    class Slow(M3Encoder):
        def encode_counted(self, *args, **kwargs):
            time.sleep(seconds)
            return super().encode_counted(*args, **kwargs)
    (Path(folder)/"pids"/str(os.getpid())).touch()
    return Slow(M3Encoder.from_pretrained(f"{folder}/model").model)


def encode(address, folder, store, workers):
    encode_on_cluster(partial(open_slowly, str(folder), .1), TEXTS, store, address, workers, 1, STALL, **SETTINGS)


class Run(Thread):
    "A run in this process, whose error is kept."
    error = None

    def __init__(self, *args):
        super().__init__(daemon=True)
        self.args = args
        self.start()

    def run(self):
        try: encode(*self.args)
        except Exception as e: self.error = e

    def finish(self):
        self.join(STALL)
        if self.is_alive(): sys.exit("the run did not end")


def shards(store): return {p.name: p.read_bytes() for p in sorted(store.glob("*.safetensors"))}


def wait_for(store, at, delay, goes_on):
    "Wait until so many shards are there and a moment longer; whether the run still goes on."
    end = time.monotonic() + STALL
    while len(list(store.glob("*.safetensors"))) < at and goes_on() and time.monotonic() < end: time.sleep(.005)
    time.sleep(delay)
    return goes_on()


def a_worker(folder, rng):
    "One of the processes that encode now; a worker that has just been killed is waited for."
    end = time.monotonic() + STALL
    while time.monotonic() < end:
        live = [int(p.name) for p in (folder/"pids").iterdir() if Path(f"/proc/{p.name}").exists()]
        if live: return rng.choice(sorted(live))
        time.sleep(.05)
    sys.exit("no worker came")


def node_of(pid, nodes):
    "The node that started a process."
    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return next(n for n in nodes.list_all_nodes() if n.all_processes["raylet"][0].process.pid == parent)


def suffer(store, faults, nodes, folder, workers, rng):
    "Let faults happen to the runs of one store, and finish it; yield what happened to each."
    run, whole = None, (nodes.address, folder, store, workers)
    for kind, at, delay in faults:
        if kind == "driver":
            words = [sys.executable, __file__, "--drive", *map(str, whole)]
            driver = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            struck = wait_for(store, at, delay, lambda: driver.poll() is None)
            driver.kill()
            driver.wait()
        elif kind == "disk":
            here = sum(-(-f.stat().st_size // PAGE) for f in store.iterdir())
            each = -(-(folder/"one"/"000000.safetensors").stat().st_size // PAGE)
            room = max(here, at * each + 1) + 1 + int(delay * 1000) % each           # full within a shard
            subprocess.run(["mount", "-o", f"remount,size={room * PAGE}", store], check=True)
            full = Run(*whole)
            full.finish()
            struck = isinstance(full.error, OSError)
            subprocess.run(["mount", "-o", "remount,size=64m", store], check=True)
        else:
            run = run or Run(*whole)
            struck = wait_for(store, at, delay, run.is_alive)
            if struck:
                pid = a_worker(folder, rng)
                if kind == "worker": os.kill(pid, signal.SIGKILL)
                else:
                    nodes.remove_node(node_of(pid, nodes), allow_graceful=False)
                    nodes.add_node(num_cpus=1)
        yield kind, at, delay, struck, len(shards(store))
    run = run or Run(*whole)
    run.finish()
    if run.error: raise run.error


def differs(store, wanted):
    "Say in what a store differs from the undisturbed one."
    found = shards(store)
    if found.keys() != wanted[0].keys(): return "other shards"
    if names := [n for n in found if found[n] != wanted[0][n]]: return f"other bytes in {', '.join(names)}"
    if (store/"store.json").read_bytes() != wanted[1]: return "another store.json"
    return ", ".join(p.name for p in store.iterdir() if p.suffix == ".tmp" or p.name == "set_aside.jsonl")


def all_faults(n, rng, kinds):
    "The faults of every store: kind, shard and delay, those that end a run before those that do not."
    listed = []
    while n > 0:
        some = rng.sample(kinds, min(n, len(kinds)))
        some = sorted(some, key=lambda kind: kind in ("worker", "node"))
        places = sorted(rng.sample(range(SHARDS - 2), len(some)))
        listed.append([(kind, at, rng.uniform(0, .15)) for kind, at in zip(some, places)])
        n -= len(some)
    return listed


def mount(folder): return not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder],
                                             capture_output=True).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=30, help="number of faults")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the points")
    parser.add_argument("--only", type=int, nargs=2, metavar=("FIRST", "END"), help="some of the stores")
    parser.add_argument("--drive", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        address, folder, store, workers = args.drive
        return encode(address, Path(folder), Path(store), int(workers))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))        # so that the end below is reached
    import ray
    from ray.cluster_utils import Cluster
    from tiny_words import tiny, tiny_tokenizer
    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    folder, happened = Path(tempfile.mkdtemp(prefix="bgem3_nb-faults-")), 0
    for name in ("pids", "store"): (folder/name).mkdir()
    tiny(tiny_tokenizer()).save_pretrained(folder/"model")
    encode_corpus(M3Encoder.from_pretrained(folder/"model"), TEXTS, folder/"one", **SETTINGS)
    wanted, store = (shards(folder/"one"), (folder/"one"/"store.json").read_bytes()), folder/"store"
    mounted = mount(store)
    kinds = ["driver", "worker", "node", "disk"] if mounted else ["driver", "worker", "node"]
    if not mounted: print("this user may mount no file system: no full disk is tried")
    nodes = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "include_dashboard": False, "_system_config": {"health_check_timeout_ms": 60_000}})
    for _ in range(2): nodes.add_node(num_cpus=1)
    stories = list(enumerate(all_faults(args.points, random.Random(args.seed), kinds)))
    try:
        for n, faults in stories[slice(*args.only or (None,))]:
            start, rng = time.monotonic(), random.Random(f"{args.seed} {n}")
            for p in (folder/"pids").iterdir(): p.unlink()
            for kind, at, delay, struck, there in suffer(store, faults, nodes, folder, 1 + (n % 3 == 0), rng):
                what = "" if struck else ": the run had ended before"
                print(f"store {n}: {kind:7} after {at:2} shards and {delay * 1000:3.0f} ms, {there:2} written{what}",
                      flush=True)
                happened += struck
            wrong = differs(store, wanted)
            print(f"store {n}: {wrong or 'the same'}, {time.monotonic() - start:.0f} s", flush=True)
            if wrong: sys.exit(f"store {n} of seed {args.seed}: {wrong}")
            for p in store.iterdir(): p.unlink()
    finally:
        nodes.shutdown()
        if mounted: subprocess.run(["umount", "-l", store], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{happened} faults, and every store is that of an undisturbed run")


if __name__ == "__main__": main()
