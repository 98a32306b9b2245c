"""The end of a fit: a summary for machines, and the last line for people, which says the same."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_sensitivity.callbacks.checks import callbacks_that_monitor
from lightning_sensitivity.callbacks.record import RiskRecord, Verdict
from lightning_sensitivity.functional.refined_score import TEMPERATURES

_SAID = 0.05  # share of labels that is worth a sentence
_ENDED = 0.01  # of the first learning rate
_LEARNERS = {"forest": "random forest", "ridge": "ridge regression on {}", "mean": "mean label"}

Row = dict[str, Any]  # of the history
Curve = tuple[str, int, bool]  # a value, its loader, and whether the highest is the best


def summarize(trainer: Trainer, curves: Mapping[str, Curve], record: RiskRecord) -> dict[str, Any]:
    """Say which epoch is best by the value that is monitored, what chose it, and what is known of the labels.

    Args:
        trainer: The Trainer, at the end of a fit.
        curves: The value, the loader and the direction of each name that can be monitored; the first is the default.
        record: What is known of the fit.
    """
    monitored = [name for _, name in callbacks_that_monitor(trainer) if name in curves]
    name = (monitored or list(curves))[0]
    value, dataloader_idx, is_highest = curves[name]
    verdict = record.verdict or Verdict()
    found, earlier = _rows_of(record, dataloader_idx, value)
    sign = 1 if is_highest else -1
    best = max(found, key=lambda each: sign * each[value]) if found else {}
    return {
        "monitored": name,
        "direction": "highest" if is_highest else "lowest",
        "epoch": best.get("epoch"),
        "checkpoint": _checkpoint_of(trainer, name, best.get(value), best.get("step") in record.saved_steps),
        "chosen_by": _chosen_by(verdict, best),
        "temperature": best.get("temperature", math.nan),
        "num_labels": best.get("num_labels", 0),
        "is_improving": len(found) > 1 and best is found[-1] and not record.ends_in_gap,
        "num_training": verdict.num_samples,
        "learner": verdict.learner,
        "features": verdict.features,
        "is_trusted": verdict.is_trusted,
        "skill": verdict.skill,
        "left_out_accuracy": verdict.accuracy,
        "left_out_auroc": verdict.auroc,
        "left_out_r2": verdict.skill if math.isnan(verdict.accuracy) else math.nan,
        "majority": verdict.majority,
        "unexplained": verdict.unexplained,
        "num_validations": record.num_validations,
        "num_gaps": record.num_gaps,
        "num_earlier": sum(sign * each[value] > sign * best[value] for each in earlier) if found else 0,
    }


def _rows_of(record: RiskRecord, dataloader_idx: int, value: str) -> tuple[list[Row], list[Row]]:
    """Return the rows that have a value, by the last reference, and by earlier ones, which judge otherwise."""
    rows = [each for each in record.history if each["dataloader_idx"] == dataloader_idx]
    rows = [each for each in rows if math.isfinite(each.get(value, math.nan))]  # a resumed fit may have new metrics
    found = [each for each in rows if each["reference"] == record.num_references]
    return found, [each for each in rows if each["reference"] != record.num_references]


def _chosen_by(verdict: Verdict, best: Mapping[str, Any]) -> str:
    if not best:
        return "nothing"
    names = ["reference"] * verdict.is_trusted + ["labels"] * (best["num_labels"] > 0)
    return " and ".join(names)


def _checkpoint_of(trainer: Trainer, name: str, value: float | None, is_saved: bool) -> str:
    """Name the checkpoint of the best value, if one was saved at its step."""
    for callback, monitor in callbacks_that_monitor(trainer):
        path, score = getattr(callback, "best_model_path", ""), getattr(callback, "best_model_score", None)
        if monitor != name or not is_saved or not path or value is None or score is None:
            continue
        if math.isclose(float(score), value, rel_tol=1e-5, abs_tol=1e-9):
            return str(path)
    return ""


def closing_line(trainer: Trainer, summary: Mapping[str, Any]) -> str:
    """Say what a summary says, in sentences."""
    sentences = [_best(summary), _what_chose(summary), _unexplained(summary), _gaps(summary), _earlier(summary)]
    if summary["is_improving"] and not _has_ended(trainer):
        sentences.append("It was still improving: train for longer.")
    return " ".join(filter(None, sentences))


def _best(summary: Mapping[str, Any]) -> str:
    """Say which epoch and file, and how its probabilities become calibrated."""
    if summary["epoch"] is None:
        return f"`{summary['monitored']}` has no value to choose by."
    file = f", in the checkpoint {summary['checkpoint']}" if summary["checkpoint"] else ""
    said = f"`{summary['monitored']}` was {summary['direction']} at epoch {summary['epoch']}{file}"
    is_score = summary["monitored"].partition("/dataloader_idx_")[0].endswith("score")
    is_known = TEMPERATURES[0] < summary["temperature"] < TEMPERATURES[-1]  # not at an end of the grid
    if is_score and is_known and summary["temperature"] != 1:
        return f"{said}: divide its logits by {summary['temperature']:.1f} to calibrate it."
    return f"{said}."


def _what_chose(summary: Mapping[str, Any]) -> str:
    """Say what chose, and how good the reference is."""
    labels = f"{summary['num_labels']} validation labels"
    if summary["chosen_by"] == "labels":
        return f"{labels} chose."
    if summary["is_trusted"] and summary["epoch"] is None:
        return "No validation since the reference was fitted gave one."
    if summary["chosen_by"] == "nothing":
        reason = f"sees too little of the inputs ({_skill(summary)})" if summary["learner"] else "is missing"
        reason = "has seen labels of one class alone" if summary["majority"] == 1 else reason
        return (
            f"The reference {reason}, so nothing says when to stop. Callbacks that monitor it took the last epoch: "
            "label some validation samples (`validation_labels=True`), or set `features=`."
        )
    name = _LEARNERS.get(summary["learner"], summary["learner"]).format(summary["features"])
    both = f"{labels} and the" if summary["num_labels"] else "The"
    return f"{both} reference ({name}, {summary['num_training']:,} training labels) chose: {_skill(summary)}."


def _skill(summary: Mapping[str, Any]) -> str:
    """Say how well the reference predicts labels that it has not seen, beside always the most frequent class."""
    if math.isnan(summary["left_out_accuracy"]):
        return f"its R² on left-out labels is {max(0.0, summary['skill']):.2f}"
    auroc = "" if math.isnan(summary["left_out_auroc"]) else f"; AUROC {summary['left_out_auroc']:.2f}"
    return (
        f"without having seen them, it predicts {summary['left_out_accuracy']:.0%} of these labels (always the most "
        f"frequent class: {summary['majority']:.0%}{auroc})"
    )


def _unexplained(summary: Mapping[str, Any]) -> str:
    """Say how many labels can't be explained, if that is worth a sentence."""
    if not summary["unexplained"] >= _SAID:
        return ""
    return (
        f"About {summary['unexplained']:.0%} of the training labels can't be explained: they are wrong, or not to be "
        "known from the inputs."
    )


def _gaps(summary: Mapping[str, Any]) -> str:
    """Say how many validations have no value."""
    if not summary["num_gaps"] or summary["epoch"] is None:
        return ""
    return f"{summary['num_gaps']} of {summary['num_validations']} validations have no value."


def _earlier(summary: Mapping[str, Any]) -> str:
    """Say if callbacks may have chosen by a reference that was replaced in the first epoch."""
    if not summary["num_earlier"]:
        return ""
    return (
        f"An earlier reference, which knew fewer samples, gave {summary['num_earlier']} better: callbacks may have "
        "stopped the run or saved by that."
    )


def _has_ended(trainer: Trainer) -> bool:
    """Return whether a callback has stopped the run, or a schedule has ended, so that more epochs are of no use."""
    has_stopped = any(getattr(owner, "stopped_epoch", 0) for owner, _ in callbacks_that_monitor(trainer))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return has_stopped or any(group["lr"] <= _ENDED * group.get("initial_lr", 0.0) for group in groups)


def log_summary(trainer: Trainer, prefix: str, summary: Mapping[str, Any]) -> None:
    """Write a summary to the loggers: to that of a run where they have one, as text, or to the hyperparameters."""
    values = {f"{prefix}{name}": value for name, value in summary.items()}
    for logger in trainer.loggers if trainer.is_global_zero else ():
        experiment: Any = getattr(logger, "experiment", None)
        if type(logger).__name__ == "WandbLogger":
            experiment.summary.update(values)
        elif hasattr(experiment, "add_text"):  # TensorBoard, which takes the hyperparameters of a run only once
            rows = [f"| {name} | {value} |" for name, value in summary.items()]
            experiment.add_text(f"{prefix}summary", "\n".join(["| | |", "|---|---|", *rows]))
        else:
            logger.log_hyperparams(values)
