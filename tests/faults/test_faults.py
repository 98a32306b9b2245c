"""Faults at moments: no run is lost, none is changed by a bit, and each monitor that is hit says so.

To add a fault, say what is warned of, or which error is raised before the first step, and what breaks:

    "outputs that are all nan": Fault("20 samples gave nan", "20 samples gave nan",
        validation_output=lambda y: y * math.nan),
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.faults.subject import Fault, Outcome, assert_same_run, is_of_training, run
from tests.helpers import first_tensor

SANITY, FIRST, BEFORE, ALL = ("sanity",), ("first",), ("sanity", "first"), ("sanity", "first", "later")
NO_VALUE = "could not measure the samples of dataloader 0: .*"
BROKEN, NO_MEMORY = NO_VALUE + "broken", NO_VALUE + "OutOfMemoryError.*out of memory.*#out-of-memory,"
KEPT_LESS, TRAINED_LESS = "could not keep a validation batch: .*", "could not keep a training batch: .*"
BLIND = "|sees too little|worse than a constant"  # of fewer samples
NAN, FLOATING = "[13] samples gave nan", "should select a floating tensor"


def fail(message: str = "broken", error: type[Exception] = ValueError) -> Any:
    raise error(message)


def no_memory() -> Any:
    return fail("CUDA out of memory. Tried to allocate 1 GiB", torch.cuda.OutOfMemoryError)


def with_nan(y: Tensor) -> Tensor:
    return y.index_fill(0, torch.tensor([0]), math.nan)


def is_noisy(x: Tensor) -> bool:  # samples are in [0, 1], and noise brings one of a batch out of it
    return bool(x.min() < 0) or bool(x.max() > 1)


def plain(model: Any, batch: Any) -> Tensor:
    """A step that does not call the module in validation, and so never meets the fault."""
    return model(batch[0]) if model.training else model.net(batch[0])


def every_third(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    calls = itertools.count()
    return lambda batch: change(batch) if next(calls) % 3 == 1 else batch


def failing(after: int, of_training: bool, result: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of the user that fails after some calls, on training samples or on validation samples."""
    calls = itertools.count(1)

    def function(value: Any, *rest: Any) -> Any:
        if is_of_training(first_tensor(value)) == of_training and next(calls) > after:
            fail("in a function of the user")
        return result(value)

    return function


FAULTS = {
    # samples that are not finite, and outputs that say nothing
    "nan for some samples": Fault(NAN, NAN, moments=ALL, validation_output=with_nan),
    "nan for all samples": Fault("20 samples gave nan", "20 samples gave nan|has no value", moments=ALL,
        validation_output=lambda y: y * math.nan),
    # outputs that are none, or others
    "fewer classes with noise": Fault("the shape", step=plain,
        validation_input=lambda x: fail("the shape") if is_noisy(x) else x),
    # batches
    "ids in a first validation": Fault("dense floating", "expects nothing of dataloader 0", moments=FIRST,
        validation_batch=lambda batch: [(9 * batch[0]).long(), batch[1]]),
    "a validation of no samples": Fault("there is no value", None, moments=FIRST,
        validation_batch=lambda batch: [part[:0] for part in batch]),
    "validation without labels": Fault(moments=ALL, validation_batch=lambda batch: batch[:1]),
    "training batches without labels": Fault(None, TRAINED_LESS + "`targets`" + BLIND,
        training_batch=every_third(lambda batch: batch[:1])),
    "no label that counts": Fault(None, "No training sample has a label.*set `targets=`",
        training_batch=lambda batch: [batch[0], batch[1] * 0 - 100],
        loss=lambda y, t: cross_entropy(y, t.clamp_min(0))),
    "a hook that raises": Fault(moments=ALL, validation_batch=lambda batch: fail()),
    # a model that fails in some passes alone
    "no memory for noisy samples": Fault(NO_MEMORY, None, "out of memory", moments=("sanity", "later"),
        validation_input=lambda x: no_memory() if is_noisy(x) else x),
    "no pass": Fault(BROKEN, BROKEN, "broken", moments=ALL, validation_input=lambda x: fail(), step=plain),
    # functions of the user
    "inputs=": Fault(KEPT_LESS + "of the user", KEPT_LESS + "of the user|has no (value|reference)" + BLIND,
        options={"inputs": failing(5, False, lambda batch: batch[0])}),
    "outputs=": Fault(NO_VALUE + "of the user", NO_VALUE + "of the user",
        options={"outputs": failing(25, False, lambda y: y)}),
    "targets=": Fault(None, TRAINED_LESS + "of the user|has no reference" + BLIND,
        risk_options={"targets": failing(2, True, lambda batch: batch[1])}),
    "features=": Fault(None, TRAINED_LESS + "of the user|has no reference" + BLIND,
        risk_options={"features": failing(2, True, lambda batch: batch[0])}),
    "noise=": Fault(NO_VALUE + "of the user",
        sensitivity_options={"noise": failing(5, False, lambda x: 1.1 * x)}),
    # modules that change
    "more classes": Fault(None, "could not (measure|compute) .*", before_epoch=lambda m: m.net.append(nn.Linear(4, 5))),
    "lazy layers that a sanity check makes": Fault(None, "worse than a constant", moments=SANITY,
        before_fit=lambda m: m.net.append(nn.LazyLinear(4))),
}  # fmt: skip


def assert_warned(outcome: Outcome, fault: Fault, may_be_silent: bool) -> None:
    for monitor, pattern in (("SensitivityMonitor", fault.sensitivity), ("RiskMonitor", fault.risk)):
        messages = outcome.warnings_of(monitor)
        assert bool(messages) == (pattern is not None) or (may_be_silent and not messages), messages
        assert all(re.search(rf"^`{monitor}` \(val/\*\) .*({pattern})", text, re.DOTALL) for text in messages), messages
        assert all(count == 1 for count in Counter(messages).values())


@pytest.mark.parametrize(("name", "moment"), [(name, moment) for name in FAULTS for moment in FAULTS[name].moments])
def test_nothing_waits(name: str, moment: str) -> None:
    fault = FAULTS[name]
    bare, monitored = run(fault, moment), run(fault, moment, fault.monitors())
    if fault.error and (moment == "sanity" or not (fault.sensitivity or fault.risk)):
        assert isinstance(monitored.error, MisconfigurationException | torch.cuda.OutOfMemoryError), monitored.error
        assert re.search(fault.error, str(monitored.error)), monitored.error
        assert monitored.trainer.global_step == 0 and bare.error is None
        return
    assert_same_run(monitored, bare)
    assert (monitored.error is None) == (name != "a hook that raises")
    assert_warned(monitored, fault, may_be_silent=moment == "sanity")


def test_copies_of_monitors_measure_the_same() -> None:
    monitors = Fault().monitors()
    makers = (lambda: pickle.loads(pickle.dumps(monitors)), lambda: monitors, lambda: copy.deepcopy(monitors))
    values = [run(Fault(), "later", make()).trainer.callback_metrics for make in makers]
    assert values[0] == values[1] == values[2]
    assert values[0].keys() >= {"val/output_sensitivity", "val/expected_score"}
