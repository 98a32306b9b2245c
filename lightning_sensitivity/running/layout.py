"""The layout of batches: what they are to a model, found once for all that have the same structure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_sensitivity.running.batches import Place

T = TypeVar("T")

# Names of labels in batches of torch, transformers, chemprop and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "Y", "class")
_ATTRIBUTES = (*TARGET_NAMES, "batch", "edge_index")  # of objects, by which rules know them
_CONSTANTS = {str, int, float, bool, type(None)}
_MAX_STRUCTURES = 100  # that are remembered of a model
_FOUND: WeakKeyDictionary[nn.Module, dict[object, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Input:
    """A tensor of the arguments, or graphs, of which a reference sees samples.

    Attributes:
        name: The argument that holds it.
        place: Where it is in the arguments.
        kind: The name of its kind, ``"integers"`` or ``"graphs"``.
        mask: Where its mask is.
    """

    name: str
    place: Place
    kind: str
    mask: Place | None = None


Sight: TypeAlias = tuple[list[Input], list[str]]  # what a reference sees, and names of arguments that it can't read


@dataclass(frozen=True)
class Layout:
    """What a batch is to a model.

    Attributes:
        by_name: Whether the model gets its arguments by name, and not by position.
        places: Where the arguments are, by their names in ``forward``; those of ``*args`` by numbers.
        inputs: Which of them are no labels, and which entries of each are left out.
        left_out: The names of others, and of entries beside inputs, if these are not those that labels have.
        rows: Where in the arguments a tensor has a row for each sample, if all tensors have one.
        sight: What a reference sees; None if that depends on the number of samples.
        labels: Where in the batch the labels are; None if that is not clear.
        is_chosen: Whether a function of the user has chosen the arguments.
    """

    by_name: bool
    places: Mapping[str, Place]
    inputs: Mapping[str, Sequence[str]]
    left_out: list[str]
    rows: Place | None
    sight: Sight | None
    labels: Place | None
    is_chosen: bool


def without(value: Any, names: Sequence[str]) -> Any:
    """Return a mapping without some entries; without names, any value as it is."""
    return {name: item for name, item in value.items() if name not in names} if names else value


def resolved(rule: Callable[[nn.Module, Any], T], model: nn.Module, value: object) -> T:
    """Return what a rule finds for a model and a value, once for all values of one structure."""
    known = _FOUND.setdefault(model, {})
    key = rule, structure_of(value)
    if key not in known:
        if len(known) >= _MAX_STRUCTURES:
            known.clear()
        known[key] = rule(model, value)
    found: T = known[key]
    return found


def structure_of(value: object) -> object:
    """Return all of a value that rules look at: types, names, ranks, and which sizes are 0, 1, 2 or equal."""
    found: list[object] = []
    sizes: dict[int, int] = {}  # a number for each size
    items: list[Any] = [value]
    for item in items:  # which become more
        found.append(type(item))
        if isinstance(item, Tensor):
            found += (item.dtype, item.layout, item.ndim)
            for size in () if item.is_nested else item.shape:
                found.append(size if size < 3 else sizes.setdefault(size, -len(sizes) - 1))
        elif isinstance(item, Mapping):
            found.append((*item,))
            items += item.values()
        elif isinstance(item, list | tuple):
            found.append(len(item))
            items += item
        elif type(item) not in _CONSTANTS:
            held = {name: x for name in _ATTRIBUTES if isinstance(x := getattr(item, name, None), Tensor)}
            found.append((*held,))
            items += held.values()
    return (*found,)
