"""The job `specialist`: a training is taken over from an earlier run only with the same settings."""
import json

import pytest

from conftest import REPO

MINI = str(REPO/"data"/"law_mini.jsonl")


@pytest.fixture
def specialist(launch):
    "A function that runs the smoke parameters with these variants."
    def run(variants, *more):
        return launch("specialist", "-f", "specialist_smoke", "-p", "source", MINI, "-p", "variants",
                      json.dumps(variants), "--out", "run", *more)
    return run


def test_other_settings_are_other_runs(tmp_path, specialist):
    def run(variants, *more):
        done = specialist(variants, *more)
        assert done.returncode == 0, done.stderr
        return {p.parent.name: (p.stat().st_mtime_ns, p.read_text(encoding="utf-8"))
                for p in (tmp_path/"run"/"parts").glob("*/train.ipynb")}
    first = run({"a guard": {"retained_share": 0.9}})
    near = "Bộ_luật_hàng_hải_Việt_Nam_2015_a_guard"
    assert sorted(name.rpartition("-")[0] for name in first) == [near, "general"]
    second = run({"a guard": {"retained_share": 0.5}}, "--force")
    assert first.items() <= second.items()                      # none of the first was run again
    [other] = second.keys() - first.keys()                      # and the new settings have a run of their own
    assert other.startswith(near)
    assert '\\"retained_share\\": 0.5' in second[other][1]


def test_a_far_subject_alone(tmp_path, specialist):
    rows = [{"query": f"question {i}", "pos": f"The answer to question {i} is {i * i}."} for i in range(60)]
    (tmp_path/"far.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = specialist({"plain": {}}, "-p", "special", "[]", "-p", "far_source", "far.jsonl",
                      "-p", "far_options", "{}", "-p", "far_rows", "40")
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path/"run"/"parts").glob("far_plain-*")
    found = json.loads((folder/"metrics.json").read_text(encoding="utf-8"))
    assert found["queries"] == 10                               # 40 rows of the subject: a test of 12, cut to max_rows
    assert "general" in found and found["general"]["before"]


@pytest.mark.parametrize("words, said", [
    (["-p", "special", '["no such law"]'], "special names ['no such law']"),
    (["-p", "special", "[]"], "nothing to specialise on")])
def test_a_subject_that_is_not_there_is_named(specialist, words, said):
    done = specialist({"plain": {}}, *words)
    assert done.returncode != 0 and said in done.stderr, done.stderr
