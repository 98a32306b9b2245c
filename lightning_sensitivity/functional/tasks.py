"""Outputs and labels: how they are laid out, which task they belong to, and what is scored in it."""

import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TASKS = ("multiclass", "binary", "multilabel")
IGNORED = -100  # the `ignore_index` of torch's cross-entropy
_CHUNK = 2**15  # elements that are widened at a time
_ROUNDING = 1e-2  # of sums of probabilities in 16 bits, which autocast may have widened since
_MAX_CHANCE, _MIN_RATIO = 1e-4, 1.25  # that labels name no more of K classes by luck; of K to the classes they name
_LIBRARIES = ("lightning", "pytorch_lightning", "torch", "contextlib", "functools")  # beginnings of modules' names


def infer_task(outputs: Tensor, targets: Tensor) -> str:
    """Infer the task where labels and outputs allow only one.

    ==================  =====================================  ======================================================
    task                outputs                                targets
    ==================  =====================================  ======================================================
    ``"multiclass"``    ``(N, K, ...)`` with K of 2 or more    integers ``(N, ...)``
    ``"multilabel"``    ``(N, K, ...)`` with K of 2 or more    integers or bools 0 and 1, ``(N, K, ...)``, not one-hot
    ``"binary"``        ``(N,)`` or ``(N, 1, ...)``            bools, one per output
    ==================  =====================================  ======================================================

    Args:
        outputs: Outputs of the model.
        targets: The labels of the same samples.

    Raises:
        ValueError: If no task fits, or several could.
    """
    if targets.is_floating_point():
        advice = "Set `task='binary'`, `'multilabel'`, or `'multiclass'` for soft labels; or make classes integers"
        raise ValueError(f"Labels are floating. {advice} (`targets=`). A regression has no estimate")
    if num_outputs(outputs) == 1 and targets.dtype != torch.bool:
        raise ValueError("Labels are integers for one output. Set `task='binary'` if they are 0 and 1")
    with_classes = "multiclass" if targets.ndim < outputs.ndim else "multilabel"
    task = "binary" if num_outputs(outputs) == 1 else with_classes
    check_task(outputs, targets, task)
    if task == "multilabel" and bool((targets.sum(1) == 1).all()):
        task = "`task='multiclass'` if one class is right (and make them floats), `task='multilabel'` if several are"
        raise ValueError(f"Labels are one-hot. Set {task}")
    return task


def check_classes(num_outputs: int, targets: Tensor) -> None:
    """Refuse labels that name only the first few of more than ten outputs, if they are enough to be sure.

    Args:
        num_outputs: K.
        targets: Class indices or soft labels, any number of them.

    Raises:
        ValueError: If they name the first few alone.
    """
    counted = targets[targets != IGNORED]
    if counted.is_floating_point() or not counted.numel():
        return
    num_named = int(counted.max()) + 1
    is_unlikely = counted.numel() * math.log(num_outputs / num_named) > -math.log(_MAX_CHANCE)
    if is_unlikely and num_outputs > max(_MIN_RATIO * num_named, 10):
        reason = "Labels name only the first few of many outputs, as beside an embedding"
        raise ValueError(f"{reason}. Set `task='multiclass'` if the outputs are logits")


