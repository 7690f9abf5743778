"""The job `evaluate`: what fails beside what does not, requirements and the exit code, results taken over, and models
of others."""
import json
import os

import numpy as np
import pandas as pd
import pytest
from conftest import REPO
from pypdfium2 import PdfDocument

from bgem3_nb.eval_sets import eval_set, sample_set
from bgem3_nb.systems import judge, open_systems

LAW = "data/law_mini.jsonl"


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def test_failures_requirements_and_results_that_are_taken_over(launch, tmp_path, env):
    "One model and one set cannot be opened, two requirements are not met: all else is there, and the exit code is 1."
    config = {"models": ["bm25", "no/such/model"], "sets": [{"data": LAW, "name": "law"}, "no/such/rows.jsonl"],
              "modes": ["dense"], "max_rows": 40, "slices": ["domain"],
              "require": {"BM25.R@100": .5, "law": {"BM25.RR@10": .999}, "dense.R@10": .1}}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    done = launch("evaluate", "-f", "mine.json", "--out", "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = next(line for line in done.stderr.splitlines() if "finished, but" in line)
    assert "BM25.RR@10 is 0." in said and "on law, below the required 0.999" in said
    assert "there is no system 'dense'; there are BM25" in said and "traceback" not in done.stderr
    assert "BM25.R@100 is 1.000 on average, at least 0.5" in done.stdout
    assert (tmp_path / "run" / "evaluate.html").is_file()
    metrics = read(tmp_path / "run" / "metrics.json")
    assert list(metrics["failures"]) == ["set no/such/rows.jsonl", "no/such/model"]
    assert list(metrics["evaluations"]) == ["law"] and list(metrics["evaluations"]["law"]) == ["BM25"]
    assert list(metrics["slices"]) == ["law/domain"]
    means = read(tmp_path / "run" / "performance_metrics.json")["BM25"]
    assert means["law"] == means["mean"] and means["mean"]["AP@100"] > 0 < means["mean"]["R@50"]
    costs = read(tmp_path / "run" / "performance_metrics.json")["models"]["BM25"]
    assert costs["nDCG@10"] == {"BM25": pytest.approx(means["mean"]["nDCG@10"])} and costs["parameters"] is None
    assert costs["bytes"]["words"] == costs["systems"]["BM25"]["bytes"] > 0 < costs["passages_per_second"]
    assert metrics["recommendation"]["outcome"] == "alone"
    pages = [page.get_textpage().get_text_range() for page in PdfDocument(tmp_path / "run" / "comparison_report.pdf")]
    assert "Recommendation".upper() in pages[0] and "set no/such/rows.jsonl" in pages[-1]
    kept = pd.read_parquet(tmp_path / "run" / "per_query.parquet")
    assert len(kept) == 40 and kept["RR@10"].mean() == pytest.approx(means["law"]["RR@10"])
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "parts").glob("bm25*.json")}
    assert len(parts) == 1

    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "typst.py").write_text("raise ImportError")
    run_file = str((tmp_path / "run" / "runs" / "law.BM25.trec").rename(tmp_path / "engine.trec"))
    done = launch("evaluate", "-f", "mine.json", "--out", "run", "--force", "-p", "models", f"[bm25, '{run_file}']",
                  "-p", "sets", f"[{{data: {LAW}, name: law}}]", "-p", "require", "{engine.R@100: 1}",
                  PYTHONPATH=os.pathsep.join([str(tmp_path / "without"), env["PYTHONPATH"]]))
    assert done.returncode == 0, done.stderr
    assert "There is no comparison_report.pdf: the report needs the package typst" in done.stdout
    assert not (tmp_path / "run" / "comparison_report.pdf").exists()
    assert {p: p.stat().st_mtime_ns for p in parts} == parts
    found = read(tmp_path / "run" / "metrics.json")
    assert not found["failures"] and found["evaluations"]["law"]["engine"] == found["evaluations"]["law"]["BM25"]
    assert [(t["a"], t["b"], t["difference"], t["p_holm"]) for t in found["tests"]] == [("BM25", "engine", 0, 1)]
    assert found["recommendation"]["outcome"] == "equal" and not found["examples"]


