"""Groups: samples that resemble each other, such as those of a patient, and what is counted by them."""

import hashlib
import math
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import in_32_bits
from lightning_sensitivity.reference.kinds import Array

_UNKNOWN = "Expected each sample to have a group, but some are None, nan or inf: give them one of their own."
_EXACT = 2.0**53  # below, whole numbers in double precision are exact


def group_numbers(groups: Array) -> Tensor:
    """Return a number for the group of each sample, ``(N,)``, which is the same in every process and batch.

    Args:
        groups: Numbers or strings, ``(N,)`` or ``(N, 1)``: a tensor, an array, a column or a list.

    Raises:
        ValueError: If there is not one for each sample, or some are nan.
    """
    may_lack_some = isinstance(groups, list | tuple) or getattr(getattr(groups, "dtype", None), "kind", "") == "O"
    if may_lack_some and any(map(is_missing, groups)):  # they would become a group of their own
        raise ValueError(_UNKNOWN)
    names = np.asarray(in_32_bits(groups).detach().cpu() if isinstance(groups, Tensor) else groups)
    if names.ndim == 0 or names.size != len(names):
        raise ValueError(f"Expected groups to be numbers or strings, one a sample, but got shape {names.shape}.")
    names = names.ravel()
    if names.dtype.kind == "O":  # numbers that are kept as objects are numbers
        names = np.array(names.tolist())
    if names.dtype.kind in "biu":
        return torch.from_numpy(names.astype(np.int64))
    if names.dtype.kind in "mM" and np.isnat(names).any():
        raise ValueError(_UNKNOWN)
    if names.dtype.kind == "f":  # whole numbers as they are, and of others the bits
        if not np.isfinite(names).all():
            raise ValueError(_UNKNOWN)
        found = torch.from_numpy(names.astype(str).astype(np.float64))  # 0.1 is the same number in any precision
        is_whole = (found == found.round()) & (found.abs() < _EXACT)
        return torch.where(is_whole, found.long(), found.view(torch.int64))
    digests = [hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(each, "big") - 2**63 for each in digests], dtype=torch.int64)


def is_missing(name: object) -> bool:
    """Return whether a name is None, nan, or what pandas and NumPy have in its place, which equals nothing."""
    with suppress(ValueError, RuntimeError):  # of an array
        try:
            return name is None or bool(name != name)
        except TypeError:  # of `pandas.NA`
            return True
    return False


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
    which = torch.unique(groups, return_inverse=True)[1]
    counts = which.bincount()
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, which, values)
    means: Tensor = sums / counts[:, None]
    return means


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
    if groups is None:
        return float(values.std() / math.sqrt(number))
    which = torch.unique(groups, return_inverse=True)[1]
    sums = values.new_zeros(number).index_add_(0, which, values - values.mean())
    return float((sums.square().sum() * number / (number - 1)).sqrt() / len(values))
