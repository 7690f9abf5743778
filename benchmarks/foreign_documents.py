"""What became of a folder of documents that may not be shown: counts of its files, rows and questions, for the page
74_own_data. The chain has been run before, and only numbers are kept.

    bgem3-job run FOLDER --out RUN
    python benchmarks/foreign_documents.py FOLDER RUN data/foreign_documents.json
"""
import json
import sys
from collections import Counter
from pathlib import Path

from bgem3_nb.chain_results import chain_results
from bgem3_nb.documents import read_documents


def reason(said):
    "Why a file was not read, without its own particulars."
    return said.split(":")[0].split(";")[0]


def main(folder, run, to):
    reading, r = read_documents(folder, progress=False), chain_results(run)
    every = Counter(Path(p).suffix.lower() for p in Path(folder).rglob("*") if p.is_file())
    read = Counter(Path(d.id).suffix.lower() for d in reading.documents)
    skipped = {end: Counter() for end in every}
    for name, said in reading.skipped.items(): skipped[Path(name).suffix.lower()][reason(said)] += 1
    files = [{"ending": end, "files": n, "read": read[end],
              "not read": ", ".join(f"{n} {why}" for why, n in skipped[end].items()),
              "passed over": n - read[end] - skipped[end].total()} for end, n in every.most_common()]
    chunks = (Path(run) / "prepare" / "chunks.jsonl").read_text(encoding="utf-8").splitlines()
    taken = r.read("mine", "stats.json")["taken"]
    found = {"files": files, "chunks": len(chunks), "rows": r.kept_rows().reset_index().to_dict("records"),
             "findings": r.findings().reset_index(drop=True).to_dict("records"),
             "negatives": {k: taken[k] for k in ("chosen", "wanted", "queries with none")},
             "gains": r.gains(r.set_names()[0]).reset_index(names="").astype(str).to_dict("records"),
             "questions": int(len(r.changes(r.set_names()[0]))), "costs": r.costs().astype(str).to_dict()["seconds"],
             "verdict": r.verdict()[:1]}
    Path(to).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
