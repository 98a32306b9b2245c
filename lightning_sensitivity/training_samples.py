"""A few training samples, kept to score the model on them: the half of the risk estimate that labels give."""

from __future__ import annotations

import io
import pickle
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.batches import Inputs, select_targets
from lightning_sensitivity.nested import copied, describe
from lightning_sensitivity.outputs import Selector
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.risk import training_sums
from lightning_sensitivity.tasks import check_logits, check_task, infer_task

_NUM_WITHIN = 5


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
        perturbs_inputs: Whether the monitor perturbs inputs, and not the outputs of submodules alone.
        must_be_saved: Whether they go into checkpoints.
    """

    def __init__(
        self,
        task: str,
        num_samples: int,
        inputs: Inputs,
        outputs: Selector,
        targets: Selector,
        perturbs_inputs: bool,
        must_be_saved: bool,
    ) -> None:
        self.task: str | None = None if task == "auto" else task
        self._inputs, self._outputs, self._targets = inputs, outputs, targets
        self._perturbs_inputs, self._must_be_saved = perturbs_inputs, must_be_saved
        self._num_missing = num_samples
        self._batches: list[Any] = []
        self._num_within = 0  # validations in a row in which all outputs could be probabilities

    @property
    def is_complete(self) -> bool:
        """Whether there are enough samples."""
        return self._num_missing <= 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The samples, and what is needed to go on."""
        return {"task": self.task, "num_missing": self._num_missing, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: What :meth:`state_dict` gave.
        """
        self.task, self._num_missing, self._batches = state["task"], state["num_missing"], list(state["batches"])

    def keep(self, model: nn.Module, batch: Any) -> None:
        """Keep a batch. The first one tells the task.

        Args:
            model: The module, in eval mode.
            batch: A training batch on its device.

        Raises:
            MisconfigurationException: If the labels of the first batch, or the task, can't be told, or do not fit. A
                later batch whose labels do not fit is left out with a warning, and training goes on.
        """
        try:
            # A copy even so, since some batches move themselves.
            kept = move_data_to_device(copied(batch, strict=True), torch.device("cpu"))
            batch = copied(batch)  # functions may write into it
            targets = select_targets(model, batch, self._targets)
            outputs = Probe(model, batch, self._inputs, self._outputs, self._perturbs_inputs).clean()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._refuse(error)
            return
        try:
            task = self.task or infer_task(outputs, targets)
            check_task(outputs, targets, task)
            check_logits(outputs, task)
        except ValueError as error:
            self._refuse(error)
            return
        if self.task is None:
            rank_zero_info(f"`SensitivityMonitor` takes the labels as `task={task!r}` for its risk estimate.")
        self.task = task
        if self._must_be_saved and not self._batches:
            self._check_that_it_can_be_saved(kept)
        self._batches.append(kept)
        self._num_missing -= len(outputs)

    @staticmethod
    def _check_that_it_can_be_saved(batch: Any) -> None:
        buffer = io.BytesIO()
        torch.save(batch, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError as error:
            raise MisconfigurationException(
                "`save_training_samples=True` needs batches of tensors, lists, tuples and dicts, which a checkpoint"
                f" can be loaded with, got {describe(batch)}."
            ) from error

    def _refuse(self, error: Exception) -> None:
        if self._batches:
            rank_zero_warn(f"`SensitivityMonitor` leaves a training batch out of its risk estimate: {error}")
            return
        raise MisconfigurationException(
            "`SensitivityMonitor` can't tell how to score the model on a training batch, which its risk estimate needs:"
            f" {error} Say where the labels are with `targets=` (a key, an index or a callable), and what they are with"
            " `task=` ('multiclass', 'binary', 'multilabel' or 'regression'); `task=None` does without the estimate."
        ) from error

    def sums(self, pl_module: pl.LightningModule) -> Tensor:
        """Score the model.

        Args:
            pl_module: The module, in eval mode.

        Returns:
            What :func:`~lightning_sensitivity.risk.training_sums` gives, over all samples of this process.
        """
        assert self.task is not None
        total = torch.zeros(())
        within = self.task in ("binary", "multilabel")  # elsewhere probabilities were refused, or are no outputs
        for batch in self._batches:
            batch = move_data_to_device(copied(batch), pl_module.device)
            outputs = Probe(pl_module, batch, self._inputs, self._outputs, self._perturbs_inputs).clean()
            sums = training_sums(outputs, select_targets(pl_module, batch, self._targets), self.task)
            total = total.to(sums) + sums
            within = within and bool(((outputs >= 0) & (outputs <= 1)).all())
        # At first, logits may happen to lie there.
        self._num_within = self._num_within + 1 if within else 0
        if self._num_within == _NUM_WITHIN:
            rank_zero_warn(
                "The model's outputs for training samples are all in [0, 1]. The risk estimate expects outputs before"
                " the sigmoid (logits); from probabilities it is wrong."
            )
        return total
