"""What the entries of a batch are, by name and place: labels or inputs, and what to write to select them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_sensitivity.running.batches import is_floating, tensors_in

# Names of labels in batches of torch, transformers, chemprop and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "Y", "class")
_LIKE_TARGETS = re.compile("label|target", re.IGNORECASE)
_MAX_NAMED = 3  # candidates that a message names


def is_like_targets(name: object) -> bool:
    """Return whether an entry that no ``forward`` asks for is named like labels."""
    return name in TARGET_NAMES or _LIKE_TARGETS.search(str(name)) is not None


def without_labels(value: Any) -> Any:
    """Return a mapping without the entries that are named like labels, and all else as it is."""
    if not isinstance(value, Mapping) or not any(map(is_like_targets, value)):
        return value
    return {name: item for name, item in value.items() if not is_like_targets(name)}


def beside_labels(batch: Mapping[str, object]) -> dict[str, object]:
    """Return the entries that are not called as labels are, and not empty."""
    return {name: value for name, value in batch.items() if name not in TARGET_NAMES and not is_empty(value)}


def is_empty(value: object) -> bool:
    """Return whether a value holds nothing: None, a collection without items, or tensors without numbers."""
    if tensors := tensors_in(value):
        return not any(x.is_nested or 0 not in x.shape[1:] for x in tensors)
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def is_constant(value: object) -> bool:
    """Return whether a value is the same for all samples, such as a flag, or nothing."""
    return isinstance(value, bool | int | float | str) or is_empty(value)


def has_one_number(x: Tensor) -> bool:
    """Return whether a tensor has one number for each sample, ``(N,)`` or ``(N, 1)``."""
    return x.ndim > 0 and x.shape[1:] in ((), (1,))


def places(value: object, path: str = "batch", name: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """List the tensors in a value, each with the code that selects it, and the name of its entry, if it has one."""
    if isinstance(value, Tensor):
        yield path, name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from places(item, f"{path}[{key!r}]", str(key))
    elif isinstance(value, list | tuple):
        fields = getattr(value, "_fields", [""] * len(value))
        for index, (field, item) in enumerate(zip(fields, value, strict=True)):
            yield from places(item, f"{path}.{field}" if field else f"{path}[{index}]", field)


def place_of(batch: object, x: Tensor) -> str:
    """Return the code that selects a tensor from a batch."""
    return next((path for path, _, each in places(batch) if each is x), "batch[...]")


def inputs_hint(batch: object) -> str:
    """Say how to select the inputs of a mapping: its floating tensors, or the whole; of another batch nothing."""
    if not isinstance(batch, Mapping):
        return ""
    named = [(path, x) for path, name, x in places(batch) if name not in TARGET_NAMES]
    hint = _say("inputs", [path for path, x in named if is_floating(x) and x.ndim > 1 and not is_empty(x)])
    return "; ".join(filter(None, [hint, "for `forward(batch)`, `inputs=lambda batch: (batch,)`"]))


def targets_hint(batch: object, candidates: object) -> str:
    """Say how to select labels, by name if there are such names; candidates are a part of the batch, or all of it."""
    tensors = {*map(id, tensors_in(candidates))} - {id(batch)}
    found = {path: name for path, name, x in places(batch) if id(x) in tensors}
    named = [path for path, name in found.items() if is_like_targets(name)]
    hint = _say("targets", named or [*found])
    return f", such as {hint}," if hint else ""


def _say(selector: str, candidates: list[str]) -> str:
    """Say what to write for a selector, by the code of its candidates; nothing without any."""
    if not candidates:
        return ""
    others = "".join(f", or `{each}`" for each in candidates[1:_MAX_NAMED])
    return f"`{selector}=lambda batch: {candidates[0]}`{others}"
