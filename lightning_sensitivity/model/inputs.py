"""What a reference sees of the inputs of a model: columns, images, signals and texts, side by side."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import in_floats
from lightning_sensitivity.model.batches import has_samples, take, tensors_in
from lightning_sensitivity.model.entries import is_constant, is_empty
from lightning_sensitivity.model.graphs import sum_graphs
from lightning_sensitivity.reference.kinds import KINDS, Seen, kind_of

_MAX_DIMENSIONS = 4  # those of images
_MASK = "attention_mask"  # in transformers, where tokens are, and not padding
_NO_INPUTS = re.compile("mask|position_ids|token_type_ids")
_MANY = 1000  # from which on integers are names, and no categories


class InputReader:
    """Sort the inputs of a model by what they are to a reference.

    A matrix of integers holds token ids if there are no numbers beside it, or if it has a mask; else it holds
    categories.

    Attributes:
        unread: Names of the arguments of which something can't be read, as keys.
    """

    def __init__(self) -> None:
        self.unread: dict[str, None] = {}

    def see(self, named: Mapping[str, object], size: int, indices: Tensor | None = None) -> Seen:
        """Return what a reference sees of the inputs of a model, on the CPU.

        Args:
            named: The inputs by the names of the arguments.
            size: N, the number of samples.
            indices: Which of them to look at; None for all.
        """
        chosen = [(name, take(x, indices)) for name, x in self._tensors(named, size)]
        masks = {x.shape: x for name, x in chosen if name == _MASK}
        numbers = {x.shape for _, x in chosen if x.is_floating_point()}
        inputs = [(name, x) for name, x in chosen if _is_data(name, x.shape in numbers)]
        has_numbers = not all(_are_integers(x) for _, x in inputs)
        found: dict[str, list[Tensor]] = {}
        for name, x in inputs:
            kind, values = self._read(name, x, masks.get(x.shape), has_numbers)
            found.setdefault(kind, []).append(values.cpu())
        return {kind: KINDS[kind].beside(parts) for kind, parts in found.items()}

    def _tensors(self, named: Mapping[str, object], size: int) -> Iterator[tuple[str, Tensor]]:
        """List the tensors that can be read, each with its name, and remember the names of other inputs."""
        for name, value in sum_graphs(named, size).items():
            tensors, has_more = _readable(value, size)
            if has_more:
                self.unread[name] = None
            yield from ((name, x) for x in tensors)

    def _read(self, name: str, x: Tensor, mask: Tensor | None, has_numbers: bool) -> tuple[str, Tensor]:
        """Return the kind of an input, and what is seen of it."""
        if x.ndim > 2 or x.is_floating_point():
            kind = kind_of(x)
            return kind, in_floats(x.detach()) if kind == "columns" else KINDS[kind].shrunk(x).detach().float()
        if _are_integers(x) and mask is not None:
            return "tokens", x.long().where(mask > 0, -1)  # 8 bits have no -1
        if _are_integers(x) and not has_numbers:
            return "tokens", x.long()
        return "columns", self._categories(name, x[:, None].flatten(1).cpu().long())

    def _categories(self, name: str, x: Tensor) -> Tensor:
        """Return columns of integers or flags as numbers; of names, as all large ones are, nothing is seen."""
        if bool((x >= _MANY).any()):
            self.unread[name] = None
        return x.clamp(max=_MANY).float()


def _readable(value: object, size: int) -> tuple[list[Tensor], bool]:
    """Return the tensors of an input that can be read, and whether it holds more."""
    tensors = tensors_in(value)
    if not tensors:
        return [], not is_constant(value)
    parts = [x for x in tensors if x.ndim > 0 and not is_empty(x)]
    found = [x for x in parts if has_samples(x, size) and x.ndim <= _MAX_DIMENSIONS]
    return found, len(found) < len(parts)


def _is_data(name: str, is_like_numbers: bool) -> bool:
    """Return whether an argument is an input; a mask is one only if it may say which numbers are missing."""
    return name != _MASK and (is_like_numbers or not _NO_INPUTS.search(name))


def _are_integers(x: Tensor) -> bool:
    """Return whether a tensor is a matrix of integers."""
    return x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool
