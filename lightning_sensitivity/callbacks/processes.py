"""What the processes of a run decide and share; every process must call these, in the same order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.messages import Refused


def agree(trainer: Trainer, condition: bool) -> bool:
    """Return whether a condition holds in all processes."""
    return bool(trainer.strategy.reduce_boolean_decision(condition))


@contextmanager
def raise_in_all(trainer: Trainer) -> Iterator[None]:
    """Raise in all processes if one fails inside, so that none waits for another in vain."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    is_fine = agree(trainer, failure is None)
    if failure is not None:
        raise failure
    if not is_fine:
        raise Refused("Another process has refused this run before its first step, and says why.")


def gather_tensors(trainer: Trainer, rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, ``(N, ...)``, on the CPU; their numbers may differ."""
    if trainer.world_size == 1:
        return rows
    return torch.cat([part.cpu() for part in gather_all_tensors(rows.to(trainer.strategy.root_device))])


def gather_objects(trainer: Trainer, value: object) -> list[Any]:
    """Collect an object of each process in the first process; the others get none."""
    if trainer.world_size == 1:
        return [value]
    found = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, found)
    return found or []
