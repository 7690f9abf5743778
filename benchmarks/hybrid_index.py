"""What a hybrid index costs beside exact search and BM25: bytes, building time, milliseconds and recall.

    python benchmarks/hybrid_index.py                    1 000 and 10 000 chunks
    python benchmarks/hybrid_index.py --sizes 1000       other sizes
    python benchmarks/hybrid_index.py --queries 100      so many queries, one at a time

The chunks are clauses of 8 to 20 words of six Vietnamese codes (as in benchmarks/corpus.py); a query is every second
word of one of them. Recall@10 is the share of exact search's ten best passages, in the same weights, that a way finds:
for `dense` of the dense ones, for all others of the hybrid ones. The encoding of the texts and of the queries is left
out of all times.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from corpus import clauses, texts  # noqa: E402

HEAD = ("chunks", "way", "MB", "build s", "ms p50", "ms p95", "recall@10")


def timed(search, n):
    "Milliseconds of every search, and what each found."
    times, found = [], []
    for i in range(n):
        start = time.perf_counter()
        found.append(list(search(i)))
        times.append(1e3 * (time.perf_counter() - start))
    return np.percentile(times, [50, 95]), found


def recall(found, exact): return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, exact)])


def size_of(folder):
    "Megabytes that the files of a folder occupy."
    return sum(512 * f.stat().st_blocks for f in Path(folder).rglob("*") if f.is_file()) / 1e6


class Encoded:
    "The model's encoder, whose embeddings of the chunks are known: what is timed is the index."
    def __init__(self, encoder, corpus, of): self.encoder, self.corpus, self.of = encoder, corpus, of
    def __getattr__(self, name): return getattr(self.encoder, name)
    def encode_counted(self, texts, **kwargs):
        from bgem3_nb.exact_search import select_outputs
        return select_outputs(self.corpus[[self.of[t] for t in texts]], kwargs["outputs"]), 0


def bm25_row(passages, queries):
    "BM25 by bm25s: its row, and what it found."
    from bgem3_nb.scoring import load_bm25s
    bm25s = load_bm25s()
    cut = lambda t: bm25s.tokenize(t, stopwords=None, show_progress=False)
    start = time.perf_counter()
    words = bm25s.BM25()
    words.index(cut(passages), show_progress=False)
    seconds = time.perf_counter() - start
    find = lambda i: words.retrieve(cut([queries[i]]), k=10, show_progress=False)[0][0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        words.save(folder)
        return seconds, size_of(folder), *timed(find, len(queries))


def measure(n, number, encoder, pool):
    "Print the rows of one size."
    from bgem3_nb.exact_search import search_candidates
    from bgem3_nb.hybrid_index import HybridIndex
    passages = list(texts(n, pool))
    queries = [" ".join(passages[i].split()[2::2]) for i in np.linspace(0, n - 1, number).astype(int)]
    corpus, asked = encoder.encode_passages(passages), encoder.encode_queries(queries)
    known, ids = Encoded(encoder, corpus, {t: i for i, t in enumerate(passages)}), [str(i) for i in range(n)]
    all_three = {"dense": 1., "lexical": .3, "multi": 1.}
    def exact(weights):
        return lambda i: search_candidates(asked[[i]], corpus, 10, weights, progress=False).passages[0].tolist()
    def row(way, mb, seconds, ms, share):
        print(f"{n:7} {way:38} {mb:8.1f} {seconds:8.1f} {ms[0]:8.1f} {ms[1]:8.1f} {share:9.3f}", flush=True)
    ms, hybrid = timed(exact(all_three), number)
    whole = sum(x.nbytes for x in (corpus.dense, corpus.lexical.data, corpus.lexical.indices, corpus.multi)) / 1e6
    row("exact search, all, in memory", whole, 0, ms, 1.)
    dense_ms, dense = timed(exact({"dense": 1.}), number)
    row("exact search, dense, in memory", corpus.dense.nbytes / 1e6, 0, dense_ms, 1.)
    seconds, mb, ms, found = bm25_row(passages, queries)
    row("BM25", mb, seconds, ms, recall(found, hybrid))
    for outputs, weights in ((("dense",), {"dense": 1.}), (("dense", "lexical"), {"dense": 1., "lexical": .3}),
                             (("dense", "lexical", "multi"), all_three)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            index = HybridIndex(Path(folder) / "i", known, outputs=outputs)
            index.upsert(({"id": i, "text": t} for i, t in zip(ids, passages)), batch=256)
            seconds, mb = time.perf_counter() - start, size_of(folder)
            for candidates in (100, 400) if len(outputs) == 3 else (100,):
                find = lambda i: [int(h.id) for h in index.search(asked[[i]], 10, weights=weights,
                                                                  candidates=candidates)]
                ms, found = timed(find, number)
                row(f"index, {' + '.join(outputs)}, {candidates} candidates", mb, seconds, ms,
                    recall(found, dense if len(outputs) == 1 else hybrid))
            index.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--queries", type=int, default=50)
    args = parser.parse_args()
    from bgem3_nb.encoding import M3Encoder
    encoder, pool = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False), list(clauses())
    print(f"{HEAD[0]:>7} {HEAD[1]:38} " + " ".join(f"{h:>{9 if h[0] == 'r' else 8}}" for h in HEAD[2:]))
    for n in args.sizes: measure(n, args.queries, encoder, pool)


if __name__ == "__main__": main()
