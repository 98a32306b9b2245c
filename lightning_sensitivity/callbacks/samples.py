"""The training samples of a fit: the first ones, to score the model on, and how many there are."""

import math
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.functional.tasks import IGNORED, check_task, infer_task, num_outputs


class TrainingSamples:
    """Keep the first training batches of a fit in the memory of the CPU, and count the samples of an epoch.

    The kept ones stay the same in every epoch, so that a curve over epochs moves only when the model does, and are
    scored in eval mode: outputs during training come from earlier weights, with dropout.

    Args:
        task: ``"auto"`` or one of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        num_wanted: How many to keep in this process. Batches are kept whole.
        num_in_epoch: How many samples an epoch had in this process, in a fit that goes on.

    Attributes:
        task: The task, once a batch was kept.
        batches: The kept batches, and their labels.
        num_wanted: How many more samples to keep; not above 0 once there are enough.
        num_outputs: K, as of the last pass.
    """

    def __init__(self, task: str, num_wanted: int, num_in_epoch: int) -> None:
        self.task, self.num_wanted = task, num_wanted
        self.batches: list[tuple[Any, Tensor]] = []
        self.num_outputs: int | None = None
        self._num_in_epoch, self._batch_size, self._num_batches = num_in_epoch, 0, 0
        self._num_seen = torch.tensor(0)  # samples, in this epoch and process

    def keep(self, outputs: Tensor, batch: Any, targets: Tensor) -> None:
        """Keep a batch. The first one determines the task.

        Args:
            outputs: Outputs of the model for it.
            batch: The batch. It is not copied where it is on the CPU already.
            targets: Its labels.

        Raises:
            ValueError: If outputs are dense, or labels and outputs fit no task, or not the task of earlier batches.
        """
        if outputs.ndim > 2 and math.prod(outputs.shape[2:]) > 1:
            raise ValueError(f"Outputs are dense, {tuple(outputs.shape)}: there is no estimate for pixels and tokens")
        task = infer_task(outputs, targets) if self.task == "auto" else self.task
        check_task(outputs, targets, task)
        self.task = task
        self.batches.append((move_data_to_device(batch, torch.device("cpu")), targets.to("cpu", copy=True)))
        self.num_wanted, self.num_outputs = self.num_wanted - len(outputs), num_outputs(outputs)

    def count(self, targets: Tensor) -> None:
        """Count the samples of a batch that have a label, without waiting for the device."""
        has_label = targets.long() != IGNORED if targets.ndim == 1 else targets.new_ones(len(targets))
        self._num_seen = self._num_seen.to(has_label.device) + has_label.sum()
        self._batch_size, self._num_batches = max(self._batch_size, len(targets)), self._num_batches + 1

    def start_epoch(self, trainer: Trainer) -> None:
        """Count from 0, and stop keeping samples, since a new epoch repeats them."""
        if math.isinf(trainer.num_training_batches) or self._num_batches >= trainer.num_training_batches:
            self._num_in_epoch, self.num_wanted = max(self._num_in_epoch, int(self._num_seen)), 0
        # Else the fit was resumed amid the last epoch, and saw only its rest.
        self._num_seen, self._num_batches = self._num_seen * 0, 0

    def num_in_epoch(self, trainer: Trainer) -> int:
        """Compute n, the samples of the longest epoch so far, over all processes, which must all call it."""
        share = trainer.num_training_batches / max(1, self._num_batches)
        is_scaled = self._num_in_epoch == 0 and 1 < share < math.inf  # amid the first epoch, of a known length
        num_seen = (self._num_seen * (share if is_scaled else 1)).clamp(min=self._num_in_epoch).long()
        total = int(trainer.strategy.reduce(num_seen.to(trainer.strategy.root_device), reduce_op="sum"))
        loader, *others = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
        if not others and self._batch_size <= (getattr(loader, "batch_size", None) or 0):
            total = min(total, sized_len(getattr(loader, "dataset", None)) or total)  # a sampler may repeat samples
        return total


def check_loaders(trainer: Trainer) -> None:
    """Refuse training loaders that repeat samples within an epoch."""
    combined = trainer.fit_loop._combined_loader
    lengths = {sized_len(loader) for loader in combined.flattened}  # type: ignore[union-attr]
    if len(lengths) > 1 and combined._mode == "max_size_cycle":  # type: ignore[union-attr]
        raise ValueError("Loaders of different lengths repeat samples, so their number is unknown")
