"""Clean outputs that the user's own step has computed already, so that they cost nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sensitivity.nested import entries, tensors_in

# A module's parameters and buffers, and how often each was written to.
_Versions = list[tuple[int, int]]


def why_not(pl_module: pl.LightningModule, batch: Any) -> str | None:
    """Why the outputs of the step can't be used, as far as that is known before it runs; None if they can.

    Args:
        pl_module: The module.
        batch: What the loader gave.
    """
    if torch.is_inference_mode_enabled():
        return "inference tensors do not show whether they were written to"
    if getattr(pl_module, "_compiler_ctx", None) is not None or pl_module._compiled_call_impl is not None:
        return "hooks do not reach into a module that is compiled as a whole"
    if not _is_plain(batch):
        return "the batch has parts that can't be copied, and the step might write into them"
    return None


class Witness:
    """Watches a step for a forward pass in which the model got the very tensors that we would give it.

    Until it is closed, a forward hook is on the module. Make it in the precision in which the step will run.

    Args:
        pl_module: The module.
        arguments: What we would call it with, positional and by keyword: the batch's own tensors.
        select: Gives the outputs to compare of what the module returned.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
        select: Callable[[Any], Tensor],
    ) -> None:
        self._module, self._select = pl_module, select
        self._signature = inspect.signature(pl_module.forward)
        self._expected = self._bound(*arguments)
        self._versions = {id(tensor): tensor._version for tensor in tensors_in(self._expected)}
        self._precision = _precision(pl_module.device)
        self._state: _Versions = []
        self._outputs: Tensor | None = None
        self._outputs_version = 0
        self.problem = "the step did not call the module on the batch's own tensors"
        self._handle = pl_module.register_forward_hook(self._see, with_kwargs=True)

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def outputs(self) -> Tensor | None:
        """The outputs, if they can be used: nobody has written into them, or into the module, since."""
        if self._outputs is None:
            return None
        if self._outputs._version != self._outputs_version:
            self.problem = "the step wrote into the outputs"
        elif self._state != _state_of(self._module):
            self.problem = "the step wrote into the module"
        else:
            return self._outputs
        return None

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._outputs is not None:
            return
        try:
            arguments = self._bound(args, kwargs)
        except TypeError:  # a wrapper's call of the step itself
            return
        if not _is_same(arguments, self._expected):
            return
        if any(tensor._version != self._versions[id(tensor)] for tensor in tensors_in(arguments)):
            self.problem = "the step wrote into the batch"
        elif _precision(module.device) != self._precision:
            self.problem = "the step called the module in another precision"
        elif any(submodule.training for submodule in module.modules()):
            self.problem = "a part of the module is in training mode"
        else:
            self._outputs = self._select(result).detach()
            self._outputs_version = self._outputs._version
            self._state = _state_of(module)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._signature.bind(*args, **kwargs).arguments)


def _precision(device: torch.device) -> tuple[Any, ...]:
    kind = device.type
    is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return is_autocast, torch.get_autocast_dtype(kind) if is_autocast else None, torch.get_default_dtype()


def _state_of(module: Any) -> _Versions:
    tensors = [*module.parameters(), *module.buffers()]
    return [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]


def _is_plain(value: Any) -> bool:
    """Whether `copied` gives a value that shares nothing with it that can be written to."""
    if value is None or isinstance(value, Tensor | str | bytes | int | float):
        return True
    if (named := entries(value)) is not None:
        return all(map(_is_plain, named.values()))
    return isinstance(value, list | tuple) and all(map(_is_plain, value))


def _is_same(value: Any, expected: Any) -> bool:
    """The same tensors at the same places, and equal values elsewhere."""
    if isinstance(value, Tensor) or isinstance(expected, Tensor):
        return value is expected
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(_is_same(value[key], expected[key]) for key in value)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_is_same, value, expected))
    return value is expected or (isinstance(value, str | int | float) and bool(value == expected))
