"""How the model is run under Lightning's strategies: most of them leave it whole in each process, some shard it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether no process has all parameters of the model.

    Args:
        trainer: The Trainer.
    """
    return _is_a(trainer, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_strategy(trainer: pl.Trainer) -> None:
    """Require a strategy under which forward passes of our own give what those of the validation step give.

    Args:
        trainer: The Trainer, after its environment was set up.

    Raises:
        MisconfigurationException: Under DeepSpeed, whose engine owns the forward pass, and under tensor parallelism,
            where several processes hold the same samples.
    """
    if _is_a(trainer, "DeepSpeedStrategy"):
        raise MisconfigurationException("`SensitivityMonitor` does not support `DeepSpeedStrategy`; FSDP works.")
    if _is_a(trainer, "ModelParallelStrategy"):
        size = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if size > 1:
            raise MisconfigurationException(
                "`SensitivityMonitor` should get other samples in each process, got a `ModelParallelStrategy` with"
                f" `tensor_parallel_size={size}`. With 1 it works."
            )


def forward(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., Any]:
    """What runs the model: itself, or FSDP's wrapper around it, which alone has the parameters of its root.

    Args:
        trainer: The Trainer.
        pl_module: The module.
    """
    return _Redirected(trainer, pl_module) if _is_a(trainer, "FSDPStrategy") else pl_module


class _Redirected:
    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy, self._module = trainer.strategy, pl_module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `predict_step` is the one step that a strategy hands any arguments through to. The user's own may do anything,
        # so that a plain call stands in for it.
        self._module.__dict__["predict_step"] = lambda *args, **kwargs: self._module(*args, **kwargs)
        try:
            return self._strategy.predict_step(*args, **kwargs)
        finally:
            del self._module.__dict__["predict_step"]


def _is_a(trainer: pl.Trainer, *names: str) -> bool:
    # By name, because the strategies of `pytorch_lightning` are other classes.
    return not {base.__name__ for base in type(trainer.strategy).__mro__}.isdisjoint(names)
