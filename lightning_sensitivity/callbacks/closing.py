"""The line at the end of a fit: which epoch, what is known of the labels, and whether to trust it."""

import math
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sensitivity.arguments import link_to
from lightning_sensitivity.callbacks.state import FitRecord, ValidationResult
from lightning_sensitivity.functional.reference import NOISY, Reference

MAX_DISTANCE = 1 / 20  # between the epoch and that of the reference by itself, as a share of all validations


def log_closing_line(trainer: Trainer, fit: FitRecord, names: Mapping[str, tuple[str, int]]) -> None:
    """Say in which epoch a value was lowest, what is known of the labels, and whether to trust the epoch.

    Args:
        trainer: The Trainer, at the end of a fit.
        fit: What is known of it.
        names: The criterion and the estimate of each loader: name and loader by the name that was logged. The
            line is about the first one that a callback of the run monitors.
    """
    logged_name = _watched_name(trainer, names)
    if logged_name is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    name, dataloader_idx = names[logged_name]
    history, reference = fit.history[dataloader_idx], fit.references.get(dataloader_idx)
    best = min(history, key=attrgetter(name))
    lowest = _lowest(trainer, logged_name, best.epoch, getattr(best, name))
    is_clean = reference is not None and reference.looks_clean
    is_falling = best is history[-1] and len(history) > 1 and not trainer.should_stop
    trust = "" if is_clean else _train_on() if is_falling else _trust(best, history, reference)
    rank_zero_info(" ".join(filter(None, (lowest, _noise(reference), trust))))


def _watched_name(trainer: Trainer, names: Collection[str]) -> str | None:
    """Find the name that a callback monitors, checkpoints first; else the first one."""
    callbacks = (*trainer.checkpoint_callbacks, *trainer.callbacks)  # type: ignore[attr-defined]
    watched = [getattr(callback, "monitor", None) for callback in callbacks]
    return next((name for name in watched if name in names), next(iter(names), None))


def _lowest(trainer: Trainer, name: str, epoch: int, value: float) -> str:
    return f"`{name}` was lowest at epoch {epoch} ({value:.3f}){_checkpoint_of(trainer, name, value)}."


def _checkpoint_of(trainer: Trainer, name: str, lowest: float) -> str:
    """Name the checkpoint of the lowest value, or say why there is none."""
    others = []
    for callback in trainer.checkpoint_callbacks:
        monitor, score = getattr(callback, "monitor", None), getattr(callback, "best_model_score", None)
        if monitor != name:
            others.append(f"`ModelCheckpoint` monitors {monitor!r}")
        elif score is not None and math.isclose(float(score), lowest, rel_tol=1e-5):
            return f", in the checkpoint {callback.best_model_path}"  # type: ignore[attr-defined]
        elif score is not None:
            place = callback.dirpath  # type: ignore[attr-defined]
            others.append(f"the best checkpoint of `ModelCheckpoint`, in {place}, has {float(score):.3f}")
    return f", but {others[0]}" if others else ""


def _noise(reference: Reference | None) -> str:
    """Say what is known of the labels, if anything."""
    if reference is None:
        return ""
    if reference.looks_clean:
        return "No noise was found in the training labels: training to the end is about as good."
    share = f"{100 * reference.noise:.0f} %"
    return f"About {share} of the training labels look wrong." if reference.noise >= NOISY else ""


def _train_on() -> str:
    return f"It was still falling: train for longer.{link_to('still-falling')}"


def _trust(best: ValidationResult, history: Sequence[ValidationResult], reference: Reference | None) -> str:
    """Say whether the reference by itself would choose the same epoch, or nearly, and what to do if not."""
    cure = "label 50 validation samples, and set `validation_labels=True`"
    by_reference = [result.by_reference for result in history]
    if reference is None or any(map(math.isnan, by_reference)):
        return f"There was no reference to check the epoch by: {cure}.{link_to('disagree')}"
    is_better = reference.score < best.by_twins
    other = by_reference.index(min(by_reference))
    if abs(other - history.index(best)) <= MAX_DISTANCE * len(history):
        but = f", but may be the better model itself.{link_to('reference-better')}" if is_better else "."
        return f"The reference agrees{but}"
    cure += ", or try kernel ridge regression" if is_better else ""
    start = f"The reference disagrees (it would choose epoch {history[other].epoch})"
    return f"{start}, and such runs lost 2 points of accuracy on average: {cure}.{link_to('disagree')}"
