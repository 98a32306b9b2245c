import math
import sys

import matplotlib
import pytest

from lightning_sensitivity.ranking import Comparison
from lightning_sensitivity.scores import ModelScores

matplotlib.use("Agg")

ROWS = [
    ModelScores("small", sensitivity=0.01, sensitivity_stderr=0.001, loss_estimate=0.2, loss=0.5),
    ModelScores("large", sensitivity=1.0, sensitivity_stderr=2.0, loss_estimate=2.0, loss=3.0),
    ModelScores(
        "untrained", sensitivity=1e-6, sensitivity_stderr=1e-7, loss_estimate=0.002, loss=2.3, note="untrained"
    ),
    ModelScores("failed", note="failed: why"),
]


def legend(axes: matplotlib.axes.Axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def test_the_loss_against_sensitivity() -> None:
    figure, axes = Comparison(ROWS).plot()
    assert axes.figure is figure
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert sorted(legend(axes)) == ["Equation 9", "large", "small", "untrained"]
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    x, y = line.get_data()
    assert [loss / math.sqrt(s) for s, loss in zip(x, y, strict=True)] == pytest.approx([2, 2])
    hollow = [line.get_markerfacecolor() == "none" for line in axes.get_lines() if line.get_marker() == "o"]
    assert sorted(hollow) == [False, False, True]


def test_sensitivity_alone_where_there_is_no_label() -> None:
    rows = [ModelScores(row.name, row.sensitivity, row.sensitivity_stderr) for row in ROWS]
    _, axes = Comparison(rows).plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["untrained", "small", "large"]
    assert axes.get_xscale() == "log"


def test_many_models_have_no_names() -> None:
    rows = [ModelScores(str(index), sensitivity=1.0 + index, loss=1.0) for index in range(30)]
    _, axes = Comparison(rows).plot()
    assert legend(axes) == []


def test_names_are_taken_as_they_are() -> None:
    rows = [ModelScores(name, sensitivity=1.0, loss=1.0) for name in ("_hidden", r"$\foo$", "a$b$c")]
    figure, axes = Comparison(rows).plot()
    assert len(legend(axes)) == 3
    figure.canvas.draw()


def test_no_line_where_models_do_not_share_it() -> None:
    rows = [ModelScores(str(k), sensitivity=1.0, loss=1.0, loss_estimate=float(k)) for k in (1, 2)]
    assert "Equation 9" not in legend(Comparison(rows).plot()[1])


def test_an_axes_of_the_user() -> None:
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    assert Comparison(ROWS).plot(ax) == (figure, ax)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="A plot needs matplotlib: `pip install matplotlib`"):
        Comparison(ROWS).plot()
