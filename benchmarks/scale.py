"""What a passage costs on this machine when a corpus is encoded, written, mined and merged, whether that stays flat as
the corpus grows, and what 10 million, 100 million and a billion passages would need.

    python benchmarks/scale.py                          10 000, 100 000 and 1 000 000 passages, a few minutes
    python benchmarks/scale.py --sizes 10000 40000      these sizes
    python benchmarks/scale.py --encode-rate 900 --encode-hour 2.5 --hours 72     a plan for other machines

The passages are synthetic: 40 random words that a model encodes, and random vectors of the embedded model's widths that
are written, searched and merged. Encoding is measured on one shard for every size, the last of that corpus, since a
shard is encoded by itself; everything else is done for the whole corpus. Multi-vectors are written for the smallest
corpus only, and what they cost is said apart. Seconds are those of the processor but for writing, which waits for the
disk; a million passages take 2 GB of it while the benchmark runs. Rates that are not measured here (a GPU's) and all
prices are parameters, shown with their values. `scale_million.txt` is what it printed once, for page 83.
"""
import argparse
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scipy.sparse import csr_matrix                                           # noqa: E402

from bgem3_nb.cluster import best_of_part, merge_candidates                   # noqa: E402
from bgem3_nb.encoding import Embeddings, M3Encoder                           # noqa: E402
from bgem3_nb.scale import Machine, Prices, Rates, limits, passage_bytes, plan   # noqa: E402
from bgem3_nb.store import EmbeddingStore, _write_info, _write_shard, shard_file   # noqa: E402

D, SHARD, TERMS, TOKENS, VOCABULARY = 384, 1000, 60, 50, 250_000
WORDS = "luật lao động quy định người được nghỉ phép năm hợp đồng tiền lương giờ làm việc thuê nhà đất".split()


def unit(rng, *shape):
    x = rng.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def shard(i, multi):
    "The embeddings of one shard; every shard can be made again by itself."
    rng = np.random.default_rng(i)
    lexical = csr_matrix((rng.random(SHARD * TERMS, np.float32), rng.integers(0, VOCABULARY, SHARD * TERMS, np.int32),
                          np.arange(0, SHARD * TERMS + 1, TERMS)), (SHARD, VOCABULARY))
    vectors = (unit(rng, SHARD * TOKENS, D), np.arange(0, SHARD * TOKENS + 1, TOKENS)) if multi else (None, None)
    return Embeddings(unit(rng, SHARD, D), lexical, *vectors)


def encoded(size, texts):
    "Seconds a passage of the last texts of a corpus of this size, with all three outputs."
    rng = np.random.default_rng(size)
    last = [" ".join(rng.choice(WORDS, 40)) for _ in range(texts)]
    start = time.process_time()
    encoder.encode(last)
    return (time.process_time() - start) / texts


