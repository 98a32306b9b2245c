"""Types of numbers: in which sums are kept, and to which a model rounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast, here and now, has a device compute in; None where it is off."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def rounding_epsilon(tensor: Tensor) -> float:
    """Epsilon of the coarsest type that a model here and now rounds what is in a tensor to.

    That is the tensor's own, or that of autocast: the model may have widened what it returns. Where Lightning casts a
    model to 16 bits, it makes that type the default while the model runs.

    Args:
        tensor: An input or an output, floating.
    """
    default, autocast = torch.get_default_dtype(), autocast_dtype(tensor.device)
    dtypes = [tensor.dtype] if default.itemsize > 2 else [tensor.dtype, default]
    if autocast is not None:
        dtypes.append(autocast)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def rounding_variance(tensor: Tensor) -> float:
    """Variance of the rounding of a number, relative to its square, on average.

    Rounding f to a type of epsilon u is off by up to half a unit in the last place, u 2^floor(log2 |f|), with variance
    unit² / 12. Over one binade, of logarithmically distributed mantissas, that is u² f² / (32 ln 2).

    Args:
        tensor: An input or an output, as for :func:`rounding_epsilon`.
    """
    return rounding_epsilon(tensor) ** 2 / (32 * math.log(2))
