"""Wrong input to the training job: one sentence with file, line and field, exit code 1, nothing half-written."""
import json

import pytest

GOOD = {"query": "nghỉ hằng năm", "pos": ["Người lao động được nghỉ hằng năm."], "domain": "a"}


def cases(tmp_path):
    "Name of a case to the words of the command line and what the message must hold."
    def rows(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in (GOOD, GOOD | {"domain": "b"}, *lines)), encoding="utf-8")
        return ["-p", "source", str(path), "-p", "test", "[b]"]
    return {
        "empty positive": (rows("empty.jsonl", GOOD | {"pos": [""]}), ["empty.jsonl", "line 3", "pos"]),
        "missing column": (rows("missing.jsonl", {"query": "q"}), ["missing.jsonl", "line 3", "pos"]),
        "not a string": (rows("number.jsonl", GOOD | {"query": 7}), ["number.jsonl", "line 3", "query"]),
        "no such file": (["-p", "source", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        "no such domain": (rows("fine.jsonl")[:3] + ["-p", "test", "[c]"], ["'c'", "there are 'a', 'b'"]),
        "no heads": (rows("more.jsonl", GOOD | {"query": "ngày phép"}) + ["-p", "new_heads", ""], ["no trained heads", "new_heads="]),
    }


@pytest.mark.parametrize("name", ["empty positive", "missing column", "not a string", "no such file", "no such domain", "no heads"])
def test_bad_input(name, tmp_path, launch):
    words, wanted = cases(tmp_path)[name]
    done = launch("train", *words, "-p", "valid", "0.5", "--out", str(tmp_path / "run"), "--no-progress")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in wanted: assert part in done.stderr, done.stderr
    left = sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock")
    assert left == ["run.json", "train.failed.ipynb"], left
