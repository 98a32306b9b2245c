"""The training samples of a fit: the first ones, to score the model on, and how many there are."""

import math
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.functional.tasks import (
    NO_CLASSES,
    are_classes,
    are_probabilities,
    check_task,
    infer_task,
    num_outputs,
)


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
        num_in_epoch: n, how many samples an epoch has over all processes, as the loaders tell; of a stream, how many
            were seen so far.
        is_stream: Whether the loaders don't tell.
    """

    def __init__(self, task: str, num_samples: int, trainer: Trainer) -> None:
        self.task, self.num_missing, self._trainer, self._is_auto = task, num_samples, trainer, task == "auto"
        self.batches: list[tuple[Any, Tensor]] = []
        self.num_outputs: int | None = None
        self.num_in_epoch = self._num_seen = 0
        self.is_stream = math.isinf(trainer.num_training_batches)

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
        if task == "multiclass" and are_probabilities(outputs):
            raise ValueError("Outputs are probabilities. Return or choose (`outputs=`) the logits")
        self.task = task
        self.batches.append((move_data_to_device(batch, torch.device("cpu")), targets.to("cpu", copy=True)))
        self.num_missing, self.num_outputs = self.num_missing - len(outputs), num_outputs(outputs)

    def check_classes(self) -> None:
        """Require that all kept labels name outputs as classes would, where the task was inferred.

        Raises:
            ValueError: If they name the first few alone.
        """
        targets = torch.cat([targets.flatten() for _, targets in self.batches])
        if self._is_auto and self.task == "multiclass" and not are_classes(self.num_outputs or 0, targets):
            raise ValueError(NO_CLASSES)

    def count(self, num_samples: int, batch_idx: int) -> None:
        """Count the samples of an epoch, by its first batch, or of a stream by all of them.

        Args:
            num_samples: How many a batch has.
            batch_idx: Its index in the epoch.
        """
        trainer = self._trainer
        if self.is_stream:
            self._num_seen = num_samples + self._num_seen * (batch_idx > 0)
            self.num_in_epoch = max(self.num_in_epoch, self._num_seen * trainer.world_size)
        elif not self.num_in_epoch:
            combined = trainer.fit_loop._combined_loader
            loaders, share = getattr(combined, "flattened", []), 1.0
            if getattr(combined, "_mode", "sequential") != "sequential":  # of each batch, the model may get a part
                share = num_samples / max(1, sum(getattr(loader, "batch_size", None) or 0 for loader in loaders))
            self.num_in_epoch = int(trainer.num_training_batches) * num_samples * trainer.world_size
            for name, times in (("dataset", 1), ("sampler", trainer.world_size)):
                sizes = [sized_len(getattr(loader, name, None)) for loader in loaders]
                if sizes and None not in sizes:
                    size = math.ceil(min(1.0, share) * times * sum(size or 0 for size in sizes))
                    self.num_in_epoch = min(self.num_in_epoch, size)
