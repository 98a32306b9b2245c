"""The holdout risk without holdout labels: its three terms, from sums that batches and processes add up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.tasks import predictions, target_rows

# Layout of the sums, one row each, one column per output.
_HOLDOUT, _TRAINING = slice(0, 4), slice(4, 9)
NUM_ROWS = 9


class RiskEstimate(NamedTuple):
    """The estimate and its terms, of which it is the sum; scalar tensors.

    Attributes:
        risk: The estimated Brier score, or mean squared error, on unseen samples.
        training: The same score on training samples.
        confidence: How much more the predictions on training samples vary than those on the holdout.
        variance: Twice the variance of the predictions over training sets, as seen from their sensitivity.
    """

    risk: Tensor
    training: Tensor
    confidence: Tensor
    variance: Tensor


def holdout_sums(outputs: Tensor, twin_outputs: Tensor, task: str) -> Tensor:
    """What the estimate needs of a holdout batch: count, Σp, Σp² and Σ(p − p')².

    Args:
        outputs: Outputs of the network, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of a twin, which give p', for the same inputs.
        task: The task.

    Returns:
        Shape ``(9, K)``.
    """
    p, p_twin = predictions(outputs, task), predictions(twin_outputs, task)
    sums = p.new_zeros(NUM_ROWS, p.shape[1])
    sums[_HOLDOUT] = torch.stack([torch.ones_like(p), p, p.square(), (p - p_twin).square()]).sum(1)
    return sums


def training_sums(outputs: Tensor, targets: Tensor, task: str) -> Tensor:
    """What it needs of a training batch: count, Σp, Σp², Σy and Σ(p − y)².

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: The labels.
        task: The task.

    Returns:
        Shape ``(9, K)``.
    """
    p = predictions(outputs, task)
    y, counts = target_rows(outputs, targets, task)
    p, y = p[counts], y[counts]
    sums = p.new_zeros(NUM_ROWS, p.shape[1])
    sums[_TRAINING] = torch.stack([torch.ones_like(p), p, p.square(), y, (p - y).square()]).sum(1)
    return sums


def risk_terms(sums: Tensor, task: str) -> RiskEstimate:
    """The estimate from sums over all batches and processes.

    Args:
        sums: Shape ``(9, K)``.
        task: The task.

    Returns:
        The estimate; nan without training or holdout samples.
    """
    holdout, training = (rows[1:] / rows[0] for rows in (sums[_HOLDOUT], sums[_TRAINING]))
    mean, square, variance = holdout
    train_mean, train_square, center, score = training
    # The power of the predictions around the mean label, so that it does not matter where a regression's zero is, and
    # little which labels the samples happen to have.
    confidence = (train_square - square) - 2 * center * (train_mean - mean)

    def over_outputs(values: Tensor) -> Tensor:
        return values.sum() if task == "multiclass" else values.mean()

    terms = [over_outputs(values) for values in (score, confidence, variance)]
    return RiskEstimate(terms[0] + terms[1] + terms[2], *terms)
