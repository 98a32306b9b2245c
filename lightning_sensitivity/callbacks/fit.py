"""Where a fit is, for a monitor that estimates the risk, and what it keeps for the time of the fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from lightning_sensitivity.callbacks.samples import TrainingSamples


class Phase(Enum):
    """Where a fit is, for a ``RiskMonitor``."""

    OUTSIDE = auto()  # no fit is running
    STARTING = auto()  # before its first training batch: in the sanity check, or in a resumed validation
    ESTIMATING = auto()  # training samples are kept
    REFUSED = auto()  # there can be no estimate


@dataclass
class FitState:
    """What a ``RiskMonitor`` keeps for the time of one fit.

    Attributes:
        phase: Where the fit is.
        samples: The kept training samples, while the phase is ``ESTIMATING``.
        must_estimate: Whether it is an error if there can be no estimate.
        targets_write: Whether the user's ``targets`` writes to the batch that it gets.
        history: The epochs with an estimate, and the estimate.
    """

    phase: Phase = Phase.OUTSIDE
    samples: TrainingSamples | None = None
    must_estimate: bool = False
    targets_write: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)
