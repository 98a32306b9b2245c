"""The kinds of tasks: how outputs and labels fit together in each, and how predictions are scored.

Outputs are ``(N, K)`` or ``(N,)``. Predictions and labels are matrices ``(N, K)``, and a sample has one score.
"""

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import num_outputs

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
_TINY = 1e-12  # sum of probabilities
_BY_CLASS = "Leave `task` out if labels are class indices"
_MULTILABEL = "Several classes for one sample (multilabel) are not supported"


class Multiclass:
    """One of K classes is correct: softmax, and the sum over classes of squared differences."""

    name = "multiclass"
    has_one_output = False
    has_classes = True

    def predictions(self, outputs: Tensor) -> Tensor:
        """Turn logits ``(N, K)`` into probabilities, in single precision or better."""
        return _at_least_single(outputs).softmax(1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError, saying what was expected, if outputs and labels do not fit the task."""
        if num_outputs(outputs) == 1:
            advice = "Set `task='binary'` if they are from 0 to 1, `task='regression'` if they are measurements"
            raise ValueError(f"Labels are {targets.dtype} for one output. {advice}")
        if targets.is_floating_point():
            self._check_soft_labels(outputs, targets)
        else:
            self._check_shape_of_indices(outputs, targets)
            self._check_indices(num_outputs(outputs), targets.long())  # comparisons in 8 bits wrap around

    def _check_soft_labels(self, outputs: Tensor, targets: Tensor) -> None:
        _check_probabilities(outputs, targets, "Make class indices integers: `targets=lambda batch: batch[1].long()`")
        sums_to_one = (targets.float().sum(1) - 1).abs() < 1e-2  # of 16 bits
        if not bool((sums_to_one | ~has_label(targets)).all()):
            raise ValueError(f"Expected soft labels that sum to 1, but got other sums. {_MULTILABEL}")

    def _check_shape_of_indices(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape == outputs.shape:
            advice = "Make one-hot labels floating: `targets=lambda batch: batch[1].float()`"
            raise ValueError(f"Labels are {targets.dtype} for each output. {advice}. {_MULTILABEL}")
        if targets.shape != outputs.shape[:1] or targets.dtype == torch.bool:
            is_column = targets.shape == (len(outputs), 1) and targets.dtype != torch.bool
            advice = " Remove the extra dimension: `targets=lambda batch: batch[1].squeeze(1)`" if is_column else ""
            expected = "Expected class indices (N,) for outputs (N, K)"
            raise ValueError(f"{expected}, but got {_describe(outputs, targets)}.{advice}")

    def _check_indices(self, num_classes: int, targets: Tensor) -> None:
        is_valid = ((targets >= 0) & (targets < num_classes)) | (targets == IGNORED)
        if not bool(is_valid.all()):
            raise ValueError(
                f"Expected labels from 0 to {num_classes - 1}, or {IGNORED} to be ignored, but got "
                f"{int(targets.min())} to {int(targets.max())}. Map them, in a monitor by `targets=`, and another "
                f"`ignore_index` to {IGNORED}"
            )

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a label that counts, ``(N,)``."""
        return has_label(targets)

    def as_matrix(self, labels: Tensor, num_outputs: int | None = None) -> Tensor:
        """Turn labels into probabilities ``(N, K)``; an ignored label gives zeros.

        Args:
            labels: Class indices ``(N,)``, or probabilities ``(N, K)``.
            num_outputs: K; by default one more than the highest class index.
        """
        if labels.is_floating_point():
            return labels.where(has_label(labels)[:, None], 0.0) if labels.ndim == 2 else labels
        counts = has_label(labels)
        indices = labels.long().where(counts, 0)
        num_outputs = num_outputs or (int(indices.max()) + 1 if len(indices) else 1)
        return torch.nn.functional.one_hot(indices, num_outputs).float() * counts[:, None]

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by the Brier score: squared differences from labels, or from other predictions."""
        return (p - other).square().sum(1)

    def uncertainties(self, p: Tensor) -> Tensor:
        """Compute the Brier score that predictions have if labels are drawn from them."""
        return 1 - p.square().sum(1)

    def classes(self, p: Tensor) -> Tensor:
        """Return the class that predictions or labels ``(..., N, K)`` choose for each sample, ``(..., N)``."""
        return p.argmax(-1)

    def clip(self, p: Tensor) -> Tensor:
        """Turn numbers ``(N, K)`` near probabilities into probabilities."""
        p = p.clamp(0, 1)
        return p / p.sum(1, keepdim=True).clamp(min=_TINY)


class Binary(Multiclass):
    """One output is the logit of class 1: sigmoid, and the squared difference."""

    name = "binary"
    has_one_output = True

    def predictions(self, outputs: Tensor) -> Tensor:
        """Turn logits ``(N,)`` or ``(N, 1)`` into probabilities of class 1, ``(N, 1)``."""
        return _at_least_single(outputs).reshape(-1, 1).sigmoid()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and labels do not fit the task."""
        if num_outputs(outputs) != 1:
            advice = "With an output for each class, leave `task` out: `targets=lambda batch: batch[1].long()`"
            got = _describe(outputs, targets)
            raise ValueError(f"Expected one output, (N,) or (N, 1), but got {got}. {advice}")
        _check_probabilities(outputs, targets, _BY_CLASS)

    def as_matrix(self, labels: Tensor, num_outputs: int | None = None) -> Tensor:
        """Turn labels ``(N,)`` or ``(N, 1)`` into probabilities of class 1, ``(N, 1)``; an ignored label gives 0."""
        column = labels.reshape(-1, 1)
        column = column if column.is_floating_point() else column.float()
        return column.where(column != IGNORED, 0.0)

    def uncertainties(self, p: Tensor) -> Tensor:
        """Compute the squared difference that predictions have if labels are drawn from them."""
        return (p * (1 - p)).sum(1)

    def classes(self, p: Tensor) -> Tensor:
        """Return the class that predictions or labels ``(..., N, 1)`` choose for each sample, ``(..., N)``."""
        return (p[..., 0] > 0.5).long()

    def clip(self, p: Tensor) -> Tensor:
        """Turn numbers near probabilities into probabilities."""
        return p.clamp(0, 1)


class Regression:
    """Outputs are measurements: no temperature, and the mean over columns of squared differences."""

    name = "regression"
    has_one_output = False
    has_classes = False

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return outputs ``(N,)`` or ``(N, D)`` as a matrix ``(N, D)``."""
        outputs = _at_least_single(outputs)
        return outputs[:, None] if outputs.ndim == 1 else outputs

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and targets do not fit, or are no finite numbers."""
        if _without_single_output(outputs).shape != _without_single_output(targets).shape:
            raise ValueError(f"Expected one target per output, but got {_describe(outputs, targets)}")
        if not bool(targets.isfinite().all()):
            raise ValueError("Expected finite targets, but got nan or inf. Leave such samples out")

    def has_label(self, targets: Tensor) -> Tensor:
        """Return which samples have a target: all."""
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)

    def as_matrix(self, labels: Tensor, num_outputs: int | None = None) -> Tensor:
        """Turn targets ``(N,)`` or ``(N, D)`` into a matrix ``(N, D)``."""
        return self.predictions(labels if labels.is_floating_point() else labels.float())

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by their squared differences from targets, or from other predictions."""
        return (p - other).square().mean(1)

    def uncertainties(self, p: Tensor) -> Tensor:
        """Return zeros: predictions of a regression do not say how sure they are."""
        return torch.zeros_like(p[:, 0])

    def classes(self, p: Tensor) -> Tensor:
        """Return nan: a regression has no classes, and none are equal."""
        return torch.full_like(p[..., 0], torch.nan)

    def clip(self, p: Tensor) -> Tensor:
        """Return the predictions."""
        return p


Task = Multiclass | Regression
TASKS: dict[str, Task] = {task.name: task for task in (Multiclass(), Binary(), Regression())}
TASK_NAMES = ", ".join(map(repr, TASKS))


def find_task(name: str) -> Task:
    """Return the task of a name, or raise ValueError."""
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {TASK_NAMES}, but got {name!r}.")
    return TASKS[name]


def of_all_classes(p: Tensor, task: Task) -> Tensor:
    """Return the probabilities of all classes, ``(N, C)``; of one output, that of the other class comes first."""
    return torch.cat([1 - p, p], 1) if task.has_one_output else p


def _is_ignored(targets: Tensor) -> Tensor:
    # As an 8-bit integer, 156 would equal -100.
    return (targets if targets.is_floating_point() else targets.long()) == IGNORED


def has_label(targets: Tensor) -> Tensor:
    """Return which samples have labels ``(N,)`` or ``(N, K)`` that are not ignored, ``(N,)``."""
    return ~_is_ignored(targets)[:, None].flatten(1).any(1)


def _check_probabilities(outputs: Tensor, targets: Tensor, advice: str) -> None:
    if _without_single_output(outputs).shape != _without_single_output(targets).shape:
        raise ValueError(f"Expected one label per output, but got {_describe(outputs, targets)}. {advice}")
    is_valid = (targets >= 0) & (targets <= 1)
    if not bool((is_valid | _is_ignored(targets)).all()):
        lowest, highest = float(targets.min()), float(targets.max())
        mapping = ". Map -1 to 0: `targets=lambda batch: (batch[1] + 1) / 2`" if lowest == -1 else ""
        expected = f"Expected labels from 0 to 1, or {IGNORED} to be ignored"
        raise ValueError(f"{expected}, but got {lowest:g} to {highest:g}{mapping}")


def _describe(outputs: Tensor, targets: Tensor) -> str:
    labels = f"labels of type {targets.dtype} and shape {tuple(targets.shape)}"
    return f"outputs of shape {tuple(outputs.shape)} and {labels}"


def _at_least_single(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _without_single_output(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor
