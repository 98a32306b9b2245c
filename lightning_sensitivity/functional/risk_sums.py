"""What the risk estimate sums over samples: claims, variance, and scores on labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import in_chunks, wide_dtype


class HoldoutSums(NamedTuple):
    """Hold sums over unseen samples, as float64 scalars.

    Attributes:
        num_scored: Samples, times positions.
        claim: Claims of the model.
        variance: Squared differences between the twin and the reference.
        reference_claim: Claims of the reference, with which the twin is compared.
        twin_claim: Claims of the twin.
        num_identical: Samples, times positions, with the same outputs from twin and reference.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    claim: Tensor
    variance: Tensor
    reference_claim: Tensor
    twin_claim: Tensor
    num_identical: Tensor
    num_non_finite: Tensor


class LabelSums(NamedTuple):
    """Hold sums over labelled training or validation samples, as float64 scalars.

    Attributes:
        num_scored: Labels that count.
        score: Brier scores.
        claim: Claims of the model.
        num_outside: Samples with an output outside of [0, 1].
        num_high: Samples with an output above ½.
        num_wide: Samples with more than two outputs.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    score: Tensor
    claim: Tensor
    num_outside: Tensor
    num_high: Tensor
    num_wide: Tensor
    num_non_finite: Tensor


def holdout_sums(outputs: Tensor, twin_outputs: Tensor, task: Task, reference: Tensor | None = None) -> Tensor:
    """Sum up claims and variance over a batch of unseen samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of a twin.
        task: The kind of classification.
        reference: Outputs to compare the twin with, if not ``outputs``: those computed with batch statistics.

    Returns:
        The entries of :class:`HoldoutSums` as one tensor.
    """
    reference = outputs if reference is None else reference

    def sums(outputs: Tensor, twin_outputs: Tensor, reference: Tensor) -> Tensor:
        p, twin_p, reference_p = (task.probabilities(each) for each in (outputs, twin_outputs, reference))
        is_identical = (twin_outputs == reference).reshape(p.shape).all(1)
        claim = task.claims(p)
        return _finite_sums(
            torch.ones_like(claim),
            claim,
            task.distances(reference_p, twin_p),
            task.claims(reference_p),
            task.claims(twin_p),
            is_identical,
        )

    return torch.stack(in_chunks(sums, outputs, twin_outputs, reference)).sum(0)


def label_sums(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Sum up scores and claims over a batch of labelled samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: Their labels; those of -100 are ignored.
        task: The kind of classification.

    Returns:
        The entries of :class:`LabelSums` as one tensor.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        p = task.probabilities(outputs)
        y, counts = task.target_probabilities(p, targets)
        is_outside = ((outputs < 0) | (outputs > 1)).reshape(p.shape).any(1)
        is_high = (outputs > 0.5).reshape(p.shape).any(1)
        is_wide = torch.full_like(is_high, p.shape[1] > 2)
        scores, claims = task.distances(p, y) * counts, task.claims(p) * counts
        return _finite_sums(counts, scores, claims, is_outside, is_high, is_wide)

    return torch.stack(in_chunks(sums, outputs, targets.to(outputs.device))).sum(0)


def _finite_sums(*values: Tensor) -> Tensor:
    """Sum up values over the samples whose values are all finite, and count the others; do not wait for the device."""
    dtype = wide_dtype(values[0].device)
    rows = torch.stack([each.to(dtype)[:, None].flatten(1).sum(1) for each in values], dim=1)
    is_finite = rows.isfinite().all(1)
    return torch.cat([rows.where(is_finite[:, None], 0.0).sum(0), (~is_finite).sum(0, keepdim=True)])
