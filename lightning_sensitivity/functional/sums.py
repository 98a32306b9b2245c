"""What the risk estimate sums over samples: claims, variance, scores on labels, agreement with others.

All is summed at each temperature, of logits divided by it: a row for each of :data:`TEMPERATURES`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import in_chunks, wide_dtype

TEMPERATURES = tuple(2.0 ** (half / 2) for half in range(-2, 7))  # from 0.5 to 8
UNCHANGED = TEMPERATURES.index(1.0)  # the row of the logits as they are
_NUM = len(TEMPERATURES)


class UnseenSums(NamedTuple):
    """Hold sums over unseen samples, as float64 tensors of one number for each temperature.

    Attributes:
        num_scored: Samples, times positions.
        claim: Claims of the model.
        variance: Squared differences between twins and the outputs that they are compared with.
        baseline_claim: Claims of the outputs that twins are compared with.
        twin_claim: Claims of the twins.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    claim: Tensor
    variance: Tensor
    baseline_claim: Tensor
    twin_claim: Tensor
    num_non_finite: Tensor


class LabelSums(NamedTuple):
    """Hold sums over labelled samples, as float64 tensors of one number for each temperature.

    Attributes:
        num_scored: Labels that count.
        score: Brier scores.
        claim: Claims of the model.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    score: Tensor
    claim: Tensor
    num_non_finite: Tensor


class AgreementSums(NamedTuple):
    r"""Hold sums of dot products between the model's predictions p and others q, for each temperature.

    All are vectors whose squared distance is the Brier score.

    Attributes:
        num_scored: Samples.
        power: :math:`|p|^2`.
        by_shares: :math:`p \cdot s`, where s are the shares of the classes in training.
        agreement: :math:`p \cdot (q - s)`.
        other_power: :math:`|q|^2`.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    power: Tensor
    by_shares: Tensor
    agreement: Tensor
    other_power: Tensor
    num_non_finite: Tensor


def unseen_sums(
    outputs: Tensor, twin_outputs: Sequence[Tensor], task: Task, baseline_outputs: Tensor | None = None
) -> Tensor:
    """Sum up claims and variance over a batch of unseen samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of one twin or more, whose mean counts.
        task: The kind of classification.
        baseline_outputs: Outputs to compare the twins with, if not ``outputs``: those with batch statistics.

    Returns:
        The entries of :class:`UnseenSums` as columns, ``(T, 6)``.

    Raises:
        ValueError: If there is no twin, or shapes differ.
    """
    baseline_outputs = outputs if baseline_outputs is None else baseline_outputs

    def sums(*outputs: Tensor) -> Tensor:
        p, baseline, twin = (task.probabilities(_at_temperatures(each)) for each in outputs)
        claim, distance = task.claims(p), task.distances(baseline, twin)
        return _finite_sums(torch.ones_like(claim), claim, distance, task.claims(baseline), task.claims(twin))

    of_twins = []
    for twin in twin_outputs:
        if {twin.shape, baseline_outputs.shape} != {outputs.shape}:
            got = f"{tuple(twin.shape)} and {tuple(baseline_outputs.shape)}"
            expected = f"`twin_outputs` and `baseline_outputs` of the shape {tuple(outputs.shape)}"
            raise ValueError(f"Expected {expected}, but got {got}.")
        of_twins.append(torch.stack(in_chunks(sums, outputs, baseline_outputs, twin, num_copies=_NUM)).sum(0))
    if not of_twins:
        raise ValueError("Expected `twin_outputs` of one twin or more, but got none.")
    return torch.stack(of_twins).mean(0)


def label_sums(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Sum up scores and claims over a batch of labelled samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: Their labels; those of -100 are ignored.
        task: The kind of classification.

    Returns:
        The entries of :class:`LabelSums` as columns, ``(T, 4)``.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        p = task.probabilities(_at_temperatures(outputs))
        y, counts = task.target_probabilities(p, _repeated(targets))
        return _finite_sums(counts, task.distances(p, y) * counts, task.claims(p) * counts)

    return torch.stack(in_chunks(sums, outputs, targets.to(outputs.device), num_copies=_NUM)).sum(0)


def agreement_sums(outputs: Tensor, targets: Tensor, shares: Tensor, task: Task) -> Tensor:
    """Sum up how a batch of predictions agrees with labels, or with predictions of a reference.

    Args:
        outputs: Outputs in eval mode, ``(N, K)`` or ``(N,)``.
        targets: Labels, or probabilities ``(N, K)``; labels of -100 are ignored.
        shares: The mean label of the reference's training samples, ``(K,)``.
        task: The kind of classification.

    Returns:
        The entries of :class:`AgreementSums` as columns, ``(T, 6)``.
    """
    dtype = wide_dtype(outputs.device)
    s = task.as_vectors(shares[None].to(dtype).to(outputs.device))

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = task.probabilities(_at_temperatures(outputs)).to(dtype)
        y, counts = task.target_probabilities(probabilities, _repeated(targets))
        p, q, n = task.as_vectors(probabilities.flatten(1)), task.as_vectors(y.flatten(1)), counts.flatten()
        values = p.square().sum(1), (p * s).sum(1), (p * (q - s)).sum(1), q.square().sum(1)
        return _finite_sums(n, *(n * value for value in values))

    return torch.stack(in_chunks(sums, outputs, targets, num_copies=_NUM)).sum(0)


def _at_temperatures(outputs: Tensor) -> Tensor:
    """Divide outputs by each temperature in turn, as if these were further samples, ``(T · N, K, ...)``."""
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return torch.cat([wide / temperature for temperature in TEMPERATURES])


def _repeated(targets: Tensor) -> Tensor:
    """Repeat labels for each temperature."""
    return torch.cat([targets] * _NUM)


def _finite_sums(*values: Tensor) -> Tensor:
    """Sum up values ``(T · N, ...)`` over samples at each temperature, but count those that are not all finite."""
    rows = torch.stack(values, dim=1).to(wide_dtype(values[0].device))
    rows = rows.flatten(2).sum(2) if rows.ndim > 2 else rows
    rows = rows.reshape(_NUM, -1, rows.shape[1])
    is_finite = rows.isfinite().all(2, keepdim=True)
    return torch.cat([rows.where(is_finite, 0.0).sum(1), (~is_finite).sum(1)], dim=1)
