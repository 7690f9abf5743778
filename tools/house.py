"""Measure the house rules of the notebooks: how much of the package's code a reader sees, how wide and how long
cells are.

    python tools/house.py            a line for each chapter and one for all
    python tools/house.py --check    only what breaks a rule, each with its place; exit 1 if there is any

shown    share of the lines of exported functions and classes that stand on the page (`#| exports`): at least 95 %
tests    share of the test calls that stand on the page, open or folded: at least half of all
wide     share of visible lines of code over 100 columns: none; other lines of code have at most 120
;        statements joined by `;` per 100 visible lines, cells with figures apart: none
longest  lines of the longest exported cell: at most 40
words    words of prose per code cell
verbs    share of the docstrings of exported functions and classes that begin with a verb: at least 90 % of all
"""
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root / "nbs"
WIDTH, OTHER_WIDTH, LENGTH, SHOWN, TESTS, VERBS = 100, 120, 40, .95, .5, .9
SCRIPTS = ("tests", "tools", "benchmarks")
FIRST_WORDS = set("""
add answer append apply ask assign average begin bound bring build calibrate call check choose clean close collect
color combine compare compile complete compute concatenate continue convert copy correct count cover create cut decide
declare decode delete describe display divide do draw drop embed encode end enter escape estimate evaluate execute
explain export extend fetch fill find finish fit flush fold follow format free freeze gather get give go group guess
handle hash have hold identify import index join judge keep label lay leave lend let limit list load lock log look
make map mark measure merge mine mix move multiply name normalize note number offer open order pack pad pair parse
pass pick plot pool prepare print project propose pull put query queue raise rank read reckon recognize recommend
record reduce refer refuse release remove rename reorder replace report require reserve resolve restore return reverse
rotate round run sample save say score search select send separate serve set settle share shorten show signal silence
sort split spread stand start state stop store stream subtract suggest sum summarize suspend swap tabulate take teach
tell tokenize train translate truncate try turn typeset upload use wait walk warn watch weigh work wrap write yield
""".split())   # verbs with which docstrings begin; add others that are verbs


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
    docstrings: int = 0  # docstrings of exported functions and classes
    verbs: int = 0       # of them, those that begin with a verb
    broken: list[str] = field(default_factory=list)   # rules, each with its place

    def add(self, other):
        for name, value in vars(other).items():
            old = getattr(self, name)
            setattr(self, name, max(old, value) if name == "longest" else old + value)

    def row(self, name):
        share = lambda part, whole: f"{part / whole:.0%}" if whole else "-"
        joined = f"{100 * self.joined / self.lines:.1f}" if self.lines else "-"
        words = f"{self.words / self.cells:.0f}" if self.cells else "-"
        return [name, share(self.shown, self.exported), share(self.tests, self.all_tests),
                share(self.wide, self.lines), joined, str(self.longest), words, share(self.verbs, self.docstrings)]


def directives(source): return re.findall(r"^\s*#\|\s*(.+?)\s*$", source, re.M)


def code_lines(source):
    "The lines of a cell that are neither blank nor directives."
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]


def definitions(source):
    "How many lines of a cell belong to functions and classes."
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return sum(n.end_lineno - n.lineno + 1 + len(n.decorator_list) for n in tree.body if isinstance(n, kinds))


def docstrings(source):
    "The docstrings of the functions and classes of a cell, those of methods too."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = (ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, kinds))
    return [text for text in found if text]


def begins_with_a_verb(docstring): return docstring.split()[0].strip("`,.:;").lower() in FIRST_WORDS


def test_calls(source):
    "How many claims a cell tests: asserts, and calls of `test_…`."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Assert, ast.Call))]
    name = lambda n: getattr(n.func, "id", getattr(n.func, "attr", ""))
    return sum(isinstance(n, ast.Assert) or bool(re.match(r"test_|ExceptionExpected|expect", name(n))) for n in calls)


def semicolons(source):
    "How many statements are joined; a `;` at the end of a line only keeps its value from being shown."
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER)
    return sum(t.string == ";" and t.type == tokenize.OP and after.type not in ends
               for t, after in zip(tokens, tokens[1:]))


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
        lines, place = code_lines(source), f"{path.name} [{cell.get('id', n)}]"
        out.cells += 1
        if exported:
            own = definitions(source)
            out.exported += own
            out.shown += own * visible
            out.longest = max(out.longest, len(lines) if own else 0)
            texts = docstrings(source)
            out.docstrings += len(texts)
            out.verbs += sum(map(begins_with_a_verb, texts))
            if own and len(lines) > LENGTH: out.broken.append(f"{place}: {len(lines)} lines in one exported cell")
        calls, joined = test_calls(source), 0 if "plt" in source else semicolons(source)
        out.all_tests += calls
        out.tests += calls * visible
        wide = [line for line in lines if len(line) > (WIDTH if visible else OTHER_WIDTH)]
        out.broken += [f"{place}: {len(line)} columns: {line.strip()[:60]}" for line in wide]
        if joined: out.broken.append(f"{place}: {joined} statements joined by `;`")
        if not visible: continue
        out.lines += len(lines)
        out.wide += len(wide)
        out.joined += joined
    if out.exported and out.shown < SHOWN * out.exported:
        out.broken.append(f"{path.name}: {out.shown / out.exported:.0%} of its package code is on the page")
    return out


def wide_scripts():
    "Lines of tests and tools that are too wide, each with its place."
    return [f"{path.relative_to(root)}, line {i}: {len(line)} columns" for folder in SCRIPTS
            for path in sorted((root / folder).rglob("*.py"))
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > OTHER_WIDTH]


def main():
    names = ["chapter", "shown", "tests", "wide", ";", "longest", "words", "verbs"]
    each = {p.name: figures(p) for p in sorted(nbs.glob("*.ipynb"))}
    every = Figures()
    for f in each.values(): every.add(f)
    if "--check" in sys.argv:
        broken = every.broken + wide_scripts()
        if every.tests < TESTS * every.all_tests:
            broken.append(f"{every.tests / every.all_tests:.0%} of the test calls are on the pages")
        if every.verbs < VERBS * every.docstrings:
            broken.append(f"{every.verbs / every.docstrings:.0%} of the docstrings begin with a verb of `FIRST_WORDS`")
        if broken: sys.exit("\n".join(broken))
        return print("the notebooks keep the rules of the house")
    for row in [names, *(f.row(name) for name, f in each.items()), every.row("all")]:
        print(f"{row[0]:24}" + "".join(f"{c:>9}" for c in row[1:]))


if __name__ == "__main__": main()
