"""Leaving no trace: extra forward passes in eval mode that keep random streams and module modes as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved_rng(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the random states of python, numpy, the CPU and the given devices on exit, after an exception too.

    Lightning's ``isolate_rng`` does not restore after an exception.

    Args:
        devices: The devices that the model runs on.
    """
    numpy = sys.modules.get("numpy")  # not imported: nobody has drawn from it
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    mps_state = torch.mps.get_rng_state() if any(device.type == "mps" for device in devices) else None
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


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