@pytest.mark.parametrize("words, wanted", [
    (["-p", "require", "{all.Recall@10: 0.5}"], "require names 'all.Recall@10'"),
    (["-p", "sets", "[no/such/rows.jsonl]"], "no set can be read"),
])
def test_what_cannot_run_is_said_in_one_sentence(words, wanted, launch):
    done = launch("evaluate", "-f", "evaluate_smoke", *words, "--out", "run", "--no-progress")
    assert done.returncode == 1 and wanted in done.stderr and "Traceback" not in done.stderr, done.stderr


BAD_SETS = [    # questions, judgements, what is said
    ("", "1 0 a 1\n", r"queries\.jsonl: the file holds no records"),
    ('{"_id": "1", "text": "al?"}\n', "", r"qrels\.txt: the file holds no records"),
    ('{"_id": "1", "text": "al?"}\n', "1 0 zzz 1\n", r"no query with a relevant passage, but 1 .* has no _id .*line 1"),
    ('{"_id": "1", "text": "al?"}\n', "9 0 a 1\n", r"no query with a relevant passage, but 1 .* has no _id .*line 1"),
]


@pytest.mark.parametrize("queries, qrels, wanted", BAD_SETS)
def test_a_wrong_id_and_a_set_without_queries_are_one_sentence(queries, qrels, wanted, tmp_path):
    "The sentence names the file that was given, and the first line that is wrong."
    files = {"queries": queries, "corpus": '{"_id": "a", "text": "alpha"}\n'}
    options = {"qrels": str(tmp_path / "qrels.txt")}
    (tmp_path / "qrels.txt").write_text(qrels)
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
        options[name] = str(tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match=wanted) as e: eval_set("mine", **options)
    assert "\n" not in str(e.value) and "/tmp" not in str(e.value).replace(str(tmp_path), "")
    (tmp_path / "gold.jsonl").write_text('{"query": "x", "relevant": ["zzz"]}\n')
    with pytest.raises(ValueError, match=r"1 relevant ids that the corpus lacks \(line 1: zzz\)"):
        eval_set(tmp_path / "gold.jsonl", corpus=options["corpus"])


def test_a_sentence_transformers_directory_is_searched_with_its_dense_vectors(tmp_path):
    "Static embeddings of the embedded model's tokenizer, saved as sentence-transformers saves them."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    data = sample_set(eval_set(REPO / "data" / "rental" / "listings.json"), 20, 60)
    words = sorted({w for text in (*data.queries, *data.passages) for w in text.split()})
    tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(["?", *words])}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(words) + 1, 16)).astype(np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save(str(tmp_path / "static"))
    systems, _ = open_systems(str(tmp_path / "static"))
    assert [s.name for s in systems] == ["static dense"]
    judged = judge(systems[0], data)
    q, p = (model.encode(texts, normalize_embeddings=True) for texts in (data.queries, data.passages))
    best = (q @ p.T).argmax(1)
    assert (judged.found.passages[:, 0] == best).all()
    assert judged.hard["all"] and 0 <= judged.evaluation.mean("R@1") <= 1


@pytest.mark.parametrize("name", ["company", "law", "rental", "quran", "hadith"])
def test_gold_sets_are_read_with_every_answer(name):
    "The corpus is the one that data/gold/corpora.json names; no id is lost, and every label is there."
    try: data = eval_set(REPO / "data" / "gold" / f"{name}.jsonl")
    except ImportError as e: pytest.skip(str(e))
    lines = (REPO / "data" / "gold" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(data) == len(lines) and {"category", "language", "difficulty"} <= data.labels.keys()
    assert not {what for what in data.amiss if "lacks" in what or "left out" in what}, data.amiss
    of = {q["query"]: q["relevant"] for q in map(json.loads, lines)}
    for query, found in zip(data.queries, data.qrels):
        grades = of[query].values() if isinstance(of[query], dict) else [1] * len(of[query])
        assert sorted(found.values())[-1] == max(grades) and len(found) <= len(grades)
