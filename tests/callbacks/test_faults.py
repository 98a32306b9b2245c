"""What fails after the first step costs a value or some samples, and is said; training goes on, bit by bit."""

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Linear, fitted, fitted_and_said, loader, logged, quick_risk, unlabelled_loader

BLIND = "|sees too little|worse than a constant"  # of fewer samples
KEPT, TRAINED = "could not keep a validation batch: .*of the user", "could not keep a training batch: .*"
NO_MEMORY = "could not measure the samples of dataloader 0: OutOfMemoryError.*out of memory.*#failed,"
Options = dict[str, Any]


class Fault(NamedTuple):
    """What each monitor warns of, a regular expression or None; what breaks; and options that make functions.

    Attributes:
        passes: What becomes of inputs and outputs in the passes of monitors in the second epoch.
        training: What becomes of a training batch.
    """

    sensitivity: str | None
    risk: str | None
    passes: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y
    training: Callable[[Any], Any] = lambda batch: batch
    options: Callable[[], tuple[Options, Options]] = lambda: ({}, {})  # of both monitors


class Subject(Linear):
    """A model with a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        is_now = not self.training and self.trainer.validating and self.current_epoch == 1
        return self.fault.passes(x, self.net(x)) if is_now else self.net(x)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.fault.training(batch) if self.trainer.training else batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return cross_entropy(self(batch[0]), batch[1].clamp(min=0)) if len(batch) > 1 else None


def no_memory(x: Tensor, y: Tensor) -> Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def failing(after: int, in_training: bool) -> Callable[[Any], Tensor]:
    """A function of the user that fails after some calls, on training batches or on validation batches."""
    calls = itertools.count(1)

    def function(batch: Any) -> Tensor:
        if isinstance(batch, list) == in_training and next(calls) > after:
            raise ValueError("in a function of the user")
        return batch[0] if isinstance(batch, list) else batch

    return function


def failing_noise() -> tuple[Options, Options]:
    noise = failing(5, False)
    return {"noise": lambda x, generator: 1.1 * noise(x)}, {}


def failing_targets() -> tuple[Options, Options]:
    check = failing(2, True)
    return {}, {"targets": lambda batch: [check(batch), batch[1]][1]}


FAULTS = {
    "no memory": Fault(NO_MEMORY, NO_MEMORY, no_memory),
    "no memory for noisy samples": Fault(NO_MEMORY, None, lambda x, y: no_memory(x, y) if x.min() < 0 else y),
    "more classes": Fault(None, "could not measure .*Sizes of tensors", lambda x, y: torch.cat([y, y], 1)),
    "training batches without labels": Fault(None, TRAINED + "`targets`" + BLIND,
        training=lambda batch: batch if batch[0][0, 0] < 0.5 else batch[:1]),
    "no label that counts": Fault(None, "No training sample has a label.*set `targets=`",
        training=lambda batch: [batch[0], batch[1] * 0 - 100]),
    "inputs=": Fault(KEPT, KEPT, options=lambda: ({"inputs": failing(1, False)}, {"inputs": failing(1, False)})),
    "noise=": Fault(".*of the user", None, options=failing_noise),
    "targets=": Fault(None, TRAINED + "of the user" + BLIND, options=failing_targets),
    "features=": Fault(None, TRAINED + "of the user" + BLIND, options=lambda: ({}, {"features": failing(2, True)})),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_said_once_and_training_goes_on_as_without_monitors(name: str) -> None:
    fault, data = FAULTS[name], (loader(), unlabelled_loader(seed=1))
    options: Options = {"max_epochs": 3, "num_sanity_val_steps": 0}
    of_sensitivity, of_risk = fault.options()
    monitors = [SensitivityMonitor(**of_sensitivity), quick_risk(**of_risk)]
    run, texts = fitted_and_said(monitors, model := Subject(fault), *data, **options)
    fitted([], other := Subject(fault), *data, **options)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert run.current_epoch == 3 and len(set(texts)) == len(texts)
    for monitor, pattern in (("SensitivityMonitor", fault.sensitivity), ("RiskMonitor", fault.risk)):
        found = [text for text in texts if text.startswith(f"`{monitor}` (val/*)")]
        assert bool(found) == (pattern is not None), texts
        assert all(re.search(pattern or "", text, re.DOTALL) for text in found), texts


def test_copies_of_monitors_measure_the_same() -> None:
    monitors: list[Any] = [SensitivityMonitor(), quick_risk()]
    makers = (lambda: pickle.loads(pickle.dumps(monitors)), lambda: monitors, lambda: copy.deepcopy(monitors))
    values = [logged(fitted(make(), Linear()), "val/") for make in makers]
    assert values[0] == values[1] == values[2]
    assert values[0].keys() >= {"val/output_sensitivity", "val/expected_loss"}
