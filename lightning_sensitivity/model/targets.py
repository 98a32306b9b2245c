"""Where the labels of a batch are: by name, or by what a ``forward`` does not take."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_sensitivity.messages import Refused, Selector, describe, refuse_on_error
from lightning_sensitivity.model.arguments import has_options, is_sequence, required_names, split_elements
from lightning_sensitivity.model.batches import clone_tensors, entry
from lightning_sensitivity.model.entries import TARGET_NAMES, targets_hint


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets a copy of its tensors.
        targets: A function ``batch -> tensor``. By default, the labels are the only entry, field or attribute
            that is called ``label``, ``labels``, ``target``, ``targets``, ``y``, ``Y`` or ``class``; otherwise
            the element of a tuple or list that follows the inputs of ``forward``, if no other one may be it.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    if targets is None:
        selected = _find_targets(model, batch)
    else:
        with refuse_on_error(f"`targets` failed on {describe(batch)}"):
            selected = targets(clone_tensors(batch))
    if not isinstance(selected, Tensor):
        rest = split_elements(model, batch)[1] if is_sequence(batch) else ()
        hint = "" if targets else targets_hint(batch, rest or batch)
        raise Refused(f"`targets` should return the labels{hint} from {describe(batch)}.")
    return selected


def has_targets(model: nn.Module, batch: object) -> bool:
    """Return whether it is clear where the labels in a batch are."""
    return isinstance(_find_targets(model, batch), Tensor)


def _find_targets(model: nn.Module, batch: object) -> object:
    """Find the labels by name or position; None if it is not clear where they are."""
    names = set(TARGET_NAMES).difference(required_names(model) if isinstance(batch, tuple) else ())
    found = [value for value in map(partial(entry, batch), names) if isinstance(value, Tensor)]
    if found or not is_sequence(batch):
        return found[0] if len(found) == 1 else None
    rest = split_elements(model, batch)[1]  # what follows the inputs
    has_choice = len(rest) > 1 and (any(isinstance(x, Tensor) for x in rest[1:]) or has_options(model))
    return rest[0] if rest and not has_choice else None
