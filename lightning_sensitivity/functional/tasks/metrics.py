"""The metrics by default: of each it is known what every label adds, and so its standard error in closed form."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric


class Measured(NamedTuple):
    """A value of N samples, which have R labels each.

    Attributes:
        value: The value on all labels.
        influences: By how much each label moves the value if a sample has that one alone, ``(R, N)``; None if that is
            unknown. The sum of their squares, in the mean over R, is the variance of the value.
        num_answers: Of how many answers it is the share that are right, or of an area, how many of the rarer class
            there are; 0 if it is neither.
    """

    value: float
    influences: Tensor | None = None
    num_answers: float = 0.0

    def minus(self, other: "Measured") -> "Measured":
        """Return the difference from another value of the same samples and labels.

        Raises:
            ValueError: If the influences of one are unknown.
        """
        if self.influences is None or other.influences is None:
            raise ValueError("Expected a number for each sample, as with `reduction='none'`")
        return Measured(self.value - other.value, self.influences - other.influences, self.num_answers)


def measure_mean(values: Tensor) -> Measured:
    """Measure a mean over samples and their labels, ``(R, N, C)``, nan where unknown."""
    is_known = ~values.isnan()
    number = is_known.sum()
    mean = values.nansum() / number
    influences = (values - mean).where(is_known, 0.0).sum(2) * (len(values) / number)
    return Measured(float(mean), influences)


class Accuracy:
    """The share of known labels that are right."""

    higher_is_better = True

    def measure(self, p: Tensor, draws: Tensor) -> Measured:
        """Measure it.

        Args:
            p: Probabilities ``(N, C)``.
            draws: Class indices ``(R, N)``, or several labels ``(R, N, L)``, nan where unknown.
        """
        if draws.ndim == 2:
            hits = (p.argmax(1) == draws)[..., None].double()
        else:
            hits = ((p > 0.5) == draws).double().where((draws == 0) | (draws == 1), torch.nan)
        return measure_mean(hits)._replace(num_answers=hits.shape[1])


class AUROC:
    """The mean of the areas under the ROC curves of each class, or label, that is known to be yes and no; nan without.

    The variance is that of DeLong, DeLong and Clarke-Pearson (1988), in O(N log N).
    """

    higher_is_better = True

    def measure(self, p: Tensor, draws: Tensor) -> Measured:
        """Measure it; arguments as for :meth:`Accuracy.measure`."""
        if draws.ndim == 2:
            yes = draws[..., None] == torch.arange(p.shape[1])
            no = ~yes
        else:
            yes, no = draws == 1, draws == 0
        yes_of, no_of = yes.sum(0).double(), no.sum(0).double()  # how many labels of each sample, (N, K)
        num_yes, num_no = yes_of.sum(0), no_of.sum(0)

        # The share of the other labels that each sample is ahead of, or behind.
        below = _below(p, torch.stack([yes_of, no_of]))
        behind, ahead = 1 - below[0] / num_yes, below[1] / num_no
        areas = (ahead * yes_of).sum(0) / num_yes  # nan without yes or no
        has_both = ~areas.isnan()
        share = len(draws) / has_both.sum()  # of a sample with one label, in the mean over classes
        of_yes = ((ahead - areas) / num_yes).where(has_both, 0.0) * share
        of_no = ((behind - areas) / num_no).where(has_both, 0.0) * share
        influences = torch.where(yes, of_yes, no * of_no).sum(2)
        fewest = torch.minimum(num_yes, num_no)[has_both].mean() / len(draws)
        return Measured(float(areas.nanmean()), influences, float(fewest))


ClosedForm: TypeAlias = Accuracy | AUROC  # measured on all labels at once, with what each of them adds
AnyMetric: TypeAlias = Metric | ClosedForm


def _below(p: Tensor, numbers: Tensor) -> Tensor:
    """Sum the numbers ``(M, N, K)`` of samples with lower predictions, and half of those with equal ones, by column."""
    p, order = p.sort(0)
    order = order.expand_as(numbers)
    numbers = numbers.gather(1, order)
    up_to, differs = numbers.cumsum(1), p[1:] != p[:-1]
    edge = torch.ones_like(p[:1], dtype=torch.bool)
    below = (up_to - numbers).where(torch.cat([edge, differs]), 0).cummax(1).values
    not_above = up_to.where(torch.cat([differs, edge]), torch.inf).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(below).scatter_(1, order, (below + not_above) / 2)
