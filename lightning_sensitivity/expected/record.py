"""What is known of a fit, in a form that all processes have: predictions, and a row for each validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import QUANTILE

EXPECTED = "expected_"  # begins the names of what a RiskMonitor logs

Values = dict[str, Any]  # of a loader in a validation, and what is remembered with them


class Predictions(NamedTuple):
    """What two models predict for the same samples: probabilities ``(N, C)``, or the numbers of a regression.

    Attributes:
        network: Those of the network.
        reference: Those of the reference.
        are_alike: Whether both predict labels, for certain: not in a regression with a loss of yours.
    """

    network: Tensor
    reference: Tensor
    are_alike: bool = True

    @property
    def mean(self) -> Tensor:
        """The mean of both, which is often better than either.

        Raises:
            ValueError: In a regression with a loss of yours, whose outputs may be quantiles.
        """
        if not self.are_alike:
            raise ValueError(
                "With a `loss=`, outputs may be something else than targets, such as quantiles or logarithms of rates: "
                "turn them into targets, and take the mean with `reference`."
            )
        return (self.network + self.reference) / 2


@dataclass
class Verdict:
    """What is known of a reference, as a summary has it.

    Attributes:
        learner: Its learner, such as ``"forest"``.
        features: What it sees, such as ``"columns"``; ``"features"`` if the user says what.
        num_training: How many training samples it knows.
        skill: How far its left-out score is below chance, from 1, if perfect, to 0, if useless.
        majority: The share of the most frequent class; nan for a regression.
        unexplained: The share of training labels that can't be explained; nan if it is unknown.
        is_trusted: Whether it may choose.
        is_whole_table: Whether it sees all that the network sees, as columns.
        inputs_tell_nothing: Whether the mean label is what to expect, since a table tells no more.
        blind_labels: Which of several labels it can't predict.
    """

    learner: str
    features: str
    num_training: int
    skill: float
    majority: float
    unexplained: float
    is_trusted: bool
    is_whole_table: bool = True
    inputs_tell_nothing: bool = False
    blind_labels: list[int] = field(default_factory=list)


@dataclass
class Unseen:
    """What the reference predicts for the kept samples of a loader, of all processes.

    Attributes:
        indices: Which samples it can read, in an order that does not depend on the number of processes,
            ``(N,)``.
        q: Its predictions for them, ``(N, C)``; nan of labels that it can't predict.
        draws: Labels that were drawn from these, ``(R, N)``; in a regression ``(R, N, C)``.
        score: The reference's left-out score.
        num_calibrating: By how many left-out labels it was calibrated; those of one group count as one.
        sees: What it sees: a whole ``"table"``, ``"features"``, or a ``"part"``.
    """

    indices: Tensor
    q: Tensor
    draws: Tensor
    score: float
    num_calibrating: int
    sees: str


# Validations

KEYS = {"epoch", "step", "dataloader_idx", "reference_score", "num_labels"}  # of each row

Row = dict[str, Any]
History = list[Row]


def plot_history(history: Sequence[Row], names: Sequence[str], prefix: str) -> PlotType:
    """Plot values by epoch, each name in axes of its own, each loader as a line, with its 90 % interval.

    Raises:
        ValueError: If there is no value.
    """
    from matplotlib import pyplot

    if not any(name in row for row in history for name in names):
        raise ValueError("Expected a fit with values before `plot`, but there is none.")
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for index in sorted({row["dataloader_idx"] for row in history}):
            rows = [row for row in history if row["dataloader_idx"] == index]
            epochs = [row["epoch"] for row in rows]
            keys = name, f"{name}_stderr"  # which a validation may lack
            values, stderrs = (torch.tensor([row.get(key, math.nan) for row in rows]) for key in keys)
            ax.plot(epochs, values, label=f"dataloader {index}")
            ax.fill_between(epochs, values - QUANTILE * stderrs, values + QUANTILE * stderrs, alpha=0.2)
        ax.set(title=prefix + name, xlabel="epoch")
    return figure, axes[0]
