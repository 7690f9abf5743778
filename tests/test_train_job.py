"""Wrong input to the training job: one sentence with file, line and field, exit code 1, nothing half-written."""
import json

import pytest
import torch

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


def test_trained_heads_stay_and_replacing_them_is_printed(tmp_path, launch):
    "A lexical head that came with the model is not warmed up from the start again; `replace_heads` starts it anew and says so."
    from tiny_run import tiny_model
    model = tiny_model()
    model.lexical_head.bias.data.fill_(.7)                       # a trained head, as far as anyone can tell
    model.save_pretrained(tmp_path / "model")
    rows = [{"query": f"điều {i}", "pos": [f"nội dung của điều {i}"], "domain": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    said = {}
    for name, words in {"kept": [], "replaced": ["-p", "replace_heads", "true"]}.items():
        done = launch("train", "-p", "source", str(tmp_path / "rows.jsonl"), "-p", "test", "[b]", "-p", "valid", "0.3", "-p", "model", str(tmp_path / "model"),
                      "-p", "steps", "1", "-p", "batch_size", "4", "-p", "validations", "1", "-p", "lexical_warm_up", "20", "-p", "check", "false",
                      "-p", "lexical_learning_rate", "0", "-p", "passage_length", "60", "-p", "max_length", "60", *words, "--out", str(tmp_path / name), "--no-progress")
        assert done.returncode == 0, done.stderr[-2000:]
        said[name], bias = done.stdout, torch.load(tmp_path / name / "model" / "sparse_linear.pt", weights_only=True)["bias"].item()
        assert (abs(bias - .7) < 1e-6) == (name == "kept"), bias
    assert "lexical head alone" not in said["kept"] and "replaced" not in said["kept"]
    assert "the trained heads of sparse_linear.pt and colbert_linear.pt are replaced by new ones" in said["replaced"]
    assert "lexical head alone" in said["replaced"]
