"""What all tasks share, and whether labels fit outputs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tensors import (
    are_probabilities,
    in_32_bits,
    may_be_probabilities,
    num_outputs,
    spaced_fraction,
    without_ones,
)

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
BY_CLASS = "Leave `task` out if labels are class indices"
FLOOR = 1e-6  # of probabilities, whose logarithms are taken
NUM_DRAWS = 20  # of labels for each sample


def quantiles(num_samples: int) -> Tensor:
    """Return evenly spaced quantiles, which begin at an offset of their own for each sample, ``(20, N)``."""
    offsets = spaced_fraction(torch.arange(1, num_samples + 1, dtype=torch.float64))
    return (torch.arange(NUM_DRAWS)[:, None] + offsets) / NUM_DRAWS


class TaskBase:
    """What all tasks share: the layout of outputs, and that they are logits of classes.

    Attributes:
        is_regression: Whether labels are numbers, which are drawn by errors, and not classes.
        link: What makes predictions of outputs: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        has_one_output: Whether outputs have the shape of a number for each sample, also where labels have two columns.
        has_indices: Whether labels ``(N,)`` that a user gives a reference are classes, as integers or names.
        has_class_shares: Whether predictions can be made to hold for other shares of classes.
        is_by_column: Whether each column of a matrix is the answer to a question of its own.
        estimator_method: The method by which an estimator of scikit-learn predicts a matrix.
    """

    is_regression = False
    link = "softmax"
    has_one_output = False
    has_indices = False
    has_class_shares = True
    is_by_column = False
    estimator_method = "predict_proba"

    def num_columns(self, output_shape: tuple[int, ...]) -> int:
        """Count the columns C of matrices, for the shape of the outputs of a sample."""
        return math.prod(output_shape)

    def output_matrix(self, outputs: Tensor) -> Tensor:
        """Turn outputs of a network into a matrix ``(N, C)``, in 32 bits or more; a matrix stays."""
        return in_32_bits(outputs)[:, None].flatten(1)

    def has_any_outputs(self, loss: object) -> bool:
        """Return whether outputs may be, say, quantiles, since nothing but the loss of a user reads them."""
        return self.is_regression and loss is not None

    def as_labels(self, drawn: Tensor, like: Tensor) -> Tensor:
        """Turn labels that were drawn, ``(N, ...)``, into the form, type and device of other labels."""
        return drawn.reshape(len(drawn), *like.shape[1:]).to(like)

    def advice_on_dense(self, shape: Sequence[int]) -> str:
        """Say what to do about outputs of a shape of more than two dimensions."""
        return "nothing can be expected of pixels and tokens. Remove `RiskMonitor`; `SensitivityMonitor` works"

    def doubt(self, labels: Tensor) -> str:
        """Say why the labels of a run are hardly those of this task, and what to do; nothing if they may be."""
        return ""

    def check_learnable(self, labels: Tensor) -> None:
        """Raise ValueError if there is nothing to learn of labels."""

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a label that counts, ``(N,)``."""
        return self.known(targets).any(1)

    def known(self, targets: Tensor) -> Tensor:
        """Return which labels count, by column of their matrix; a column for all where they count together."""
        return ~(are_ignored(targets) | targets.isnan())[:, None].flatten(1)

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by the mean of squared differences from known labels, or other predictions; nan without."""
        return (p - other).square().nanmean(-1)

    def comparable(self, predicted: Any, labels: Any) -> tuple[Any, Any]:
        """Return predicted and true labels, arrays, as scikit-learn compares them."""
        return predicted, labels

    # Questions that have one class as their answer

    def questions(self, p: Tensor) -> list[Tensor]:
        """Return predictions or labels ``(N, C)`` of each question, ``(N, K)``: there is one."""
        return [p]

    def of_questions(self, found: Sequence[Tensor]) -> Tensor:
        """Return the matrix of what there is for each question, ``(N, C)``."""
        return found[0]

    def classifications(self, p: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return which samples have a label, and their predictions and labels, for each question."""
        found = []
        for q, answers in zip(self.questions(p), self.questions(y), strict=True):
            indices = (~answers.isnan().any(1)).nonzero()[:, 0]
            found.append((indices, q[indices], answers[indices]))
        return found

    # Metrics

    def metric_inputs(self, metric: Metric, p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and labels that were drawn as a metric takes them: probabilities and classes."""
        return p, drawn

    def look_like_probabilities(self, outputs: Tensor) -> bool:
        """Check whether outputs are those of a softmax, or of trained sigmoids, and no logits; waits for the device."""
        if self.link == "identity":
            return False
        is_by_sigmoid = self.link == "sigmoid" or num_outputs(outputs) == 1
        return (is_by_sigmoid and may_be_probabilities(outputs)) or are_probabilities(outputs)

    def tempered(self, outputs: Tensor, temperatures: Tensor) -> Tensor:
        """Divide outputs ``(N, C)`` by each of T temperatures, ``(T, N, C)``."""
        return outputs / temperatures[:, None, None]


# Checks of labels


def are_ignored(targets: Tensor) -> Tensor:
    """Return which labels are -100, of any shape."""
    # As an 8-bit integer, 156 would equal -100.
    return (targets if targets.is_floating_point() else targets.long()) == IGNORED


def check_probabilities(outputs: Tensor, targets: Tensor, advice: str) -> None:
    """Raise ValueError unless there is a label from 0 to 1 for each output, or -100."""
    check_sizes(outputs, targets, "label", advice)
    is_valid = (targets >= 0) & (targets <= 1)
    is_valid |= are_ignored(targets)
    if not bool(is_valid.all()):
        lowest, highest = float(targets.min()), float(targets.max())
        has_two = lowest == -1 and bool((targets != 0).all())
        to_zero = ". Map -1 to 0: `targets=lambda batch: (batch[1] + 1) / 2`"
        mapping = to_zero if has_two else how_to_ignore(targets, ~is_valid)
        expected = f"Expected labels from 0 to 1, or {IGNORED} to be ignored"
        raise ValueError(f"{expected}, but got {lowest:g} to {highest:g}{mapping}")


def check_sizes(outputs: Tensor, targets: Tensor, what: str, advice: str = "") -> None:
    """Raise ValueError unless there is a label, or what they are called, for each output."""
    if without_single_output(outputs).shape != without_single_output(without_ones(targets)).shape:
        advice = f". {advice}" if advice else ""
        raise ValueError(f"Expected one {what} per output, but got {describe_both(outputs, targets)}{advice}")


def how_to_ignore(targets: Tensor, is_odd: Tensor) -> str:
    """Say what to write to ignore the labels that do not fit, if they all have one value."""
    values = torch.unique(targets[is_odd]).tolist()
    if len(values) != 1:
        return ""
    labels = "batch[1]" if targets.is_floating_point() else "batch[1].long()"
    how = f"`targets=lambda batch: {labels}.where(batch[1] != {values[0]:g}, {IGNORED})`"
    return f". If {values[0]:g} means that there is none, set {how}"


def describe_both(outputs: Tensor, targets: Tensor) -> str:
    """Describe outputs and labels for an error message."""
    labels = f"labels of type {targets.dtype} and shape {tuple(targets.shape)}"
    return f"outputs of shape {tuple(outputs.shape)} and {labels}"


def without_single_output(tensor: Tensor) -> Tensor:
    """Turn ``(N, 1)`` into ``(N,)``; all else stays."""
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor
