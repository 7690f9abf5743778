"""Rerankers and embeddings endpoints: real HTTP servers on this machine that answer, throttle, stall, talk nonsense and
die; and the job `evaluate` with models of every kind, one of which cannot be opened and one of which dies midway."""
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO

from bgem3_nb.exact_search import Candidates
from bgem3_nb.queries import Endpoint, EndpointError
from bgem3_nb.reranking import RerankEndpoint
from bgem3_nb.systems import EmbeddingCaller, open_reranker, open_systems, Reranked

LAW = "data/law_mini.jsonl"


class Handler(BaseHTTPRequestHandler):
    "Embeds by letters, reranks by shared words; `script` says what the next calls meet instead."
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def do_POST(self):
        call, s = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        texts = call.get("input") or call["documents"]
        with s.lock:
            s.now += 1
            s.most = max(s.most, s.now)
            action = s.script.pop(0) if s.script else "ok"
            if s.left is not None and s.left < len(texts): action = "503"
            elif action == "ok":
                s.seen.update(texts)
                s.left = None if s.left is None else s.left - len(texts)
        status, body = 200, self.answer(call, texts)
        if action == "slow": time.sleep(.7)
        elif action == "html": body = "<html>Please log in</html>"
        elif action == "few": body = {k: v[1:] for k, v in body.items() if isinstance(v, list)}
        elif action != "ok": status, body = int(action), {"error": {"message": f"no, {self.headers['Authorization']}"}}
        time.sleep(.01)
        with s.lock: s.now -= 1
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
        try:
            self.send_response(status)
            for name, value in (("Retry-After", "0.02"), ("Content-Type", "application/json"),
                                ("Content-Length", str(len(body)))): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError: self.close_connection = True

    def answer(self, call, texts):
        if self.path.endswith("/embeddings"):
            data = [{"index": n, "embedding": [t.count(c) + .1 for c in "abcdehilnot"]} for n, t in enumerate(texts)]
            return {"data": data, "usage": {"prompt_tokens": sum(len(t.split()) for t in texts)}}
        words = set(call["query"].split())
        scores = [len(words & set(t.split())) for t in texts]
        return {"results": [{"index": n, "relevance_score": x} for n, x in enumerate(scores)][:call["top_n"]]}


@pytest.fixture
def server():
    "`script`: what the next calls meet; `left`: texts that are answered before it dies; `seen`: texts it has answered."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock, server.script, server.left = True, threading.Lock(), [], None
    server.seen, server.now, server.most = Counter(), 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


TEXTS = [f"text {n} {'a' * n}" for n in range(30)]


def test_embeddings_are_asked_for_once_and_a_few_at_a_time(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    endpoint = Endpoint("m", server.url, key_env="MY_KEY", retries=2)
    caller = EmbeddingCaller(endpoint, tmp_path/"c.sqlite", concurrency=3, batch=4)
    server.script = ["429", "500", "html", "few"]
    x = caller.embed(TEXTS + TEXTS[:5])
    assert x.shape == (35, 11) and np.allclose((x * x).sum(1), 1) and (x[:5] == x[30:]).all()
    assert server.most <= 3 and caller.count["retries"] == 4
    assert max(server.seen.values()) == 1 and set(server.seen) == set(TEXTS)
    again = EmbeddingCaller(endpoint, tmp_path/"c.sqlite", batch=7)     # other batches, in another order
    assert np.allclose(again.embed(TEXTS[::-1]), x[:30][::-1]) and sum(server.seen.values()) == 30
    EmbeddingCaller(Endpoint("other", server.url), tmp_path/"c.sqlite").embed(TEXTS[:2])
    assert sum(server.seen.values()) == 32                              # another model, asked anew
    server.script = ["400"]
    with pytest.raises(EndpointError, match="0 of 1 texts are embedded, then: status 400") as e: caller.embed(["new"])
    assert "no, Bearer …" in str(e.value) and "secret" not in str(e.value)
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.iterdir())


def test_what_cannot_be_used_and_what_cannot_be_paid(server, tmp_path):
    endpoint = Endpoint("m", server.url, retries=0)
    for action, why in (("html", "the reply has no embeddings"), ("few", "the reply has 29 embeddings for 30 texts")):
        server.script = [action]
        with pytest.raises(EndpointError, match=f"0 of 30 texts are embedded, then: {why}"):
            EmbeddingCaller(endpoint).embed(TEXTS)
    poor = EmbeddingCaller(Endpoint("m", server.url, price_in=1e6), tmp_path/"c.sqlite", budget=200., batch=5,
                           concurrency=1)
    with pytest.raises(EndpointError, match="texts are embedded, then: the budget of 200 has"): poor.embed(TEXTS)
    paid, asked = poor.budget.spent, sum(server.seen.values())
    assert 0 < paid <= 200 and 0 < asked < 30 and paid == 3 * asked - (1 if TEXTS[0] in server.seen else 0)
    rest = EmbeddingCaller(Endpoint("m", server.url, price_in=1e6), tmp_path/"c.sqlite", budget=paid, batch=5,
                           concurrency=1)
    with pytest.raises(EndpointError, match=f"{asked} of 30 texts are embedded, then: the budget"): rest.embed(TEXTS)
    assert rest.budget.spent == paid and sum(server.seen.values()) == asked


