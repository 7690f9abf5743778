"""More than 2 GiB of text in one column, through every step that gathers a column: time and peak memory of each.

    python benchmarks/large_text.py                    # 2.2 GB; each step in a process of its own
    python benchmarks/large_text.py --gigabytes 0.2    # a tenth of it, to see what grows with the text
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from bgem3_nb.balance import analyse
from bgem3_nb.checks import check_rows, clean_rows
from bgem3_nb.formats import load_data, save_data
from bgem3_nb.mining import corpus_set, mined_rows
from bgem3_nb.readers import write_rows
from bgem3_nb.rows import SCHEMA, rows_from

LENGTH = 10_000   # characters of a passage


def batches(gigabytes):
    "Rows whose passages are windows of one random text, each with its number: no two are equal."
    rng = np.random.default_rng(0)
    text = " ".join("".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 200_000))
    numbers = range(int(gigabytes * 1e9 / LENGTH))
    for a in range(0, len(numbers), 1_000):
        rows = ({"query": f"question {i}", "pos": [f"{i} {text[i:i + LENGTH]}"], "language": "en"}
                for i in numbers[a:a + 1_000])
        empty = {name: [] if pa.types.is_list(kind) else "" for name, kind in zip(SCHEMA.names, SCHEMA.types)}
        yield pa.RecordBatch.from_pylist([empty | row for row in rows], schema=SCHEMA)


def rows_of(gigabytes): return rows_from(batches(gigabytes))


def selected(gigabytes):
    "All rows but the first, in another order."
    rows = rows_of(gigabytes)
    return rows.select(np.arange(len(rows) - 1, 0, -1))


def step_analyse(gigabytes, folder): return analyse(selected(gigabytes), identify=1_000)


def step_checks(gigabytes, folder):
    rows = selected(gigabytes)
    return len(clean_rows(rows, check_rows(rows, near=0, identify=False), None))


def step_beir(gigabytes, folder):
    save_data(rows_of(gigabytes), folder/"beir", "beir")
    return load_data(folder/"beir", rejected=None)


def step_corpus(gigabytes, folder):
    rows = rows_of(gigabytes)
    return corpus_set(rows, [f"other passage {i}" for i in range(1_000)], missing="add")


def step_mined(gigabytes, folder):
    "Short rows that are given seven negatives of 1.2 KB each."
    n = int(gigabytes * 1e9 / (7 * 1_200))
    passages = [f"{i} ".ljust(1_200, "x") for i in range(1_000)]
    empty = {name: [] if pa.types.is_list(kind) else "" for name, kind in zip(SCHEMA.names, SCHEMA.types)}
    made = [empty | {"query": f"q{i}", "pos": [passages[i % 1_000]]} for i in range(n)]
    rows = rows_from([pa.RecordBatch.from_pylist(made, schema=SCHEMA)])
    chosen = pd.DataFrame({"query": np.repeat(np.arange(n), 7), "passage": np.tile(np.arange(1, 8), n), "rank": 1,
                           "score": .5, "part": "0-9"})
    out = mined_rows(rows, corpus_set(rows, passages), chosen, "dense")
    return write_rows(out, folder/"mined.parquet").stat().st_size


STEPS = {name[5:]: step for name, step in list(globals().items()) if name.startswith("step_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--step", choices=STEPS, help="only this one, in this process")
    options = parser.parse_args()
    for name in [options.step] if options.step else STEPS:
        if not options.step:
            command = [sys.executable, __file__, "--gigabytes", str(options.gigabytes), "--step", name]
            done = subprocess.run(command)
            if done.returncode: sys.exit(f"{name} failed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            STEPS[name](options.gigabytes, Path(folder))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            seconds = time.perf_counter() - start
            print(f"{name:8} {options.gigabytes:.1f} GB of text: {seconds:5.0f} s, peak {peak:.1f} GB", flush=True)


if __name__ == "__main__": main()
