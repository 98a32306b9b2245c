"""What other callbacks and schedulers get where a validation has no value: the worst one, which costs no patience."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from lightning_sensitivity.callbacks.checks import callbacks_that_monitor

_COUNTERS = ("wait_count", "num_bad_epochs")  # of EarlyStopping and ReduceLROnPlateau: checks without an improvement


class Patience:
    """The patience of those that monitor values: a check of a value that was not measured uses up none of it."""

    def __init__(self) -> None:
        self._missing: frozenset[str] = frozenset()
        # By the identity of a callback or scheduler: what its counter was set to, and what it was.
        self._spared: dict[int, tuple[int, int]] = {}

    def set_worst(self, trainer: Trainer, worst: Mapping[str, float]) -> None:
        """Give the worst values to others, but none that exceeds a bound, or reaches a goal.

        Args:
            trainer: The Trainer.
            worst: A value for each name that was not measured in the last validation.
        """
        values = {name: torch.tensor(value) for name, value in worst.items()}
        goals = dict[str, float]()
        for callback, name in callbacks_that_monitor(trainer):
            if name not in values:
                continue
            is_max = getattr(callback, "mode", "min") == "max"
            best, other = (max, min) if is_max else (min, max)
            bound = getattr(callback, "divergence_threshold", None)
            if bound is not None:
                values[name] = torch.tensor(best(float(values[name]), bound))
            goal = getattr(callback, "stopping_threshold", None)
            if goal is not None and goal != worst[name] == best(goal, worst[name]):
                goals[name] = other(goal, goals.get(name, goal))
        for name, goal in goals.items():
            # Better values come closer, so that a checkpoint still takes the last one; single precision is too low.
            distance = max(1.0, abs(goal)) / (1 + abs(worst[name]))
            closest = goal - distance if worst[name] > goal else goal + distance
            values[name] = torch.tensor(closest, dtype=torch.float64)
        trainer.callback_metrics.update(values)
        self._missing = frozenset(values)
        self.offset_counters(trainer)

    def offset_counters(self, trainer: Trainer) -> None:
        """Lower the counter of each that will check a value that is missing; call it before each check."""
        if not self._missing and not self._spared:
            return
        for owner, name in callbacks_that_monitor(trainer):
            counter = next((each for each in _COUNTERS if isinstance(getattr(owner, each, None), int)), None)
            if counter is None:
                continue
            count = getattr(owner, counter)
            spared, former = self._spared.pop(id(owner), (None, count))
            if spared is not None and count in (spared, spared + 1):  # no check since, or one without an improvement
                count = former
            if name in self._missing:
                # A patience of 0 ends a run by a check that leaves its counter at 0.
                spared = count - 2 if getattr(owner, "patience", None) == 0 else count - 1
                self._spared[id(owner)] = spared, count
                count = spared
            setattr(owner, counter, count)
