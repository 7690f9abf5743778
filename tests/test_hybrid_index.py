"""The hybrid index: nothing leaks and nothing is missing, a kill loses nothing, both engines agree, and bad input is
one sentence."""
import ast
import ctypes
import faulthandler
import os
import random
import resource
import signal
import sys
import time
from copy import deepcopy
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_model

from bgem3_nb.compression import keep_top, lexical_importance
from bgem3_nb.documents import Document
from bgem3_nb.encoding import M3Encoder
from bgem3_nb.exact_search import search_candidates
from bgem3_nb.hybrid_index import Access, EmbeddedEngine, HybridIndex, IndexProblem, main, point_id, Principal

pytest.importorskip("qdrant_edge")
qdrant_client = pytest.importorskip("qdrant_client")

WORDS = "lương nghỉ phép mật khẩu máy tính bảo hiểm thuế hợp đồng đào tạo họp thẻ xe nhà ăn sách bàn".split()
LEVELS = ("public", "internal", "restricted", "secret")
ACCESS = Access(LEVELS, by_department=("restricted",))
FIELDS = {"year": "integer", "tags": "keyword", "size": "float", "draft": "bool"}
WEIGHTS = {"dense": 1., "lexical": .3, "multi": 1.}


class KnownTexts(M3Encoder):
    "A tiny model that encodes each text once, so that a fork of the tests needs no arithmetic."
    def __init__(self):
        super().__init__(tiny_model(), max_length=32, progress=False)
        self.known, self.calls = {}, 0

    def encode_counted(self, texts, *args, **kwargs):
        self.calls += len(texts)
        key = (tuple(texts), kwargs.get("outputs"))
        if key not in self.known: self.known[key] = super().encode_counted(texts, *args, **kwargs)
        return self.known[key]


@pytest.fixture(scope="session")
def encoder(): return KnownTexts()


def make_rows(n, seed=0):
    "Rows with every kind of payload: levels that are declared, unknown or missing, dates, lists, empty fields."
    r = random.Random(seed)
    day = lambda: (date(2020, 1, 1) + timedelta(r.randrange(1500))).isoformat()
    rows = []
    for n in range(n):
        row = {"id": f"d{n // 3}#{n}", "document_id": f"d{n // 3}",
               "text": " ".join(r.choices(WORDS, k=r.randint(3, 9))),
               "access_level": r.choice([*LEVELS, *LEVELS, "Public", "unknown", None]),
               "department": r.choice(["hr", "it", ["hr", "it"], "law", None]),
               "year": r.choice([2020, 2021, 2022, None]), "tags": r.sample(["a", "b", "c"], r.randint(0, 3)),
               "size": r.choice([.5, 1.5, 2.5]), "draft": r.choice([True, False]),
               "valid_from": r.choice([day(), None]), "valid_to": r.choice([day(), None])}
        rows.append({k: v for k, v in row.items() if v is not None or r.random() < .5})
    return rows


def is_in(value, wanted):
    "Whether a payload value fulfils one entry of `where`, in plain Python."
    values = value if isinstance(value, list) else [] if value is None else [value]
    if wanted is None: return not values
    if isinstance(wanted, list): return any(is_in(value, w) for w in wanted)
    if isinstance(wanted, dict):
        tests = {"gt": lambda v, b: v > b, "gte": lambda v, b: v >= b, "lt": lambda v, b: v < b,
                 "lte": lambda v, b: v <= b}
        return any(all(tests[k](v, b) for k, b in wanted.items()) for v in values)
    return any(type(v) is type(wanted) and v == wanted for v in values)


def is_seen(row, who, where, day):
    "The rules of access, filter and validity, in plain Python."
    level, departments = row.get("access_level"), row.get("department")
    if level not in LEVELS or level not in who.levels: return False
    if level == "restricted" and not any(is_in(departments, d) for d in who.departments): return False
    where = dict(where or {})
    if any(is_in(row.get(k), v) for k, v in where.pop("not", {}).items()): return False
    if not all(is_in(row.get(k), v) for k, v in where.items()): return False
    return day is None or ((row.get("valid_from") or "0") <= day < (row.get("valid_to") or "9"))


