"""What monitors need of Lightning: lazily read values, failures that cost a value, names, counts."""

import math
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tasks import warn


class LazyValue(Metric):
    """Hold one value of one loader, which Lightning reads when the loader is done.

    A value that is logged as a number at the epoch's end shows the last loader's in every column of
    ``Trainer.validate``. Where there is no value, the last one stays; nan is logged, if there never was one.

    Args:
        values: Gives the values of the loader by name.
        name: Which of them.
    """

    full_state_update = False
    update_called = True  # the state that is read lives elsewhere

    def __init__(self, values: Callable[[], Mapping[str, Tensor]], name: str) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._values, self._name, self._has_value = values, name, False

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the value."""
        value = self._values().get(self._name)
        if value is None:
            return None if self._has_value else torch.tensor(math.nan)
        self._has_value = True
        return value


class BatchChoice:
    """Choose which batches of a validation are measured: always the same, evenly spaced, since loaders may be sorted.

    Args:
        num_batches: Of each loader.
        sizes: Numbers of samples in the first batch of each loader, once it was measured.
        budget: How many samples of a loader this process should measure.

    Attributes:
        num_batches: Of each loader.
        num_measured: Samples that were measured, of each loader.
    """

    def __init__(self, num_batches: list[int | float], sizes: Mapping[int, int], budget: float) -> None:
        self.num_batches, self._sizes, self._budget = num_batches, sizes, budget
        self.num_measured = [0] * len(num_batches)

    def count(self, dataloader_idx: int) -> float:
        """Count the batches of a loader that will be measured; all of them until the first was measured."""
        count, size = self.num_batches[dataloader_idx], self._sizes.get(dataloader_idx)
        is_limited = size is not None and math.isfinite(count) and math.isfinite(self._budget)
        return min(count, math.ceil(self._budget / size)) if size is not None and is_limited else count

    def includes(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Decide whether to measure a batch: always the first one, none once the budget is spent."""
        count, chosen = self.num_batches[dataloader_idx], self.count(dataloader_idx)
        if batch_idx == 0 or self.num_measured[dataloader_idx] >= self._budget:
            return batch_idx == 0
        return chosen == count or batch_idx * chosen % count < chosen


class Failures:
    """Turn failures into an error before the first training step, and into one warning of each kind after it.

    Args:
        name: Name of the monitor's class.
        prefix: Prefix of what it logs.

    Attributes:
        is_strict: Whether a failure is an error.
        kinds: The kinds of failure that were warned of.
        has_failed: Whether something has failed in the validation that runs.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix, self.is_strict, self.kinds = name, prefix, True, set[str]()
        self.has_failed = False

    def warn(self, kind: str, message: str, in_any_process: bool = False) -> None:
        """Warn once of each kind; the message follows the name of the monitor."""
        if kind not in self.kinds:
            self.kinds.add(kind)
            (warn if in_any_process else rank_zero_only(warn))(f"`{self._name}` ({self._prefix}*) {message}")

    @contextmanager
    def warn_on_failure(self, what: str) -> Iterator[None]:
        """Turn an exception inside into a warning, or into an error that says what failed; see :attr:`is_strict`."""
        try:
            yield
        except Exception as error:
            is_clear = isinstance(error, MisconfigurationException)
            if self.is_strict and (is_clear or is_oom_error(error)):
                raise  # out of memory: Lightning's finder of batch sizes waits for it
            reason = str(error) if is_clear else f"{type(error).__name__}: {str(error).strip().rstrip('.')}."
            if self.is_strict:
                advice = "If `forward` takes something else, say what: `inputs=lambda batch: batch['image']`."
                raise MisconfigurationException(f"`{self._name}` {what}: {reason} {advice}") from error
            self.has_failed = True
            self.warn(what, f"{what}: {reason}", in_any_process=True)
            if is_oom_error(error):
                traceback.clear_frames(error.__traceback__)  # which hold what the pass had on the device
                garbage_collection_cuda()


def lay_out_charts(trainer: Trainer, charts: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Lay out TensorBoard's Custom Scalars.

    Args:
        trainer: The Trainer, whose TensorBoard loggers get the layout.
        charts: The prefix of each monitor, and the title and the tags (a regular expression) of each of its charts.
    """
    layout: dict[str, dict[str, object]] = {}
    for prefix, of_prefix in charts:
        group = layout.setdefault(f"Generalization ({prefix}*)", {})
        group.update({title: ["Multiline", [tags]] for title, tags in of_prefix.items()})
    for logger in trainer.loggers:
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):  # of either package
            logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]


def stage_prefix(prefix: str, trainer: Trainer) -> str:
    """Return the prefix for the running loop. In ``Trainer.test``, "test" replaces the word "val"."""
    if not trainer.testing:
        return prefix
    new, count = re.subn(r"(?<![A-Za-z])val(?![A-Za-z])", "test", prefix, count=1)
    return new if count else f"test_{prefix}"


def loader_name(name: str, dataloader_idx: int, num_loaders: int) -> str:
    """Return the name under which Lightning logs a value of a loader."""
    return name if num_loaders == 1 else f"{name}/dataloader_idx_{dataloader_idx}"


def watchers(trainer: Trainer, names: Collection[str]) -> list[tuple[str, str, str]]:
    """List who watches one of our values: the name of the class, the logged name, and ``"min"`` or ``"max"``.

    Args:
        trainer: The Trainer.
        names: What we log, without the index of a loader.
    """
    owners = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    watching = [(getattr(each, "scheduler", each), getattr(each, "monitor", None)) for each in owners]
    return [
        (type(owner).__name__, name, getattr(owner, "mode", "min"))
        for owner, name in watching
        if isinstance(name, str) and name.split("/dataloader_idx_")[0] in names
    ]


def num_batches(trainer: Trainer) -> list[int | float]:
    """Count the batches of each loader of the running loop; inf for a loader without a length, even if limited."""
    loop = trainer._evaluation_loop
    counts = loop.max_batches
    # Only the loop knows of a CombinedLoader. Lightning sees it as one loader unless it is sequential.
    mode, loaders = loop._combined_loader._mode, loop._combined_loader.flattened  # type: ignore[union-attr]
    if len(loaders) == len(counts):
        counts = [math.inf if sized_len(each) is None else count for count, each in zip(counts, loaders, strict=True)]
    return counts if mode == "sequential" else [min(counts) if mode == "min_size" else max(counts)]
