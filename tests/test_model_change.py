"""Changing models: a second index that a kill does not harm, a switch that is seen whole or not at all, a split that
stays, lists that are merged fairly, and a log that comes back as it was written."""
import json
import os
import random
import signal
import threading
from copy import deepcopy

import numpy as np
import pytest
from test_hybrid_index import ACCESS, encoder, FIELDS, KnownTexts, LEVELS, make_rows, WORDS  # noqa: F401

from bgem3_nb.documents import Document
from bgem3_nb.hybrid_index import Hit, Hits, HybridIndex, IndexProblem, Principal
from bgem3_nb.model import ProjectionHead
from bgem3_nb.model_change import (
    arm_of, first_click, new_settings, reindex, SearchLog, side_by_side, SplitSearch, team_clicks, team_draft, unpaired,
    user_means, Versions)

qdrant_client = pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")
EVERYBODY = Principal(LEVELS, ["hr", "it", "law"])


@pytest.fixture(scope="module")
def smaller(encoder):  # noqa: F811
    "The same tiny model with dense vectors of half the width: another model."
    other = KnownTexts()
    other.model = deepcopy(encoder.model)
    other.model.dense_head = ProjectionHead(16, 8)
    return other


def contents(index):
    return {p["id"]: {k: v for k, v in p.items()} for p in index.engine.scroll(index.engine.group())}


@pytest.mark.filterwarnings("ignore:.*no declared level")
@pytest.mark.parametrize("place", ["directory", "server"])
def test_another_model_takes_over_and_the_switch_goes_both_ways(encoder, smaller, tmp_path, place):  # noqa: F811
    place = tmp_path if place == "directory" else qdrant_client.QdrantClient(":memory:")
    versions, rows = Versions(place, "rules"), make_rows(40)
    where = lambda v: dict(zip(("place", "collection"), versions.arguments(v)))
    old = HybridIndex(**where("v1"), encoder=encoder, access=ACCESS, fields=FIELDS, weights={"dense": 1.})
    old.upsert(rows)
    new = HybridIndex(**where("v2"), encoder=smaller, **new_settings(old, multi_tokens=4))
    assert new.settings["widths"] == {"dense": 8, "multi": 16} and new.settings["weights"] != old.settings["weights"]
    first = reindex(old, new, batch=7)
    assert contents(new) == contents(old) and (first.encoded, first.removed) == (40, 0)
    old.delete("d0")
    old.upsert([{**rows[5], "text": "lương mới"}])
    changed = reindex(old, new)
    assert contents(new) == contents(old) and (changed.encoded, changed.removed, changed.unchanged) == (1, 3, 36)
    both = side_by_side(old, new, ["lương", "thuế họp"], 5, EVERYBODY)
    assert all(0 <= s.overlap <= 1 and len(s.old) == len(s.new) == 5 for s in both)
    seen = {r["id"] for r in rows if r.get("access_level") == "public"}
    assert all({h.id for h in s.new} <= seen for s in side_by_side(old, new, ["lương"], 5, Principal(["public"])))
    versions.switch("v1")
    old.keep(no_answer=.5)
    with pytest.raises(IndexProblem, match="threshold for no answer, and 'v2' has none; fit it anew"):
        versions.switch("v2")
    new.keep(no_answer=.4)
    versions.switch("v2")
    assert versions.live == "v2" and Versions(place, "rules").live == "v2"
    assert [versions.take_back(), versions.live, versions.take_back(), versions.live] == ["v1", "v1", "v2", "v2"]
    for index in (old, new): index.close()
    with versions.open() as index: assert index.settings["widths"]["dense"] == 8
    if place is not tmp_path:     # the alias is a name of the collection
        assert place.count("rules").count == place.count("v2").count == 37
    else:
        (tmp_path / "rules.json").write_text("{")
        with pytest.raises(IndexProblem, match="rules.json: not the name of an index"): versions.open()


def test_a_document_keeps_its_context_in_another_index(encoder, smaller, tmp_path):  # noqa: F811
    doc = Document("a.md", "Lương", "# Thuế\n\n" + "\n\n".join(" ".join(WORDS) for _ in range(4)))
    with HybridIndex(tmp_path / "a", encoder, chunking={"min_tokens": 20, "max_tokens": 60, "overlap": 0}) as old:
        old.upsert([doc])
        with HybridIndex(tmp_path / "b", smaller, **new_settings(old)) as new:
            reindex(old, new)
            assert contents(new) == contents(old) and any("encoded" in p for p in contents(new).values())
            assert new.upsert([doc]).unchanged == new.count()      # the documents themselves give the same