def random_read(r):
    "A principal, a filter and a day."
    levels = r.sample([*LEVELS, "unknown", "Public", ""], r.randint(0, 4))
    who = Principal(levels, r.sample(["hr", "it", "law", "none"], r.randint(0, 2)))
    choices = {"year": [2020, [2021, 2022], {"gte": 2021}, {"gt": 2019, "lt": 2021}, None, []],
               "tags": ["a", ["b", "c"], None], "size": [.5, {"lte": 1.5}], "draft": [True, False],
               "department": ["hr", ["it", "law"]], "document_id": ["d1", ["d2", "d3", "none"]]}
    pick = lambda n: {k: r.choice(choices[k]) for k in r.sample(sorted(choices), n)}
    where = pick(r.choice([0, 0, 1, 2])) | ({"not": pick(1)} if r.random() < .2 else {})
    return who, where, f"202{r.randint(0, 3)}-0{r.randint(1, 9)}-15" if r.random() < .3 else None


def check_reads(index, rows, corpus, queries, times, seed):
    "Compare searches, counts and facets with brute force; returns the numbers of leaks and of missing chunks."
    r, leaks, missing = random.Random(seed), 0, 0
    for n in range(times):
        who, where, day = random_read(r)
        seen = {i: row for i, row in enumerate(rows) if is_seen(row, who, where, day)}
        query = queries[[r.randrange(len(queries))]]
        fusion = r.choice(["weights", "weights", "weights", "rrf", "dbsf"])
        hits = index.search(query, len(rows), who, where, day, candidates=len(rows), fusion=fusion)
        found, wanted = [h.id for h in hits], {row["id"] for row in seen.values()}
        leaks += len(set(found) - wanted)
        missing += len(wanted - set(found))
        assert len(found) == len(set(found)) and index.count(who, where, day) == len(wanted)
        if fusion == "weights" and seen:
            exact = search_candidates(query, corpus[list(seen)], len(seen), WEIGHTS, progress=False)
            np.testing.assert_allclose([h.score for h in hits], exact.scores[0], atol=2e-3)
        if n % 10 == 0:
            by_level = index.facets("access_level", who, where, day)
            assert sum(by_level.values()) == len(wanted) and set(by_level) <= set(who.levels) & set(LEVELS)
            wanted = {row["document_id"] for row in seen.values()}
            assert {h.document_id for h in index.search(query, 20, who, where, day, by="document")} <= wanted
            ids = [row["id"] for row in r.sample(rows, 5)]
            assert {h.id for h in index.chunks(ids, who)} == {i for i in ids if is_seen(
                next(row for row in rows if row["id"] == i), who, None, None)}
    return leaks, missing


@pytest.fixture(scope="session")
def filled(encoder, tmp_path_factory):
    "An index of random rows, their embeddings, and some queries."
    rows = make_rows(60)
    path = tmp_path_factory.mktemp("index") / "own"
    index = HybridIndex(path, encoder, access=ACCESS, fields=FIELDS, weights=WEIGHTS)
    with pytest.warns(UserWarning, match="have no declared level"): written = index.upsert(rows)
    assert written.encoded == len(rows) and written.unseen == sum(r.get("access_level") not in LEVELS for r in rows)
    corpus, queries = (encoder.encode([r["text"] for r in rows]), encoder.encode([" ".join(WORDS[a:a + 4])
                                                                                 for a in range(12)]))
    yield index, rows, corpus, queries
    index.close()


def test_nothing_leaks_and_nothing_is_missing(filled):
    "Against brute force; BGEM3_NB_READS sets how many random reads there are."
    assert check_reads(*filled, int(os.environ.get("BGEM3_NB_READS", 1500)), seed=1) == (0, 0)


