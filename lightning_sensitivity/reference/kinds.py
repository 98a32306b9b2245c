"""The kinds of inputs: what is seen of samples of each, how they become smaller, and how several become one.

A kind is a class. To add one, write it, and let :func:`kind_of` or the caller name it.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lightning_sensitivity.reference.blocks import Block, columns, in_parts, patches, values, words

Seen: TypeAlias = dict[str, Tensor]  # samples (N, ...) by kind
Array: TypeAlias = Any  # of NumPy, or what becomes one
Samples: TypeAlias = Any  # a tensor, array, data frame or list, or a mapping of kinds to these

MOST, _MOST_ROWS = 10_000, 50_000  # samples that ridge regression knows, and rows of a table that a forest does
MAX_FOREST_COLUMNS = 1250
_SHIFT = 10**6  # from the words of a text to those of the next one


class Kind:
    """Samples ``(N, ...)`` of which all have the size of the first dimension after N.

    Attributes:
        name: Its name.
        blocks: The blocks of features that may be made of it; the first one stands beside those of other kinds.
        num_fixed: How many dimensions all samples share, with N.
    """

    name: str
    blocks: tuple[Block, Block]
    num_fixed = 2

    def most_of(self, x: Tensor) -> int:
        """Return how many samples such as these are worth knowing."""
        return MOST

    def read(self, x: Tensor) -> Tensor:
        """Give samples of any array their form."""
        return x

    def of_input(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Turn an input of a model into samples, by a mask beside it, if its layout has one."""
        return self.shrunk(x).float()

    def shrunk(self, x: Tensor) -> Tensor:
        """Make samples as small as a reference sees them; those that are so small already stay as they are."""
        return x

    def fitted(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Give samples the size of others."""
        return x

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        """Return several inputs of the same samples as one."""
        return torch.cat([self.fitted(x, parts[0].shape) for x in parts], 1)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate the samples of several batches.

        Raises:
            ValueError: If they have other columns or channels.
        """
        if len({x.shape[1] for x in parts}) > 1:
            raise ValueError("Inputs of several batches have different sizes")
        if len({x.shape[1:] for x in parts}) > 1:
            largest = max((x.shape for x in parts), key=lambda shape: shape[2:])
            parts = [self.fitted(x, largest) for x in parts]
        return torch.cat([*parts])


class Columns(Kind):
    """Numbers ``(N, D)``."""

    name = "columns"
    blocks = columns, values

    def most_of(self, x: Tensor) -> int:
        """Return how many rows are worth knowing: of more columns than a forest takes, those of ridge regression."""
        return _MOST_ROWS if x.shape[1:].numel() <= MAX_FOREST_COLUMNS else MOST

    def read(self, x: Tensor) -> Tensor:
        """Flatten samples to floating numbers."""
        return (x if x.is_floating_point() else x.double())[:, None].flatten(1)

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        """Return columns side by side; ``(N,)`` is one."""
        return torch.cat([x[:, None].flatten(1) for x in parts], 1)


class Images(Kind):
    """Floating or bytes ``(N, C, H, W)``; several inputs are channels."""

    name = "images"
    blocks = patches, values
    limit = 32  # pixels a side

    def shrunk(self, x: Tensor) -> Tensor:
        """Average samples whose largest side exceeds a limit."""
        largest = max(x.shape[2:])
        if largest <= self.limit or len(x) == 0:
            return x
        return _averaged(x, [max(1, round(size * self.limit / largest)) for size in x.shape[2:]])

    def fitted(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Resize images."""
        return x if x.shape[2:] == shape[2:] or len(x) == 0 else _averaged(x, shape[2:])


class Signals(Images):
    """Floating ``(N, C, L)``."""

    name = "signals"
    limit = 512  # steps

    def fitted(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Cut signals, or pad them by 0."""
        return x if x.shape[2:] == shape[2:] or len(x) == 0 else F.pad(x.float(), (0, shape[2] - x.shape[2]))


class Tokens(Kind):
    """Integers ``(N, L)``, of which negative ones are padding; texts may have any length."""

    name = "tokens"
    blocks = words, columns
    num_fixed = 1

    def read(self, x: Tensor) -> Tensor:
        """Give ids 64 bits, since 8 bits have no -1."""
        return x.long()

    def of_input(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mark padding, where the mask is 0."""
        ids = self.read(x)
        return ids if mask is None else ids.where(mask > 0, -1)

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        """Return several texts as one; the words of each are other words."""
        return torch.cat([ids.where(ids < 0, ids + _SHIFT * place) for place, ids in enumerate(parts)], 1)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Pad texts to the longest."""
        return pad_sequence([*chain(*parts)], batch_first=True, padding_value=-1)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Columns(), Images(), Signals(), Tokens())}


def kind_of(x: Tensor) -> str:
    """Return the kind of samples, by the number of dimensions and the type; anything else is columns."""
    if x.ndim == 2 and not x.is_floating_point():
        return "tokens"
    return {3: "signals", 4: "images"}.get(x.ndim, "columns")


def _averaged(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return in_parts(lambda part: F.interpolate(part.float(), sizes, mode="area"), x)


def rows_of(seen: Seen, rows: Tensor | slice) -> Seen:
    """Return what a reference sees of some of the samples."""
    return {kind: x[rows] for kind, x in seen.items()}


def shrunk(seen: Seen) -> Seen:
    """Make what is seen of samples as small as a reference sees it."""
    return {kind: KINDS[kind].shrunk(x) for kind, x in seen.items()}


def possible_blocks(seen: Seen) -> list[dict[str, Block]]:
    """Return what may be seen of samples: each time a block of features for each kind."""
    if len(seen) > 1:
        return [{kind: KINDS[kind].blocks[0] for kind in seen}]
    return [{kind: block} for kind in seen for block in KINDS[kind].blocks]


def join_seen(parts: Sequence[Seen]) -> Seen:
    """Concatenate what a reference sees of several batches.

    Raises:
        ValueError: If it sees nothing, or batches have other kinds of inputs, or other columns or channels.
    """
    if not all(parts):
        raise ValueError("Inputs are neither dense numbers nor token ids, with a row for each sample")
    if len({tuple(part) for part in parts}) > 1:
        raise ValueError("Inputs of several batches are of different kinds")
    return {kind: KINDS[kind].joined([part[kind] for part in parts]) for kind in parts[0]}


def are_finite(seen: Seen) -> Tensor:
    """Return which samples have neither nan nor inf, ``(N,)``."""
    return torch.stack([x[:, None].flatten(1).isfinite().all(1) for x in seen.values()]).all(0)
