"""What a RiskMonitor has to remember of a fit: all of it is saved in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity.arguments import Refused
from lightning_sensitivity.functional.criterion import Calibration
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.tasks import Task

_TOLERANCE = 1e-6  # of fingerprints, relative


@dataclass
class Verdict:
    """Hold what is decided, once, when all processes have their training samples.

    Attributes:
        has_reference: Whether there is a reference.
        is_trusted: Whether it chooses; else the training score does.
        looks_clean: Whether it does not choose since labels look clean.
        num_samples: How many training samples it knows.
        accuracy: The share of labels that it predicts, each without having seen it; nan for a regression.
        skill: How far its leave-one-out score is below chance, from 1, if perfect, to 0, if useless.
        unexplained: The share of training labels that can't be explained; nan if it is unknown.
        shares: The mean label of these samples.
    """

    has_reference: bool = False
    is_trusted: bool = False
    looks_clean: bool = False
    num_samples: int = 0
    accuracy: float = math.nan
    skill: float = math.nan
    unexplained: float = math.nan
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, reference: Reference, task: Task) -> Verdict:
        """Decide whether a reference chooses."""
        is_right = task.classes(reference.leave_one_out) == task.classes(reference.labels)
        return cls(
            has_reference=True,
            is_trusted=reference.is_trusted and not reference.looks_clean,
            looks_clean=reference.is_trusted and reference.looks_clean,
            num_samples=reference.num_samples,
            accuracy=float(is_right.double().mean()) if task.has_classes else math.nan,
            skill=reference.skill,
            unexplained=reference.unexplained,
            shares=tuple(reference.shares.tolist()),
        )


@dataclass
class ValidationResult:
    """Hold what a validation has shown, over all processes.

    Attributes:
        epoch: The epoch.
        risk_criterion: The criterion.
        risk_ranking: The ranking; nan for a regression.
        temperature: By which logits are to be divided, to be calibrated.
        num_labels: The number of validation labels.
        training_accuracy: The share of training labels that the network predicts; 0 for a regression.
    """

    epoch: int
    risk_criterion: float
    risk_ranking: float
    temperature: float
    num_labels: int
    training_accuracy: float


@dataclass
class LoaderRecord:
    """Hold what belongs to a validation loader.

    Attributes:
        fingerprints: A number for each kept sample of all processes, sorted, by which it is known again, ``(N,)``.
        predictions: What the reference predicts for it, ``(N, K)``.
        calibration: How much more the network knows than the reference, by the epochs so far.
        history: What each validation has shown.
    """

    fingerprints: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    predictions: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    calibration: Calibration = field(default_factory=Calibration)
    history: list[ValidationResult] = field(default_factory=list)

    def remember(self, fingerprints: Tensor, predictions: Tensor) -> None:
        """Take the predictions for samples of all processes."""
        self.fingerprints, order = fingerprints.cpu().sort()
        self.predictions = predictions.cpu().float()[order]

    def find(self, fingerprints: Tensor) -> Tensor | None:
        """Return the predictions for samples; None if one of them is not known."""
        if not len(self.fingerprints):
            return None
        middle = (self.fingerprints[1:] + self.fingerprints[:-1]) / 2
        places = torch.searchsorted(middle, fingerprints)
        distances = (self.fingerprints[places] - fingerprints).abs()
        is_known = distances <= _TOLERANCE * (1 + fingerprints.abs())
        return self.predictions[places] if bool(is_known.all()) else None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LoaderRecord:
        """Read what ``asdict`` has written."""
        history = [ValidationResult(**result) for result in saved["history"]]
        return cls(saved["fingerprints"], saved["predictions"], Calibration(**saved["calibration"]), history)


@dataclass
class RiskRecord:
    """Hold what a resumed fit continues.

    Attributes:
        verdict: What was decided on the reference; None before that.
        loaders: What belongs to each validation loader.
    """

    verdict: Verdict | None = None
    loaders: dict[int, LoaderRecord] = field(default_factory=dict)

    def loader(self, dataloader_idx: int) -> LoaderRecord:
        """Return the record of a loader, a new one at first."""
        return self.loaders.setdefault(dataloader_idx, LoaderRecord())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RiskRecord:
        """Read what :meth:`to_dict` has written.

        Raises:
            MisconfigurationException: If something else is there.
        """
        try:
            verdict = None if state["verdict"] is None else Verdict(**state["verdict"])
            return cls(verdict, {index: LoaderRecord.from_dict(saved) for index, saved in state["loaders"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refused(
                "`RiskMonitor` cannot read its state in the checkpoint, which another version may have saved: "
                f"{type(error).__name__}: {error}. Remove it from `checkpoint['callbacks']`.",
                entry="checkpoint",
            ) from error
