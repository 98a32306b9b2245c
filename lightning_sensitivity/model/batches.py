"""Find, copy and count the tensors in batches of any kind."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class _Cloneable(ABC):
    """A tensor, or an object whose class can clone it like one, such as a graph of PyTorch Geometric."""

    @abstractmethod
    def clone(self) -> object:
        """Return a copy."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Look at the class alone, since attributes of an object may be items, as in an `AttrDict`."""
        return callable(getattr(other, "clone", None))


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Clone what can be cloned in a value and its collections, and the tensors of an object that can't.

    Other objects are shared, not copied.

    Args:
        value: A batch, or a part of one.
        clone: Function that clones a tensor.
    """
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
    if isinstance(value, Mapping):
        return tensors_in([*value.values()])
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def first_of(result: object) -> object:
    """Return the first item of a tuple or list, or another object as it is."""
    return result[0] if isinstance(result, list | tuple) and result else result


def num_samples(arguments: Collection[object]) -> int:
    """Count the samples by the rows that all tensors have; 0 if that is unknown, as with lists and graphs."""
    if any(isinstance(value, list | PackedSequence) for value in arguments):  # each item may be a sample
        return 0
    tensors = [x for value in arguments for x in tensors_in(value) if x.ndim > 0 and not x.is_nested]
    numbers = {len(x) for x in tensors}
    return numbers.pop() if len(numbers) == 1 else 0


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the weights of a model."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))
