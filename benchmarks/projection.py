"""What training the projection head costs on vectors that are kept, beside encoding again in every epoch, and beside
a loss in Python loops.

    python benchmarks/projection.py                      10 000 examples, 17 epochs, 384 → 128 and 1024 → 256
    python benchmarks/projection.py --examples 1000      fewer
    python benchmarks/projection.py --steps 3            fewer steps of the slow sides, which are measured step by step

The examples are generated searches for rooms (`data/rental/generate.py`), 4 to 5 hard negatives each. The whole
training on kept vectors is timed, and `encode once` beside it. `encoded again` is the same trainer whose vectors
come from the encoder in every step; `python loss` is the same trainer with the per-example formula in loops. Both
are timed on some steps, after one that is not counted, and an epoch is so many steps. At 1024 dimensions the vectors
are random and nothing is encoded. Losses of the fast and the slow formula are compared first. Memory is the peak of
a process that does only this.
"""
import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "data" / "rental")]
import torch
import torch.nn.functional as F

from bgem3_nb.model import ProjectionHead
from bgem3_nb.projection import (
    CachedVectors, Examples, ProjectionArguments, ProjectionTrainer, batch, projection_loss)


def examples(n):
    "Generated searches as examples, weights by type."
    from generate import row
    rng, weight = random.Random(7), {"location": 2.5, "price": 2., "area": 1.5}
    rows = [row(rng) for _ in range(n)]
    return Examples.from_rows([{
        "query": r["query"], "pos": [r["pos"]], "neg": [x["text"] for x in r["hard_neg"]],
        "neg_types": [x["type"] for x in r["hard_neg"]],
        "neg_weights": [max(weight.get(t, 1.) for t in x["type"]) for x in r["hard_neg"]]} for r in rows])


class EncodedAgain(torch.nn.Module):
    "Vectors from the encoder whenever they are asked for."
    def __init__(self, encoder, data):
        super().__init__()
        self.encoder, self.data = encoder, data
    def queries(self, places):
        return torch.from_numpy(self.encoder.encode_queries([self.data.queries[i] for i in places],
                                                            outputs=("dense",)).dense)
    def passages(self, places):
        return torch.from_numpy(self.encoder.encode_passages([self.data.passages[i] for i in places],
                                                             outputs=("dense",)).dense)


def looped_loss(data, positive, at, q, p, temperature=.02):
    "The formula, example by example: q (b, d'), p (b + t, d') from the head; `positive` holds the known pairs."
    q, p, forth, back = F.normalize(q, dim=-1), F.normalize(p, dim=-1), [], []
    owner, places = data.negatives(at)
    query, pos, neg = data.query[at].tolist(), data.pos[at].tolist(), data.neg[places].tolist()
    of, w = owner.tolist(), data.weights[places].tolist()
    for i in range(len(at)):
        terms = [q[i] @ p[i] / temperature] + [q[i] @ p[j] / temperature for j in range(len(at))
                                               if j != i and (query[i], pos[j]) not in positive]
        for k in range(len(neg)):
            if (query[i], neg[k]) not in positive:
                terms.append(q[i] @ p[len(at) + k] / temperature + torch.tensor(w[k] if of[k] == i else 1.).log())
        turned = [terms[0]] + [q[j] @ p[i] / temperature for j in range(len(at))
                               if j != i and (query[j], pos[i]) not in positive]
        forth.append(torch.stack(terms).logsumexp(0) - terms[0])
        back.append(torch.stack(turned).logsumexp(0) - turned[0])
    return (torch.stack(forth).mean() + torch.stack(back).mean()) / 2


def known(data): return set(zip(data.query.tolist(), data.pos.tolist()))


class Looped(ProjectionTrainer):
    "The trainer with the loss in loops."
    def __init__(self, *args):
        super().__init__(*args)
        self.positive = known(self.data)

    def step(self, at):
        query, columns, _ = batch(self.data, at)
        loss = looped_loss(self.data, self.positive, at, self.head(self.vectors.queries(query)),
                           self.head(self.vectors.passages(columns)))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.)
        self.optimizer.step()
        return loss.item()


def seconds_a_step(trainer, steps, size):
    "Mean over some steps, after one."
    at = torch.randperm(len(trainer.data), generator=torch.Generator().manual_seed(0)).split(size)
    trainer.step(at[0])
    begun = time.perf_counter()
    for i in range(steps): trainer.step(at[(i + 1) % len(at)])
    return (time.perf_counter() - begun) / steps


def peak(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def case(n, d_in, d_out, epochs, size, steps):
    "One table line for each side."
    data, head = examples(n), ProjectionHead(d_in, d_out)
    args, each = ProjectionArguments(epochs=epochs, batch_size=size), -(-n // size)
    encoder, once = None, 0.
    if d_in == 384:
        from bgem3_nb.encoding import M3Encoder
        encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False, max_length=128)
        texts = data.passages[:400] + data.queries[:100]
        encoder.encode(texts[:64], outputs=("dense",))
        begun = time.perf_counter()
        encoder.encode(texts, outputs=("dense",))
        once = (time.perf_counter() - begun) / 500 * (len(data.passages) + len(data.queries))
    gen = torch.Generator().manual_seed(0)
    vectors = CachedVectors(*(F.normalize(torch.randn(len(t), d_in, generator=gen), dim=-1)
                              for t in (data.queries, data.passages)))
    at = torch.arange(min(16, n))
    query, columns, weights = batch(data, at)
    q, p = head(vectors.queries(query)), head(vectors.passages(columns))
    difference = abs(projection_loss(q, p, weights).item() - looped_loss(data, known(data), at, q, p).item())
    assert difference < 1e-4, f"the two losses differ by {difference}"
    before = peak()
    begun = time.perf_counter()
    ProjectionTrainer(head, vectors, data, args).train()
    whole = time.perf_counter() - begun
    memory = peak() - before
    looped = seconds_a_step(Looped(ProjectionHead(d_in, d_out), vectors, data, args), steps, size) * each * epochs
    name = f"{d_in} → {d_out}"
    print(f"{name:12} {'kept vectors':16} {whole:9.1f} {'':>8} {memory:9.0f}   {whole / epochs / each * 1e3:.2f} ms a "
          f"step of {size} examples, {head.linear.weight.numel():,} parameters")
    print(f"{name:12} {'python loss':16} {looped:9.0f} {looped / whole:7.0f}x")
    if encoder:
        again = seconds_a_step(ProjectionTrainer(ProjectionHead(d_in, d_out), EncodedAgain(encoder, data), data, args),
                               steps, size) * each * epochs
        print(f"{name:12} {'encoded again':16} {again:9.0f} {again / whole:7.0f}x {'':9}   "
              f"{again / (once + whole):.1f}x of encode once ({once:.0f} s) and train")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", type=int, default=10_000)
    p.add_argument("--epochs", type=int, default=17)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--case", nargs=2, type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.case: case(args.examples, *args.case, args.epochs, args.batch, args.steps)
    else:
        print(f"{args.examples} examples, {args.epochs} epochs, {torch.get_num_threads()} threads\n{'head':12} "
              f"{'side':16} {'seconds':>9} {'ratio':>8} {'peak MB':>9}", flush=True)
        for widths in ((384, 128), (1024, 256)):
            subprocess.run([
                sys.executable, __file__, "--case", *map(str, widths),
                *(f"--{k}={getattr(args, k)}" for k in ("examples", "epochs", "batch", "steps"))], check=True)
