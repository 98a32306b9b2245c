"""The tasks: how outputs and labels fit together in each, and how predictions are scored.

Outputs of a network are ``(N, K)`` or ``(N,)``. All else is matrices ``(N, C)``: a column for each class,
also where one output tells two classes apart, or for each number of a regression.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import in_32_bits, num_outputs

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
_FLOOR = 1e-6  # of probabilities, whose logarithms are taken
_BY_CLASS = "Leave `task` out if labels are class indices"
_MULTILABEL = "Several classes for one sample (multilabel) are not supported"


class _Matrices:
    """What all tasks share: the layout of outputs."""

    has_one_output = False

    def num_columns(self, output_shape: tuple[int, ...]) -> int:
        """Count the columns C of matrices, for the shape of the outputs of a sample."""
        return math.prod(output_shape)

    def output_matrix(self, outputs: Tensor) -> Tensor:
        """Turn outputs of a network into a matrix ``(N, C)``, in 32 bits or more; a matrix stays."""
        return in_32_bits(outputs)[:, None].flatten(1)

    def as_labels(self, drawn: Tensor, like: Tensor) -> Tensor:
        """Turn labels that were drawn, ``(N, ...)``, into the form, type and device of other labels."""
        return drawn.reshape(len(drawn), *like.shape[1:]).to(like)


class Multiclass(_Matrices):
    """One of C classes is correct: softmax, and the sum over classes of squared differences."""

    name = "multiclass"
    has_classes = True
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
            _check_soft_labels(outputs, targets)
        else:
            _check_indices(outputs, targets)

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a label that counts, ``(N,)``."""
        return ~_is_ignored(targets)[:, None].flatten(1).any(1)

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn labels into probabilities ``(N, C)``; an ignored label gives zeros, and a matrix stays.

        Args:
            labels: Class indices ``(N,)``, or probabilities ``(N, C)``.
            num_columns: C, which class indices do not say.
        """
        counts = self.has_label(labels)
        if labels.is_floating_point():
            return labels.where(counts[:, None], 0.0)
        indices = labels.long().where(counts, 0)
        return torch.nn.functional.one_hot(indices, num_columns).float() * counts[:, None]

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Compute the Brier score: squared differences from labels, or from other predictions."""
        return self.scale * (p - other).square().sum(-1)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the cross-entropy of each sample, exact in the probabilities ``(N, C)`` of its labels.

        A class whose logit is -inf is masked: no label is one.
        """
        logarithms = self.output_matrix(outputs).log_softmax(1)
        return -(y * logarithms.where(~logarithms.isneginf(), 0.0)).sum(1)

    def as_labels(self, drawn: Tensor, like: Tensor) -> Tensor:
        """Turn class indices ``(N,)`` into the form of other labels: indices, or a column for each class."""
        num_columns = math.prod(like.shape[1:])
        one_hot = torch.nn.functional.one_hot(drawn, num_columns) if num_columns > 1 else drawn
        return super().as_labels(one_hot, like)

    def outputs_of(self, p: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Return the outputs of a network, of a shape for each sample, that has these predictions."""
        return p.clamp(min=_FLOOR).log()

    def classes(self, p: Tensor) -> Tensor:
        """Return the class that predictions or labels ``(..., N, C)`` choose, ``(..., N)``."""
        return p.argmax(-1)

    def metric_inputs(self, p: Tensor) -> Tensor:
        """Return predictions as torchmetrics takes them: probabilities ``(N, C)``."""
        return p


