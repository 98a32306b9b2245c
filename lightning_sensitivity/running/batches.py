"""What a batch of any kind holds, and where; to choose, copy and move its tensors."""

from abc import ABC
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeGuard

import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import refuse_on_error
from lightning_sensitivity.running.isolation import isolated

Place = tuple[Any, ...]  # where a value is in a batch: keys, one within the other

_TRUE = {torch.float16, torch.bfloat16, torch.float64}  # to which a Trainer converts a model and its batches

# Copies


class _Cloneable(ABC):  # noqa: B024
    """A tensor, or an object whose class can clone it like one, such as a graph of PyTorch Geometric."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Look at the class alone, since attributes of an object may be items, as in an `AttrDict`."""
        return callable(getattr(other, "clone", None))


def clone_tensors(value: Any) -> Any:
    """Clone what can be cloned in a value and its collections; all else is shared."""
    return apply_to_collection(value, _Cloneable, _clone, allow_frozen=True)


def _clone(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item.clone()


def take(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """Return some samples of a tensor; all if the indices are None, or it is one number for all samples."""
    return tensor if indices is None or tensor.ndim == 0 else tensor[indices.to(tensor.device)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the weights of a model."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def cast(network: nn.Module, x: Tensor) -> Tensor:
    """Give numbers the precision of a network, since a Trainer may have changed it."""
    dtypes = (weight.dtype for weight in network.parameters() if weight.is_floating_point())
    return x.to(next(dtypes, x.dtype)) if x.is_floating_point() else x


def move_batch(model: nn.Module, batch: object) -> Any:
    """Copy a batch that came from no Trainer to the device of a model, by the hooks of a LightningModule.

    Numbers get the precision of the model, as a Trainer gives them with ``precision="bf16-true"``.

    Raises:
        MisconfigurationException: If a hook fails.
    """
    module, batch, device = original_module(model), clone_tensors(batch), device_of(model)
    if any(weight.dtype in _TRUE for weight in model.parameters()):
        batch = apply_to_collection(batch, Tensor, partial(cast, model))
    if not hasattr(module, "transfer_batch_to_device"):  # a LightningModule, also of `pytorch_lightning`, has it
        return move_data_to_device(batch, device)

    def transfer(batch: object) -> object:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)

    what = "A hook that changes batches failed; if it asks for `self.trainer`, set `model.trainer = trainer` before"
    with refuse_on_error(what), isolated(model) as run:
        return run(transfer, batch)


# Places


class Attribute(str):
    """The name of an attribute, or of a field of a named tuple, as a step to a place."""


def at(value: Any, place: Place) -> Any:
    """Return what is at a place of a value."""
    for step in place:
        value = getattr(value, step) if isinstance(step, Attribute) else value[step]
    return value


def held_by(value: object) -> list[tuple[Any, Any]]:
    """List what a mapping, list or tuple holds, each with the step to it; of all else nothing."""
    if isinstance(value, Mapping):
        return [*value.items()]
    if not isinstance(value, list | tuple):
        return []
    steps = map(Attribute, value._fields) if hasattr(value, "_fields") else range(len(value))
    return [*zip(steps, value, strict=True)]


def tensors_in(value: object, place: Place = ()) -> list[tuple[Place, Tensor]]:
    """List the tensors in a value, and in its mappings, lists and tuples, each with its place."""
    tensors = []
    waiting = [(place, value)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, Tensor):
            tensors.append((place, item))
        else:
            waiting += [((*place, step), each) for step, each in reversed(held_by(item))]
    return tensors


def code_of(place: Place, path: str = "batch") -> str:
    """Return the code that selects a place."""
    return path + "".join(f".{step}" if isinstance(step, Attribute) else f"[{step!r}]" for step in place)


# Tensors


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that is neither nested nor sparse."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def is_floating(value: object) -> TypeGuard[Tensor]:
    """Return whether noise can be added: to dense floating tensors."""
    return is_dense(value) and value.is_floating_point()


def has_samples(x: Tensor, size: int) -> bool:
    """Return whether a tensor holds real numbers of each of N samples."""
    return is_dense(x) and not x.is_complex() and x.ndim > 0 and len(x) == size


def first_of(result: object) -> object:
    """Return the first item of a tuple or list, or another object as it is."""
    return result[0] if isinstance(result, list | tuple) and result else result


def entry(value: object, name: str) -> Any:
    """Return an entry of a mapping or an attribute of another object; None if it is not there, or a property fails."""
    if isinstance(value, Mapping):
        return value.get(name)
    with suppress(Exception):
        return getattr(value, name, None)
    return None
