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
    scored in eval mode: the outputs of training itself are those of other weights, under dropout.

    Args:
        task: ``"auto"`` or one of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        num_samples: How many are wanted in this process. Batches are kept whole.
        trainer: The Trainer.

    Attributes:
        task: The task, once a batch was kept.
        batches: The kept batches, and their labels.
        num_missing: How many samples are still to be kept; 0 or less if there are enough.
        num_outputs: K, as of the last pass.
        num_in_epoch: n, how many samples with a label an epoch has over all processes.
        is_stream: Whether n is counted as samples come, because the loader has no length, or there are several.
    """

    def __init__(self, task: str, num_samples: int, trainer: Trainer) -> None:
        self.task, self.num_missing, self._trainer = task, num_samples, trainer
        self.batches: list[tuple[Any, Tensor]] = []
        self.num_outputs: int | None = None
        self.num_in_epoch = self._num_seen = 0
        self.is_stream = False
        combined = trainer.fit_loop._combined_loader
        lengths = {sized_len(loader) for loader in combined.flattened}  # type: ignore[union-attr]
        if len(lengths) > 1 and combined._mode == "max_size_cycle":  # type: ignore[union-attr]
            raise ValueError("Loaders of different lengths repeat samples, so their number is unknown")

    def keep(self, outputs: Tensor, batch: Any, targets: Tensor) -> None:
        """Keep a batch. The first one determines the task.

        Args:
            outputs: Those of the model for it.
            batch: The batch, which nobody writes to.
            targets: Its labels.

        Raises:
            ValueError: If labels and outputs fit no task, or not the one of the batches before.
        """
        if outputs.ndim > 2 and math.prod(outputs.shape[2:]) > 1:
            raise ValueError(f"Outputs are dense, {tuple(outputs.shape)}: there is no estimate for pixels and tokens")
        task = infer_task(outputs, targets) if self.task == "auto" else self.task
        check_task(outputs, targets, task)
        self.task = task
        self.batches.append((move_data_to_device(batch, torch.device("cpu")), targets.to("cpu", copy=True)))
        self.num_missing, self.num_outputs = self.num_missing - len(outputs), num_outputs(outputs)

    def count(self, targets: Tensor, is_first: bool) -> None:
        """Count the samples of an epoch: by its loader, if the first batch agrees with it, or else as they come.

        Args:
            targets: The labels of a batch.
            is_first: Whether it is the first one of an epoch.
        """
        has_label = (targets != IGNORED) if targets.ndim == 1 else torch.ones(len(targets))
        num_samples, world_size = int(has_label.sum()), self._trainer.world_size
        if is_first:
            loader, *others = self._trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
            size, num_batches = sized_len(getattr(loader, "sampler", None)), self._trainer.num_training_batches
            batch_size, self._num_seen = getattr(loader, "batch_size", None), 0
            self.is_stream = True
            is_one = not others and math.isfinite(num_batches)
            if is_one and size and batch_size and num_samples == min(batch_size, size):
                self.is_stream = False
                # A sampler may draw with replacement, and training may be limited to some batches.
                sizes = size * world_size, sized_len(getattr(loader, "dataset", None)) or math.inf
                self.num_in_epoch = int(min(*sizes, num_batches * batch_size * world_size))
        self._num_seen += num_samples
        if self.is_stream:
            self.num_in_epoch = max(self.num_in_epoch, self._num_seen * world_size)
