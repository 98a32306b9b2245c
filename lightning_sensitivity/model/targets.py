"""Find the labels of a batch."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, describe
from lightning_sensitivity.model.forward import TARGET_NAMES, num_required


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets the batch itself, and must not write to it.
        targets: A function ``batch -> tensor``. By default, the labels are the last element of a tuple or list, if all
            other elements are inputs of ``forward``; otherwise the only entry or attribute that is called ``label``,
            ``labels``, ``target``, ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    selected = _find_targets(model, batch) if targets is None else _call_targets(targets, batch)
    if not isinstance(selected, Tensor):
        key = repr(list(batch)[-1]) if isinstance(batch, Mapping) and batch else "1"
        raise MisconfigurationException(
            f"`targets` should return the labels, such as `targets=lambda batch: batch[{key}]`, from {describe(batch)}."
        )
    return selected


def _find_targets(model: nn.Module, batch: Any) -> object:
    """Find the labels by position or name; None if it is not clear where they are."""
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, list | tuple):
        return batch[-1] if len(batch) == max(1, num_required(model)) + 1 else None
    named = [_entry(batch, name) for name in TARGET_NAMES]
    tensors = [value for value in named if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _call_targets(targets: Selector, batch: Any) -> object:
    try:
        return targets(batch)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MisconfigurationException(f"`targets` failed on {describe(batch)}: {reason}.") from error


def _entry(batch: Any, name: str) -> object:
    """Return an entry of a mapping, or an attribute of another object; None if there is none."""
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
