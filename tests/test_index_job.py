"""The job `index`: rows become an index that a run with other rows brings up to date, and a bad row leaves it as it
was."""
import json

import pytest

from bgem3_nb.hybrid_index import HybridIndex, Principal

pytest.importorskip("qdrant_edge")
ROWS = [{"id": "a", "text": "Nghỉ phép năm là 14 ngày.", "access_level": "internal", "year": 2024},
        {"id": "b", "text": "Lương của giám đốc.", "access_level": "secret", "year": 2023},
        {"id": "c", "text": "Mật khẩu có ít nhất 12 ký tự.", "access_level": "internal", "year": 2022}]


def test_an_index_is_built_brought_up_to_date_and_spared_by_a_bad_row(launch, tmp_path):
    rows, words = tmp_path / "rows.jsonl", ["-p", "source", "rows.jsonl", "-p", "levels", "internal", "--out", "run",
                                            "-p", "fields", "{year: integer}", "--no-progress"]
    rows.write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
    done = launch("index", *words, "-p", "dry_run", "true")
    assert done.returncode == 0 and "nothing was written" in done.stdout and not (tmp_path / "run" / "index").exists()
    done = launch("index", *words, "--force", "-p", "question", "nghỉ phép", "-p", "principal", "internal")
    assert done.returncode == 0, done.stderr
    assert "3 chunks encoded" in done.stdout and "1 chunks have no declared level" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["unseen"] == 1
    changed = [{**ROWS[0], "year": 2025}, {**ROWS[1], "year": "2023"}]
    rows.write_text("".join(json.dumps(r) + "\n" for r in changed), encoding="utf-8")
    done = launch("index", *words, "--force")
    assert done.returncode == 1 and "chunk b: year must be integer, not '2023'" in done.stderr, done.stderr
    with HybridIndex(tmp_path / "run" / "index") as index:
        found = index.chunks(principal=Principal(["internal"]))
        assert {h.id: h.payload["year"] for h in found} == {"a": 2024, "c": 2022}
        done = launch("index", *words, "--force")
        assert done.returncode == 1 and "another process has this index open" in done.stderr, done.stderr
