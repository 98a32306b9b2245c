"""Leaving no trace: extra forward passes in eval mode that keep random streams, buffers and modes as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_sensitivity.nested import tensors_in

_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Run a module in eval mode, without gradients, and put back modes and random streams.

    Buffers and other tensors are put back after each pass: see :class:`~lightning_sensitivity.probe.Probe`.

    What it can't put back is other Python state that ``forward`` itself changes: a counter, a generator of its own,
    what is deeper in a container. Parameters are not guarded: no gradient reaches them.

    Args:
        model: The module that is run inside.
    """
    devices = {tensor.device for tensor in tensors_of(model)}
    with preserved_rng(devices), evaluating(model), silenced(model), torch.no_grad():
        yield


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers, in one walk; ``parameters()`` and ``buffers()`` take one each and make names.

    Args:
        model: The module that owns them.
    """
    return [
        tensor
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for tensor in own.values()
        if tensor is not None
    ]


@contextmanager
def preserved_rng(devices: Collection[torch.device]) -> Iterator[None]:
    """Restore the random states of python, numpy, the CPU and the given devices on exit, after an exception too.

    Lightning's ``isolate_rng`` does not restore after an exception.

    Args:
        devices: The devices that are used inside.
    """
    numpy = sys.modules.get("numpy")  # not imported: nobody has drawn from it
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    kinds = {device.type for device in devices} - {"cpu"}
    mps_state = torch.mps.get_rng_state() if "mps" in kinds else None
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([]))
            for kind in kinds - {"mps"}:
                same_kind = [device for device in devices if device.type == kind]
                stack.enter_context(torch.random.fork_rng(same_kind, device_type=kind))
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def preserved_tensors(model: nn.Module) -> Iterator[None]:
    """Give buffers, and other attributes that hold tensors, their values back on exit.

    Some change in eval mode, too: observers, counters, caches, hidden states, and the weights of pruned layers, which
    are such attributes. In a module where one has changed, and in a torchmetrics Metric, every attribute is put back:
    there may be numbers that say of which size a cache is, or how many samples a mean is of.

    Args:
        model: The module that owns them.
    """
    states = [_State(module) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for state in states:
                state.give_back()


class _State:
    """What a module has in buffers and in attributes of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = vars(module).copy()
        own = [self._before[name] for name in self._before.keys() - _OF_ANY_MODULE]
        if module._buffers:
            own += module._buffers.values()
        self._containers = [(each, each.copy()) for each in [*own, module._buffers] if isinstance(each, list | dict)]
        tensors = [each for each in own if isinstance(each, Tensor) and _has_values(each)]
        self._tensors = [(tensor, tensor.clone(), _version(tensor)) for tensor in tensors]

    def give_back(self) -> None:
        """Put back what has changed."""
        written = [(tensor, value) for tensor, value, version in self._tensors if _is_written(tensor, value, version)]
        for tensor, value in written:
            if tensor.shape != value.shape:
                tensor.resize_(value.shape)
            tensor.copy_(value)
        now, before = vars(self._module), self._before
        refilled = [(each, items) for each, items in self._containers if not _is_same(each, items)]
        if not refilled and _is_same(now, before):
            return
        names = {name for name in now.keys() | before.keys() if now.get(name, self) is not before.get(name, self)}
        names -= _OF_ANY_MODULE
        values = [each.get(name) for name in names for each in (now, before)]
        if written or isinstance(self._module, Metric) or tensors_in([refilled, values]):
            for container, items in refilled:
                container.clear()
                container.update(items) if isinstance(container, dict) else container.extend(items)
            for name in names:
                now.pop(name, None)
            now.update({name: before[name] for name in names & before.keys()})


def _is_same(container: Any, items: Any) -> bool:
    """Whether a list or dict holds these objects still."""
    if len(container) != len(items) or not all(map(is_, container, items)):  # of a dict, the keys
        return False
    return not isinstance(container, dict) or all(map(is_, container.values(), items.values()))


def _is_written(tensor: Tensor, value: Tensor, version: int | None) -> bool:
    # Inference tensors do not count their versions, and can be written to in inference mode alone.
    if version is None:
        return torch.is_inference_mode_enabled() and not torch.equal(tensor, value)
    return version != _version(tensor)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Let a ``forward`` that calls ``self.log`` log nothing: its own value, from the step, would be replaced.

    Args:
        model: The module that is run inside.
    """
    names = [name for name in ("log", "log_dict") if hasattr(model, name)]
    own = {name: model.__dict__[name] for name in names if name in model.__dict__}
    model.__dict__.update(dict.fromkeys(names, _do_nothing))
    try:
        yield
    finally:
        for name in names:
            del model.__dict__[name]
        model.__dict__.update(own)


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass


def _has_values(tensor: Tensor) -> bool:
    """Whether they can be copied: lazy ones have none yet, and of a sharded model they may be in other processes."""
    if is_lazy(tensor):
        return False
    return tensor.layout != torch.strided or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode, and on exit back into the mode that each one was in.

    Lightning validates in eval mode already, unless the user keeps some modules in training mode (Monte Carlo
    dropout, say); there, batch norm would otherwise learn from noisy inputs.

    Args:
        model: The module whose mode is changed.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
