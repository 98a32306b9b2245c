"""Check arguments: one clear exception names the argument, what was expected and what it got."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS, Task

BLIND = (  # ends what is said of a reference
    ", so nothing says when to stop. Callbacks that monitor it take the last epoch: label some validation samples "
    "(`validation_labels=True`), or set `features=`."
)

Selector: TypeAlias = Callable[[Any], Any]  # selects a part of a batch or of a model's outputs


class Refused(MisconfigurationException):
    """An error that says what is wrong, and where it is written what to do about it.

    Args:
        reason: What is wrong, in whole sentences.
        entry: The entry of the page on troubleshooting that says what to do.
    """

    def __init__(self, reason: str, entry: str = "arguments") -> None:
        super().__init__(reason)
        self.reason = reason
        self.entry = entry

    def __str__(self) -> str:
        """Return the reason, and where there is more."""
        return self.reason + link_to(self.entry)


@contextmanager
def refuse_on_error(what: str, entry: str = "arguments") -> Iterator[None]:
    """Turn an exception inside into one that says what failed; warnings that are errors pass.

    Args:
        what: What failed.
        entry: The entry of the page on troubleshooting.
    """
    try:
        yield
    except Warning:  # the user's own filters make an exception of it
        raise
    except Exception as error:
        raise Refused(f"{what}: {describe_error(error)}", entry) from error


def describe_error(error: Exception) -> str:
    """Describe an exception in a sentence."""
    if isinstance(error, MisconfigurationException):
        return getattr(error, "reason", str(error))
    reason = str(error).strip().rstrip(".")
    if isinstance(error, ValueError) and reason:
        return f"{reason}."
    return f"{type(error).__name__}: {reason}".removesuffix(": ") + "."


def check_argument(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise MisconfigurationException unless an argument is valid; the message says what it should be."""
    if not valid:
        raise MisconfigurationException(f"`{name}` should be {expected}, got {value!r}.")


def check_int(name: str, value: object, minimum: int, optional: bool = False) -> None:
    """Require an int (not a bool) of at least a minimum, or None if it is optional."""
    is_int = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum
    check_argument(name, value, is_int or (optional and value is None), f"an int of {minimum} or more")


def check_bool(name: str, value: object) -> None:
    """Require a bool."""
    check_argument(name, value, isinstance(value, bool), "a bool")


def check_task(task: str, loss: object, reference: object) -> Task:
    """Return the task of a name; require a loss, and an estimator of scikit-learn that can do the task, or None."""
    check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
    check_argument("loss", loss, loss is None or callable(loss), "a function of outputs and labels, or None")
    method = TASKS[task].estimator_method
    needed = ("get_params", "fit", method)
    is_estimator = all(hasattr(reference, each) for each in needed) and not isinstance(reference, type)
    expected = f"an estimator of scikit-learn with `{method}`, or None"
    check_argument("reference", reference, reference is None or is_estimator, expected)
    return TASKS[task]


def describe(value: object) -> str:
    """Describe a value for an error message."""
    if isinstance(value, Tensor):
        shape = "" if value.is_nested else f" and shape {tuple(value.shape)}"
        return f"a tensor of {value.dtype}{shape}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, list | tuple):
        items = ", ".join(map(describe, value[:5]))
        more = ", ..." if len(value) > 5 else ""
        return f"{type(value).__name__} of {len(value)}: {items}{more}"
    return type(value).__name__


def link_to(entry: str) -> str:
    """Name the entry that says more about a message; what to do is in the message itself."""
    return f" (More: docs/troubleshooting.md#{entry}, in the source folder.)"
