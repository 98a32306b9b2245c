"""The training samples of a fit: the first ones, to score the model on, and how many there are."""

import math
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.functional.tasks import check_task, infer_task, num_outputs


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
        num_in_epoch: n, how many samples an epoch has over all processes.
        is_stream: Whether the loader does not tell n, or there are several: then the samples are counted as they come.
    """

    def __init__(self, task: str, num_samples: int, trainer: Trainer) -> None:
        self.task, self.num_missing, self._world_size = task, num_samples, trainer.world_size
        self.batches: list[tuple[Any, Tensor]] = []
        self.num_outputs: int | None = None
        self.num_in_epoch = self._num_seen = 0
        loader, *others = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
        batch_size, size = getattr(loader, "batch_size", None), sized_len(getattr(loader, "sampler", None))
        if batch_size and size and not others:
            # A sampler may draw with replacement, and training may be limited to some batches.
            sizes = size * trainer.world_size, sized_len(loader.dataset) or math.inf
            self.num_in_epoch = min(*sizes, int(trainer.num_training_batches) * batch_size * trainer.world_size)
        self.is_stream = not self.num_in_epoch

    def keep(self, outputs: Tensor, batch: Any, targets: Tensor) -> None:
        """Keep a batch. The first one tells the task.

        Args:
            outputs: Those of the model for it.
            batch: The batch, which nobody writes to.
            targets: Its labels.

        Raises:
            ValueError: If labels and outputs fit no task, or not the one of the batches before.
        """
        if outputs.ndim > 2 and math.prod(outputs.shape[2:]) > 1:
            raise ValueError(
                f"Outputs are dense, {tuple(outputs.shape)}: for pixels and tokens there is no estimate, since it was"
                " measured to be wrong there"
            )
        task = infer_task(outputs, targets) if self.task == "auto" else self.task
        check_task(outputs, targets, task)
        self.task = task
        self.batches.append((move_data_to_device(batch, torch.device("cpu")), targets.to("cpu", copy=True)))
        self.num_missing, self.num_outputs = self.num_missing - len(outputs), num_outputs(outputs)

    def count(self, num_samples: int, batch_idx: int) -> None:
        """Count the samples of a batch of a stream.

        Args:
            num_samples: How many it has in this process.
            batch_idx: Its index in the epoch.
        """
        self._num_seen = num_samples + self._num_seen * (batch_idx > 0)
        self.num_in_epoch = max(self.num_in_epoch, self._num_seen * self._world_size)
