from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sensitivity.nested import copied, describe, is_plain, part, replaced, tensors_in

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
        assert type(new) is type(value)
    assert repr(replaced(new, path, "leaf")) == before


@given(nests(st.builds(torch.zeros, st.just(2))))
def test_a_copy_has_tensors_of_its_own(nest: tuple[Any, tuple[Any, ...]]) -> None:
    value, path = nest
    part(copied(value), path).add_(1)
    assert part(value, path).sum() == 0
    assert type(copied(value)) is type(value)


class AttributeDict(dict):
    """Its items are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Around(MutableMapping):
    """Keeps its items in a dict of its own, which a shallow copy would share."""

    def __init__(self, items: Any) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self.items_[key]

    def __setitem__(self, key: Any, item: Any) -> None:
        self.items_[key] = item

    def __delitem__(self, key: Any) -> None:
        del self.items_[key]

    def __iter__(self) -> Any:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Rows(Around):
    """As a TensorDict, it gives its rows one by one, and has no truth value."""

    def __iter__(self) -> Any:
        return iter([Rows({}), Rows({})])

    def keys(self) -> Any:
        return self.items_.keys()

    def __bool__(self) -> bool:
        raise RuntimeError("no truth value")


class Closed(Around):
    """Takes no items, neither at once nor one by one."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__({"x": first, "y": second})

    def __setitem__(self, key: Any, item: Any) -> None:
        raise TypeError("read only")


@pytest.mark.parametrize("kind", [AttributeDict, Around, Rows, MappingProxyType, UserDict, OrderedDict, dict])
def test_a_mapping_is_made_again_with_its_items(kind: type) -> None:
    x, y = torch.zeros(2), torch.ones(2)
    value = kind({"x": x, "y": y})
    assert is_plain(value)
    assert {id(tensor) for tensor in tensors_in(value)} == {id(x), id(y)}
    for new in (copied(value, but=[y]), replaced(value, ("x",), x + 1)):
        assert type(new) is kind
        assert new["x"] is not x and new["y"] is y
        assert getattr(new, "x", new["x"]) is new["x"]
        new["x"].add_(1)
    assert value["x"] is x and not x.any()


def test_a_mapping_that_takes_no_items_is_copied_as_an_object() -> None:
    x = torch.zeros(2)
    value = Closed(x, [x])
    new = copied(value)
    assert type(new) is Closed and new["x"] is not x and new["y"][0] is new["x"]
    with pytest.raises(TypeError, match="A Closed can't be made of other items"):
        replaced(value, ("x",), x + 1)
    assert value["x"] is x


def test_an_object_is_copied_with_its_tensors_and_others_are_not() -> None:
    x, module, other = torch.zeros(2), nn.Linear(1, 1), SimpleNamespace(data=SimpleNamespace(x=torch.ones(1)))
    new = copied([SimpleNamespace(x=x, more=[x]), module, other, x])
    assert new[0].x is not x and new[0].more[0] is new[0].x is new[3]
    assert new[1] is module
    assert new[2] is other  # what it leads to may be large
    assert not is_plain(SimpleNamespace(x=x))


def test_an_object_that_can_be_moved_is_copied_in_any_case() -> None:
    class Movable:
        __slots__ = ("x",)

        def to(self, device: Any) -> Any:
            return self

    value = Movable()
    value.x = torch.zeros(2)
    assert copied(value).x is not value.x


def test_what_is_there_twice_is_so_in_the_copy() -> None:
    x = torch.zeros(2)
    new = copied({"a": x, "b": (x, Pair(x, None))})
    assert new["a"] is not x and new["a"] is new["b"][0] is new["b"][1].x
    assert len(tensors_in(new)) == 3


def test_what_is_inside_of_itself_is_copied() -> None:
    root = Sample(torch.zeros(2))
    root.y = [Sample(torch.ones(1), root) for _ in range(9)]
    new = copied({"tree": root})["tree"]
    assert new is not root and new.x is not root.x
    assert all(child.y is new for child in new.y)
    assert len(tensors_in(root)) == 10


def test_what_can_not_be_copied_is_passed_on_or_refused() -> None:
    names = (name for name in "ab")
    value = {"x": torch.zeros(2), "names": names, "more": SimpleNamespace(x=torch.zeros(1), names=names)}
    new = copied(value)
    assert new["x"] is not value["x"] and new["more"] is value["more"]
    with pytest.raises(TypeError, match="SimpleNamespace can't be copied.*generator"):
        copied(value, strict=True)
    del value["more"]
    assert copied(value, strict=True)["names"] is names


def test_a_dataclass_is_copied_with_what_is_no_field_of_it() -> None:
    sample = Sample(1)
    sample.more = torch.zeros(2)
    assert copied(sample).more is not sample.more


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
