"""The layout of outputs, and how to sum them in double precision without a copy of all of them."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy
import torch
from torch import Tensor

Numbers: TypeAlias = Any  # a tensor, an array, a table or a list
Place = TypeVar("Place", float, Tensor)

_CHUNK = 2**15  # elements that are converted to double precision at a time
_MIN_NUMBERS = 10  # fewer outputs may look like probabilities by chance
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_ROUNDING = 1e-2  # error of sums of 16-bit probabilities, which autocast may have converted to 32 bits since


def num_outputs(outputs: Tensor) -> int:
    """Count the outputs K of ``(N, K, ...)``; ``(N,)`` has one."""
    return outputs.shape[1] if outputs.ndim > 1 else 1


def in_32_bits(values: Tensor) -> Tensor:
    """Turn floating numbers into 32 bits or more; all else stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values


def in_floats(values: Tensor) -> Tensor:
    """Turn numbers into single precision; those in double precision stay."""
    return values if values.dtype == torch.float64 else values.float()


def without_ones(x: Tensor) -> Tensor:
    """Drop dimensions of 1, such as that of a single target, from ``(N, ..., 1, ...)``, if ``(N, K)`` is left."""
    shape = [size for size in x.shape[1:] if size != 1]
    return x.reshape(len(x), *shape) if x.ndim > 2 and len(shape) < 2 else x


def by_position(outputs: Tensor) -> Tensor:
    """View outputs ``(N, K, ...)`` or ``(N,)`` as ``(N, K, P)``, with P positions."""
    outputs = outputs.detach()
    return outputs[:, None, None] if outputs.ndim == 1 else outputs[..., None].flatten(2)  # of no samples, too


def wide_dtype(device: torch.device) -> torch.dtype:
    """Choose the widest floating type of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Call a function on a few samples at a time, so that no double-precision copy holds all outputs.

    Args:
        function: Function of a chunk of each tensor.
        tensors: Tensors of the same samples, ``(N, ...)``; the first one determines the size of a chunk.
    """
    samples_per_chunk = max(1, _CHUNK * len(tensors[0]) // max(1, tensors[0].numel()))
    parts = [torch.split(tensor, samples_per_chunk) for tensor in tensors]
    return [function(*chunk) for chunk in zip(*parts, strict=True)]


def are_probabilities(outputs: Tensor) -> bool:
    """Check whether outputs can only be those of a softmax, within rounding; waits for the device."""
    if num_outputs(outputs) < 2 or outputs.numel() < _MIN_NUMBERS or bool((outputs < 0).any()):
        return False
    sums = outputs.to(wide_dtype(outputs.device)).sum(1)
    return bool((sums - 1).abs().max() < _ROUNDING)


def number_units(groups: Tensor | None, number: int) -> Tensor:
    """Number what is independent, for each sample, ``(N,)``: groups, or, without any, a number of samples."""
    return torch.arange(number) if groups is None else torch.unique(groups, return_inverse=True)[1]


def spaced_fraction(place: Place) -> Place:
    """Return the fraction of a multiple of the golden ratio.

    Those of successive numbers are evenly spaced, and so are the numbers of the lowest ones, whatever the period of the
    data, such as that of a stream whose workers read one part of it each.
    """
    return place * _GOLDEN_RATIO % 1


def evenly_spaced(places: Tensor, most: float) -> Tensor | None:
    """Return which of some places to take for at most so many evenly spaced ones; None for all.

    Fewer ones are among more. So these may be chosen from more of successive numbers, as well as from all.
    """
    count = math.ceil(min(most, len(places)))
    return spaced_fraction(places.double()).argsort()[:count].sort().values if count < len(places) else None


def are_close(first: Tensor, second: Tensor) -> bool:
    """Check whether two tensors of one shape are equal within 1 % of the first one's mean size."""
    first, second = first.to(wide_dtype(first.device)), second.to(wide_dtype(second.device))
    scale = float(first[first.isfinite()].abs().mean().nan_to_num(0.0))
    return torch.allclose(first, second, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def as_tensor(values: Numbers) -> Tensor:
    """Turn numbers from NumPy, pandas or lists into a tensor; a tensor is detached."""
    return values.detach() if isinstance(values, Tensor) else torch.tensor(numpy.asarray(values))
