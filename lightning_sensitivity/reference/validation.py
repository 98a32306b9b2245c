"""Samples and labels in any form, as a reference takes them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from lightning_sensitivity.functional.tasks import IGNORED, Task
from lightning_sensitivity.reference.kinds import KINDS, Array, Samples, Seen, kind_of
from lightning_sensitivity.reference.observations import is_missing

_LARGEST = torch.finfo(torch.float32).max
_PROBLEMS: dict[str, Callable[[Array], bool]] = {  # of columns of a data frame
    "are dates: take numbers of them, such as days": lambda column: column.dtype.kind in "Mm",
    "are no numbers: use `pandas.get_dummies`": lambda column: column.dtype.kind not in "biuf",
    "have missing values: impute them, with a flag column for each": lambda column: np.isnan(column).any(),
}


def read_samples(x: Samples, names: Array = None, kind: str = "") -> Seen:
    """Return what is seen of samples, checked.

    Args:
        x: A mapping by kind, a data frame, whose columns are numbers and flags, or a tensor, array or list,
            whose kind follows from its dimensions and type.
        names: The columns of a data frame that are wanted, in this order; None for all.
        kind: The kind of a tensor, array or list, if it is known.

    Raises:
        ValueError: If there is no sample, or what is there are no finite numbers.
        TypeError: If it is sparse.
    """
    if not isinstance(x, Mapping):
        x = {kind: x}
    elif not x or not x.keys() <= KINDS.keys():
        raise ValueError(f"Expected `x` to have {', '.join(KINDS)}, but got {', '.join(map(str, x))}.")
    return dict(_read(values, kind, names) for kind, values in x.items())


def _read(x: Samples, kind: str, names: Array) -> tuple[str, Tensor]:
    """Return the kind of samples, and their numbers."""
    if hasattr(x, "columns"):  # a data frame
        names = list(x.columns if names is None else names)
        _refuse("are missing", [name for name in names if name not in x.columns])
        columns = {name: np.asarray(x[name]) for name in names}
        for problem, has_problem in _PROBLEMS.items():
            _refuse(problem, [name for name, column in columns.items() if has_problem(column)])
        x = np.column_stack([*columns.values()]).astype(float)
    values = _as_tensor("x", x)
    if values.dtype == torch.float64 and bool((values.abs() > _LARGEST).any()):  # a forest sees single precision
        raise ValueError("Input x contains infinity or a value too large for dtype('float32').")
    kind = kind or kind_of(values)
    return kind, KINDS[kind].read(values)


def _as_tensor(name: str, values: Array) -> Tensor:
    """Return finite real numbers, ``(N, ...)``, on the CPU."""
    options = {"dtype": "numeric", "ensure_2d": False, "allow_nd": True, "input_name": name}
    numbers = check_array(_as_array(name, values), **options)
    return torch.from_numpy(np.require(numbers, requirements=["C", "W"]))


def _as_array(name: str, values: Array) -> Array:
    """Return tensors as arrays, which have no bfloat16; all else stays as it is."""
    if not isinstance(values, Tensor):
        return values
    if values.layout != torch.strided:
        raise TypeError(f"Expected `{name}` to be dense, but got {values.layout}: use `to_dense()`.")
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _refuse(problem: str, columns: list[str]) -> None:
    if columns:
        raise ValueError(f"Columns of `x` {problem}: {', '.join(map(repr, columns))}.")


def read_labels(y: Array, task: Task) -> tuple[Tensor, Array]:
    """Return labels that fit the task, and what the columns of their matrix stand for, ``(C,)``.

    Args:
        y: Labels of any kind that :meth:`Reference.fit` takes.
        task: The task.

    Raises:
        ValueError: If labels do not fit the task, or none counts.
    """
    array = np.asarray(_as_array("y", y))
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if task.has_indices and array.ndim == 1:
        if array.dtype.kind not in "biuOUS":
            raise ValueError(
                f"Expected `y` to be integers or names of classes (N,), or probabilities (N, K), got {array.dtype}. "
                "Set task='binary' if they are from 0 to 1, task='regression' if they are measurements. Leave samples "
                "without a label out."
            )
        if array.dtype.kind == "O" and any(map(is_missing, array)):
            raise ValueError("Expected names of classes in `y`, but some are None or nan: leave these samples out.")
        counts = np.asarray(array != IGNORED)
        classes, indices = np.unique(array[counts], return_inverse=True)
        labels = torch.full((len(array),), IGNORED)
        labels[torch.from_numpy(counts)] = torch.from_numpy(indices)
    else:
        try:
            numbers = array.astype(float)
        except (TypeError, ValueError) as error:
            names = "leave `task` out if they are names of classes"
            raise ValueError(
                f"Expected `y` to be numbers for task={task.name!r}, but got {array.dtype}: {names}."
            ) from error
        is_known = torch.from_numpy(~np.isnan(numbers))
        labels = _as_tensor("y", np.nan_to_num(numbers, posinf=np.inf, neginf=-np.inf)).where(is_known, torch.nan)
        shape = tuple(labels.shape[1:])
        task.check(torch.zeros(len(labels), *(() if task.has_one_output else shape)), labels)
        classes = np.arange(task.num_columns(shape))
    if not bool(task.has_label(labels).any()):
        raise ValueError(f"Expected a label in `y` that is not {IGNORED} or nan, but got none.")
    return labels, classes
