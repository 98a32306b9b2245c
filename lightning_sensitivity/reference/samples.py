"""Samples and labels in any form, as a reference takes them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from lightning_sensitivity.functional.tasks import IGNORED, Task
from lightning_sensitivity.functional.tensors import as_tensor
from lightning_sensitivity.reference.features import Seen, kind_of

Array: TypeAlias = Any  # of NumPy


def read_samples(x: Any, names: Any = None) -> Seen:
    """Return what is seen of samples, checked.

    Args:
        x: A mapping by kind, a data frame, whose columns are numbers and flags, or a tensor, array or list, whose kind
            follows from its dimensions and type.
        names: The columns of a data frame that are wanted, in this order; None for all.

    Raises:
        ValueError: If there is no sample, or what is there are no finite numbers.
        TypeError: If it is sparse.
    """
    if isinstance(x, Mapping):
        return {str(kind): _numbers(kind, values) for kind, values in x.items()}
    if hasattr(x, "columns"):
        return {"columns": _columns_of(x, names)}
    values = _numbers("x", x)
    values = values[:, None].double() if values.ndim == 1 else values
    kind = kind_of(values)
    return {kind: values.flatten(1) if kind == "columns" else values}


def names_of(x: Any) -> Array | None:
    """Return the names of a data frame's columns, if all are strings."""
    names = list(getattr(x, "columns", ()))
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None


def _columns_of(frame: Any, names: Any) -> Tensor:
    missing = [] if names is None else [name for name in names if name not in frame.columns]
    if missing:
        raise ValueError(f"Expected `x` to have the columns that were fitted, but got none named {_list(missing)}.")
    columns = {name: np.asarray(frame[name]) for name in (frame.columns if names is None else names)}
    kinds = {name: column.dtype.kind for name, column in columns.items()}
    for problem, bad in (
        ("are dates: take numbers of them, such as days", [name for name in kinds if kinds[name] in "Mm"]),
        (
            "are no numbers: `pandas.get_dummies` makes columns of names",
            [name for name in kinds if kinds[name] not in "biufMm"],
        ),
        (
            "have missing values: impute them, with a flag column for each",
            [name for name in kinds if kinds[name] == "f" and np.isnan(columns[name]).any()],
        ),
    ):
        if bad:
            raise ValueError(f"Columns of `x` {problem}: {_list(bad)}.")
    return _numbers("x", np.column_stack([column.astype(float) for column in columns.values()]))


def _list(names: list[Any]) -> str:
    return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")


def _numbers(name: str, values: Any) -> Tensor:
    """Return finite real numbers on the CPU, ``(N, ...)``."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise TypeError(f"Expected `{name}` to be dense, but got {values.layout}: use `to_dense()`.")
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    found = check_array(values, dtype="numeric", ensure_2d=False, allow_nd=True, input_name=name)
    return torch.from_numpy(found if found.flags.writeable else found.copy())


def read_labels(y: Any, task: Task) -> tuple[Tensor, Tensor, Array]:
    """Return labels as a matrix, which of them count, and the classes.

    Args:
        y: Labels of any kind that :meth:`Reference.fit` takes.
        task: The task.

    Returns:
        The matrix ``(N, C)``, float64; which samples have a label, ``(N,)``; and the names of the columns, ``(C,)``.

    Raises:
        ValueError: If labels do not fit the task, or none counts.
    """
    values = y.detach().cpu() if isinstance(y, Tensor) else y
    array = np.asarray(values.float() if getattr(values, "dtype", None) == torch.bfloat16 else values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "fO" and any(each != each for each in array.flat):
        raise ValueError("Expected `y` without nan. Leave such samples out.")
    if task.name == "multiclass" and array.ndim == 1:
        return _indexed(array)
    labels = as_tensor(array.astype(float))
    if not bool(labels.isfinite().all()):
        raise ValueError("Expected `y` to be finite, but got inf. Leave such samples out.")
    shape = labels.shape[1:]
    task.check(torch.zeros(len(labels), *(() if task.has_one_output else shape)), labels)
    matrix = task.as_matrix(labels)
    return matrix, _some(task.has_label(labels)), np.arange(matrix.shape[1])


def _indexed(labels: Array) -> tuple[Tensor, Tensor, Array]:
    """Return the same for names of classes, ``(N,)``."""
    if labels.dtype.kind == "f":
        raise ValueError(
            f"Expected `y` to be class indices or names (N,), or probabilities (N, K), but got {labels.dtype}. Set "
            "task='binary' if they are from 0 to 1, task='regression' if they are measurements; make classes integers."
        )
    counts = labels != IGNORED
    _some(counts)
    classes, codes = np.unique(labels[counts], return_inverse=True)
    matrix = torch.zeros(len(labels), len(classes), dtype=torch.float64)
    matrix[np.flatnonzero(counts), codes] = 1.0
    return matrix, torch.from_numpy(counts), classes


def _some(counts: Any) -> Any:
    if not counts.any():
        raise ValueError(f"Expected a label in `y` that is not {IGNORED}, but got none.")
    return counts
