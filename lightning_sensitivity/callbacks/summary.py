"""The end of a fit: a summary for programs, and the last line for people, which says the same."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_sensitivity.callbacks.checks import BLIND, EXPECTED, callbacks_that_monitor
from lightning_sensitivity.callbacks.run_reference import Verdict
from lightning_sensitivity.compat import PlotType

_SAID = 0.05  # share of labels that is worth a sentence
_ENDED = 0.01  # of the first learning rate
_LEARNERS = {"forest": "random forest", "ridge": "ridge regression on {}"}

Row = dict[str, Any]  # of the history
Summary = dict[str, Any]
Curve = tuple[str, int, bool]  # a value, its loader, and whether the highest is the best


def summarize(
    trainer: Trainer,
    curves: Mapping[str, Curve],
    history: Sequence[Row],
    verdict: Verdict | None,
) -> Summary:
    """Say which epoch is best by the value that is monitored, what chose it, and what is known of the labels.

    Args:
        trainer: The Trainer, at the end of a fit.
        curves: The value, the loader and the direction of each name that can be monitored; if none is, the
            first that tells epochs apart chooses.
        history: A row for each validation and loader.
        verdict: What is known of the reference of this fit; None without one.

    Returns:
        Numbers, names and flags; None where something is unknown, as ``json`` has it.
    """
    watched = [name for _, name in callbacks_that_monitor(trainer) if name in curves]
    for name in watched[:1] or (*curves, next(iter(curves))):  # the first again, if none tells epochs apart
        value, dataloader_idx, is_highest = curves[name]
        rows = [row for row in history if row["dataloader_idx"] == dataloader_idx]
        finite = [row for row in rows if math.isfinite(row.get(value, math.nan))]
        found = _comparable(finite)
        best = _best_row(found, value, is_highest)
        if best:
            break
    summary = {
        "monitored": name,
        "direction": "highest" if is_highest else "lowest",
        "epoch": best.get("epoch"),
        "checkpoint": _checkpoint_of(trainer, name, best.get(value)),
        "chosen_by": _chosen_by(best),
        "is_tied": bool(found) and not best,
        "is_improving": len(found) > 1 and best is rows[-1] and not _has_ended(trainer),
        "network": best.get(value),
        "reference": best.get(f"reference_{value}"),
        "num_labels": best.get("num_labels", 0),
        "num_validations": len(rows),
        "num_gaps": len(rows) - len(finite),
    }
    expected = {name: number for name, number in best.items() if EXPECTED in name}
    return summary | expected | _of_reference(verdict)


def _comparable(rows: list[Row]) -> list[Row]:
    """Return the rows by the same reference as the last one; before a resume, it may have been another."""
    return [row for row in rows if _is_same(row["reference"], rows[-1]["reference"])]


def _best_row(rows: list[Row], value: str, is_highest: bool) -> Row:
    """Return the row of the best value; an empty one if there is none, or several are all equal."""
    if not rows or (len(rows) > 1 and len({row[value] for row in rows}) == 1):
        return {}
    best: Row = (max if is_highest else min)(rows, key=lambda row: row[value])
    return best


def _is_same(first: float | None, second: float | None) -> bool:
    """Return whether two left-out scores are those of one reference."""
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-6)


def _of_reference(verdict: Verdict | None) -> Summary:
    """Return what is known of the reference, with None for nan."""
    if verdict is None:
        return {"learner": None, "is_trusted": False}
    known = dataclasses.asdict(verdict)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in known.items()}


def _chosen_by(best: Row) -> str:
    """Say what a row was judged by."""
    if not best:
        return "nothing"
    names = ["reference"] * (best["reference"] is not None) + ["labels"] * (best["num_labels"] > 0)
    return " and ".join(names)


def _checkpoint_of(trainer: Trainer, name: str, value: float | None) -> str:
    """Name the checkpoint that was saved for a value, if there is one."""
    for callback, monitor in callbacks_that_monitor(trainer):
        score = getattr(callback, "best_model_score", None)
        if monitor != name or score is None or value is None:
            continue
        if math.isclose(score, value, rel_tol=1e-5, abs_tol=1e-9):
            return str(getattr(callback, "best_model_path", ""))
    return ""


def closing_line(summary: Summary) -> str:
    """Say what a summary says, in sentences."""
    if summary["is_tied"]:
        said = [f"All values of `{summary['monitored']}` are equal, so that no epoch was chosen."]
    elif summary["epoch"] is None:
        said = [_why_nothing(summary)]
    else:
        said = [_best(summary), _what_chose(summary), _rival(summary)]
        if summary["num_gaps"]:
            said.append(f"There is no value for {summary['num_gaps']} of {summary['num_validations']} validations.")
    said.append(_unexplained(summary))
    if summary["is_improving"]:
        said.append("It was still improving: train for longer.")
    return " ".join(filter(None, said))


def _best(summary: Summary) -> str:
    """Say which epoch and file."""
    file = f", in the checkpoint {summary['checkpoint']}" if summary["checkpoint"] else ""
    return f"`{summary['monitored']}` was {summary['direction']} at epoch {summary['epoch']}{file}."


def _what_chose(summary: Summary) -> str:
    """Say what chose."""
    labels = f"{summary['num_labels']} validation labels"
    if summary["chosen_by"] == "labels":
        return f"{labels} chose."
    if summary["learner"] is None:
        return "The reference of an earlier part of this fit chose."
    learner = str(summary["learner"])
    name = _LEARNERS.get(learner, learner).format(summary["features"])
    both = f"{labels} and the" if summary["num_labels"] else "The"
    return f"{both} reference ({name}, {summary['num_training']:,} training labels) chose."


def _why_nothing(summary: Summary) -> str:
    """Say why nothing was expected."""
    if summary["is_trusted"]:
        return f"`{summary['monitored']}` has no value to choose by: no validation after the reference gave one."
    reason = "is missing"
    if summary["learner"]:
        better = f"{max(0.0, summary['skill']):.0%} better than chance"
        reason = f"sees too little of the inputs (on labels that it has not seen, it is {better})"
    if summary.get("majority") == 1:
        reason = "has seen labels of only one class"
    return f"`{summary['monitored']}` has no value to choose by: the reference {reason}{BLIND}"


def _rival(summary: Summary) -> str:
    """Compare what is expected of the network and of the reference, on the same samples."""
    network, reference = summary["network"], summary["reference"]
    if reference is None:
        return ""
    is_better = reference >= network if summary["direction"] == "highest" else reference <= network
    advice = ": consider it, or the mean of both" if is_better else ""
    return f"There the network is expected to reach {network:.3g}, the reference by itself {reference:.3g}{advice}."


def _unexplained(summary: Summary) -> str:
    """Say how many labels can't be explained, if that is worth a sentence."""
    if (summary.get("unexplained") or 0.0) < _SAID:
        return ""
    return (
        f"About {summary['unexplained']:.0%} of the training labels can't be explained: they are wrong, or not to be "
        "known from the inputs."
    )


def _has_ended(trainer: Trainer) -> bool:
    """Return whether a callback has stopped the run, or a schedule has ended, so that more epochs are of no use."""
    has_stopped = any(getattr(owner, "stopped_epoch", 0) for owner, _ in callbacks_that_monitor(trainer))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return has_stopped or any(group["lr"] <= _ENDED * group.get("initial_lr", 0.0) for group in groups)


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
