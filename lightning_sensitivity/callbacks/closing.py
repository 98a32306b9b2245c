"""The line at the end of a fit: where the estimate was lowest, and whether to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.arguments import see
from lightning_sensitivity.functional.reference import Reference

_MAX_DEVIATION = 3.0  # of the score on validation labels, in its standard errors


class Measured(NamedTuple):
    """Hold what a validation has shown.

    Attributes:
        epoch: The epoch.
        estimate: The estimate, combined with any validation labels.
        deviation: How much higher the score on validation labels is than the estimate without them, in
            standard errors; 0 without labels.
    """

    epoch: int
    estimate: float
    deviation: float

    @classmethod
    def from_values(cls, epoch: int, values: Mapping[str, Tensor]) -> Measured:
        """Take what is needed from the values of a :class:`~lightning_sensitivity.RiskEstimate`."""
        deviation = 0.0
        if "risk_label_score" in values and values["risk_label_stderr"] > 0:
            difference = values["risk_label_score"] - values["risk_without_labels"]
            deviation = float(difference / values["risk_label_stderr"])
        return cls(epoch, float(values["risk_estimate"]), deviation)


def log_closing_line(trainer: Trainer, name: str, history: Sequence[Measured], reference: Reference | None) -> None:
    """Say where the estimate was lowest, and what speaks against it.

    Args:
        trainer: The Trainer, at the end of a fit.
        name: The logged name of the estimate.
        history: All validations of the fit, and of the fits that it resumes.
        reference: The reference.
    """
    if not history:
        return
    best = min(history, key=lambda measured: measured.estimate)
    line = f"`{name}` was lowest at epoch {best.epoch} ({best.estimate:.3f})."
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if getattr(callback, "monitor", None) == name and path:
            line += f" The checkpoint is {path}."
    rank_zero_info(line + _doubt(best, history, reference))


def _doubt(best: Measured, history: Sequence[Measured], reference: Reference | None) -> str:
    """Say why the estimate may be wrong, and what to do; an empty string if nothing speaks against it."""
    if best is history[-1] and len(history) > 1:
        return f" It was still falling: train for longer.{see('still-falling')}"
    if abs(best.deviation) > _MAX_DEVIATION:
        side = "above" if best.deviation > 0 else "below"
        return (
            f" The score on validation labels is {abs(best.deviation):.0f} standard errors {side} the estimate without "
            f"them: rather choose by these labels.{see('contradicted')}"
        )
    if reference is not None and reference.score < best.estimate:
        return (
            f" Kernel ridge regression of {reference.num_samples} training samples reaches {reference.score:.3f}: it "
            f"may be the better model.{see('reference-better')}"
        )
    return ""
