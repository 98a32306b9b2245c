"""The line at the end of a fit: which epoch and file, what chose them, and what is known of the labels."""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.arguments import link_to
from lightning_sensitivity.callbacks.checks import callbacks_that_monitor
from lightning_sensitivity.callbacks.record import ValidationResult, Verdict
from lightning_sensitivity.functional.refined_score import TEMPERATURES

_SAID = 0.05  # share of labels that is worth a sentence

Curve = tuple[str, Sequence[ValidationResult]]  # the value, and what validations have shown


def closing_line(trainer: Trainer, curves: Mapping[str, Curve], verdict: Verdict) -> str:
    """Say in which epoch a value was lowest, what chose it, and what is known of the labels.

    Args:
        trainer: The Trainer, at the end of a fit.
        curves: The criterion and the ranking of each loader, by the name that was logged. The line is about the
            first one that a callback of the run monitors.
        verdict: What was decided on the reference.

    Returns:
        The line; empty without a curve.
    """
    if not curves:
        return ""
    monitored = [name for _, name in callbacks_that_monitor(trainer) if name in curves]
    name = (monitored or list(curves))[0]
    value, results = curves[name]
    best, last = min(results, key=attrgetter(value)), results[-1]
    has_stopped = any(getattr(each, "stopped_epoch", 0) for each in _watching(trainer, name))
    is_falling = best is last and len(results) > 1 and not has_stopped
    sentences = [_lowest(trainer, name, value, best), _what_chose(verdict, last, value), _unexplained(verdict)]
    has_chosen = verdict.is_trusted or best.num_labels > 0
    if is_falling and has_chosen:
        sentences.append(f"It was still falling: train for longer.{link_to('still-falling')}")
    return " ".join(filter(None, sentences))


def _watching(trainer: Trainer, name: str) -> list[object]:
    """List the callbacks that monitor a value."""
    return [callback for callback, monitor in callbacks_that_monitor(trainer) if monitor == name]


def _lowest(trainer: Trainer, name: str, value: str, best: ValidationResult) -> str:
    """Say which epoch and file, and how its probabilities become calibrated."""
    lowest = getattr(best, value)
    said = f"`{name}` was lowest at epoch {best.epoch}{_checkpoint_of(trainer, name, lowest)}"
    is_known = TEMPERATURES[0] < best.temperature < TEMPERATURES[-1]  # not at an end of the grid
    if value == "risk_criterion" and best.temperature != 1 and is_known:
        return f"{said}: divide its logits by {best.temperature:.1f} to calibrate it."
    return f"{said}."


def _checkpoint_of(trainer: Trainer, name: str, lowest: float) -> str:
    """Name the checkpoint of the lowest value, if there is one."""
    for callback in _watching(trainer, name):
        path, score = getattr(callback, "best_model_path", ""), getattr(callback, "best_model_score", None)
        if not (path and isinstance(score, Tensor) and score.numel() == 1):
            continue
        if math.isclose(float(score), lowest, rel_tol=1e-5, abs_tol=1e-9):
            return f", in the checkpoint {path}"
    return ""


def _what_chose(verdict: Verdict, last: ValidationResult, value: str) -> str:
    """Say what chose, and how good it is."""
    if last.num_labels > 0 and value == "risk_criterion":
        others = " and the reference" if verdict.is_trusted else ""
        return f"{last.num_labels} validation labels{others} chose."
    if verdict.is_trusted:
        return f"The reference chose: {_skill(verdict, last)}."
    if verdict.looks_clean:
        return (
            f"The training labels look clean ({_skill(verdict, last)}), so the score on training samples chose: if "
            "they are right, training to the end is about as good."
        )
    blind = f"sees too little of the inputs ({_skill(verdict, last)})" if verdict.has_reference else "is missing"
    return (
        f"The reference {blind}, so the score on training samples chose, which can't say when to stop: "
        f"label some validation samples, or set `features=`.{link_to('blind')}"
    )


def _skill(verdict: Verdict, last: ValidationResult) -> str:
    """Say how well the reference predicts labels that it has not seen, beside the network on labels that it has."""
    number = f"{verdict.num_samples:,} training labels"
    if math.isnan(verdict.accuracy):
        return f"without having seen them, it explains {max(0.0, verdict.skill):.0%} of the variance of {number}"
    return (
        f"without having seen them, it predicts {verdict.accuracy:.0%} of {number}; the network, which has seen them, "
        f"predicts {last.training_accuracy:.0%}"
    )


def _unexplained(verdict: Verdict) -> str:
    """Say how many labels can't be explained, if that is worth a sentence."""
    if verdict.looks_clean or not verdict.unexplained >= _SAID:
        return ""
    return (
        f"About {verdict.unexplained:.0%} of the training labels can't be explained: they are wrong, or not to be "
        "known from the inputs."
    )
