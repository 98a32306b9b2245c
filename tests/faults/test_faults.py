"""Faults at moments: no run is lost, none is changed by a bit, and each monitor that is hit says so."""

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
from torch.nn.utils import parametrizations

from tests.faults.subject import MARK, Fault, Outcome, Subject, assert_same_run, run
from tests.helpers import first_tensor

SANITY, FIRST, BEFORE, ALL = ("sanity",), ("first",), ("sanity", "first"), ("sanity", "first", "later")
FLOATING, DENSE, LEARNED = "floating tensor", "dense floating", "count as entirely learned"
NO_VALUE, NAN = "could not measure the samples of dataloader 0: .*", math.nan
NO_FIRST, NO_REFERENCE, NONE = "|has no first value", "|has no reference", "|has no value"
BROKEN, NO_MEMORY = NO_VALUE + "broken", NO_VALUE + "OutOfMemoryError.*out of memory.*#out-of-memory$"
LEFT_OUT = "could not keep a training batch: .*"


def fail(message: str = "broken", error: type[Exception] = ValueError) -> Any:
    raise error(message)


def no_memory() -> Any:
    return fail("CUDA out of memory. Tried to allocate 1 GiB", torch.cuda.OutOfMemoryError)


def fill(y: Tensor, value: float, where: Any = 0) -> Tensor:
    y = y.clone()
    y[where] = value
    return y


def is_noisy(x: Tensor) -> bool:  # samples are in [0, 1], and noise brings one of a batch out of it
    return bool(x.min() < 0) or bool(x.max() > 1)


def note_weights(m: Subject) -> None:
    m.pointer = m.net[0].weight.data_ptr()


def is_twin(m: Subject) -> bool:
    return m.net[0].weight.data_ptr() != m.pointer


def one_of_three(m: Subject) -> bool:
    return next(m.calls) % 3 == 1


def to_ids(m: Subject, batch: Any) -> Any:
    return [(9 * batch[0]).long(), batch[1]]


def plain(m: Subject, batch: Any) -> Tensor:
    """A step that does not call the module in validation, and so never meets the fault."""
    return m(batch[0]) if m.training else m.net(batch[0])


def replace_head(m: Subject, num_classes: int = 4) -> None:
    m.net[4] = nn.Linear(16, num_classes)


def failing(kind: str, after: int) -> Callable[..., Any]:
    """A function of the user that fails after some calls, on samples for validation, or for training."""
    calls, is_of_training = itertools.count(1), kind in ("targets", "features")

    def function(value: Any, *rest: Any) -> Any:
        x = value[0] if isinstance(value, list) else value
        if (float(x[:, 0].mean()) > MARK / 2) == is_of_training and next(calls) > after:
            fail(f"in {kind}")
        return value[1] if kind == "targets" else value[0] if kind in ("inputs", "features") else 1.1 * value

    return function


FAULTS = {
    # samples that are not finite, and outputs that say nothing
    "nan sample": Fault("[13] samples gave nan", "[13] validation and 0 training .* nan", moments=ALL,
        y=lambda m, x, y: fill(y, NAN)),
    "all nan": Fault("20 samples gave nan" + NONE, "20 validation .* nan" + NO_FIRST, moments=ALL,
        y=lambda m, x, y: y * NAN),
    "nan kept sample": Fault(None, "0 validation and [13] training .* nan", kept=lambda m, y: fill(y, NAN)),
    "nan weights": Fault("20 .* gave nan" + NONE, "20 validation and 24 .*nan" + NO_FIRST, moments=("first", "later"),
        epoch=lambda m: m.net[4].bias.data.fill_(NAN)),
    # outputs that are none, or others
    "fewer classes with noise": Fault("the shape", y=lambda m, x, y: y[:, :3] if is_noisy(x) else y, step=plain),
    "complex outputs": Fault(FLOATING, FLOATING + NO_FIRST, "`outputs", step=plain, moments=ALL,
        y=lambda m, x, y: y + 0j),
    # batches
    "ids in a first validation": Fault(DENSE, batch=to_ids, moments=FIRST),
    "empty batches": Fault("no value", "could not keep|no value" + NO_REFERENCE + NO_FIRST, moments=FIRST,
        batch=lambda m, b: [part[:0] for part in b]),
    "single samples": Fault(None, "fewer than 8 samples", moments=FIRST, batch=lambda m, b: [part[:1] for part in b]),
    "without labels": Fault(batch=lambda m, b: b[:1], moments=ALL),
    "unlabelled training": Fault(None, LEFT_OUT + "`targets", train=lambda m, b: b[: 2 - one_of_three(m)]),
    "no label counts": Fault(None, "no kept training sample has a label" + NO_REFERENCE + NO_FIRST,
        train=lambda m, b: [b[0], b[1] * 0 - 100], loss=lambda y, t: cross_entropy(y, t.clamp_min(0))),
    "other batches in training": Fault(error="`inputs=`", train=lambda m, b: [b[:1], b[1]], moments=BEFORE,
        step=lambda m, b: m(first_tensor(b))),
    "uncopied batches": Fault(error="cannot estimate.*targets=", train=lambda m, b: [*b, (name for name in "ab")]),
    "a hook that raises": Fault(train=lambda m, b: fail() if m.is_now else b, batch=lambda m, b: fail(), moments=ALL),
    # a model that fails in some passes alone
    "no memory, noisy": Fault(NO_MEMORY, None, "out of memory", x=lambda m, x: no_memory() if is_noisy(x) else x,
        moments=("sanity", "later")),
    "no memory, twin": Fault(None, NO_MEMORY, init=note_weights, x=lambda m, x: no_memory() if is_twin(m) else x),
    "no pass": Fault(BROKEN, BROKEN + NO_FIRST, "broken", x=lambda m, x: fail(), step=plain, moments=ALL),
    # functions of the user
    "inputs=": Fault("could not keep.*in inputs", "could not keep.*in inputs" + NO_REFERENCE,
        options={"inputs": failing("inputs", 6)}),
    "outputs=": Fault("in outputs", "in outputs|no first value",
        options={"outputs": failing("outputs", 40)}),
    "targets=": Fault(None, LEFT_OUT + "in targets", r_options={"targets": failing("targets", 2)}),
    "features=": Fault(None, LEFT_OUT + "in features", r_options={"features": failing("features", 2)}),
    "noise=": Fault("in noise", s_options={"noise": failing("noise", 5)}),
    # modules that change
    "more classes": Fault(None, LEARNED + "|reference", epoch=lambda m: replace_head(m, 5)),
    "parametrized later": Fault(None, LEARNED, epoch=lambda m: parametrizations.weight_norm(m.net[4])),
    "lazy layers that a sanity check makes": Fault(init=lambda m: m.net.append(nn.LazyLinear(4)), moments=SANITY),
    "weights of another": Fault(error="`initial_weights`", r_options={"initial_weights": {"other": torch.zeros(1)}}),
}  # fmt: skip


def assert_warned(outcome: Outcome, fault: Fault, may_be_silent: bool) -> None:
    for monitor, pattern in (("SensitivityMonitor", fault.sensitivity), ("RiskMonitor", fault.risk)):
        messages = outcome.warnings_of(monitor)
        assert bool(messages) == (pattern is not None) or (may_be_silent and not messages), messages
        assert all(re.search(rf"^`{monitor}` \(val/\*\) .*({pattern})", text, re.DOTALL) for text in messages), messages
        assert all(count <= 2 for count in Counter(messages).values())  # again where it gets worse


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
    assert values[0].keys() >= {"val/output_sensitivity", "val/risk_estimate"}
