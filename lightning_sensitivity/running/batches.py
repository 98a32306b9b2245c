"""Find, copy and choose the tensors in batches of any kind."""

import copy
from abc import ABC
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any, TypeGuard

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

_MAX_DEPTH = 2  # of objects that are copied; what lies deeper is no batch


class _Cloneable(ABC):  # noqa: B024
    """A tensor, or an object whose class can copy it like one: a graph of PyTorch Geometric, an array, a table."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Look at the class alone, since attributes of an object may be items, as in an `AttrDict`."""
        is_array = hasattr(other, "__array__") and callable(getattr(other, "copy", None))
        return is_array or callable(getattr(other, "clone", None))


class _Holder(ABC):  # noqa: B024
    """An object of a class of its own, whose attributes may hold tensors."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Leave out collections and what is no data."""
        known = (_Cloneable, Mapping, list, tuple, set, str, type, FunctionType, nn.Module)
        return other.__dictoffset__ != 0 and not is_dataclass(other) and not issubclass(other, known)


def clone_tensors(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """Clone what can be cloned in a value and its collections, and of objects that can't what they hold.

    Objects without tensors and arrays are shared, not copied.

    Args:
        value: A batch, or a part of one.
        depth: How many objects, one within the other, are copied.
    """
    return apply_to_collection(value, (_Cloneable, _Holder), _copied, depth, allow_frozen=True)


def _copied(item: Any, depth: int) -> Any:
    if isinstance(item, Tensor):
        return item.detach().clone()
    if not isinstance(item, _Holder):
        return item.clone() if hasattr(type(item), "clone") else item.copy()
    held = {name: each for name, each in vars(item).items() if _holds_tensors(each, depth - 1)}
    if depth == 0 or not held:
        return item
    new = copy.copy(item)
    vars(new).update({name: clone_tensors(each, depth - 1) for name, each in held.items()})
    return new


def _holds_tensors(value: object, depth: int) -> bool:
    """Return whether there is something to clone in a value, or in an object within so many others."""
    if isinstance(value, Mapping):
        return _holds_tensors([*value.values()], depth)
    if isinstance(value, list | tuple):
        return any(_holds_tensors(item, depth) for item in value)
    if isinstance(value, _Holder):
        return depth > 0 and any(_holds_tensors(item, depth - 1) for item in vars(value).values())
    return isinstance(value, _Cloneable)


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that is neither nested nor sparse."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def is_floating(value: object) -> TypeGuard[Tensor]:
    """Return whether noise can be added: to dense floating tensors."""
    return is_dense(value) and value.is_floating_point()


def has_samples(x: Tensor, size: int) -> bool:
    """Return whether a tensor holds real numbers of each of N samples."""
    return is_dense(x) and not x.is_complex() and x.ndim > 0 and len(x) == size


def tensors_in(value: object) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return tensors_in([*value.values()])
    items = value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def first_of(result: object) -> object:
    """Return the first item of a tuple or list, or another object as it is."""
    return result[0] if isinstance(result, list | tuple) and result else result


def entry(value: object, name: str) -> object:
    """Return an entry of a mapping or an attribute of another object; None if it is not there."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def take(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """Return some samples of a tensor; all if the indices are None, or it is one number for all samples."""
    return tensor if indices is None or tensor.ndim == 0 else tensor[indices.to(tensor.device)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the weights of a model."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))
