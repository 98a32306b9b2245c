"""Which tensor of what the model returned is compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sensitivity.dtypes import accumulation_dtype, rounding_epsilon
from lightning_sensitivity.nested import describe, is_sequence

Selector = Callable[..., Any] | int | str | None


def select_outputs(result: Any, outputs: Selector, batch: Any = None, num_samples: int | None = None) -> Tensor:
    """The tensor to compare in what the model returned.

    Args:
        result: A tensor; a tuple or list, of which the first element is taken; or a mapping or object with
            ``logits``.
        outputs: A key or attribute, an index, a callable ``result -> tensor`` or ``(result, batch) -> tensor``, or None
            for the rules above.
        batch: What the loader gave.
        num_samples: Of the batch, if known: a scalar is the output of one.

    Returns:
        The selected tensor.

    Raises:
        MisconfigurationException: If no tensor was found.
        ValueError: If it is a scalar, and not of one sample.
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
    if not isinstance(selected, Tensor):
        raise MisconfigurationException(
            "The model's output should be a tensor, a tuple that starts with one, or a mapping or object with `logits`,"
            f" got {describe(result)}. Choose the tensor with `outputs=` (a key, an index or a callable)."
        )
    if selected.ndim == 0 and num_samples == 1:  # of a model that squeezes, in a last batch
        return selected[None]
    if selected.ndim == 0:
        raise ValueError(
            "Expected the model's outputs to have the shape (N, K, ...) or (N,), but got a scalar, a loss perhaps."
            " Choose another part of what it returns with `outputs=` (a key, an index or a callable)."
        )
    return selected


def are_log_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are those of a log-softmax, within rounding, which no logits are by chance.

    Args:
        outputs: Outputs, ``(N, K, ...)`` or ``(N,)``.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.numel():
        return False
    wide = outputs.to(accumulation_dtype(outputs.device))
    epsilon = max(rounding_epsilon(outputs), torch.finfo(torch.float32).eps)  # it may have been widened since
    # Each is rounded by its share: that is the entropy, in all, which is at most log K.
    tolerance = 4 * epsilon * (1 + math.log(outputs.shape[1]))
    return bool((wide.max() <= 0) & (wide.logsumexp(1).abs().max() <= tolerance))


def num_required(parameters: Iterable[inspect.Parameter]) -> int:
    """How many positional arguments a call must give."""
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _part_of_result(result: Any, outputs: int | str | None) -> Any:
    if isinstance(outputs, str) and not isinstance(result, Mapping):
        return getattr(result, outputs)
    if outputs is not None:
        return result[outputs]
    if isinstance(result, Mapping) and "logits" in result:
        return result["logits"]
    if not isinstance(result, Tensor) and hasattr(result, "logits"):
        return result.logits
    return result[0] if is_sequence(result) and result else result


def _wants_batch(outputs: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(outputs).parameters.values()
    except ValueError:  # built in, an `itemgetter`, say
        return False
    return num_required(parameters) == 2
