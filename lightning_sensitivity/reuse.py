"""Clean outputs that the user's own step has computed already, so that they cost nothing."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sensitivity.dtypes import accumulation_dtype, autocast_dtype
from lightning_sensitivity.isolation import tensors_of
from lightning_sensitivity.nested import copied, entries, is_plain, tensors_in
from lightning_sensitivity.strategies import is_sharded

WROTE_INTO_MODULE = "the step wrote into the module, or ran it with other weights"
_NOTHING = object()

# A module's parameters and buffers, how often each was written to, and where its values are.
_State = list[tuple[int, int, int]]


def why_not(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    """Why the outputs of the step can't be used, as far as that is known before it runs; None if they can.

    Args:
        trainer: The Trainer.
        pl_module: The module.
    """
    if torch.is_inference_mode_enabled():
        return "inference tensors do not show whether they were written to"
    if getattr(pl_module, "_compiler_ctx", None) is not None or pl_module._compiled_call_impl is not None:
        return "hooks do not reach into a module that is compiled as a whole"
    if is_sharded(trainer):
        return "all processes must run a sharded model equally often"
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
        self._forget()
        self.problem = ""
        self._handle = pl_module.register_forward_hook(_Hook(self), with_kwargs=True)

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()
        self._forget()

    def _forget(self) -> None:
        self._is_watching, self._result = False, _NOTHING
        # These hold a batch in memory.
        self._expected: dict[str, Any] = {}
        self._copies: Sequence[tuple[Tensor, Tensor]] = ()  # alive, so that no other tensor gets the id of one
        self._originals: dict[int, Tensor] = {}

    def watch(
        self, arguments: tuple[tuple[Any, ...], Mapping[str, Any]], copies: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Begin with a batch, in the precision in which the step will run.

        Args:
            arguments: What we would call the module with, positional and by keyword.
            copies: Our tensors among them, and the batch's own ones. Those that somebody has written into since they
                were copied are copies no more.

        Raises:
            TypeError: If they are no arguments of ``forward``, or no tensor is among them, so that any pass on equal
                values would be taken for the step's.
        """
        self._expected = self._bound(*arguments)
        if not tensors_in(self._expected):
            raise TypeError("no tensor")
        self._copies = copies
        self._originals = {id(own): given for own, given in copies if own is given or own._version == 0}
        self._versions = {id(given): given._version for given in self._originals.values()}
        self._precision = _precision(self._module.device)
        self._state = _state_of(self._module)
        self._result = _NOTHING
        self.problem = "the step did not call the module on the batch's own tensors"
        self._is_watching = True

    def result(self) -> Any:
        """End with the batch: a copy of what the module returned in the step, or None if it can't be used."""
        result = self._result
        self._forget()
        if result is _NOTHING:
            return None
        if self._state != _state_of(self._module):
            self.problem = WROTE_INTO_MODULE
            return None
        return result

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Look at a forward pass.

        Args:
            args: Its positional arguments.
            kwargs: Its other arguments.
            result: What it gave.
        """
        if not self._is_watching or self._result is not _NOTHING:
            return
        try:
            arguments = self._bound(args, kwargs)
            if self._is_same(arguments, self._expected):
                self._take(arguments, result)
        except Exception as error:  # a step is the user's, and never to fail by us
            self.problem = f"a pass of the step can't be used ({type(error).__name__}: {error})"

    def _take(self, arguments: dict[str, Any], result: Any) -> None:
        if any(tensor._version != self._versions[id(tensor)] for tensor in tensors_in(arguments)):
            self.problem = "the step wrote into the batch"
        elif self._state != _state_of(self._module):  # it may put back what it had there
            self.problem = WROTE_INTO_MODULE
        elif _precision(self._module.device) != self._precision:
            self.problem = "the step called the module in another precision"
        elif any(submodule.training for submodule in self._module.modules()):
            self.problem = "a part of the module is in training mode"
        elif not is_plain(result):
            self.problem = "what the module returned is no plain container of tensors, and the step might write into it"
        else:
            with torch.inference_mode(False), torch.no_grad():
                self._result = copied(result)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def _is_same(self, value: Any, expected: Any) -> bool:
        """The batch's own tensors at the places of our copies, and equal values elsewhere."""
        if isinstance(value, Tensor) or isinstance(expected, Tensor):
            return isinstance(value, Tensor) and value is self._originals.get(id(expected))
        if (named := entries(value)) is not None and (others := entries(expected)) is not None:
            return named.keys() == others.keys() and all(self._is_same(named[key], others[key]) for key in named)
        if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
            return len(value) == len(expected) and all(map(self._is_same, value, expected))
        return value is expected or (isinstance(value, str | int | float) and bool(value == expected))


def copies_of(batch: Any, own: Any) -> list[tuple[Tensor, Tensor]]:
    """Which tensor is a copy of which.

    Args:
        batch: What the loader gave.
        own: What :func:`~lightning_sensitivity.nested.copied` has just made of it.
    """
    return list(zip(tensors_in(own), tensors_in(batch), strict=True))


def sizes_of(module: pl.LightningModule) -> Tensor:
    """The norm of each floating or complex parameter and buffer; some ways to write into one leave no other trace.

    Args:
        module: The module.
    """
    dtype = accumulation_dtype(module.device)
    tensors = [tensor.detach() for tensor in tensors_of(module) if not is_lazy(tensor)]
    tensors = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    norms = [torch.linalg.vector_norm(tensor, dtype=dtype).to(module.device) for tensor in floating]
    return torch.stack(norms) if norms else torch.zeros(0)


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


def _state_of(module: Any) -> _State:
    return [
        (id(tensor), tensor._version, tensor.data_ptr() if tensor.layout == torch.strided else 0)
        for tensor in tensors_of(module)
        if not is_lazy(tensor) and not tensor.is_inference()
    ]
