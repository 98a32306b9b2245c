"""What a loader's first batch shows: where the classes are, and whether the user's step calls the model as we do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_sensitivity.functional.tasks import classes_last
from lightning_sensitivity.models import Options, Probe, select_targets
from lightning_sensitivity.models.call import copied
from lightning_sensitivity.models.passes import is_ours

_TOLERANCE = 1e-2  # relative to the scale of a tensor: rounding to 16 bits is no other input


def classes_are_last(
    pl_module: pl.LightningModule, batch: Any, probe: Probe, outputs: Tensor, options: Options
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
        tensors: What we give it and perturb; empty if nothing can be compared.
        submodules: The modules that ran in our pass.
    """

    def __init__(self, pl_module: pl.LightningModule, tensors: list[Tensor], submodules: set[nn.Module]) -> None:
        self._tensors = [tensor.detach().clone() for tensor in tensors]
        self._submodules, self._seen = submodules, set[nn.Module]()
        self._given: set[str] = set()  # shapes
        self._has_given_ours = False
        self._pl_module = pl_module
        self._handles = [pl_module.register_forward_pre_hook(self._note_arguments, with_kwargs=True)]
        if not _is_compiled(pl_module):
            self._handles.append(register_module_forward_hook(self._note_module))

    def _note_arguments(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if is_ours(self._pl_module) or self._has_given_ours or not self._tensors:
            return
        with suppress(Exception):  # it runs in the user's step, on whatever is given there
            for value in (each for each in (*args, *keywords.values()) if isinstance(each, Tensor)):
                self._has_given_ours |= _is_like(self._tensors[0], value.detach())
                self._given.add(str(tuple(value.shape)))

    def _note_module(self, module: nn.Module, args: Any, result: Any) -> None:
        if not is_ours(self._pl_module):
            self._seen.add(module)

    def end(self) -> list[str]:
        """Stop watching; returns what differs, a sentence each."""
        for handle in self._handles:
            handle.remove()
        found = []
        if self._given and not self._has_given_ours:
            ours, given = tuple(self._tensors[0].shape), ", ".join(sorted(self._given)[:3])
            found.append(
                f"The step calls the model on other inputs (shape {given}) than ours (shape {ours}): it changes the"
                " batch first. If that is more than augmentation, do the same with"
                " `inputs=lambda batch: (...)`, which returns the model's arguments."
            )
        more = [module for module in self._seen & set(_with_parameters(self._pl_module)) - self._submodules]
        if more:
            names = {module: name for name, module in self._pl_module.named_modules()}
            found.append(
                f"The step also runs {', '.join(sorted(repr(names[module]) for module in more)[:3])}, which `forward`"
                " does not. If it makes the logits, return those from `forward`, or apply it in `outputs=`."
            )
        return found


@contextmanager
def submodules_run(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules that run inside. None of a model with compiled code, which sees no hook that comes later."""
    seen: set[nn.Module] = set()
    if _is_compiled(model):
        yield seen
        return
    handle = register_module_forward_hook(lambda module, args, result: seen.add(module))
    try:
        yield seen
    finally:
        handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    is_whole = getattr(model, "_compiler_ctx", None) is not None  # a LightningModule
    return is_whole or any(hasattr(each, "_orig_mod") or each._compiled_call_impl for each in model.modules())


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if each is not module and next(each.parameters(False), None) is not None]


def _is_like(ours: Tensor, other: Tensor) -> bool:
    if ours.shape != other.shape:
        return False
    scale = float(ours.double().abs().max()) if ours.numel() else 0.0
    return not ours.numel() or float((ours.double() - other.to(ours.device).double()).abs().max()) <= _TOLERANCE * scale
