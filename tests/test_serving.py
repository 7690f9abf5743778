"""The server as a process behind real sockets: every form, every limit, clients that misbehave, a kill, a stop, and
requests made at random."""
import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from conftest import OFFLINE, REPO
from tiny_run import tiny_model

from bgem3_nb.encoding import M3Encoder
from bgem3_nb.hybrid_index import Access, HybridIndex, Principal
from bgem3_nb.onnx_export import export_onnx
from bgem3_nb.queries import Endpoint
from bgem3_nb.reranking import RerankEndpoint
from bgem3_nb.scoring import all_scores, fuse
from bgem3_nb.serving import main, Settings

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
TEXTS = ["Nhân viên được nghỉ mười hai ngày phép.", "mật khẩu", "lương tháng mười ba"]
KEYS = {"all": {"key": "key of those who see all", "levels": ["public", "secret"]},
        "some": {"key": "key of those who see some", "levels": ["public"]}}
LIMITS = ["--max-bytes", "20000", "--max-texts", "8", "--body-seconds", "1", "--queue-tokens", "400",
          "--header-seconds", "4", "--max-connections", "150"]


class Server:
    "A process of `bgem3-serve` on a free port."
    def __init__(self, log, *args):
        self.log = Path(log)
        path = os.pathsep.join([str(OFFLINE), str(REPO)])
        code = "from bgem3_nb.serving import main; raise SystemExit(main())"
        with open(log, "wb") as f:
            self.process = subprocess.Popen([sys.executable, "-c", code, *map(str, args), "--port", "0"], stderr=f,
                                            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
        self.address = self.process.stdout.readline().split()[-1]
        self.port = int(self.address.rsplit(":", 1)[1])

    def web(self, key="all", timeout=60):
        return httpx.Client(base_url=self.address, timeout=timeout,
                            headers={"Authorization": f"Bearer {KEYS[key]['key']}"})

    def worker(self):
        [child] = [c for c in psutil.Process(self.process.pid).children() if "resource_tracker" not in " ".join(
            c.cmdline())]
        return child

    def raw(self, data):
        "A connection on which some bytes were sent."
        s = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        s.sendall(data)
        return s

    def stop(self):
        if self.process.poll() is None: self.process.send_signal(signal.SIGTERM)
        try: return self.process.wait(40)
        finally:
            for c in psutil.Process(self.process.pid).children() if self.process.poll() is None else ():
                c.kill()
            self.process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model, its export, an index for each of two models, and keys."
    d = tmp_path_factory.mktemp("served")
    model = tiny_model()
    model.save_pretrained(d / "old")
    export_onnx(model, d / "onnx", "fp32")
    (d / "keys.json").write_text(json.dumps(KEYS))
    rows = [{"id": str(i), "text": t, "access_level": "secret" if i == 1 else "public", "year": 2020 + i}
            for i, t in enumerate(TEXTS)]
    for name in ("old", "new"):
        if name == "new":
            with torch.no_grad(): model.encoder.embeddings.word_embeddings.weight.mul_(-1.3)
            model.save_pretrained(d / "new")
        with HybridIndex(d / f"{name}_index", M3Encoder(model, progress=False), fields={"year": "integer"},
                         access=Access(("public", "secret"))) as index: index.upsert(rows)
    shutil.copytree(d / "old_index", d / "onnx_index")       # an index has one server
    return d


@pytest.fixture(scope="module")
def encoder(folder): return M3Encoder.from_pretrained(folder / "old", progress=False)


@pytest.fixture(scope="module")
def server(folder):
    "Two models side by side with their indexes, a key for each reader, small limits."
    s = Server(folder / "log", folder / "old", "--index", folder / "old_index", "--beside", folder / "new",
               "--beside-index", folder / "new_index", "--share", ".3", "--keys", folder / "keys.json", *LIMITS)
    assert httpx.get(f"{s.address}/ready", timeout=300).status_code == 200
    yield s
    assert s.stop() == 0
    log = s.log.read_text()
    assert "Traceback" not in log and " 500 " not in log, log[-3000:]
    assert not any(k["key"] in log for k in KEYS.values()) and "phép" not in log


@pytest.fixture(scope="module")
def web(server):
    with server.web() as client: yield client


def test_the_openai_package(server, encoder):
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEYS["some"]["key"], max_retries=0)
    wanted = encoder.encode_passages(TEXTS).dense
    for form in ("float", "base64", openai.NOT_GIVEN):
        answer = client.embeddings.create(model="old", input=TEXTS, encoding_format=form)
        np.testing.assert_allclose([d.embedding if isinstance(d.embedding, list) else np.frombuffer(
            base64.b64decode(d.embedding), "<f4") for d in answer.data], wanted, atol=1e-4)
        assert answer.model == "old"
        assert answer.usage.total_tokens == sum(map(len, encoder.tokenize(TEXTS)))
    one = client.embeddings.create(model="old", input=TEXTS[0], dimensions=4, extra_body={"input_type": "query"})
    np.testing.assert_allclose(one.data[0].embedding, wanted[0, :4] / np.linalg.norm(wanted[0, :4]), atol=1e-4)
    with pytest.raises(openai.NotFoundError, match="there are old, new"): client.embeddings.create(
        model="gpt", input="a")
    with pytest.raises(openai.UnprocessableEntityError, match="another tokenizer"): client.embeddings.create(
        model="old", input=[[1, 2]])
    with pytest.raises(openai.AuthenticationError): openai.OpenAI(
        base_url=f"{server.address}/v1", api_key="guessed", max_retries=0).embeddings.create(model="old", input="a")


