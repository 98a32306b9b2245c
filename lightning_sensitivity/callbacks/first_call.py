"""Watch the first training step: does it call the model on the inputs that we measure?"""

import sys
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, parameters_of
from lightning_sensitivity.model.reader import BatchReader

Arguments = dict[str, list[Tensor]]


class FirstCall:
    """Compare shapes and values of the arguments in the first call of a module in a training step with ours."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._ours: Arguments = {}
        self._streams: object = None  # of random numbers, before the step
        self._was_called = False
        self._difference: str | None = None
        self._hooks = ExitStack()

    def __reduce__(self) -> tuple[type["FirstCall"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hooks."""
        return FirstCall, ()

    def start(self, module: nn.Module, batch: object, reader: BatchReader) -> None:
        """Watch a step, unless a part is compiled, or our call can't be made on its batch."""
        with suppress(Exception):  # training batches may be of another kind than validation batches
            if any(map(compat.is_compiled, module.modules())):
                return
            call = reader.call(module, batch)
            self._ours = _copy_tensors(module, call.args, call.kwargs)
            self._module, self._streams = module, compat.random_streams()
            for part in module.modules():
                self._hooks.enter_context(part.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_of_step = torch.is_grad_enabled() and not compat.is_redirected(part) and not compat.is_tracing()
        if self._was_called or self._module is None or not is_of_step:
            return
        with suppress(Exception):  # a step must not fail because of a hint, nor say what can't be compared
            self._was_called = part is self._module or _stands_for(part, self._module)
            if part is self._module:
                has_drawn = compat.random_streams() != self._streams
                self._difference = _find_difference(self._ours, _copy_tensors(part, args, kwargs), has_drawn)

    def stop(self, is_skipped: bool) -> str | None:
        """Stop watching, and say how the step differs from what is measured; a skipped step says nothing."""
        is_silent = self._was_called or self._module is None or is_skipped
        difference = self._difference
        self.cancel()
        return difference if is_silent else "the step does not call `forward`, which is measured"

    def cancel(self) -> None:
        """Stop watching, at any time."""
        self._hooks.close()
        self._module, self._ours, self._was_called, self._difference = None, {}, False, None


def _find_difference(ours: Arguments, theirs: Arguments, has_drawn: bool) -> str | None:
    """Say how the arguments of a step differ from ours; their values may, if it has drawn random numbers."""
    for name in sorted(ours.keys() | theirs.keys()):
        tensors, found = ours.get(name, []), theirs.get(name, [])
        if [x.shape for x in tensors] != [x.shape for x in found]:
            return f"the step calls the model with other arguments: `{name}` is missing, new or of another shape"
        if not has_drawn and not all(map(are_close, tensors, found)):
            return f"the step calls the model with other values of `{name}`, though it draws no random numbers"
    return None


def _copy_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Copy the tensors in arguments, by their names in ``forward``, without those that are called like labels."""
    names = [parameter.name for parameter in parameters_of(module)]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    found = {name: [x.detach().clone() for x in tensors_in(value)] for name, value in named.items()}
    return {name: tensors for name, tensors in found.items() if tensors and name not in TARGET_NAMES}


def _stands_for(part: nn.Module, module: nn.Module) -> bool:
    """Return whether the call of a part is one of the module: it holds all parameters, or `forward` has called it."""
    parameters = set(module.parameters())
    return set(part.parameters()) == parameters != set() or _is_in_forward(module, sys._getframe(1))


def _is_in_forward(module: nn.Module, frame: FrameType | None) -> bool:
    """Return whether the `forward` of a module is on the stack: `self.forward(x)` calls no hook of the module."""
    original = compat.original_module(module)
    forward = type(original).forward if compat.is_redirected(original) else original.forward
    while frame is not None:
        if frame.f_code is getattr(forward, "__code__", None):
            return True
        frame = frame.f_back
    return False
