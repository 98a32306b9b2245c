from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sensitivity.nested import copied, describe, part, replaced

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Any
    y: Any = None
    late: Any = field(init=False, default=0)


class Output(OrderedDict):
    """As of transformers: a mapping and a dataclass."""


def nests(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A nested value of all kinds of containers, and the path to one of its leaves."""

    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            inner.map(lambda n: ([0, n[0]], (1, *n[1]))),
            inner.map(lambda n: ((n[0], 0), (0, *n[1]))),
            inner.map(lambda n: ((0, n[0]), (-1, *n[1]))),
            inner.map(lambda n: (Pair(0, n[0]), ("y", *n[1]))),
            inner.map(lambda n: (Pair(n[0], 0), (0, *n[1]))),
            inner.map(lambda n: (Sample(n[0]), ("x", *n[1]))),
            inner.map(lambda n: ({"a": n[0], "b": 0}, ("a", *n[1]))),
            inner.map(lambda n: (UserDict(a=n[0]), ("a", *n[1]))),
            inner.map(lambda n: (Output(a=n[0]), ("a", *n[1]))),
            inner.map(lambda n: (MappingProxyType({"a": n[0]}), ("a", *n[1]))),
        )

    return st.recursive(leaf.map(lambda value: (value, ())), deeper, max_leaves=5)


@given(nests(st.just("leaf")))
def test_what_was_put_at_a_path_is_found_there_and_the_rest_stays(nest: tuple[Any, tuple[Any, ...]]) -> None:
    value, path = nest
    before = repr(value)
    new = replaced(value, path, "new")
    assert part(new, path) == "new"
    assert part(value, path) == "leaf"
    assert repr(value) == before
    if path:
        assert type(new) is type(value) or isinstance(value, MappingProxyType)
    if "mappingproxy" not in before:  # of which a copy is a dict
        assert repr(replaced(new, path, "leaf")) == before


@given(nests(st.builds(torch.zeros, st.just(2))))
def test_a_copy_has_tensors_of_its_own(nest: tuple[Any, tuple[Any, ...]]) -> None:
    value, path = nest
    if "mappingproxy" in repr(value):
        return  # can't be copied: is passed on itself
    part(copied(value), path).add_(1)
    assert part(value, path).sum() == 0
    assert type(copied(value)) is type(value)


def test_what_a_dataclass_does_not_take_in_its_constructor_is_kept() -> None:
    sample = Sample(1)
    sample.late = 5
    assert replaced(sample, ("x",), 2).late == 5
    assert copied(sample).late == 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3), "a tensor (torch.float32, shape (2, 3))"),
        ({"a": 1}, "dict with the keys 'a'"),
        (Sample(1), "Sample with the keys 'x', 'y', 'late'"),
        ([1, "a"], "list of int, str"),
        ([], "list of nothing"),
        ("text", "str"),
        (None, "NoneType"),
    ],
)
def test_descriptions(value: Any, expected: str) -> None:
    assert describe(value) == expected


@pytest.mark.parametrize("path", [("z",), (5,), ("x", "z")])
def test_a_path_that_leads_nowhere(path: tuple[Any, ...]) -> None:
    for value in (Sample([1]), Pair([1], 2), {"x": [1]}, [[1]]):
        with pytest.raises((AttributeError, IndexError, KeyError, TypeError)):
            part(value, path)
