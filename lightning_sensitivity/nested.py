"""Values that hold tensors somewhere inside: mappings, sequences, named tuples, dataclasses, and paths into them."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

_IMMUTABLE = str | bytes | int | float | complex
_WITHOUT_TENSORS = range | bytes | bytearray | memoryview  # among the sequences
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
        return dict(_items(value))
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
    if isinstance(value, Mapping):
        return _rebuilt(value, {**dict(_items(value)), key: new})
    if is_dataclass(value):
        return _with_fields(value, {key: new})
    if is_named_tuple(value):
        return value._replace(**{key if isinstance(key, str) else value._fields[key]: new})
    items = list(value)
    items[key] = new
    return tuple(items) if isinstance(value, tuple) else items


def copied(value: Any, but: Sequence[Tensor] = (), strict: bool = False) -> Any:
    """The same value with tensors of its own; what is there twice is so in the copy, too.

    Args:
        value: The value. Objects that hold no tensors, and modules, are passed on themselves.
        but: Tensors that need no copy.
        strict: Refuse what holds tensors and can't be copied; otherwise it is passed on itself, too.

    Raises:
        TypeError: If a part can't be copied (``strict``).
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in but}
    try:
        return _copied(value, memo, strict, frozenset())
    except _Cycle:
        return _copied_as_object(value, memo, strict)


def _copied(value: Any, memo: dict[int, Any], strict: bool, outer: frozenset[int]) -> Any:
    if id(value) in outer:
        raise _Cycle
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.clone()
        return memo[id(value)]
    if value is None or isinstance(value, _IMMUTABLE | nn.Module):
        return value
    again = partial(_copied, memo=memo, strict=strict, outer=outer | {id(value)})
    if isinstance(value, Mapping):
        with suppress(_NotRebuilt):
            return _rebuilt(value, {key: again(item) for key, item in _items(value)})
    elif is_dataclass(value):
        return _with_fields(value, {name: again(item) for name, item in _attributes(value).items()})
    elif is_named_tuple(value):
        return value._make(map(again, value))
    elif type(value) in (list, tuple):
        return type(value)(map(again, value))
    return _copied_as_object(value, memo, strict)


def _copied_as_object(value: Any, memo: dict[int, Any], strict: bool) -> Any:
    # Others may lead to whole data sets. One that moves itself to a device would take the place of the user's.
    if not tensors_in([value, getattr(value, "__dict__", None)]) and not hasattr(value, "to"):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        if strict:
            raise TypeError(f"{describe(value)} can't be copied ({type(error).__name__}: {error}).") from error
        return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nested value."""
    return list(_tensors_in(value, set()))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    named = entries(value)
    if named is None and not (is_sequence(value) and not isinstance(value, _WITHOUT_TENSORS)):
        return
    if id(value) not in seen:
        inner = seen | {id(value)}  # what is there twice counts twice, but not what is inside of itself
        for item in value if named is None else named.values():
            yield from _tensors_in(item, inner)


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


def _items(mapping: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    return ((key, mapping[key]) for key in mapping.keys())  # noqa: SIM118, a TensorDict gives its rows otherwise


def _attributes(value: Any) -> dict[str, Any]:
    """Of a dataclass: its fields, and what it has beside them."""
    return {**(entries(value) or {}), **getattr(value, "__dict__", {})}


def _with_fields(value: Any, fields: Mapping[str, Any]) -> Any:
    new = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(new, name, item)  # a frozen dataclass has no other way
    return new


class _Cycle(Exception):
    """Of what is inside of itself."""


class _NotRebuilt(TypeError):
    """Of a mapping whose class shows no way to make one like it."""


def _rebuilt(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping like another one, with its own storage and these items, which have the keys of the other.

    Raises:
        TypeError: If its class shows no way to make one.
    """
    if type(value) is dict:
        return items
    for make in (_copied_with, _made_anew):
        with suppress(Exception):
            new = make(value, items)
            # Attributes that are items, too, would be those of the other.
            attributes = getattr(new, "__dict__", {})
            if all(new[key] is item and attributes.get(key, item) is item for key, item in items.items()):
                return new
    raise _NotRebuilt(f"A {type(value).__name__} can't be made of other items.")


def _copied_with(value: Any, items: dict[Any, Any]) -> Any:
    if isinstance(value, dict | UserDict):
        new = copy.copy(value)
    else:  # which may keep its items elsewhere, where a shallow copy would share them
        new = copy.deepcopy(value, {id(tensor): tensor for tensor in tensors_in(value)})
    for key, item in items.items():
        new[key] = item
    return new


def _made_anew(value: Any, items: dict[Any, Any]) -> Any:
    return type(value)(items)
