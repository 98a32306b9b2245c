"""How sure a value is, and what a reference and labels say together."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median_high
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sensitivity.functional.expected import WORTH

SURE_AS = 1000  # labels that err as a reference does of a network that errs elsewhere
SURE_OF_PART = 30  # the same of patches or words, if a network may see more; chosen on the design half
_BLOCKS = 10  # of samples, each of which is left out once
VALIDATIONS = 3  # of which the median says as how many labels a reference counts
_CONTRADICTION = 2.0  # standard errors by which labels and a reference differ, from which on it counts for less


class Estimate(NamedTuple):
    """A value that was measured on samples.

    Attributes:
        value: The value.
        variance: Its variance if these samples have one label each; nan if that is unknown.
        size: How many samples there are; those of one group count as one.
    """

    value: float
    variance: float
    size: int


class Combined(NamedTuple):
    """What an expectation and labels say together.

    Attributes:
        value: The value.
        stderr: Its standard error; nan if that is unknown.
        worth: As how many labels the reference counts by this value alone.
        is_contradicted: Whether labels contradict the reference.
    """

    value: float
    stderr: float
    worth: float
    is_contradicted: bool


def combine(
    expected: Estimate | None,
    known: Estimate | None,
    num_training: int = 0,
    sure_as: float = SURE_AS,
    earlier: Sequence[float] = (),
) -> Combined:
    """Combine what a reference expects, what labels say, or both; one of them may be None.

    The variance by the reference is the sum of three: of as many labels as there are unseen samples, as it was
    calibrated by, and as it is sure of a network that may err elsewhere. Beside labels it counts as 1,000, unless
    they contradict it: as the median of some validations says, or its weight would choose the epoch.

    Args:
        expected: The value to expect by the reference.
        known: The value on labels.
        num_training: By how many left-out labels the reference was calibrated; those of one group count as one.
        sure_as: As how many labels it is sure of a network.
        earlier: Its worth in earlier validations.
    """
    parts = []  # weights, values and variances
    own = float(WORTH) if expected is None or known is None else worth_beside(expected, known)
    worth = median_high([*earlier, own][-VALIDATIONS:])
    if expected is not None:
        factor = 1 + expected.size / num_training + expected.size / min(worth, sure_as)
        parts.append((worth, expected.value, factor * expected.variance))
    if known is not None:
        variance = known.variance
        if expected is not None and not variance > 0:  # of few labels, which tell nothing of it
            variance = expected.variance * expected.size / known.size
        parts.append((known.size, known.value, variance))
    total = sum(weight for weight, _, _ in parts)
    value = sum(weight * value for weight, value, _ in parts) / total
    stderr = math.sqrt(sum(weight**2 * variance for weight, _, variance in parts)) / total
    return Combined(value, stderr or math.nan, own, worth < WORTH)  # 0 where samples say nothing of their spread


def worth_beside(expected: Estimate, known: Estimate, least: float = _CONTRADICTION) -> float:
    """Return as how many labels a reference counts beside labels: 1,000, unless they contradict it.

    Where both differ by more than chance, its variance is what the difference allows.

    Args:
        expected: The value to expect by the reference.
        known: The value on labels.
        least: By how many standard errors both differ, from which on it counts for less.
    """
    spread = np.fmax(expected.variance * expected.size, known.variance * known.size)  # of a label; of few it may be 0
    difference, chance = (expected.value - known.value) ** 2, spread / known.size
    if not difference > least**2 * chance:
        return WORTH
    return min(WORTH, max(1.0, float(spread / (difference - chance))))


def one_draw(draws: Tensor, groups: Tensor | None = None) -> Tensor:
    """Return one of several labels of each sample, taken at random, ``(1, N, ...)``: a sample as if it were labelled.

    Args:
        draws: Labels, ``(R, N, ...)``, in an order that goes from low to high.
        groups: The number of the group of each, ``(N,)``, whose labels are alike; None without groups.
    """
    samples = torch.arange(draws.shape[1])
    which = torch.randint(len(draws), samples.shape, generator=torch.Generator().manual_seed(0))
    return draws[which[_units(len(samples), groups)], samples][None]


def _units(num_samples: int, groups: Tensor | None) -> Tensor:
    """Number what is independent: groups, or samples."""
    return torch.arange(num_samples) if groups is None else torch.unique(groups, return_inverse=True)[1]


def jackknife(
    measure: Callable[[Tensor], Mapping[str, float]], num_samples: int, groups: Tensor | None
) -> dict[str, float]:
    """Estimate the variance of values of labelled samples, by leaving out one of ten blocks of them after the other.

    Samples of one group are in one block. The variance is that of any metric (Efron and Tibshirani, 1993).

    Args:
        measure: Computes values by name, of samples by their indices.
        num_samples: N.
        groups: The number of the group of each, ``(N,)``; None without groups.

    Returns:
        The variances by name, of the values that are there whichever block is left out.
    """
    units = _units(num_samples, groups)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(torch.unique(units)), generator=generator)  # since data may have a period
    blocks = order[units] % _BLOCKS
    numbers = torch.unique(blocks)
    if len(numbers) < 2:  # without one nothing is left
        return {}
    found = [measure((blocks != block).nonzero()[:, 0]) for block in numbers]
    names = set.intersection(*map(set, found))
    values = {name: torch.tensor([each[name] for each in found]).double() for name in names}
    return {name: (len(found) - 1) * float(each.var(correction=0)) for name, each in values.items()}
