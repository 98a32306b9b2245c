"""Forward passes over one batch: clean, and with its inputs or the output of a submodule perturbed."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.arguments import AnyPerturbation
from lightning_sensitivity.batches import Inputs, prepare_call, replace_floating
from lightning_sensitivity.nested import describe
from lightning_sensitivity.outputs import Selector, select_outputs

Perturb = Callable[[Tensor], Tensor]


class Probe:
    """A batch that the model can be run on again and again.

    Args:
        model: The module, in eval mode.
        batch: What the loader gave, on the model's device.
        inputs: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        outputs: The same.
        perturbs_inputs: Whether inputs are perturbed, and not the outputs of submodules alone.
        forward: What runs the model with its arguments; by default the module itself.

    Raises:
        MisconfigurationException: If it can't be told what to perturb.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        inputs: Inputs,
        outputs: Selector,
        perturbs_inputs: bool = True,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self._model, self._batch, self._outputs = model, batch, outputs
        self._call = prepare_call(model, batch, inputs, perturbs_inputs, forward)

    def clean(self) -> Tensor:
        """Outputs for the batch as it is."""
        return self._run(self._call.tensors)

    def first_clean(self) -> Tensor:
        """The same, where nobody knows yet whether the model takes such arguments.

        Raises:
            MisconfigurationException: If the model fails.
        """
        try:
            result = self._call.run(self._call.tensors)
        except torch.cuda.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in self._call.tensors)
            hint = (
                "If `forward` takes something else, say what with `inputs=`, such as `inputs=lambda batch: (batch,)`"
                " for the whole batch."
            )
            if "DTensor" in str(error) or "root module first" in str(error):
                hint = "Shard the LightningModule itself, too, and call `self(...)` in its steps."
            raise MisconfigurationException(
                "`SensitivityMonitor` could not run the model on the input that it chose"
                f"{f', a tensor of shape {shapes}' if shapes else ''}: {type(error).__name__}: {error}. {hint}"
            ) from error
        return select_outputs(result, self._outputs, self._batch)

    def perturbed(self, perturb: Perturb, at: str | None = None) -> Tensor:
        """Outputs under a perturbation.

        Args:
            perturb: Gives what takes the place of a tensor; called once for each.
            at: Name of the submodule whose output is perturbed; the inputs, if None.

        Raises:
            MisconfigurationException: If the submodule did not run, or returned nothing that could be perturbed.
        """
        if at is None:
            return self._run([perturb(tensor) for tensor in self._call.tensors])
        with _perturbed_output(self._model, at, perturb):
            return self._run(self._call.tensors)

    def _run(self, tensors: list[Tensor]) -> Tensor:
        return select_outputs(self._call.run(tensors), self._outputs, self._batch)


def apply(perturbation: AnyPerturbation, x: Tensor, generator: torch.Generator) -> Tensor:
    """What a perturbation, which may be the user's own, makes of a tensor.

    Args:
        perturbation: The perturbation.
        x: The tensor; the perturbation gets a copy.
        generator: Its source of randomness, on the device of ``x``.

    Raises:
        MisconfigurationException: If it gives no tensor of the shape, type and device of ``x``.
    """
    new: object = perturbation(x.clone(), generator)
    expected = (x.shape, x.dtype, x.device)
    if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != expected:
        raise MisconfigurationException(
            f"`perturbation` should give a tensor like the one it got ({x.dtype}, shape {tuple(x.shape)}, on"
            f" {x.device}), got {describe(new)}{f' on {new.device}' if isinstance(new, Tensor) else ''}."
        )
    return new


def check_submodule(model: nn.Module, at: str) -> None:
    """Require that a name is that of a submodule.

    Args:
        model: The module, after it was configured.
        at: The name.

    Raises:
        MisconfigurationException: If there is none of that name, with those that resemble it.
    """
    try:
        model.get_submodule(at)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        close = difflib.get_close_matches(at, names, n=3, cutoff=0.4) or names[:3]
        raise MisconfigurationException(
            f"`at` should name a submodule of {type(model).__name__}, such as {', '.join(map(repr, close))}, got"
            f" {at!r}."
        ) from None


@contextmanager
def _perturbed_output(model: nn.Module, at: str, perturb: Perturb) -> Iterator[None]:
    num_calls = 0

    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return replace_floating(result, perturb)

    handle = model.get_submodule(at).register_forward_hook(hook)
    try:
        with _uncompiled_code():
            yield
    finally:
        handle.remove()
    if num_calls == 0:
        raise MisconfigurationException(
            f"`at` should name a submodule that `forward` calls, got {at!r}, which did not run. (In a compiled model"
            " this needs torch 2.6 or newer.)"
        )


def _uncompiled_code() -> AbstractContextManager[Any]:
    """Compiled code does not see a hook that came later. What is compiled stays so, for the other passes."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    if is_compiling and hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
