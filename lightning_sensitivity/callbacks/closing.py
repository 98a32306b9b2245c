"""The line at the end of a fit: which epoch and file, how many labels look wrong, and a second opinion."""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.arguments import link_to
from lightning_sensitivity.callbacks.record import ESTIMATE, ValidationResult
from lightning_sensitivity.functional.reference import NOISY

_NEAR = 1 / 20  # of all validations, between the epochs of the criterion and of the second opinion


def log_closing_line(
    trainer: Trainer, history: Mapping[int, Sequence[ValidationResult]], names: Mapping[str, tuple[str, int]]
) -> None:
    """Say in which epoch a value was lowest, what is known of the labels, and what a second opinion would take.

    Args:
        trainer: The Trainer, at the end of a fit.
        history: What validations have shown, by loader.
        names: The criterion and the estimate of each loader: name and loader by the name that was logged. The
            line is about the first one that a callback of the run monitors.
    """
    logged_name = _watched_name(trainer, names)
    if logged_name is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    name, dataloader_idx = names[logged_name]
    results = history[dataloader_idx]
    best, last = min(results, key=attrgetter(name)), results[-1]
    is_falling = best is last and len(results) > 1 and not _has_stopped(trainer, logged_name)
    sentences = [_lowest(trainer, logged_name, best, name), _noise(last)]
    if last.gap_weight > 0:
        sentences.append(_still_falling() if is_falling else _second_opinion(best, results))
    rank_zero_info(" ".join(filter(None, sentences)))


def _watched_name(trainer: Trainer, names: Mapping[str, tuple[str, int]]) -> str | None:
    """Find the name that a callback monitors, checkpoints first; else the first one."""
    callbacks = (*trainer.checkpoint_callbacks, *trainer.callbacks)  # type: ignore[attr-defined]
    watched = [getattr(callback, "monitor", None) for callback in callbacks]
    found = [name for name in watched if isinstance(name, str) and name in names]
    return next(iter([*found, *names]), None)


def _has_stopped(trainer: Trainer, name: str) -> bool:
    """Return whether a callback that monitors a value has stopped the fit."""
    watching = [each for each in trainer.callbacks if _monitors(each, name)]  # type: ignore[attr-defined]
    return any(getattr(callback, "stopped_epoch", 0) for callback in watching)


def _monitors(callback: object, name: str) -> bool:
    monitor = getattr(callback, "monitor", None)
    return isinstance(monitor, str) and monitor == name


def _lowest(trainer: Trainer, logged_name: str, best: ValidationResult, name: str) -> str:
    """Say which epoch and file, and how its probabilities become calibrated: the estimate takes them as they are."""
    value = getattr(best, name)
    said = f"`{logged_name}` was lowest at epoch {best.epoch}{_checkpoint_of(trainer, logged_name, value)}"
    is_calibrated = name == ESTIMATE or best.temperature == 1
    return f"{said}." if is_calibrated else f"{said}: divide its logits by {best.temperature:.1f} to calibrate it."


def _checkpoint_of(trainer: Trainer, name: str, lowest: float) -> str:
    """Name the checkpoint of the lowest value, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        path, score = getattr(callback, "best_model_path", ""), getattr(callback, "best_model_score", None)
        if not (path and _monitors(callback, name) and isinstance(score, Tensor) and score.numel() == 1):
            continue  # a callback of the user may have anything of these names
        if math.isclose(float(score), lowest, rel_tol=1e-5):
            return f", in the checkpoint {path}"
    return ""


def _noise(last: ValidationResult) -> str:
    """Say what is known of the labels, if anything."""
    if last.gap_weight == 0:
        return "No noise was found in the training labels: if they are right, training to the end is about as good."
    share = f"{100 * last.label_noise:.0f} %"
    return f"At least about {share} of the training labels look wrong." if last.label_noise >= NOISY else ""


def _still_falling() -> str:
    return f"It was still falling: train for longer.{link_to('still-falling')}"


def _second_opinion(best: ValidationResult, results: Sequence[ValidationResult]) -> str:
    """Say which epoch the reference by itself would choose; nothing without one."""
    by_reference = [result.by_reference for result in results]
    if any(map(math.isnan, by_reference)):
        return ""
    other = by_reference.index(min(by_reference))
    is_near = abs(other - results.index(best)) <= _NEAR * len(results)
    opinion = f"A second opinion, a small model of the training labels, would take epoch {results[other].epoch}."
    return opinion if is_near else opinion + link_to("second-opinion")
