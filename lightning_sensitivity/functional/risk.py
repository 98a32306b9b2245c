"""The risk on unseen samples without their labels: what the model claims, how far training contradicts it, variance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.pieces import in_pieces, wide_dtype
from lightning_sensitivity.functional.tasks import TASKS, check_logits, check_task, predictions, target_predictions

# How many numbers the sums over holdout and training samples have; the last one counts samples that were left out.
NUM_HOLDOUT_SUMS, NUM_TRAINING_SUMS = 6, 4


class RiskEstimate(NamedTuple):
    """The estimate and its terms, of which it is the sum; scalar tensors.

    Attributes:
        risk: The estimated Brier score, or mean squared error, on unseen samples.
        claim: What the score would be if the model's probabilities were right; 0 in a regression.
        overconfidence: How much higher the score on training samples is than what the model claims there.
        variance: Mean squared difference to the predictions of a twin.
    """

    risk: Tensor
    claim: Tensor
    overconfidence: Tensor
    variance: Tensor


def claims(p: Tensor, task: str) -> Tensor:
    """The score that predictions claim for themselves, one number a prediction: Gini's impurity.

    Args:
        p: What :func:`~lightning_sensitivity.functional.tasks.predictions` gives, ``(N, K, ...)``.
        task: The task.

    Returns:
        Shape ``(N, ...)``.
    """
    if task == "regression":  # outputs say nothing about their certainty
        return torch.zeros_like(p[:, 0])
    return 1 - p.square().sum(1) if task == "multiclass" else (p * (1 - p)).mean(1)


def distances(p: Tensor, other: Tensor, task: str) -> Tensor:
    """Squared differences between predictions and others, or labels, one number a prediction, ``(N, ...)``."""
    squares = (p - other).square_()
    return squares.sum(1) if task == "multiclass" else squares.mean(1)


def holdout_sums(outputs: Tensor, twin_outputs: Tensor, own_outputs: Tensor | None = None, *, task: str) -> Tensor:
    """Sums over a batch of unseen samples: their number, claims, variance, the claims of both its sides; nan or inf.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of a twin.
        own_outputs: Those that are compared with the twin's, if others: where batch norm goes by the batch.
        task: The task.

    Returns:
        Shape ``(6,)``.
    """

    def sums(*outputs: Tensor) -> Tensor:
        p, twin_p, *others = (predictions(each, task) for each in outputs)
        own_p = others[0] if others else p
        claim, variance, twin_claim = claims(p, task), distances(own_p, twin_p, task), claims(twin_p, task)
        own_claim = claims(own_p, task) if others else claim
        return _sums(torch.ones_like(variance), claim, variance, own_claim, twin_claim)

    tensors = (outputs, twin_outputs) if own_outputs is None else (outputs, twin_outputs, own_outputs)
    return torch.stack(in_pieces(sums, *tensors)).sum(0)


def training_sums(outputs: Tensor, targets: Tensor, task: str) -> Tensor:
    """Sums over a batch of training samples: labels that count, scores, claims; samples with nan or inf.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: The labels.
        task: The task.

    Returns:
        Shape ``(4,)``.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        p = predictions(outputs, task)
        y, counts = target_predictions(outputs, targets, task)
        return _sums(counts, distances(p, y, task) * counts, claims(p, task) * counts)

    return torch.stack(in_pieces(sums, outputs, targets.to(outputs.device))).sum(0)


def risk_terms(holdout: Tensor, training: Tensor, strength: float | None = None) -> RiskEstimate:
    """The estimate from sums over all batches and processes.

    Args:
        holdout: Those of :func:`holdout_sums`.
        training: Those of :func:`training_sums`.
        strength: λ of simulated twins; None for real ones.

    Returns:
        The estimate; nan without training or holdout samples.
    """
    claim, variance, own_claim, twin_claim = holdout[1:5] / holdout[0]
    score, train_claim = training[1:3] / training[0]
    overconfidence = score - train_claim
    if strength is not None:
        overconfidence = torch.where(overconfidence > 0, overconfidence, overconfidence / 2)
        variance = variance / strength**2 * torch.where(twin_claim > own_claim, own_claim / twin_claim, 1.0)
    return RiskEstimate(claim + overconfidence + variance, claim, overconfidence, variance)


