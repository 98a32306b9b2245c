"""What is checked of a run before or beside its batches, so that it does not end in a wrong number, or in none."""

from __future__ import annotations

import inspect
from collections.abc import Collection

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn

from lightning_sensitivity.loaders import without_loader
from lightning_sensitivity.readings import Reading
from lightning_sensitivity.strategies import check_strategy


def check_model(pl_module: pl.LightningModule) -> None:
    """Require a ``forward``.

    Args:
        pl_module: The module of the run.

    Raises:
        MisconfigurationException: If it has none.
    """
    if not _is_overridden("forward", pl_module):
        raise MisconfigurationException(
            f"`SensitivityMonitor` runs the model as `model(x)`, but {type(pl_module).__name__} has no `forward`."
            " Add one that returns the logits."
        )


def check_loop(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
    """Require a validation loop in ``fit``, and one that shows its batches.

    Args:
        trainer: The Trainer.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If validation will not run, with what to add, or if its step draws the batches
            itself.
    """
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
        raise MisconfigurationException(f"`SensitivityMonitor` measures in the validation loop, but {problem}.")
    step = pl_module.test_step if stage == "test" else pl_module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise MisconfigurationException(
            f"`SensitivityMonitor` should see each batch before the step, got `{step.__name__}(dataloader_iter)`."
        )


def check_processes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Require that every process can run the model, on samples of its own, and takes part in every validation.

    Args:
        trainer: The Trainer.
        pl_module: The module of the run.

    Raises:
        MisconfigurationException: If the strategy is of a kind that is not supported, or if a process may be left
            without batches.
    """
    check_strategy(trainer)
    sources = [pl_module, *([] if trainer.datamodule is None else [trainer.datamodule])]  # type: ignore[attr-defined]
    allows_empty = any(source.allow_zero_length_dataloader_with_multiple_devices for source in sources)
    if trainer.world_size > 1 and allows_empty:
        raise MisconfigurationException(
            "`SensitivityMonitor` should get a batch in every process, got"
            " `allow_zero_length_dataloader_with_multiple_devices=True`: Lightning skips validation in a process"
            " without batches, and the others would wait for it for ever."
        )


def _is_overridden(name: str, pl_module: pl.LightningModule) -> bool:
    # Not Lightning's own check, which fails on a module of the other package, `lightning` or `pytorch_lightning`.
    defined_in = getattr(getattr(pl_module, name), "__module__", "")
    return defined_in not in ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def check_names(trainer: pl.Trainer, names: Collection[str], argument: str) -> None:
    """Require that nobody else logs our names: Lightning would keep one of the two values, without a word.

    Args:
        trainer: The Trainer, in the loop that has just run.
        names: What we log, without the index of a loader.
        argument: What chooses other names.

    Raises:
        MisconfigurationException: If somebody does.
    """
    # Only there it shows who has logged what, in this loop and in the one around it.
    loops = [trainer, trainer.fit_loop.epoch_loop] if trainer.state.fn == TrainerFn.FITTING else [trainer]
    results = [result for loop in loops for result in (getattr(loop, "_results", None) or {}).values()]
    others = {without_loader(result.meta.name) for result in results if not isinstance(result.value, Reading)}
    if taken := sorted(others.intersection(names)):
        raise MisconfigurationException(
            f"`{argument}` should give `SensitivityMonitor` names of its own, but {', '.join(map(repr, taken))} is"
            " logged by the module or another callback, too. Choose another one."
        )
