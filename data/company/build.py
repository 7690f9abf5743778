"""Builds the company set from `documents/` and `queries.jsonl`. From the root of the repository: `python data/company/build.py`.

Each hand-written query names a document and a phrase in it. The chunk that holds the phrase is the positive. A hard
negative is the chunk that the embedded model ranks highest among those that do not hold the phrase, if it scores below the
positive (above it, it may well be an answer too) and at least at 95 % of it. No random choice is made anywhere.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np

from bgem3_nb.documents import chunk_documents, read_documents
from bgem3_nb.text import text_key
from bgem3_nb.encoding import M3Encoder

HERE = Path(__file__).parent
DOMAINS = {"nhan_su": "hr", "cntt": "it", "tai_chinh": "finance"}
FIELDS = ("department", "access_level", "document_type", "tags")
SIZES = {"min_tokens": 200, "max_tokens": 400}


def read_queries(path):
    "The hand-written queries."
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def holders(query, chunks):
    "Which chunks hold the query's phrase; the first is its place, another one repeats it in its overlap."
    key = text_key(query["phrase"])
    found = [i for i, c in enumerate(chunks) if c.document_id == query["document"] and key in text_key(c.text)]
    if not found: raise ValueError(f"queries.jsonl: no chunk of {query['document']} holds the phrase {query['phrase']!r}; correct the phrase")
    return found


def scores(queries, chunks):
    "Dense cosines of the embedded model, (queries, chunks)."
    encoder = M3Encoder.from_pretrained("embedded", new_heads="identity", progress=False)
    q = encoder.encode_queries([query["query"] for query in queries], outputs=("dense",)).dense
    p = encoder.encode_passages([c.text for c in chunks], outputs=("dense",)).dense
    return q @ p.T


def hard_negative(row, held):
    "The best chunk of another content that scores 95 to 100 % of the positive, or None."
    order = [int(i) for i in np.argsort(-row, kind="stable") if i not in held]
    return next((i for i in order if .95*row[held[0]] <= row[i] < row[held[0]]), None)


def build(folder=HERE):
    "The four files as Python values."
    documents = read_documents(folder / "documents", progress=False).documents
    chunks = chunk_documents(documents, tokenizer(), progress=False, **SIZES)
    queries = read_queries(folder / "queries.jsonl")
    table, pairs, negatives, evaluation = scores(queries, chunks), [], [], []
    for query, row in zip(queries, table):
        held = holders(query, chunks)
        positive = chunks[held[0]]
        base = {"query": query["query"], "positive": positive.text}
        if query["split"] == "eval": evaluation.append({**base, "chunk_id": positive.id}); continue
        pairs.append({**base, "query_type": query["query_type"], "domain": DOMAINS[query["document"].split("/")[0]]})
        if (n := hard_negative(row, held)) is not None:
            negatives.append({**base, "hard_negative": chunks[n].text, "negative_score": round(float(row[n]), 3)})
    return {"document_metadata.json": {"documents": [describe(d, chunks) for d in documents]}, "positive_pairs.jsonl": pairs,
            "hard_negatives.jsonl": negatives, "eval_pairs.jsonl": evaluation}


def tokenizer():
    "The embedded model's own."
    from transformers import AutoTokenizer
    from bgem3_nb.backbone import embedded_path
    return AutoTokenizer.from_pretrained(embedded_path(progress=False))


def describe(document, chunks):
    "A document's entry with its chunks."
    own = [{"chunk_id": c.id, "text": c.text, "headings": c.headings, "start": c.start, "end": c.end, "tokens": c.tokens} for c in chunks if c.document_id == document.id]
    return {"document_id": document.id, "title": document.title, **{name: document.metadata[name] for name in FIELDS}, "chunks": own}


def write(files, folder):
    "Writes the files, each whole or not at all."
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n" if name.endswith(".json") else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in value)
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    files = build()
    write(files, args.out)
    chunks = sum(len(d["chunks"]) for d in files["document_metadata.json"]["documents"])
    print(f"{len(files['document_metadata.json']['documents'])} documents, {chunks} chunks; " + ", ".join(f"{len(rows)} in {name}" for name, rows in files.items() if name.endswith("l")))
