"""Leaving no trace: extra forward passes in eval mode that keep random streams, buffers and modes as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity.nested import tensors_in


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Run a module in eval mode, without gradients, and put back modes and random streams.

    Buffers and other tensors are put back after each pass: see :class:`~lightning_sensitivity.probe.Probe`.

    What it can't put back is Python state without tensors that ``forward`` itself changes: a generator of its own, a
    counter, a torchmetrics Metric that it updates. Parameters are not guarded: no gradient reaches them.

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
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Give every buffer its value back on exit: some change in eval mode, too (observers, counters, caches).

    And every other attribute that held tensors, or holds some now: pruned weights are such, and hidden states.

    Args:
        model: The module that owns the buffers.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    owners = [(module, dict(module._buffers)) for module in model.modules() if isinstance(module._buffers, dict)]
    values = [(buffer, buffer.clone(), _version(buffer)) for buffer in model.buffers() if not is_lazy(buffer)]
    try:
        yield
    finally:
        for module, before in attributes:
            _give_back_tensors(vars(module), before)
        for module, buffers in owners:
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value, version in values:
                # Only what was written to: an expanded buffer, say, can't be, and need not. Inference tensors do not
                # count their versions, and can be written to in inference mode alone.
                if torch.is_inference_mode_enabled() if version is None else version != _version(buffer):
                    if buffer.shape != value.shape:
                        buffer.resize_(value.shape)
                    buffer.copy_(value)


def _give_back_tensors(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    changed = [name for name, own in before.items() if attributes.get(name) is not own]
    for name in changed + [name for name in attributes if name not in before]:
        if not tensors_in([attributes.get(name), before.get(name)]):
            continue
        if name in before:
            attributes[name] = before[name]
        else:
            del attributes[name]


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
