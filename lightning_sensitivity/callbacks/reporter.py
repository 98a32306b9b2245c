"""What a monitor says: an error before the first training step, and warnings after it, each once."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_sensitivity.callbacks.checks import LOGITS
from lightning_sensitivity.messages import Refused, describe_error, link_to
from lightning_sensitivity.model.entries import inputs_hint

_SOME_VALIDATIONS = 3  # after which logits of a classifier have left [0, 1]


class Reporter:
    """A voice that says each thing once, and turns failures into errors or warnings.

    Args:
        monitor: Name of the monitor's class.
        prefix: Prefix of what it logs.
    """

    def __init__(self, monitor: str, prefix: str) -> None:
        self._monitor = monitor
        self._prefix = prefix
        self._said: set[str] = set()
        self._outputs_may_be: list[bool] = []  # probabilities, by validation
        self._hint = ""  # how to select the inputs of the batch that is read

    def look_at(self, batch: object) -> None:
        """Look at a batch that is read, so that a failure can name its entries."""
        self._hint = inputs_hint(batch)

    def warn(self, entry: str, message: str, kind: str = "") -> None:
        """Warn in the first process, once.

        Args:
            entry: The entry of the page on troubleshooting.
            message: What follows the name of the monitor, as whole sentences.
            kind: What tells this warning from others of the same entry.
        """
        if self._is_new(entry + kind):
            rank_zero_warn(self._text(entry, message))

    def note_outputs(self, may_be_probabilities: bool) -> None:
        """Note whether outputs of a validation may be probabilities, and warn after some that all may be."""
        self._outputs_may_be.append(may_be_probabilities)
        if len(self._outputs_may_be) >= _SOME_VALIDATIONS:
            self.finish()

    @property
    def may_be_probabilities(self) -> bool:
        """Whether outputs of all validations so far may be probabilities."""
        return len(self._outputs_may_be) > 0 and all(self._outputs_may_be)

    def finish(self) -> None:
        """Warn of what only the end of a run, or some validations, can tell."""
        if self.may_be_probabilities:
            self.warn("arguments", f"got outputs that all lie in [0, 1]. If they are probabilities, set {LOGITS}.")

    @contextmanager
    def refuse_failure(self, what: str) -> Iterator[None]:
        """Turn an exception inside into one that says what failed, and what may help.

        Args:
            what: What failed, such as "could not measure the samples".
        """
        try:
            yield
        except Warning:  # the user, or a test, has made warnings errors
            raise
        except Exception as error:
            raise self._as_error(what, error) from error

    @contextmanager
    def report_failure(self, what: str, consequence: str) -> Iterator[None]:
        """Turn an exception inside into a warning.

        Args:
            what: What failed, such as "could not measure the samples".
            consequence: A sentence that says what happens to the values.
        """
        try:
            yield
        except Warning:  # the user, or a test, has made warnings errors
            raise
        except Exception as error:
            entry = getattr(error, "entry", "failed")
            if is_oom_error(error):
                entry = "out-of-memory"
                traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
                garbage_collection_cuda()
            if self._is_new(what):  # in the process where it happens
                text = f"{what}: {describe_error(error)} {consequence}"
                warnings.warn(self._text(entry, text), stacklevel=3)

    def _is_new(self, kind: str) -> bool:
        """Return whether something has not been said yet, and remember it."""
        is_new = kind not in self._said
        self._said.add(kind)
        return is_new

    def _text(self, entry: str, message: str) -> str:
        return f"`{self._monitor}` ({self._prefix}*) {message}{link_to(entry)}"

    def _as_error(self, what: str, error: Exception) -> Exception:
        if is_oom_error(error):
            return error  # Lightning's batch-size finder needs it
        reason = describe_error(error)
        is_clear = isinstance(error, MisconfigurationException) or reason.startswith("Expected")
        of_call = ", or `call=lambda module, batch: ...`" if self._monitor == "RiskMonitor" else ""
        which = f"set {self._hint or '`inputs=`'}{of_call}"
        advice = "" if is_clear else f" If `forward` takes other arguments, {which}."
        return Refused(f"`{self._monitor}` {what}: {reason}{advice}", getattr(error, "entry", "arguments"))