def test_a_kill_in_the_middle_of_a_reindex(encoder, smaller, tmp_path):  # noqa: F811
    rows = [{"id": f"r{n}", "text": " ".join(random.Random(n).choices(WORDS, k=6))} for n in range(40)]
    with HybridIndex(tmp_path / "v1", encoder) as old: old.upsert(rows, batch=4)
    with HybridIndex(tmp_path / "v1", encoder) as old, HybridIndex(tmp_path / "warm", smaller) as new:
        reindex(old, new, batch=4)                            # every batch is encoded once
    pid = os.fork()
    if not pid:
        try:
            old = HybridIndex(tmp_path / "v1", encoder)
            new, batches = HybridIndex(tmp_path / "v2", smaller), []
            write = new._write
            def killed(entries):
                batches.append(1)
                if len(batches) == 6: os.kill(os.getpid(), signal.SIGKILL)
                return write(entries)
            new._write = killed
            reindex(old, new, batch=4)
        finally: os._exit(1)
    os.waitpid(pid, 0)
    versions = Versions(tmp_path)
    with pytest.raises(IndexProblem, match="'v2' is not finished; run reindex again"): versions.switch("v2")
    with HybridIndex(tmp_path / "v1", encoder) as old, HybridIndex(tmp_path / "v2", smaller) as new:
        done = reindex(old, new, batch=4)
        assert (done.unchanged, done.encoded) == (20, 20) and contents(new) == contents(old)
    versions.switch("v2")


def test_a_switch_is_seen_whole_or_not_at_all(tmp_path):
    "A thread reads while another switches back and forth."
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(json.dumps({"no_answer": None}))
    versions, seen, over = Versions(tmp_path), set(), threading.Event()
    versions.switch("one")
    versions.switch("two")
    def read():
        while not over.is_set(): seen.add(Versions(tmp_path).live)
    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300): versions.take_back()
    over.set()
    reader.join()
    assert seen <= {"one", "two"} and versions.live == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live.json", "one", "two"]


class Ranking:
    "An index that finds what it was told to, or fails."
    def __init__(self, ids): self.ids = ids
    def search(self, query, k=10, principal=None, **how):
        if self.ids is None: raise OSError("the engine is gone")
        return Hits(Hit(i, i, 1., i, {}) for i in self.ids[:k])


def test_the_split_and_its_log(tmp_path):
    log = SearchLog(tmp_path / "log.jsonl")
    split = SplitSearch(Ranking("abcd"), Ranking("dxyz"), log, .3, "one")
    for n in range(200):
        shown = split.search(f"question {n}", 4, user=f"user {n % 50}")
        assert shown.arm == arm_of(f"user {n % 50}", .3, "one")
        assert shown.hits[0].id == {"old": "a", "new": "d"}[shown.arm]
        if n % 2 == 0: split.click(shown, shown.hits[n % 4].id)
    found = log.searches()
    assert len(found) == 200 and "user 7" not in log.path.read_text()
    assert [s["clicks"] for s in found[:4]] == [[1], [], [3], []]
    means = user_means(found, first_click)
    assert len(means["old"]) + len(means["new"]) == 50 and len({s["user"] for s in found}) == 50
    assert all(s["ms"] >= 0 and s["arm"] in ("old", "new") for s in found)
    with open(log.path, "a") as f: f.write('{"search": "cut')          # a process ended here
    assert log.searches() == found
    with open(log.path, "a") as f: f.write('"}\n{"click": "nobody", "chunk": "a"}\n')
    with pytest.raises(IndexProblem, match=r"log.jsonl, line 302: neither a search nor a click"): log.searches()


def test_a_new_index_that_fails_shows_the_old_hits_and_counts_as_new(tmp_path):
    log = SearchLog(tmp_path / "log.jsonl")
    split = SplitSearch(Ranking("ab"), Ranking(None), log, share=1.)
    for interleaved in (False, True):
        assert [h.id for h in split.search("q", 2, interleaved=interleaved).hits] == ["a", "b"]
    assert [(s["arm"], s["failed"]) for s in log.searches()] == [(a, "the engine is gone") for a in ("new", "both")]
    assert [len(x) for x in team_clicks(log.searches())] == [0, 0]
    with pytest.raises(OSError): SplitSearch(Ranking(None), Ranking("a"), log, share=0.).search("q")


def test_lists_are_merged_fairly():
    "Each pick is the best left of its ranking, teams are of one size and begin as often; equal rankings get nothing."
    r, points = random.Random(0), []
    hit = lambda i: Hit(i, i, 1., i, {})
    for n in range(400):
        a, b = ([hit(i) for i in r.sample("abcdefghij", r.randint(3, 10))] for _ in range(2))
        shown, teams = team_draft(a, b, 6, str(n))
        assert len(shown) == min(6, len({h.id for h in [*a, *b]})) == len({h.id for h in shown})
        for at, (h, team) in enumerate(zip(shown, teams)):
            left = [[x.id for x in ranking if x.id not in {s.id for s in shown[:at]}][:1] for ranking in (a, b)]
            assert {"old": [h.id] == left[0], "new": [h.id] == left[1], "both": left[0] == left[1] == [h.id]}[team]
        if min(len(a), len(b)) >= 6: assert abs(teams.count("old") - teams.count("new")) <= 1
        points.append({"new": 1, "old": -1, "both": 0}[teams[0]])
        assert team_draft(a, a, 3, str(n)) == (a[:3], ["both"] * 3)
    assert abs(np.mean(points)) < .15      # three standard deviations


def test_the_unpaired_test_finds_a_difference_and_invents_none():
    rng = np.random.default_rng(0)
    same = [unpaired(rng.random(30), rng.random(40), seed=n, n_resamples=199).p_value for n in range(60)]
    assert np.mean(np.array(same) < .05) < .17
    d = unpaired(rng.random(60), rng.random(60) + .5)
    assert d.p_value < .001 and .3 < d.low < d.high < .7 and d.n_old == d.n_new == 60
