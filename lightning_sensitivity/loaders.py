"""The loaders of the loop that runs, as Lightning counts and names them."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn

_SUFFIX = "/dataloader_idx_"  # and the index


def num_batches(trainer: pl.Trainer) -> list[int | float]:
    """Of each loader of the loop that runs, or has run; inf if one does not say, also where it is limited to a number.

    Args:
        trainer: The Trainer.
    """
    if trainer.testing:
        counts, loop = trainer.num_test_batches, trainer.test_loop
    elif trainer.state.fn == TrainerFn.VALIDATING:
        counts, loop = trainer.num_val_batches, trainer.validate_loop
    else:
        counts, loop = trainer.num_val_batches, trainer.fit_loop.epoch_loop.val_loop
    if trainer.sanity_checking:
        counts = trainer.num_sanity_val_batches
    # Of a CombinedLoader, of which only the loop knows; unless it is sequential, it is one loader to Lightning.
    combined = getattr(loop, "_combined_loader", None)
    mode = getattr(combined, "_mode", "sequential")
    loaders = getattr(combined, "flattened", [])
    if len(loaders) == len(counts):
        counts = [math.inf if sized_len(each) is None else count for count, each in zip(counts, loaders, strict=True)]
    return counts if mode == "sequential" else [min(counts) if mode == "min_size" else max(counts)]


def loader_name(name: str, dataloader_idx: int, num_loaders: int) -> str:
    """What Lightning makes of a logged name.

    Args:
        name: The name.
        dataloader_idx: Index of the loader.
        num_loaders: How many there are.
    """
    return name if num_loaders == 1 else f"{name}{_SUFFIX}{dataloader_idx}"


def without_loader(name: str) -> str:
    """What :func:`loader_name` has been given.

    Args:
        name: What it made of it.
    """
    return name.split(_SUFFIX)[0]
