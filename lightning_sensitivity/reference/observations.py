"""Observations: samples, their labels and groups; which are the same one, and which of many a reference knows."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import in_32_bits, number_units
from lightning_sensitivity.reference.blocks import spread
from lightning_sensitivity.reference.kinds import KINDS, MOST, Array, Seen, join_seen, rows_of

_MAX_LABELS = 10_000_000  # samples times classes
_CHUNK = 500  # samples that are projected at a time
_FEW_VALUES = 100  # in each column of a table of categories
_FEW_COMBINATIONS = 10  # of them, for each sample
_CONTRADICTORY = 0.05  # share of the variance of labels that is among equal samples
_REPEATED = 0.1  # share of new samples that are known ones, beyond that of samples that are equal by chance

_MOST_KNOWN, _MOST_COMPARED, _MOST_COLUMNS = 1500, 600, 500
_FAR = 6.0  # standard deviations, at which columns are cut off
_FARTHER = 0.06  # beyond a half; at most 0.054 in 240 random splits
_STANDARD_ERRORS = 4.0  # at most 2.7 in these, in 80 of 400 samples, and in 80 that a sampler repeats


@dataclass(eq=False)
class Observations:
    """What is known of samples, which travels as one thing.

    Attributes:
        seen: What a reference sees of them, by kind; empty if that is nothing.
        labels: Their labels, ``(N,)`` or ``(N, C)``; ``(N, 0)`` if none are known.
        groups: The number of the group of each, ``(N,)``; None without groups.
    """

    seen: Seen
    labels: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    @cached_property
    def projected(self) -> Tensor:
        """The :func:`projection` of each, ``(N,)``, computed once."""
        return projection(self.seen)

    def take(self, indices: Tensor) -> "Observations":
        """Return some of the samples, by their indices, or a flag for each."""
        groups = None if self.groups is None else self.groups[indices]
        return Observations(rows_of(self.seen, indices), self.labels[indices], groups)

    @staticmethod
    def join(parts: "Sequence[Observations]") -> "Observations":
        """Concatenate the samples of several batches.

        Raises:
            ValueError: As by :func:`join_seen`.
        """
        if len(parts) == 1 and parts[0].seen:  # no copy
            return parts[0]
        groups = [part.groups for part in parts if part.groups is not None]
        labels = torch.cat([part.labels for part in parts])
        return Observations(join_seen([part.seen for part in parts]), labels, torch.cat(groups) if groups else None)


def max_samples(seen: Seen, num_columns: int) -> int:
    """Return how many samples are worth keeping for a reference.

    Of tables a forest learns from as many as this, but from at most 2.5 million numbers, and 500,000 times
    classes; ridge regression takes 10,000 of any kind. ``Reference.num_samples_`` tells how many were taken.

    Args:
        seen: What is seen of one or more samples.
        num_columns: The number of classes, or of targets.
    """
    most = max((KINDS[kind].most_of(x) for kind, x in seen.items()), default=MOST)
    return min(most, max(1, _MAX_LABELS // num_columns))


def choose_different(samples: Observations, num_columns: int, task: Task) -> tuple[Tensor, Observations]:
    """Choose different samples with labels, in an order that depends on them alone, with their mean labels.

    Samples are sorted by a random projection, which equal ones share. A sampler with replacement draws a
    sample repeatedly: that is no second observation, and a reference that leaves one of them out would still
    know its label. Equal samples of different groups are different.

    Args:
        samples: Samples, with labels as the task takes them.
        num_columns: C, the number of columns of the labels' matrix.
        task: The task.

    Returns:
        Which samples they are, ``(M,)``, and these, with the matrix of their labels, ``(M, C)``.
    """
    seen, labels = samples.seen, samples.labels
    group = torch.zeros(len(samples), dtype=torch.int64) if samples.groups is None else samples.groups
    doubles = [_projected(x - x.float()) for x in seen.values() if x.dtype == torch.float64]  # what 32 bits leave out
    keys = samples.projected, *doubles, group
    order = torch.from_numpy(np.lexsort([each.numpy() for each in (_projected(labels), *reversed(keys))]))
    order = order[task.has_label(labels[order])]
    order = order[spread(len(order), max(1, _MAX_LABELS // num_columns))]
    y = task.label_matrix(labels[order], num_columns).double()
    is_other = torch.stack([key[order].diff() != 0 for key in keys]).any(0)  # than the one before
    first = torch.cat([is_other.new_ones(1), is_other])
    which = first.cumsum(0) - 1
    means = _sums(y.nan_to_num(), which) / _sums((~y.isnan()).to(y), which)  # nan of none
    within, total = (means[which] - y).square().nansum(), (y - y.nanmean(0)).square().nansum()
    differ = [*seen] == ["columns"] and bool(within > _CONTRADICTORY * total)
    if not has_few_values(seen, labels_differ=differ):
        order, y = order[first], means
    chosen = spread(len(order), max_samples(seen, num_columns))
    return order[chosen], replace(samples.take(order[chosen]), labels=y[chosen])


def has_few_values(seen: Seen, labels_differ: bool = False) -> bool:
    """Return whether samples are rows of categories, of which different ones may be equal.

    Args:
        seen: What is seen of the samples.
        labels_differ: Whether equal samples have different labels, so that they are hardly the same one.
    """
    if not seen.keys() <= {"columns", "tokens"}:
        return False
    combinations = 0.0  # their logarithm
    for column in chain.from_iterable(map(torch.t, seen.values())):
        num_values = len(torch.unique(column))
        combinations += math.log(num_values)
        is_many = combinations > math.log(_FEW_COMBINATIONS * len(column)) and not labels_differ
        if num_values > _FEW_VALUES or is_many:
            return False
    return True


def projection(seen: Seen) -> Tensor:
    """Return a number for each sample, ``(N,)``, which equal ones share, and different ones hardly ever.

    It is a random projection of the bits of numbers in single precision, and exact; padding of tokens adds
    nothing.
    """
    return torch.stack([_projected(values, seed) for seed, values in enumerate(seen.values())]).sum(0).double()


def _projected(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randint(-(2**62), 2**62, (values[0].numel(),), generator=generator)
    shift = 0 if values.is_floating_point() else 1  # of the padding, -1
    sums = []
    for part in torch.split(values[:, None].flatten(1), _CHUNK):
        bits = (part.float() + shift).view(torch.int32).long()
        sums.append((bits * direction).sum(1))
    return torch.cat(sums)


def repeated_share(new: Tensor, known: Tensor) -> float:
    """Return which share of new samples are known ones; 0 unless it is far above that by chance.

    Args:
        new: The projection of new samples, ``(M,)``.
        known: That of known ones, ``(N,)``, which are equal by chance as often as they recur among
            themselves.
    """
    share = known_share(new, known)
    counts = torch.unique(known, return_counts=True)[1]
    by_chance = int(counts[counts > 1].sum()) / len(known)
    return share if share > by_chance + _REPEATED else 0.0


def largest_difference(known: Tensor, new: Tensor) -> tuple[int, float]:
    """Return the column whose mean differs most between samples, and by how many standard errors.

    Args:
        known: Columns of some samples, ``(N, D)``, or the means of groups.
        new: The same columns of others, ``(M, D)``.
    """
    x, y = known.double(), new.double()
    of_all = torch.cat([x, y]).var(0) * (1 / len(x) + 1 / len(y))
    of_each = x.var(0, correction=0) / len(x) + y.var(0, correction=0) / len(y)
    variances = of_all.maximum(of_each)  # that of each is larger where few samples make a mean
    sizes = ((x.mean(0) - y.mean(0)).abs() / variances.sqrt()).where(variances > 0, 0.0)
    return int(sizes.argmax()), float(sizes.max())


# Neighbours: whether samples seem to belong to groups that nobody has named


def farther_share(known: Observations, new: Observations) -> float:
    """Return how often new samples are farther from their nearest known one than known ones from their nearest other.

    It is a half of samples of the same kind, and more if known samples come from people who are absent from the new
    ones: a sample of the same person is near. Equal samples count once, as a sampler may have repeated them, and
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


