"""The task that outputs and labels belong to, and what is scored in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sensitivity.functional.pieces import wide_dtype
from lightning_sensitivity.functional.sensitivity import num_outputs

TASKS = ("multiclass", "binary", "multilabel", "regression")
_ROUNDING = 1e-2  # of sums of probabilities in 16 bits, which autocast may have widened since
_MANY = 32  # of classes and of labels, from which on unused classes raise doubt
IGNORED = -100  # the `ignore_index` of torch's cross-entropy


def infer_task(outputs: Tensor, targets: Tensor) -> str:
    """The task, where labels and outputs leave no doubt.

    ==================  =====================================  ======================================================
    task                outputs                                targets
    ==================  =====================================  ======================================================
    ``"multiclass"``    ``(N, K, ...)`` with K of 2 or more    integers, shape ``(N, ...)``
    ``"multilabel"``    ``(N, K, ...)`` with K of 2 or more    integers or bools 0 and 1, ``(N, K, ...)``, not one-hot
    ``"binary"``        ``(N,)`` or ``(N, 1, ...)``            bools, one per output
    ==================  =====================================  ======================================================

    All else is in doubt: floating targets may be numbers, labels for a ``BCEWithLogitsLoss``, soft labels, or labels
    with a code for "unknown"; integers beside one output may be counts; many outputs that no label ever names may be an
    embedding or a reconstruction.

    Args:
        outputs: Outputs of the model.
        targets: The labels of the same samples.

    Returns:
        The task.

    Raises:
        ValueError: If no task fits, or it is in doubt.
    """
    got = f"outputs of shape {tuple(outputs.shape)} and labels {_describe(targets)}"
    single = num_outputs(outputs) == 1
    if targets.is_floating_point():
        raise ValueError(f"Labels are floating, so that they could be targets or classes: got {got}.")
    if single and targets.dtype == torch.bool:
        task = "binary"
    elif single:
        raise ValueError(f"Integer labels beside one output could be classes or counts: got {got}.")
    else:
        task = "multiclass" if targets.ndim < outputs.ndim else "multilabel"
    check_task(outputs, targets, task)
    if task == "multilabel" and bool((targets.sum(1) == 1).all()):
        raise ValueError(
            "Labels are one-hot rows. Use `task='multiclass'` if exactly one class is right, and `task='multilabel'` if"
            f" several can be: got {got}."
        )
    if task == "multiclass" and min(outputs.shape[1], targets.numel()) >= _MANY:
        num_named = int(targets.max()) + 1
        if 2 * num_named < outputs.shape[1]:
            raise ValueError(f"Expected labels of more than the first {num_named} of so many classes, got {got}.")
    return task


def check_task(outputs: Tensor, targets: Tensor, task: str) -> None:
    """Require that the labels are those of a task.

    Args:
        outputs: Outputs of the model.
        targets: The labels of the same samples.
        task: One of :data:`TASKS`.

    Raises:
        ValueError: If they are not, with what was expected.
    """
    floating, shape = targets.is_floating_point(), tuple(outputs.shape)
    count = num_outputs(outputs)
    got = f"outputs of shape {shape} and labels {_describe(targets)}"
    if not outputs.is_floating_point():
        raise ValueError(f"Expected floating outputs, got {outputs.dtype}.")
    if task == "multiclass" and not floating:
        if count < 2 or shape[:1] + shape[2:] != tuple(targets.shape) or targets.dtype == torch.bool:
            raise ValueError(f"Expected outputs (N, K, ...), K > 1, and integer labels (N, ...), got {got}.")
        targets = targets.long()  # comparisons in 8 bits wrap around
        valid = ((targets >= 0) & (targets < count)) | (targets == IGNORED)
        if not bool(valid.all()):
            raise ValueError(
                f"Expected labels from 0 to {count - 1}, or {IGNORED} for what is ignored, got"
                f" {int(targets.min())} to {int(targets.max())}. Turn another `ignore_index` into {IGNORED} with a"
                " function, `targets=`."
            )
        return
    if task in ("multiclass", "multilabel") and count < 2:
        raise ValueError(f"Expected outputs (N, K, ...) with K > 1, got {got}.")
    if task == "binary" and count != 1:
        raise ValueError(f"Expected one output, (N,) or (N, 1, ...), got {got}.")
    if task == "multiclass" and shape[:1] + shape[2:] == tuple(targets.shape):
        raise ValueError(
            f"Expected integers for classes, got {got}. Convert them: `targets=lambda batch: batch[1].long()`."
        )
    if _without_single_output(outputs).shape != _without_single_output(targets).shape:
        raise ValueError(f"Expected one label per output, got {got}.")
    if task == "regression":
        if not bool(targets.isfinite().all()):
            raise ValueError("Expected finite labels, got nan or inf.")
        return
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(f"Expected labels from 0 to 1, got {float(targets.min()):g} to {float(targets.max()):g}.")
    if task == "multiclass" and not bool(((targets.double().sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("Expected soft labels that sum to 1 over the classes, got other sums.")


def check_logits(outputs: Tensor, task: str) -> None:
    """Require that the outputs are no probabilities already, as far as that can be seen.

    Args:
        outputs: Outputs of the model.
        task: One of :data:`TASKS`.

    Raises:
        ValueError: If they are 0 or more and sum to 1 over the classes.
    """
    if task == "multiclass" and are_probabilities(outputs):
        raise ValueError("Expected outputs before the softmax (logits), got probabilities.")


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are those of a softmax, within rounding; waits for the device.

    Args:
        outputs: Outputs, ``(N, K, ...)`` or ``(N,)``.
    """
    if num_outputs(outputs) < 2 or not outputs.numel() or bool((outputs < 0).any()):
        return False
    return bool((outputs.to(wide_dtype(outputs.device)).sum(1) - 1).abs().max() < _ROUNDING)


