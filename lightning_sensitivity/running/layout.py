"""The layout of batches: what they are to a model, found once for all that have the same structure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_sensitivity.running.batches import Place


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


# What a reference sees, and names of arguments that it can't read.
Sight: TypeAlias = tuple[list[Input], list[str]]


@dataclass(frozen=True)
class Layout:
    """What a batch is to a model.

    Attributes:
        by_name: Whether the model gets its arguments by name, and not by position.
        places: Where the arguments are, by their names in ``forward``; those of ``*args`` by numbers.
        inputs: Which of them are no labels, and which entries of each are left out.
        left_out: The names of others, and of entries beside inputs, if these are not those that labels have.
        perturbed: The argument to which noise is added; None if that is not clear.
        rows: Where in the arguments a tensor has a row for each sample, if all tensors have one.
        sight: What a reference sees; None if that depends on the number of samples.
        labels: Where in the batch the labels are; None if that is not clear.
        is_chosen: Whether a function of the user has chosen the arguments.
    """

    by_name: bool
    places: Mapping[str, Place]
    inputs: Mapping[str, Sequence[str]]
    left_out: list[str]
    perturbed: str | None
    rows: Place | None
    sight: Sight | None
    labels: Place | None
    is_chosen: bool


def without(value: Any, names: Sequence[str]) -> Any:
    """Return a mapping without some entries; without names, any value as it is."""
    return {name: item for name, item in value.items() if name not in names} if names else value
