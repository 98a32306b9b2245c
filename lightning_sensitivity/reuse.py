"""Clean outputs that the user's own step has computed already, so that they cost nothing."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sensitivity.dtypes import autocast_dtype, rounding_epsilon
from lightning_sensitivity.isolation import tensors_of
from lightning_sensitivity.nested import can_be_copied, tensors_in
from lightning_sensitivity.strategies import is_sharded

# A module's parameters and buffers, and how often each was written to.
_Versions = list[tuple[int, int]]


def why_not(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> str | None:
    """Why the outputs of the step can't be used, as far as that is known before it runs; None if they can.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        batch: What the loader gave.
    """
    if torch.is_inference_mode_enabled():
        return "inference tensors do not show whether they were written to"
    if getattr(pl_module, "_compiler_ctx", None) is not None or pl_module._compiled_call_impl is not None:
        return "hooks do not reach into a module that is compiled as a whole"
    if is_sharded(trainer):
        return "all processes must run a sharded model equally often"
    if not can_be_copied(batch):
        return "the batch has parts that can't be copied, and the step might write into them"
    return None


class Witness:
    """Watches the steps of a validation for forward passes on the very tensors that we would give the model.

    Until it is closed, a forward hook is on the module; one for all batches, since each new one would have compiled
    code that calls the module compiled again.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._module = pl_module
        self._signature = inspect.signature(pl_module.forward)
        self._select: Callable[[Any], Tensor] | None = None
        self._outputs: Tensor | None = None
        self.problem = ""
        self._handle = pl_module.register_forward_hook(_Hook(self), with_kwargs=True)

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        self._select = self._outputs = None

    def watch(self, arguments: tuple[tuple[Any, ...], Mapping[str, Any]], select: Callable[[Any], Tensor]) -> None:
        """Begin with a batch, in the precision in which the step will run.

        Args:
            arguments: What we would call the module with, positional and by keyword: the batch's own tensors.
            select: Gives the outputs to compare of what the module returned.

        Raises:
            TypeError: If they are no arguments of ``forward``.
        """
        self._expected = self._bound(*arguments)
        self._versions = {id(tensor): tensor._version for tensor in tensors_in(self._expected)}
        self._precision = _precision(self._module.device)
        self._state = _state_of(self._module)
        self._outputs = None
        self.problem = "the step did not call the module on the batch's own tensors"
        self._select = select

    def outputs(self) -> Tensor | None:
        """End with the batch: its outputs, if nobody has written into them, or into the module, since."""
        outputs, self._outputs, self._select = self._outputs, None, None
        if outputs is None:
            return None
        if outputs._version != self._outputs_version:
            self.problem = "the step wrote into the outputs"
        elif not self.module_is_as_before():
            self.problem = "the step wrote into the module"
        else:
            return outputs
        return None

    def module_is_as_before(self) -> bool:
        """Whether nobody has written into the module's parameters and buffers since it is watched."""
        return self._state == _state_of(self._module)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Look at a forward pass.

        Args:
            args: Its positional arguments.
            kwargs: Its other arguments.
            result: What it gave.
        """
        if self._select is None or self._outputs is not None:
            return
        try:
            arguments = self._bound(args, kwargs)
            if _is_same(arguments, self._expected):
                self._take(arguments, self._select(result).detach())
        except Exception as error:  # a step is the user's, and never to fail by us
            self.problem = f"a pass of the step can't be used ({type(error).__name__}: {error})"

    def _take(self, arguments: dict[str, Any], outputs: Tensor) -> None:
        if any(tensor._version != self._versions[id(tensor)] for tensor in tensors_in(arguments)):
            self.problem = "the step wrote into the batch"
        elif _precision(self._module.device) != self._precision:
            self.problem = "the step called the module in another precision"
        elif any(submodule.training for submodule in self._module.modules()):
            self.problem = "a part of the module is in training mode"
        else:
            self._outputs, self._outputs_version = outputs, outputs._version

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._signature.bind(*args, **kwargs).arguments)


def agree(outputs: Tensor, own: Tensor) -> bool:
    """Whether the outputs of a step are, within rounding, those of a pass of our own on the same batch.

    Whoever swaps weights, or an adapter, around the call in a step leaves no trace in the tensors' versions.

    Args:
        outputs: Those of the step.
        own: Ours.
    """
    if outputs.shape != own.shape or outputs.dtype != own.dtype:
        return False
    if not outputs.numel():
        return True
    most = 16 * rounding_epsilon(own) * own.abs().max()
    return bool((outputs - own).abs().max() <= most)  # False for nan


class _Hook:
    """Forgets its witness in copies and pickles, which a step may make of the module."""

    def __init__(self, witness: Witness | None = None) -> None:
        self._witness = None if witness is None else weakref.ref(witness)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        witness = None if self._witness is None else self._witness()
        if witness is not None:
            witness.see(args, kwargs, result)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _precision(device: torch.device) -> tuple[torch.dtype | None, torch.dtype]:
    return autocast_dtype(device), torch.get_default_dtype()


def _state_of(module: Any) -> _Versions:
    return [(id(tensor), tensor._version) for tensor in tensors_of(module) if not tensor.is_inference()]


def _is_same(value: Any, expected: Any) -> bool:
    """The same tensors at the same places, and equal values elsewhere."""
    if isinstance(value, Tensor) or isinstance(expected, Tensor):
        return value is expected
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(_is_same(value[key], expected[key]) for key in value)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_is_same, value, expected))
    return value is expected or (isinstance(value, str | int | float) and bool(value == expected))
