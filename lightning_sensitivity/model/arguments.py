"""Arguments of users, checked; batches, copied and described."""

import copy
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def check_argument(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise MisconfigurationException, saying what the argument should be, unless it is valid."""
    if not valid:
        raise MisconfigurationException(f"`{name}` should be {expected}, got {value!r}.")


def check_int(name: str, value: object, minimum: int) -> None:
    """Require an int (not a bool) of at least a minimum."""
    valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum
    check_argument(name, value, valid, f"an int of {minimum} or more")


def check_selector(name: str, value: object, may_be_list: bool = False) -> None:
    """Require what chooses a part of a batch or of an output: a key, an index, a function or None."""
    keys = value if may_be_list and isinstance(value, list | tuple) and value else [value]
    are_keys = all(isinstance(key, str | Integral) and not isinstance(key, bool) and key != "" for key in keys)
    valid = value is None or callable(value) or (are_keys and len(set(keys)) == len(keys))
    expected = f"a key, an index,{' a list of different ones,' * may_be_list} a function or None"
    check_argument(name, value, valid, expected)


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Copy a batch: clone the tensors in its tuples, lists and dicts, and deep-copy other objects.

    Args:
        value: The batch.
        clone: Gives what takes the place of a tensor.
    """
    if isinstance(value, Tensor):
        return clone(value)
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: clone_tensors(item, clone) for key, item in value.items()})
        return new
    if type(value) in (list, tuple) or hasattr(value, "_fields"):
        items = [clone_tensors(item, clone) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


def is_floating(tensor: Tensor) -> bool:
    """Tell whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def describe(value: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" + ("" if value.is_nested else f" and shape {tuple(value.shape)}")
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(f'{key!r}: {describe(item)}' for key, item in value.items())}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}: {', '.join(map(describe, value[:5]))}"
    return type(value).__name__
