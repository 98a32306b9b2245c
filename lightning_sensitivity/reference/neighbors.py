"""Neighbours: whether samples seem to belong to groups that nobody has named."""

import math

import torch
from torch import Tensor

from lightning_sensitivity.reference.observations import Observations, has_few_values, projection

_MOST_KNOWN, _MOST_COMPARED, _MOST_COLUMNS = 1500, 600, 500
_FAR = 6.0  # standard deviations, at which columns are cut off
_FARTHER = 0.06  # beyond a half; at most 0.054 in 240 random splits
_STANDARD_ERRORS = 4.0  # at most 2.7 in these, in 80 of 400 samples, and in 80 that a sampler repeats


def farther_share(known: Observations, new: Observations) -> float:
    """Return how often new samples are farther from their nearest known one than known ones from their nearest other.

    It is a half of samples of the same kind, and more if known samples are of persons, of whom the new ones are
    not: a sample of the same person is near. Equal samples count once, as a sampler may have repeated them.

    Args:
        known: Known samples, of which columns are compared.
        new: New samples.

    Returns:
        The share; 0 unless it is far above a half, or where there are no columns to tell.
    """
    x, y = (each.seen.get("columns") for each in (known, new))
    if x is None or y is None or x.shape[1] > _MOST_COLUMNS or has_few_values(known.seen):
        return 0.0
    x, y = _different(x)[:_MOST_KNOWN].double(), y[:_MOST_COMPARED].double()
    if min(len(x), len(y)) < 2:
        return 0.0
    of_known, of_new = _nearest_distances(x, y)
    share = _larger_share(of_new, of_known)
    num_known, num_new = len(of_known), len(of_new)
    stderr = math.sqrt((num_known + num_new + 1) / (12 * num_known * num_new))
    return share if share > 0.5 + max(_FARTHER, _STANDARD_ERRORS * stderr) else 0.0


def _nearest_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far some known samples are from the nearest other one, and new ones from the nearest known one."""
    mean, std = x.mean(0), x.std(0)
    x, y = (((each - mean) / std)[:, std > 0].clamp(-_FAR, _FAR).float() for each in (x, y))
    of_known = torch.cdist(x[:_MOST_COMPARED], x, p=1).fill_diagonal_(torch.inf).amin(1)
    return of_known, torch.cdist(y, x, p=1).amin(1)


def _different(x: Tensor) -> Tensor:
    """Return different samples, in an order as good as random, which depends on them alone."""
    place, which = torch.unique(projection({"columns": x}), return_inverse=True)
    first = torch.full((len(place),), len(x)).scatter_reduce_(0, which, torch.arange(len(x)), "amin")
    return x[first]


def _larger_share(values: Tensor, others: Tensor) -> float:
    """Return how often values are larger than others; equal ones count half."""
    order = others.sort().values
    below, up_to = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / 2 / len(order))
