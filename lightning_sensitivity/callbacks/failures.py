"""One rule for what goes wrong: before the first training step it is an error, after it one warning a kind."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error


class Failures:
    """What has failed in a run, and what was said of it.

    Args:
        name: Of the monitor's class.
        prefix: Of the names that it logs.

    Attributes:
        is_strict: Whether what fails is an error: until the first training step.
        has_failed: Whether something has failed in the validation that runs.
        warned_of: The kinds of trouble that were warned of.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix = name, prefix
        self.is_strict, self.has_failed, self.warned_of = True, False, set[str]()

    def warn(self, kind: str, message: str, in_any_process: bool = False) -> None:
        """Warn, once a kind; the message goes behind the name of the monitor."""
        if kind not in self.warned_of:
            self.warned_of.add(kind)
            warn = warnings.warn if in_any_process else rank_zero_warn
            warn(f"`{self._name}` ({self._prefix}*) {message}", stacklevel=2)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Let an exception inside be an error that says what failed, or a warning; see :attr:`is_strict`."""
        try:
            yield
        except Exception as error:
            is_told = isinstance(error, MisconfigurationException)
            if self.is_strict and (is_told or is_oom_error(error)):
                raise  # out of memory: Lightning's finder of batch sizes waits for it
            reason = str(error) if is_told else f"{type(error).__name__}: {str(error).strip().rstrip('.')}."
            if self.is_strict:
                raise MisconfigurationException(
                    f"`{self._name}` {what}: {reason} If `forward` takes something else than was chosen, say"
                    " what with `inputs=`, such as `inputs=lambda batch: (batch,)` for the whole batch."
                ) from error
            self.has_failed = True
            self.warn(what, f"{what}: {reason}", in_any_process=True)
            if is_oom_error(error):
                traceback.clear_frames(error.__traceback__)  # which hold what the pass had on the device
                garbage_collection_cuda()
