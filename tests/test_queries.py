"""Queries from an endpoint: a real HTTP server on this machine that answers, throttles, stalls, hangs up and talks
nonsense; and processes that are killed."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openai  # noqa: F401 (in the extras `queries` and `dev`: without it these tests fail)

from bgem3_nb.queries import (
    Answer, AnswerCache, Budget, Endpoint, EndpointError, generate_queries, read_passages, row_passages, rule_queries)
from bgem3_nb.readers import read_rows
from bgem3_nb.rows import make_rows
from bgem3_nb.text import text_key

TYPES = ["question", "keywords"]
USAGE = {"prompt_tokens": 200, "completion_tokens": 50}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def send(self, status, body, more=(), length=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": length or len(body),
                            **dict(more)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_POST(self):
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = call["messages"][1]["content"].split("<passage>\n")[1].split("\n</passage>")[0]
        with self.server.lock:
            self.server.seen.append((text, time.monotonic(), {k.lower(): v for k, v in self.headers.items()}, call))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            script = self.server.script.get(text, [])
            action = script.pop(0) if script else self.server.default
            self.server.done.append((action, call))
        try: self.act(action, text, call)
        except (BrokenPipeError, ConnectionResetError): self.close_connection = True
        finally:
            with self.server.lock: self.server.now -= 1

    def complete(self, content, finish="stop", usage=USAGE):
        self.send(200, {
            "id": "x", "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}],
            "usage": usage})

    def act(self, action, text, call):
        types = call.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("required", TYPES)
        good = json.dumps({t: [f"{t} about {text}"] for t in types})
        kind, _, detail = str(action).partition(" ")
        if kind == "ok": self.complete(good)
        elif kind == "slow":
            time.sleep(float(detail))
            self.complete(good)
        elif kind == "hold":
            self.server.release.wait(600)
            self.complete(good)
        elif kind == "priced": self.complete(good, usage=USAGE | {"cost": float(detail)})
        elif kind == "oddcost": self.complete(good, usage=USAGE | {"cost": "free"})
        elif kind == "uncounted": self.complete(good, usage=None)
        elif kind == "throttle": self.send(429, {"error": {"message": "too many requests"}}, {"Retry-After": detail})
        elif kind == "quota": self.send(429, {"error": {"message": "quota", "code": "insufficient_quota"}},
                                        {"x-should-retry": "false"})
        elif kind == "status": self.send(int(detail), {"error": {"message": f"no, {self.headers['Authorization']}"}},
                                         {"Retry-After": "0.02"})
        elif kind == "hangup":
            self.close_connection = True
            self.connection.close()
        elif kind == "half":
            self.send(200, b'{"choices": [{"mess', length=500)
            self.close_connection = True
            self.connection.shutdown(2)
        elif kind == "html": self.send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        elif kind == "brokenbody": self.send(200, b'{"choices": [{"message": ')
        elif kind == "error200": self.send(200, {"error": {"code": 502, "message": "provider down"}})
        elif kind == "cut": self.complete(good[:20], "length")
        elif kind == "none": self.complete(None)
        elif kind == "say": self.complete(detail)
        else: raise AssertionError(action)


@pytest.fixture
def server():
    "A server with `script` (passage text -> what it does, in turn), `default`, and what it has `seen`."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock, server.release = True, threading.Lock(), threading.Event()
    server.script, server.default, server.seen, server.done, server.now, server.most = {}, "ok", [], [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(server, tmp_path):
    "Runs over passages p0, p1, …; settings of the endpoint and of the run by name."
    def run(n=3, **more):
        names = {name: more.pop(name) for name in list(more) if name in Endpoint.__dataclass_fields__}
        endpoint = Endpoint(**{"model": "m", "base_url": server.url, "retries": 2, "timeout": 60} | names)
        out = generate_queries(passages(n), endpoint, tmp_path / "cache.sqlite",
                               **{"types": TYPES, "progress": False, "concurrency": 4} | more)
        check(out, n)
        return out
    return run


def passages(n): return [{"id": f"id{i}", "text": f"p{i}", "language": "en", "domain": "d"} for i in range(n)]

def asked(server): return Counter(text for text, *_ in server.seen)

def check(out, n):
    "Every passage is in exactly one of the three places, and the report says so."
    with_queries = {ids[0] for ids in out.rows["pos_ids"]}
    parts = [with_queries, {f["id"] for f in out.failed}, set(out.not_reached)]
    assert sum(map(len, parts)) == n and set().union(*parts) == {f"id{i}" for i in range(n)}
    r = out.report
    assert [r["passages"], r["with_queries"], r["failed"],
            r["not_reached"]] == [n, *map(len, parts)] and r["queries"] == len(out.rows)
    assert all(f["reason"] for f in out.failed)


def test_rows_and_what_is_sent(server, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    out = ask(3, key_env="SOME_KEY", temperature=.5, extra={"seed": 7})
    assert [(r["query"], r["pos"], r["pos_ids"], r["query_type"], r["language"], r["domain"],
             r["query_id"]) for r in out.rows][:2] == [("question about p0", ["p0"], ["id0"], "question", "en", "d",
                                                        "id0/question/0"),
                                                       ("keywords about p0", ["p0"], ["id0"], "keywords", "en", "d",
                                                        "id0/keywords/0")]
    _, _, headers, call = server.seen[0]
    assert headers["authorization"] == "Bearer sk-secret"
    assert (call["model"], call["max_tokens"], call["temperature"], call["seed"]) == ("m", 1000, .5, 7)
    assert call["response_format"]["json_schema"]["schema"]["required"] == TYPES
    assert b"sk-secret" not in (tmp_path / "cache.sqlite").read_bytes()
    folder = out.save(tmp_path / "out")
    assert read_rows(folder / "queries.jsonl").to_list() == [r | {"source": "generated"} for r in out.rows.to_list()]
    assert json.loads((folder / "report.json").read_text())["queries"] == 6
    for form in ("json_object", "text"):
        ask(1, answer_format=form)
        assert server.seen[-1][3].get("response_format", {}).get("type", "text") == form


def test_the_order_does_not_depend_on_concurrency(server, ask, tmp_path):
    server.script = {f"p{i}": [f"slow {.04 if i % 3 == 0 else 0}"] for i in range(12)}
    many = ask(12, concurrency=6)
    assert 2 <= server.most <= 6
    server.most = 0
    (tmp_path / "cache.sqlite").unlink()
    assert ask(12, concurrency=1).rows.to_list() == many.rows.to_list()
    assert server.most == 1


def test_throttled_waits_as_long_as_asked(server, ask):
    server.script = {"p0": ["throttle 1"]}
    out = ask(2, retries=1)
    first, second = [at for text, at, *_ in server.seen if text == "p0"]
    assert 1 <= second - first < 30 and out.report["retries"] == 1 and not out.failed


def test_throttled_for_too_long_fails_with_the_time_asked(server, ask):
    server.script = {"p0": ["throttle 3600"]}
    out = ask(2)
    assert "asks to wait 3600 s" in out.failed[0]["reason"] and asked(server)["p0"] == 1


@pytest.mark.parametrize("action, reason",
                         [("slow 9", "within 1.5 s (2 times)"), ("hangup", "no connection"), ("half", "no connection"),
                          ("status 500", "status 500"),
                                            ("html", "not a chat completion: '<html>"),
                          ("brokenbody", "not a chat completion"), ("error200", "provider down")])
def test_on_the_way(server, ask, tmp_path, action, reason):
    "Trouble once is repeated; trouble for ever is a failure with its reason, and no paid answer."
    server.script = {"p0": [action], "p1": [action] * 9}
    out = ask(3, retries=1, timeout=1.5 if "slow" in action else 60)
    assert [f["id"] for f in out.failed] == ["id1"] and reason in out.failed[0]["reason"]
    assert asked(server) == {"p0": 2, "p1": 2, "p2": 1} and (out.report["retries"], out.report["calls"]) == (2, 2)
    server.script = {}
    again = ask(3)
    assert not again.failed and asked(server) == {"p0": 2, "p1": 3, "p2": 1} and again.report["cached"] == 2


@pytest.mark.parametrize("action, reason",
                         [("say I am sorry", "no JSON object"), ('say {"question": ["a b"]', "Invalid JSON"),
                          ('say {"question": ["a b"]}', "keywords: Field required"), ("none", "no JSON object"),
                                            ('say {"question": "a", "keywords": ["b c"]}',
                                             "question: Input should be a valid array")])
def test_not_as_asked(server, ask, action, reason):
    "Asked again at most `tries` times, over all runs together."
    server.script = {"p0": [action], "p1": [action] * 9}
    out = ask(2, tries=3)
    assert [f["id"] for f in out.failed] == ["id1"]
    assert reason in out.failed[0]["reason"]
    assert "(answers: 3)" in out.failed[0]["reason"]
    assert (out.report["calls"], out.report["unusable"], asked(server)) == (5, 4, {"p0": 2, "p1": 3})
    assert ask(2, tries=3).failed == out.failed and len(server.seen) == 5       # paid for, and known
    server.script = {}
    assert not ask(2, tries=4).failed and len(server.seen) == 6                 # one more try, one more call


def test_cut_answers_are_not_asked_again(server, ask):
    server.script = {"p0": ["cut"]}
    assert "raise max_tokens" in ask(2).failed[0]["reason"] and asked(server)["p0"] == 1
    assert not ask(2, max_tokens=2000).failed                                   # another call altogether


def test_key_refused(server, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    server.default = "status 401"
    with pytest.raises(EndpointError, match="the key was refused; set key_env") as e: ask(50, key_env="SOME_KEY")
    assert len(server.seen) <= 4 and "secret" not in str(e.value)
    check(e.value.generated, 50)
    assert e.value.generated.report["not_reached"] == 50
    # refused in the middle: what was made stays
    server.default, server.script = "ok", {"p3": ["status 401"]}
    out = ask(50, key_env="SOME_KEY", concurrency=1)
    assert out.report["with_queries"] == 3
    assert "the key was refused" in out.report["stopped"]
    assert "secret" not in json.dumps(out.report)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ValueError, match="environment variable SOME_KEY, which is not set"): ask(50, key_env="SOME_KEY")


@pytest.mark.parametrize("action, reason",
                         [("status 402", "no credit"), ("status 404", "no model 'm'"), ("quota", "quota is used up")])
def test_no_passage_could_do_better(server, ask, action, reason):
    server.script = {"p1": [action]}
    out = ask(9, concurrency=1)
    assert reason in out.report["stopped"] and out.report["with_queries"] == 1 and len(server.seen) == 2


def test_gives_up_when_nothing_works(server, ask):
    server.default = "status 400"
    with pytest.raises(EndpointError, match="3 passages in a row failed; the last one: status 400"):
        ask(40, give_up=3, concurrency=1)
    assert len(server.seen) == 3
    # every second one: no reason to stop
    server.default, server.script = "ok", {f"p{i}": ["status 400"] for i in range(0, 40, 2)}
    out = ask(40, give_up=3, concurrency=1)
    assert (out.report["failed"], out.report["not_reached"], out.report["stopped"]) == (20, 0, "")


def test_pilot_dry_run_and_full(server, ask, tmp_path):
    plan = ask(20, dry_run=True, key_env="A_KEY_NOBODY_HAS")                     # needs no key
    assert sorted(f.name for f in plan.save(tmp_path / "out").iterdir()) == [
        "failed.jsonl", "prompts.jsonl", "queries.jsonl", "report.json"]
    assert not server.seen
    assert plan.report["estimate"]["calls"] == len(plan.prompts) == 20
    assert plan.report["stopped"] == "dry run"
    pilot = ask(20, pilot=4)
    assert (pilot.report["with_queries"], pilot.report["not_reached"], pilot.report["stopped"]) == (4, 16, "pilot")
    assert len(asked(server)) == 4 and ask(20, pilot=4).rows.to_list() == pilot.rows.to_list() and ask(
        20, pilot=4, seed=1).not_reached != pilot.not_reached
    plan = ask(20, dry_run=True)
    # as the endpoint counted
    assert plan.report["estimate"]["tokens_out"] == 50 * plan.report["estimate"]["calls"]
    ask(20)
    assert asked(server) == {f"p{i}": 1 for i in range(20)}


# a call costs 0.07, and at most about 0.25
PRICES = dict(price_in=100, price_out=1000, max_tokens=60)

def test_budget_is_never_overrun(server, ask):
    server.default = "slow 0.01"
    out = ask(40, budget=1.1, concurrency=8, **PRICES)
    assert out.report["cost"] <= 1.1
    assert out.report["with_queries"] == len(server.seen) >= 5
    assert "the budget of 1.1 has" in out.report["stopped"]
    assert ask(40, budget=1.1, concurrency=8, **PRICES).report["calls"] == 0     # earlier runs count
    more = ask(40, budget=2, concurrency=8, **PRICES)
    assert 1.1 < more.report["cost_with_cache"] <= 2 and max(asked(server).values()) == 1
    # not even one: no error, nothing spent
    assert ask(3, budget=.01, **PRICES | {"max_tokens": 61}).report["not_reached"] == 3


def billed(server):
    "What a provider could put on the bill for all that the server saw: all but what it refused."
    def tokens(call): return (len(json.dumps(call["messages"], ensure_ascii=False).encode()), call["max_tokens"])
    counted = {"ok": (200, 50), "say": (200, 50)}
    free = ("throttle", "status 4")
    return sum((100 * i + 1000 * o) / 1e6 for action, call in server.done if not action.startswith(free)
               for i, o in [counted.get(action.split()[0]) or tokens(call)])


@pytest.mark.parametrize("retries, tries", [(0, 1), (2, 3)])
@pytest.mark.parametrize("trouble",
                         ["slow 9", "hangup", "half", "status 500", "status 429", "html", "error200", "say nothing"])
def test_budget_holds_whatever_fails(server, ask, trouble, retries, tries):
    """With all the calls that run side by side, that are repeated, that time out: the bill stays below the budget,
    and below the estimate."""
    settings = PRICES | dict(timeout=.15 if "slow" in trouble else 60, retries=retries, tries=tries, concurrency=8,
                             give_up=99)
    server.script = {f"p{i}": [trouble] * (i % 3) for i in range(12)}            # none, one or two times
    def promised(**more): return ask(12, dry_run=True, **settings, **more).report["estimate"]["cost_at_most"]
    assert promised(budget=1) == 1 < promised()
    out = ask(12, budget=1, **settings)
    assert 0 < billed(server) <= out.report["cost"] + 1e-6 <= 1 + 2e-6
    before, most = billed(server), promised()
    more = ask(12, **settings)                                                   # without a budget
    assert billed(server) <= more.report["cost_with_cache"] + 1e-6
    assert billed(server) - before <= most
    assert not more.not_reached
    known = trouble in ("status 429", "say nothing")
    if known: assert out.report["lost"] == 0 and out.report["cost"] == pytest.approx(before, abs=1e-5)
    else: assert out.report["lost"] and out.report["not_reached"] and "the budget of 1 has" in out.report["stopped"]


def test_lost_calls_count_in_the_next_run(server, ask, tmp_path, env):
    "Calls that got no answer, because they timed out or the process was killed, may have been paid for."
    server.script = {"p0": ["slow 2"] * 2}
    with pytest.raises(EndpointError) as e: ask(1, timeout=.5, retries=1, **PRICES)
    first = e.value.generated.report
    assert first["lost"] == 2 and first["calls"] == 0 and .2 < first["cost"] < .6
    again = ask(1, **PRICES).report
    assert again["lost"] == 0 and again["cost"] == pytest.approx(.07) and again["cost_with_cache"] == pytest.approx(
        first["cost"] + .07, abs=1e-5)
    server.script = {f"p{i}": ["hold"] for i in range(1, 5)}
    process = child(server, tmp_path, env, 5)
    wait_for(lambda: server.now == 4, process)
    process.kill()
    process.wait(60)
    killed = ask(5, dry_run=True, budget=9, **dict(price_in=100, price_out=1000)).report["estimate"]["cost_at_most"]
    assert 9 - killed > 4


def test_a_price_that_is_not_true_stops_the_run(server, ask):
    "The first call goes alone; what it cost shows that the prices are wrong."
    server.default = "priced 0.5"
    out = ask(20, budget=1, concurrency=8, **PRICES)
    assert len(server.seen) == 1 and out.report["cost"] == .5 and "a call cost 0.5, but by price_in" in out.report[
        "stopped"]
    # nonsense is not taken off what was spent
    server.default = "priced -7"
    assert ask(21, price_in=1, price_out=1).report["cost"] > 0


def test_cost_as_the_endpoint_says_it(server, ask):
    server.script = {"p0": ["priced 0.5"], "p1": ["uncounted"], "p2": ["oddcost"]}
    out = ask(3, price_in=1, price_out=1)
    assert .5 < out.report["cost"] < .51 and out.report["tokens_in"] > 200


@settings(max_examples=50, deadline=None)
@given(st.floats(.1, 10), st.lists(st.tuples(st.floats(.01, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_budget_with_threads(limit, calls):
    budget, waiting, paid = Budget(limit), list(calls), []
    def work():
        while waiting:
            try: most, share = waiting.pop()
            except IndexError: return
            if not budget.hold(most): return
            paid.append(most * share)
            budget.pay(most, most * share)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(10)
    assert not any(t.is_alive() for t in threads)
    assert sum(paid) <= limit * 1.0001
    assert budget.held == 0
    assert budget.spent == pytest.approx(sum(paid))


def child(server, tmp_path, env, n):
    code = ("import signal, sys; from bgem3_nb.queries import *\n"
            "def interrupted(*_): print('interrupted', flush=True); raise KeyboardInterrupt\n"
            "signal.signal(signal.SIGINT, interrupted)\n"
            f"passages = [{{'id': f'id{{i}}', 'text': f'p{{i}}', 'language': 'en', 'domain': 'd'}} for i in "
            f"range({n})]\n"
            f"generate_queries(passages, Endpoint('m', {server.url!r}, retries=2, timeout=600), "
            f"{str(tmp_path / 'cache.sqlite')!r}, types={TYPES}, concurrency=4, progress=False)")
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)

def wait_for(condition, process, seconds=300):
    "Waits as long as a busy machine needs; a process that ends before it is a failure."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.02)


def test_killed_run_repeats_no_paid_call(server, ask, tmp_path, env):
    "SIGKILL with four calls under way: only those four, which were never answered, are asked a second time."
    server.script = {f"p{i}": ["hold"] for i in range(16, 20)}
    process = child(server, tmp_path, env, 30)
    wait_for(lambda: server.now == 4 and len(server.seen) == 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    server.script = {}
    out = ask(30)
    assert out.report["with_queries"] == 30 and (out.report["cached"], out.report["calls"]) == (16, 14)
    assert asked(server) == {f"p{i}": 2 if 16 <= i < 20 else 1 for i in range(30)}


def test_interrupted_run_keeps_the_calls_under_way(server, ask, tmp_path, env):
    server.script = {f"p{i}": ["hold"] for i in range(4, 8)}
    process = child(server, tmp_path, env, 30)
    wait_for(lambda: server.now == 4 and len(server.seen) == 8, process)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    time.sleep(.3)                                                               # it has to tell its threads
    server.release.set()
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1] and process.returncode
    assert len(server.seen) == 8 and ask(30).report["cached"] == 8
    assert max(asked(server).values()) == 1


def test_anything_may_happen_and_every_passage_is_accounted_for(server, ask):
    trouble = ["ok", "throttle 0.02", "status 503", "hangup", "say no", "cut", "status 400", "brokenbody", "none"]
    server.script = {f"p{i}": [trouble[i % 9], trouble[i // 9 % 9]] for i in range(81)}
    out = ask(81, retries=1, tries=2, give_up=50, concurrency=16)
    assert out.report["with_queries"] >= 27 and out.report["failed"] >= 9 and out.report["not_reached"] == 0
    check(ask(81, retries=1, tries=2, dry_run=True), 81)


def test_one_cache_for_several_runs_at_once(tmp_path):
    def write(name):
        cache = AnswerCache(tmp_path / "c.sqlite")
        for i in range(20):
            cache.put(f"{name}{i}", Answer(name, "stop", 1, 1, None))
            cache.put("same", Answer(name, "stop", 1, 1, None))
        cache.close()
    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for t in threads: t.start()
    for t in threads: t.join()
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert len(cache.get("same")) == 60 and all(len(cache.get(f"{name}{i}")) == 1 for name in "abc" for i in range(20))


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    few = passages(2)
    with pytest.raises(ImportError, match=r"bgem3_nb\[queries\]"):
        generate_queries(few, Endpoint("m", "vllm"), tmp_path / "c.sqlite", progress=False)
    assert generate_queries(few, Endpoint("m", "vllm"), tmp_path / "c.sqlite",
                            dry_run=True).report["estimate"]["calls"] == 2


def test_a_passage_s_language_is_one_code():
    assert [p["language"] for p in read_passages([{"id": 1, "text": "a", "language": "vi-VN"},
                                                  {"id": 2, "text": "b", "language": "VI"}])] == ["vi"] * 2
    assert read_passages([{"id": 1, "text": "a"}], "ar_EG")[0]["language"] == "ar"


def test_rows_of_any_source_are_passages():
    rows = make_rows([
        {"query": "In the name of God", "pos": "a", "pos_ids": ["1:1"], "domain": "1 Al-Fatihah", "source": "quran"},
        {"query": "title", "pos": ["a ", "b"], "query_type": "title"}, {"query": "x", "pos": "c", "pos_ids": ["1:1"]}])
    found = row_passages(rows)
    assert [(p["id"], p["text"], p["title"]) for p in found] == [("1:1", "a", ""), ("row 2", "b", "title"),
                                                                 ("1:1#2", "c", "")]
    assert (found[0]["headings"], found[0]["source"]) == (["Al-Fatihah"], "quran")


def test_conceptual_queries_name_two_ideas_and_quote_nothing():
    texts = ["Be patient, and pray.", "patience and prayer are one", "Pray: whoever is patient is rewarded.",
             "Only pray."]
    passages = [{"id": str(i), "text": t, "language": "en", "domain": "ab"[i % 2], "headings": ["H"]}
                for i, t in enumerate(texts)] + [{"id": "v", "text": "Thử việc và tiền thưởng", "language": "vi"},
                                                 {"id": "r", "text": "الصَّبْر مع الصَّلاة", "language": "ar"}]
    out = rule_queries(passages, types=["conceptual"])
    assert {"0", "2", "r", "v"} <= {id for r in out.rows for id in r["pos_ids"]}
    assert {r["query_type"] for r in out.rows} == {"conceptual"}
    text = {p["id"]: p["text"] for p in passages}
    for row in out.rows:
        words = text_key(row["query"].rstrip("?؟")).split()
        for i in range(len(words) - 2):
            assert not any(" ".join(words[i:i + 3]) in text_key(text[id]) for id in row["pos_ids"]), row["query"]
    assert "3" in {f["id"] for f in out.failed}   # one idea is no concept
    domain = {p["id"]: p.get("domain", "") for p in passages}
    assert all(len({domain[i] for i in r["pos_ids"]}) == 1 for r in out.rows)   # a held-out domain has its own rows
