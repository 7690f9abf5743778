"""What became of a folder of documents that may not be shown: counts of its files, chunks and written queries, for the
page 74_own_data. Only numbers are kept.

    bgem3-job prepare -p data '' -p documents FOLDER -p write_queries rules -p round_trip 10 -p test 0.2 --out RUN
    python benchmarks/foreign_documents.py FOLDER RUN data/foreign_documents.json
"""
import json
import sys
from collections import Counter
from pathlib import Path

from bgem3_nb.chain_results import ChainResults
from bgem3_nb.documents import read_documents


def reason(said):
    "Why a file was not read, without its own particulars."
    return said.split(":")[0].split(";")[0]


def main(folder, run, to):
    reading, run = read_documents(folder, progress=False), Path(run)
    every = Counter(p.suffix.lower() for p in Path(folder).rglob("*") if p.is_file())
    read = Counter(Path(d.id).suffix.lower() for d in reading.documents)
    skipped = {end: Counter() for end in every}
    for name, said in reading.skipped.items(): skipped[Path(name).suffix.lower()][reason(said)] += 1
    files = [{"ending": end, "files": n, "read": read[end], "passed over": n - read[end] - skipped[end].total(),
              "not read": ", ".join(f"{n} {why}" for why, n in skipped[end].items())} for end, n in every.most_common()]
    r, step = ChainResults(run.parent, {}), run.name
    chunks = (run / "chunks.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = r.read(step, "prepare_stats.json")["before"]["counts"]
    found = {"files": files, "chunks": len(chunks), "rows": r.kept_rows(step).reset_index().to_dict("records"),
             "findings": r.findings(step).reset_index().to_dict("records"), "query_type": kinds.get("query_type", {}),
             "language": kinds.get("language", {})}
    Path(to).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
