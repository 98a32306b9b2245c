"""Find the labels among what a reference sees, from which it would know them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sensitivity.model.entries import holds_numbers, places

_FEWEST = 8  # labels that do not equal an input by chance
_CHANCE = math.log(1e4)  # one in so many columns has the values of labels in their order by chance
_ROUNDING = 1e-7  # of a correlation, in single precision


def find_answers(inputs: Mapping[str, object], labels: Tensor, counts: Tensor) -> tuple[list[str], list[str]]:
    """Find inputs that have a column of the labels of a batch, up to scale and shift.

    Args:
        inputs: The inputs by the names of the arguments.
        labels: The labels of N samples.
        counts: Which samples have one, ``(N,)``.

    Returns:
        The places of those that hold labels, and of those that may: labels have two values, which a good flag
        may equal in a batch.
    """
    y = labels[counts].double()[:, None].flatten(1)
    if len(y) < _FEWEST:
        return [], []
    is_flag = torch.tensor([len(torch.unique(column)) == 2 for column in y.T])
    orders = torch.tensor([_log_orders(column) for column in y.T])
    certain, possible = list[str](), list[str]()
    for name, value in inputs.items():
        for place, _, x in places(value, name):
            columns = _columns(x, counts)
            held = _held(columns, y) & (orders > _CHANCE + math.log(max(1, columns.shape[1])))
            if bool((held & ~is_flag).any()):
                certain.append(place)
            elif bool(held.any()):
                possible.append(place)
    return certain, possible


def _columns(x: Tensor, counts: Tensor) -> Tensor:
    """Return numbers with a row for each sample as columns, those of samples that count; else none."""
    is_dense = x.layout == torch.strided and not x.is_nested and not x.is_complex()
    if not is_dense or x.ndim == 0 or len(x) != len(counts) or not holds_numbers(x):
        return torch.zeros(int(counts.sum()), 0, dtype=torch.float64)
    return x.detach().cpu()[counts].double()[:, None].flatten(1)


def _held(columns: Tensor, y: Tensor) -> Tensor:
    """Return which columns of labels are one of the columns, up to scale and shift, ``(C,)``."""
    return ((_standard(columns).T @ _standard(y)).abs() > 1 - _ROUNDING).any(0)


def _log_orders(column: Tensor) -> float:
    """Return the logarithm of the number of orders in which labels may come."""
    numbers = torch.unique(column, return_counts=True)[1].double()
    return math.lgamma(len(column) + 1) - float(torch.lgamma(numbers + 1).sum())


def _standard(columns: Tensor) -> Tensor:
    """Shift and scale columns to a mean of 0 and a norm of 1; constant ones, and those with nan, to 0."""
    centred = columns - columns.mean(0)
    return (centred / centred.square().sum(0).sqrt().clamp(min=1e-30)).nan_to_num(0.0)
