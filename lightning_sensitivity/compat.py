"""Private names of torch, Lightning and torchmetrics that may change in a release, each with a plain name.

Elsewhere are only attributes of what a file is about: `_version` of a tensor and `_buffers` of a module in
`running/isolation.py`, `_defaults` in `metric.py`, `_generate_state_key` in `callbacks/`.

Lightning is imported for types alone, so that the metrics do not need it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE as AxType
from torchmetrics.utilities.plot import _PLOT_OUT_TYPE as PlotType

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["AxType", "PlotType"]

# torchmetrics


def stay_alone(metric: Metric) -> None:
    """Let a metric, and those that it is made of, compute in this process alone."""
    for each in metric.modules():
        if isinstance(each, Metric):
            each._to_sync = False  # `sync_on_compute` is read when a metric is made


# torch


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module are compiled, by its ``compile()``, or as a Trainer does with a compiled one."""
    return module._compiled_call_impl is not None or vars(module).get("_compiler_ctx") is not None


def original_module(module: nn.Module) -> Any:
    """Return the module that ``torch.compile(module)`` has wrapped, or the module itself."""
    return module._modules.get("_orig_mod", module)  # `__getattr__` may be the user's


def eager() -> AbstractContextManager[object]:
    """Run compiled code eagerly, so that our passes compile nothing."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()


# Lightning


def num_loaders(trainer: Trainer) -> int:
    """Count the loaders of an evaluation; several that are combined, but not one after the other, are one.

    In a fit that has nothing left to train there are none.
    """
    combined: Any = trainer._evaluation_loop._combined_loader
    if combined is None:
        return 0
    return len(combined.flattened) if combined._mode == "sequential" else 1


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the current batch is the last one of all loaders in the running evaluation."""
    return bool(trainer._evaluation_loop.batch_progress.is_last_batch)


def has_workers(trainer: Trainer) -> bool:
    """Return whether a run is in forked or spawned processes, of which only weights and metrics come back."""
    return "_MultiProcessingLauncher" in {base.__name__ for base in type(trainer.strategy.launcher).__mro__}


def has_transfer_hooks(datamodule: object) -> bool:
    """Return whether a data module changes batches on their way to the device; ``None`` does not."""
    names = "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"
    functions = [getattr(datamodule, name) for name in names if hasattr(datamodule, name)]
    return any(not getattr(each, "__qualname__", "").startswith("DataHooks.") for each in functions)


def is_redirected(module: nn.Module) -> bool:
    """Return whether the `forward` of a module stands for a step, which Lightning runs so under DDP."""
    return "_ForwardRedirection" in getattr(vars(module).get("forward"), "__qualname__", "")