def test_the_server_engine_keeps_the_same_contract(encoder, filled):
    "The client's own engine in memory, by the same random reads, writes and refusals."
    _, rows, corpus, queries = filled
    client = qdrant_client.QdrantClient(":memory:")
    with pytest.warns(UserWarning, match="no declared level"):
        index = HybridIndex(client, encoder, access=ACCESS, fields=FIELDS, weights=WEIGHTS)
        index.upsert(rows)
    assert check_reads(index, rows, corpus, queries, 60, seed=2) == (0, 0)
    index.keep(no_answer=9.)
    again = HybridIndex(client, encoder, create=False)
    who = Principal(LEVELS, ["hr"])
    assert again.settings == index.settings and again.search("lương", 3, who).no_answer
    assert again.upsert([rows[0], {**rows[1], "year": 1999}]) is not None
    assert again.count(Principal(LEVELS, ["hr", "it", "law"]), {"year": 1999}) == is_seen(
        rows[1], Principal(LEVELS, ["hr", "it", "law"]), None, None)
    assert again.delete("d0") == 3 and again.delete("d0") == 0
    with pytest.raises(IndexProblem, match="name who asks"): again.search("lương")
    other = client.create_collection("other", vectors_config={})
    with pytest.raises(IndexProblem, match="no index of this project"): HybridIndex(client, encoder, "other")
    assert other


def test_every_read_needs_a_principal(filled):
    index, rows, _, queries = filled
    reads = [lambda **w: index.search(queries[[0]], **w), lambda **w: index.count(**w), lambda **w: index.chunks(**w),
             lambda **w: index.facets("department", **w), lambda **w: index.explain("lương", rows[0]["id"], **w)]
    for read in reads:
        with pytest.raises(IndexProblem, match="declares access levels; name who asks"): read()
        with pytest.raises(IndexProblem, match="declares access levels; name who asks"): read(principal="public")
    nobody = Principal([])
    assert index.search(queries[[0]], principal=nobody) == [] and index.count(nobody) == 0
    hidden = next(r for r in rows if r.get("access_level") == "secret")
    for id in (hidden["id"], "no such id"):     # the same sentence for both
        with pytest.raises(IndexProblem, match="there is no chunk .*, or it may not be seen"):
            index.explain("lương", id, Principal(["public"]))
    with pytest.raises(IndexProblem, match="are a list, not one text"): Principal("public")


class Reader:
    "A reranker that likes long texts, remembers what it was given, and may have nothing to say."
    name = "reader"
    def __init__(self): self.seen, self.silent = [], False
    def scores(self, queries, passages, i, j):
        self.seen += passages
        return np.array([np.nan if self.silent else len(passages[n]) for n in j], np.float32)


@pytest.mark.parametrize("by", ["chunk", "document"])
def test_a_reranker_sorts_what_may_be_seen_and_falls_back(filled, by):
    index, rows, _, _ = filled
    r, text = random.Random(4), {row["id"]: row["text"] for row in rows}
    for n in range(60):
        reader, (who, where, day) = Reader(), random_read(r)
        hits = index.search("lương thuế", 5, who, where, day, by, reranker=reader, rerank_depth=30)
        seen = {row["text"] for row in rows if is_seen(row, who, where, day)}
        assert set(reader.seen) <= seen and hits.reranked == bool(hits)
        first = index.search("lương thuế", 30, who, where, day, by)
        assert [h.id for h in hits] == [h.id for h in sorted(first, key=lambda h: -len(text[h.id]))][:5]
        reader.silent = True
        same = index.search("lương thuế", 5, who, where, day, by, reranker=reader, rerank_depth=30)
        assert not same.reranked and [(h.id, h.score) for h in same] == [(h.id, h.score) for h in first[:5]]
        later = index.search("lương thuế", 3, who, where, day, by, offset=2, reranker=Reader(), rerank_depth=30)
        assert [h.id for h in later] == [h.id for h in hits[2:5]]
    who = Principal(LEVELS)
    for said, wrong in (("give the query as text", {"query": index.encode_query("lương")}),
                        ("rerank_depth \\(5\\)", {"query": "lương", "rerank_depth": 5})):
        with pytest.raises(IndexProblem, match=said): index.search(k=10, principal=who, reranker=Reader(), **wrong)


