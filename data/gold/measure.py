"""Recall@10 of BM25 and of the embedded encoder on the gold sets, by category, as Markdown.

    python data/gold/measure.py                  # all sets
    python data/gold/measure.py company rental   # some of them
"""
import json
import sys
from pathlib import Path

import numpy as np

from bgem3_nb.encoding import M3Encoder
from bgem3_nb.evaluation import bm25_scores
from bgem3_nb.exact_search import search_candidates
from bgem3_nb.formats import load_data
from bgem3_nb.sources import load_source

HERE = Path(__file__).parent
CORPORA = json.loads((HERE / "corpora.json").read_text(encoding="utf-8"))
LANGUAGE = {"quran": "ar", "hadith": "ar"}   # of the passages; the others are Vietnamese
MODES = {"dense": {"dense": 1.}, "lexical": {"lexical": 1.}, "all": "all"}


def read_lines(path):
    "Read the objects of a file of JSON lines."
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def corpus(name):
    "Return the passages that a gold set is searched in, id to text. Raises ImportError without the source's package."
    source = CORPORA[name]
    if isinstance(source, dict):
        options = dict(source)
        rows = load_source(options.pop("data"), **options)
        return {id: text for row in rows for id, text in zip(row["pos_ids"], row["pos"])}
    if (HERE / source).is_dir(): return {r["id"]: r["text"] for r in load_data(HERE / source).corpus}
    return {r["_id"]: r["text"] for r in read_lines(HERE / source)}


def first_ten(queries, texts, language, encoder):
    "Rank the passages with every system: its name to the ten first of each query, (queries, 10)."
    scores = bm25_scores(texts, queries, language)
    found = {"BM25": [[j for j in np.argsort(-row, kind="stable")[:10] if row[j] > 0] for row in scores]}
    q, p = encoder.encode_queries(queries), encoder.encode_passages(texts)
    return found | {name: search_candidates(q, p, 10, weights, progress=False).passages.tolist()
                    for name, weights in MODES.items()}


def main():
    encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False)
    systems = ["BM25", *MODES]
    print(f"| set | category | queries | {' | '.join(systems)} |\n|---|---|---|{'---|' * len(systems)}")
    for name in sys.argv[1:] or CORPORA:
        questions, passages = read_lines(HERE / f"{name}.jsonl"), corpus(name)
        ids = list(passages)
        found = first_ten([q["query"] for q in questions], list(passages.values()), LANGUAGE.get(name, "vi"), encoder)
        recall = {s: np.array([len({ids[j] for j in top} & set(q["relevant"])) / len(q["relevant"])
                               for top, q in zip(found[s], questions)]) for s in systems}
        categories = np.array([q["category"] for q in questions])
        for category in [*dict.fromkeys(categories), "all"]:
            of = (categories == category) | (category == "all")
            cells = [name, category, str(of.sum()), *(f"{recall[s][of].mean():.2f}" for s in systems)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__": main()
