"""A run: where it is, what is said of it, and what other callbacks get in place of values that a validation lacks."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.callbacks.checks import FirstStep
from lightning_sensitivity.messages import Refused, describe_error, link_to
from lightning_sensitivity.reading.kept import KeptObservations, KeptSamples

_WORST = float(torch.finfo(torch.float32).max)  # of values that are best where low
_BETTER = 0.999  # factor in each further validation without a value; a scheduler needs an improvement of 1e-4
_OF_FEW_SAMPLES = ("blind", "few-samples")  # entries of what is said where few samples are the reason


def is_fitting(trainer: Trainer) -> bool:
    """Return whether a fit is on, after its sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


class Phase(Enum):
    """Where a run is, and so what a failure means."""

    BEFORE_FIRST_STEP = auto()  # an error that ends the run, also in a sanity check and in `Trainer.validate`
    RESUMED = auto()  # a warning, as from now on: a resumed fit begins with a validation, and no batch was read yet
    TRAINING = auto()  # a warning, and no value; the first training batch was read


class Validation(Enum):
    """What is done with the current validation."""

    SKIPPED = auto()  # it is not measured, or there is none
    KEEPING = auto()  # it is measured after its last batch; the first one keeps samples before
    MEASURED = auto()  # what was measured waits to be logged


class Run:
    """A run of a Trainer, as a monitor sees it; each has a new one, which says each thing once.

    Args:
        monitor: Name of the monitor's class.
        prefix: Prefix of what it logs.
        is_debugging: Whether it is a ``fast_dev_run``, which needs no word about few samples.

    Attributes:
        phase: Where it is, and so what a failure means.
        validation: What is done with the current validation.
        first_step: Watches the first training step.
        missing: What other callbacks get in place of values.
        samples: The kept validation samples, by loader.
        training: The kept training samples, of which a reference is made; None if there are none, or no more needed.
        measured: What was measured of them, by loader; None where that failed.
    """

    def __init__(self, monitor: str, prefix: str, is_debugging: bool = False) -> None:
        self.phase = Phase.BEFORE_FIRST_STEP
        self.first_step = FirstStep()
        self.missing = MissingValues()
        self.free()
        self._monitor = monitor
        self._prefix = prefix
        self._is_debugging = is_debugging
        self._said: set[str] = set()

    @property
    def is_measured(self) -> bool:
        """Whether the current validation is measured, or will be after its last batch."""
        return self.validation is not Validation.SKIPPED

    def free(self) -> None:
        """Free the samples, and stop watching."""
        self.validation = Validation.SKIPPED
        self.samples: list[KeptSamples] = []
        self.training: KeptObservations | None = None
        self.measured: list[tuple[Tensor, ...] | None] = []
        self.first_step.stop()

    # What is said

    def warn(self, entry: str, message: str, kind: str = "") -> None:
        """Warn in the first process, once.

        Args:
            entry: The entry of the page on troubleshooting.
            message: What follows the name of the monitor, as whole sentences.
            kind: What tells this warning from others of the same entry.
        """
        is_needed = not self._is_debugging or entry not in _OF_FEW_SAMPLES
        if is_needed and self._is_new(entry + kind):
            rank_zero_warn(self._text(entry, message))

    @contextmanager
    def report_failure(self, what: str, consequence: str) -> Iterator[None]:
        """Turn an exception inside into an error before the first step, and into a warning after it.

        Args:
            what: What failed, such as "could not measure the samples".
            consequence: A sentence that says what happens to the values.
        """
        try:
            yield
        except Warning:  # the user, or a test, has made warnings errors
            raise
        except Exception as error:
            if self.phase is Phase.BEFORE_FIRST_STEP:
                raise self._as_error(what, error) from error
            entry = getattr(error, "entry", "failed")
            if self._is_new(what):  # in the process where it happens
                warnings.warn(self._text(entry, f"{what}: {describe_error(error)} {consequence}"), stacklevel=3)

    def _is_new(self, kind: str) -> bool:
        """Return whether something has not been said yet, and remember it."""
        is_new = kind not in self._said
        self._said.add(kind)
        return is_new

    def _text(self, entry: str, message: str) -> str:
        return f"`{self._monitor}` ({self._prefix}*) {message}{link_to(entry)}"

    def _as_error(self, what: str, error: Exception) -> Exception:
        """Say what failed, and what may help; Lightning's batch-size finder needs errors of memory as they are."""
        if is_oom_error(error):
            return error
        is_clear = isinstance(error, MisconfigurationException)
        advice = "" if is_clear else " If `forward` takes other arguments, set `inputs=`."
        reason = f"`{self._monitor}` {what}: {describe_error(error)}{advice}"
        return Refused(reason, getattr(error, "entry", "arguments"))


class MissingValues:
    """Stand-ins for values, so that callbacks that monitor a name always find it.

    After a first value they get the last one again. Before it they get the worst one, a little better in each
    further validation, so that waiting uses up no patience, and the last one is the best if no value comes. It passes
    no ``stopping_threshold``, but every ``divergence_threshold``.

    Attributes:
        num_incomplete: How many validations lacked a value, also in an earlier part of a fit.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], float] = {}  # values by name and loader
        self._given: dict[str, Tensor] = {}  # what stands in for a value in the last validation, by logged name
        self.num_incomplete = 0

    def begin(self) -> None:
        """Forget what the last validation lacked."""
        self._given = {}

    def remember(self, key: tuple[str, int], value: float) -> None:
        """Remember a value by its name and loader, but for nan and inf."""
        if math.isfinite(value):
            self._last[key] = value

    def add(self, logged_name: str, key: tuple[str, int], is_highest: bool) -> None:
        """Note that a value is missing, by its name and loader; it is best where it is highest or lowest."""
        value = self._last.get(key)
        if value is None:  # the worst one, a little better in each further validation
            value = (-_WORST if is_highest else _WORST) * _BETTER**self.num_incomplete
        self._given[logged_name] = torch.tensor(value, dtype=torch.float32)  # inf in 16 bits

    def publish(self, trainer: Trainer) -> None:
        """Give other callbacks what stands in for the values that are missing."""
        trainer.callback_metrics.update(self._given)
        self.num_incomplete += bool(self._given)

    def withdraw(self, trainer: Trainer) -> None:
        """Remove what stands in for values, so that nobody takes it for a value of the fit."""
        for name in self._given:
            trainer.callback_metrics.pop(name, None)


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
    objects = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, objects)
    return objects or []