def test_only_what_changed_is_encoded(encoder, tmp_path):
    doc = Document("a.md", "A", "\n\n".join(" ".join(WORDS[n:] + WORDS[:n]) * 2 for n in range(6)))
    with HybridIndex(tmp_path / "i", encoder, chunking={"min_tokens": 20, "max_tokens": 60, "overlap": 0}) as index:
        first = index.upsert([doc])
        n = first.encoded
        assert n > 2 and index.count() == n
        calls = encoder.calls
        again = index.upsert([doc])
        assert (again.encoded, again.payloads, again.unchanged, encoder.calls) == (0, 0, n, calls)
        moved = index.upsert([replace(doc, metadata={"owner": "hr"})])
        assert (moved.encoded, moved.payloads, encoder.calls) == (0, n, calls)
        assert index.count(where={"owner": "hr"}) == n
        shorter = index.upsert([replace(doc, text=doc.text.rsplit("\n\n", 2)[0])])
        assert shorter.removed > 0 and index.count() == n + shorter.encoded - shorter.removed
        assert index.delete("a.md") == index.count() + shorter.unchanged + shorter.encoded + shorter.payloads
        assert index.upsert([doc]).encoded == n and index.upsert([replace(doc, text="")]).removed == n
        assert index.count() == 0


def kill_while_loading(encoder, rows, path, moment):
    "Load in a process that is killed at a moment from 0 to 1; returns how many rows it acknowledged."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            index = HybridIndex(path, encoder)
            if moment < .01: os.kill(os.getpid(), signal.SIGKILL)
            for done in index.upsert_batches(rows, batch=4):
                os.write(write, b"%d\n" % (done.encoded + done.unchanged))
            index.engine.finish()
        finally: os._exit(1)
    os.close(write)
    acknowledged, limit = 0, int(moment * len(rows))
    with os.fdopen(read) as lines:
        while acknowledged < limit and (line := lines.readline()): acknowledged += int(line)
        if moment >= .01:
            time.sleep(random.random() * .004)
            os.kill(pid, signal.SIGKILL)
        acknowledged += sum(map(int, lines.read().split()))
    os.waitpid(pid, 0)
    return acknowledged


def test_a_kill_loses_nothing_that_was_acknowledged(encoder, tmp_path):
    "BGEM3_NB_KILLS sets how many random moments there are."
    rows = [{"id": f"r{n}", "text": " ".join(random.Random(n).choices(WORDS, k=6))} for n in range(48)]
    with HybridIndex(tmp_path / "warm", encoder) as index: index.upsert(rows, batch=4)     # every text is encoded once
    rnd = random.Random(5)
    for n in range(int(os.environ.get("BGEM3_NB_KILLS", 4))):
        path = tmp_path / f"k{n}"
        acknowledged = kill_while_loading(encoder, rows, path, 0. if n == 0 else rnd.random())
        with HybridIndex(path, encoder) as index:
            there = {h.id: h.text for h in index.chunks()}
            for row in rows[:acknowledged]: assert there[row["id"]] == row["text"]
            done = index.upsert(rows, batch=4)
            assert done.unchanged == len(there) >= acknowledged and done.encoded == len(rows) - len(there)
            assert sorted(h.id for h in index.chunks()) == sorted(r["id"] for r in rows) and index.count() == len(rows)


