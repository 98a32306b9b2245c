"""A few training samples, kept to score the model on them: the half of the risk estimate that labels give."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.batches import Selector, copied, prepare_call, select_outputs, select_targets
from lightning_sensitivity.risk import training_sums
from lightning_sensitivity.tasks import check_task, infer_task


class TrainingSamples:
    """The first training batches of a fit, in the memory of the CPU.

    They stay the same in every epoch, so that a curve over epochs moves only when the model does, and they are scored
    in eval mode after the epoch. The outputs that training itself computes are no substitute: they are those of other
    weights, under dropout and with the statistics of the batch.

    Args:
        task: ``"auto"`` or one of :data:`~lightning_sensitivity.tasks.TASKS`.
        num_samples: How many are wanted in this process. Batches are kept whole.
        inputs: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        outputs: The same.
        targets: The same.
    """

    def __init__(self, task: str, num_samples: int, inputs: Selector, outputs: Selector, targets: Selector) -> None:
        self.task = None if task == "auto" else task
        self._inputs, self._outputs, self._targets = inputs, outputs, targets
        self._num_missing = num_samples
        self._batches: list[Any] = []

    @property
    def is_complete(self) -> bool:
        """Whether there are enough samples."""
        return self._num_missing <= 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._batches)

    def keep(self, model: nn.Module, batch: Any) -> None:
        """Keep a batch, if more are needed and its labels fit the task, which the first one tells.

        Args:
            model: The module, in eval mode.
            batch: A training batch on its device.

        Raises:
            MisconfigurationException: If the labels or the task can't be told, or do not fit.
        """
        try:
            targets = select_targets(model, batch, self._targets)
            x, run = prepare_call(model, batch, self._inputs)
            outputs = select_outputs(run(x), self._outputs)
            self.task = self.task or infer_task(outputs, targets)
            check_task(outputs, targets, self.task)
        except (MisconfigurationException, ValueError) as error:
            raise MisconfigurationException(
                "`SensitivityMonitor` can't tell how to score the model on a training batch, which its risk estimate"
                f" needs: {error} Say where the labels are with `targets=` (a key, an index or a callable), and what"
                " they are with `task=` ('multiclass', 'binary', 'multilabel' or 'regression'); `task=None` does"
                " without the estimate."
            ) from error
        self._batches.append(move_data_to_device(copied(batch), torch.device("cpu")))
        self._num_missing -= len(x)

    def sums(self, pl_module: pl.LightningModule) -> Tensor:
        """Score the model.

        Args:
            pl_module: The module, in eval mode.

        Returns:
            What :func:`~lightning_sensitivity.risk.training_sums` gives, over all samples of this process.
        """
        assert self.task is not None
        total = torch.zeros(())
        for batch in self._batches:
            batch = move_data_to_device(batch, pl_module.device)
            x, run = prepare_call(pl_module, batch, self._inputs)
            outputs = select_outputs(run(x), self._outputs)
            sums = training_sums(outputs, select_targets(pl_module, batch, self._targets), self.task)
            total = total.to(sums) + sums
        return total
