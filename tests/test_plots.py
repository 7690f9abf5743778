"""Names that come from data stand in figures as they are: `$` begins no formula there."""
from io import BytesIO

import pytest

NAMES = ["$x", "a$b$c", r"$\frac$", "5$ to 10$_"]


def drawn(figure):
    "The texts of a figure, after it has been drawn."
    figure.savefig(BytesIO(), format="png")
    return [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]


def test_labels_of_rows():
    from bgem3_nb.balance import analyse, balance
    from bgem3_nb.rows import make_rows
    rows = make_rows([{"query": f"q{i}", "pos": ["p"], "domain": NAMES[i % 4]} for i in range(40)])
    assert set(NAMES) <= set(drawn(analyse(rows).plot()))
    _, report = balance(rows, {"domain": {"$x": 0.4}})
    assert set(NAMES) <= set(drawn(report.plot()))


def test_names_of_evaluations():
    import numpy as np
    from bgem3_nb.evaluation import Evaluation, plot_intervals
    before = {name: Evaluation({"nDCG@10": np.array([0.1, 0.5, 0.9])}) for name in NAMES}
    assert drawn(plot_intervals(before, before).figure) == NAMES


def test_matplotlib_would_take_it_for_a_formula():
    "What the functions above keep away; if this fails, they need nothing of the kind any more."
    from matplotlib.figure import Figure
    figure = Figure()
    figure.subplots().set_yticks([0], [r"$\frac$"])
    with pytest.raises(ValueError): figure.savefig(BytesIO(), format="png")
