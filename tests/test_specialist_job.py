"""The job `specialist`: a training is taken over from an earlier run only with the same settings."""
import json
import subprocess

from conftest import LAUNCHER, REPO


def test_other_settings_are_other_runs(tmp_path, env):
    def run(variants, *more):
        words = ["specialist", "-f", "specialist_smoke", "-p", "source", str(REPO/"data"/"law_mini.jsonl"),
                 "-p", "variants", json.dumps(variants), "--out", "run", *more]
        done = subprocess.run([*LAUNCHER, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {p.parent.name: (p.stat().st_mtime_ns, p.read_text(encoding="utf-8"))
                for p in (tmp_path/"run"/"parts").glob("*/train.ipynb")}
    first = run({"a guard": {"keep": 0.9}})
    assert sorted(name.rpartition("-")[0] for name in first) == ["a_guard", "general"]
    second = run({"a guard": {"keep": 0.5}}, "--force")
    assert first.items() <= second.items()                      # none of the first was run again
    [other] = second.keys() - first.keys()                      # and the new settings have a run of their own
    assert other.startswith("a_guard-")
    assert '\\"keep\\": 0.5' in second[other][1]