class Binary(Multiclass):
    """One output z is the logit of class 1: two logits, 0 and z; its score is (p - y)^2, half of the sum."""

    name = "binary"
    has_one_output = True
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
            advice = "With an output for each class, leave `task` out: `targets=lambda batch: batch[1].long()`"
            got = _describe(outputs, targets)
            raise ValueError(f"Expected one output, (N,) or (N, 1), but got {got}. {advice}")
        if targets.is_floating_point() and targets.shape == (len(outputs), 2):
            _check_soft_labels(self.output_matrix(outputs), targets)
        else:
            _check_probabilities(outputs, targets, _BY_CLASS)

    def label_matrix(self, labels: Tensor, num_columns: int = 2) -> Tensor:
        """Turn labels ``(N,)`` or ``(N, 1)`` into probabilities ``(N, 2)``; a matrix stays."""
        y = labels if labels.is_floating_point() else labels.float()
        y = y[:, None].flatten(1)
        if y.shape[1] == 1:
            y = torch.cat([1 - y, y], 1).where(y != IGNORED, float(IGNORED))
        return super().label_matrix(y)

    def outputs_of(self, p: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Return logits of class 1."""
        return p.clamp(min=_FLOOR).log().diff(dim=1).reshape(len(p), *shape)

    def metric_inputs(self, p: Tensor) -> Tensor:
        """Return the probabilities of class 1, ``(N,)``."""
        return p[:, 1]


class Regression(_Matrices):
    """Outputs are measurements: no temperature, and the mean over columns of squared differences."""

    name = "regression"
    has_classes = False

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return outputs as a matrix."""
        return self.output_matrix(outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and targets do not fit, or are no finite numbers."""
        if _without_single_output(outputs).shape != _without_single_output(targets).shape:
            raise ValueError(f"Expected one target per output, but got {_describe(outputs, targets)}")
        if not bool(targets.isfinite().all()):
            raise ValueError("Expected finite targets, but got nan or inf. Leave such samples out")

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a target: all."""
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn targets ``(N,)`` or ``(N, D)`` into a matrix ``(N, D)``."""
        return self.output_matrix(labels)

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by their squared differences from targets, or from other predictions."""
        return (p - other).square().mean(-1)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the squared error of each sample, for one target ``(N, C)`` or several, ``(R, N, C)``."""
        return self.distances(self.output_matrix(outputs), y)

    def outputs_of(self, p: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Return predictions as outputs; None if outputs are something else, such as quantiles."""
        return p.reshape(len(p), *shape) if math.prod(shape) == p.shape[1] else None

    def classes(self, p: Tensor) -> Tensor:
        """Return nan: a regression has no classes, and none are equal."""
        return torch.full_like(p[..., 0], torch.nan)

    def metric_inputs(self, p: Tensor) -> Tensor:
        """Return predictions as torchmetrics takes them: ``(N,)`` or ``(N, D)``."""
        return _without_single_output(p)


Task = Multiclass | Regression
TASKS: dict[str, Task] = {task.name: task for task in (Multiclass(), Binary(), Regression())}
TASK_NAMES = ", ".join(map(repr, TASKS))


def find_task(name: str) -> Task:
    """Return the task of a name, or raise ValueError."""
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {TASK_NAMES}, but got {name!r}.")
    return TASKS[name]


def _is_ignored(targets: Tensor) -> Tensor:
    # As an 8-bit integer, 156 would equal -100.
    return (targets if targets.is_floating_point() else targets.long()) == IGNORED


def _check_probabilities(outputs: Tensor, targets: Tensor, advice: str) -> None:
    if _without_single_output(outputs).shape != _without_single_output(targets).shape:
        raise ValueError(f"Expected one label per output, but got {_describe(outputs, targets)}. {advice}")
    is_valid = (targets >= 0) & (targets <= 1)
    if not bool((is_valid | _is_ignored(targets)).all()):
        lowest, highest = float(targets.min()), float(targets.max())
        mapping = ". Map -1 to 0: `targets=lambda batch: (batch[1] + 1) / 2`" if lowest == -1 else ""
        expected = f"Expected labels from 0 to 1, or {IGNORED} to be ignored"
        raise ValueError(f"{expected}, but got {lowest:g} to {highest:g}{mapping}")


def _check_soft_labels(outputs: Tensor, targets: Tensor) -> None:
    _check_probabilities(outputs, targets, "Make class indices integers: `targets=lambda batch: batch[1].long()`")
    sums_to_one = (targets.float().sum(1) - 1).abs() < 1e-2  # of 16 bits
    if not bool((sums_to_one | _is_ignored(targets).any(1)).all()):
        raise ValueError(f"Expected soft labels that sum to 1, but got other sums. {_MULTILABEL}")


def _check_indices(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape == outputs.shape:
        advice = "Make one-hot labels floating: `targets=lambda batch: batch[1].float()`"
        raise ValueError(f"Labels are {targets.dtype} for each output. {advice}. {_MULTILABEL}")
    if targets.shape != outputs.shape[:1] or targets.dtype == torch.bool:
        is_column = targets.shape[1:] == (1,)
        advice = " Remove the extra dimension: `targets=lambda batch: batch[1].squeeze(1)`" if is_column else ""
        expected = "Expected class indices (N,) for outputs (N, K)"
        raise ValueError(f"{expected}, but got {_describe(outputs, targets)}.{advice}")
    targets, num_classes = targets.long(), num_outputs(outputs)  # comparisons in 8 bits wrap around
    if not bool((((targets >= 0) & (targets < num_classes)) | (targets == IGNORED)).all()):
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, or {IGNORED} to be ignored, but got {int(targets.min())} to "
            f"{int(targets.max())}. Map them, in a monitor by `targets=`, and another `ignore_index` to {IGNORED}"
        )


def _describe(outputs: Tensor, targets: Tensor) -> str:
    labels = f"labels of type {targets.dtype} and shape {tuple(targets.shape)}"
    return f"outputs of shape {tuple(outputs.shape)} and {labels}"


def _without_single_output(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor
