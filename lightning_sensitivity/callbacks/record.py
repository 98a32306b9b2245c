"""What a RiskMonitor has to remember of a fit: all of it is saved in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity.functional.reference import Reference

_TOLERANCE = 1e-6  # of fingerprints, relative


def _no_fingerprints() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Verdict:
    """What is known of the reference, in all processes.

    Attributes:
        is_trusted: Whether it may choose.
        learner: Its learner, such as ``"forest"``; empty without a reference.
        features: What it sees, such as ``"columns"``.
        num_samples: How many training samples it knows.
        score: Its left-out score.
        skill: How far its left-out score is below chance, from 1, if perfect, to 0, if useless.
        accuracy: The share of labels that it predicts, each without having seen it; nan for a regression.
        auroc: The area under the ROC curve of these predictions; nan for a regression.
        majority: The share of the most frequent class; nan for a regression.
        unexplained: The share of training labels that can't be explained; nan if it is unknown.
        residuals: Quantiles of its left-out errors in a regression, ``(20, K)``.
    """

    is_trusted: bool = False
    learner: str = ""
    features: str = ""
    num_samples: int = 0
    score: float = math.nan
    skill: float = math.nan
    accuracy: float = math.nan
    auroc: float = math.nan
    majority: float = math.nan
    unexplained: float = math.nan
    residuals: Tensor = field(default_factory=lambda: torch.zeros(1, 1))

    @classmethod
    def of(cls, reference: Reference) -> Verdict:
        """Take what all processes have to know."""
        return cls(**{name: getattr(reference, name) for name in cls.__dataclass_fields__})


@dataclass
class Predictions:
    """What the reference predicts for the kept samples of a loader, in all processes.

    Attributes:
        fingerprints: A number for each sample, by which it is known again, sorted, ``(N,)``.
        q: The predictions, ``(N, K)``, in the same order.
    """

    fingerprints: Tensor = field(default_factory=_no_fingerprints)
    q: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


@dataclass
class RiskRecord:
    """What a resumed fit continues.

    Attributes:
        verdict: What is known of the reference; None without one.
        training: A number for each training sample and label that the reference knows, sorted, ``(N,)``.
        predictions: What it predicts, by loader.
        num_references: How many references there were, each with more samples, or others.
        is_final: Whether the last one knows all that it will know.
        history: What validations have shown, one dict for each and each loader.
        num_validations: How many validations there were.
        num_gaps: How many of them have no value.
        ends_in_gap: Whether the last one has none.
        saved_steps: Steps at which a checkpoint was saved after a validation.
    """

    verdict: Verdict | None = None
    training: Tensor = field(default_factory=_no_fingerprints)
    predictions: dict[int, Predictions] = field(default_factory=dict)
    num_references: int = 0
    is_final: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    num_validations: int = 0
    num_gaps: int = 0
    ends_in_gap: bool = False
    saved_steps: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RiskRecord:
        """Read what :meth:`to_dict` has written.

        Raises:
            Exception: If something else is there.
        """
        record = cls(**state)
        record.verdict = None if state["verdict"] is None else Verdict(**state["verdict"])
        record.predictions = {index: Predictions(**saved) for index, saved in state["predictions"].items()}
        return record


def fingerprints_of(features: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return a number for each sample, which others hardly have, ``(N,)``; padding of token ids adds nothing.

    Args:
        features: What a reference sees of the samples, ``(N, ...)``.
        labels: Their labels, which count, too, ``(N, K)``.
    """
    shift = 0 if features.is_floating_point() else 1  # of the padding, -1
    weights = _weights(features.shape[1:].numel())
    parts = [(part.flatten(1).double() + shift) @ weights for part in torch.split(features, 500)]
    found = torch.cat([_no_fingerprints(), *parts])
    return found if labels is None else found + labels.double() @ _weights(labels.shape[1]).exp()


def _weights(size: int) -> Tensor:
    # Random ones: with multiples of a number, rows of whole numbers, such as one-hot ones, would often have equal sums.
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def are_known(fingerprints: Tensor, known: Tensor, tolerance: float = _TOLERANCE) -> Tensor:
    """Return which fingerprints are among known ones, which are sorted, ``(N,)``, up to a relative tolerance."""
    if not len(known):
        return torch.zeros(len(fingerprints), dtype=torch.bool)
    places = torch.searchsorted((known[1:] + known[:-1]) / 2, fingerprints)
    return (known[places] - fingerprints).abs() <= tolerance * (1 + fingerprints.abs())
