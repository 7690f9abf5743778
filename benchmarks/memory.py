"""Memory that steps over all rows take beside the rows: bytes a row, at two sizes, and what one more row takes.

    python benchmarks/memory.py                        # 50,000 and 100,000 rows; each in a process of its own
    python benchmarks/memory.py --rows 200000 400000 --step checks

The peak of the process while the step runs, less what it held before, as Linux counts it. The rows are made up: a
query, a positive and a hard negative of about 300 characters each; for the searches, queries with vectors of 256
numbers and 8 lexical weights, which ask 5,000 passages. With few rows, the blocks in work are most of it.
"""
import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.sparse import csr_matrix

from bgem3_nb.balance import analyse
from bgem3_nb.checks import check_rows
from bgem3_nb.encoding import Embeddings
from bgem3_nb.exact_search import search_candidates
from bgem3_nb.mining import corpus_set, mined_rows
from bgem3_nb.rows import SCHEMA, row_batches, rows_from

EMPTY = {name: [] if pa.types.is_list(kind) else "" for name, kind in zip(SCHEMA.names, SCHEMA.types)}


def made_up(n):
    "Make `n` rows."
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, k))) for k in rng.integers(2, 9, 20_000)]
    text = lambda numbers: " ".join(words[i] for i in numbers)
    def batch(a, b):
        rows = [{"query": f"{text(w[:8])} {i}", "pos": [text(w[8:58])], "neg": [text(w[58:])], "language": "en"}
                for i, w in zip(range(a, b), rng.integers(0, len(words), (b - a, 108)))]
        return pa.RecordBatch.from_pylist([EMPTY | row for row in rows], schema=SCHEMA)
    return rows_from(batch(a, min(n, a + 5_000)) for a in range(0, n, 5_000))


def of_mined(n):
    "Make `n` rows as a search problem, and two negatives for each."
    rows = made_up(n)
    data, at = corpus_set(rows), np.arange(2 * n)
    chosen = pd.DataFrame({"query": at // 2, "passage": (at * 7919) % len(data.passages), "rank": at % 2,
                           "score": .5, "part": "0-9"})
    return rows, data, chosen, "dense"


def embeddings(n, seed):
    "Make the embeddings of `n` texts."
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((n, 256), np.float32)
    weights = rng.random(8 * n, np.float32), rng.integers(0, 30_000, 8 * n), np.arange(0, 8 * n + 1, 8)
    lexical = csr_matrix(weights, shape=(n, 30_000))
    lexical.sum_duplicates()
    return Embeddings(dense=dense / np.linalg.norm(dense, axis=1, keepdims=True), lexical=lexical)


def of_search(n): return embeddings(n, 0), embeddings(5_000, 1)
def of_rows(n): return [made_up(n)]


MIXED = {"dense": 1., "lexical": .3}
STEPS = {  # name -> what is made before, what is measured
    "checks": (of_rows, lambda rows: check_rows(rows, near=0, identify=False)),
    "checks, near": (of_rows, lambda rows: check_rows(rows, identify=False)),
    "checks, all": (of_rows, check_rows),
    "analyse": (of_rows, lambda rows: analyse(rows, identify=5_000)),
    "mined_rows": (of_mined, mined_rows),
    "search": (of_search, lambda q, p: search_candidates(q, p, 50, progress=False)),
    "search, mixed": (of_search, lambda q, p: search_candidates(q, p, 50, MIXED, progress=False)),
}


def peak():
    "Return the peak and the present of the memory of this process, in bytes."
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")]


def measured(name, n):
    "Return bytes beside what was given, bytes given for each row, and seconds."
    before, step = STEPS[name]
    step(*before(300))                                           # what is loaded on first use
    given = before(n)
    size = given[0].dense.nbytes if isinstance(given[0], Embeddings) else sum(
        b[c].nbytes for b in row_batches(given[0], ["query", "pos", "neg"]) for c in b.schema.names)
    gc.collect()
    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")                # the peak begins anew
    held, start = peak()[1], time.perf_counter()
    step(*given)
    return peak()[0] - held, size / n, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs=2, default=[50_000, 100_000])
    parser.add_argument("--step", choices=STEPS, help="only this one")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(*measured(options.step, options.one))
    for name in [options.step] if options.step else STEPS:
        found = []
        for n in options.rows:
            command = [sys.executable, __file__, "--step", name, "--one", str(n)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode: sys.exit(f"{name} failed:\n{done.stderr}")
            found.append([float(x) for x in done.stdout.split()])
            extra, size, seconds = found[-1]
            print(f"{name:14} {n:>9,} rows of {size:,.0f} bytes: {extra / n:6,.0f} bytes a row beside them, "
                  f"{seconds:4.0f} s", flush=True)
        more = (found[1][0] - found[0][0]) / (options.rows[1] - options.rows[0])
        print(f"{'':14} one more row: {more:,.0f} bytes, {more / found[1][1]:.2f} for each byte of it", flush=True)


if __name__ == "__main__": main()