def risk_estimate(
    outputs: Tensor,
    twin_outputs: Tensor,
    train_outputs: Tensor,
    train_targets: Tensor,
    task: str = "multiclass",
    strength: float | None = None,
) -> RiskEstimate:
    r"""Brier score (or mean squared error) on unseen samples, from training labels and unlabelled samples.

    .. math::
        R = \underbrace{\mathbb{E}\,(1 - \|p\|^2)}_\text{claim}
            + \underbrace{\mathbb{E}_\text{train}[\|p - y\|^2 - (1 - \|p\|^2)]}_\text{overconfidence}
            + \underbrace{\mathbb{E}\|p - p'\|^2}_\text{variance}

    p are the probabilities, y the labels, and p' what a twin says of the same sample: a network that was trained on
    other data. It is the chain loss = bias + variance of `arXiv:2007.15378`_ (Section 4). With a real twin it is exact
    where unseen labels agree with a network as its twins do, up to what it is miscalibrated by on its training samples,
    :math:`\mathbb{E}\,p \cdot y = \mathbb{E}\,p \cdot p' + \mathbb{E}_\text{train}\,p \cdot (y - p)`.

    :func:`lightning_sensitivity.twins.twin` simulates a twin of a strength λ without a second training. Three things
    then differ. The variance is divided by λ². It is multiplied by min(1, claim of the network / claim of the twin):
    noise makes a twin less certain, which another network would not be. And overconfidence below 0 counts half, since
    it may be memory of the training labels alone. ``examples/early_stopping/README.md`` has the measurements.

    Where training labels are wrong, it estimates the score against labels that are as wrong.

    Args:
        outputs: Outputs for unlabelled samples that the network was not trained on, before softmax or sigmoid,
            floating, shape ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of the twin for the same samples.
        train_outputs: Outputs for training samples, in eval mode, shape ``(M, K, ...)`` or ``(M,)``.
        train_targets: Their labels: ``(M, ...)`` integers (those of -100 don't count), or soft labels of the shape of
            ``train_outputs``, for ``"multiclass"``; of the shape of ``train_outputs`` for the others.
        task: What is scored: ``"multiclass"``, the sum over classes of (p − y)²; ``"binary"`` and ``"multilabel"``,
            the mean over labels of (p − y)²; ``"regression"``, the mean squared error.
        strength: λ, if the twin is simulated; None for a real one.

    Returns:
        The estimate and its three terms, scalar tensors, float64 (float32 on MPS).

    Raises:
        ValueError: If labels do not fit the task, shapes do not fit, there is no sample, or outputs for
            ``"multiclass"`` are probabilities already.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import risk_estimate
        >>> outputs, twin_outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> train_outputs, train_targets = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
        >>> risk_estimate(outputs, twin_outputs, train_outputs, train_targets).risk
        tensor(0.3832, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    if task not in TASKS:
        raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, TASKS))}, but got {task!r}.")
    check_task(train_outputs, train_targets, task)
    if outputs.shape != twin_outputs.shape or outputs.shape[1:2] != train_outputs.shape[1:2]:
        raise ValueError(
            "Expected `twin_outputs` to have the shape of `outputs`, and `train_outputs` as many outputs, but got"
            f" {tuple(outputs.shape)}, {tuple(twin_outputs.shape)} and {tuple(train_outputs.shape)}."
        )
    for name, tensor in (("outputs", outputs), ("twin_outputs", twin_outputs), ("train_outputs", train_outputs)):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise ValueError(
                f"Expected `{name}` to be a floating tensor of one sample or more, but got {tensor.dtype} of shape"
                f" {tuple(tensor.shape)}."
            )
    check_logits(train_outputs, task)
    training = training_sums(train_outputs, train_targets, task)
    if not training[0] > 0:
        raise ValueError("Expected `train_targets` to hold a label that counts, but all are -100.")
    return risk_terms(holdout_sums(outputs, twin_outputs, task=task), training, strength)


def _sums(counts: Tensor, *values: Tensor) -> Tensor:
    """Sums over samples that are finite, and the number of the others; nothing waits for the device."""
    dtype = wide_dtype(counts.device)
    rows = torch.stack([each.to(dtype)[:, None].flatten(1).sum(1) for each in (counts, *values)], dim=1)
    is_finite = rows.isfinite().all(1)
    return torch.cat([rows.where(is_finite[:, None], 0.0).sum(0), (~is_finite).sum(0, keepdim=True)])
