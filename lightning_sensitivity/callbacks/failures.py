"""Failures of a monitor: an error before the first training step, one warning after it."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_sensitivity.functional.reporting import warn


class Failures:
    """Turn failures into an error before the first training step, and into one warning of each kind after it.

    Args:
        monitor: Name of the monitor's class.
        prefix: Prefix of what it logs.

    Attributes:
        is_strict: Whether a failure is an error.
        has_failed: Whether something has failed in the current validation.
    """

    def __init__(self, monitor: str, prefix: str) -> None:
        self._monitor = monitor
        self._prefix = prefix
        self._kinds: set[str] = set()
        self.is_strict = True
        self.has_failed = False

    def warn(self, kind: str, message: str, in_any_process: bool = False) -> None:
        """Warn once per kind; the message follows the name of the monitor."""
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        text = f"`{self._monitor}` ({self._prefix}*) {message}"
        if in_any_process:
            warn(text)
        else:
            rank_zero_only(warn)(text)

    def has_warned(self, kind: str) -> bool:
        """Return whether there was a warning of this kind."""
        return kind in self._kinds

    @contextmanager
    def warn_on_failure(self, what: str, consequence: str = "") -> Iterator[None]:
        """Turn an exception inside into a warning, or into an error that says what failed; see :attr:`is_strict`.

        Args:
            what: What failed, such as "could not measure a batch".
            consequence: A sentence that says what happens to the values.
        """
        try:
            yield
        except Exception as error:
            if self.is_strict:
                self._raise(what, error)
            self.has_failed = True
            self.warn(what, f"{what}: {describe_error(error)} {consequence}".rstrip(), in_any_process=True)
            if is_oom_error(error):
                free_memory(error)

    def _raise(self, what: str, error: Exception) -> None:
        if is_oom_error(error):
            raise error  # Lightning's batch-size finder needs it
        reason = describe_error(error)
        if isinstance(error, MisconfigurationException):
            if reason.startswith(f"`{self._monitor}`"):
                raise error
            raise MisconfigurationException(f"`{self._monitor}` {what}: {reason}") from error
        raise MisconfigurationException(
            f"`{self._monitor}` {what}: {reason} If `forward` takes other arguments, set `inputs=`, such as "
            "`inputs=lambda batch: batch['image']`."
        ) from error


def describe_error(error: Exception) -> str:
    """Describe an exception in a sentence."""
    if isinstance(error, MisconfigurationException):
        return str(error)
    reason = str(error).strip().rstrip(".")
    if isinstance(error, NotImplementedError) and not reason:
        reason = "a method that the model needs, such as `forward`, is missing"
    return f"{type(error).__name__}: {reason}." if reason else f"{type(error).__name__}."


def free_memory(error: Exception) -> None:
    """Free the memory of a pass that ran out of memory."""
    traceback.clear_frames(error.__traceback__)
    garbage_collection_cuda()
