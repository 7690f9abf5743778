"""Draw nbs/images/social.png, the picture that is shown where somebody links to the site: the name, one sentence, and
the search quality before and after `make run`, by the figure of the first page.

    python tools/social.py
"""
import json
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bgem3_nb.figures import BLUE, INK, PALE

root = Path(__file__).resolve().parent.parent


def results():
    "nDCG@10 before and after, of each mode, as the page of the job train shows it."
    cells = json.loads((root / "nbs" / "52_train.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "".join("".join(o["data"].get("text/html", "")) for c in cells for o in c.get("outputs", [])
                    if o.get("metadata", {}).get("bgem3_nb") == "summary")
    found = re.findall(r"(?<![+\w])(dense|lexical|multi|all): nDCG@10 ([\d.]+) → ([\d.]+)", shown)
    return {mode: (float(a), float(b)) for mode, a, b in dict.fromkeys(found)}


def main():
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    fig = Figure(figsize=(12, 6.3), facecolor="white")
    fig.text(.06, .8, "bgem3_nb", fontsize=54, weight="bold", color=INK)
    fig.text(.06, .66, "BGE-M3 as a book you can run", fontsize=30, color=BLUE)
    fig.text(.06, .5, "dense, lexical and multi-vector retrieval:\nexplained, trained, evaluated", fontsize=19,
             color=INK, linespacing=1.5)
    ax = fig.add_axes((.18, .1, .76, .3))
    for i, (mode, values) in enumerate(results().items()):
        for side, (value, color) in enumerate(zip(values, (PALE, BLUE))):
            ax.barh(-i + .2 - .4 * side, value, .38, color=color)
            ax.text(value + .01, -i + .2 - .4 * side, f"{value:.2f}", va="center", fontsize=13, color=INK)
    names = {"multi": "multi-vector", "all": "all three"}
    ax.set_yticks([-i for i in range(len(results()))], [names.get(m, m) for m in results()], fontsize=14, color=INK)
    ax.set(xlim=(0, 1), xticks=[])
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    ax.tick_params(length=0)
    fig.text(.06, .04, "nDCG@10 on Vietnamese law before and after minutes of training on two CPU cores", fontsize=12,
             color=INK)
    fig.savefig(root / "nbs" / "images" / "social.png", dpi=100)


if __name__ == "__main__": main()