def test_a_late_reranker_leaves_the_order_of_the_search(server):
    data = SimpleNamespace(queries=["c d", "a b"], query_ids=["1", "2"], passages=["a b", "b c d", "d", "x"],
                           passage_ids=list("1234"))
    first = SimpleNamespace(
        name="first", index=lambda corpus: None, scores=lambda queries, i, j: 10. + np.asarray(j),
        search=lambda queries, k: Candidates(np.tile([4., 3, 2, 1], (2, 1)), np.tile([3, 2, 1, 0], (2, 1))))
    theirs = open_reranker({"model": "m", "base_url": server.url, "seconds": .3, "retries": 0, "concurrency": 1})
    system = Reranked(first, theirs, depth=3)
    system.index(data)
    server.script = ["slow"]
    found = system.search(data, 4)
    assert found.passages.tolist() == [[3, 2, 1, 0], [1, 3, 2, 0]] and system.kept == 1 and system.name == "first + m"
    server.script = ["503", "ok"]       # the first query has no answer either way, so it is scored by the search
    assert system.scores(data, [0, 1, 1], [1, 0, 1]).tolist() == [11, 2, 1]
    assert sum(theirs.late.values()) == 2
    server.script = ["401"]
    with pytest.raises(EndpointError, match="m: 0 of 1 queries are reranked, then: the key was refused"):
        theirs.scores(["new"], data.passages, np.array([0]), np.array([0]))


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="the kind 'y' of the reranker x is unknown; there are maxsim"):
        open_reranker({"model": "x", "kind": "y"})
    with pytest.raises(ValueError, match="key_env"):
        open_systems({"model": "m", "base_url": "vllm", "key_env": "sk-" + "a1" * 12})
    assert isinstance(open_reranker({"model": "m", "base_url": "vllm"}), RerankEndpoint)


def static_model(path, data):
    "A sentence-transformers model of static embeddings, with prompts, in a directory."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    words = sorted({w for text in (*data.queries, *data.passages) for w in text.split()} | {"ask", "doc"})
    tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(["?", *words])}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(words) + 1, 16)).astype(np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu",
                                prompts={"query": "ask ", "document": "doc "})
    model.save(str(path))
    return model


def cross_encoder(path):
    "A cross-encoder with random weights and the tokenizer of the embedded model."
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from bgem3_nb.backbone import embedded_path, load_backbone
    torch.manual_seed(0)
    config = BertConfig(vocab_size=250037, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8, max_position_embeddings=66, num_labels=1, pad_token_id=1)
    BertForSequenceClassification(config).save_pretrained(path)
    load_backbone(embedded_path(progress=False))[1].save_pretrained(path)


def first_of(run, system):
    "Query id -> the passage that a run of the job puts first."
    lines = (run/"runs"/f"law.{system}.trec").read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: line.split()[2] for line in lines[::-1]}


def test_models_of_every_kind_in_one_job(server, launch, tmp_path):
    """sentence-transformers with its prompts, FlagEmbedding's class, an endpoint that dies midway, a model that is not
    there, and a cross-encoder behind each: what can be judged is, the exit code is 1, and the next run goes on."""
    from tiny_run import tiny_model
    from bgem3_nb.eval_sets import eval_sets, sample_set
    data = sample_set(eval_sets(REPO/LAW)[0], 8, 0)
    texts = {*data.queries, *data.passages}
    model = static_model(tmp_path/"static", data)
    tiny_model().save_pretrained(tmp_path/"tiny")
    cross_encoder(tmp_path/"cross")
    theirs = {"model": "tiny", "kind": "FlagEmbedding", "name": "theirs", "pooling_method": "mean", "use_fp16": False,
              "devices": "cpu", "query_max_length": 64, "passage_max_length": 64}
    plain = {"model": "static", "name": "plain", "query_prompt": "", "passage_prompt": ""}
    hosted = {"model": "hosted", "base_url": server.url, "retries": 0, "batch": 16, "concurrency": 1}
    config = {"models": ["static", {"model": "static", "name": "plain", "query_prompt": "", "passage_prompt": ""},
                         {"model": "tiny", "name": "ours"}, theirs, hosted, "no/such/model"],
              "sets": [{"data": LAW, "name": "law"}], "modes": ["dense"], "max_rows": 8,
              "search_length": 64, "rerank": 3, "rerank_model": "cross", "slices": [], "k": 20,
              "metrics": ["nDCG@10"], "progress": False}
    (tmp_path/"mine.json").write_text(json.dumps(config))
    server.left = 64
    done = launch("evaluate", "-f", "mine.json", "--out", "run", "--no-progress")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = next(line for line in done.stderr.splitlines() if "finished, but" in line)
    assert f"48 of {len(data.passages)} texts are embedded, then: status 503" in said
    assert "what was answered is kept" in said and "no/such/model failed: " in said
    metrics = json.loads((tmp_path/"run"/"metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["failures"]) == ["hosted on law", "no/such/model"]
    found = metrics["evaluations"]["law"]
    assert list(found) == [f"{name} dense{more}" for name in ("static", "plain", "ours", "theirs")
                           for more in ("", " + cross")]
    assert first_of(tmp_path/"run", "theirs_dense") == first_of(tmp_path/"run", "ours_dense")
    for name, prompts in (("static", ("ask ", "doc ")), ("plain", ("", ""))):
        q, p = (model.encode([prompt + t for t in texts], normalize_embeddings=True)
                for prompt, texts in zip(prompts, (data.queries, data.passages)))
        best = {id: data.passage_ids[n] for id, n in zip(data.query_ids, (q @ p.T).argmax(1))}
        assert first_of(tmp_path/"run", f"{name}_dense") == best

    before, server.left = Counter(server.seen), None
    assert sum(before.values()) == 56
    config["models"] = config["models"][:-1]
    (tmp_path/"mine.json").write_text(json.dumps(config))
    done = launch("evaluate", "-f", "mine.json", "--out", "run", "--no-progress", "--force")
    assert done.returncode == 0, done.stderr
    assert set(server.seen) == texts and max(server.seen.values()) == 1      # nothing was asked twice
