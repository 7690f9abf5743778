"""What a hybrid index costs beside exact search and BM25: bytes, building time, milliseconds and quality.

    python benchmarks/hybrid_index.py                       1 000 and 10 000 chunks
    python benchmarks/hybrid_index.py --sizes 100000        other sizes; 100 000 need about 12 GB of disk, 4 of memory
    python benchmarks/hybrid_index.py --only "all tokens"   the ways whose name ends so (or exact, BM25)
    python benchmarks/hybrid_index.py --cache DIR           keep what was encoded, and the exact results, for later
    python benchmarks/hybrid_index.py --cache DIR --build   only build, and keep the indexes as well
    python benchmarks/hybrid_index.py --cache DIR --measure only measure what was built so


A chunk is one to four clauses of 8 to 20 words of six Vietnamese codes. So that 100 000 chunks need not be encoded,
each clause is encoded once and the vectors of a chunk are put together from those of its clauses: all their
multi-vectors, the largest weight of each term, the mean of the dense vectors at length 1. A query is every second word
of one chunk, encoded as any query. `recall` is the share of exact search's ten best chunks, in the same weights and
with all tokens, that a way finds: for `dense` of the dense ones, for all others of the hybrid ones. `own` is the share
of queries whose own chunk is among the ten. Building leaves the encoding out, and so do the milliseconds.

Seconds and milliseconds are processor time of all threads together, which does not depend on what else runs on the
machine; with the files in memory, a search on idle cores takes no longer than that. `wall p95` is what the clock said.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from corpus import clauses  # noqa: E402

HEAD = (f"{'chunks':>7} {'way':44} {'MB':>8} {'build s':>8} {'ms p50':>8} {'ms p95':>8} {'wall p95':>8} {'recall':>7} "
        f"{'own':>5}")
HYBRID = {"dense": 1., "lexical": .3, "multi": 1.}


def _both(kind): return {"quantization": {"dense": kind, "multi": kind}}


WAYS = {   # name -> settings of the index, weights, candidates that are tried
    "dense": ({"outputs": ("dense",)}, {"dense": 1.}, (100,)),
    "dense + lexical": ({"outputs": ("dense", "lexical")}, {"dense": 1., "lexical": .3}, (100,)),
    "+ MaxSim, 32 tokens": ({"multi_tokens": 32}, HYBRID, (100, 200)),
    "+ MaxSim, 64 tokens": ({"multi_tokens": 64}, HYBRID, (100, 200)),
    "+ MaxSim, all tokens": ({}, HYBRID, (100, 200, 400)),
    "+ MaxSim, all tokens, scalar": (_both("scalar"), HYBRID, (100, 200)),
    "+ MaxSim, all tokens, binary": (_both("binary"), HYBRID, (100, 200)),
}


class Chunks:
    "Chunks put together from encoded clauses; stands where the index expects an encoder."
    def __init__(self, encoder, store, pool, n):
        self.encoder, self.pool, self.clauses, self.seconds = encoder, pool, store.embeddings(), 0.
        rng, seen = np.random.default_rng(0), set()
        self.parts = []                # clauses of each chunk
        while len(self.parts) < n:
            part = tuple(rng.integers(0, len(pool), rng.integers(1, 5)).tolist())
            if part not in seen: self.parts.append(part)
            seen.add(part)
        self.texts = [". ".join(pool[c] for c in part) for part in self.parts]
        self.number = {t: i for i, t in enumerate(self.texts)}
        self.ids = {}

    def __getattr__(self, name): return getattr(self.encoder, name)

    def embeddings(self, rows, multi=True):
        "The vectors of some chunks."
        from bgem3_nb.encoding import Embeddings
        flat = np.array([c for i in rows for c in self.parts[i]])
        starts = np.cumsum([0, *(len(self.parts[i]) for i in rows)])
        e = self.clauses if multi else Embeddings(self.clauses.dense, self.clauses.lexical)
        e = e[flat]
        dense = np.add.reduceat(e.dense, starts[:-1])
        dense /= np.linalg.norm(dense, axis=1, keepdims=True)
        owner = np.repeat(np.repeat(np.arange(len(rows)), np.diff(starts)), np.diff(e.lexical.indptr))
        order = np.lexsort((e.lexical.indices, owner))
        key = owner[order] * e.lexical.shape[1] + e.lexical.indices[order]
        first = np.flatnonzero(np.append(True, np.diff(key)))
        largest = np.maximum.reduceat(e.lexical.data[order], first)
        at = np.divmod(key[first], e.lexical.shape[1])
        lexical = csr_matrix((largest, at), shape=(len(rows), e.lexical.shape[1]))
        return Embeddings(dense, lexical, *((e.multi, e.offsets[starts]) if multi else ()))

    def maxsim(self, asked):
        "MaxSim of every query with every chunk: the best of a chunk's tokens is the best of its clauses' best ones."
        parts = np.array([(*p, *[p[0]] * (4 - len(p))) for p in self.parts])
        every = np.empty((len(asked), len(self.parts)), np.float32)
        tokens = np.asarray(self.clauses.multi, np.float32)
        for i in range(len(asked)):
            best = np.maximum.reduceat(tokens @ asked.vectors(i).astype(np.float32).T, self.clauses.offsets[:-1])
            every[i] = best[parts].max(1).mean(1)
        return every

    def encode_counted(self, texts, **kwargs):
        from bgem3_nb.exact_search import select_outputs
        if any(t not in self.number for t in texts): return self.encoder.encode_counted(texts, **kwargs)
        start = time.process_time()
        found = select_outputs(self.embeddings([self.number[t] for t in texts]), kwargs["outputs"])
        self.seconds += time.process_time() - start
        return found, 0

    def tokenize(self, texts, **kwargs):
        "The token ids of chunks: those of their clauses."
        start = time.process_time()
        used = {c for t in texts for c in self.parts[self.number[t]]} - self.ids.keys()
        self.ids |= zip(used, self.encoder.tokenize([self.pool[c] for c in used], **kwargs)) if used else {}
        found = [[0] + [i for c in self.parts[self.number[t]] for i in self.ids[c][1:]] for t in texts]
        self.seconds += time.process_time() - start
        return found


def asked_chunks(chunks, number):
    "The chunks that are asked for, and the queries: every second word of each."
    sources = np.linspace(0, len(chunks.texts) - 1, number).astype(int)
    return sources, [" ".join(chunks.texts[i].split()[2::2]) for i in sources]


def clocks(): return np.array([time.process_time(), time.perf_counter()])


def milliseconds(times):
    "Processor time (median, 95 %) and wall time (95 %) of searches."
    times = 1e3 * np.array(times)
    return (*np.percentile(times[:, 0], [50, 95]), np.percentile(times[:, 1], 95))


def timed(search, n):
    "Milliseconds of every search, and what each found."
    times, found = [], []
    for i in range(n):
        start = clocks()
        found.append(list(search(i)))
        times.append(clocks() - start)
    return milliseconds(times), found


def recall(found, exact): return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, exact)])


def size_of(folder):
    "Megabytes that the files of a folder occupy."
    return sum(512 * f.stat().st_blocks for f in Path(folder).rglob("*") if f.is_file()) / 1e6


def blocks(chunks, size=2000, **kwargs):
    for a in range(0, len(chunks.parts), size):
        yield chunks.embeddings(range(a, min(a + size, len(chunks.parts))), **kwargs)


def exact_search(chunks, asked, file):
    "The ten best chunks of each query, dense and hybrid; kept in a file."
    from bgem3_nb.scoring import all_scores, fuse
    if file.exists(): return dict(np.load(file))
    parts = [all_scores(type(asked)(asked.dense, asked.lexical), b) for b in blocks(chunks, multi=False)]
    every = {m: np.hstack([p[m] for p in parts]) for m in ("dense", "lexical")} | {"multi": chunks.maxsim(asked)}
    scores = {"dense": every["dense"], "hybrid": fuse(every, HYBRID)}
    best = {name: np.argsort(-s, axis=1, kind="stable")[:, :10] for name, s in scores.items()}
    np.savez(file, **best)
    return best


def exact_times(chunks, asked, queries=5):
    "Milliseconds of exact search for a query alone, dense and hybrid."
    from bgem3_nb.scoring import all_scores, fuse
    seconds = {name: np.zeros((queries, 2)) for name in ("dense", "hybrid")}
    for block in blocks(chunks):
        for i in range(queries):
            for name in seconds:
                part = block if name == "hybrid" else type(block)(block.dense)
                start = clocks()
                fuse(all_scores(asked[[i]], part), HYBRID if name == "hybrid" else {"dense": 1.})
                seconds[name][i] += clocks() - start
    return {name: milliseconds(s) for name, s in seconds.items()}


def built(folder, chunks, settings):
    "Build an index where it is not there yet; returns its megabytes and the seconds it took."
    from bgem3_nb.hybrid_index import HybridIndex
    note = folder / "built.json"
    if note.exists(): return json.loads(note.read_text())
    shutil.rmtree(folder, ignore_errors=True)     # a run that was stopped
    with HybridIndex(folder / "i", chunks, **settings) as index:
        chunks.seconds, start = 0., time.process_time()
        index.upsert(({"id": str(i), "text": t} for i, t in enumerate(chunks.texts)), batch=256)
        seconds = time.process_time() - start - chunks.seconds
    found = [size_of(folder), seconds]
    note.write_text(json.dumps(found))
    return found


def read_once(folder):
    "Read the files of a folder, so that they are in memory."
    for file in Path(folder).rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                while f.read(1 << 24): pass


def bm25(passages, queries):
    "BM25 by bm25s: megabytes, seconds, milliseconds, and what it found."
    from bgem3_nb.scoring import load_bm25s
    bm25s = load_bm25s()
    cut = lambda t: bm25s.tokenize(t, stopwords=None, show_progress=False)
    start = time.process_time()
    words = bm25s.BM25()
    words.index(cut(passages), show_progress=False)
    seconds = time.process_time() - start
    find = lambda i: words.retrieve(cut([queries[i]]), k=10, show_progress=False)[0][0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        words.save(folder)
        return size_of(folder), seconds, *timed(find, len(queries))


def measure(n, encoder, pool, cache, args):
    "Build the indexes of one size, print their rows, or both."
    from bgem3_nb.hybrid_index import HybridIndex
    from bgem3_nb.store import EmbeddingStore
    chunks = Chunks(encoder, EmbeddingStore(cache / "clauses"), pool, n)
    sources, queries = asked_chunks(chunks, args.queries)
    asked = encoder.encode_queries(queries)
    exact = exact_search(chunks, asked, cache / f"exact-{n}-{args.queries}.npz")
    def row(way, mb, seconds, ms, found, truth=exact["hybrid"]):
        own = np.mean([i in f for i, f in zip(sources, found)])
        print(f"{n:7} {way:44} {mb:8.1f} {seconds:8.1f} {ms[0]:8.1f} {ms[1]:8.1f} {ms[2]:8.1f} "
              f"{recall(found, truth):7.3f} {own:5.2f}", flush=True)
    def wanted(way): return not args.only or any(way.endswith(o) for o in args.only)
    lengths = np.diff(chunks.clauses.offsets)
    tokens = sum(int(lengths[list(p)].sum()) for p in chunks.parts)
    width = chunks.clauses.dense.shape[1]
    if wanted("exact") and not args.build:
        ms = exact_times(chunks, asked)
        row("exact, all modes, float32", 4e-6 * width * (tokens + n), 0, ms["hybrid"], exact["hybrid"].tolist())
        row("exact, dense", 4e-6 * width * n, 0, ms["dense"], exact["dense"].tolist(), exact["dense"])
    if wanted("BM25") and not args.build: row("BM25", *bm25(chunks.texts, queries))
    for way, (settings, weights, tried) in WAYS.items():
        folder = cache / f"{n}-{way}"
        if not wanted(way) or args.measure and not (folder / "built.json").exists(): continue
        mb, seconds = built(folder, chunks, settings)
        if args.build:
            print(f"{n:7} {way:44} {mb:8.1f} {seconds:8.1f}", flush=True)
            continue
        read_once(folder)
        with HybridIndex(folder / "i") as index:
            for candidates in tried:
                def find(i): return [int(h.id) for h in index.search(
                    asked[[i]], 10, weights=weights, candidates=candidates)]
                timed(find, 5)     # the first ones are slow
                row(f"{way}, {candidates} candidates", mb, seconds, *timed(find, args.queries),
                    exact["dense" if way == "dense" else "hybrid"])
        if not args.measure: shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--cache", type=Path)
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--build", action="store_true", help="only build the indexes, in --cache")
    step.add_argument("--measure", action="store_true", help="only measure those that were built there")
    args = parser.parse_args()
    if (args.build or args.measure) and not args.cache: parser.error("--build and --measure need --cache")
    from bgem3_nb.encoding import M3Encoder
    from bgem3_nb.store import encode_corpus
    encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False)
    pool = list(dict.fromkeys(clauses()))
    with tempfile.TemporaryDirectory() if args.cache is None else nullcontext(args.cache) as cache:
        encode_corpus(encoder, pool, Path(cache) / "clauses")
        print(HEAD)
        for n in args.sizes: measure(n, encoder, pool, Path(cache), args)


if __name__ == "__main__": main()
