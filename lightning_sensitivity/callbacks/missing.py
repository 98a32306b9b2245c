"""What other callbacks get in place of values that a validation lacks."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.checks import callbacks_that_monitor

_WORST = float(torch.finfo(torch.float32).max)  # of values that are best where low
_BETTER = 0.999  # factor in each further validation without a value; a scheduler needs an improvement of 1e-4


class MissingValues:
    """Stand-ins for values, so that callbacks that monitor a name always find it.

    After a first value they get the last one again. Before it they get the worst one, a little better in each
    further validation, so that waiting uses up no patience, and the last one is the best if no value comes.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], float] = {}  # values by name and loader
        self._given: dict[str, Tensor] = {}  # what stands in for a value in the last validation, by logged name
        self._num_incomplete = 0  # validations that lacked a value

    def begin(self) -> None:
        """Forget what the last validation lacked."""
        self._given = {}

    def remember(self, dataloader_idx: int, values: Mapping[str, float]) -> None:
        """Remember the values of a loader, but for nan and inf."""
        self._last |= {(name, dataloader_idx): value for name, value in values.items() if math.isfinite(value)}

    def resume(self, num_incomplete: int) -> None:
        """Go on after as many validations that lacked a value, in an earlier part of a fit."""
        self._num_incomplete = num_incomplete

    def add(self, trainer: Trainer, logged_name: str, name: str, dataloader_idx: int, is_highest: bool) -> None:
        """Note that a value is missing; it is best where it is highest or lowest."""
        value = self._last.get((name, dataloader_idx))
        if value is None:  # the worst one that ends no run by a bound, a little better in each further validation
            value, nearer = (-_WORST, max) if is_highest else (_WORST, min)
            for callback, monitored in callbacks_that_monitor(trainer):
                bound = getattr(callback, "divergence_threshold", None)
                if monitored == logged_name and bound is not None:
                    value = nearer(value, bound)
            gain = (1 - _BETTER**self._num_incomplete) * abs(value)
            value += gain if is_highest else -gain
        self._given[logged_name] = torch.tensor(value, dtype=torch.float32)  # inf in 16 bits

    def hand_out(self, trainer: Trainer) -> None:
        """Give other callbacks what stands in for the values that are missing."""
        trainer.callback_metrics.update(self._given)
        self._num_incomplete += bool(self._given)

    def take_back(self, trainer: Trainer) -> None:
        """Remove what stands in for values, so that nobody takes it for a value of the fit."""
        for name in self._given:
            trainer.callback_metrics.pop(name, None)
