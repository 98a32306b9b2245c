"""The outputs of a model for a batch, clean or perturbed, and the labels of the batch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.models import call
from lightning_sensitivity.models.call import Call, Perturb, Selector, describe
from lightning_sensitivity.models.passes import Passes
from lightning_sensitivity.perturbations.noise import AnyPerturbation, apply_perturbation, noise_generator


class Probe:
    """The outputs of a model for one batch: as it is, or perturbed. Use it within :meth:`Passes.measuring`.

    Args:
        passes: Runs the model.
        model: What is called; the module itself, or what a strategy has put around it.
        call: How.
        outputs: Which of its outputs; see :func:`~lightning_sensitivity.models.outputs.select_outputs`.
        batch: What the loader gave.

    Attributes:
        classes_last: Whether outputs are ``(N, ..., K)``, and are to become ``(N, K, ...)``; False at first.
        tensors: What is perturbed, as it is.
        first_tensors: The first of these, or of all arguments; none if there is none.
    """

    def __init__(
        self, passes: Passes, model: Callable[..., Any], call: Call, outputs: Selector = None, batch: Any = None
    ) -> None:
        self._passes, self._model, self._call, self._outputs, self._batch = passes, model, call, outputs, batch
        self.classes_last = False
        self.tensors = call.tensors()
        self.first_tensors = self.tensors[:1] or [x for x in call.arguments.values() if isinstance(x, Tensor)][:1]
        self._num_samples = len(self.tensors[0]) if self.tensors and self.tensors[0].ndim else None

    def outputs(
        self,
        perturb: Perturb | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        then: Callable[[Tensor], Any] = torch.clone,
    ) -> Any:
        """The outputs.

        Args:
            perturb: Gives what takes the place of an input; None for the batch as it is.
            within: Gives what the model runs in. What is changed in the module before a pass would be put back by it.
            then: What is made of the outputs at once, and returned: a copy, since a later pass may write into them.
        """

        def run() -> Any:
            args, keywords = self._call.made(perturb)
            with within():
                result = self._model(*args, **keywords)
            outputs = select_outputs(result, self._outputs, self._batch, self._num_samples)
            return then(outputs.movedim(-1, 1) if self.classes_last else outputs)

        return self._passes.run(run)

    def noisy_outputs(
        self,
        perturbation: AnyPerturbation,
        key: tuple[int, int, int, int],
        draw: int,
        at: nn.Module | None = None,
        note: Callable[[Tensor], None] | None = None,
        then: Callable[[Tensor], Any] = torch.clone,
    ) -> Any:
        """The outputs under one draw of the noise.

        Args:
            perturbation: What is done to the inputs.
            key: Seed, rank, loader and batch; see :func:`~lightning_sensitivity.perturbations.noise_generator`.
            draw: Index of the draw.
            at: The submodule whose output is perturbed; None for the inputs.
            note: Gets what is perturbed in the first draw, as it was.
            then: What is made of the outputs at once.
        """
        source = cache(partial(noise_generator, *key, draw))  # one for all tensors of the draw

        def perturb(x: Tensor) -> Tensor:
            if draw == 0 and note is not None:
                note(x)
            return apply_perturbation(perturbation, x, source(x.device))

        return self.outputs(perturb, then=then) if at is None else self.outputs_at(at, perturb, then)

    def outputs_at(self, module: nn.Module, perturb: Perturb, then: Callable[[Tensor], Any] = torch.clone) -> Any:
        """The outputs where what a submodule returns is perturbed, each time that it runs.

        Args:
            module: The submodule.
            perturb: Gives what takes the place of its output.
            then: What is made of the outputs at once.

        Raises:
            MisconfigurationException: If it did not run.
        """
        has_run = False

        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            nonlocal has_run
            has_run = True
            return perturbed_result(result, perturb)

        def made(outputs: Tensor) -> Any:
            if not has_run:
                raise MisconfigurationException(
                    "`at` should name a submodule that `forward` calls, got one that did not run. (Of some modules only"
                    " the weights are used, as of attention's `out_proj`; a compiled model needs torch 2.6 or newer.)"
                )
            return then(outputs)

        with module.register_forward_hook(hook), _uncompiled_code():
            return self.outputs(then=made)


def select_outputs(result: Any, outputs: Selector = None, batch: Any = None, num_samples: int | None = None) -> Tensor:
    """The outputs in what the model returned.

    Args:
        result: A tensor; a tuple or list, of which the first element is taken; or a mapping or object with
            ``logits``.
        outputs: A key or attribute, an index, a function ``result -> tensor`` or ``(result, batch) -> tensor``, or None
            for the rules above.
        batch: What the loader gave.
        num_samples: Of the batch, if known: a scalar is the output of one.

    Returns:
        The selected tensor.

    Raises:
        MisconfigurationException: If there is no floating tensor, or it is a scalar and not of one sample.
    """
    if callable(outputs):
        selected = outputs(result, batch) if _wants_batch(outputs) else outputs(result)
    else:
        try:
            selected = _part_of_result(result, outputs)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise MisconfigurationException(
                f"`outputs={outputs!r}` should name a part of what the model returns, got {describe(result)}."
            ) from error
    if isinstance(selected, Tensor) and selected.ndim == 0 and num_samples == 1:  # squeezed, in a last batch
        selected = selected[None]
    if not isinstance(selected, Tensor) or selected.ndim == 0 or not selected.is_floating_point():
        raise MisconfigurationException(
            "The model's output should be a floating tensor (N, K, ...) or (N,), a tuple that starts with one, or a"
            f" mapping or object with `logits`, got {describe(selected)}"
            f"{'' if selected is result else f' in {describe(result)}'}. Choose the tensor with `outputs=` (a key, an"
            " index or a function)."
        )
    return selected


def select_targets(model: nn.Module, batch: Any, targets: Selector = None) -> Tensor:
    """The labels in a batch.

    Args:
        model: The module, of which ``forward`` says which elements of a batch are inputs.
        batch: What the loader gave.
        targets: A key, an index, a function ``batch -> tensor``, or None: the last of the elements of a tuple or list
            if all others are inputs of ``forward``; the only entry or attribute that is called ``label``, ``labels``,
            ``target``, ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If they can't be told, or are no tensor.
    """
    if callable(targets):
        selected = targets(batch)
    elif targets is not None:
        selected = call.part(batch, targets, "targets")
    elif call.is_sequence(batch):
        if len(batch) != max(1, call.num_required(call.forward_parameters(model))) + 1:
            raise MisconfigurationException(
                f"Expected a batch of the model's inputs and one more element, the labels, got {describe(batch)}."
            )
        selected = batch[-1]
    else:
        named = call.entries(batch)
        values = [getattr(batch, n, None) if named is None else named.get(n) for n in call.TARGET_NAMES]
        found = [value for value in values if isinstance(value, Tensor)]
        if isinstance(batch, Tensor) or len(found) != 1:
            names = ", ".join(map(repr, call.TARGET_NAMES))
            raise MisconfigurationException(f"Expected one entry of the batch called {names}, got {describe(batch)}.")
        selected = found[0]
    if not isinstance(selected, Tensor):
        raise MisconfigurationException(f"Expected the labels to be a tensor, got {describe(selected)}.")
    return selected


def perturbed_result(result: Any, perturb: Perturb) -> Any:
    """What a submodule returned, with its tensor perturbed: the first one that is floating.

    Args:
        result: What it returned: a tensor, a sequence, a mapping or a dataclass.
        perturb: Gives the tensor in its place.

    Raises:
        MisconfigurationException: If there is none.
    """
    if isinstance(result, Tensor) and call.is_perturbable(result):
        return perturb(result)
    named = call.entries(result)
    items = list(named.items()) if named is not None else list(enumerate(result)) if call.is_sequence(result) else []
    keys = [key for key, value in items if isinstance(value, Tensor) and call.is_perturbable(value)]
    if not keys:
        raise MisconfigurationException(
            f"What the submodule (`at=`) returns should hold a dense floating tensor, got {describe(result)}."
        )
    return call.with_entry(result, keys[0], perturb)


def _part_of_result(result: Any, outputs: int | str | None) -> Any:
    if isinstance(result, Tensor) and outputs is not None:
        raise TypeError  # not the outputs of one sample
    if isinstance(outputs, str) and not isinstance(result, Mapping):
        return getattr(result, outputs)
    if outputs is not None:
        return result[outputs]
    if isinstance(result, Mapping) and "logits" in result:
        return result["logits"]
    if not isinstance(result, Tensor) and hasattr(result, "logits"):
        return result.logits
    return result[0] if isinstance(result, list | tuple) and result else result


def _wants_batch(outputs: Callable[..., Any]) -> bool:
    try:
        return call.num_required(inspect.signature(outputs).parameters.values()) == 2
    except ValueError:  # built in, an `itemgetter`, say
        return False


def _uncompiled_code() -> AbstractContextManager[Any]:
    """Compiled code does not see a hook that came later. What is compiled stays so, for the other passes."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    if is_compiling and hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
