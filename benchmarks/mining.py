"""Mining hard negatives beside sentence-transformers and FlagEmbedding's miner, on the same vectors.

    python benchmarks/mining.py                   20 000 queries × 50 000 and × 100 000 passages, d 256; about 6 minutes
    python benchmarks/mining.py --small           2 000 × 10 000, to see that it works
    python benchmarks/mining.py --scaling         time and memory over the number of passages and of queries
    python benchmarks/mining.py --hn-mine FILE    also FlagEmbedding's own script, scripts/hn_mine.py of its repository

Vectors around topics with a common direction, as encoders give them, are made once and given to every side: nothing is
encoded in `cached`. `end to end` adds what each side's own encoder takes for so many texts, with the same embedded
model: measured on --encode clauses of law in the side's own batches (ours; SentenceTransformer.encode, 32 texts;
FlagModel.encode). Every side takes the best negatives of each query after its positive; ours writes rows with scores,
as sentence-transformers writes its table. Each side runs in a process of its own, in turn, and its best time counts.
The candidates are compared before any time is printed: equal sets, but for passages whose scores differ by less than
1e-6. Peak memory is what a side takes above the vectors.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

LOW, HIGH, N = 10, 200, 7      # window of ranks and negatives of a query


def vectors(n, d, seed, topics=2000):
    "Unit vectors around topics, with a common direction."
    rng, shared = np.random.default_rng(seed), np.random.default_rng(0)
    centres = shared.standard_normal((topics, d), np.float32)
    x = centres[rng.integers(0, topics, n)]
    for a in range(0, n, 8192):
        part = x[a:a + 8192]
        part += 1.2 * rng.standard_normal((len(part), d), np.float32) + 1.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def inputs(queries, passages, d):
    "Vectors, texts, and the positive of each query: a passage near it."
    q, p = vectors(queries, d, 1), vectors(passages, d, 2)
    positive = np.arange(queries) % passages
    if queries <= passages: positive = np.random.default_rng(3).permutation(passages)[:queries]
    p[positive] = q * .8 + p[positive] * .5
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    return q, p, positive, [f"query {i}" for i in range(queries)], [f"passage {i}" for i in range(passages)]


def ours(q, p, positive, queries, passages, k):
    from bgem3_nb.encoding import Embeddings
    from bgem3_nb.exact_search import scores_of, top_dense
    from bgem3_nb.mining import corpus_set, known_positives, mined_rows, sample_pairs, take_negatives
    from bgem3_nb.rows import make_rows
    qe, pe = Embeddings(dense=q), Embeddings(dense=p)
    rows = make_rows({"query": a, "pos": passages[i]} for a, i in zip(queries, positive))
    def run():
        data = corpus_set(rows, passages)
        known, score = known_positives(data, key=None), lambda i, j: scores_of(qe, pe, i, j)
        found = top_dense(qe, pe, k)
        drawn = sample_pairs(found, known, data.queries, len(passages), score, N, f"{LOW}-{HIGH}", spare=1,
                             sampling_strategy="top")
        chosen, counts = take_negatives(drawn)
        mined = mined_rows(rows, data, chosen, "dense", score)
        return chosen, found, mined
    return run, lambda out: (out[0].passage.to_numpy().reshape(-1, N), out[1].passages)


class Model:
    "What `mine_hard_negatives` asks of a model, with vectors that are there already."
    device, model_card_data = "cpu", type("Card", (), {"base_model": ""})()
    def __init__(self, q, p): self.q, self.p = q, p
    def encode_query(self, texts, **kw): return self.q[[int(t.split()[1]) for t in texts]]
    def encode_document(self, texts, **kw): return self.p[[int(t.split()[1]) for t in texts]]
    def get_embedding_dimension(self): return self.q.shape[1]
    def similarity(self, a, b):
        from sentence_transformers.util import cos_sim, dot_score
        return dot_score(a, b)
    def similarity_pairwise(self, a, b):
        from sentence_transformers.util import pairwise_dot_score
        return pairwise_dot_score(a, b)


def sentence_transformers(use_faiss):
    def side(q, p, positive, queries, passages, k):
        from datasets import Dataset
        from sentence_transformers.util import mine_hard_negatives
        rows = Dataset.from_dict({"anchor": queries, "positive": [passages[i] for i in positive]})
        model, number = Model(q, p), lambda text: int(text.split()[1])
        def run():
            return mine_hard_negatives(rows, model, corpus=passages, range_min=LOW, range_max=HIGH, num_negatives=N,
                                       sampling_strategy="top", use_faiss=use_faiss, output_format="n-tuple",
                                       output_scores=True, verbose=False)
        def read(out):
            got = {number(r["anchor"]): [number(r[f"negative_{i}"]) for i in range(1, N + 1)] for r in out}
            return np.array([got[i] for i in range(len(queries))]), None
        return run, read
    return side


def hn_mine(script):
    "FlagEmbedding's miner: its own script where it is given, else its search (faiss's flat index, by 64 queries)."
    def side(q, p, positive, queries, passages, k):
        import faiss
        if not script:
            def run():
                index = faiss.IndexFlatIP(q.shape[1])
                index.add(p)
                return [row for a in range(0, len(q), 64) for row in index.search(q[a:a + 64], k=HIGH)[1].tolist()]
            return run, lambda out: (None, np.array(out))
        spec = importlib.util.spec_from_file_location("hn_mine", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder, seen = Path(tempfile.mkdtemp()), []
        lines = (json.dumps({"query": a, "pos": [passages[i]]}) for a, i in zip(queries, positive))
        (folder/"in.jsonl").write_text("\n".join(lines))
        (folder/"pool.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in passages))
        class Embedder:
            def encode(self, texts):
                self.order = np.array([int(t.split()[1]) for t in texts])
                return p[self.order]
            def encode_queries(self, texts): return q[[int(t.split()[1]) for t in texts]]
        model, search = Embedder(), module.batch_search
        def kept(*a, **kw):
            out = search(*a, **kw)
            seen[:] = [out[1]]
            return out
        module.batch_search = kept
        files = [str(folder/f"{name}.jsonl") for name in ("in", "out", "pool")]
        def run(): module.find_knn_neg(model, *files, [LOW, HIGH], N)
        return run, lambda out: (None, model.order[np.array(seen[0])])
    return side


def sides(script):
    return {"ours": ours, "sentence-transformers": sentence_transformers(False),
            "sentence-transformers, faiss": sentence_transformers(True),
            "FlagEmbedding hn_mine" + ("" if script else ", search only"): hn_mine(script)}


def memory(field): return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def child(args):
    "Time, peak memory and result of one side, in this process."
    q, p, positive, queries, passages = inputs(args.queries, args.passages, args.d)
    run, read = sides(args.hn_mine)[args.side](q, p, positive, queries, passages, HIGH + 1)
    if args.side == "ours":     # imports and first calls are nobody's work
        from bgem3_nb.encoding import Embeddings
        from bgem3_nb.exact_search import top_dense
        top_dense(Embeddings(dense=q[:600]), Embeddings(dense=p[:5000]), 20)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    out = run()
    seconds = time.perf_counter() - start
    top = memory("VmHWM") - before
    chosen, found = read(out)
    np.savez(args.result, **{k: v for k, v in (("chosen", chosen), ("found", found)) if v is not None})
    print(json.dumps({"seconds": seconds, "peak": top}))


def call(args, side, queries, passages, result):
    words = ["--side", side, "--queries", queries, "--passages", passages, "--d", args.d, "--result", result]
    if args.hn_mine: words += ["--hn-mine", args.hn_mine]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, env=env)
    if done.returncode: sys.exit(f"{side}: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(results, q, p):
    "Stops unless the candidates are the same, but for passages that score the same."
    def same(a, b, what):
        differ = np.flatnonzero([set(x) != set(y) for x, y in zip(a.tolist(), b.tolist())])
        for i in differ:
            only = sorted(set(a[i].tolist()) ^ set(b[i].tolist()))
            s = p[only] @ q[i]
            if np.ptp(s) > 1e-6 or not len(only): sys.exit(f"{what}: other candidates for query {i}")
        ties = f", equal scores at the edge in {len(differ):,}" if len(differ) else ""
        return f"{what}: same candidates for {len(a) - len(differ):,} of {len(a):,} queries{ties}"
    mine, said = results["ours"], []
    for name, r in results.items():
        if name == "ours": continue
        sides = (mine["chosen"], r["chosen"]) if "chosen" in r else (mine["found"][:, :HIGH], r["found"][:, :HIGH])
        said.append(same(*sides, name))
    return said


def encoding_rates(n):
    "Seconds that each side's encoder takes for a text, dense vectors by the embedded model."
    if not n: return [0.] * 4
    from corpus import clauses, texts
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer, models
    from bgem3_nb.backbone import embedded_path
    from bgem3_nb.encoding import M3Encoder
    some, path = list(texts(n, list(clauses()))), str(embedded_path(progress=False))
    ours, base = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False), models.Transformer(path)
    pooling = models.Pooling(base.get_word_embedding_dimension(), "mean")
    st = SentenceTransformer(modules=[base, pooling, models.Normalize()], device="cpu")
    flag = FlagModel(path, pooling_method="mean", normalize_embeddings=True, use_fp16=False, devices="cpu")
    prompted = lambda texts: ["passage: " + t for t in texts]
    calls = [lambda x: ours.encode(x, "passage: ", ("dense",)).dense,
             lambda x: st.encode(prompted(x), batch_size=32), lambda x: flag.encode(prompted(x), batch_size=256)]
    best, vectors = [], []
    for call in calls:
        vectors.append(np.asarray(call(some[:64])))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            call(some)
            seconds.append((time.perf_counter() - start) / n)
        best.append(min(seconds))
    if min((vectors[0] * v).sum(1).min() for v in vectors[1:]) < .999: sys.exit("the encoders do not agree")
    names = ("ours", "sentence-transformers", "FlagEmbedding")
    print("encoding, texts a second: " + ", ".join(f"{name} {1 / s:,.0f}" for name, s in zip(names, best)))
    return [best[0], best[1], best[1], best[2]]


def compare(args, queries, passages, rates):
    "One table."
    names, best, peak, results = list(sides(args.hn_mine)), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            for name in names[::-1 if turn % 2 else 1]:
                got = call(args, name, queries, passages, f"{folder}/{names.index(name)}.npz")
                best[name] = min(best.get(name, np.inf), got["seconds"])
                peak[name] = max(peak.get(name, 0), got["peak"])
        results = {name: dict(np.load(f"{folder}/{i}.npz")) for i, name in enumerate(names)}
    q, p, *_ = inputs(queries, passages, args.d)
    print(f"\n{queries:,} queries × {passages:,} passages, d {args.d}, ranks {LOW} to {HIGH}, {N} negatives")
    for line in check(results, q, p): print(" ", line)
    whole = {name: best[name] + rate * (queries + passages) for name, rate in zip(names, rates)}
    print(f"{'':40}{'cached s':>10}{'ours ×':>8}{'end to end s':>14}{'ours ×':>8}{'peak MB':>9}")
    for name in names:
        print(f"{name:40}{best[name]:10.2f}{best[name] / best['ours']:8.2f}{whole[name]:14.1f}"
              f"{whole[name] / whole['ours']:8.2f}{peak[name]:9.0f}", flush=True)


def scaling(args):
    "Time over queries × passages, and memory over passages."
    sizes = [(args.queries, args.passages // f) for f in (8, 4, 2, 1)]
    sizes += [(args.queries // f, args.passages) for f in (4, 2)]
    print(f"\nours, d {args.d}\n{'queries':>10}{'passages':>10}{'seconds':>10}{'ns a pair':>11}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for n, m in sizes:
            got = [call(args, "ours", n, m, f"{folder}/x.npz") for _ in range(args.repeats)]
            s = min(g["seconds"] for g in got)
            print(f"{n:10,}{m:10,}{s:10.2f}{s / n / m * 1e9:11.3f}{max(g['peak'] for g in got):9.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("queries", 20_000), ("passages", 100_000), ("d", 256), ("repeats", 2), ("encode", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--small", action="store_true", help="2 000 × 10 000, once")
    parser.add_argument("--scaling", action="store_true", help="time and memory of ours over the sizes")
    parser.add_argument("--hn-mine", default="", help="path of FlagEmbedding's scripts/hn_mine.py")
    for hidden in ("side", "result"): parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this benchmark reads the memory of a process from /proc, as Linux has it")
    if args.side: return child(args)
    if args.small: args.queries, args.passages, args.repeats, args.encode = 2000, 10_000, 1, 32
    import torch
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.scaling: return scaling(args)
    rates = encoding_rates(args.encode)
    for passages in dict.fromkeys((args.passages // 2, args.passages)): compare(args, args.queries, passages, rates)


if __name__ == "__main__": main()
