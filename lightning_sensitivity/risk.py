"""The holdout risk without holdout labels: its three terms, from sums that batches and processes add up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.tasks import predictions, target_rows

# Layout of the sums, one row each, one column per output.
_HOLDOUT, _TRAINING = slice(0, 3), slice(3, 6)
NUM_ROWS = 6


class RiskEstimate(NamedTuple):
    """The estimate and its terms, of which it is the sum; scalar tensors.

    Attributes:
        risk: The estimated Brier score, or mean squared error, on unseen samples.
        training: The same score on training samples.
        uncertainty: How much more uncertain the predictions are on unseen samples; 0 for a regression.
        variance: Mean squared difference to the predictions of a twin.
    """

    risk: Tensor
    training: Tensor
    uncertainty: Tensor
    variance: Tensor


def holdout_sums(outputs: Tensor, twin_outputs: Tensor, task: str) -> Tensor:
    """What the estimate needs of a holdout batch: count, Σp(1 − p) and Σ(p − p')².

    Args:
        outputs: Outputs of the network, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of a twin, which give p', for the same inputs.
        task: The task.

    Returns:
        Shape ``(6, K)``.
    """
    return _sums(_HOLDOUT, predictions(outputs, task), predictions(twin_outputs, task), task)


def training_sums(outputs: Tensor, targets: Tensor, task: str) -> Tensor:
    """What it needs of a training batch: count, Σp(1 − p) and Σ(p − y)².

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: The labels.
        task: The task.

    Returns:
        Shape ``(6, K)``.
    """
    p = predictions(outputs, task)
    y, counts = target_rows(outputs, targets, task)
    if not bool(counts.all()):
        p, y = p[counts], y[counts]
    return _sums(_TRAINING, p, y, task)


def risk_terms(sums: Tensor, task: str) -> RiskEstimate:
    """The estimate from sums over all batches and processes.

    Args:
        sums: Shape ``(6, K)``.
        task: The task.

    Returns:
        The estimate; nan without training or holdout samples.
    """
    (impurity, variance), (train_impurity, score) = (rows[1:] / rows[0] for rows in (sums[_HOLDOUT], sums[_TRAINING]))

    def over_outputs(values: Tensor) -> Tensor:
        return values.sum() if task == "multiclass" else values.mean()

    terms = [over_outputs(values) for values in (score, impurity - train_impurity, variance)]
    return RiskEstimate(terms[0] + terms[1] + terms[2], *terms)


def has_training(sums: Tensor) -> Tensor:
    """Whether any training label counts; a scalar bool tensor."""
    return sums[_TRAINING.start].any()


def _sums(rows: slice, p: Tensor, other: Tensor, task: str) -> Tensor:
    """Count, impurity and squared difference to other predictions or labels, at their place among the rows."""
    # Gini's impurity, whose sum over classes is 1 − Σp². Outputs of a regression say nothing about their certainty.
    impurity = p.new_zeros(p.shape[1]) if task == "regression" else (p * (1 - p)).sum(0)
    sums = p.new_zeros(NUM_ROWS, p.shape[1])
    # Row by row: outputs of a segmentation are large.
    sums[rows] = torch.stack([p.new_full(p.shape[1:], len(p)), impurity, (p - other).square().sum(0)])
    return sums
