"""What a RiskMonitor remembers of a fit: a row for each validation and loader, in checkpoints, too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sensitivity.callbacks.predicted import Predicted, State
from lightning_sensitivity.compat import PlotType

_KEYS = {"epoch", "step", "dataloader_idx", "reference", "num_labels"}  # of each row

Row = dict[str, Any]
History = list[Row]


def state_of(history: History, predicted: Predicted | None) -> State:
    """Return what a checkpoint holds: the history, and what the reference predicts of the kept samples."""
    return {"history": history, "predicted": None if predicted is None else predicted.state()}


def of_state(state: Any) -> tuple[History, Predicted | None]:
    """Return what a checkpoint holds.

    Raises:
        ValueError: If that is something else.
    """
    rows = state.get("history") if isinstance(state, Mapping) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError("no history")
    saved = state.get("predicted")
    return [dict(row) for row in rows], None if saved is None else Predicted.of_state(saved)


def _is_row(row: object) -> bool:
    """Return whether a value is a row of a history: of numbers, or None, by name."""
    if not isinstance(row, Mapping) or not row.keys() >= _KEYS:
        return False
    return all(isinstance(value, int | float | None) for value in row.values())


def plot_history(history: Sequence[Row], names: Sequence[str], prefix: str) -> PlotType:
    """Plot values by epoch, each name in axes of its own and each loader as a line.

    Raises:
        ValueError: If there is no value.
    """
    from matplotlib import pyplot

    if not any(name in row for row in history for name in names):
        raise ValueError("Expected a fit with values before `plot`, but there is none.")
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        _plot_curves(ax, history, name)
        ax.set(title=prefix + name, xlabel="epoch")
    return figure, axes[0]


def _plot_curves(ax: Any, history: Sequence[Row], name: str) -> None:
    """Draw a value of each loader; a validation may have none."""
    for index in sorted({row["dataloader_idx"] for row in history}):
        rows = [row for row in history if row["dataloader_idx"] == index]
        ax.plot([row["epoch"] for row in rows], [row.get(name, math.nan) for row in rows], label=f"dataloader {index}")
