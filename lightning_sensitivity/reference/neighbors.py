"""Neighbours: whether samples seem to belong to groups that nobody has named."""

import math

import torch
from scipy.stats import mannwhitneyu

from lightning_sensitivity.reference.observations import Observations, has_few_values, projection

_MOST_KNOWN, _MOST_COMPARED, _MOST_COLUMNS = 1500, 600, 500
_FAR = 6.0  # standard deviations, at which columns are cut off
_FARTHER = 0.06  # beyond a half; at most 0.054 in 240 random splits
_STANDARD_ERRORS = 4.0  # at most 2.7 in these, in 80 of 400 samples, and in 80 that a sampler repeats


def farther_share(known: Observations, new: Observations) -> float:
    """Return how often new samples are farther from their nearest known one than known ones from their nearest other.

    It is a half of samples of the same kind, and more if known samples are of persons, of whom the new ones are
    not: a sample of the same person is near. Equal samples count once, as a sampler may have repeated them, and
    equal distances half.

    Args:
        known: Known samples, of which columns are compared.
        new: New samples.

    Returns:
        The share; 0 unless it is far above a half, or where there are no columns to tell.
    """
    x, y = (each.seen.get("columns") for each in (known, new))
    if x is None or y is None or x.shape[1] > _MOST_COLUMNS or has_few_values(known.seen):
        return 0.0
    place, which = torch.unique(projection({"columns": x}), return_inverse=True)  # as good as a random order
    first = torch.full((len(place),), len(x)).scatter_reduce_(0, which, torch.arange(len(x)), "amin")
    x, y = x[first][:_MOST_KNOWN].double(), y[:_MOST_COMPARED].double()
    if min(len(x), len(y)) < 2:
        return 0.0
    mean, std = x.mean(0), x.std(0)
    x, y = (((each - mean) / std)[:, std > 0].clamp(-_FAR, _FAR).float() for each in (x, y))
    of_known = torch.cdist(x[:_MOST_COMPARED], x, p=1).fill_diagonal_(torch.inf).amin(1)  # to another one
    of_new = torch.cdist(y, x, p=1).amin(1)
    num_known, num_new = len(of_known), len(of_new)
    share = float(mannwhitneyu(of_new.numpy(), of_known.numpy()).statistic) / (num_known * num_new)
    stderr = math.sqrt((num_known + num_new + 1) / (12 * num_known * num_new))
    return share if share > 0.5 + max(_FARTHER, _STANDARD_ERRORS * stderr) else 0.0
