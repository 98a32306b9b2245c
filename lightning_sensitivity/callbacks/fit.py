"""The phase of a fit for ``RiskMonitor``, and what the monitor keeps for the duration of the fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from lightning_sensitivity.callbacks.samples import TrainingSamples


class Phase(Enum):
    """The phase of a fit, for a ``RiskMonitor``."""

    OUTSIDE = auto()  # no fit is running
    STARTING = auto()  # before the first training batch: in the sanity check, or in a resumed validation
    ESTIMATING = auto()  # training samples are kept
    REFUSED = auto()  # there can be no estimate


@dataclass
class FitState:
    """Hold what a ``RiskMonitor`` keeps for the duration of one fit.

    Attributes:
        phase: The phase of the fit.
        samples: The kept training samples, while the phase is ``ESTIMATING``.
        must_estimate: Whether to raise an error if no estimate is possible.
        targets_write: Whether the user's ``targets`` function writes to the batch that it gets.
        history: Pairs of an epoch and its estimate.
    """

    phase: Phase = Phase.OUTSIDE
    samples: TrainingSamples | None = None
    must_estimate: bool = False
    targets_write: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)
