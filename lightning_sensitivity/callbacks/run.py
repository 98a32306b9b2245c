"""Where a run is, and what lives as long as it."""

from contextlib import AbstractContextManager
from enum import Enum, auto

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity.callbacks.first_step import FirstStep
from lightning_sensitivity.callbacks.missing import MissingValues
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.model.kept import KeptSamples


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
    """A run of a Trainer, as a monitor sees it; each has a new one.

    Args:
        monitor: Name of the monitor's class.
        prefix: Prefix of what it logs.

    Attributes:
        phase: Where it is, and so what a failure means.
        validation: What is done with the current validation.
        reporter: Says what is doubtful or has failed.
        first_step: Watches the first training step.
        missing: What other callbacks get in place of values.
        samples: The kept validation samples, by loader.
        measured: What was measured of them, by loader; None where that failed.
        logged: What was logged in the current validation, by name.
    """

    def __init__(self, monitor: str, prefix: str) -> None:
        self.phase = Phase.BEFORE_FIRST_STEP
        self.validation = Validation.SKIPPED
        self.reporter = Reporter(monitor, prefix)
        self.first_step = FirstStep()
        self.missing = MissingValues()
        self.samples: list[KeptSamples] = []
        self.measured: list[tuple[Tensor, ...] | None] = []
        self.logged: dict[str, float] = {}

    @property
    def is_measured(self) -> bool:
        """Whether the current validation is measured, or will be after its last batch."""
        return self.validation is not Validation.SKIPPED

    def report_failure(self, what: str, consequence: str) -> AbstractContextManager[None]:
        """Turn an exception inside into an error before the first step, and into a warning after it.

        Args:
            what: What failed, such as "could not measure the samples".
            consequence: A sentence that says what happens to the values.
        """
        if self.phase is Phase.BEFORE_FIRST_STEP:
            return self.reporter.refuse_failure(what)
        return self.reporter.report_failure(what, consequence)

    def free(self) -> None:
        """Free the samples, and stop watching."""
        self.validation = Validation.SKIPPED
        self.samples = []
        self.measured = []
        self.first_step.stop()