def written(path, size, multi):
    "Write a store; seconds a passage, and its bytes on disk."
    path.mkdir()
    seconds = 0
    for i in range(size // SHARD):
        e = shard(i, multi)
        start = time.perf_counter()
        _write_shard(shard_file(path, i), e, np.arange(SHARD), "float16")
        seconds += time.perf_counter() - start
    outputs = ["dense", "lexical", *(["multi"] if multi else [])]
    _write_info(path, {"format": 1, "n": size, "shard_size": SHARD, "outputs": outputs, "multi_dtype": "float16",
                       "truncated": 0})
    return seconds / size, sum(f.stat().st_size for f in path.glob("*.safetensors")) / size


def mined(path, args):
    "Search a store in parts and merge them; seconds of each for a passage."
    store, queries = EmbeddingStore(path), Embeddings(unit(np.random.default_rng(7), args.queries, D))
    seconds, merged, found = 0, 0, None
    for a in range(0, len(store), args.part):
        start = time.process_time()
        best = best_of_part(queries, store, a, min(a + args.part, len(store)), args.depth, {"dense": 1.}, 0)
        seconds += time.process_time() - start
        start = time.process_time()
        found = merge_candidates([found, best], args.depth) if found else best
        merged += time.process_time() - start
    return seconds / len(store), merged / len(store)


def measure(args):
    "The table of costs, in microseconds a passage."
    lines = []
    with tempfile.TemporaryDirectory(prefix="bgem3_nb-scale-") as folder:
        for n, size in enumerate(args.sizes):
            path = Path(folder)/str(size)
            write, stored = written(path, size, False)
            mine, merge = mined(path, args)
            multi = written(Path(folder)/"multi", size, True) if n == 0 else (np.nan, np.nan)
            lines.append({"passages": size, "encode": encoded(size, args.texts), "write": write, "mine": mine,
                          "merge": merge, "write all": multi[0], "bytes": stored, "bytes all": multi[1]})
            for p in Path(folder).iterdir():
                for file in p.iterdir(): file.unlink()
                p.rmdir()
    return pd.DataFrame(lines).set_index("passages")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000],
                        help="passages of a corpus")
    for name, default, about in (("queries", 1000, "queries that are mined for"), ("depth", 200, "candidates of each"),
                                 ("part", 65_536, "passages of a part"), ("texts", 128, "texts encoded for a size")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} ({default:,})")
    parser.add_argument("--hours", type=float, default=24., help="until all is encoded, in the plan (24)")
    for kind in (Rates, Prices, Machine):
        for f in fields(kind): parser.add_argument(f"--{f.name.replace('_', '-')}", type=float,
                                                   help=f"of the plan for other machines ({f.default:g})")
    args = parser.parse_args()
    if any(size % SHARD for size in args.sizes): sys.exit(f"give sizes that are multiples of {SHARD:,}")
    global encoder
    encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False)
    encoder.encode([" ".join(WORDS)] * 8)                                    # what is loaded once
    table = measure(args)
    costs = table[["encode", "write", "mine", "merge"]] * 1e6
    print(f"microseconds a passage; {args.queries:,} queries, {args.depth} candidates, parts of {args.part:,}")
    print(costs.round(2).to_string())
    print("the largest corpus against the smallest:", "  ".join(
        f"{name} {costs[name].iloc[-1] / costs[name].iloc[0]:.2f}" for name in ("encode", "write", "mine")))
    small, last = table.iloc[0], table.iloc[-1]
    print(f"bytes a passage: {last['bytes']:,.0f} (dense, lexical), {small['bytes all']:,.0f} with {TOKENS} multi-"
          f"vectors, which take {small['write all'] * 1e6:.0f} microseconds to write\n")
    measured = (1 / last["encode"], small["bytes all"] / small["write all"], args.queries / last["mine"])
    own = Rates(*map(float, measured))
    if last["merge"]:      # more than one part
        own.merge = float(2 * args.queries * args.depth / args.part / last["merge"])
    given = {k: v for k, v in vars(args).items() if v is not None}
    prices, machine, rates = (kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
                              for kind in (Prices, Machine, Rates))
    here = passage_bytes(D, TOKENS, TERMS, 250)
    plans = (("machines like one core of this, the embedded model, all outputs", here, own,
              Prices(prices.search_hour, prices.search_hour, prices.gb_month)),
             ("stated rates, BGE-M3, all outputs", passage_bytes(), rates, prices),
             ("stated rates, BGE-M3, no multi-vectors", passage_bytes(multi=""), rates, prices))
    for title, each, rates, prices in plans:
        print(f"{title}\n  {rates}\n  {prices}")
        needs = pd.DataFrame([plan(n, each, rates, prices, machine, args.hours) for n in (1e7, 1e8, 1e9)])
        print(needs.set_index("passages").T.rename(columns="{:,.0f}".format).map("{:,.1f}".format).to_string())
        name, most = next(iter(limits(each, machine).items()))
        print(f"  breaks first: {name}, at {most:,.0f} passages\n")


if __name__ == "__main__": main()