def decoded(multi): return np.frombuffer(base64.b64decode(multi["data"]), "<f2").reshape(multi["shape"])


def check_three_outputs(found, own, encoder):
    np.testing.assert_allclose(found["dense"], own.dense, atol=1e-4)
    for i, lexical in enumerate(found["lexical"]):
        row = own.lexical[[i]]
        assert dict(zip(lexical["ids"], lexical["weights"])) == pytest.approx(
            dict(zip(row.indices.tolist(), row.data.tolist())), abs=1e-4)
        assert lexical["weights"] == sorted(lexical["weights"], reverse=True)
        assert sorted(lexical["words"]) == sorted(w for w, _ in encoder.words(row)[0])
        np.testing.assert_allclose(decoded(found["multi"][i]), own.vectors(i), atol=2e-3)


def test_three_outputs_in_one_request(web, encoder):
    texts = ["nghỉ phép nghỉ phép", "", "a"]
    found = web.post("/encode", json={"texts": texts}).json()
    check_three_outputs(found, encoder.encode(texts), encoder)
    part = web.post("/encode", json={"texts": texts, "outputs": ["lexical"]}).json()
    assert part["lexical"] == found["lexical"] and not {"dense", "multi"} & part.keys()
    new = web.post("/encode", json={"texts": ["a"], "model": "new"}).json()
    assert new["model"] == "new" and not np.allclose(new["dense"][0], found["dense"][2], atol=1e-2)


def test_rerank_in_the_form_of_cohere(server, web, encoder, monkeypatch):
    asked = {"query": "nghỉ phép", "documents": [TEXTS[1], {"text": TEXTS[0]}, TEXTS[2]], "model": "old"}
    found = web.post("/rerank", json=asked | {"return_documents": True, "top_n": 2}).json()
    docs = [TEXTS[1], TEXTS[0], TEXTS[2]]
    wanted = fuse(all_scores(encoder.encode_queries(["nghỉ phép"]), encoder.encode_passages(docs)), "all")[0]
    order = np.argsort(-wanted)[:2]
    assert [r["index"] for r in found["results"]] == order.tolist()
    assert [r["document"]["text"] for r in found["results"]] == [docs[i] for i in order]
    np.testing.assert_allclose([r["relevance_score"] for r in found["results"]], wanted[order], atol=1e-3)
    monkeypatch.setenv("SERVED_KEY", KEYS["all"]["key"])
    judge = RerankEndpoint(Endpoint("old", server.address, "SERVED_KEY"))
    scores = judge.scores(["nghỉ phép"], docs, np.zeros(3, int), np.arange(3))
    np.testing.assert_allclose(scores, wanted, atol=1e-3)


