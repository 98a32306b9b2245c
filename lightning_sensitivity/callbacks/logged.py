"""What a monitor says: the values it logs, under which names and for whom, and what it warns of."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor
from torchmetrics import Metric

_SUFFIX = "/dataloader_idx_"  # and the index


class Reading(Metric):
    """A stateless Metric that gives one number of a loader.

    Lightning logs a Metric as one number, under the name of its loader, and asks for the number when the loader is
    done. One that gives None is not logged: a nan in its place would stop an ``EarlyStopping``.

    Args:
        values: Gives the numbers of the loader by name.
        name: Which of them.
    """

    full_state_update = False
    update_called = True  # the state that is read lives elsewhere

    def __init__(self, values: Callable[[], Mapping[str, Tensor]], name: str) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._values, self._name = values, name

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the number."""
        return self._values().get(self._name)


def lay_out(trainer: Trainer, charts: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Lay out TensorBoard's Custom Scalars.

    Args:
        trainer: The Trainer, of whose loggers those of TensorBoard get the layout.
        charts: The prefix of each monitor, and the title and the tags (a regular expression) of each of its charts.
    """
    layout: dict[str, dict[str, object]] = {}
    for prefix, of_prefix in charts:
        group = layout.setdefault(f"Generalization ({prefix}*)", {})
        group.update({title: ["Multiline", [tags]] for title, tags in of_prefix.items()})
    for logger in trainer.loggers:
        # By name, because the logger of `pytorch_lightning` is another class.
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
            logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]


def stage_prefix(prefix: str, trainer: Trainer) -> str:
    """The prefix of the loop that runs: in ``Trainer.test`` with "test" for "val"."""
    if not trainer.testing:
        return prefix
    return prefix.replace("val", "test", 1) if "val" in prefix else f"test_{prefix}"


def num_batches(trainer: Trainer) -> list[int | float]:
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


def waiting_for(trainer: Trainer, names: Collection[str]) -> list[tuple[str, str, str]]:
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


def names_of_others(trainer: Trainer) -> set[str]:
    """What the module and other callbacks have logged in the loop that has just run, and in the one around it.

    Args:
        trainer: The Trainer.
    """
    # Only there it shows who has logged what.
    loops = [trainer, trainer.fit_loop.epoch_loop] if trainer.state.fn == TrainerFn.FITTING else [trainer]
    results = [result for loop in loops for result in (getattr(loop, "_results", None) or {}).values()]
    return {without_loader(result.meta.name) for result in results if not isinstance(result.value, Reading)}


class Failures:
    """What has failed in a run, and what was said of it: before the first training step an error, then a warning.

    Args:
        name: Of the monitor's class.
        prefix: Of the names that it logs.

    Attributes:
        is_strict: Whether what fails is an error: until the first training step.
        has_failed: Whether something has failed in the validation that runs.
        warned_of: The kinds of trouble that were warned of.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self.is_strict, self.has_failed, self.warned_of = True, False, set[str]()

    def warn(self, kind: str, message: str, in_any_process: bool = False) -> None:
        """Warn, once a kind; the message goes behind the name of the monitor."""
        if kind not in self.warned_of:
            self.warned_of.add(kind)
            warn = warnings.warn if in_any_process else rank_zero_warn
            warn(f"`{self._name}` ({self._prefix}*) {message}", stacklevel=2)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Let an exception inside be an error that says what failed, or a warning; see :attr:`is_strict`."""
        try:
            yield
        except Exception as error:
            is_told = isinstance(error, MisconfigurationException)
            if self.is_strict and (is_told or is_oom_error(error)):
                raise  # out of memory: Lightning's finder of batch sizes waits for it
            reason = str(error) if is_told else f"{type(error).__name__}: {str(error).strip().rstrip('.')}."
            if self.is_strict:
                raise MisconfigurationException(
                    f"`{self._name}` {what}: {reason} If `forward` takes something else than was chosen, say"
                    " what with `inputs=`, such as `inputs=lambda batch: (batch,)` for the whole batch."
                ) from error
            self.has_failed = True
            self.warn(what, f"{what}: {reason}", in_any_process=True)
            if is_oom_error(error):
                traceback.clear_frames(error.__traceback__)  # which hold what the pass had on the device
                garbage_collection_cuda()
