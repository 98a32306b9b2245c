"""Values that hold tensors somewhere inside: mappings, sequences, named tuples, dataclasses, and paths into them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]  # keys, indices and names of fields, from the outside in


def is_sequence(value: object) -> bool:
    """Whether it is a list, a tuple or the like; a str is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_named_tuple(value: object) -> bool:
    """Whether its class is a named tuple's, which takes its items one by one."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_dataclass(value: object) -> bool:
    """Whether it is an instance of a dataclass, and no mapping as well (the outputs of transformers are both)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping)


def entries(value: Any) -> Mapping[Any, Any] | None:
    """What has a name in a mapping or a dataclass, None for anything else."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


def part(value: Any, path: Path) -> Any:
    """The value at the end of a path.

    Raises:
        AttributeError: If there is none; or another of the four.
        IndexError: The same.
        KeyError: The same.
        TypeError: The same.
    """
    for key in path:
        has_fields = is_dataclass(value) or (is_named_tuple(value) and isinstance(key, str))
        value = getattr(value, key) if has_fields else value[key]
    return value


def replaced(value: Any, path: Path, new: Any) -> Any:
    """The value with another part at the end of a path; what is along the path is copied, the rest shared."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    new = replaced(part(value, (key,)), rest, new)
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        mapping[key] = new
        return mapping
    if isinstance(value, Mapping):
        return {**value, key: new}
    if is_dataclass(value):
        return _with_fields(value, {key: new})
    if is_named_tuple(value):
        return value._replace(**{key if isinstance(key, str) else value._fields[key]: new})
    items = list(value)
    items[key] = new
    return tuple(items) if isinstance(value, tuple) else items


def copied(value: Any, but: Sequence[Tensor] = ()) -> Any:
    """The same value with tensors of its own, as far as such containers go; anything else is passed on itself.

    Args:
        value: The value.
        but: Tensors that need no copy.
    """
    if isinstance(value, Tensor):
        return value if any(value is tensor for tensor in but) else value.clone()
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = copied(item, but)
        return new
    if is_dataclass(value):
        return _with_fields(value, {name: copied(item, but) for name, item in (entries(value) or {}).items()})
    if is_named_tuple(value):
        return type(value)(*(copied(item, but) for item in value))
    if type(value) in (list, tuple):
        return type(value)(copied(item, but) for item in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nested value."""
    if isinstance(value, Tensor):
        return [value]
    named = entries(value)
    items = named.values() if named is not None else value if is_sequence(value) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def can_be_copied(value: Any) -> bool:
    """Whether :func:`copied` gives a value that shares nothing with it that can be written to."""
    if value is None or isinstance(value, Tensor | str | bytes | int | float):
        return True
    if isinstance(value, MutableMapping) or is_dataclass(value):
        return all(map(can_be_copied, (entries(value) or {}).values()))
    return (is_named_tuple(value) or type(value) in (list, tuple)) and all(map(can_be_copied, value))


def describe(value: Any) -> str:
    """What an error message calls a value."""
    if isinstance(value, Tensor):
        return f"a tensor ({value.dtype}, shape {tuple(value.shape)})"
    if (names := entries(value)) is not None:
        return f"{type(value).__name__} with the keys {', '.join(map(repr, names))}"
    if is_sequence(value):
        return f"{type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__


def _with_fields(value: Any, fields: Mapping[str, Any]) -> Any:
    new = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(new, name, item)  # a frozen dataclass has no other way
    return new
