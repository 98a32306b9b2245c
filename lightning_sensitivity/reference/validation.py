"""Samples and labels in any form, as a reference takes them."""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from lightning_sensitivity.functional.tasks import IGNORED, Task
from lightning_sensitivity.reference.kinds import KINDS, Array, Samples, Seen, kind_of


def read_samples(x: Samples, kind: str = "") -> Seen:
    """Return what is seen of samples, checked.

    Args:
        x: A mapping by kind, a data frame, whose columns are numbers and flags, or a tensor, array or list,
            whose kind follows from its dimensions and type.
        kind: The kind of a tensor, array or list, if it is known.

    Raises:
        ValueError: If there is no sample, or what is there are no finite numbers.
        TypeError: If it is sparse.
    """
    if not isinstance(x, Mapping) or issparse(x):  # one of keys is both
        x = {kind: x}
    elif not x or not x.keys() <= KINDS.keys():
        raise ValueError(f"Expected `x` to have {', '.join(KINDS)}, but got {', '.join(map(str, x))}.")
    return dict(_read(values, kind) for kind, values in x.items())


def _read(x: Samples, kind: str) -> tuple[str, Tensor]:
    """Return the kind of samples, and their numbers."""
    dtype = float if hasattr(x, "columns") else "numeric"  # integers of a data frame are no token ids
    array = check_array(_as_array(x), dtype=dtype, order="C", allow_nd=True, force_writeable=True, input_name="x")
    values = torch.from_numpy(array)
    kind = kind or kind_of(values)
    return kind, KINDS[kind].read(values)


def _as_array(values: Array) -> Array:
    """Return tensors as arrays, which have no bfloat16; all else stays as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def read_labels(y: Array, task: Task) -> tuple[Tensor, Array]:
    """Return labels that fit the task, and what the columns of their matrix stand for, ``(C,)``.

    Args:
        y: Labels of any kind that :meth:`Reference.fit` takes.
        task: The task.

    Raises:
        ValueError: If labels do not fit the task, or none counts.
    """
    y = _as_array(y)
    array = np.asarray(y)
    if task.has_indices and array.shape[1:] in ((), (1,)):
        array = column_or_1d(array, warn=True)
        if array.dtype.kind not in "biuUS":
            check_array(array, dtype=None, ensure_2d=False, input_name="y")
        if array.dtype.kind == "f":
            check_classification_targets(array)
        counts = np.asarray(array != IGNORED)
        classes, indices = np.unique(array[counts], return_inverse=True)
        labels = torch.full((len(array),), IGNORED)
        labels[torch.from_numpy(counts)] = torch.from_numpy(indices)
    else:
        options = {"ensure_2d": False, "allow_nd": True, "ensure_all_finite": "allow-nan", "force_writeable": True}
        labels = torch.from_numpy(check_array(y, dtype=float, order="C", input_name="y", **options))
        shape = tuple(labels.shape[1:])
        task.check(torch.zeros(len(labels), *(() if task.has_one_output else shape)), labels)
        classes = np.arange(task.num_columns(shape))
    if not bool(task.has_label(labels).any()):
        raise ValueError(f"Expected a label in `y` that is not {IGNORED} or nan, but got none.")
    return labels, classes
