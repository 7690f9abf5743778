"""What becomes of a folder of documents that may not be shown: counts of its files, chunks and written queries, for the
page 74_own_data. Only numbers are kept.

    python benchmarks/foreign_documents.py FOLDER data/foreign_documents.json
"""
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from bgem3_nb.backbone import embedded_path
from bgem3_nb.balance import identify_languages
from bgem3_nb.checks import check_rows
from bgem3_nb.documents import chunk_documents, read_documents
from bgem3_nb.queries import rule_queries


def reason(said):
    "Why a file was not read, without its own particulars."
    return said.split(":")[0].split(";")[0]


def count_files(folder, reading):
    "How many files of each ending were read, passed over, or not read, and why."
    every = Counter(p.suffix.lower() for p in Path(folder).rglob("*") if p.is_file())
    read = Counter(Path(d.id).suffix.lower() for d in reading.documents)
    skipped = {end: Counter() for end in every}
    for name, said in reading.skipped.items(): skipped[Path(name).suffix.lower()][reason(said)] += 1
    return [{"ending": end, "files": n, "read": read[end], "passed over": n - read[end] - skipped[end].total(),
             "not read": ", ".join(f"{k} {why}" for why, k in skipped[end].items())} for end, n in every.most_common()]


def main(folder, to):
    reading = read_documents(folder, progress=False)
    chunks = chunk_documents(reading.documents, AutoTokenizer.from_pretrained(embedded_path()), progress=False)
    codes = identify_languages([c.text for c in chunks])[0].tolist()
    known = [replace(c, metadata=c.metadata | {"language": code}) for c, code in zip(chunks, codes) if code]
    written = rule_queries(known, per_type=2, progress=False)
    findings = check_rows({"train": written.rows}, progress=False)
    found = {"files": count_files(folder, reading), "chunks": len(chunks), "languages": Counter(codes).most_common(),
             "queries": len(written.rows), "query_type": Counter(written.rows["query_type"]),
             "chunks without a query": len(known) - len({p for ids in written.rows["pos_ids"] for p in ids}),
             "findings": dict(findings.counts)}
    Path(to).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, ensure_ascii=False, indent=1))


if __name__ == "__main__": main(*sys.argv[1:])
