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
    orders = torch.zeros(y.shape[1])  # in which labels may come, their logarithms
    for index, column in enumerate(y.T):
        counts_of_values = torch.unique(column, return_counts=True)[1].double()
        if len(counts_of_values) != 2:
            orders[index] = math.lgamma(len(column) + 1) - float(torch.lgamma(counts_of_values + 1).sum())
    for name, value in inputs.items():
        for place, _, x in places(value, name):
            if not has_samples(x, len(counts)):
                continue
            columns = x.detach().cpu()[counts].double()[:, None].flatten(1)
            is_held = ((_standard(columns).T @ _standard(y)).abs() > 1 - _ROUNDING).any(0)
            if bool((is_held & (orders > _CHANCE + math.log(max(1, columns.shape[1])))).any()):
                return place
    return None


def _standard(columns: Tensor) -> Tensor:
    """Shift and scale columns to a mean of 0 and a norm of 1; constant ones, and those with nan, to 0."""
    centred = columns - columns.mean(0)
    return (centred / centred.square().sum(0).sqrt().clamp(min=1e-30)).nan_to_num(0.0)
