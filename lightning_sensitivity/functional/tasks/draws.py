"""Quantiles at which labels are drawn: no random numbers, and alike in every process."""

import torch
from torch import Tensor

NUM_DRAWS = 20  # of labels for each sample
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def quantiles(num_samples: int) -> Tensor:
    """Return evenly spaced quantiles, which begin at an offset of their own for each sample, ``(20, N)``."""
    offsets = torch.arange(1, num_samples + 1, dtype=torch.float64) * _GOLDEN_RATIO % 1
    return (torch.arange(NUM_DRAWS)[:, None] + offsets) / NUM_DRAWS
