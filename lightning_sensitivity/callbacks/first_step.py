"""Watch the first training step: does the network get what we send it?"""

from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.model.batches import is_floating, tensors_in
from lightning_sensitivity.model.reader import BatchReader

_ROWS = 100  # of an input that are compared


class _Received(NamedTuple):
    """The first floating input of a call: its shape, its first rows, and the random streams then."""

    shape: tuple[int, ...]
    rows: Tensor
    streams: object


class FirstStep:
    """A comparison of what ``forward`` gets in the first step with what we send it."""

    def __init__(self) -> None:
        self._ours: _Received | None = None  # None before, and as soon as it was compared
        self._problem: str | None = None
        self._hook = ExitStack()

    def __reduce__(self) -> tuple[type["FirstStep"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hook."""
        return FirstStep, ()

    def start(self, module: nn.Module, batch: object, reader: BatchReader) -> None:
        """Note what we send of a training batch, and watch the step, unless the module is compiled."""
        with suppress(Exception):  # training batches may be of another kind than validation batches
            if not compat.is_compiled(module):  # a hook would have it compiled anew
                self._ours = _first_input(reader.call(module, batch).arguments)
                self._hook.enter_context(module.register_forward_pre_hook(self._compare, with_kwargs=True))

    def _compare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Compare the first call of the step; in passes of monitors, gradients are off."""
        if self._ours is None or not torch.is_grad_enabled() or compat.is_redirected(module):
            return
        ours, self._ours = self._ours, None
        with suppress(Exception):  # a step must not fail because of a hint
            theirs = _first_input((args, kwargs))
            if theirs.shape != ours.shape:
                self._problem = f"`forward` gets an input of shape {theirs.shape} in the step, and {ours.shape} from us"
            elif theirs.streams == ours.streams and not are_close(ours.rows, theirs.rows):
                self._problem = "`forward` gets other values in the step, though it draws no random numbers"

    def stop(self, is_skipped: bool) -> str | None:
        """Stop watching, and say how the step changes inputs; a skipped step says nothing."""
        problem = None if is_skipped else self._problem
        self.cancel()
        return problem

    def cancel(self) -> None:
        """Stop watching, at any time."""
        self._hook.close()
        self._ours = self._problem = None


def _first_input(arguments: object) -> _Received:
    """Copy the first rows of the first floating tensor."""
    first = next(filter(is_floating, tensors_in(arguments)))
    return _Received(tuple(first.shape), first.detach()[:_ROWS].clone(), compat.random_streams())
