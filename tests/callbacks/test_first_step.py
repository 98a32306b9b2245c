"""The first training step is watched: the network should get in it what we send."""

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.callbacks.checks import FirstStep
from lightning_sensitivity.reading.reader import BatchReader
from tests.helpers import Linear, fitted_and_said, labelled, loader, module, quick_risk

Step = Callable[[Any, Tensor, Tensor], Any]
ADVICE = "Do what the step does with inputs and outputs in `forward`, or in `inputs=` and `outputs=`."


class Stepping(Linear):
    """Its training step is a function of module, inputs and labels."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.step(self, *batch)


class Case(NamedTuple):
    """A step, what is said of it (None: nothing), and the options of the monitor."""

    step: Step
    said: str | None = None
    options: Any = None


def plain(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m(x), y)


def scaled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m((x - 0.5) / 0.1), y)


def saving(m: Any, x: Tensor, y: Tensor) -> Tensor:
    torch.save(m, io.BytesIO())
    return plain(m, x, y)


def masked(m: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return cross_entropy(m(x, mask=mask), y)


def told(std: str) -> str:
    """A pattern of what is said of inputs that are scaled in the step: without that they are 0.5 ± 0.29."""
    return rf"`forward` gets \S+ ± {std}\d* in the step, and 0\.4\d+ ± 0\.2\d+ from us"


SCALED, SHAPE = told(r"2\.[89]"), r"`forward` gets an input of shape \(32, 12\) in the step, and \(16, 12\) from us"
CASES = {
    "plain": Case(plain),
    "recomputed": Case(lambda m, x, y: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum()),
    "repeated": Case(lambda m, x, y: cross_entropy(m(x.repeat(2, 1)), y.repeat(2)), SHAPE),
    "normalized": Case(scaled, SCALED),
    "normalized, said by inputs=": Case(scaled, None, options={"inputs": lambda batch: (batch[0] - 0.5) / 0.1}),
    "from -1 to 1": Case(lambda m, x, y: plain(m, 2 * x - 1, y), told(r"0\.5")),
    "rounded": Case(lambda m, x, y: plain(m, x.bfloat16().float(), y)),
    "augmented": Case(lambda m, x, y: plain(m, x.lerp(x.flip(0), torch.rand(())) + 0.1 * torch.randn_like(x), y)),
    "written to": Case(lambda m, x, y: plain(m, x.mul_(3), y), told(r"0\.8")),
    "normalized in a second call": Case(lambda m, x, y: plain(m, x, y) + scaled(m, x, y)),
    "saved": Case(saving),
    "forward itself, or a part of it": Case(lambda m, x, y: cross_entropy(m.forward(x), y) + m.net(-x).sum()),
}  # fmt: skip


def said(model: Any, monitors: Any, **options: Any) -> list[str]:
    """What monitors say in a short fit."""
    kwargs = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, **options}
    return fitted_and_said(monitors, model, loader(64, seed=2), **kwargs)[1]


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_does_not_compute_what_is_measured_is_said_once(name: str) -> None:
    case = CASES[name]
    texts = said(Stepping(case.step), SensitivityMonitor(**(case.options or {})))
    assert len(texts) == bool(case.said), texts
    start = r"`SensitivityMonitor` \(val/\*\) may not measure what your step computes: "
    assert all(re.match(f"{start}{case.said}\\.", text) and ADVICE in text for text in texts), texts


class Masked(Stepping):
    """Its batches have a mask beside labels, which `forward` may take."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(x if mask is None else x * mask)


MASKS: dict[str, tuple[Step, Any, str | None]] = {
    "a mask that is not sent": (masked, None, "`forward` gets `mask` in the step, and not from us"),
    "a mask that is sent": (masked, lambda batch: (batch[0], batch[2]), None),
    "a mask that the step leaves out": (
        lambda m, x, y, mask: plain(m, x, y), lambda batch: (batch[0], batch[2]),
        "`forward` gets `mask` from us, and not in the step"),
    "another mask": (lambda m, x, y, mask: masked(m, x, y, 1 - mask), lambda batch: (batch[0], batch[2]),
        "`forward` gets 0.333 ± 0.471 in the step, and 0.667 ± 0.471 from us"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_all_that_forward_gets_is_compared(name: str) -> None:
    step, select, expected = MASKS[name]
    x, y = labelled(64, seed=2).tensors
    batches = DataLoader(TensorDataset(x, y, (torch.arange(64 * 12).reshape(64, 12) % 3 > 0).long()), 16)
    monitor = SensitivityMonitor(inputs=select)
    options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    _, texts = fitted_and_said([monitor], Masked(step), batches, batches, **options)
    assert [expected in text for text in texts] == [True] * bool(expected), texts


def test_passes_of_another_monitor_are_not_the_steps_and_each_says_it() -> None:
    for step, count in ((plain, 0), (scaled, 2)):
        texts = said(Stepping(step), [SensitivityMonitor(), quick_risk()])
        assert len(texts) == count and all(re.search(SCALED, text) for text in texts)


def test_only_the_first_step_is_watched_and_nothing_stays_also_when_it_raises() -> None:
    watched = list[bool]()
    model = Stepping(lambda m, x, y: (watched.append(bool(m._forward_pre_hooks)), plain(m, x, y))[1])
    assert said(model, [SensitivityMonitor(), quick_risk()]) == []
    assert watched == [True, False, False, False]
    model = Stepping(lambda m, x, y: plain(m, x[:, :1], y))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        said(model, [SensitivityMonitor(), quick_risk()])
    assert not model._forward_pre_hooks


def test_a_call_by_which_lightning_runs_a_step_is_not_one_of_the_network() -> None:
    model, (x, y), watch = Stepping(scaled), next(iter(loader(16))), FirstStep()
    watch.start(model, (x, y), BatchReader())
    as_ddp_does = module(lambda self, *args: model(*args))
    _ForwardRedirection()(as_ddp_does, model, "training_step", (x, y), 0)
    assert re.match(SCALED, watch.stop() or "")


def test_compiled_code_is_compiled_as_often_as_without_a_monitor() -> None:
    graphs, numbers = list[int](), list[int]()

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(len(example))
        return graph

    for monitors in ([], SensitivityMonitor()):
        torch.compiler.reset()
        (model := Stepping(plain)).compile(backend=backend)
        assert said(model, monitors, num_sanity_val_steps=0) == []
        numbers.append(len(graphs))
    assert numbers[1] == 2 * numbers[0] > 0
