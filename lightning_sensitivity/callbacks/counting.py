"""How many different samples a fit trains on."""

import math

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Refused
from lightning_sensitivity.model.samples import KeptSamples, count_labels


def count_training_samples(trainer: Trainer, batch_size: int) -> int | None:
    """Count the different samples that a fit trains on, over all processes; None if that is unknown.

    Args:
        trainer: The Trainer in a fit.
        batch_size: The number of samples of the first batch.
    """
    loader, *others = compat.training_loaders(trainer)
    dataset = getattr(loader, "dataset", None)
    size = sized_len(dataset)
    if others or size is None or isinstance(dataset, IterableDataset):
        return None
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:  # of a DataLoader, each item is a batch
        return size * batch_size if isinstance(loader, DataLoader) else size
    sampler = getattr(batch_sampler, "sampler", None)  # the loader's own may be unused
    num_drawn = sized_len(sampler)
    if num_drawn is None:
        return size
    if _is_in_order(sampler) and math.isfinite(trainer.num_training_batches):  # each epoch has the same batches
        num_drawn = min(num_drawn, int(trainer.num_training_batches * batch_size))
    return min(size, num_drawn * trainer.world_size)


def _is_in_order(sampler: object) -> bool:
    is_distributed = isinstance(sampler, DistributedSampler) and not sampler.shuffle
    return is_distributed or isinstance(sampler, SequentialSampler)


def check_number(trainer: Trainer, num_training: int | None) -> None:
    """Check that the number of different training samples is known or given.

    Raises:
        MisconfigurationException: If it is not.
    """
    if num_training is None and count_training_samples(trainer, batch_size=1) is None:
        raise Refused(
            "the number of different training samples is unknown, since the loader is a stream or there are several: "
            "set `num_training=`.",
            entry="num-training",
        )


def count_labelled_samples(trainer: Trainer, kept: KeptSamples, num_training: int | None) -> int | None:
    """Count the labelled training samples by the share of kept ones; every process must call it.

    Args:
        trainer: The Trainer in a fit.
        kept: The training samples that this process keeps.
        num_training: The number of training samples, if the user gives it.

    Returns:
        The number, 1 or more; None if no process has kept any samples.
    """
    counts = torch.tensor([count_labels(batch.labels for batch in kept.batches), kept.size], dtype=torch.float32)
    counts = counts.to(trainer.strategy.root_device)
    num_labelled, num_kept = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    if num_kept == 0:
        return None
    size = num_training or count_training_samples(trainer, kept.batches[0].size if kept.batches else 1) or 1
    return max(1, int(size * num_labelled / num_kept + 0.5))
