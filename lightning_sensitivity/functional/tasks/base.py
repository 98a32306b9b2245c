"""What all tasks share, those in which one class is correct, and whether labels fit outputs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tasks.metrics import AUROC, Accuracy, AnyMetric
from lightning_sensitivity.functional.tensors import in_32_bits, num_outputs, spaced_fraction, without_ones

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
_SEVERAL = "If several classes are right for one sample, set `task='multilabel'`"
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
        most_of_auroc: Up to how many columns there is an AUROC by default, which takes long.
    """

    is_regression = False
    link = "softmax"
    has_one_output = False
    has_indices = False
    has_class_shares = True
    is_by_column = False
    estimator_method = "predict_proba"
    most_of_auroc = 100

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

    def doubt(self, labels: Tensor) -> str:
        """Say why labels hardly belong to this task, and what to do; nothing if they may."""
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

    # Questions that have one class as their answer

    def questions(self, p: Tensor) -> list[Tensor]:
        """Return predictions or labels ``(N, C)`` of each question, ``(N, K)``: there is one."""
        return [p]

    def of_questions(self, of_each: Sequence[Tensor]) -> Tensor:
        """Return the matrix of what there is for each question, ``(N, C)``."""
        return of_each[0]

    def classifications(self, p: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return which samples have a label, and their predictions and labels, for each question."""
        answered = []
        for q, answers in zip(self.questions(p), self.questions(y), strict=True):
            indices = (~answers.isnan().any(1)).nonzero()[:, 0]
            answered.append((indices, q[indices], answers[indices]))
        return answered

    # Metrics

    def default_metrics(self, num_columns: int) -> dict[str, AnyMetric]:
        """Make the metrics that are expected by default, by name, for C columns."""
        accuracy: dict[str, AnyMetric] = {"accuracy": Accuracy()}
        return accuracy | {"auroc": AUROC()} if num_columns <= self.most_of_auroc else accuracy

    def metric_inputs(self, metric: Metric, p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and labels that were drawn as a metric takes them: probabilities and classes."""
        return p, drawn


class Multiclass(TaskBase):
    """One of C classes is correct: softmax, and the sum over classes of squared differences."""

    name = "multiclass"
    has_indices = True
    scale = 1.0  # of the sum of squared differences

    def predictions(self, outputs: Tensor) -> Tensor:
        """Turn outputs of a network, or their matrix, into probabilities ``(N, C)``."""
        return self.output_matrix(outputs).softmax(1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError, saying what was expected, if outputs and labels do not fit the task."""
        if num_outputs(outputs) == 1:
            advice = "Set `task='binary'` if they are from 0 to 1, `task='regression'` if they are measurements"
            raise ValueError(f"Labels are {targets.dtype} for one output. {advice}")
        if targets.is_floating_point():
            _check_soft_labels(outputs, without_ones(targets))
        else:
            _check_indices(outputs, without_single_output(without_ones(targets)))

    def known(self, targets: Tensor) -> Tensor:
        """Return which samples have a label that counts, ``(N, 1)``."""
        is_unknown = are_ignored(targets) | targets.isnan()
        return ~is_unknown[:, None].flatten(1).any(1, keepdim=True)

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn labels into probabilities ``(N, C)``; one that does not count gives nan, and a matrix stays.

        Args:
            labels: Class indices ``(N,)`` or ``(N, 1)``, or probabilities ``(N, C)``.
            num_columns: C, which class indices do not say.
        """
        counts, labels = self.known(labels)[:, 0], without_ones(labels)
        if labels.is_floating_point():
            return labels.where(counts[:, None], torch.nan)
        indices = without_single_output(labels).long().where(counts, 0)
        return torch.nn.functional.one_hot(indices, num_columns).float().where(counts[:, None], torch.nan)

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Compute the Brier score: squared differences from labels, or from other predictions."""
        return self.scale * (p - other).square().sum(-1)

    def losses(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the cross-entropy of each sample, ``(N, 1)``, exact in the probabilities of its labels.

        A class whose logit is -inf is masked: a label of it costs inf; a mere chance of one costs nothing.

        Args:
            outputs: Outputs of a network.
            y: Labels as a matrix, or predictions in their place, ``(N, C)``.
            draws: The same as one or more labels for each sample, which are not needed.
        """
        return (y * self._costs(outputs, y)).sum(1, keepdim=True)

    def losses_of_draws(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the same for each of several labels, ``(R, N, 1)``."""
        return self._costs(outputs, y).gather(1, draws.T).T[..., None]

    def _costs(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return what a label of each class costs, ``(N, C)``."""
        costs = -self.output_matrix(outputs).log_softmax(1)
        return costs.where(~costs.isposinf() | (y == 1), 0.0)

    def as_labels(self, drawn: Tensor, like: Tensor) -> Tensor:
        """Turn class indices ``(N,)`` into the form of other labels: indices, or a column for each class."""
        num_columns = like.shape[1:].numel()
        one_hot = torch.nn.functional.one_hot(drawn, num_columns) if num_columns > 1 else drawn
        return super().as_labels(one_hot, like)

    # Labels as they are drawn

    def hard_labels(self, p: Tensor) -> Tensor:
        """Return the class that predictions or labels ``(N, C)`` choose, ``(N,)``."""
        return p.argmax(-1)

    def draw(self, p: Tensor, errors: Tensor | None) -> Tensor:
        """Draw classes by their probabilities ``(N, C)``, ``(20, N)``; there are no errors."""
        p = p.double().cpu()
        ends = p.cumsum(1)
        labels = torch.searchsorted(ends / ends[:, -1:], quantiles(len(p)).T.contiguous(), right=True)
        return labels.clamp(max=p.shape[1] - 1).T

    def answers(self, p: Tensor, classes: Any) -> Any:
        """Return what a user wants to know of predictions ``(N, C)``: their classes, an array ``(N,)``."""
        return classes[self.hard_labels(p).numpy()]

    def can_measure(self, draws: Tensor) -> bool:
        """Return whether labels ``(R, N)`` are of more than one class, so that metrics say something."""
        return bool((draws != draws[0, 0]).any())


class Binary(Multiclass):
    """One output z is the logit of class 1: two logits, 0 and z; its score is (p - y)^2, half of the sum."""

    name = "binary"
    link = "sigmoid"
    has_one_output = True
    has_indices = False
    scale = 0.5

    def num_columns(self, output_shape: tuple[int, ...]) -> int:
        """Return 2."""
        return 2

    def output_matrix(self, outputs: Tensor) -> Tensor:
        """Turn outputs ``(N,)`` or ``(N, 1)`` into two logits; a matrix ``(N, 2)`` stays."""
        z = super().output_matrix(outputs)
        return torch.cat([torch.zeros_like(z), z], 1) if z.shape[1] == 1 else z

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and labels do not fit the task."""
        if num_outputs(outputs) != 1:
            advice = _SEVERAL if targets.shape == outputs.shape else "With an output for each class, leave `task` out"
            got = describe_both(outputs, targets)
            raise ValueError(f"Expected one output, (N,) or (N, 1), but got {got}. {advice}")
        if targets.is_floating_point() and targets.shape == (len(outputs), 2):
            _check_soft_labels(self.output_matrix(outputs), targets)
        else:
            check_probabilities(outputs, targets)

    def label_matrix(self, labels: Tensor, num_columns: int = 2) -> Tensor:
        """Turn labels ``(N,)`` or ``(N, 1)`` into probabilities ``(N, 2)``; a matrix stays."""
        y = labels if labels.is_floating_point() else labels.float()
        y = y[:, None].flatten(1)
        if y.shape[1] == 1:
            y = torch.cat([1 - y, y], 1).where(y != IGNORED, torch.nan)
        return super().label_matrix(y)

    def metric_inputs(self, metric: Metric, p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of class 1, ``(N,)``, and classes."""
        return p[:, 1], drawn


# Checks of labels


def are_ignored(targets: Tensor) -> Tensor:
    """Return which labels are -100, of any shape."""
    # As an 8-bit integer, 156 would equal -100.
    return (targets if targets.is_floating_point() else targets.long()) == IGNORED


def check_probabilities(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless there is a label from 0 to 1 for each output, or -100."""
    check_sizes(outputs, targets, "label")
    is_valid = (targets >= 0) & (targets <= 1)
    is_valid |= are_ignored(targets)
    if not bool(is_valid.all()):
        got = f"{float(targets.min()):g} to {float(targets.max()):g}"
        raise ValueError(f"Expected labels from 0 to 1, or {IGNORED} to be ignored, but got {got}")


def check_sizes(outputs: Tensor, targets: Tensor, what: str) -> None:
    """Raise ValueError unless there is a label, or what they are called, for each output."""
    if without_single_output(outputs).shape != without_single_output(without_ones(targets)).shape:
        raise ValueError(f"Expected one {what} per output, but got {describe_both(outputs, targets)}")


def _check_indices(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless labels are indices of the classes, or -100."""
    if targets.shape == outputs.shape:
        raise ValueError(f"Labels are {targets.dtype} for each output: make one-hot labels floating. {_SEVERAL}")
    if targets.shape != outputs.shape[:1] or targets.dtype == torch.bool:
        raise ValueError(f"Expected class indices (N,) for outputs (N, K), but got {describe_both(outputs, targets)}")
    targets, num_classes = targets.long(), num_outputs(outputs)  # comparisons in 8 bits wrap around
    is_valid = ((targets >= 0) & (targets < num_classes)) | (targets == IGNORED)
    if not bool(is_valid.all()):
        got = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, or {IGNORED} to be ignored, but got {got}")


def _check_soft_labels(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless labels are probabilities of classes that sum to 1, or -100."""
    check_probabilities(outputs, targets)
    sums_to_one = (targets.float().sum(1) - 1).abs() < 1e-2  # of 16 bits
    if not bool((sums_to_one | are_ignored(targets).any(1)).all()):
        raise ValueError(f"Expected soft labels that sum to 1, but got other sums. {_SEVERAL}")


def describe_both(outputs: Tensor, targets: Tensor) -> str:
    """Describe outputs and labels for an error message."""
    labels = f"labels of type {targets.dtype} and shape {tuple(targets.shape)}"
    return f"outputs of shape {tuple(outputs.shape)} and {labels}"


def without_single_output(tensor: Tensor) -> Tensor:
    """Turn ``(N, 1)`` into ``(N,)``; all else stays."""
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor
