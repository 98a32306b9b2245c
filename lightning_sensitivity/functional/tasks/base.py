"""What all tasks share."""

import math

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import (
    are_probabilities,
    in_32_bits,
    look_like_probabilities,
    may_be_probabilities,
)


class TaskBase:
    """What all tasks share: the layout of outputs, and that they are logits of classes.

    Attributes:
        takes_names: Whether labels that a user gives a reference may be names of classes.
        has_class_shares: Whether predictions can be made to hold for other shares of classes.
        draws_errors: Whether labels are drawn by errors of a reference, whose predictions are no chances.
        may_be_scaled: Whether a training step may learn labels on another scale.
        is_highest_best: Whether what :meth:`worth` returns is the better, the higher it is.
        estimator_type: What scikit-learn calls an estimator of this task.
        estimator_method: The method by which such an estimator predicts a matrix.
    """

    takes_names = False
    has_class_shares = True
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

    def doubt(self, labels: Tensor) -> str:
        """Say why the labels of a run are hardly those of this task, and what to do; nothing if they may be."""
        return ""

    def check_learnable(self, labels: Tensor) -> None:
        """Raise ValueError if there is nothing to learn of labels."""

    def is_odd(self, targets: Tensor, num_columns: int) -> Tensor:
        """Return which labels are none of this task, of any shape, such as another ``ignore_index``."""
        return torch.zeros_like(targets, dtype=torch.bool)

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a label that counts, ``(N,)``."""
        return self.known(targets).any(1)

    def known(self, targets: Tensor) -> Tensor:
        """Return which labels count, by column of their matrix; a column for all where they count together."""
        raise NotImplementedError

    # Whether outputs are probabilities, where they should be logits; each waits for the device

    def are_probabilities(self, outputs: Tensor) -> bool:
        """Check whether outputs can only be those of a softmax."""
        return are_probabilities(outputs)

    def look_like_probabilities(self, outputs: Tensor) -> bool:
        """Check whether outputs are those of a softmax, or of one trained sigmoid."""
        return look_like_probabilities(outputs)

    def may_be_probabilities(self, outputs: Tensor) -> bool:
        """Check whether outputs of a trained network lie in [0, 1], and differ."""
        return may_be_probabilities(outputs)

    def tempered(self, outputs: Tensor, temperatures: Tensor) -> Tensor:
        """Divide outputs ``(N, C)`` by each of T temperatures, ``(T, N, C)``."""
        return outputs / temperatures[:, None, None]