def test_another_model_is_refused_and_the_difference_is_named(encoder, filled, tmp_path):
    index, _, _, queries = filled
    HybridIndex(tmp_path / "i", encoder, fields={"year": "integer"}).close()
    other = deepcopy(encoder.model)
    other.lexical_head.bias.data += 1
    other = M3Encoder(other, progress=False)
    with pytest.raises(IndexProblem, match="with model weights of lexical_head '.*Open it with these settings"):
        HybridIndex(tmp_path / "i", other)
    with pytest.raises(ValueError, match="another model than the passages, which differs in weights of lexical_head"):
        index.search(other.encode(["lương"]), principal=Principal(LEVELS))
    with pytest.raises(IndexProblem, match="fields year 'integer', not 'float'"):
        HybridIndex(tmp_path / "i", encoder, fields={"year": "float"})
    prompt = encoder.model.config.query_prompt
    try:
        encoder.model.config.query_prompt = "query: "
        with pytest.raises(IndexProblem, match="query_prompt '', not 'query: '"):
            HybridIndex(tmp_path / "i", encoder)
    finally: encoder.model.config.query_prompt = prompt


@pytest.mark.parametrize("rows, wanted", [
    ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "item 1: the id 'a' is given twice"),
    ([{"id": "a", "text": "x", "year": "2020"}], "chunk a: year must be integer, not '2020'"),
    ([{"id": "a", "text": "x", "valid_from": "soon"}], "chunk a: valid_from must be datetime, not 'soon'"),
    ([{"id": "a", "text": "x", "access_level": ["public", "secret"]}], "chunk a: access_level must be keyword"),
    ([{"id": "a", "text": " "}], "item 0: text must be text that is not empty"),
    ([{"id": 7, "text": "x"}], "item 0: id must be text"),
    ([{"id": "a", "text": "x", "text_hash": "1"}], "the index itself uses the field 'text_hash'"),
    ([{"id": "a", "text": "x", "note": {1, 2}}], "chunk a: the payload is no JSON"),
    ([["a", "x"]], "item 0 is list; an index takes documents"),
])
def test_bad_items_are_refused_by_name(rows, wanted, encoder, filled):
    index = filled[0]
    before = index.count(Principal(LEVELS, ["hr", "it", "law"]))
    with pytest.raises(IndexProblem, match=wanted): index.upsert(rows)
    assert index.count(Principal(LEVELS, ["hr", "it", "law"])) == before


def test_a_bad_batch_leaves_those_before_it(encoder, tmp_path):
    "An id that comes twice, or a payload of another type, in the second batch."
    good = [{"id": "a", "text": "lương"}, {"id": "b", "text": "thuế", "year": 2020}]
    with HybridIndex(tmp_path / "i", encoder, fields={"year": "integer"}) as index:
        for bad in ([{"id": "c", "text": "họp"}, {"id": "c", "text": "xe"}],
                    [{"id": "c", "text": "họp"}, {"id": "d", "text": "xe", "year": "2020"}]):
            with pytest.raises(IndexProblem, match="given twice|must be integer"): index.upsert(good + bad, batch=2)
            assert {h.id for h in index.chunks()} == {"a", "b"}


def test_bad_reads_are_one_sentence(filled):
    index, who = filled[0], Principal(LEVELS)
    for wanted, arguments in {
            "offset \\+ k \\(30\\) at most candidates": {"k": 10, "offset": 20, "candidates": 20},
            "by must be chunk or document": {"by": "page"}, "valid_on must be a date": {"valid_on": "soon"},
            "where: 'year' must have some of gt": {"where": {"year": {"from": 3}}},
            "where: 'year' cannot be compared with object": {"where": {"year": object()}},
            "weights must be for some of": {"weights": {"bm25": 1.}}}.items():
        with pytest.raises(IndexProblem, match=wanted): index.search("lương", **{"principal": who, **arguments})
    with pytest.raises(IndexProblem, match="'size' is not declared as keyword"): index.facets("size", who)


def test_pages_are_cut_from_one_ranking(filled):
    index, who = filled[0], Principal(LEVELS, ["hr", "it", "law"])
    for by in ("chunk", "document"):
        whole = [h.id for h in index.search("lương thuế", 12, who, by=by)]
        pages = [[h.id for h in index.search("lương thuế", 4, who, by=by, offset=o)] for o in (0, 4, 8)]
        assert sum(pages, []) == whole and len(set(whole)) == 12


