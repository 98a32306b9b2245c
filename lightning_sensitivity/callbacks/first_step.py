"""Watch the first training step: does the network get what we send it?"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running.batches import is_dense, tensors_in, without_labels
from lightning_sensitivity.running.call import by_position

_ROWS = 100  # of an input that are compared


@dataclass
class _Input:
    """A tensor that ``forward`` gets.

    Attributes:
        shape: Its shape.
        rows: Its first rows, or all of a scalar.
    """

    shape: tuple[int, ...]
    rows: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Input":
        rows = x.detach() if x.ndim == 0 else x.detach()[:_ROWS]
        return cls(tuple(x.shape), rows.clone())

    def has_values_of(self, other: "_Input") -> bool:
        return are_close(self.rows, other.rows)


Inputs = dict[str, list[_Input]]  # by the names of the arguments


class FirstStep:
    """A comparison of what ``forward`` gets in the first step with what we send it."""

    def __init__(self) -> None:
        self._ours: Inputs = {}
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
            self._ours = _inputs(reader.call(module, batch).arguments)
            self._streams = compat.random_streams()
            self._hook.enter_context(module.register_forward_pre_hook(self._compare, with_kwargs=True))

    def _compare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Compare the first call of the step; in passes of monitors, gradients are off."""
        if not torch.is_grad_enabled() or compat.is_redirected(module):
            return
        self._hook.close()
        with suppress(Exception):  # a step must not fail because of a hint
            arguments = by_position(module, args) | kwargs
            has_drawn = compat.random_streams() != self._streams
            self._problem = _difference(self._ours, _inputs(arguments), has_drawn)

    def stop(self) -> str | None:
        """Stop watching, and say how the step changes inputs, if it does."""
        self._hook.close()
        self._ours, problem, self._problem = {}, self._problem, None
        return problem


def _inputs(arguments: Mapping[str, object]) -> Inputs:
    """Note the dense tensors of arguments that are not named like labels, also in mappings."""
    found: Inputs = {}
    for name, value in without_labels(arguments).items():
        found[name] = [_Input.of(x) for x in tensors_in(without_labels(value)) if is_dense(x)]
    return {name: tensors for name, tensors in found.items() if tensors}


def _difference(ours: Inputs, theirs: Inputs, has_drawn: bool) -> str | None:
    """Say how what the step sends differs from what we send; values may if it has drawn random numbers."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        where = "in the step, and not from us" if name in theirs else "from us, and not in the step"
        return f"`forward` gets `{name}` {where}"
    for name, got in theirs.items():
        sent = ours[name][: len(got)]  # of several, such as two views, a step may send one after the other
        step, us = (", ".join(str(each.shape) for each in tensors) for tensors in (got, sent))
        if step != us:
            return f"`forward` gets an input of shape {step} in the step, and {us} from us"
        if not has_drawn and not all(map(_Input.has_values_of, sent, got)):
            return "`forward` gets other values in the step, though it draws no random numbers"
    return None
