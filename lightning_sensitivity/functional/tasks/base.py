"""What all tasks share."""

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
)

FLOOR = 1e-6  # of probabilities, whose logarithms are taken
NUM_DRAWS = 20  # of labels for each sample
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def quantiles(num_samples: int) -> Tensor:
    """Return evenly spaced quantiles, which begin at an offset of their own for each sample, ``(20, N)``."""
    offsets = torch.arange(1, num_samples + 1, dtype=torch.float64) * _GOLDEN_RATIO % 1
    return (torch.arange(NUM_DRAWS)[:, None] + offsets) / NUM_DRAWS


class TaskBase:
    """What all tasks share: the layout of outputs, and that they are logits of classes.

    Attributes:
        link: What makes predictions of outputs: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
        has_indices: Whether labels ``(N,)`` that a user gives a reference are classes, as integers or names.
        has_class_shares: Whether predictions can be made to hold for other shares of classes.
        has_class_dimension: Whether a dimension of outputs is that of classes or labels.
        is_by_column: Whether each column of a matrix is the answer to a question of its own.
        draws_errors: Whether labels are drawn by errors of a reference, whose predictions are no chances.
        may_be_scaled: Whether a training step may learn labels on another scale.
        is_highest_best: Whether what :meth:`worth` returns is the better, the higher it is.
        estimator_type: What scikit-learn calls an estimator of this task.
        estimator_method: The method by which such an estimator predicts a matrix.
    """

    link = "softmax"
    has_indices = False
    has_class_shares = True
    has_class_dimension = True
    is_by_column = False
    draws_errors = False
    may_be_scaled = False
    is_highest_best = True
    estimator_type = "classifier"
    estimator_method = "predict_proba"

    def num_columns(self, output_shape: tuple[int, ...]) -> int:
        """Count the columns C of matrices, for the shape of the outputs of a sample."""
        return math.prod(output_shape)

    def output_matrix(self, outputs: Tensor) -> Tensor:
        """Turn outputs of a network into a matrix ``(N, C)``, in 32 bits or more; a matrix stays."""
        return in_32_bits(outputs)[:, None].flatten(1)

    def sample_shape(self, label_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the outputs for a sample, for that of its label where both are alike."""
        return label_shape

    def has_any_outputs(self, loss: object) -> bool:
        """Return whether outputs may have any shape, since nothing but the loss of a user reads them."""
        return False

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
        raise NotImplementedError

    def comparable(self, predicted: Any, labels: Any) -> tuple[Any, Any]:
        """Return predicted and true labels, arrays, as scikit-learn compares them."""
        return predicted, labels

    # Questions that have one class as their answer

    def questions(self, p: Tensor) -> list[Tensor]:
        """Return predictions or labels ``(N, C)`` of each question, ``(N, K)``."""
        raise NotImplementedError

    def of_questions(self, found: Sequence[Tensor]) -> Tensor:
        """Return the matrix of what there is for each question, ``(N, C)``."""
        raise NotImplementedError

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
