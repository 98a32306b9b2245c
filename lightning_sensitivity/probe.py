"""Forward passes over one batch: clean, and with its inputs or the output of a submodule perturbed."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn

from lightning_sensitivity.arguments import AnyPerturbation
from lightning_sensitivity.batches import Inputs, prepare_call, replace_floating
from lightning_sensitivity.dtypes import accumulation_dtype
from lightning_sensitivity.isolation import preserved_tensors
from lightning_sensitivity.nested import describe
from lightning_sensitivity.outputs import Selector, select_outputs
from lightning_sensitivity.perturbations import Perturbation

Perturb = Callable[[Tensor], Tensor]

# What a model was run on, and what may help where it fails.
_CHOSEN = (
    "the input that it chose",
    "If `forward` takes something else, say what with `inputs=`, such as `inputs=lambda batch: (batch,)` for the whole"
    " batch.",
)
_PERTURBED = (
    "the perturbed input",
    "If it runs on the input as it is, use a `perturbation` that gives what it takes, or perturb the output of a"
    " submodule with `at=`.",
)


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
        first = self._call.tensors[0] if self._call.tensors else None
        self._num_samples = None if first is None or first.ndim == 0 else len(first)

    def clean(self, is_first: bool = False) -> Tensor:
        """Outputs for the batch as it is.

        Args:
            is_first: Whether nobody knows yet that the model takes such arguments.

        Raises:
            MisconfigurationException: If the first pass fails.
        """
        with preserved_tensors(self._model):
            return self._clean(is_first)

    def _clean(self, is_first: bool = False) -> Tensor:
        own = [tensor.clone() for tensor in self._call.tensors]  # which the model may write into
        return self._run(own, _CHOSEN if is_first else None)

    def _run(self, tensors: Sequence[Tensor], what_and_hint: tuple[str, str] | None) -> Tensor:
        with nullcontext() if what_and_hint is None else self._explained(*what_and_hint):
            result = self._call.run(tensors)
        return self._select(result).clone()  # the next pass may write into it, and so may we

    @contextmanager
    def _explained(self, what: str, hint: str) -> Iterator[None]:
        """Say of an error in the model whose it is."""
        try:
            yield
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_oom_error(error):  # which Lightning's finder of batch sizes waits for
                raise
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in self._call.tensors)
            if "DTensor" in str(error) or "root module first" in str(error):
                hint = "Shard the LightningModule itself, too, and call `self(...)` in its steps."
            raise MisconfigurationException(
                f"`SensitivityMonitor` could not run the model on {what}"
                f"{f', a tensor of shape {shapes}' if shapes else ''}: {type(error).__name__}: {error}. {hint}"
            ) from error

    def perturbed(self, perturb: Perturb, at: str | None = None) -> Tensor:
        """Outputs under a perturbation.

        Args:
            perturb: Gives what takes the place of a tensor; called once for each.
            at: Name of the submodule whose output is perturbed; the inputs, if None.

        Raises:
            MisconfigurationException: If the submodule did not run, or returned nothing that could be perturbed.
        """
        with preserved_tensors(self._model):
            return self._perturbed(perturb, at)

    def _perturbed(self, perturb: Perturb, at: str | None, is_first: bool = False) -> Tensor:
        if at is None:
            return self._run([perturb(tensor) for tensor in self._call.tensors], _CHOSEN if is_first else _PERTURBED)
        with _perturbed_output(self._model, at, perturb):
            return self._clean(is_first)

    def gradient(
        self, second_moment: Callable[[Tensor], Tensor | float], at: str | None = None, is_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The small-noise limit of the squared output change of each sample, by one backward pass.

        Args:
            second_moment: That of the noise, for a tensor to perturb.
            at: As for :meth:`perturbed`.
            is_first: As for :meth:`clean`.

        Returns:
            Outputs for the batch as it is, and E[(∇ mean_k f_k · ε)²] = Σ E[ε²] (∇ mean_k f_k)² over all elements of a
            sample, shape ``(N,)``.

        Raises:
            ValueError: If an output has positions, or none for each sample: a backward pass gives their sum alone. If
                no gradient reaches what is perturbed.
        """
        clean: list[Tensor] = []
        noise: list[Tensor] = []

        def perturb(x: Tensor) -> Tensor:
            # Noise of 0, of which the derivative is taken: x itself may hang on what was perturbed before.
            clean.append(x.detach())
            noise.append(torch.zeros_like(x, requires_grad=True))
            return x.clone() + noise[-1]

        # A graph needs copies of what inference mode made, of autocast's copies of the weights, too.
        with (
            preserved_tensors(self._model),
            torch.inference_mode(False),
            torch.enable_grad(),
            _uncompiled_code(),
        ):
            torch.clear_autocast_cache()
            outputs = self._perturbed(perturb, at, is_first)
            if outputs.ndim > 2 or any(len(x) != len(outputs) for x in clean):
                raise ValueError(
                    "Expected outputs (N, K) or (N,) of N samples for `method='gradient'`, which sees one output a"
                    f" sample, but got {tuple(outputs.shape)} for {' and '.join(str(tuple(x.shape)) for x in clean)}."
                )
            averages = outputs.to(accumulation_dtype(outputs.device)).reshape(len(outputs), -1).mean(1)
            gradients: Sequence[Tensor | None] = [None]
            if averages.requires_grad:
                gradients = torch.autograd.grad(averages.sum(), noise, allow_unused=True)
            torch.clear_autocast_cache()
        squares = [
            (second_moment(x) * gradient.to(averages.dtype).square()).reshape(len(outputs), -1).sum(1)
            for x, gradient in zip(clean, gradients, strict=False)
            if gradient is not None
        ]
        if not squares:
            raise ValueError(
                "Expected a gradient of the outputs by what is perturbed for `method='gradient'`, but none reaches it:"
                " the model ignores it, or runs under `no_grad` or on detached tensors. Use `method='noise'`."
            )
        return outputs.detach(), torch.stack(squares).sum(0)

    @property
    def tensors(self) -> list[Tensor]:
        """What is perturbed, as it is."""
        return self._call.tensors

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with, positional and by keyword: the tensors of the batch that was given."""
        return self._call.arguments

    def select(self, result: Any) -> Tensor:
        """The outputs to compare in what the model returned.

        Args:
            result: What it returned.
        """
        with preserved_tensors(self._model) if callable(self._outputs) else nullcontext():
            return self._select(result)

    def _select(self, result: Any) -> Tensor:
        return select_outputs(result, self._outputs, self._batch, self._num_samples)


def apply(perturbation: AnyPerturbation, x: Tensor, generator: torch.Generator) -> Tensor:
    """What a perturbation, which may be the user's own, makes of a tensor.

    Args:
        perturbation: The perturbation.
        x: The tensor; the user's own gets a copy, which it may write into.
        generator: Its source of randomness, on the device of ``x``.

    Raises:
        MisconfigurationException: If it gives no tensor of the shape, type and device of ``x``.
    """
    new: object = perturbation(x if isinstance(perturbation, Perturbation) else x.clone(), generator)
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
        if isinstance(model.get_submodule(at), torch.jit.ScriptModule):
            raise MisconfigurationException(
                f"`at` should name a submodule that takes hooks, got {at!r}, a scripted one."
            )
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
            f"`at` should name a submodule that `forward` calls, got {at!r}, which did not run. (Of some modules"
            " only the weights are used, as of attention's `out_proj`; a compiled model needs torch 2.6 or newer.)"
        )


def _uncompiled_code() -> AbstractContextManager[Any]:
    """Compiled code does not see a hook that came later. What is compiled stays so, for the other passes."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    if is_compiling and hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
