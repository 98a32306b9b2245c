"""A pytest plugin: both monitors in every Trainer that Lightning's tests make. CONTRIBUTING.md says how to run it."""

from collections import Counter
from functools import wraps

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

COUNTS = Counter()


class Risk(RiskMonitor):  # at the top of a module, from which a spawned process can load it
    pass


class Sensitivity(SensitivityMonitor):
    pass


def until_refused(hook):
    def guarded(self, *args, **kwargs):
        if not hasattr(self, "has_refused"):
            try:
                hook(self, *args, **kwargs)
            except MisconfigurationException as error:  # what a user reads before the first step
                COUNTS[f"refused: {str(error)[:150]}"] += 1
                self.has_refused = True
                self.run.free()

    return guarded


for monitor in (Risk, Sensitivity):
    for name in dir(pl.Callback):
        if name.startswith("on_") or name in ("setup", "teardown"):
            setattr(monitor, name, until_refused(getattr(monitor, name)))


def pytest_configure():
    init = pl.Trainer.__init__

    @wraps(init)
    def init_with_monitors(self, *args, **kwargs):
        init(self, *args, **kwargs)
        COUNTS["Trainers"] += 1
        is_last = [isinstance(each, pl.callbacks.Checkpoint) for each in self.callbacks]
        at = is_last.index(True) if any(is_last) else len(is_last)
        self.callbacks[at:at] = [Risk(prefix="injected/"), Sensitivity(prefix="injected/")]

    pl.Trainer.__init__ = init_with_monitors


def pytest_terminal_summary(terminalreporter):
    for text, count in COUNTS.most_common():
        terminalreporter.write_line(f"{count} {text}")
