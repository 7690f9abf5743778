"""The mining job through the launcher: its files, filter mode, labels taken back, and wrong input."""
import csv
import json

import pytest

WORDS = "nghỉ làm học thi đi về ăn ngủ chơi đọc".split()
SMALL = [{"query": f"điều {i} nói gì về việc {w}", "domain": "a",
          "pos": [f"Người lao động được {w} theo điều {i} của bộ luật này và văn bản số {i}."]}
         for i, w in enumerate(WORDS)]
COPY = {"query": "khác", "domain": "a",
        "pos": ["người lao động được NGHỈ theo điều 0 của bộ luật này và văn bản số 0"]}


def lines_of(path): return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def small(tmp_path):
    def write(*lines):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in (*SMALL, *lines)), encoding="utf-8")
        words = {"source": str(path), "source_options": "{}", "parallels": "", "pilot": "0", "search_length": "48",
                 "num_negatives": "3", "mix": "0-9", "rules": '{"same text": 1, "jaccard": 0.95}',
                 "review": "[0.5, 2.0]", "language": "vi"}
        def arguments(**more):
            given = [x for k, v in (words | more).items() for x in ("-p", k, v)]
            return [*given, "--out", str(tmp_path / "run"), "--no-progress"]
        return arguments
    return write


def test_files_reasons_and_labels(small, launch, tmp_path):
    words = small(COPY)
    done = launch("mine", *words())
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    rows = lines_of(run / "train.jsonl")
    for name in ("mine.ipynb", "mine.html", "stats.json", "pairs.csv", "review.csv", "scores.png"):
        assert (run / name).is_file(), name
    assert len(rows) == 11
    assert COPY["pos"][0] not in rows[0]["neg"]
    assert SMALL[0]["pos"][0] not in rows[10]["neg"]
    assert all(len(r["neg"]) == 3 == len(r["neg_scores"]) == len(r["neg_types"]) for r in rows)
    assert all(len(r["pos_scores"]) == 1 for r in rows)
    stats = json.loads((run / "stats.json").read_text("utf-8"))
    dropped = {r["rule"]: r["dropped"] for r in stats["rules"]}
    assert dropped["same text"] == 2
    assert dropped["all"] == dropped["same text"] + dropped["jaccard"]
    assert stats["taken"]["chosen"] == 33
    with open(run / "review.csv", encoding="utf-8-sig", newline="") as f: table = list(csv.DictReader(f))
    wrong = next(r for r in table if r["candidate"] == rows[1]["neg"][0] and r["query"] == rows[1]["query"])
    wrong["label"] = "positive"
    with open(tmp_path / "labels.csv", "w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, table[0])
        out.writeheader()
        out.writerows(table)
    done = launch("mine", *words(labels_file=str(tmp_path / "labels.csv"), cluster="local"), "--force")
    assert done.returncode == 0, done.stderr          # by workers of Ray: the same but for what the labels change
    again = lines_of(run / "train.jsonl")
    assert rows[1]["neg"][0] not in again[1]["neg"]
    assert again[2:] == rows[2:]
    assert again[0] == rows[0]


def test_filter_mode(small, launch, tmp_path):
    words = small(SMALL[0] | {"query": "cũ", "neg": [COPY["pos"][0], SMALL[3]["pos"][0]], "neg_scores": [5, 5]})
    done = launch("mine", *words(filter_only="true"))
    assert done.returncode == 0, done.stderr
    last = lines_of(tmp_path / "run" / "train.jsonl")[-1]
    assert last["neg"] == [SMALL[3]["pos"][0]]
    assert last["neg_scores"][0] < 1.01


@pytest.mark.parametrize("more, wanted", [
    ({"mix": "50-90"}, "begins beyond the corpus"),
    ({"rules": '{"nonsense": 1}'}, "nonsense"),
    ({"labels_file": "nowhere.csv"}, "nowhere.csv"),
])
def test_wrong_parameters(small, launch, tmp_path, more, wanted):
    done = launch("mine", *small()(**more))
    assert done.returncode == 1
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "train.jsonl").exists()
    seen_before = "mix" not in more                 # before anything runs; the others by the run
    assert (tmp_path / "run" / "mine.failed.ipynb").is_file() != seen_before
