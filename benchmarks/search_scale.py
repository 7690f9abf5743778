"""What it costs to search a large corpus exactly from a store on disk, and whether memory stays flat and time linear
as the corpus grows; beside faiss's flat index over the same vectors, which holds all of them in memory.

    python benchmarks/search_scale.py                       1 000 queries over 100 000, 300 000 and 1 000 000 passages
    python benchmarks/search_scale.py --sizes 10000 20000   these sizes
    python benchmarks/search_scale.py --queries 100 --d 384 -k 10

The passages are random vectors of length 1 around 1 000 topics, and a query is a passage with noise, so that the best
passages are close together as they are in real corpora. Every search runs in a process of its own. Its peak memory is
what the process held at its highest above what it held before the search, without the vectors that faiss must hold;
ours reads them from disk in blocks and never holds them. Seconds are those of the processor, over all threads, which
other work on the machine hardly moves; of two runs the better one counts. Stops if the two do not find the same
passages.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SHARD, TOPICS, LIMIT = 1000, 1000, 1024   # passages a file; topics; MB of peak memory that ours may take


def unit(x): return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def shard(i, d):
    "The vectors of one file; every file can be made again by itself."
    topics = unit(np.random.default_rng(0).normal(size=(TOPICS, d)))
    rng = np.random.default_rng(i + 1)
    return unit(topics[rng.integers(TOPICS, size=SHARD)] + rng.normal(size=(SHARD, d)) * .7 / d**.5)


def queries(n, d, passages):
    "Passages with noise."
    rng, files = np.random.default_rng(7), -(-passages // SHARD)
    some = [shard(i, d) for i in rng.choice(files, min(files, 10), replace=False)]
    pool = np.concatenate(some)
    return unit(pool[rng.choice(len(pool), n, replace=n > len(pool))] + rng.normal(size=(n, d)) * .3 / d**.5)


def make_stores(folder, sizes, d):
    "One store for each size; the smaller ones share the files of the largest."
    from bgem3_nb.encoding import Embeddings
    from bgem3_nb.store import _write_info, _write_shard, shard_file
    largest = folder/str(max(sizes))
    for size in sorted(sizes, reverse=True):
        path = folder/str(size)
        path.mkdir()
        for i in range(-(-size // SHARD)):
            if path == largest: _write_shard(shard_file(path, i), Embeddings(shard(i, d)), np.arange(SHARD), "float32")
            else: os.link(shard_file(largest, i), shard_file(path, i))
        _write_info(path, {"format": 1, "n": size, "shard_size": SHARD, "outputs": ["dense"], "multi_dtype": None,
                           "truncated": 0})


def memory(field):
    "A line of the kernel's account of this process, in MB: VmRSS now, VmHWM at its highest."
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def search(args):
    "Seconds, peak memory and the passages that one side finds, in this process."
    from bgem3_nb.encoding import Embeddings
    from bgem3_nb.exact_search import search_candidates
    from bgem3_nb.store import EmbeddingStore
    store = EmbeddingStore(Path(args.folder)/str(args.size))
    asked = Embeddings(queries(args.queries, args.d, args.size))
    if args.side == "ours": search_candidates(asked[:8], store.shard(0), 5, progress=False)   # what is loaded once
    else: import faiss
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    if args.side == "ours": found = search_candidates(asked, store, args.k, progress=False).passages
    else:
        faiss.omp_set_num_threads(args.threads)
        index = faiss.IndexFlatIP(args.d)
        for part in store.shards(): index.add(part.dense)
        found = index.search(asked.dense, args.k)[1]
    seconds, peak = time.process_time() - start, memory("VmHWM") - before
    held = 0 if args.side == "ours" else args.size * args.d * 4 / 2**20
    np.save(args.result, found)
    print(json.dumps({"seconds": seconds, "peak": peak - held}))


def call(args, side, size, result):
    words = ["--side", side, "--size", size, "--folder", args.folder, "--result", result, "--queries", args.queries,
             "--d", args.d, "-k", args.k, "--threads", args.threads]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, env=env)
    if done.returncode: sys.exit(f"{side}, {size:,} passages: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args):
    "The table."
    import torch
    print(f"{args.queries:,} queries, k {args.k}, d {args.d}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'passages':>10}{'ours s':>9}{'µs a passage':>14}{'peak MB':>9}{'faiss s':>9}{'µs a passage':>14}"
          f"{'above vectors MB':>18}{'ours / faiss':>14}")
    costs = []
    for size in args.sizes:
        results = {side: f"{args.folder}/{side}.npy" for side in ("ours", "faiss")}
        runs = {side: [call(args, side, size, file) for _ in range(args.repeats)] for side, file in results.items()}
        ours, theirs = ({of: pick(r[of] for r in part) for of, pick in (("seconds", min), ("peak", max))}
                        for part in runs.values())
        a, b = (np.load(file) for file in results.values())
        same = np.mean([len(set(x) & set(y)) / len(x) for x, y in zip(a.tolist(), b.tolist())])
        if same < .9999: sys.exit(f"{size:,} passages: only {same:.2%} of what faiss finds was found")
        each = [1e6 * s["seconds"] / size for s in (ours, theirs)]
        costs.append(each[0])
        print(f"{size:10,}{ours['seconds']:9.2f}{each[0]:14.2f}{ours['peak']:9.0f}{theirs['seconds']:9.2f}"
              f"{each[1]:14.2f}{theirs['peak']:18.0f}{ours['seconds'] / theirs['seconds']:14.2f}", flush=True)
        if ours["peak"] > LIMIT: sys.exit(f"{size:,} passages: {ours['peak']:.0f} MB, more than {LIMIT}")
    print(f"a passage costs {costs[-1] / costs[0]:.2f} times as much in the largest corpus as in the smallest")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"--queries": 1000, "--d": 256, "-k": 100, "--threads": os.cpu_count(), "--repeats": 2}
    for name, default in numbers.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="of corpora")
    for hidden in ("--side", "--folder", "--result"): parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(size % SHARD for size in args.sizes): sys.exit(f"give sizes that are multiples of {SHARD:,}")
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this benchmark reads the memory of a process from /proc, as Linux has it")
    if args.side: return search(args)
    with tempfile.TemporaryDirectory(prefix="bgem3_nb-search-") as folder:
        args.folder = folder
        make_stores(Path(folder), args.sizes, args.d)
        compare(args)


if __name__ == "__main__": main()
