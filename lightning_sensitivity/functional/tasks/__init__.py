"""The tasks: how outputs and labels fit together in each, how predictions are scored, and what else differs.

Outputs of a network are ``(N, K)`` or ``(N,)``. All else is matrices ``(N, C)``: a column for each class,
also where one output tells two classes apart, or for each number of a regression. A label that is not known
is nan there. What differs between tasks is asked here alone: of a task that is looked up once.
"""

from lightning_sensitivity.functional.tasks.base import IGNORED, NUM_DRAWS, Binary, Multiclass
from lightning_sensitivity.functional.tasks.metrics import (
    AUROC,
    Accuracy,
    AnyMetric,
    ClosedForm,
    Measured,
    measure_mean,
)
from lightning_sensitivity.functional.tasks.multilabel import Multilabel
from lightning_sensitivity.functional.tasks.regression import Regression

Task = Multiclass | Multilabel | Regression
TASKS: dict[str, Task] = {task.name: task for task in (Multiclass(), Binary(), Multilabel(), Regression())}
TASK_NAMES = ", ".join(map(repr, TASKS))

__all__ = [
    "AUROC", "IGNORED", "NUM_DRAWS", "TASKS", "TASK_NAMES", "Accuracy", "AnyMetric", "ClosedForm", "Measured",
    "Task", "find_task", "measure_mean",
]  # fmt: skip


def find_task(name: str) -> Task:
    """Return the task of a name, or raise ValueError."""
    if name not in TASKS:
        raise ValueError(f"Expected `task` to be one of {TASK_NAMES}, but got {name!r}.")
    return TASKS[name]
