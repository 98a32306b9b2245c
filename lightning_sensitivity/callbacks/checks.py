"""What is checked before a value is believed: the Trainer, a loader's first batch, and what the user's step runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_sensitivity.functional.tasks import classes_last
from lightning_sensitivity.models import Options, Probe, select_targets
from lightning_sensitivity.models.call import copied
from lightning_sensitivity.models.passes import is_ours

_TOLERANCE = 1e-2  # relative to the scale of a tensor: rounding to 16 bits is no other input


def check_run(name: str, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Require that a loop will run whose batches the model can be run on, in every process.

    Args:
        name: Of the monitor.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If it won't, with what to change.
    """
    if problem := _problem(trainer, pl_module, stage):
        raise MisconfigurationException(f"`{name}` {problem}.")


def _problem(trainer: Trainer, pl_module: LightningModule, stage: str) -> str | None:
    module = type(pl_module).__name__
    if not _is_overridden("forward", pl_module):
        return f"runs the model as `model(x)`, but {module} has no `forward`. Add one that returns the logits"
    if stage == "fit" and not trainer.enable_validation:
        missing = "there is no validation loader. Pass `val_dataloaders` to `Trainer.fit`; it needs no labels"
        if not _is_overridden("validation_step", pl_module):
            stub = "def validation_step(self, batch, batch_idx): pass"
            missing = f"{module} has no `validation_step`. Add one; without labels a stub is enough: `{stub}`"
        elif trainer.limit_val_batches == 0:
            missing = "the Trainer has `limit_val_batches=0`. Raise it"
        return f"measures in the validation loop, but {missing}"
    step = pl_module.test_step if stage == "test" else pl_module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        return f"should see each batch before the step, got `{step.__name__}(dataloader_iter)`"
    if is_strategy(trainer, "DeepSpeedStrategy"):
        return "does not support `DeepSpeedStrategy`; FSDP works"
    if is_strategy(trainer, "ModelParallelStrategy"):
        size = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
        if size > 1:
            got = f"a `ModelParallelStrategy` with `tensor_parallel_size={size}`. With 1 it works"
            return f"should get other samples in each process, got {got}"
    sources = [pl_module, *([] if trainer.datamodule is None else [trainer.datamodule])]  # type: ignore[attr-defined]
    if trainer.world_size > 1 and any(each.allow_zero_length_dataloader_with_multiple_devices for each in sources):
        return (
            "should get a batch in every process, got `allow_zero_length_dataloader_with_multiple_devices=True`: the"
            " other processes would wait for ever"
        )
    return None


def is_sharded(trainer: Trainer) -> bool:
    """Whether no process has all parameters of the model."""
    return is_strategy(trainer, "FSDPStrategy", "ModelParallelStrategy")


def is_strategy(trainer: Trainer, *names: str) -> bool:
    """Whether the strategy is one of these, by name: those of ``pytorch_lightning`` are other classes."""
    return not {base.__name__ for base in type(trainer.strategy).__mro__}.isdisjoint(names)


def forward(trainer: Trainer, pl_module: LightningModule) -> Callable[..., Any]:
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


def classes_are_last(
    pl_module: LightningModule, batch: Any, probe: Probe, outputs: Tensor, options: Options
) -> tuple[bool, str]:
    """Whether classes come last in the outputs, by the labels of a batch; and what to warn of, if that is in doubt.

    Args:
        pl_module: The module.
        batch: What the loader gave.
        probe: What runs the module on it.
        outputs: The outputs for it.
        options: Where the labels are.
    """
    try:
        targets = select_targets(pl_module, copied(batch), options.targets)
    except Exception:  # unlabelled, or a function for other batches
        targets = outputs.new_zeros(0)
    if classes_last(outputs, targets):
        return True, ""
    is_told = options.outputs is not None or outputs.shape[:1] + outputs.shape[2:] == targets.shape
    if outputs.ndim != 3 or is_told or not any(x.shape == outputs.shape[:2] for x in probe.first_tensors):
        return False, ""
    return False, (
        f"takes dimension 1 of the outputs {tuple(outputs.shape)} for the classes, but inputs have as many positions."
        " If classes come last, say `outputs=lambda y: y.movedim(-1, 1)`."
    )


class StepWatch:
    """Compares, once, the call of the module in the user's own step with ours.

    Args:
        pl_module: The module.
        tensors: What we give it, of which the first is compared; empty if nothing can be.
        submodules: The modules that ran in our pass.
    """

    def __init__(self, pl_module: LightningModule, tensors: list[Tensor], submodules: set[nn.Module]) -> None:
        self._pl_module, self._submodules = pl_module, submodules
        self._ours = [tensor.detach().clone() for tensor in tensors[:1]]
        self._given: set[str] = set()  # shapes
        self._has_given_ours = False
        self._hooks = ExitStack()
        self._seen = self._hooks.enter_context(submodules_run(pl_module, in_our_passes=False))
        self._hooks.callback(pl_module.register_forward_pre_hook(self._note_arguments, with_kwargs=True).remove)

    def _note_arguments(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if is_ours(self._pl_module) or self._has_given_ours or not self._ours:
            return
        with suppress(Exception):  # it runs in the user's step, on whatever is given there
            for value in (each for each in (*args, *keywords.values()) if isinstance(each, Tensor)):
                self._has_given_ours |= _is_like(self._ours[0], value.detach())
                self._given.add(str(tuple(value.shape)))

    def end(self) -> dict[str, str]:
        """Stop watching; returns what differs, a sentence for each kind of difference."""
        self._hooks.close()
        found = {}
        if self._given and not self._has_given_ours:
            ours, given = tuple(self._ours[0].shape), ", ".join(sorted(self._given)[:3])
            found["inputs"] = (
                f"The step calls the model on other inputs (shape {given}) than ours (shape {ours}): it changes the"
                " batch first. If that is more than augmentation, do the same with"
                " `inputs=lambda batch: (...)`, which returns the model's arguments."
            )
        more = self._seen - self._submodules - {self._pl_module}
        modules = self._pl_module.named_modules()
        names = [repr(name) for name, each in modules if each in more and [*each.parameters(recurse=False)]]
        if names:
            found["submodules"] = (
                f"The step also runs {', '.join(sorted(names)[:3])}, which `forward` does not. If it makes the"
                " logits, return those from `forward`, or apply it in `outputs=`."
            )
        return found


@contextmanager
def submodules_run(model: nn.Module, in_our_passes: bool = True) -> Iterator[set[nn.Module]]:
    """The modules that run inside, in passes of ours or in others.

    None of a model with compiled code, which sees no hook that comes later.
    """
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, result: Any) -> None:
        if is_ours(model) == in_our_passes:
            seen.add(module)

    with ExitStack() as hooks:
        if not _is_compiled(model):
            hooks.callback(register_module_forward_hook(note).remove)
        yield seen


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Not Lightning's own check, which fails on a module of the other package, `lightning` or `pytorch_lightning`.
    defined_in = getattr(getattr(pl_module, name), "__module__", "")
    return defined_in not in ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def _is_compiled(model: nn.Module) -> bool:
    is_whole = getattr(model, "_compiler_ctx", None) is not None  # a LightningModule
    return is_whole or any(hasattr(each, "_orig_mod") or each._compiled_call_impl for each in model.modules())


def _is_like(ours: Tensor, other: Tensor) -> bool:
    if ours.shape != other.shape:
        return False
    scale = float(ours.double().abs().max()) if ours.numel() else 0.0
    return not ours.numel() or float((ours.double() - other.to(ours.device).double()).abs().max()) <= _TOLERANCE * scale
