"""Checks of the Trainer, and of what the user's step gives the model."""

import inspect
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.model.arguments import clone_tensors
from lightning_sensitivity.model.forward import Forward, parameters_of
from lightning_sensitivity.model.isolation import is_ours

_LIGHTNING_MODULES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def check_run(name: str, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Require a loop that runs, with batches that the model takes, in every process.

    Args:
        name: Name of the monitor's class.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If not, with what to change.
    """
    strategy = {base.__name__ for base in type(trainer.strategy).__mro__}  # `pytorch_lightning` has classes of its own
    flag, sources = "allow_zero_length_dataloader_with_multiple_devices", (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
    may_lack_batches = trainer.world_size > 1 and any(getattr(each, flag, False) for each in sources)
    step = inspect.signature(pl_module.test_step if stage == "test" else pl_module.validation_step)
    lacks_step = stage == "fit" and not _is_overridden("validation_step", pl_module)
    lacks_loop = stage == "fit" and not trainer.enable_validation
    for is_met, problem in (
        (not _is_overridden("forward", pl_module), "needs a `forward` that returns the logits"),
        (lacks_step, "needs a `validation_step`: `def validation_step(self, batch, batch_idx): pass` is enough"),
        (lacks_loop, "needs a validation loop: pass `val_dataloaders`, and leave `limit_val_batches` above 0"),
        ("dataloader_iter" in step.parameters, "should see each batch before the step, which takes `dataloader_iter`"),
        (not strategy.isdisjoint(_SHARDED), "needs all weights in every process, as with DDP, but got them sharded"),
        (may_lack_batches, f"needs a batch in every process, not `{flag}=True`"),
    ):
        if is_met:
            raise MisconfigurationException(f"`{name}` {problem}.")


class CallWatch:
    """Compare the first call of the module in a step of the user with ours.

    Args:
        pl_module: The module.
        forward: Our call on the batch of the step.
        compares_values: Whether tensors should have the same values. A training step may augment its inputs, so that
            there they should be of the same kind and scale.
    """

    def __init__(self, pl_module: LightningModule, forward: Forward, compares_values: bool) -> None:
        self._pl_module, self._compares_values, self._difference = pl_module, compares_values, ""
        self._handle: Any = None
        self._signature = inspect.Signature(parameters_of(pl_module))  # strategies put another in its place
        self._ours = self._bound(*clone_tensors((forward.args, forward.kwargs)))
        # Compiled code would trace the hook, and be compiled again without it.
        if self._ours and getattr(pl_module, "_compiler_ctx", None) is None and not pl_module._compiled_call_impl:
            self._handle = pl_module.register_forward_pre_hook(self._compare, with_kwargs=True)

    def end(self) -> str:
        """Stop watching, and describe the difference."""
        if self._handle is not None:
            self._handle.remove()
        return self._difference

    def _compare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_ours(self._pl_module):
            return
        with suppress(Exception):  # it runs in the user's step, on whatever is given there
            theirs = self._bound(args, kwargs)
            names = [name for name in theirs if not self._are_alike(self._ours.get(name), theirs[name])]
            if names:
                got, ours = (", ".join(_brief(of.get(name)) for name in names) for of in (theirs, self._ours))
                advice = "If that is more than augmentation, say the arguments with `inputs=`."
                others = ", ".join(map(repr, names))
                self._difference = f"The step calls the model with another {others}: {got} for {ours}. {advice}"
        self._handle.remove()

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names of ``forward``, with defaults; nothing if it has no signature."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            return {}
        bound.apply_defaults()
        return dict(bound.arguments)

    def _are_alike(self, ours: Any, theirs: Any) -> bool:
        if not self._compares_values:
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):  # a step may augment, and not more
                return ours.ndim == theirs.ndim and 0.5 <= _scale(theirs) / _scale(ours) <= 2
            is_given = isinstance(ours, Tensor | list | tuple | dict) and theirs is not None
            if is_given and not isinstance(ours, type(theirs)):  # a batch of another form than validation's
                return True
        try:
            atol = 0.01 * _scale(ours) if isinstance(ours, Tensor) else 0.01  # rounding to 16 bits is no other input
            torch.testing.assert_close(theirs, ours, rtol=0.01, atol=atol, check_device=False, check_dtype=False)
        except AssertionError:
            return False
        except TypeError:  # what assert_close does not know
            are_copies = type(ours).__eq__ is object.__eq__  # type: ignore[comparison-overlap]
            return are_copies or bool(ours == theirs)
        return True


def _scale(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().mean()) + 1e-12


def _brief(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Not Lightning's own check, which fails on a module of the other package, `lightning` or `pytorch_lightning`.
    return getattr(getattr(pl_module, name), "__module__", "") not in _LIGHTNING_MODULES