def test_a_locked_a_damaged_and_a_missing_index(encoder, tmp_path):
    path = tmp_path / "i"
    with HybridIndex(path, encoder) as index:
        index.upsert([{"id": "a", "text": "x"}])
        with pytest.raises(IndexProblem, match="another process has this index open"): HybridIndex(path, encoder)
    segment = next(path.rglob("segment.json"))
    whole = segment.read_bytes()
    segment.write_bytes(whole[:20])
    with pytest.raises(IndexProblem, match="its files are damaged"): HybridIndex(path, encoder)
    segment.write_bytes(whole)
    with HybridIndex(path, encoder) as index: assert index.count() == 1
    (path / "index.json").write_text("{")
    with pytest.raises(IndexProblem, match="index.json: not the settings of an index"): HybridIndex(path, encoder)
    with pytest.raises(IndexProblem, match="there is no index here; make one"):
        HybridIndex(tmp_path / "no", create=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(IndexProblem, match="something else here"): HybridIndex(tmp_path / "full", encoder)


HEAVY = [{"id": f"r{n}", "text": f"lương {n % 7}", "note": "x" * 20_000} for n in range(200)]


def load_until_it_stops(index):
    "Write the heavy rows; returns how many were acknowledged, and what stopped it."
    done = 0
    try:
        for part in index.upsert_batches(HEAVY, batch=20): done += part.encoded
        index.engine.finish()
    except IndexProblem as e: return done, str(e)
    return done, ""


def test_a_file_that_may_not_grow(encoder, tmp_path):
    "The system refuses a write in the middle of a batch: one sentence, and another run goes on from there."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    index = HybridIndex(tmp_path / "i", encoder)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, old[1]))
        done, why = load_until_it_stops(index)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "the disk is full (" in why and "File too large" in why and "make room, run again" in why
    index.close()
    with HybridIndex(tmp_path / "i", encoder) as index:
        there = index.count()
        assert done <= there < len(HEAVY) and index.upsert(HEAVY).unchanged == there and index.count() == len(HEAVY)


def small_disk(path, size):
    "Mount a disk of its own at path, which this process alone sees; tell whether that was allowed."
    libc, ids = ctypes.CDLL(None), (os.getuid(), os.getgid())
    if ids[0]:                                                       # a user may do so as root of a namespace
        if libc.unshare(0x10000000): return False
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            Path("/proc/self", file).write_text(text)
    if libc.unshare(0x00020000): return False
    libc.mount(b"none", b"/", None, 0x44000, None)                   # what is mounted here stays here
    return not libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, f"size={size}".encode())


def grow(path): ctypes.CDLL(None).mount(b"tmpfs", str(path).encode(), b"tmpfs", 32, b"size=300m")


def refused_and_resumed(encoder, path):
    "On a disk that is full: what was said, what was there then, and what another run did after room was made."
    with HybridIndex(path / "i", encoder) as index: said = [*load_until_it_stops(index)]
    grow(path)
    with HybridIndex(path / "i", encoder) as index:
        return [*said, index.count(), *load_until_it_stops(index), index.count()]


def fill(file):
    "Take all the room that is left on a disk."
    with file.open("wb", buffering=0) as f:
        for size in (1 << 20, 1 << 12):
            try:
                while f.write(bytes(size)) == size: pass
            except OSError: pass