# Groups: samples that resemble each other, such as those of a patient, and what is counted by them


def group_numbers(groups: Array) -> Tensor:
    """Return a number for the group of each sample, ``(N,)``, which is the same in every process and batch.

    Args:
        groups: Numbers or strings, ``(N,)`` or ``(N, 1)``: a tensor, an array, a column or a list.

    Raises:
        ValueError: If there is not one for each sample, or some are None or nan.
    """
    if isinstance(groups, Tensor):
        groups = in_32_bits(groups).detach().cpu()
    # A list as objects: of strings and nan, NumPy would make the string "nan".
    names = np.asarray(groups, dtype=object if isinstance(groups, list | tuple) else None)
    if names.ndim == 0 or names.size != len(names):
        raise ValueError(f"Expected groups to be numbers or strings, one per sample, but got shape {names.shape}.")
    return torch.tensor([*map(_number_of, names.ravel())], dtype=torch.int64)


def _number_of(name: Any) -> int:
    """Return whole numbers unchanged, and a digest of the string form of anything else."""
    if isinstance(name, np.generic | Tensor):
        name = name.item()
    if _is_missing(name):  # all of these would become one group
        raise ValueError("Expected each sample to have a group, but some are None or nan: give them one of their own.")
    if isinstance(name, int | float) and name // 1 == name and abs(name) < 2**63:
        return int(name)
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") - 2**63


def _is_missing(name: object) -> bool:
    """Return whether a name is None, nan, or what pandas and NumPy have in its place, which equals nothing."""
    try:
        return name is None or bool(name != name)
    except TypeError:  # of `pandas.NA`
        return True


def count_groups(groups: Tensor | None, number: int) -> int:
    """Count what is independent: groups, or, without any, a number of samples."""
    return number if groups is None else len(torch.unique(groups))


def group_means(values: Tensor, groups: Tensor | None) -> Tensor:
    """Return the mean values of each group, ``(G, D)``, which are independent; without groups, the values.

    Args:
        values: Values ``(N, D)``.
        groups: The number of the group of each, ``(N,)``; None without groups.
    """
    if groups is None:
        return values
    numbers = number_units(groups, len(values))
    return _sums(values, numbers) / numbers.bincount()[:, None]


def _sums(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the sums of values ``(N, ...)`` that have the same number, of 0 to G - 1, ``(G, ...)``."""
    return values.new_zeros(len(numbers.bincount()), *values.shape[1:]).index_add_(0, numbers, values)


def known_share(new: Tensor | None, known: Tensor | None) -> float:
    """Return which share of new samples are of known groups; 0 without groups."""
    return 0.0 if new is None or known is None else float(torch.isin(new, known).double().mean())


def stderr_of_mean(values: Tensor, groups: Tensor | None) -> float:
    """Compute one standard error of the mean of values ``(N,)``, clustered by group; nan below two.

    Args:
        values: Values ``(N,)``.
        groups: As for :func:`group_means`.
    """
    number = count_groups(groups, len(values))
    if number < 2:
        return math.nan
    sums = _sums(values - values.mean(), number_units(groups, len(values)))
    return float((sums.square().sum() * number / (number - 1)).sqrt() / len(values))
