"""What fast-plaid, the index behind PyLate, costs on the chunks of hybrid_index.py.

    python benchmarks/plaid.py --cache DIR --export           in the book's environment: write vectors and exact results
    OTHER/bin/python benchmarks/plaid.py --cache DIR          in one of fast-plaid's own: build, search, print
    ... --sizes 1000 10000

A build of fast-plaid is compiled against one PyTorch, brings its copy of libc10 and asks for exactly that version
(1.7.0.2110 for 2.11.0). With 2.13.0 it is imported, and `create` ends the process by a segmentation fault. So it needs
an environment of its own:

    python -m venv OTHER && OTHER/bin/pip install fast-plaid==1.7.0.2110 numpy scipy      5 GB, most of it PyTorch

The index ranks by MaxSim alone, with vectors of 4 bits a number. `recall` is the share of exact MaxSim's ten best
chunks that it finds, `hybrid` that of the exact hybrid's ten best, as in hybrid_index.py.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hybrid_index import asked_chunks, Chunks, clauses, exact_search, recall, size_of, timed  # noqa: E402


def export(n, cache, number):
    "Write the multi-vectors of chunks and queries, and what exact search finds."
    from bgem3_nb.encoding import M3Encoder
    from bgem3_nb.store import encode_corpus
    encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False)
    pool = list(dict.fromkeys(clauses()))
    chunks = Chunks(encoder, encode_corpus(encoder, pool, cache / "clauses"), pool, n)
    _, queries = asked_chunks(chunks, number)
    asked = encoder.encode_queries(queries)
    every = chunks.embeddings(range(n))
    best = np.argsort(-chunks.maxsim(asked), axis=1, kind="stable")[:, :10]
    np.savez(cache / f"plaid-{n}.npz", vectors=every.multi.astype(np.float16), offsets=every.offsets, best=best,
             queries=asked.multi, query_offsets=asked.offsets,
             hybrid=exact_search(chunks, asked, cache / f"exact-{n}-{number}.npz")["hybrid"])


def measure(n, cache):
    "Build an index and print its row."
    import torch
    from fast_plaid import search
    kept = np.load(cache / f"plaid-{n}.npz")
    def texts(vectors, offsets):
        vectors = torch.from_numpy(vectors.astype(np.float32))
        return list(torch.tensor_split(vectors, torch.from_numpy(offsets[1:-1].astype(np.int64))))
    documents, queries = (texts(kept[v], kept[o]) for v, o in (("vectors", "offsets"), ("queries", "query_offsets")))
    with tempfile.TemporaryDirectory() as folder:
        index = search.FastPlaid(index=str(Path(folder, "i")), device="cpu")
        start = time.process_time()
        index.create(documents_embeddings=documents)
        seconds = time.process_time() - start
        for probed in (8, 32):
            def find(i): return [d for d, _ in index.search(queries_embeddings=queries[i][None], top_k=10,
                                                            n_ivf_probe=probed, show_progress=False)[0]]
            for i in range(5): find(i)
            ms, found = timed(find, len(queries))
            print(f"{n:7} fast-plaid, 4 bits, {probed:2} clusters {size_of(folder):8.1f} {seconds:8.1f} "
                  f"{ms[0]:8.1f} {ms[1]:8.1f} {ms[2]:8.1f} {recall(found, kept['best']):7.3f} "
                  f"{recall(found, kept['hybrid']):7.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    if not args.export: print(f"{'chunks':>7} {'way':31} {'MB':>8} {'build s':>8} {'ms p50':>8} {'ms p95':>8} "
                              f"{'wall p95':>8} {'recall':>7} {'hybrid':>7}")
    for n in args.sizes:
        if args.export: export(n, args.cache, args.queries)
        else: measure(n, args.cache)


if __name__ == "__main__": main()
