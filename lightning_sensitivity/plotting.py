"""Figures; matplotlib is imported inside the functions, since only they need it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_sensitivity.scores import ModelScores

_MAX_NAMES = 20  # as many colours can be told apart


def plot_comparison(comparison: Iterable[ModelScores], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw a comparison.

    Where labels gave a loss, it is drawn against sensitivity, in log-log, with the line that Equation 9 predicts;
    a hollow marker is a model with a note, such as that it is untrained. Without labels, the models are drawn one under
    the other along their sensitivity. Error bars are of 95 %.

    Args:
        comparison: The models, from the least to the most sensitive one.
        ax: Where to draw; by default a new figure.

    Returns:
        Figure and axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A plot needs matplotlib: `pip install matplotlib`.") from error

    models = [model for model in comparison if model.sensitivity > 0]  # a logarithm can show no other
    with_loss = [model for model in models if model.loss > 0]
    if ax is None:
        height = 4.5 if with_loss else max(2.5, 0.25 * len(models))
        _, ax = plt.subplots(figsize=(8, height), layout="constrained")
    if with_loss:
        _loss_against_sensitivity(with_loss, ax)
    else:
        names = [_literal(model.name) for model in models]
        ax.errorbar([model.sensitivity for model in models], names, xerr=_error_bars(models), fmt="o", capsize=3)
        ax.invert_yaxis()  # the first of the table on top
        ax.grid(axis="y", alpha=0.3)
    ax.set_xscale("log")
    ax.set_xlabel("sensitivity S (squared units of the outputs)")
    figure = ax.get_figure()
    assert figure is not None
    return figure, ax  # type: ignore[return-value]


def _loss_against_sensitivity(models: list[ModelScores], ax: Axes) -> None:
    from matplotlib import colormaps

    has_names = len(models) <= _MAX_NAMES
    entries: dict[str, Any] = {}
    for index, model in enumerate(models):
        color = colormaps["tab20"](index / _MAX_NAMES) if has_names else "C0"
        entries[_literal(model.name)] = ax.errorbar(
            model.sensitivity,
            model.loss,
            xerr=_error_bars([model]),
            fmt="o",
            color=color,
            markerfacecolor="none" if model.note else color,
            capsize=3,
        )
    entries = entries if has_names else {}
    slopes = [model.loss_estimate / math.sqrt(model.sensitivity) for model in models]
    if max(slopes) <= 1.01 * min(slopes):  # the same inputs, noise and number of classes, and none is nan
        ends = [models[0].sensitivity / 2, models[-1].sensitivity * 2]
        (entries["Equation 9"],) = ax.plot(ends, [slopes[0] * math.sqrt(end) for end in ends], "--", color="gray")
    ax.set_yscale("log")
    ax.set_ylabel("loss")
    if entries:
        # Given, and not found by matplotlib, which leaves out names that begin with an underscore.
        ax.legend(entries.values(), entries.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _literal(name: str) -> str:
    """A name that matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def _error_bars(models: list[ModelScores]) -> list[list[float]]:
    """Of 95 %; the lower one ends above 0, which a logarithm can't show."""
    bars = [1.96 * model.sensitivity_stderr if math.isfinite(model.sensitivity_stderr) else 0.0 for model in models]
    return [[min(bar, 0.99 * model.sensitivity) for bar, model in zip(bars, models, strict=True)], bars]
