"""Find, copy and count the tensors in batches of any kind."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor


@runtime_checkable
class _Cloneable(Protocol):
    """A tensor, or an object that can be cloned like one, such as a graph of PyTorch Geometric."""

    def clone(self) -> object:
        """Return a copy."""


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Clone what can be cloned in a value and its collections, and the tensors of an object that can't.

    Other objects are shared, not copied.

    Args:
        value: A batch, or a part of one.
        clone: Function that clones a tensor.
    """
    if isinstance(value, Tensor):  # the usual case
        return clone(value)
    attributes = {} if isinstance(value, _Cloneable) or is_dataclass(value) else getattr(value, "__dict__", {})
    tensors = {name: clone(item) for name, item in attributes.items() if isinstance(item, Tensor)}
    if tensors:
        value = copy.copy(value)
        vars(value).update(tensors)
        return value

    def copy_item(item: _Cloneable) -> object:
        return clone(item) if isinstance(item, Tensor) else item.clone()

    return apply_to_collection(value, _Cloneable, copy_item, allow_frozen=True)


def is_floating(tensor: Tensor) -> bool:
    """Check whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def tensors_in(value: object) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items_of(value) for tensor in tensors_in(item)]


def _items_of(value: object) -> Iterable[object]:
    """Return the items of a mapping, tuple or list; nothing of another object."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def first_of(result: object) -> object:
    """Return the first item of a tuple or list, or another object as it is."""
    return result[0] if isinstance(result, list | tuple) and result else result


def num_samples(batch: object, arguments: Iterable[object]) -> int:
    """Count the samples: rows of the first tensor, or items of a list that has a tensor for each sample."""
    known = _numbers_of_rows(_items_of(batch))
    for value in arguments:
        rows = _numbers_of_rows(tensors_in(value))
        if rows:
            return len(value) if _is_list_of_samples(value, rows, known) else rows[0]
    return 0


def _is_list_of_samples(value: object, rows: list[int], known: list[int]) -> TypeGuard[list[object]]:
    """Return whether a list has a tensor for each sample, judging by the rows of others in the batch."""
    if not isinstance(value, list) or rows[0] in known:
        return False
    return len(value) in known or len(set(rows)) > 1


def _numbers_of_rows(values: Iterable[object]) -> list[int]:
    return [len(x) for x in values if isinstance(x, Tensor) and x.ndim > 0 and not x.is_nested]
