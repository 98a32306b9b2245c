"""Labels that are none of the task, such as another ``ignore_index``, and what to write for them."""

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import IGNORED, Task

_MOST = 3  # values that are no label, and may each mean that there is none
_TO_IGNORE = "to be ignored"  # in a message on such a value
_SAYS_HOW = "`targets=lambda"


def without_odd(labels: Tensor, task: Task, num_columns: int) -> tuple[Tensor, list[float]]:
    """Ignore labels that are none of the task, unless they have many values.

    Args:
        labels: The labels.
        task: The task.
        num_columns: How many columns their matrix has.

    Returns:
        The labels, and these values.
    """
    is_odd = task.is_odd(labels, num_columns)
    values = torch.unique(labels[is_odd]).tolist() if bool(is_odd.any()) else []
    if not 0 < len(values) <= _MOST:
        return labels, []
    known = labels if labels.is_floating_point() else labels.long()
    return known.where(~is_odd, IGNORED), values


def advised(message: str, labels: Tensor, task: Task, num_columns: int, place: str) -> str:
    """Return a message on labels that do not fit, with their place and, if one value does not, what to write."""
    message = message.replace("batch[1]", place)
    if _TO_IGNORE not in message or _SAYS_HOW in message:
        return message
    odd = torch.unique(labels[task.is_odd(labels, num_columns)]).tolist()
    if len(odd) != 1:
        return message
    if odd[0] == num_columns and bool((labels != 0).all()):
        return f"{message}. If classes begin at 1, set `targets=lambda batch: {place} - 1`"
    return f"{message}. If {odd[0]:g} means that there is none, set {ignoring(odd[0], place, labels.dtype)}"


def ignoring(value: float, place: str, dtype: torch.dtype) -> str:
    """Say what to write to ignore a value."""
    integers = f"{place}.long()" if dtype == torch.uint8 else place  # which has no -100
    return f"{_SAYS_HOW} batch: {integers}.where({place} != {value:g}, {IGNORED})`"
