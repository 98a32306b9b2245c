"""Which outputs of the model are looked at, and which part of a batch are the labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.models import call
from lightning_sensitivity.models.call import Perturb, Selector, describe


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
