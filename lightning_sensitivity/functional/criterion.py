"""What to stop by: the distance of a network from its reference, calibrated, and joined with labels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sensitivity.functional.refined_score import TEMPERATURES, Refined, ScoreSums

LABELS_OF_REFERENCE = 200  # validation labels that count as much as a reference
_MAX_FACTOR = 1.5  # of the agreement: up to 3, fine-tuning would lose 6 points (design half of the study)
_CLEAR = 0.15  # share of the largest agreement so far
_MIN_AGREEMENT = 1e-4  # a network that has not moved agrees with nothing


@dataclass(frozen=True)
class Calibration:
    """Hold how much more a network knows than its reference, by the epochs so far, at each temperature.

    A reference that is poor agrees less with a network than unseen labels do. The labels of training samples
    agree more, since the network has learned them; least so before it memorizes. So the factor of the agreement
    is the smallest ratio so far of theirs to that of the reference.

    Attributes:
        largest_agreements: The largest agreement of network and reference on unseen samples.
        smallest_ratios: The smallest ratio of the agreement of training labels to it, where it is clear of 0.
    """

    largest_agreements: tuple[float, ...] = (0.0,) * len(TEMPERATURES)
    smallest_ratios: tuple[float, ...] = (math.inf,) * len(TEMPERATURES)

    @property
    def factors(self) -> list[float]:
        """The factor of the agreement at each temperature, from 1 to 1.5."""
        return [min(max(ratio, 1.0), _MAX_FACTOR) for ratio in self.smallest_ratios]

    def updated(self, unseen: ScoreSums, training: ScoreSums) -> "Calibration":
        """Include an epoch; one without samples, which gives nan, changes nothing.

        Args:
            unseen: Scores of unseen samples against the reference.
            training: Scores of training samples against their labels.
        """
        found, of_training = unseen.agreements.tolist(), training.agreements.tolist()
        if not all(map(math.isfinite, [*found, *of_training])):
            return self
        largest = tuple(map(max, self.largest_agreements, found))
        ratios = list(self.smallest_ratios)
        for place, (agreement, known) in enumerate(zip(found, of_training, strict=True)):
            if agreement > max(_CLEAR * largest[place], _MIN_AGREEMENT):
                ratios[place] = min(ratios[place], known / agreement)
        return Calibration(largest, tuple(ratios))


def distance_from_reference(unseen: ScoreSums, calibration: Calibration) -> Refined:
    r"""Compute how far a network is from its reference, at the best temperature.

    .. math::
        D = \min_T \; \mathbb{E}\|p_T - q\|^2 - 2\,(c_T - 1)\, \mathbb{E}\, p_T \cdot (q - s)

    for predictions p of the network at temperature T and q of the reference, shares s of the classes in
    training, and the factors :math:`c_T \ge 1` of a :class:`Calibration`. With c = 1 it is the refined score
    against the predictions of the reference.

    Args:
        unseen: Scores of unseen samples against the predictions of the reference.
        calibration: The calibration of the epochs so far, with this one.

    Returns:
        D, which may be negative, and the temperature.
    """
    factors = unseen.score.new_tensor(calibration.factors)
    return Refined.lowest(unseen.scores - 2 * (factors - 1) * unseen.agreements)


def combine_with_labels(reference: Refined | None, labels: ScoreSums) -> Refined:
    r"""Join the refined score s of m validation labels with D: :math:`(m\,s + 200\,D) / (m + 200)`.

    Args:
        reference: D; None for the labels by themselves.
        labels: Scores of the validation samples against their labels.

    Returns:
        Both together, and the temperature of the labels.
    """
    score, temperature = Refined.lowest(labels.scores)
    if reference is None:
        return Refined(score, temperature)
    num_labels = float(labels.num_scored[0])
    total = num_labels * score + LABELS_OF_REFERENCE * reference.score
    return Refined(total / (num_labels + LABELS_OF_REFERENCE), temperature)


def rank_disagreement(p: Tensor, q: Tensor) -> float:
    """Compute 1 - Spearman's rank correlation of two predictions for the same samples, mean over classes.

    Rank correlation does not see by how much probabilities differ, only which sample has more of a class. So it
    follows the AUC, and class weights do not move it.

    Args:
        p: Predictions, ``(N, K)``.
        q: Others, or labels, ``(N, K)``. Classes in which all are equal are left out.

    Returns:
        From 0, the same order, to 2, the opposite one; nan without two samples that differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.criterion import rank_disagreement
        >>> rank_disagreement(torch.tensor([[0.1], [0.2], [0.9]]), torch.tensor([[0.3], [0.2], [0.4]]))
        0.5
    """
    correlations = [_correlation(_ranks(a), _ranks(b)) for a, b in zip(p.double().T, q.double().T, strict=True)]
    known = [each for each in correlations if not math.isnan(each)]
    return 1 - sum(known) / len(known) if known else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Return the mean rank of each value among all."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[places].double()


def _correlation(first: Tensor, second: Tensor) -> float:
    """Return Pearson's correlation; nan where the second is constant, 0 where only the first is."""
    first, second = first - first.mean(), second - second.mean()
    if not bool(second.any()):
        return math.nan
    norm = float((first.square().sum() * second.square().sum()).sqrt())
    return float(torch.dot(first, second)) / norm if norm > 0 else 0.0
