"""Batches of a fit size: large ones are looked at in pieces, small ones together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SIZE = 2**18  # elements that are looked at at once, so that no wide copy of all outputs is made


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """What a function gives for a few samples at a time, so that what it computes of large outputs stays small.

    Args:
        function: Gets a piece of each tensor.
        tensors: Of the same samples, ``(N, ...)``; the first one says how many make a piece.
    """
    size = max(1, _SIZE * len(tensors[0]) // max(1, tensors[0].numel()))
    if size >= len(tensors[0]):
        return [function(*tensors)]
    return [function(*piece) for piece in zip(*(torch.split(each, size) for each in tensors), strict=True)]


class Together:
    """Hands small batches on together: an operation takes as long for ten samples as for a thousand.

    Args:
        function: Gets the tensors of one large batch, or of several small ones that are alike, in the order in which
            they came.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self._waiting: list[tuple[Tensor, ...]] = []
        self._size = 0

    def add(self, *tensors: Tensor) -> None:
        """Hand a batch on at once if it is large; else keep a copy, since a later pass may write into outputs.

        Args:
            tensors: Of the same samples, ``(N, ...)``.
        """
        if self._waiting and not all(map(_are_alike, self._waiting[0], tensors)):
            self.flush()
        if tensors[0].numel() > _SIZE or any(len(each) != len(tensors[0]) for each in tensors):  # an error of its own
            self.flush()
            self._function(*tensors)
        else:
            self._waiting.append(tuple(each.clone() for each in tensors))
            self._size += tensors[0].numel()
            if self._size > _SIZE:
                self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        if waiting:
            self._function(*map(torch.cat, zip(*waiting, strict=True)))


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape[1:], a.dtype) == (b.shape[1:], b.dtype)
