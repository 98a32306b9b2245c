"""Leaving no trace: extra forward passes in eval mode that keep random streams, buffers and modes as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
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
    are such attributes. Of a torchmetrics Metric every attribute is put back.

    Args:
        model: The module that owns them.
    """
    modules = list(model.modules())
    attributes = [(module, {n: v for n, v in vars(module).items() if n not in _OF_ANY_MODULE}) for module in modules]
    mine = [value for _, own in attributes for value in own.values()]
    buffers = [module._buffers for module in modules if isinstance(module._buffers, dict)]
    containers = [(each, each.copy()) for each in [*mine, *buffers] if isinstance(each, list | dict)]
    tensors = [each for each in [*mine, *model.buffers()] if isinstance(each, Tensor) and _has_values(each)]
    values = [(tensor, tensor.clone(), _version(tensor)) for tensor in tensors]
    try:
        yield
    finally:
        for module, own in attributes:
            _give_back_attributes(module, own)
        for container, items in containers:
            _give_back_items(container, items)
        with torch.no_grad():
            for tensor, value, version in values:
                # Only what was written to: an expanded buffer, say, can't be, and need not. Inference tensors do not
                # count their versions, and can be written to in inference mode alone.
                if torch.is_inference_mode_enabled() if version is None else version != _version(tensor):
                    if tensor.shape != value.shape:
                        tensor.resize_(value.shape)
                    tensor.copy_(value)


def _give_back_attributes(module: nn.Module, own: dict[str, Any]) -> None:
    attributes = vars(module)
    changed = [name for name, value in own.items() if attributes.get(name) is not value]
    for name in changed + [name for name in attributes if name not in own and name not in _OF_ANY_MODULE]:
        if isinstance(module, Metric) or tensors_in([attributes.get(name), own.get(name)]):
            if name in own:
                attributes[name] = own[name]
            else:
                del attributes[name]


def _give_back_items(container: Any, items: Any) -> None:
    is_same = len(container) == len(items) and all(map(is_, _flat(container), _flat(items)))
    if not is_same and tensors_in([container, items]):
        if isinstance(container, dict):
            container.clear()
            container.update(items)
        else:
            container[:] = items


def _flat(container: Any) -> Iterable[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else container


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
