"""Everything that a GPU has to show, in one go and in under ten minutes, at BGE-M3's size with random weights.

    python benchmarks/gpu.py                          all parts; prints which card it is
    python benchmarks/gpu.py --parts encode train     some of them
    python benchmarks/gpu.py --tiny --device cpu      a tiny model on the CPU: that the script works, no number counts

    card     the card, and its product rates
    parity   embeddings of the card in fp32 and in half precision beside those of the CPU
    encode   tokens/s: ours with and without padding, FlagEmbedding in fp16 at its best batch size,
             sentence-transformers; the share of the card's rate
    train    the unified step of 32 pairs, beside FlagEmbedding's: seconds and peak memory
    long     a training step with four passages of 8,192 tokens: its peak memory
    search   dense and MaxSim search: the CPU's result, and its time in fp32 and proposed in half precision
    t4       the training step of page 93 with 15 GB and fp16, as a T4 has them
    tests    tests/test_cuda.py

Every part is a process of its own and is stopped after --limit seconds. Ends with 1 if a part failed or was wrong.
Needs: pip install "bgem3_nb[dev]", and for the part tests [embedded].
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PARTS = ("card", "parity", "encode", "train", "long", "search", "t4", "tests")
SIZES = {   # tiny or not: layers, width, inner width, heads
    True: (2, 64, 128, 4), False: (24, 1024, 4096, 16)}


def words(count, tokens, seed=0):
    "Texts of words of our own, of lengths around so many tokens."
    import numpy as np
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(tokens), .5, count), 8, 2 * tokens).astype(int)
    return [" ".join(f"w{i}" for i in rng.integers(0, 250, n)) for n in lengths]


def prepare(folder, tiny):
    "Save a model of BGE-M3's shape with random weights, and pairs to train on."
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel
    from bgem3_nb.encoders import tiny_tokenizer
    from bgem3_nb.model import init_heads, M3Config, M3Model
    layers, width, inner, heads = SIZES[tiny]
    tokenizer = tiny_tokenizer("<s> $A </s>", [" ".join(f"w{i}" for i in range(250))])
    config = XLMRobertaConfig(vocab_size=1000 if tiny else 250_002, hidden_size=width, num_hidden_layers=layers,
                              num_attention_heads=heads, intermediate_size=inner, max_position_embeddings=8194,
                              type_vocab_size=1, pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    model = M3Model(XLMRobertaModel(config, add_pooling_layer=False), tokenizer, M3Config("cls"))
    init_heads(model, "random")
    model.save_pretrained(folder / "start")
    count, tokens = (16, 12) if tiny else (256, 256)
    rows = [{"query": q, "pos": [p]} for q, p in zip(words(count, 24, 1), words(count, tokens, 2))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def wait(device):
    import torch
    if device.type == "cuda": torch.cuda.synchronize(device)


def seconds(work, device, times=3):
    "The best of some runs, after one that is not counted."
    work()
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def product_rate(device, dtype, tiny):
    "Operations a second of a large product."
    import torch
    n = 256 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def card(told, device):
    import torch
    from bgem3_nb.backbone import pick_dtype
    print(f"torch {torch.__version__}; {pick_dtype(device)[1]}")
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        print(f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"product rate in {str(dtype)[6:]:9} {product_rate(device, dtype, told['tiny']) / 1e12:8.1f} TFLOP/s")


def load(told, device, dtype, **settings):
    from bgem3_nb.encoding import M3Encoder
    return M3Encoder.from_pretrained(f"{told['folder']}/start", dtype=dtype, device=device, progress=False, **settings)


def parity(told, device):
    import numpy as np
    import torch
    texts = words(8 if told["tiny"] else 24, 100)
    wanted = load(told, "cpu", torch.float32).encode(texts)
    limits = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
    for dtype, limit in limits.items():
        encoder = load(told, device, dtype)
        found = encoder.encode(texts)
        off = {"dense": abs(found.dense - wanted.dense).max(), "multi": abs(found.multi - wanted.multi).max(),
               "lexical": abs(found.lexical - wanted.lexical).max() / wanted.lexical.max()}
        way = "without padding" if encoder.packed else "padded"
        print(f"{str(dtype)[6:]:9} {way:16}" + "   ".join(f"{k} {v:.1e}" for k, v in off.items()), flush=True)
        assert (found.offsets == wanted.offsets).all() and max(off.values()) < limit and np.isfinite(found.dense).all()


def encode(told, device):
    import torch
    from bgem3_nb.backbone import pick_dtype
    tiny, dtype = told["tiny"], pick_dtype(device)[0]
    texts, rate = words(32 if tiny else 2000, 20 if tiny else 200), product_rate(device, dtype, tiny)
    encoder = load(told, device, dtype)
    tokens = sum(map(len, encoder.tokenize(texts)))
    matrices = sum(m.weight.numel() for m in encoder.model.encoder.modules() if isinstance(m, torch.nn.Linear))

    def line(name, took, count=tokens):
        share = 2 * matrices * count / took / rate
        print(f"{name:48}{count / took:12,.0f} tokens/s{share:8.0%} of the {str(dtype)[6:]} rate", flush=True)
        return count / took
    ways = {"without padding": encoder.packed} if encoder.packed else {}
    best, once = 0., 1
    for way, packed in (ways | {"padded": None}).items():
        encoder.packed = packed
        for size in (16_384, 65_536):
            encoder.batch_tokens = size
            took = seconds(lambda: encoder.encode(texts), device, once)
            best = max(best, line(f"ours, {way}, {size:,} tokens a batch", took))
    took = seconds(lambda: encoder.encode(texts, outputs=("dense",)), device, once)
    line("ours, dense only, padded", took)
    del encoder
    some = texts[:len(texts) // 4]
    part = tokens * sum(map(len, some)) // sum(map(len, texts))
    try: from FlagEmbedding import BGEM3FlagModel
    except ImportError: return print("FlagEmbedding is not installed")
    flag = BGEM3FlagModel(f"{told['folder']}/start", use_fp16=device.type == "cuda", devices=str(device))
    theirs = 0.
    for size in (8,) if tiny else (64, 256):
        def run(): flag.encode(some, batch_size=size, max_length=512, return_sparse=True, return_colbert_vecs=True)
        theirs = max(theirs, line(f"FlagEmbedding, batches of {size}", seconds(run, device, 1), part))
    from sentence_transformers import SentenceTransformer
    library = SentenceTransformer(f"{told['folder']}/start", device=str(device), model_kwargs={"dtype": dtype})
    took = seconds(lambda: library.encode(some, batch_size=64, show_progress_bar=False), device, 1)
    line("sentence-transformers, dense only", took, part)
    print(f"ours is {best / theirs:.2f} times FlagEmbedding's best; asked: 2, and half of the card's rate")


def train(told, device):
    from train_step import child
    tiny, found = told["tiny"], {}
    for case in ("unified, ours", "unified, ours, cached", "unified, FlagEmbedding"):
        asked = {"folder": told["folder"], "length": 24 if tiny else 256, "embeddings": False,
                 "steps": 2 if tiny else 5, "limit": 400., "batch": 4 if tiny else 32, "pairs": 8 if tiny else 64,
                 "precision": "auto"}
        found[case] = child(asked | {"case": case})
        if found[case] is None: print(f"{case:28} does not fit")
        else: print(f"{case:28}{min(found[case]['seconds']):8.3f} s a step{found[case]['peak']:8.2f} GB", flush=True)
    ours, theirs = found["unified, ours"], found["unified, FlagEmbedding"]
    if ours and theirs:
        faster, share = min(theirs["seconds"]) / min(ours["seconds"]), ours["peak"] / theirs["peak"]
        print(f"{faster:.2f} times as fast in {share:.2f} of its memory; asked: 2 and 0.5")


def one_training(told, steps=2, **settings):
    "A training of a few steps; its trainer, and what it took."
    import torch
    from bgem3_nb.model import M3Model
    from bgem3_nb.training import M3Trainer, M3TrainingArguments
    rows = [json.loads(line) for line in Path(told["folder"], "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    if settings.pop("long", False):
        rows = [r | {"pos": [" ".join(words(12 if told["tiny"] else 60, 100, i))]} for i, r in enumerate(rows[:8])]
    with tempfile.TemporaryDirectory() as out:
        args = M3TrainingArguments(output_dir=out, max_steps=steps, save_strategy="no", report_to="none",
                                   disable_tqdm=True, logging_steps=1, use_cpu=told["device"] == "cpu", **settings)
        trainer = M3Trainer(M3Model.from_pretrained(f"{told['folder']}/start"), args, train_dataset=rows)
        start = time.perf_counter()
        trainer.train()
        took = (time.perf_counter() - start) / steps
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device.type == "cuda" else float("nan")
    print(f"cached {args.cached}, chunks of {args.chunk_tokens} tokens, checkpointing {args.gradient_checkpointing}: "
          f"{took:.2f} s a step with its start, peak {peak:.1f} GB")
    return peak


def long(told, device):
    length = 512 if told["tiny"] else 8192
    peak = one_training(told, long=True, passage_length=length, per_device_train_batch_size=4)
    if device.type == "cuda": print(f"asked: under 80 GB; it is {peak:.0f}")


def t4(told, device):
    import torch
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., 15e9 / total), device)
        info = torch.cuda.mem_get_info     # what is free on the whole card is more than this process may take
        torch.cuda.mem_get_info = lambda *a: (min(info(*a)[0], int(15e9) - torch.cuda.memory_reserved()), int(15e9))
    tiny = told["tiny"]
    peak = one_training(told, precision="fp16", passage_length=32 if tiny else 256,
                        per_device_train_batch_size=4 if tiny else 32)
    assert not peak > 15


def search(told, device):
    import numpy as np
    import torch
    from bgem3_nb.encoding import Embeddings
    from bgem3_nb.exact_search import top_by_blocks, top_dense, top_multi
    tiny, rng = told["tiny"], np.random.default_rng(0)
    n, m, d, length = (8, 300, 32, 6) if tiny else (500, 20_000, 1024, 100)

    def unit(*shape):
        x = rng.standard_normal(shape, np.float32) + 1
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def texts(count, tokens): return Embeddings(unit(count, d), multi=unit(count * tokens, d),
                                                offsets=np.arange(count + 1) * tokens)
    q, p = texts(n, 8), texts(m, length)
    wanted = top_dense(q, p, 100, device="cpu")
    found = top_dense(q, p, 100, device=device)
    assert (found.passages == wanted.passages).all() and (found.scores == wanted.scores).all()
    took = seconds(lambda: top_dense(q, p, 100, device=device), device)
    print(f"dense, {n} × {m:,}: the CPU's result in {took:.3f} s")
    start = time.perf_counter()
    exact = top_by_blocks(q, p, 10, {"multi": 1.}, device=device)
    print(f"MaxSim, {n} × {m:,} texts of {length} tokens: fp32 {time.perf_counter() - start:.2f} s", flush=True)
    for dtype in (torch.float16, torch.bfloat16):
        start = time.perf_counter()
        found = top_multi(q, p, 10, dtype, device=device)
        print(f"   proposed in {str(dtype)[6:]} and scored in fp32: {time.perf_counter() - start:.2f} s", flush=True)
        np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)


def tests(told, device):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", f"{told['folder']}/tests",
               str(ROOT / "tests" / "test_cuda.py")]
    if told["tiny"]: command += ["-k", "device or maxsim or searches or one_gpu"]
    subprocess.run(command, check=True, cwd=ROOT / "tests", env=os.environ | {"BGEM3_TEST_DEVICE": device.type})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few texts")
    parser.add_argument("--limit", type=float, default=120., help="seconds for a part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import torch
        told = json.loads(args.child)
        return globals()[told["part"]](told, torch.empty(0, device=told["device"]).device)
    failed, began = [], time.perf_counter()
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.tiny)
        for part in args.parts:
            told = {"part": part, "folder": folder, "tiny": args.tiny, "device": args.device}
            print(f"\n{part}", flush=True)
            try: done = subprocess.run([sys.executable, __file__, "--child", json.dumps(told)], env=env,
                                       timeout=args.limit).returncode
            except subprocess.TimeoutExpired: done = f"{args.limit:.0f} s are over"
            if done: failed.append(f"{part} ({done})")
    print(f"\n{time.perf_counter() - began:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts ran"))
    sys.exit(bool(failed))


if __name__ == "__main__": main()