def check_task(outputs: Tensor, targets: Tensor, task: str) -> None:
    """Check that outputs and labels fit a task.

    Args:
        outputs: Outputs of the model.
        targets: The labels of the same samples.
        task: One of :data:`TASKS`.

    Raises:
        ValueError: If they are not, with what was expected.
    """
    shape, count, floating = tuple(outputs.shape), num_outputs(outputs), targets.is_floating_point()
    got = f"outputs of shape {shape} and labels of type {targets.dtype} and shape {tuple(targets.shape)}"
    if (count == 1) != (task == "binary"):
        expected = "one output, (N,) or (N, 1, ...)" if task == "binary" else "outputs (N, K, ...) with K > 1"
        raise ValueError(f"Expected {expected}, but got {got}")
    if task == "multiclass" and not floating:
        if shape[:1] + shape[2:] != tuple(targets.shape) or targets.dtype == torch.bool:
            raise ValueError(f"Expected class indices (N, ...) for outputs (N, K, ...), but got {got}")
        targets = targets.long()  # comparisons in 8 bits wrap around
        if not bool((((targets >= 0) & (targets < count)) | (targets == IGNORED)).all()):
            got = f"{int(targets.min())} to {int(targets.max())}. Turn another `ignore_index` into it (`targets=`)"
            raise ValueError(f"Expected labels from 0 to {count - 1}, or {IGNORED} to be ignored, but got {got}")
        return
    if _without_single_output(outputs).shape != _without_single_output(targets).shape:
        integers = " Make class indices integers (`targets=lambda batch: batch[1].long()`)" * (task == "multiclass")
        raise ValueError(f"Expected one label per output, but got {got}.{integers}")
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(f"Expected labels from 0 to 1, but got {float(targets.min()):g} to {float(targets.max()):g}")
    if task == "multiclass" and not bool(((targets.double().sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("Expected soft labels that sum to 1 over the classes, but got other sums")


def are_probabilities(outputs: Tensor) -> bool:
    """Check whether outputs can only be those of a softmax, within rounding; waits for the device."""
    if num_outputs(outputs) < 2 or not outputs.numel() or bool((outputs < 0).any()):
        return False
    return bool((outputs.to(wide_dtype(outputs.device)).sum(1) - 1).abs().max() < _ROUNDING)


def lie_in_unit_interval(outputs: Tensor) -> bool:
    """Check whether all outputs lie in [0, 1], as those of a sigmoid do; waits for the device."""
    return outputs.numel() > 0 and bool(((outputs >= 0) & (outputs <= 1)).all())


def are_log_probabilities(outputs: Tensor) -> bool:
    """Check whether outputs can only be those of a log-softmax, within rounding; waits for the device."""
    return not bool((outputs > 0).any()) and are_probabilities(outputs.exp())


def probabilities(outputs: Tensor, task: str) -> Tensor:
    """Turn logits ``(N, K, ...)`` or ``(N,)`` into probabilities ``(N, K, ...)``, in single precision or better."""
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    wide = wide[:, None] if wide.ndim < 2 else wide
    return wide.softmax(1) if task == "multiclass" else wide.sigmoid()


def target_probabilities(p: Tensor, targets: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Lay out labels as probabilities.

    Args:
        p: The probabilities of the same samples, from :func:`probabilities`.
        targets: Labels that fit the task.
        task: One of :data:`TASKS`.

    Returns:
        The labels, ``(N, K, ...)``, and 1 for each that counts, ``(N, ...)``, or 0 for those of -100.
    """
    targets = targets.to(p.device)
    if task == "multiclass" and not targets.is_floating_point():
        targets = targets.long()  # comparisons in 8 bits wrap around
        counts = targets != IGNORED
        index = targets.where(counts, 0).reshape(p[:, :1].shape)
        return torch.zeros_like(p).scatter_(1, index, 1.0), counts.to(p.dtype)
    return targets.to(p.dtype).reshape(p.shape), torch.ones_like(p[:, 0])


def num_outputs(outputs: Tensor) -> int:
    """Count the outputs K of ``(N, K, ...)``; ``(N,)`` has one."""
    return outputs.shape[1] if outputs.ndim > 1 else 1


def by_position(outputs: Tensor) -> Tensor:
    """View outputs ``(N, K, ...)`` or ``(N,)`` as ``(N, K, P)``, with P positions."""
    outputs = outputs.detach()
    return outputs[:, None, None] if outputs.ndim == 1 else outputs[..., None].flatten(2)  # of no samples, too


def wide_dtype(device: torch.device) -> torch.dtype:
    """Choose the widest floating type of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Call a function on a few samples at a time, so that no wide copy of all outputs is made.

    Args:
        function: Function of a chunk of each tensor.
        tensors: Of the same samples, ``(N, ...)``; the first one sets how many make a chunk.
    """
    size = max(1, _CHUNK * len(tensors[0]) // max(1, tensors[0].numel()))
    return [function(*chunk) for chunk in zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)]


def warn(message: str) -> None:
    """Warn at the first line outside of the libraries: the user's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _without_single_output(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor
