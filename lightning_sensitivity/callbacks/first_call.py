"""Watch the first training step: does it call the model on the inputs that we measure?"""

import inspect
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, parameters_of
from lightning_sensitivity.model.reader import BatchReader

Arguments = dict[str, list[Tensor]]


class FirstCall:
    """Compare the arguments of the first call of the module in a training step with ours.

    Args:
        is_wanted: Whether to watch the next step.
    """

    def __init__(self, is_wanted: bool = False) -> None:
        self._is_wanted = is_wanted
        self._module: nn.Module | None = None
        self._ours: Arguments = {}
        self._streams: object = None  # of random numbers, before the step
        self._was_called = False
        self._difference: str | None = None
        self._hooks = ExitStack()

    def __reduce__(self) -> tuple[type["FirstCall"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hooks."""
        return FirstCall, ()

    def start(self, module: LightningModule, batch: object, reader: BatchReader) -> None:
        """Watch a step, unless a part is compiled, or our call can't be made on its batch."""
        self.cancel()
        is_wanted, self._is_wanted = self._is_wanted and not any(map(compat.is_compiled, module.modules())), False
        with suppress(Exception):  # training batches may be of another kind than validation batches
            if is_wanted:
                call = reader.call(module, batch)
                self._module, self._streams = module, compat.random_streams()
                self._ours = _copy_arguments(module, call.args, call.kwargs)
                for part in _parts_with_all_parameters(module):
                    self._hooks.enter_context(part.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._was_called or compat.is_redirected(part) or not torch.is_grad_enabled():
            return
        self._was_called = True
        with suppress(Exception):  # a step must not fail because of a hint, nor say what can't be compared
            if part is self._module:
                has_drawn = compat.random_streams() != self._streams
                self._difference = _find_difference(self._ours, _copy_arguments(part, args, kwargs), has_drawn)

    def stop(self, module: LightningModule, is_skipped: bool) -> str | None:
        """Stop watching, and say how the step differs from what is measured; a skipped step says nothing."""
        is_done, difference = self._was_called or not self._ours, self._difference
        self.cancel()
        if is_done:
            return difference
        self._is_wanted = is_skipped
        is_silent = is_skipped or "forward" in _names_in_step(module)  # no hook sees `self.forward(x)`
        return None if is_silent else "the step does not call `forward`, which is measured"

    def cancel(self) -> None:
        """Stop watching, at any time."""
        self._hooks.close()
        self._module, self._ours, self._was_called, self._difference = None, {}, False, None


def _find_difference(ours: Arguments, theirs: Arguments, has_drawn: bool) -> str | None:
    """Say how the arguments of a step differ from ours; their values may, if it has drawn random numbers."""
    for name in sorted((ours.keys() | theirs.keys()) - set(TARGET_NAMES)):
        if name not in ours:
            return f"the step calls the model with other arguments: also with `{name}`"
        tensors, found = ours[name], theirs.get(name, [])
        if _shapes(found) != _shapes(tensors):
            return f"the step calls the model with other arguments: `{name}` is missing or has another shape"
        if not has_drawn and not all(map(are_close, tensors, found)):
            return f"the step calls the model with other values of `{name}`, though it draws no random numbers"
    return None


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _names_in_step(module: nn.Module) -> set[str]:
    """List the names in the code of the training step, and of the methods that it names."""
    names = {"training_step"}
    for _ in range(2):
        codes = [getattr(getattr(module, name, None), "__code__", None) for name in names]
        names |= {name for code in codes if code is not None for name in code.co_names}
    return names


def _parts_with_all_parameters(module: nn.Module) -> list[nn.Module]:
    """List the module and those of its parts that hold all of its parameters, such as ``self.net``."""
    parameters = set(module.parameters())
    return [part for part in module.modules() if part is module or set(part.parameters()) == parameters != set()]


def _copy_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Copy the tensors in arguments that are not defaults, by their names in ``forward``."""
    signature = inspect.Signature(parameters_of(module))
    arguments, parameters = signature.bind_partial(*args, **kwargs).arguments, signature.parameters
    given = {name: value for name, value in arguments.items() if not _is_default(value, parameters[name].default)}
    return {name: [x.detach().clone() for x in tensors_in(value)] for name, value in given.items()}


def _is_default(value: object, default: object) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and value == default)
