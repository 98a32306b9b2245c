"""A pytest plugin: both monitors in every Trainer that Lightning's tests make. CONTRIBUTING.md says how to run it."""

from collections import Counter
from functools import wraps

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.run import Phase

COUNTS = Counter()


class Risk(RiskMonitor):  # at the top of a module, where spawned processes find it
    pass


class Sensitivity(SensitivityMonitor):
    pass


def labels(batch):  # most of Lightning's batches are tensors, without labels
    return (batch[:, 0] > 0).long() if isinstance(batch, Tensor) else batch[1]


def until_refused(hook):
    def guarded(self, *args, **kwargs):
        if not hasattr(self, "has_refused"):
            try:
                hook(self, *args, **kwargs)
            except MisconfigurationException as error:
                assert self.run.phase is Phase.BEFORE_FIRST_STEP  # where a user reads it; later nothing ends a run
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
        self.callbacks += [Risk(targets=labels, prefix="injected/"), Sensitivity(prefix="injected/")]
        self.callbacks.sort(key=lambda each: isinstance(each, pl.callbacks.Checkpoint))  # these stay last

    pl.Trainer.__init__ = init_with_monitors


def pytest_terminal_summary(terminalreporter):
    for text, count in COUNTS.most_common():
        terminalreporter.write_line(f"{count} {text}")
