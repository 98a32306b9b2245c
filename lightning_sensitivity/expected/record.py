"""What is known of a fit, in a form that all processes and checkpoints have: predictions, and a row per validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, get_origin, get_type_hints

import torch
from torch import Tensor

from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import QUANTILE
from lightning_sensitivity.functional.tasks import Task

EXPECTED = "expected_"  # begins the names of what a RiskMonitor logs
_OTHER = 0.5  # of a left-out score: equal data gives 0, a tenth of new labels .12, permuted ones 5.9

State = dict[str, Any]  # of numbers, words, tensors, and lists and dicts of these
Values = dict[str, Any]  # of a loader in a validation, and what is remembered with them


class Predictions(NamedTuple):
    """What two models predict for the same samples: probabilities ``(N, C)``, or the numbers of a regression.

    Attributes:
        network: Those of the network.
        reference: Those of the reference.
        are_alike: Whether both are predictions of labels, and not one of them, say, quantiles or logarithms of rates.
    """

    network: Tensor
    reference: Tensor
    are_alike: bool = True

    @property
    def mean(self) -> Tensor:
        """The mean of both, which is often better than either.

        Raises:
            ValueError: If outputs of the network are no predictions of labels.
        """
        if not self.are_alike:
            raise ValueError(
                "Expected outputs that predict targets, but those of the network are something else, such as quantiles "
                "or logarithms of rates: turn them into targets, then take the mean with `reference`."
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


@dataclass
class Predicted:
    """A reference, and what it predicts; a checkpoint holds it, so that a curve goes on with it.

    Attributes:
        verdict: What is known of it.
        unseen: What it predicts, by loader; empty if it may not choose.
        fingerprints: A number for each kept sample, by which it is known again, by loader; empty if there is
            none for some.
        settings: What the monitor was told of it.
    """

    verdict: Verdict
    unseen: dict[int, Unseen]
    fingerprints: dict[int, Tensor]
    settings: str

    def fingerprint(self, dataloader_idx: int) -> float:
        """Return a number by which the kept samples of a loader are known again, in any order; 0 if there is none."""
        return float(self.fingerprints[dataloader_idx].sum()) if dataloader_idx in self.fingerprints else 0.0

    def matched(self, fingerprints: Mapping[int, Tensor], num_columns: int, settings: str) -> "Predicted | None":
        """Return it for the same samples, which may have come in another order; None for others, or other settings.

        Args:
            fingerprints: Those of the samples that are kept now, by loader.
            num_columns: C.
            settings: What the monitor is told now.
        """
        has_all = self.unseen.keys() <= fingerprints.keys() == self.fingerprints.keys()
        if not has_all or self.settings != settings:
            return None
        unseen: dict[int, Unseen] = {}
        for index, each in self.unseen.items():
            old, new = self.fingerprints[index], fingerprints[index]
            before, after = old.argsort(stable=True), new.argsort(stable=True)
            if each.q.shape[1] != num_columns or not torch.equal(old[before], new[after]):
                return None
            new_indices = torch.empty_like(before)
            new_indices[before] = after
            unseen[index] = replace(each, indices=new_indices[each.indices])
        return Predicted(self.verdict, unseen, dict(fingerprints), settings)

    def differs(self, new: "Predicted", task: Task) -> bool:
        """Return whether another reference predicts something else of the same samples, by half of the score."""
        for index, each in self.unseen.items():
            q, of_new = (part.q[part.indices.argsort()] for part in (each, new.unseen.get(index, each)))
            if len(q) == len(of_new) and float(task.distances(q, of_new).nanmean()) > _OTHER * each.score:
                return True
        return False


# Validations

_KEYS = {"epoch", "step", "dataloader_idx", "reference", "num_labels", "curve"}  # of each row

Row = dict[str, Any]
History = list[Row]


def state_of(history: History, predicted: Predicted | None) -> State:
    """Return what a checkpoint holds, which ``torch.load`` reads with ``weights_only=True``.

    Args:
        history: A row for each validation and loader.
        predicted: What the reference predicts of the kept samples; not saved if samples can't be known again.
    """
    rows = [dict(row) for row in history]
    if predicted is None or not predicted.unseen or not predicted.fingerprints:
        return {"history": rows, "predicted": None}
    unseen = {index: {**vars(each), "draws": _shortened(each.draws)} for index, each in predicted.unseen.items()}
    state = {**vars(predicted), "verdict": asdict(predicted.verdict), "unseen": unseen}
    return {"history": rows, "predicted": state}


def _shortened(draws: Tensor) -> Tensor:
    """Return class indices in 16 bits, if they fit."""
    fits = draws.dtype == torch.int64 and torch.equal(draws.short().long(), draws)
    return draws.short() if fits else draws


def of_state(state: Any) -> tuple[History, Predicted | None]:
    """Return what a checkpoint holds.

    Raises:
        Exception: Of any kind, if that is something else.
    """
    history, saved = [dict(row) for row in state["history"]], state.get("predicted")
    for row in history:
        if not row.keys() >= _KEYS or not all(isinstance(value, int | float | None) for value in row.values()):
            raise ValueError("no history")
    if saved is None:
        return history, None
    unseen = {}
    for index, each in saved["unseen"].items():
        draws = each["draws"] if each["draws"].is_floating_point() else each["draws"].long()
        tensors = {"indices": each["indices"].long(), "q": each["q"].float(), "draws": draws}
        unseen[int(index)] = Unseen(**{**each, **tensors})
    fingerprints = {int(index): each.double() for index, each in saved["fingerprints"].items()}
    verdict = Verdict(**saved["verdict"])
    for name, kind in get_type_hints(Verdict).items():
        if not isinstance(getattr(verdict, name), get_origin(kind) or kind):
            raise TypeError(f"no {name}")
    return history, Predicted(verdict, unseen, fingerprints, str(saved["settings"]))


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