def ended_and_resumed(encoder, path):
    "Another program fills the disk behind the check: how the writer ended, what it had acknowledged, what was kept."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            faulthandler.disable()                               # it would report what is wanted here
            EmbeddedEngine.check_room = lambda *_: None          # there was room a moment ago
            with HybridIndex(path / "i", encoder) as index:
                for n, part in enumerate(index.upsert_batches(HEAVY, batch=20)):
                    os.write(write, b"%d\n" % part.encoded)
                    if n == 1: fill(path / "others")
                index.engine.finish()
        except IndexProblem as e: os.write(write, b"# " + str(e).encode())
        finally: os._exit(1)
    os.close(write)
    with os.fdopen(read) as lines: lines = lines.read().splitlines()
    ended, done = os.waitpid(pid, 0)[1], sum(int(line) for line in lines if not line.startswith("#"))
    (path / "others").unlink()
    with HybridIndex(path / "i", encoder) as index:
        there = {h.id for h in index.chunks()}
        kept = {r["id"] for r in HEAVY[:done]} <= there
        return [os.WTERMSIG(ended), lines[-1], done, kept, index.upsert(HEAVY).unchanged == len(there), index.count()]


def on_a_small_disk(encoder, path, act, size):
    "Do something on a disk of its own in another process; skip where none can be mounted."
    for part in range(0, len(HEAVY), 20): encoder.encode_counted(
        [r["text"] for r in HEAVY[part:part + 20]], outputs=("dense", "lexical", "multi"))
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = act(encoder, path) if small_disk(path, size) else ["not allowed"]
            os.write(write, repr(said).encode())
        finally: os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer: said = ast.literal_eval(answer.read() or "['the process was ended']")
    os.waitpid(pid, 0)
    if said == ["not allowed"]: pytest.skip("this system allows no mount")
    return said


def test_a_full_disk(encoder, tmp_path):
    "Refused before the system would end the process; with more room another run goes on."
    done, why, there, more, nothing, whole = on_a_small_disk(encoder, tmp_path, refused_and_resumed, "76m")
    assert "the disk is full or nearly so" in why and "make room, run again" in why
    assert 0 < done == there < len(HEAVY) and (done + more, nothing, whole) == (len(HEAVY), "", len(HEAVY))


def test_a_disk_that_fills_behind_the_check(encoder, tmp_path):
    "The system ends the writer, or the engine refuses; what was acknowledged is there when room is made."
    killed, said, done, kept, unchanged, whole = on_a_small_disk(encoder, tmp_path, ended_and_resumed, "300m")
    assert killed == signal.SIGBUS or "the disk is full" in said
    assert 0 < done < len(HEAVY) and kept and unchanged and whole == len(HEAVY)


def test_fewer_and_coarser_multi_vectors(encoder, filled, tmp_path):
    "multi_tokens keeps those of the largest lexical weights; vectors are quantised, and exact searches pass that by."
    _, rows, corpus, queries = filled
    texts = [r["text"] for r in rows]
    few = keep_top(corpus, lexical_importance(corpus, encoder.tokenize(texts)), 3)
    rows = [{"id": r["id"], "text": r["text"]} for r in rows]
    for place in (tmp_path / "i", qdrant_client.QdrantClient(":memory:")):
        with HybridIndex(place, encoder, weights=WEIGHTS, multi_tokens=3,
                         quantization={"dense": "scalar", "multi": "binary"}) as index:
            index.upsert(rows)
            for n in range(3):
                hits = index.search(queries[[n]], 10, candidates=60, exact=True)
                exact = search_candidates(queries[[n]], few, 10, WEIGHTS, progress=False)
                np.testing.assert_allclose([h.score for h in hits], exact.scores[0], atol=2e-3)
    config = (tmp_path / "i" / "points" / "edge_config.json").read_text()
    assert '"scalar"' in config and '"binary"' in config
    for wrong, said in (({"multi_tokens": -1}, "0 or more"),
                        ({"quantization": {"lexical": "scalar"}}, "dense or multi"),
                        ({"multi_tokens": 3, "outputs": ("dense",)}, "lexical and multi in outputs"),
                        ({"quantization": {"dense": "product"}}, "scalar or binary")):
        with pytest.raises(IndexProblem, match=said): HybridIndex(tmp_path / "wrong", encoder, **wrong)


