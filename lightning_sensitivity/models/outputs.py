"""Which outputs of the model are looked at, and which part of a batch are the labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.functional.sensitivity import wide_dtype
from lightning_sensitivity.models.call import (
    TARGET_NAMES,
    Perturb,
    Selector,
    describe,
    entries,
    forward_parameters,
    is_perturbable,
    is_sequence,
    num_required,
    part,
    with_entry,
)


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
        selected = part(batch, targets, "targets")
    elif is_sequence(batch):
        if len(batch) != max(1, num_required(forward_parameters(model))) + 1:
            raise MisconfigurationException(
                f"Expected a batch of the model's inputs and one more element, the labels, got {describe(batch)}."
            )
        selected = batch[-1]
    else:
        named = entries(batch)
        values = [getattr(batch, n, None) if named is None else named.get(n) for n in TARGET_NAMES]
        found = [value for value in values if isinstance(value, Tensor)]
        if isinstance(batch, Tensor) or len(found) != 1:
            names = ", ".join(map(repr, TARGET_NAMES))
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
    if isinstance(result, Tensor) and is_perturbable(result):
        return perturb(result)
    named = entries(result)
    items = list(named.items()) if named is not None else list(enumerate(result)) if is_sequence(result) else []
    keys = [key for key, value in items if isinstance(value, Tensor) and is_perturbable(value)]
    if not keys:
        raise MisconfigurationException(
            f"What the submodule (`at=`) returns should hold a dense floating tensor, got {describe(result)}."
        )
    return with_entry(result, keys[0], perturb)


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are those of a softmax, within rounding; waits for the device.

    Args:
        outputs: Outputs, ``(N, K, ...)`` or ``(N,)``.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.numel() or bool((outputs < 0).any()):
        return False
    sums = outputs.to(wide_dtype(outputs.device)).sum(1)
    return bool((sums - 1).abs().max() <= _tolerance(outputs))


def are_log_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are those of a log-softmax, within rounding; waits for the device.

    Args:
        outputs: Outputs, ``(N, K, ...)`` or ``(N,)``.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.numel() or bool((outputs > 0).any()):
        return False
    return bool(outputs.to(wide_dtype(outputs.device)).logsumexp(1).abs().max() <= _tolerance(outputs))


def _tolerance(outputs: Tensor) -> float:
    # Under autocast outputs may have been widened after they were rounded to 16 bits.
    device = outputs.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    coarsest = torch.get_autocast_dtype(device) if is_cast else torch.float32
    epsilon = max(torch.finfo(dtype).eps for dtype in (outputs.dtype, coarsest, torch.float32))
    return 4 * epsilon * (1 + math.log(outputs.shape[1]))


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
        return num_required(inspect.signature(outputs).parameters.values()) == 2
    except ValueError:  # built in, an `itemgetter`, say
        return False
