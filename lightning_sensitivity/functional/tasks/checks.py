"""Checks of labels: whether they fit outputs, and what to change if not."""

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import num_outputs, without_ones

IGNORED = -100  # the `ignore_index` of torch's cross-entropy
BY_CLASS = "Leave `task` out if labels are class indices"
MULTILABEL = "If several classes are right for one sample, set `task='multilabel'`"


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
        mapping = to_zero if has_two else _ignoring(targets, ~is_valid)
        expected = f"Expected labels from 0 to 1, or {IGNORED} to be ignored"
        raise ValueError(f"{expected}, but got {lowest:g} to {highest:g}{mapping}")


def check_sizes(outputs: Tensor, targets: Tensor, what: str, advice: str = "") -> None:
    """Raise ValueError unless there is a label, or what they are called, for each output."""
    if without_single_output(outputs).shape != without_single_output(without_ones(targets)).shape:
        advice = f". {advice}" if advice else ""
        raise ValueError(f"Expected one {what} per output, but got {describe_both(outputs, targets)}{advice}")


def check_soft_labels(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless labels are probabilities of classes that sum to 1, or -100."""
    check_probabilities(outputs, targets, "Make class indices integers: `targets=lambda batch: batch[1].long()`")
    sums_to_one = (targets.float().sum(1) - 1).abs() < 1e-2  # of 16 bits
    if not bool((sums_to_one | are_ignored(targets).any(1)).all()):
        raise ValueError(f"Expected soft labels that sum to 1, but got other sums. {MULTILABEL}")


def check_indices(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless labels are indices of the classes, or -100."""
    if targets.shape == outputs.shape:
        advice = "Make one-hot labels floating: `targets=lambda batch: batch[1].float()`"
        raise ValueError(f"Labels are {targets.dtype} for each output. {advice}. {MULTILABEL}")
    if targets.shape != outputs.shape[:1] or targets.dtype == torch.bool:
        raise ValueError(f"Expected class indices (N,) for outputs (N, K), but got {describe_both(outputs, targets)}")
    targets, num_classes = targets.long(), num_outputs(outputs)  # comparisons in 8 bits wrap around
    is_valid = ((targets >= 0) & (targets < num_classes)) | (targets == IGNORED)
    if not bool(is_valid.all()):
        begins_at_1 = ". If classes begin at 1, set `targets=lambda batch: batch[1] - 1`"
        is_one_too_high = int(targets.max()) == num_classes and bool((targets != 0).all())
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, or {IGNORED} to be ignored, but got {int(targets.min())} to "
            f"{int(targets.max())}. Map them, in a monitor by `targets=`, and another `ignore_index` to {IGNORED}"
            f"{begins_at_1 if is_one_too_high else _ignoring(targets, ~is_valid)}"
        )


def _ignoring(targets: Tensor, is_odd: Tensor) -> str:
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
