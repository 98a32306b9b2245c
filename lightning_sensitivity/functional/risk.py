"""The Brier score on unseen samples without labels: a sum of terms, combined with any validation labels."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.sums import LabelSums, UnseenSums
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import Diagnosis

# m₀: the number of validation labels that count as much as the estimate, without and with a reference
LABEL_WEIGHT, LABEL_WEIGHT_WITH_REFERENCE = 40, 200
TWIN_STRENGTH = 0.5  # λ of simulated twins; at full strength they break networks with max-pooling


class RiskTerms(NamedTuple):
    """Hold the risk estimate and the terms that add up to it, at each temperature.

    Attributes:
        estimate: The estimated Brier score on unseen samples.
        claim: The score if the model's probabilities were right.
        overconfidence: How much higher the score on training samples is than what the model claims there.
        memorization: How much more certain the model is on training samples; 0 for real twins.
        variance: Mean squared difference from the probabilities of a network trained on other samples.
    """

    estimate: Tensor
    claim: Tensor
    overconfidence: Tensor
    memorization: Tensor
    variance: Tensor


def risk_terms(
    unseen: UnseenSums, training: LabelSums, strength: float | None = None, factor: float = 1.0
) -> RiskTerms:
    r"""Estimate the Brier score on unseen samples from sums over all batches and processes.

    .. math::
        R = \underbrace{\mathbb{E}\,(1 - \|p\|^2)}_\text{claim}
            + \underbrace{\mathbb{E}_\text{train}[\|p - y\|^2 - (1 - \|p\|^2)]}_\text{overconfidence}
            + \underbrace{\mathbb{E}\|p - p'\|^2}_\text{variance}

    p are the probabilities, y the labels, and p' the probabilities of a *twin*: a network that was trained on
    other samples. This applies loss = bias + variance, as in arXiv:2007.15378 (Section 4). With a real twin
    the estimate is exact if unseen labels agree with a network as much as its twins do, apart from its
    miscalibration on its training samples,
    :math:`\mathbb{E}\,p \cdot y = \mathbb{E}\,p \cdot p' + \mathbb{E}_\text{train}\,p \cdot (y - p)`.

    A twin of strength λ can be simulated without a second training, by
    :func:`~lightning_sensitivity.model.twins.twin_weights`. Then

    - the variance is divided by λ² and multiplied by :func:`variance_factor`. It is also multiplied by
      min(1, claim of the network / claim of the twin), since noise makes a twin less certain than another
      network would be;
    - overconfidence below 0 counts half, since it may come from memorized training labels;
    - memorization is added: how much the claim on unseen samples exceeds that on training samples, if so.

    ``examples/studies/early_stopping/README.md`` has the measurements. If training labels are noisy, this is
    an estimate of the score against equally noisy labels. :class:`~lightning_sensitivity.RiskEstimate`
    combines it with a reference and with validation labels.

    Args:
        unseen: Sums over unseen samples.
        training: Sums over training samples.
        strength: λ of simulated twins; None for real ones.
        factor: Factor of the variance for simulated twins, from :func:`variance_factor`.

    Returns:
        The terms at each temperature, ``(T,)``; nan without training or unseen samples.
    """
    claim = unseen.claim / unseen.num_scored
    variance = unseen.variance / unseen.num_scored
    training_claim = training.claim / training.num_scored
    overconfidence = training.score / training.num_scored - training_claim
    memorization = torch.zeros_like(claim)
    if strength is not None:
        overconfidence = torch.where(overconfidence > 0, overconfidence, overconfidence / 2)
        memorization = (claim - training_claim).clamp(min=0)
        shrinkage = (unseen.baseline_claim / unseen.twin_claim).clamp(max=1).nan_to_num(1.0)
        variance = factor * variance / strength**2 * shrinkage
    terms = claim, overconfidence, memorization, variance
    return RiskTerms(torch.stack(terms).sum(0), *terms)


def combine_with_labels(estimate: Tensor, labels: LabelSums, weight: float) -> Tensor:
    """Combine the estimate with the score on validation labels.

    With m labels of mean Brier score s, the result is :math:`(m s + m_0 R) / (m + m_0)`.

    Args:
        estimate: The estimate R without validation labels, at each temperature.
        labels: Sums over labelled validation samples.
        weight: m₀: as how many labels the estimate counts.
    """
    return (labels.score + weight * estimate) / (labels.num_scored + weight)


def criterion(estimates: Tensor, training_score: Tensor, gap_weight: float) -> Tensor:
    r"""Compute what to stop by without validation labels, :math:`B + k\,(\min_T R_T - B)`.

    Accuracy does not feel how sure a network is of itself, so that the estimate counts at its best temperature
    (see :func:`~lightning_sensitivity.functional.refined_score`).

    Args:
        estimates: R, the estimate at each temperature, ``(T,)``.
        training_score: B, the score on training samples, scalar.
        gap_weight: k, such as that of the reference.
    """
    return training_score + gap_weight * (estimates.min() - training_score)


def criterion_with_labels(estimates: Tensor, labels: LabelSums, weight: float) -> Tensor:
    r"""Compute what to stop by with validation labels, :math:`(m \min_T s_T + m_0 \min_T R_T) / (m + m_0)`.

    Args:
        estimates: R, the estimate at each temperature, ``(T,)``.
        labels: Sums over m labelled validation samples, with their scores s.
        weight: m₀: as how many labels the estimate counts; 0 if no noise is found in the training labels.
    """
    num_labels = labels.num_scored[0]
    total = labels.score.min() + (weight * estimates.min() if weight > 0 else 0.0)
    return total / (num_labels + weight)


def diagnostics(unseen: UnseenSums, training: LabelSums, estimate: Tensor, task: Task) -> dict[str, Diagnosis]:
    """Explain what makes an estimate doubtful or impossible, by its entry on the page on troubleshooting.

    Args:
        unseen: Sums over unseen samples.
        training: Sums over training samples.
        estimate: The estimate, scalar.
        task: The kind of classification.
    """
    messages = {}
    unseen_lost, training_lost = float(unseen.num_non_finite.max()), float(training.num_non_finite.max())
    if unseen_lost + training_lost > 0:
        messages["nan"] = Diagnosis(
            f"{math.ceil(unseen_lost)} validation and {int(training_lost)} training samples "
            "gave nan or inf, and were left out.",
            unseen_lost + training_lost,
        )
    if not messages and estimate.isnan():
        reason = "no kept training sample has a label, or no batch could be measured"
        messages["failed"] = Diagnosis(f"There is no value: {reason}.")
    if estimate > task.max_score:
        messages["above-2"] = Diagnosis(
            f"The estimate is {float(estimate):.2f}, and no Brier score is above {task.max_score:g}: "
            "read only how it changes, not its size."
        )
    return messages


def variance_factor(num_training: int, num_weights: int) -> float:
    r"""Compute how much of the variance of a simulated twin counts: :math:`\min(1, \sqrt{\sqrt{w} / n})`.

    Networks differ less if they have more training samples, and more if they have more weights; simulated
    twins reflect neither. Its form was chosen on random runs; see
    ``examples/studies/early_stopping/README.md``.

    Args:
        num_training: n, the number of training samples, 1 or more.
        num_weights: w, the number of weights that are trained, 0 or more.

    Returns:
        The factor, from 0 to 1.

    Raises:
        ValueError: If a number is too small.

    Example:
        >>> from lightning_sensitivity.functional import variance_factor
        >>> variance_factor(num_training=400, num_weights=10_000)
        0.5
    """
    if num_training < 1:
        raise ValueError(f"Expected `num_training` to be 1 or more, but got {num_training}.")
    if num_weights < 0:
        raise ValueError(f"Expected `num_weights` to be 0 or more, but got {num_weights}.")
    return min(1.0, math.sqrt(math.sqrt(num_weights) / num_training))
