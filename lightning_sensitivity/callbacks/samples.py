"""The training samples of a fit: keep the first ones to score the model on, and count how many there are."""

import math
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import SequentialSampler

from lightning_sensitivity.compat import training_loaders
from lightning_sensitivity.functional.tasks import TASKS, Task, check_classes, has_ignored_value, infer_task
from lightning_sensitivity.functional.tensors import num_outputs


class KeptBatch(NamedTuple):
    """Hold a training batch in CPU memory."""

    batch: Any
    targets: Tensor


class TrainingSamples:
    """Keep the first training batches of a fit in CPU memory, and count the samples of an epoch.

    The kept batches are the same in every epoch, so that a curve over epochs changes only when the model does. They are
    scored in eval mode, since outputs from the training steps come from earlier weights, with dropout.

    Args:
        task: ``"auto"`` or a name of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        num_wanted: How many to keep in this process. Batches are kept whole.
        num_before: How many samples this process had counted before the fit was resumed.

    Attributes:
        task: The task, once a batch has been kept.
        batches: The kept batches, and their labels.
        num_missing: How many more samples to keep; 0 or less once there are enough.
        num_outputs: K, the number of outputs.
    """

    def __init__(self, task: str, num_wanted: int, num_before: int) -> None:
        self.task: Task | None = TASKS.get(task)
        self.batches: list[KeptBatch] = []
        self.num_missing = num_wanted
        self.num_outputs: int | None = None
        self._num_checked = 0  # of the batches
        self._num_before = num_before
        self._longest_epoch = 0
        self._num_in_past_epochs = 0
        self._num_seen = torch.tensor(0)  # samples, in this epoch and process
        self._num_batches = 0  # in this epoch
        self._largest_batch = 0

    def keep(self, outputs: Tensor, batch: Any, targets: Tensor) -> None:
        """Keep a batch. The first one determines the task.

        Args:
            outputs: Outputs of the model for the batch.
            batch: The batch. It is not copied if it is already on the CPU.
            targets: The labels of the batch.

        Raises:
            ValueError: If outputs are dense, if labels and outputs fit no task, or if they do not fit the task of
                earlier batches.
        """
        if outputs.ndim > 2 and math.prod(outputs.shape[2:]) > 1:
            raise ValueError(f"Outputs are dense, {tuple(outputs.shape)}: there is no estimate for pixels and tokens")
        task = self.task or infer_task(outputs, targets)
        task.check(outputs, targets)
        self.task = task
        on_cpu = move_data_to_device(batch, torch.device("cpu"))
        self.batches.append(KeptBatch(on_cpu, targets.to("cpu", copy=True)))
        self.num_missing -= len(outputs)
        self.num_outputs = num_outputs(outputs)

    def check_classes(self) -> None:
        """Raise ValueError if kept labels use only the first few of many outputs; check only after new batches."""
        if len(self.batches) > self._num_checked and self.task is not None and self.task.name == "multiclass":
            labels = torch.cat([kept.targets.flatten() for kept in self.batches])
            check_classes(self.num_outputs or 1, labels)
            self._num_checked = len(self.batches)

    def count(self, targets: Tensor) -> None:
        """Count the labelled samples of a batch, in integers and without waiting for the device."""
        has_label = ~has_ignored_value(targets)[:, None].flatten(1).all(1)
        self._num_seen = self._num_seen.to(has_label.device) + has_label.sum()
        self._largest_batch = max(self._largest_batch, len(targets))
        self._num_batches += 1

    def start_epoch(self, trainer: Trainer) -> None:
        """Restart the count at 0, and stop keeping samples, since a new epoch repeats them."""
        num_seen = int(self._num_seen)
        self._num_in_past_epochs += num_seen
        num_batches = trainer.num_training_batches
        is_whole = math.isinf(num_batches) or self._num_batches >= num_batches
        if is_whole:  # otherwise the fit was resumed within that epoch, and saw only the rest of it
            self._longest_epoch = max(self._longest_epoch, num_seen)
            self.num_missing = 0
        self._num_seen = torch.zeros_like(self._num_seen)
        self._num_batches = 0

    def num_training(self, trainer: Trainer) -> int:
        """Compute n, the number of different training samples over all processes, which must all call it."""
        num_seen = max(self._num_before, self._num_in_this_process(trainer))
        strategy = trainer.strategy
        total = strategy.reduce(torch.tensor(num_seen, device=strategy.root_device), reduce_op="sum")
        return int(min(int(total), self._size_of_dataset(trainer)))

    def _num_in_this_process(self, trainer: Trainer) -> int:
        num_seen = int(self._num_seen)
        if _sees_other_samples_in_each_epoch(trainer):
            return self._num_in_past_epochs + num_seen
        if self._longest_epoch == 0:
            num_seen = self._extrapolated(num_seen, trainer.num_training_batches)
        return max(self._longest_epoch, num_seen)

    def _extrapolated(self, num_seen: int, num_batches: int | float) -> int:
        """Extrapolate the count to the whole first epoch, if the length of the epoch is known."""
        is_in_the_middle = 0 < self._num_batches < num_batches < math.inf
        return int(num_seen * num_batches / self._num_batches) if is_in_the_middle else num_seen

    def _size_of_dataset(self, trainer: Trainer) -> float:
        """Return the number of samples in the data set, which a sampler may repeat; inf if it is unknown."""
        loader, *others = training_loaders(trainer)[0]
        size = sized_len(getattr(loader, "dataset", None))
        if others or size is None:
            return math.inf
        batch_size = getattr(loader, "batch_size", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        if batch_size is None and batch_sampler is not None:  # one of the user's own
            batch_size = getattr(batch_sampler, "batch_size", self._largest_batch)
        is_one_sample_an_item = self._largest_batch <= (batch_size or 0)  # else an item may be a whole batch
        return size if is_one_sample_an_item else math.inf


def check_loaders(trainer: Trainer) -> None:
    """Refuse training loaders that repeat samples within an epoch."""
    loaders, mode = training_loaders(trainer)
    lengths = {sized_len(loader) for loader in loaders}
    if len(lengths) > 1 and mode == "max_size_cycle":
        raise ValueError(
            "Training loaders of different lengths repeat samples, so their number is unknown. Combine them with "
            "`CombinedLoader(loaders, 'max_size')` or `'min_size'`, or give the labelled loader the largest length"
        )


def _sees_other_samples_in_each_epoch(trainer: Trainer) -> bool:
    """Return whether epochs are cut short (`limit_train_batches`), each with other samples than the last."""
    loader, *others = training_loaders(trainer)[0]
    length = sized_len(loader)
    is_shuffled = not isinstance(getattr(loader, "sampler", None), SequentialSampler | None)
    return not others and length is not None and trainer.num_training_batches < length and is_shuffled
