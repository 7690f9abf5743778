"""What `bgem3-serve` does under load, beside FlagEmbedding behind the plainest FastAPI handler, in one run.

    python benchmarks/serving.py                     60 seconds of 50 clients for each server
    python benchmarks/serving.py --seconds 300 --plain-seconds 60 --kill
                                                     the long form, eight minutes: five of them for this server
    python benchmarks/serving.py --model DIR         another model than the embedded one, with trained heads
    python benchmarks/serving.py --onnx int8         the same model exported behind `bgem3-serve` too
    python benchmarks/serving.py --kill              and then a worker is killed in the middle of a load
    python benchmarks/serving.py --fuzz 10000        so many requests made at random to a tiny exported model, and
                                                     what was answered

A client sends a request when its last one is answered: one to four clauses of Vietnamese codes, of 8 to 320 words, and
wants the dense vectors. The same requests in the same order go to every server. Both run in one process with all cores.
The handler of FlagEmbedding is a plain `def`, so FastAPI calls it in a thread for each request, and `encode` of its
`BGEM3FlagModel` computes what the request has. It gets the model's pooling and prompt, and its texts have the same
tokens. bgem3-serve computes in the precision that suits the processor, FlagEmbedding in its own for a CPU, fp32. Memory
is that of a server's processes, after each tenth of the time.
"""
import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
from corpus import clauses  # noqa: E402

PLAIN = '''
import sys
import torch
import uvicorn
from fastapi import FastAPI
from FlagEmbedding import BGEM3FlagModel
from pydantic import BaseModel
path, port, pooling, prompt = sys.argv[1:]
model = BGEM3FlagModel(path, use_fp16=False, devices=["cpu"], pooling_method=pooling)
app = FastAPI()

class Form(BaseModel):
    input: list[str]

@app.get("/ready")
def ready(): return {}

@app.post("/v1/embeddings")
def embeddings(form: Form):
    vectors = model.encode([prompt + t for t in form.input], max_length=512)["dense_vecs"]
    return {"data": [{"index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]}

uvicorn.run(app, port=int(port), log_level="warning")
'''


def requests_of(n, seed=0):
    "Requests of mixed lengths."
    r, pool = random.Random(seed), " ".join(clauses()).split()
    def text():
        k = int(8 * 40 ** r.random())
        a = r.randrange(len(pool) - k)
        return " ".join(pool[a:a + k])
    return [[text() for _ in range(r.randint(1, 4))] for _ in range(n)]


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def memory(pid):
    "Megabytes of a process and all that it started."
    all_of = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(p.memory_info().rss for p in all_of) / 2**20


async def load(address, pid, seconds, clients, kill=None):
    "Send requests for some time; returns latencies, texts, failures, memory, and how long it took."
    bodies, number = requests_of(2000), iter(range(10**9))
    took, texts, failed, sizes, answered = [], 0, [], [], []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as web:
        for body in bodies[:5]: await web.post("/v1/embeddings", json={"input": body})
        start = time.monotonic()

        async def client():
            nonlocal texts
            while time.monotonic() - start < seconds:
                body, began = bodies[next(number) % len(bodies)], time.monotonic()
                try:
                    reply = await web.post("/v1/embeddings", json={"input": body})
                    good = reply.status_code == 200 and len(reply.json()["data"]) == len(body)
                    if not good: failed.append(reply.status_code)
                except httpx.HTTPError as e:
                    good = False
                    failed.append(type(e).__name__)
                if good:
                    took.append(time.monotonic() - began)
                    texts += len(body)
                    answered.append(time.monotonic() - start)

        async def watch():
            for i in range(10):
                await asyncio.sleep(seconds / 10)
                sizes.append(memory(pid))
                if kill and i == 2: kill()
        await asyncio.gather(watch(), *(client() for _ in range(clients)))
        return took, texts, failed, sizes, time.monotonic() - start, answered


def wait_ready(address, process, seconds=300):
    "Wait until a server answers."
    for _ in range(seconds * 4):
        try:
            if httpx.get(f"{address}/ready", timeout=seconds).status_code == 200: return
        except httpx.HTTPError: pass
        if process.poll() is not None: sys.exit("the server ended")
        time.sleep(.25)
    sys.exit("the server is not ready")


def start_ours(model, *args):
    code = "from bgem3_nb.serving import main; raise SystemExit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, str(model), "--port", "0", *args], stdout=subprocess.PIPE,
                               text=True, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return process, process.stdout.readline().split()[-1]


def start_plain(model, pooling, prompt):
    port = free_port()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", PLAIN, str(model), str(port), pooling, prompt],
                               stderr=subprocess.DEVNULL)
    return process, f"http://127.0.0.1:{port}"


def stop(process):
    process.send_signal(signal.SIGTERM)
    try: return process.wait(60)
    except subprocess.TimeoutExpired:
        for p in psutil.Process(process.pid).children(recursive=True): p.kill()
        process.kill()


def measure(name, process, address, seconds, clients):
    "Load one server; print its row and return its texts per second and its 95th percentile."
    try:
        wait_ready(address, process)
        took, texts, failed, sizes, seconds, _ = asyncio.run(load(address, process.pid, seconds, clients))
    finally: stop(process)
    p50, p95 = np.percentile(took, [50, 95])
    print(f"{name:24} {len(took):8} {len(failed):7} {texts / seconds:8.1f} {p50:8.2f} {p95:8.2f} "
          f"  {' '.join(f'{s:.0f}' for s in sizes)}", flush=True)
    if failed: print(f"{'':24} errors: {', '.join(sorted(set(map(str, failed))))}")
    return texts / seconds, p95


def killed(process, address, seconds, clients):
    "Kill the worker under load; print what that cost."
    def kill():
        kids = psutil.Process(process.pid).children()
        next(p for p in kids if "resource_tracker" not in " ".join(p.cmdline())).kill()
    try:
        wait_ready(address, process)
        found = asyncio.run(load(address, process.pid, seconds, clients, kill))
    finally: stop(process)
    gap = np.diff(found[5]).max()
    print(f"worker killed under load: {len(found[0])} answered, {len(found[2])} lost of {clients} in flight "
          f"({', '.join(sorted(set(map(str, found[2]))))}), no answer for {gap:.1f} s at most")


def fuzz(model, n):
    "Send requests made at random; print how often each status came."
    from collections import Counter

    from bgem3_nb.onnx_export import export_onnx
    from test_serving import KEYS, send_forms, send_random_bytes, Server  # noqa: F401
    from tiny_run import tiny_model
    with tempfile.TemporaryDirectory() as d:
        if not model:
            model = f"{d}/onnx"
            export_onnx(tiny_model(), model, "fp32")
        server = Server(Path(d) / "log", model, "--max-bytes", "20000", "--body-seconds", "1")
        try:
            start, bytes_, forms = time.monotonic(), send_random_bytes(server, n // 2), send_forms(server, n // 2)
            alive = httpx.get(f"{server.address}/ready", timeout=60).status_code
        finally: code = server.stop()
    for name, found in (("random bytes", bytes_), ("schemathesis", forms)):
        print(f"{name}: {len(found)} answers, {dict(sorted(Counter(found).items()))}")
    print(f"ready: {alive}, exit code {code}, {time.monotonic() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--plain-seconds", type=int, default=0, help="of FlagEmbedding (0 = as long)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--onnx", default="", metavar="PRECISION")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    args = parser.parse_args()
    from bgem3_nb.model import M3Model
    from bgem3_nb.onnx_export import export_onnx
    if args.fuzz: return fuzz(args.model, args.fuzz)
    with tempfile.TemporaryDirectory() as d:
        model = M3Model.from_pretrained(args.model or "embedded", new_heads="identity")
        model.save_pretrained(f"{d}/model")
        config = model.config
        if args.onnx: export_onnx(model, f"{d}/onnx", args.onnx)
        del model
        plain_seconds = args.plain_seconds or args.seconds
        print(f"{args.clients} clients, {plain_seconds} s and {args.seconds} s, {os.cpu_count()} cores")
        print(f"{'':24} {'requests':>8} {'errors':>7} {'texts/s':>8} {'p50 s':>8} {'p95 s':>8}  MB")
        other = start_plain(f"{d}/model", config.pooling, config.passage_prompt)
        plain = measure("FlagEmbedding, FastAPI", *other, plain_seconds, args.clients)
        ours = measure("bgem3-serve", *start_ours(f"{d}/model"), args.seconds, args.clients)
        if args.onnx:
            measure(f"bgem3-serve, ONNX {args.onnx}", *start_ours(f"{d}/onnx"), args.seconds, args.clients)
        print(f"throughput {ours[0] / plain[0]:.2f} times that of FlagEmbedding, p95 {ours[1] / plain[1]:.2f} times",
              flush=True)
        if args.kill: killed(*start_ours(f"{d}/model"), min(40, args.seconds), args.clients)


if __name__ == "__main__": main()
