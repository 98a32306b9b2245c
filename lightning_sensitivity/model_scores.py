"""From scores of samples to scores of models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sensitivity.consensus import consensus_scores
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.ranking import Comparison
from lightning_sensitivity.sample_scores import (
    CHANGES,
    CONFIDENCE,
    DISTANCE,
    ENTROPY,
    ERROR,
    FINGERPRINT,
    FLIPS,
    LOSS,
    NUM_LABELS,
    POWER,
    SHIFT_ERROR,
    SHIFT_LOSS,
    SQUARES,
    SUM,
)
from lightning_sensitivity.scored_model import Scored
from lightning_sensitivity.scores import ModelScores

# Share of the highest entropy from which on predictions are nearly uniform.
_UNDECIDED = 0.95


def check_same_samples(found: Scored, others: Mapping[str, Scored]) -> None:
    """Require that a model saw the samples that the others saw.

    Args:
        found: What its pass gave.
        others: What the passes of the others gave.

    Raises:
        ValueError: If the loader gave others, or in another order.
    """
    if not others:
        return
    name, other = next(iter(others.items()))
    seen, expected = found.samples[:, FINGERPRINT], other.samples[:, FINGERPRINT]
    if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"Other inputs than those of {name!r} ({len(seen)} and {len(expected)} samples): the loader gives others"
            " each time, or the models transform their batches differently."
        )


def compare_scored(scored: Mapping[str, Scored], notes: Mapping[str, str]) -> Comparison:
    """Put the models side by side.

    Args:
        scored: What the pass of each model gave, on the same samples.
        notes: What else is known of each model, with those that failed.

    Returns:
        The comparison.
    """
    by_sample = {name: _by_sample(found) for name, found in scored.items()}
    notes = {name: note or _doubt(by_sample.get(name, {}), scored.get(name)) for name, note in notes.items()}
    # What has learned nothing has no say.
    voters = [name for name in scored if not notes[name]]
    consensus = consensus_scores({name: found.log_probabilities for name, found in scored.items()}, voters)
    for name, of_others in consensus.items():
        by_sample[name] |= {"consensus_loss": of_others.loss, "consensus_error": of_others.error}
    return Comparison(
        [_row(name, scored.get(name), by_sample.get(name, {}), note) for name, note in notes.items()], by_sample
    )


def _by_sample(found: Scored) -> dict[str, Tensor]:
    """For each score one number a sample, of which the mean is the score, and whose spread is that of its error."""
    samples = found.samples
    changes = samples[:, CHANGES].mean()
    mean = samples[:, SUM].mean() / changes
    squares = samples[:, SQUARES] - 2 * mean * samples[:, SUM] + mean.square() * samples[:, CHANGES]
    # A ratio of means to first order: samples count by their number of changes, which is the same for all by default.
    sensitivity = found.sensitivity + (squares - found.sensitivity * samples[:, CHANGES]) / changes
    power = samples[:, POWER]
    scores = {
        "sensitivity": sensitivity,
        "variance": samples[:, DISTANCE] * power.mean(),
        "entropy": samples[:, ENTROPY],
        "confidence": samples[:, CONFIDENCE],
        "flips": samples[:, FLIPS],
        "shift_loss": samples[:, SHIFT_LOSS],
        "shift_error": samples[:, SHIFT_ERROR],
        "loss": _mean_over_labels(samples[:, LOSS], samples[:, NUM_LABELS]),
        "error": _mean_over_labels(samples[:, ERROR], samples[:, NUM_LABELS]),
    }
    if found.task == "multiclass" and found.num_outputs > 1:
        # The power is in units of the noise already. The square root of a product, to first order.
        estimate = float(loss_estimate(found.sensitivity, power.mean(), 1.0, found.num_outputs))
        relative = sensitivity / found.sensitivity if found.sensitivity > 0 else torch.ones_like(sensitivity)
        scores["loss_estimate"] = estimate * (relative + power / power.mean()) / 2
    return {name: values for name, values in scores.items() if bool(values.isfinite().any())}


def _mean_over_labels(values: Tensor, num_labels: Tensor) -> Tensor:
    """Numbers whose mean is that over all labels, of which samples may have more or less, or none."""
    if not bool(values.isfinite().any()):
        return values
    weights = num_labels / num_labels.mean()
    mean = (values.nan_to_num() * weights).mean()
    return mean + (values.nan_to_num() - mean) * weights


def _row(name: str, found: Scored | None, by_sample: Mapping[str, Tensor], note: str) -> ModelScores:
    if found is None:
        return ModelScores(name, note=note)
    means = {score: float(values.nanmean()) for score, values in by_sample.items()} | {"sensitivity": found.sensitivity}
    return ModelScores(
        name,
        sensitivity_stderr=found.stderr,
        num_parameters=found.num_parameters,
        seconds=found.seconds,
        note=note,
        **means,
    )


def _doubt(by_sample: Mapping[str, Tensor], found: Scored | None) -> str:
    """What the predictions themselves say of a model that has learned nothing."""
    if found is None or "entropy" not in by_sample:
        return ""
    num_classes = found.num_outputs if found.task == "multiclass" else 2  # of the other tasks, of each label
    return "undecided (untrained?)" if by_sample["entropy"].mean() > _UNDECIDED * math.log(num_classes) else ""
