"""Watch the first training step: does the network get what we send it?"""

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.model.batches import is_floating, tensors_in
from lightning_sensitivity.model.reader import BatchReader

_ROWS = 100  # of an input that are compared


class FirstStep:
    """A comparison of what ``forward`` gets in the first step with what we send it."""

    def __init__(self) -> None:
        self._ours = torch.zeros(0)
        self._streams: object = None  # of random numbers, before the step
        self._problem: str | None = None
        self._hook = ExitStack()

    def __reduce__(self) -> tuple[type["FirstStep"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hook."""
        return FirstStep, ()

    def start(self, module: nn.Module, batch: object, reader: BatchReader) -> None:
        """Note what we send of a training batch, and watch the step, unless the module is compiled."""
        if reader.function is not None or compat.is_compiled(module):  # a hook would have it compiled anew
            return
        with suppress(Exception):  # training batches may be of another kind than validation batches
            self._ours = _first_rows(reader.call(module, batch).arguments).clone()
            self._streams = compat.random_streams()
            self._hook.enter_context(module.register_forward_pre_hook(self._compare, with_kwargs=True))

    def _compare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Compare the first call of the step; in passes of monitors, gradients are off."""
        if not torch.is_grad_enabled() or compat.is_redirected(module):
            return
        self._hook.close()
        with suppress(Exception):  # a step must not fail because of a hint
            ours, theirs = self._ours, _first_rows((args, kwargs))
            if theirs.shape != ours.shape:
                shapes = f"{tuple(theirs.shape)} in the step, and {tuple(ours.shape)} from us"
                self._problem = f"`forward` gets an input of shape {shapes}"
            elif compat.random_streams() == self._streams and not are_close(ours, theirs):
                self._problem = "`forward` gets other values in the step, though it draws no random numbers"

    def stop(self) -> str | None:
        """Stop watching, and say how the step changes inputs, if it does."""
        self._hook.close()
        self._ours, problem, self._problem = torch.zeros(0), self._problem, None
        return problem


def _first_rows(arguments: object) -> Tensor:
    """Return the first rows of the first floating tensor."""
    return next(filter(is_floating, tensors_in(arguments))).detach()[:_ROWS]
