"""Watch the first training step: does the network get what we send it?"""

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.model.batches import is_floating, tensors_in
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.reader import BatchReader

_ROWS = 100  # of an input that are compared


class Received(NamedTuple):
    """The first floating input of a part, its first rows, the random streams then, and whether the part learns."""

    shape: tuple[int, ...]
    inputs: Tensor
    streams: object
    learns: bool


Calls = dict[str, Received]  # the first call of the module and of each direct part, in their order


class FirstStep:
    """A comparison of what the module and its direct parts get in the first step with what they get from us."""

    def __init__(self) -> None:
        self._ours: Calls = {}
        self._theirs: Calls = {}
        self._in_step = False  # where gradients are on; in our pass they are off
        self._hooks = ExitStack()

    def __reduce__(self) -> tuple[type["FirstStep"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hooks."""
        return FirstStep, ()

    def start(self, module: nn.Module, batch: object, reader: BatchReader) -> None:
        """Run our call on a training batch, and watch the step, unless a part is compiled."""
        with suppress(Exception):  # training batches may be of another kind than validation batches
            if any(map(compat.is_compiled, module.modules())):
                return
            call = reader.call(module, batch)
            self._watch(module)
            with isolated(module) as run:
                run(call)
            self._ours, self._theirs = self._theirs, {}
            self._in_step = True

    def _watch(self, module: nn.Module) -> None:
        """Note the first call of the module, and of each direct part with weights, also of a frozen one."""
        parts = {"forward": compat.original_module(module), **dict(module.named_children())}
        for name, part in parts.items():
            is_fast = isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer) and not part.training
            if is_fast or next(part.parameters(), None) is None:
                continue  # torch runs an encoder in eval mode in another way if it has hooks
            self._hooks.enter_context(part.register_forward_pre_hook(partial(self._note, name), with_kwargs=True))

    def _note(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the first floating input of a part."""
        with suppress(Exception):  # a step must not fail because of a hint
            inputs = [x for x in tensors_in([*args, *kwargs.values()]) if is_floating(x)]
            is_meant = torch.is_grad_enabled() == self._in_step and not compat.is_redirected(part)
            if inputs and is_meant and name not in self._theirs:
                learns = any(weight.requires_grad for weight in part.parameters())
                rows = inputs[0].detach()[:_ROWS].clone()
                self._theirs[name] = Received(tuple(inputs[0].shape), rows, compat.random_streams(), learns)

    def stop(self, is_skipped: bool) -> str | None:
        """Stop watching, and say how the step differs from what is measured; a skipped step says nothing."""
        ours, theirs = self._ours, self._theirs
        self.cancel()
        if not ours or is_skipped:
            return None
        if ours.keys().isdisjoint(theirs):
            return "the step does not call `forward`, which is measured"
        others = [name for name in theirs if name not in ours and theirs[name].learns]
        if others:
            return f"the step calls `{others[0]}`, which `forward` does not call"
        names = list(ours)
        first = names[:2] if names[0] == "forward" else names[:1]  # later ones get what dropout and the like make
        found = (_compare(name, ours[name], theirs[name]) for name in first if name in theirs)
        return next(filter(None, found), None)

    def cancel(self) -> None:
        """Stop watching, at any time."""
        self._hooks.close()
        self._ours, self._theirs, self._in_step = {}, {}, False


def _compare(name: str, ours: Received, theirs: Received) -> str | None:
    """Say how the inputs of a part differ; their values may, if the step has drawn random numbers."""
    if theirs.shape != ours.shape:
        return f"`{name}` gets an input of shape {theirs.shape} in the step, and {ours.shape} from us"
    if theirs.streams == ours.streams and not are_close(ours.inputs, theirs.inputs):
        return f"`{name}` gets other values in the step, though it draws no random numbers"
    return None
