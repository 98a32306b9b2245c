"""What a reference sees of the inputs of a model: columns, images, signals and texts, side by side."""

import re
from collections.abc import Mapping

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
        chosen = []
        for name, value in sum_graphs(named, size).items():
            tensors, has_more = _readable(value, size)
            if has_more:
                self.unread[name] = None
            chosen += [(name, take(x, indices)) for x in tensors]
        masks = {x.shape: x for name, x in chosen if name == _MASK}
        numbers = {x.shape for _, x in chosen if x.is_floating_point()}
        # A mask is an input only if it may say which numbers are missing.
        inputs = [(n, x) for n, x in chosen if n != _MASK and (x.shape in numbers or not _NO_INPUTS.search(n))]
        has_numbers = not all(_are_integers(x) for _, x in inputs)
        found: dict[str, list[Tensor]] = {}
        for name, x in inputs:
            kind, values = self._read(name, x, masks.get(x.shape), has_numbers)
            found.setdefault(kind, []).append(values.cpu())
        return {kind: KINDS[kind].beside(parts) for kind, parts in found.items()}

    def _read(self, name: str, x: Tensor, mask: Tensor | None, has_numbers: bool) -> tuple[str, Tensor]:
        """Return the kind of an input, and what is seen of it."""
        if x.ndim > 2 or x.is_floating_point():
            kind = kind_of(x)
            return kind, in_floats(x.detach()) if kind == "columns" else KINDS[kind].shrunk(x).detach().float()
        if _are_integers(x) and mask is not None:
            return "tokens", x.long().where(mask > 0, -1)  # 8 bits have no -1
        if _are_integers(x) and not has_numbers:
            return "tokens", x.long()
        categories = x[:, None].flatten(1).cpu().long()
        if bool((categories >= _MANY).any()):  # names, of which nothing is seen
            self.unread[name] = None
        return "columns", categories.clamp(max=_MANY).float()


def _readable(value: object, size: int) -> tuple[list[Tensor], bool]:
    """Return the tensors of an input that can be read, and whether it holds more."""
    tensors = tensors_in(value)
    if not tensors:
        return [], not is_constant(value)
    parts = [x for x in tensors if x.ndim > 0 and not is_empty(x)]
    found = [x for x in parts if has_samples(x, size) and x.ndim <= _MAX_DIMENSIONS]
    return found, len(found) < len(parts)


def _are_integers(x: Tensor) -> bool:
    """Return whether a tensor is a matrix of integers."""
    return x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool
