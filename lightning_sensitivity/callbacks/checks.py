"""What is required of a Trainer, and how the model is run under its strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


def check_run(name: str, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
    """Require that a loop will run whose batches the model can be run on, in every process.

    Args:
        name: Of the monitor.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If it won't, with what to change.
    """
    if not _is_overridden("forward", pl_module):
        raise MisconfigurationException(
            f"`{name}` runs the model as `model(x)`, but {type(pl_module).__name__} has no `forward`. Add one that"
            " returns the logits."
        )
    if stage == "fit" and not trainer.enable_validation:
        if not _is_overridden("validation_step", pl_module):
            problem = (
                f"{type(pl_module).__name__} has no `validation_step`. Add one; without labels a stub is enough:"
                " `def validation_step(self, batch, batch_idx): pass`"
            )
        elif trainer.limit_val_batches == 0:
            problem = "the Trainer has `limit_val_batches=0`. Raise it"
        else:
            problem = "there is no validation loader. Pass `val_dataloaders` to `Trainer.fit`; it needs no labels"
        raise MisconfigurationException(f"`{name}` measures in the validation loop, but {problem}.")
    step = pl_module.test_step if stage == "test" else pl_module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise MisconfigurationException(
            f"`{name}` should see each batch before the step, got `{step.__name__}(dataloader_iter)`."
        )
    if is_strategy(trainer, "DeepSpeedStrategy"):
        raise MisconfigurationException(f"`{name}` does not support `DeepSpeedStrategy`; FSDP works.")
    if is_strategy(trainer, "ModelParallelStrategy"):
        size = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if size > 1:
            raise MisconfigurationException(
                f"`{name}` should get other samples in each process, got a `ModelParallelStrategy` with"
                f" `tensor_parallel_size={size}`. With 1 it works."
            )
    sources = [pl_module, *([] if trainer.datamodule is None else [trainer.datamodule])]  # type: ignore[attr-defined]
    if trainer.world_size > 1 and any(each.allow_zero_length_dataloader_with_multiple_devices for each in sources):
        raise MisconfigurationException(
            f"`{name}` should get a batch in every process, got"
            " `allow_zero_length_dataloader_with_multiple_devices=True`: the other processes would wait for ever."
        )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether no process has all parameters of the model."""
    return is_strategy(trainer, "FSDPStrategy", "ModelParallelStrategy")


def is_strategy(trainer: pl.Trainer, *names: str) -> bool:
    """Whether the strategy is one of these, by name: those of ``pytorch_lightning`` are other classes."""
    return not {base.__name__ for base in type(trainer.strategy).__mro__}.isdisjoint(names)


def forward(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., Any]:
    """What runs the model: itself, or FSDP's wrapper around it, which alone has the parameters of its root.

    Args:
        trainer: The Trainer.
        pl_module: The module.
    """
    if not is_strategy(trainer, "FSDPStrategy"):
        return pl_module

    def redirected(*args: Any, **kwargs: Any) -> Any:
        # `predict_step` is the one step that a strategy hands any arguments through to. The user's own may do anything,
        # so that a plain call stands in for it.
        pl_module.__dict__["predict_step"] = lambda *args, **kwargs: pl_module(*args, **kwargs)
        try:
            return trainer.strategy.predict_step(*args, **kwargs)
        finally:
            del pl_module.__dict__["predict_step"]

    return redirected


def _is_overridden(name: str, pl_module: pl.LightningModule) -> bool:
    # Not Lightning's own check, which fails on a module of the other package, `lightning` or `pytorch_lightning`.
    defined_in = getattr(getattr(pl_module, name), "__module__", "")
    return defined_in not in ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
