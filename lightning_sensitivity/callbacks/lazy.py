"""A value that Lightning reads after all processes have finished a loader."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat


class LazyValue(Metric):
    """Hold one value of one loader, which Lightning reads after all processes have finished the loader.

    Lightning fills the loader's column in the table of ``Trainer.validate`` when it moves on to the next loader. A
    number would have to be reduced and logged before that, in a batch hook. A process with fewer batches reaches this
    hook at another time or never, so its collective operations would be matched with the wrong ones. A Metric is read
    at the same time in all processes.

    If there is no value, the last one is kept; if there never was one, nan is logged.

    Args:
        read: Function that returns the value, or None.
    """

    def __init__(self, read: Callable[[], Tensor | None]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._read = read
        self._has_value = False
        self.reset()

    def reset(self) -> None:
        """Prepare for the next epoch."""
        super().reset()
        compat.mark_updated(self)  # the state that is read lives elsewhere

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the value."""
        value = self._read()
        if value is None and not self._has_value:
            return torch.tensor(math.nan)
        self._has_value = True
        return value