def are_log_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are those of a log-softmax, within rounding; waits for the device.

    Args:
        outputs: Outputs, ``(N, K, ...)`` or ``(N,)``.
    """
    if num_outputs(outputs) < 2 or not outputs.numel() or bool((outputs > 0).any()):
        return False
    largest = outputs.to(wide_dtype(outputs.device)).logsumexp(1).abs().max()
    return bool(largest < _ROUNDING * (1 + math.log(outputs.shape[1])))


def predictions(outputs: Tensor, task: str) -> Tensor:
    """What is scored: probabilities, or the outputs themselves in a regression.

    Args:
        outputs: Outputs of the model, logits unless the task is a regression; ``(N, K, ...)`` or ``(N,)``.
        task: One of :data:`TASKS`.

    Returns:
        Shape ``(N, K, ...)``, in single precision or better.
    """
    wide = _with_outputs(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
    if task == "regression":
        return wide
    return wide.softmax(1) if task == "multiclass" else wide.sigmoid()


def target_predictions(outputs: Tensor, targets: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """The labels in the layout of :func:`predictions`, and which of them count.

    Args:
        outputs: Outputs of the model.
        targets: The labels, which fit ``task`` by :func:`check_task`.
        task: One of :data:`TASKS`.

    Returns:
        The labels, ``(N, K, ...)``, and 0 or 1 for each, ``(N, ...)``: 0 for the -100 that cross-entropy ignores.
    """
    wide = _with_outputs(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
    targets = targets.to(outputs.device)
    if task == "multiclass" and not targets.is_floating_point():
        counts = targets != IGNORED
        index = targets.long().where(counts, 0).reshape(wide[:, :1].shape)
        return torch.zeros_like(wide).scatter_(1, index, 1.0), counts.to(wide.dtype)
    return targets.to(wide.dtype).reshape(wide.shape), torch.ones_like(wide[:, 0])


def classes_last(outputs: Tensor, targets: Tensor) -> bool:
    """Whether labels say that classes stand in the last dimension, ``(N, ..., K)``, as transformers have them.

    Args:
        outputs: Outputs of the model.
        targets: The labels of the same samples.
    """
    if outputs.ndim < 3 or targets.is_floating_point() or targets.shape != outputs.shape[:-1]:
        return False
    return targets.shape != outputs.shape[:1] + outputs.shape[2:]


def _with_outputs(outputs: Tensor) -> Tensor:
    return outputs[:, None] if outputs.ndim < 2 else outputs


def _without_single_output(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor


def _describe(tensor: Tensor) -> str:
    return f"of type {tensor.dtype} and shape {tuple(tensor.shape)}"
