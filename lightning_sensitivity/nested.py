"""Values that hold tensors somewhere inside: mappings, sequences, named tuples, dataclasses, and paths into them."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

_IMMUTABLE = str | bytes | int | float | complex
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
        return {key: value[key] for key in value.keys()}  # noqa: SIM118, of a TensorDict only `keys` gives the keys
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
    if (named := entries(value)) is not None and isinstance(value, Mapping):
        return _rebuilt(value, {**named, key: new})
    if is_dataclass(value):
        return _with_fields(value, {key: new})
    if is_named_tuple(value):
        return value._replace(**{key if isinstance(key, str) else value._fields[key]: new})
    items = list(value)
    items[key] = new
    return tuple(items) if isinstance(value, tuple) else items


def copied(value: Any, but: Sequence[Tensor] = (), strict: bool = False) -> Any:
    """The same value with tensors of its own.

    Args:
        value: The value. Modules are passed on themselves, and so is what can't be copied.
        but: Tensors that need no copy.
        strict: Refuse what can't be copied.

    Raises:
        TypeError: If a part can't be copied (``strict``).
    """
    if isinstance(value, Tensor):
        return value if any(value is tensor for tensor in but) else value.clone()
    if value is None or isinstance(value, _IMMUTABLE | nn.Module):
        return value
    again = partial(copied, but=but, strict=strict)
    try:
        if isinstance(value, Mapping):
            with suppress(_NotRebuilt):
                return _rebuilt(value, {key: again(item) for key, item in (entries(value) or {}).items()})
        if is_dataclass(value):
            return _with_fields(value, {name: again(item) for name, item in (entries(value) or {}).items()})
        if is_named_tuple(value):
            return type(value)(*map(again, value))
        if type(value) in (list, tuple):
            return type(value)(map(again, value))
        return copy.deepcopy(value, {id(tensor): tensor for tensor in but})
    except Exception as error:
        if strict:
            raise TypeError(f"{describe(value)} can't be copied ({type(error).__name__}: {error}).") from error
        return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nested value."""
    if isinstance(value, Tensor):
        return [value]
    named = entries(value)
    items = named.values() if named is not None else value if is_sequence(value) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def is_plain(value: Any) -> bool:
    """Whether it is made of tensors, numbers and containers alone, so that its copy holds no more than itself."""
    if value is None or isinstance(value, Tensor | _IMMUTABLE):
        return True
    if (named := entries(value)) is not None:
        return all(map(is_plain, named.values()))
    return (is_named_tuple(value) or type(value) in (list, tuple)) and all(map(is_plain, value))


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


class _NotRebuilt(TypeError):
    pass


def _rebuilt(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping like another one, with its own storage and these items, which have the keys of the other.

    Raises:
        TypeError: If its class shows no way to make one, a `_NotRebuilt`.
    """
    if type(value) is dict:
        return items
    problem: Exception | None = None
    # A shallow copy keeps attributes, but of a class that keeps its items elsewhere it might share them.
    make_anew: Any = type(value)
    for make in (partial(_copied_with, value), make_anew) if isinstance(value, dict | UserDict) else (make_anew,):
        try:
            new = make(items)
            # Attributes that are items, too, would be those of the other.
            attributes = getattr(new, "__dict__", {})
            if all(new[key] is item and attributes.get(key, item) is item for key, item in items.items()):
                return new
        except Exception as error:
            problem = error
    raise _NotRebuilt(f"A {type(value).__name__} can't be made of other items.") from problem


def _copied_with(value: Any, items: Mapping[Any, Any]) -> Any:
    new = copy.copy(value)
    for key, item in items.items():
        new[key] = item
    return new
