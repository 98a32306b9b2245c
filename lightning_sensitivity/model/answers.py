"""Find the labels among what a reference sees, from which it would know them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sensitivity.model.batches import has_samples
from lightning_sensitivity.model.entries import places

_FEWEST = 8  # labels that do not equal an input by chance
_CHANCE = math.log(1e4)  # one in so many columns has the values of labels in their order by chance
_ROUNDING = 1e-7  # of a correlation, in single precision


def find_answer(inputs: Mapping[str, object], labels: Tensor, counts: Tensor) -> str | None:
    """Find the first input that has a column of the labels of a batch, up to scale and shift.

    Labels of two values are not looked for, since a good flag may equal them in a batch.

    Args:
        inputs: The inputs by the names of the arguments.
        labels: The labels of N samples.
        counts: Which samples have one, ``(N,)``.

    Returns:
        The code that selects it; None if there is none.
    """
    y = labels[counts].double()[:, None].flatten(1)
    if len(y) < _FEWEST:
        return None
    for name, value in inputs.items():
        for place, _, x in places(value, name):
            if has_samples(x, len(counts)) and _holds(x.detach().cpu()[counts].double()[:, None].flatten(1), y):
                return place
    return None


def _holds(columns: Tensor, y: Tensor) -> bool:
    """Return whether a column of labels is one of the columns, and not by chance."""
    is_held = ((_standard(columns).T @ _standard(y)).abs() > 1 - _ROUNDING).any(0)
    orders = torch.tensor([_log_orders(column) for column in y.T])
    return bool((is_held & (orders > _CHANCE + math.log(max(1, columns.shape[1])))).any())


def _log_orders(column: Tensor) -> float:
    """Return the logarithm of the number of orders in which labels may come; 0 if they have two values."""
    numbers = torch.unique(column, return_counts=True)[1].double()
    if len(numbers) == 2:
        return 0.0
    return math.lgamma(len(column) + 1) - float(torch.lgamma(numbers + 1).sum())


def _standard(columns: Tensor) -> Tensor:
    """Shift and scale columns to a mean of 0 and a norm of 1; constant ones, and those with nan, to 0."""
    centred = columns - columns.mean(0)
    return (centred / centred.square().sum(0).sqrt().clamp(min=1e-30)).nan_to_num(0.0)