def test_the_key_decides_what_is_found(server, web, folder):
    ask = {"query": "mật khẩu", "model": "old"}
    with server.web("some") as visitor:
        seen = [{h["id"] for h in c.post("/search", json=ask).json()["hits"]} for c in (web, visitor)]
        assert seen == [{"0", "1", "2"}, {"0", "2"}]
        for more in ({"levels": ["secret"]}, {"principal": "all"}, {"where": {"not": 1}}, {"k": 0}, {"k": 200},
                     {"where": {"year": {"near": 1}}}, {"valid_on": "soon"}, {"where": {"a": {"b": {"c": []}}}}):
            assert visitor.post("/search", json=ask | more).status_code == 422
        found = visitor.post("/search", json=ask | {"where": {"year": [2021, 2022]}}).json()
        assert [h["id"] for h in found["hits"]] == ["2"] and found["hits"][0]["payload"]["year"] == 2022
    assert httpx.post(f"{server.address}/search", json=ask).status_code == 401


def test_a_share_of_the_users_meets_the_second_model(web):
    def who(user): return web.post("/search", json={"query": "a", "user": user}).json()["model"]
    users = [f"user {i}" for i in range(60)]
    first = [who(u) for u in users]
    assert first == [who(u) for u in users] and 6 <= first.count("new") <= 30
    assert {web.post("/v1/embeddings", json={"input": u, "user": u}).json()["model"] for u in users} == {"old"}
    metrics = web.get("/metrics").text
    assert all(f'requests_total{{model="{m}",path="/search",status="200"}}' in metrics for m in ("old", "new"))


def test_limits(server, web):
    def status(path, **kwargs):
        reply = web.post(path, **kwargs)
        assert set(reply.json()["error"]) == {"message", "type", "code"}
        return reply.status_code
    assert status("/encode", json={"texts": ["a"] * 9}) == 413
    assert status("/encode", json={"texts": ["a " * 500]}) == 413
    assert status("/encode", json={"texts": ["a " * 60] * 8}) == 413          # tokens of the request
    assert status("/encode", content=b"[" * 20_001) == 413
    assert status("/encode", content=b"[" * 19_000) == 400
    assert status("/encode", content=b'{"texts": ["\xff"]}') == 400
    assert status("/encode", json={"texts": []}) == 422
    assert status("/encode", content=b'{"texts": ["a", NaN]}') == 422
    assert web.post("/encode", content=b'{"texts": ["\\ud800"]}').status_code == 200
    cut = web.post("/encode", json={"texts": ["a " * 500], "truncate": True, "outputs": ["dense"]}).json()
    assert cut["usage"]["total_tokens"] == 68
    assert web.get("/encode").status_code == 405 and web.get("/nothing").status_code == 404


HEAD = "POST /encode HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key of those who see all\r\n"