def test_a_server_is_told_how_many_shards(encoder, tmp_path, monkeypatch):
    "The names are those of the request that the client sends; the engine in memory is one shard, and stays equal."
    client, asked = qdrant_client.QdrantClient(":memory:"), {}
    create = client.create_collection
    monkeypatch.setattr(client, "create_collection", lambda *args, **how: create(*args, **(asked.update(how) or how)))
    sharding = {"shard_number": 4, "replication_factor": 2, "write_consistency_factor": 1}
    index = HybridIndex(client, encoder, sharding=sharding)
    assert sharding.items() <= asked.items()
    assert sharding.keys() <= qdrant_client.models.CreateCollection.model_fields.keys()
    index.upsert([{"id": str(n), "text": f"lương {n}"} for n in range(4)])
    assert HybridIndex(client, encoder).search("lương 2", 1)[0].id == "2"
    with pytest.raises(IndexProblem, match="sharding"): HybridIndex(client, encoder, sharding={"shard_number": 5})
    for place, wrong, said in ((client, {"shards": 4}, "'shards': 4"), (client, {"shard_number": 0}, "from 1"),
                               (tmp_path / "i", {"shard_number": 4}, "a directory is one shard")):
        with pytest.raises(IndexProblem, match=said): HybridIndex(place, encoder, "other", sharding=wrong)


def test_a_server_that_goes_away(encoder, monkeypatch):
    "A port that nobody listens on, and a server that stops between two batches: what was acknowledged stays."
    with pytest.raises(IndexProblem, match="http://127.0.0.1:9/chunks: the server does not answer"):
        HybridIndex("http://127.0.0.1:9", encoder)
    from qdrant_client.http.exceptions import ResponseHandlingException
    client = qdrant_client.QdrantClient(":memory:")
    index, upsert = HybridIndex(client, encoder), client.upsert
    calls = []
    def lost(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise ResponseHandlingException(OSError("connection reset"))
        return upsert(*args, **kwargs)
    monkeypatch.setattr(client, "upsert", lost)
    rows = [{"id": str(n), "text": f"lương {n}"} for n in range(12)]
    with pytest.raises(IndexProblem, match="the server does not answer .*connection reset"): index.upsert(rows, batch=4)
    assert index.count() == 4 and index.upsert(rows, batch=4).unchanged == 4 and index.count() == 12


def test_the_terminal(tmp_path, encoder, capsys, monkeypatch):
    path = tmp_path / "model"
    encoder.model.save_pretrained(path)
    with HybridIndex(tmp_path / "i", encoder, access=ACCESS, model_name=str(path)) as index:
        index.upsert([{"id": "a", "text": "lương thuế", "access_level": "public"},
                      {"id": "b", "text": "lương họp", "access_level": "secret"}])
    assert main([str(tmp_path / "i"), "lương", "--as", "public", "--why"]) == 0
    said = capsys.readouterr().out
    assert "1." in said and " a\n" in said and "lương họp" not in said
    assert "shared terms: " in said and "score " in said
    assert main([str(tmp_path / "i"), "lương"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bgem3-search: ") and "name who asks" in error and error.count("\n") == 1
    assert main([str(tmp_path / "none"), "lương"]) == 1 and "there is no index here" in capsys.readouterr().err
    assert main([str(tmp_path / "i"), "lương", "--as", "nothing"]) == 0 and "nothing found" in capsys.readouterr().out
    index = HybridIndex(tmp_path / "i")
    assert main([str(tmp_path / "i"), "lương", "--as", "public"]) == 1
    assert "another process has this index open" in capsys.readouterr().err
    assert main(["http://127.0.0.1:9", "lương"]) == 1
    error = capsys.readouterr().err
    assert "the server does not answer" in error and error.count("\n") == 1
    index.close()
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)        # not installed
    assert main([str(tmp_path / "i"), "lương", "--as", "public"]) == 1
    assert 'pip install "bgem3_nb[index]"' in capsys.readouterr().err
    assert point_id("a") == point_id("a") != point_id("b")
    index.close()
