"""What the entries of a batch are, by name and place: labels or inputs, and what to write to select them."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain

from torch import Tensor

from lightning_sensitivity.model.batches import is_floating, tensors_in

# Names of labels in batches of torch, transformers, chemprop and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "Y", "class")
_LIKE_TARGETS = re.compile("label|target", re.IGNORECASE)
_MAX_NAMED = 3  # candidates that a message names


def is_like_targets(name: object) -> bool:
    """Return whether an entry that no ``forward`` asks for is named like labels."""
    return name in TARGET_NAMES or _LIKE_TARGETS.search(str(name)) is not None


def beside_labels(batch: Mapping[str, object]) -> dict[str, object]:
    """Return the entries that are not called as labels are, and not empty."""
    entries = {name: value for name, value in batch.items() if name not in TARGET_NAMES and value is not None}
    return {name: x for name, x in entries.items() if holds_numbers(x) or not (tensors_in(x) or is_empty(x))}


def holds_numbers(value: object) -> bool:
    """Return whether a value has a tensor that is not empty; an empty list is no input."""
    return any(x.is_nested or 0 not in x.shape[1:] for x in tensors_in(value))


def is_empty(value: object) -> bool:
    """Return whether a value is a collection of nothing."""
    return isinstance(value, list | tuple | Mapping) and not value


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
    found = [path for path, x in named if is_floating(x) and x.ndim > 1 and holds_numbers(x)]
    whole = "for `forward(batch)`, `inputs=lambda batch: (batch,)`"
    return f"{_say('inputs', found)}; {whole}" if found else whole


def targets_hint(batch: object, num_inputs: int) -> str:
    """Say how to select labels: in what follows the inputs, or else anywhere; by name, if there are such names."""
    rest = batch[num_inputs:] if isinstance(batch, list | tuple) else []
    found = [*chain(*(places(item, f"batch[{index}]") for index, item in enumerate(rest, start=num_inputs)))]
    found = found or [(path, name, x) for path, name, x in places(batch) if name or has_one_number(x)]
    named = [path for path, name, _ in found if is_like_targets(name)]
    return _say("targets", named or [path for path, _, _ in found])


def _say(selector: str, candidates: list[str]) -> str:
    """Say what to write for a selector, by the code of its candidates; nothing without any."""
    if not candidates:
        return ""
    others = "".join(f", or `{each}`" for each in candidates[1:_MAX_NAMED])
    return f"`{selector}=lambda batch: {candidates[0]}`{others}"
