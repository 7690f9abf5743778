"""What scoring costs beside the reference and sentence-transformers: lexical weights, MaxSim, and given pairs.

    python benchmarks/scoring.py            100 queries × 2 000 passages for MaxSim, × 5 000 for lexical weights
    python benchmarks/scoring.py --small    a tenth of the passages and d 384 only, to see that it works

MaxSim: queries of 16 to 32 tokens, passages of 8 to 512, 128 in the mean; random vectors with a common direction and
a vocabulary, as encoders give them, so similarities are high and close together. Before anything is timed the
results are compared. Every case runs in a process of its own; there the sides take turns, in an order that is turned
round each time, and the best time counts; the reference's loop of small products takes its turns with one thread and
with all. The memory of a side is measured in one more process: the peak above what its inputs take. GFLOP/s count
the products of all tokens; `bare product` is torch's matrix product of as many numbers, without the maxima.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from scipy.sparse import csr_matrix

from bgem3_nb.encoding import Embeddings
from bgem3_nb.scoring import lexical_scores, maxsim_scores, pair_scores

REPEATS = 3


def vectors(lengths, d, seed):
    "Unit vectors of texts of these lengths."
    rng, shared = np.random.default_rng(seed), np.random.default_rng(0)
    words, common = (shared.standard_normal((n, d), np.float32) for n in (5000, 1))
    x, noise = words[np.minimum(rng.zipf(1.2, lengths.sum()), 5000) - 1], .7 * rng.standard_normal(
        (9973, d), np.float32)
    x += common
    for a in range(0, len(x), 9973): x[a:a + 9973] += noise[:len(x) - a]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Embeddings(multi=x, offsets=np.append(0, np.cumsum(lengths)).astype(np.int64))


def queries_and_passages(queries, passages, d):
    "Queries of 16 to 32 tokens and passages of 8 to 512, 128 in the mean."
    rng = np.random.default_rng(1)
    return vectors(rng.integers(16, 33, queries), d, 2), vectors(
        rng.gamma(3, 128 / 3, passages).astype(int).clip(8, 512), d, 3)


def terms(texts, tokens, seed):
    "Lexical weights over a vocabulary of 250 002."
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.2, texts * tokens), 250_001)
    rows = np.arange(texts).repeat(tokens)
    lexical = csr_matrix((rng.random(len(ids), np.float32) / 10, (rows, ids)), shape=(texts, 250_002))
    return Embeddings(lexical=lexical)


def lists(e): return [torch.from_numpy(e.vectors(i)) for i in range(len(e))]


def lexical_sides(small):
    "Name to a function that gives the scores, and what else is known of the case."
    q, p = terms(100, 15, 1), terms(500 if small else 5000, 110, 2)
    def reference():
        from FlagEmbedding.inference.embedder.encoder_only.m3 import M3Embedder
        a, b = (e.to_dict()["lexical_weights"] for e in (q, p))
        return lambda: M3Embedder.compute_lexical_matching_score(None, a, b)
    return {"ours": lambda: lambda: lexical_scores(q, p), "FlagEmbedding": reference}, 0


def maxsim_sides(d, small):
    "The same for MaxSim of width `d`."
    q, p = queries_and_passages(100, 200 if small else 2000, d)
    def reference():
        from FlagEmbedding.inference.embedder.encoder_only.m3 import M3Embedder
        a, b = ([e.vectors(i) for i in range(len(e))] for e in (q, p))
        return lambda: np.array([[M3Embedder.colbert_score(None, x, y).item() for y in b] for x in a])
    def peer(dtype):
        from sentence_transformers.util import maxsim
        a, b = ([v.to(dtype) for v in lists(e)] for e in (q, p))
        return lambda: maxsim(a, b, length_normalize=True).numpy()
    def bare(dtype):
        a, b = (torch.from_numpy(e.multi).to(dtype) for e in (q, p))
        def run():
            for i in range(0, len(b), 2048): a @ b[i:i + 2048].T
        return run
    bf16 = torch.bfloat16
    return {"ours fp32": lambda: lambda: maxsim_scores(q, p),
            "ours bf16": lambda: lambda: maxsim_scores(q, p, dtype=bf16), "FlagEmbedding loop": reference,
            "sentence-transformers": lambda: peer(torch.float32), "sentence-transformers bf16": lambda: peer(bf16),
            "bare product fp32": lambda: bare(torch.float32),
            "bare product bf16": lambda: bare(bf16)}, 2e-9 * len(q.multi) * len(p.multi) * d


def pair_sides(pairs):
    "`pairs` random pairs, and the reference's scoring of one batch of so many."
    (q, p), rng = queries_and_passages(200, 200, 384), np.random.default_rng(3)
    i, j = rng.integers(0, 200, pairs), rng.integers(0, 200, pairs)
    def reference():
        from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model as Model
        pad = lambda e, at: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(e.vectors(n)) for n in at],
                                                            batch_first=True)
        a, b, mask = pad(q, i), pad(p, j), torch.ones(pairs, int(np.diff(q.offsets)[i].max()) + 1)
        holder = type("Model", (), {"temperature": 1})
        return lambda: Model.compute_colbert_score(holder, a, b, mask).diagonal()
    return {"ours": lambda: lambda: pair_scores(q, p, i, j)["multi"], "FlagEmbedding": reference}, 0


def memory(field): return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def sides_of(case, small):
    kind, _, size = case.partition(" ")
    return {"lexical": lambda: lexical_sides(small), "maxsim": lambda: maxsim_sides(int(size or 0), small),
            "pairs": lambda: pair_sides(int(size or 0))}[kind]()


def peak(case, side, small):
    "MB that one side takes at its highest, above its inputs."
    run = sides_of(case, small)[0][side]()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def check(case, results):
    "Stops where the sides do not agree; says what was compared."
    if case == "lexical":
        np.testing.assert_allclose(results["ours"], results["FlagEmbedding"], atol=1e-5)
        return "results equal within 1e-5"
    exact = results["ours fp32"]
    for peer in ("FlagEmbedding loop", "sentence-transformers"):
        np.testing.assert_allclose(exact, results[peer], atol=1e-5)
    top = lambda s: np.argsort(-s, axis=1, kind="stable")[:, :10]
    same = lambda s: np.mean([set(a) == set(b) for a, b in zip(top(exact), top(s))])
    if same(results["ours bf16"]) < 1:
        sys.exit(f"{case}: the ten best passages of bf16 are not those of fp32 for every query")
    return (f"fp32 results equal within 1e-5; bf16: largest error {abs(results['ours bf16'] - exact).max():.1e}, same "
            f"ten best passages for "
            f"{same(results['ours bf16']):.0%} of the queries (sentence-transformers bf16: "
            f"{same(results['sentence-transformers bf16']):.0%})")


def measure(case, small):
    "Seconds of every side, its best of several turns."
    make, work = sides_of(case, small)
    sides = {name: f() for name, f in make.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {"FlagEmbedding loop": sides["FlagEmbedding loop"]()} if "FlagEmbedding loop" in sides else {}
    torch.set_num_threads(threads)
    said = check(case, results | {name: run() for name, run in sides.items() if name not in results})
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(1 if small else REPEATS):
        for name in list(sides)[::1 if turn % 2 else -1]:
            torch.set_num_threads(1 if name == "FlagEmbedding loop" and turn % 2 == 0 else threads)
            for _ in range(1 if name.startswith(("Flag", "sentence")) else 2):
                start = time.perf_counter()
                sides[name]()
                best[name] = min(best[name], time.perf_counter() - start)
    return {"seconds": best, "work": work, "said": said}


def child(*args):
    done = subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode: sys.exit(f"{' '.join(map(str, args))}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def report(case, small):
    "Both measurements of a case, as a table."
    flag = ["--small"] if small else []
    got = child("--case", case, *flag)
    print(f"\n{case}: {got['said']}\n{'':28}{'seconds':>10}{'GFLOP/s':>10}{'peak MB':>10}   how often faster than",
          flush=True)
    for name, t in got["seconds"].items():
        ours = name.startswith("ours")
        peers = {n: s for n, s in got["seconds"].items() if not n.startswith(("ours", "bare"))} if ours else {}
        shares = [f"{s / t:.0%} of {n}" for n, s in got["seconds"].items()
                  if ours and n == "bare product " + name.split()[-1]]
        rate = f"{got['work'] / t:,.0f}" if got["work"] else ""
        measured = not name.startswith("bare") and (ours or not small)
        top = f"{child('--case', case, '--side', name, *flag):,.0f}" if measured else ""
        print(f"{name:28}{t:10.4f}{rate:>10}{top:>10}   "
              f"{', '.join([f'{n} {s / t:.1f}×' for n, s in peers.items()] + shares)}", flush=True)


def report_pairs(small):
    "How the memory of given pairs grows with their number."
    sizes = (16, 32) if small else (32, 64, 128, 256)
    print(f"\npairs, d 384: peak MB above the inputs\n{'pairs':>10}{'ours':>10}{'FlagEmbedding, one batch':>28}",
          flush=True)
    for n in sizes:
        print(f"{n:10}" + "".join(f"{child('--case', f'pairs {n}', '--side', s):{w},.1f}"
                                  for s, w in (("ours", 10), ("FlagEmbedding", 28))), flush=True)
    for n in (4_000,) if small else (10_000, 100_000):
        print(f"{n:10,}{child('--case', f'pairs {n}', '--side', 'ours'):10,.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the passages, d 384 only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this benchmark reads the memory of a process from /proc, as Linux has it")
    if args.case:
        return print(json.dumps(peak(args.case, args.side, args.small) if args.side
                                else measure(args.case, args.small)))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in ("lexical", "maxsim 384", "maxsim 1024")[:2 if args.small else 3]: report(case, args.small)
    report_pairs(args.small)


if __name__ == "__main__": main()
