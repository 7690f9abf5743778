"""Measure the house rules of the notebooks: how much of the package's code a reader sees, how wide and how long cells are.

    python tools/house.py            a line for each chapter and one for all
    python tools/house.py --long     also every exported cell of more than 40 lines, and every wide visible line

shown    share of the lines of exported functions and classes that stand on the page (`#| exports`)
tests    share of the test calls that stand on the page
wide     share of visible lines of code over 100 columns
;        statements joined by `;` per 100 visible lines, cells with figures apart
longest  lines of the longest exported cell
words    words of prose per code cell
"""
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / "nbs"
WIDTH, LENGTH = 100, 40


@dataclass
class Figures:
    "What is counted of one chapter, or of all."
    shown: int = 0       # lines of exported functions and classes on the page
    exported: int = 0    # lines of exported functions and classes
    tests: int = 0       # test calls on the page
    all_tests: int = 0   # test calls
    lines: int = 0       # visible lines of code
    wide: int = 0        # of them, over `WIDTH` columns
    joined: int = 0      # statements joined by `;` in them
    longest: int = 0     # lines of the longest exported cell
    words: int = 0       # words of prose
    cells: int = 0       # code cells
    places: list[str] = field(default_factory=list)

    def add(self, other):
        for name, value in vars(other).items():
            old = getattr(self, name)
            setattr(self, name, max(old, value) if name == "longest" else old + value)

    def row(self, name):
        share = lambda part, whole: f"{part / whole:.0%}" if whole else "-"
        joined = f"{100 * self.joined / self.lines:.1f}" if self.lines else "-"
        words = f"{self.words / self.cells:.0f}" if self.cells else "-"
        return [name, share(self.shown, self.exported), share(self.tests, self.all_tests),
                share(self.wide, self.lines), joined, str(self.longest), words]


def directives(source): return re.findall(r"^\s*#\|\s*(.+?)\s*$", source, re.M)


def code_lines(source):
    "The lines of a cell that are neither blank nor directives."
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]


def definitions(source):
    "How many lines of a cell belong to functions and classes."
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return sum(n.end_lineno - n.lineno + 1 + len(n.decorator_list) for n in tree.body if isinstance(n, kinds))


def test_calls(source):
    "How many claims a cell tests: asserts, and calls of `test_…`."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Assert, ast.Call))]
    name = lambda n: getattr(n.func, "id", getattr(n.func, "attr", ""))
    return sum(isinstance(n, ast.Assert) or bool(re.match(r"test_|ExceptionExpected|expect", name(n))) for n in calls)


def semicolons(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(t.type == tokenize.OP and t.string == ";" for t in tokens)


def figures(path):
    "The figures of one notebook."
    out = Figures()
    for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": out.words += len(source.split())
        if cell["cell_type"] != "code" or re.search(r"^\s*[!%]", source, re.M): continue
        marks = directives(source)
        first = {m.split()[0].rstrip(":") for m in marks}
        exported = first & {"export", "exports", "exporti"}
        visible = not (first & {"hide", "export", "exporti", "default_exp"} or "echo: false" in marks)
        lines = code_lines(source)
        out.cells += 1
        if exported:
            own = definitions(source)
            out.exported += own
            out.shown += own * visible
            out.longest = max(out.longest, len(lines) if own else 0)
            if own and len(lines) > LENGTH:
                out.places.append(f"{path.name} [{cell.get('id', n)}]: {len(lines)} lines")
        calls = test_calls(source)
        out.all_tests += calls
        out.tests += calls * visible
        if not visible: continue
        out.lines += len(lines)
        wide = [line for line in lines if len(line) > WIDTH]
        out.wide += len(wide)
        out.places += [f"{path.name} [{cell.get('id', n)}]: {len(w)} columns: {w.strip()[:60]}" for w in wide]
        if "plt" not in source: out.joined += semicolons(source)
    return out


def main():
    names = ["chapter", "shown", "tests", "wide", ";", "longest", "words"]
    each = {p.name: figures(p) for p in sorted(nbs.glob("*.ipynb"))}
    every = Figures()
    for f in each.values(): every.add(f)
    for row in [names, *(f.row(name) for name, f in each.items()), every.row("all")]:
        print(f"{row[0]:24}" + "".join(f"{c:>9}" for c in row[1:]))
    if "--long" in sys.argv: print(*every.places, sep="\n")


if __name__ == "__main__": main()
