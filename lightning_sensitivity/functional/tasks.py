"""The kinds of classification: how labels and outputs fit together in each, and how predictions are scored.

Predictions are probabilities ``(N, K, ...)``, and so are labels. There is one score per sample and position.
"""

import math

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import num_outputs

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
_SEVERAL = "Set `task='multilabel'` if a sample can have several classes"
_SMALLEST = 1e-4  # probability of a class from a reference


class Multiclass:
    """One of K classes is correct: softmax, the sum over classes of squared differences."""

    name = "multiclass"
    max_score = 2.0  # the largest possible Brier score
    sums_to_one = True  # probabilities and labels of a sample
    has_one_output = False
    has_label_noise = True  # a share of wrong labels that can be estimated

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Turn logits ``(N, K, ...)`` into probabilities, in single precision or better."""
        return _at_least_single(outputs).softmax(1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError, saying what was expected, if outputs and labels do not fit the task."""
        if num_outputs(outputs) == 1:
            advice = "Set `task='binary'` if they are from 0 to 1"
            raise ValueError(f"Labels are {targets.dtype} for one output. {advice}")
        if targets.is_floating_point():
            self._check_soft_labels(outputs, targets)
        else:
            self._check_shape_of_indices(outputs, targets)
            self._check_indices(num_outputs(outputs), targets.long())  # comparisons in 8 bits wrap around

    def _check_soft_labels(self, outputs: Tensor, targets: Tensor) -> None:
        advice = "Make class indices integers: `targets=lambda batch: batch[1].long()`. A regression has no estimate"
        _check_probabilities(outputs, targets, advice)
        sums_to_one = (targets.float().sum(1) - 1).abs() < 1e-3
        if not bool((sums_to_one | has_ignored_value(targets).any(1)).all()):
            raise ValueError(f"Expected soft labels that sum to 1, but got other sums. {_SEVERAL}")

    def _check_shape_of_indices(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape == outputs.shape:
            advice = "if it can't, make one-hot labels floating: `targets=lambda batch: batch[1].float()`"
            raise ValueError(f"Labels are {targets.dtype} for each output. {_SEVERAL}; {advice}")
        if targets.shape != (*outputs.shape[:1], *outputs.shape[2:]) or targets.dtype == torch.bool:
            is_column = targets.shape == (len(outputs), 1) and targets.dtype != torch.bool
            advice = " Remove the extra dimension: `targets=lambda batch: batch[1].squeeze(1)`" if is_column else ""
            expected = "Expected class indices (N, ...) for outputs (N, K, ...)"
            raise ValueError(f"{expected}, but got {_describe(outputs, targets)}.{advice}")

    def _check_indices(self, num_classes: int, targets: Tensor) -> None:
        is_valid = ((targets >= 0) & (targets < num_classes)) | (targets == IGNORED)
        if not bool(is_valid.all()):
            raise ValueError(
                f"Expected labels from 0 to {num_classes - 1}, or {IGNORED} to be ignored, but got "
                f"{int(targets.min())} to {int(targets.max())}. Map them with `targets=`; "
                f"map another `ignore_index` to {IGNORED}"
            )

    def target_probabilities(self, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Convert labels to probabilities.

        Args:
            p: The probabilities of the same samples.
            targets: Labels that fit the task.

        Returns:
            The labels, ``(N, K, ...)``; and ``(N, ...)`` with 1 for labels that count, 0 for ignored ones.
        """
        if targets.is_floating_point():
            return _without_ignored(p, targets)
        targets = targets.to(p.device).long()
        counts = targets != IGNORED
        index = targets.where(counts, 0).reshape(p[:, :1].shape)
        return torch.zeros_like(p).scatter_(1, index, 1.0), counts.to(p.dtype)

    def as_matrix(self, labels: Tensor) -> Tensor:
        """Turn labels into probabilities ``(N, K)``; of class indices, all from 0 on, K comes from the highest."""
        if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0 or bool((labels < 0).any()):
            return labels
        return torch.nn.functional.one_hot(labels.long())

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by the Brier score: squared differences to labels, or to other predictions."""
        return (p - other).square_().sum(1)

    def claims(self, p: Tensor) -> Tensor:
        """Compute the Brier score that predictions claim: its expectation if labels were drawn from them."""
        return 1 - p.square().sum(1)

    def as_vectors(self, p: Tensor) -> Tensor:
        """Turn probabilities ``(N, K)`` into vectors whose squared distance is the Brier score."""
        return p

    def decisions(self, p: Tensor) -> Tensor:
        """Turn probabilities ``(..., K)`` into those of one decision among K classes, ``(..., 1, K)``."""
        return p[..., None, :]

    def clip(self, p: Tensor) -> Tensor:
        """Turn numbers ``(N, K)`` near probabilities into probabilities."""
        p = p.clamp(_SMALLEST, 1)
        return p / p.sum(1, keepdim=True)


class Multilabel:
    """Each of K labels is 0 or 1: sigmoid, the mean over labels of squared differences."""

    name = "multilabel"
    max_score = 1.0
    sums_to_one = False
    has_one_output = False
    has_label_noise = False

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Turn logits ``(N, K, ...)`` or ``(N,)`` into probabilities."""
        outputs = _at_least_single(outputs)
        return (outputs[:, None] if outputs.ndim < 2 else outputs).sigmoid()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and labels do not fit the task."""
        if num_outputs(outputs) == 1:
            got = _describe(outputs, targets)
            raise ValueError(f"Expected outputs (N, K, ...) with K > 1, but got {got}. Set `task='binary'`")
        _check_probabilities(outputs, targets, "Leave `task` out if labels are class indices")

    def target_probabilities(self, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Convert labels to probabilities, and return which of them count."""
        return _without_ignored(p, targets)

    def as_matrix(self, labels: Tensor) -> Tensor:
        """Turn labels into probabilities ``(N, K)``, which they are for several labels."""
        return labels

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by the Brier score."""
        return (p - other).square_().mean(1)

    def claims(self, p: Tensor) -> Tensor:
        """Compute the Brier score that predictions claim."""
        return (p * (1 - p)).mean(1)

    def as_vectors(self, p: Tensor) -> Tensor:
        """Turn probabilities ``(N, K)`` into vectors whose squared distance is the Brier score."""
        return torch.cat([p, 1 - p], dim=1) / math.sqrt(2 * p.shape[1])

    def decisions(self, p: Tensor) -> Tensor:
        """Turn probabilities ``(..., K)`` into those of K decisions between no and yes, ``(..., K, 2)``."""
        return torch.stack([1 - p, p], -1)

    def clip(self, p: Tensor) -> Tensor:
        """Turn numbers ``(N, K)`` near probabilities into probabilities."""
        return p.clamp(0, 1)


class Binary(Multilabel):
    """One output is the logit of class 1."""

    name = "binary"
    has_one_output = True
    has_label_noise = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and labels do not fit the task."""
        if num_outputs(outputs) != 1:
            advice = "With an output for each class, leave `task` out: `targets=lambda batch: batch[1].long()`"
            got = _describe(outputs, targets)
            raise ValueError(f"Expected one output, (N,) or (N, 1, ...), but got {got}. {advice}")
        _check_probabilities(outputs, targets, "Leave `task` out if labels are class indices")

    def as_matrix(self, labels: Tensor) -> Tensor:
        """Turn labels ``(N,)`` or ``(N, 1)`` into probabilities ``(N, 1)``."""
        return labels.reshape(-1, 1)


Task = Multiclass | Multilabel
TASKS: dict[str, Task] = {task.name: task for task in (Multiclass(), Binary(), Multilabel())}


def find_task(name: str) -> Task:
    """Return the task of a name, or raise ValueError."""
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, TASKS))}, but got {name!r}.")
    return TASKS[name]


def has_ignored_value(targets: Tensor) -> Tensor:
    """Return where labels are -100."""
    # As an 8-bit integer, 156 would equal -100.
    return (targets if targets.is_floating_point() else targets.long()) == IGNORED


def has_label(targets: Tensor) -> Tensor:
    """Return which samples have labels ``(N, ...)`` that are not ignored, ``(N,)``."""
    return ~has_ignored_value(targets)[:, None].flatten(1).any(1)


def _without_ignored(p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    y = targets.to(p.device).to(p.dtype).reshape(p.shape)
    is_ignored = (y == IGNORED).any(1)
    return y.where(~is_ignored[:, None], 0.0), (~is_ignored).to(p.dtype)


def _check_probabilities(outputs: Tensor, targets: Tensor, advice: str) -> None:
    if _without_single_output(outputs).shape != _without_single_output(targets).shape:
        raise ValueError(f"Expected one label per output, but got {_describe(outputs, targets)}. {advice}")
    is_valid = (targets >= 0) & (targets <= 1)
    if not bool((is_valid | has_ignored_value(targets)).all()):
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
