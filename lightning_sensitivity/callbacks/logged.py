"""What is logged: under which names, how Lightning reads it, and who waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

Charts = dict[str, list[object]]

_SUFFIX = "/dataloader_idx_"  # and the index


class Reading(Metric):
    """A stateless Metric that gives one number of a loader.

    Lightning logs a Metric as one number, under the name of its loader, and asks for the number when the loader is
    done. One that gives None is not logged: a nan in its place would stop an ``EarlyStopping``.

    Args:
        read: Gives the number, or None.
    """

    full_state_update = False

    def __init__(self, read: Callable[[], Tensor | None]) -> None:
        super().__init__(sync_on_compute=False)
        self._read = read

    @property
    def update_called(self) -> bool:
        """True, since the state that is read lives elsewhere."""
        return True

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the number."""
        return self._read()


def lay_out(trainer: pl.Trainer, charts: Sequence[tuple[str, Charts]]) -> None:
    """Lay out TensorBoard's Custom Scalars.

    Args:
        trainer: The Trainer, of whose loggers those of TensorBoard get the layout.
        charts: The prefix of each monitor, and its charts.
    """
    layout: dict[str, Charts] = {}
    for prefix, of_prefix in charts:
        layout.setdefault(f"Generalization ({prefix}*)", {}).update(of_prefix)
    for logger in trainer.loggers:
        # By name, because the logger of `pytorch_lightning` is another class.
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
            logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]


def stage_prefix(prefix: str, trainer: pl.Trainer) -> str:
    """The prefix of the loop that runs: in ``Trainer.test`` with "test" for "val"."""
    if not trainer.testing:
        return prefix
    return prefix.replace("val", "test", 1) if "val" in prefix else f"test_{prefix}"


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
    """What Lightning makes of a logged name."""
    return name if num_loaders == 1 else f"{name}{_SUFFIX}{dataloader_idx}"


def without_loader(name: str) -> str:
    """What :func:`loader_name` has been given."""
    return name.split(_SUFFIX)[0]


def waiting_for(trainer: pl.Trainer, names: Collection[str]) -> list[tuple[str, str, str]]:
    """Who waits for one of our values: the name of the class, the logged name, and the mode, ``"min"`` or ``"max"``.

    Args:
        trainer: The Trainer.
        names: What we log, without the index of a loader.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [(type(each).__name__, getattr(each, "monitor", None), getattr(each, "mode", "min")) for each in callbacks]
    for config in trainer.lr_scheduler_configs:
        found.append((type(config.scheduler).__name__, config.monitor, getattr(config.scheduler, "mode", "min")))
    return [(who, name, mode) for who, name, mode in found if isinstance(name, str) and without_loader(name) in names]


def names_of_others(trainer: pl.Trainer) -> set[str]:
    """What the module and other callbacks have logged in the loop that has just run, and in the one around it.

    Args:
        trainer: The Trainer.
    """
    # Only there it shows who has logged what.
    loops = [trainer, trainer.fit_loop.epoch_loop] if trainer.state.fn == TrainerFn.FITTING else [trainer]
    results = [result for loop in loops for result in (getattr(loop, "_results", None) or {}).values()]
    return {without_loader(result.meta.name) for result in results if not isinstance(result.value, Reading)}
