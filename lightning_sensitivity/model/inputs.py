"""What a reference sees of the inputs of a model: columns, images, signals and texts, side by side."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.reference.features import Seen, fit_size, shrunk

LEAST_SKILL = 0.05  # of a reference that does not see all inputs, to be trusted
NOTHING_SEEN = "Inputs are neither dense numbers nor token ids, with a row for each sample"
_KINDS = {1: "columns", 2: "columns", 3: "signals", 4: "images"}  # by the number of dimensions
_MASK = "attention_mask"  # in transformers, where tokens are, and not padding
_NO_INPUTS = ("position_ids", "token_type_ids")  # in transformers
_MANY = 1000  # values of a column of integers, from which on they are names, and no categories
_MIN_WORDS = 4  # of a text beside numbers
_SHIFT = 10**6  # from the words of a text to those of the next one


class InputReader:
    """Sort the inputs of a model by what they are to a reference.

    A matrix of integers by itself holds token ids. Beside numbers it does so if most of its columns reach 1,000, or if
    it has a mask; else it holds categories, and columns that reach 1,000 are left out. The first batch decides.

    Attributes:
        unread: Names of the arguments of which something can't be read.
    """

    def __init__(self) -> None:
        self.unread: list[str] = []
        self._texts: dict[int, bool] = {}  # whether integers beside numbers are a text, by their place
        self._names: dict[tuple[int, int], Tensor] = {}  # which columns are left out, by their place and number

    def see(self, named: Mapping[str, object], size: int, rows: Tensor | None = None) -> Seen | None:
        """Return what a reference sees of the inputs of a model, on the CPU; None if that is nothing.

        Args:
            named: The inputs by the names of the arguments.
            size: N, the number of samples.
            rows: Which of them to look at; None for all.
        """
        tensors = [(name, x if rows is None else x[rows.to(x.device)]) for name, x in self._tensors(named, size)]
        mask = dict(tensors).get(_MASK)
        inputs = [(name, x) for name, x in tensors if "mask" not in name]
        has_numbers = not all(_are_integers(x) for _, x in inputs)
        found: dict[str, list[Tensor]] = {}
        for place, (name, x) in enumerate(inputs):
            if _are_integers(x) and (not has_numbers or self._is_text(place, x, mask)):
                texts = found.setdefault("tokens", [])
                texts.append(_words(x, mask, _SHIFT * len(texts)))
            elif x.ndim > 2 or x.is_floating_point():
                found.setdefault(_KINDS[x.ndim], []).append(shrunk(_at_least_2d(x)).detach().float().cpu())
            else:
                found.setdefault("columns", []).append(self._categories(place, name, _at_least_2d(x)))
        return {kind: _side_by_side(parts) for kind, parts in found.items()} or None

    def _tensors(self, named: Mapping[str, object], size: int) -> Iterator[tuple[str, Tensor]]:
        """List the tensors that can be read, and remember the names of other inputs with data."""
        for name, value in named.items():
            if name in _NO_INPUTS or isinstance(value, bool | int | float | str | None):
                continue
            tensors = [x for x in tensors_in(value) if x.is_nested or x.ndim > 0]
            readable = [x for x in tensors if _has_rows(x, size)]
            if len(readable) < len(tensors) or not tensors:
                self._remember(name)
            yield from ((name, x) for x in readable)

    def _remember(self, name: str) -> None:
        if name not in self.unread:
            self.unread.append(name)

    def _is_text(self, place: int, ids: Tensor, mask: Tensor | None) -> bool:
        """Return whether integers beside numbers are a text."""
        if place not in self._texts:
            is_masked = mask is not None and mask.shape == ids.shape
            share = float((ids >= _MANY).any(0).float().mean())
            self._texts[place] = is_masked or (ids.shape[1] >= _MIN_WORDS and share > 0.5)
        return self._texts[place]

    def _categories(self, place: int, name: str, x: Tensor) -> Tensor:
        """Return columns of integers or flags as numbers, and those that are left out as zeros."""
        x = x.long().cpu()
        are_names = self._names.setdefault((place, x.shape[1]), (x >= _MANY).any(0))
        if bool(are_names.any()):
            self._remember(name)
        return x.clamp(max=_MANY).where(~are_names, 0).float()


def _has_rows(x: Tensor, size: int) -> bool:
    """Return whether a tensor has a row of real numbers for each sample, and at most as many dimensions as images."""
    is_dense = x.layout == torch.strided and not x.is_nested and not x.is_complex()
    return is_dense and x.ndim in _KINDS and len(x) == size


def _are_integers(x: Tensor) -> bool:
    """Return whether a tensor is a matrix of integers."""
    return x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool


def _at_least_2d(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 1 else x


def _words(ids: Tensor, mask: Tensor | None, shift: int) -> Tensor:
    """Return token ids, larger by a shift, and -1 where a mask leaves them out."""
    ids = ids.detach().cpu().long()  # 8 bits have no -1
    if mask is not None and mask.shape == ids.shape:
        ids = ids.where(mask.cpu() > 0, -1)
    return ids.where(ids < 0, ids + shift)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return several inputs of one kind as one: images and signals, which get the size of the first, as channels."""
    return torch.cat([fit_size(x, parts[0].shape) for x in parts], 1)


def join_seen(parts: Sequence[Seen]) -> Seen:
    """Concatenate what a reference sees of several batches.

    Token ids are padded to the longest by -1, and signals by 0; images get the size of those of the first part.

    Raises:
        ValueError: If batches are of several kinds, or have different numbers of columns or channels.
    """
    kinds = {kind: x.ndim for kind, x in parts[0].items()}
    if any({kind: x.ndim for kind, x in part.items()} != kinds for part in parts):
        raise ValueError("Inputs are of different kinds")
    return {kind: _join(kind, [part[kind] for part in parts]) for kind in kinds}


def _join(kind: str, parts: list[Tensor]) -> Tensor:
    if kind != "tokens" and len({x.shape[1] for x in parts}) > 1:
        raise ValueError("Inputs have different sizes")
    if kind in ("signals", "tokens"):
        length, padding = max(x.shape[-1] for x in parts), -1 if kind == "tokens" else 0
        parts = [pad(x, (0, length - x.shape[-1]), value=padding) for x in parts]
    return torch.cat([fit_size(x, parts[0].shape) for x in parts])


def of_rows(seen: Seen, rows: Tensor) -> Seen:
    """Return what a reference sees of some of the samples."""
    return {kind: x[rows] for kind, x in seen.items()}


def are_finite(seen: Seen) -> Tensor:
    """Return which samples have neither nan nor inf, ``(N,)``."""
    return torch.stack([x[:, None].flatten(1).isfinite().all(1) for x in seen.values()]).all(0)