def test_clients_that_misbehave(server, web):
    slow = server.raw(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    chunked = server.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{{\"tex".encode())
    assert server.raw(f"{HEAD}Content-Length: {10**30}\r\n\r\n".encode()).recv(99).split()[1] in (b"413", b"400")
    assert server.raw(b"\x16\x03\x01 what is this\r\n\r\n").recv(99).split()[1] == b"400"
    for _ in range(20):                                       # gone before the body, and before the answer
        server.raw(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode()).close()
        body = '{"texts": ["a"]}'
        server.raw(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode()).close()
    start = time.monotonic()
    assert slow.recv(99).split()[1] == b"408" and chunked.recv(99).split()[1] == b"408"
    assert time.monotonic() - start < 15
    assert web.get("/ready").status_code == 200


def until_closed(s, pause=.2):
    "What a connection is told, while a letter more is sent every moment; and after how many seconds it is closed."
    start, said = time.monotonic(), b""
    s.settimeout(pause)
    while time.monotonic() - start < 40:
        try:
            if not (part := s.recv(999)): break
            said += part
        except TimeoutError:
            try: s.sendall(b"a")
            except OSError: break
        except OSError: break
    return said, time.monotonic() - start


def test_headers_that_never_end(server, web):
    "One letter after another, nothing at all, a second request, and a body that goes on after its answer."
    head = b"GET /ready HTTP/1.1\r\nHost: a\r\n"
    ways = {"first": head + b"X-A: a", "nothing": b"", "second": head + b"\r\n" + head + b"X-A: ",
            "body": b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"}
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(ways, pool.map(until_closed, map(server.raw, ways.values()))))
    for way, (said, seconds) in found.items(): assert seconds < 20, (way, said)
    assert found["first"][0].startswith(b"HTTP/1.1 408 Request Timeout") and b"within 4 seconds" in found["first"][0]
    assert found["first"][1] > 3
    assert found["second"][0].startswith(b"HTTP/1.1 200") and found["body"][0].startswith(b"HTTP/1.1 404")
    assert web.get("/ready").status_code == 200


def test_too_many_connections(server):
    "Those beyond the limit are told to come again, and when the idle ones are closed the server answers as before."
    held = [server.raw(b"") for _ in range(160)]
    try: assert held[-1].recv(99).startswith(b"HTTP/1.1 503")
    finally:
        for s in held: s.close()
    with server.web() as fresh:
        for _ in range(40):
            if (status := fresh.get("/ready").status_code) == 200: break
            time.sleep(.25)
    assert status == 200


def test_many_at_once_all_get_their_own(server, encoder):
    "Fifty clients: what is refused says when to come again, what is answered is right."
    texts = [" ".join(random.Random(i).choices(TEXTS[0].split(), k=1 + i % 30)) for i in range(120)]
    wanted = encoder.encode(texts, outputs=("dense",)).dense
    with server.web() as client, ThreadPoolExecutor(50) as pool:
        def ask(i):
            for _ in range(60):
                reply = client.post("/v1/embeddings", json={"input": texts[i]})
                if reply.status_code != 429: return reply
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                time.sleep(.2)
        replies = list(pool.map(ask, range(len(texts))))
    assert {r.status_code for r in replies} == {200}
    np.testing.assert_allclose([r.json()["data"][0]["embedding"] for r in replies], wanted, atol=1e-4)


def random_bytes(r):
    "Something that is nearly a request."
    body = bytes(r.randrange(256) for _ in range(r.randrange(200)))
    path = r.choice(["/encode", "/search", "/v1/embeddings", "/rerank", "/", "/%00", "/ready?x"])
    good = HEAD.replace("/encode", path)
    head = r.choice([good, good, good, good, f"POST {path} HTTP/1.1\r\n", "\x00", f"{'A' * 70}: b\r\n"])
    body = r.choice([body, b"{" + body + b"}", b"null", b'{"texts": [' + body + b"]}",
                     b'{"texts": ["\\ud800\\u0000"]}'])
    size = f"Content-Length: {len(body)}\r\n"
    length = r.choice([size, size, size, size, "", "Content-Length: -1\r\n", "Transfer-Encoding: chunked\r\n"])
    return head.encode("latin-1") + length.encode() + b"\r\n" + body


def send_random_bytes(server, n, seed=0):
    "Send it, read what comes for a moment; returns the statuses."
    r, found = random.Random(seed), []
    for _ in range(n):
        with server.raw(random_bytes(r)) as s:
            s.settimeout(.2)                 # what waits for more gets no answer yet, and is left
            try: found.append(s.recv(200).split(b" ")[1:2])
            except OSError: found.append([])
    return [int(f[0]) for f in found if f]


def send_forms(server, n, seed=0):
    "Send requests that schemathesis makes from the OpenAPI document; returns the statuses."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import given, HealthCheck, Phase, settings
    from hypothesis import seed as seeded
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [o.ok() for o in schema.get_all_operations()]
    found, posts = [], [o for o in operations if o.method.upper() == "POST"]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    with server.web() as client:
        for operation in posts:
            for mode in modes:
                @seeded(seed)
                @settings(max_examples=max(1, n // (2 * len(posts))), deadline=None, database=None,
                          phases=[Phase.generate], suppress_health_check=list(HealthCheck))
                @given(case=operation.as_strategy(generation_mode=mode))
                def send(case):
                    sent = case.as_transport_kwargs(base_url=server.address)
                    sent = {k: v for k, v in sent.items() if k in ("method", "url", "json", "data", "params")}
                    body = sent.pop("data", None)
                    if "json" in sent: body = json.dumps(sent.pop("json")).encode()
                    body = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body).encode()
                    reply = client.request(sent["method"], sent["url"], content=body,
                                           headers={"Content-Type": "application/json"})
                    found.append(reply.status_code)
                send()
    return found


def test_requests_made_at_random(server, web):
    "Some hundred here; `benchmarks/serving.py --fuzz` sends ten thousand."
    found = send_random_bytes(server, 100) + send_forms(server, 160)
    assert len(found) > 200 and max(found) < 500, sorted(set(found))
    assert {200, 400, 422} <= set(found)
    assert web.get("/ready").status_code == 200


def test_a_killed_worker_costs_its_own_requests_only(server, web):
    server.worker().kill()
    start = time.monotonic()
    with server.web(timeout=60) as fresh:
        assert fresh.post("/encode", json={"texts": ["a"]}).status_code == 200      # waits for the new worker
    print(f"back after {time.monotonic() - start:.1f} s")


def test_stopping_finishes_what_was_accepted(folder):
    "With the exported model and its index, which is searched without the model's weights."
    server = Server(folder / "log2", folder / "onnx", "--index", folder / "onnx_index", "--keys",
                    folder / "keys.json", "--batch-tokens", "8")
    with server.web() as web:
        assert [h["id"] for h in web.post("/search", json={"query": TEXTS[1]}).json()["hits"]][0] == "1"
        own = M3Encoder.from_pretrained(folder / "old", dtype=torch.float32, progress=False)
        check_three_outputs(web.post("/encode", json={"texts": TEXTS}).json(), own.encode(TEXTS), own)
        replies, body = [], {"texts": ["a " * 60] * 200, "outputs": ["dense"]}
        thread = threading.Thread(target=lambda: replies.append(
            httpx.post(f"{server.address}/encode", json=body, headers=web.headers, timeout=60)))
        thread.start()                       # until its texts wait inside: what is not accepted yet may be refused
        while thread.is_alive() and 'waiting_tokens{model="onnx"} 0.0' in web.get("/metrics").text: time.sleep(.01)
    assert server.stop() == 0
    thread.join()
    assert [r.status_code for r in replies] == [200]
    with pytest.raises(OSError): server.raw(b"")
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-2000:]


def test_what_cannot_be_served_is_one_sentence(folder, tmp_path, capsys):
    assert main([str(folder / "old"), "--share", ".5"]) == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit): main([str(folder / "old"), "--port", str(taken.getsockname()[1])])
    with pytest.raises(ValueError, match="max_texts must be larger"): Settings("a", max_texts=0).check()
    assert "needs a second model" in capsys.readouterr().err
    server = Server(tmp_path / "log", folder / "new", "--index", folder / "old_index", "--keys", folder / "keys.json")
    assert server.process.wait(90) == 1
    said = server.log.read_text()
    assert "this index was made with model" in said and "Traceback" not in said
