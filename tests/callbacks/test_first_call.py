"""The first training step is watched: it should call the model on the inputs that are measured."""

import functools
import io
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as torch_module

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import NUM_FEATURES, Classifier, Linear, fitted_and_said, loader

Step = Callable[[Any, Tensor, Tensor], Any]
ADVICE = "Do what the step does with inputs and outputs in `forward`, or in `inputs=` and `outputs=`."


class Stepping(Linear):
    """Its training step is a function of module, inputs and labels."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, mask: Any = None, scale: float = 1.0, labels: Tensor | None = None) -> Tensor:
        logits = scale * self.net(x if mask is None else x * mask)
        return logits if labels is None else cross_entropy(logits, labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.step(self, *batch)


class TwoParts(Stepping):
    """No part holds all parameters."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Nested(TwoParts):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda h: self.head(h))(self.net(x))


class WithProperties(TwoParts):
    """Its properties raise, or draw random numbers, if they are asked for."""

    @property
    def noise(self) -> Tensor:
        return torch.randn(3)

    @property
    def unset(self) -> Tensor:
        raise ValueError("call `set_data` first")


class Manual(TwoParts):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.step(self, *batch))
        self.optimizers().step()


class Skipping(Stepping):
    """It skips the first steps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.step(self, *batch) if batch_idx > 1 else None


class Case(NamedTuple):
    """A step, what is said of it (None: nothing), the module, and the options of the monitors."""

    step: Step
    said: str | None = None
    module: Any = Stepping
    options: Any = None


def plain(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m(x), y)


def scaled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m((x - 0.5) / 0.1), y)


def around(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m.head(m.net(x)), y)


SHAPES = "the step calls the model with other arguments: `x` is missing, new or of another shape"
MASK = SHAPES.replace("`x`", "`mask`")
VALUES = "the step calls the model with other values of `x`, though it draws no random numbers"
CALL = "the step does not call `forward`, which is measured"
CASES = {
    # its inputs
    "plain": Case(plain),
    "recomputed": Case(lambda m, x, y: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum()),
    "repeated": Case(lambda m, x, y: cross_entropy(m(x.repeat(2, 1)), y.repeat(2)), SHAPES),
    "normalized": Case(scaled, VALUES),
    "normalized, said by inputs=": Case(scaled, None, options={"inputs": lambda batch: (batch[0] - 0.5) / 0.1}),
    "in another order": Case(lambda m, x, y: cross_entropy(m(x.flip(0)), y.flip(0)), VALUES),
    "rounded": Case(lambda m, x, y: plain(m, x.bfloat16().float(), y)),
    "sparse": Case(lambda m, x, y: plain(m, x.to_sparse(), y)),  # which can't be compared
    "augmented": Case(lambda m, x, y: plain(m, x + torch.randn_like(x), y)),
    "augmented by Python": Case(lambda m, x, y: plain(m, x * random.random(), y)),
    "augmented by NumPy": Case(lambda m, x, y: plain(m, x * np.random.rand(), y)),
    "written to": Case(lambda m, x, y: plain(m, x.mul_(3), y), VALUES),
    "written to after the call": Case(lambda m, x, y: (plain(m, x.clone(), y), x.zero_())[0]),
    "a mask that is given": Case(lambda m, x, y: cross_entropy(m(x, (x > 0.5).float()), y), MASK),
    "labels that are given": Case(lambda m, x, y: m(x, labels=y)),
    # its call
    "a part with all parameters": Case(lambda m, x, y: cross_entropy(m.net(x), y)),
    "around forward": Case(around, CALL, TwoParts),
    "forward itself": Case(lambda m, x, y: cross_entropy(m.forward(x), y), None, TwoParts),
    "forward itself, by a function": Case(lambda m, x, y: cross_entropy(m.forward(x), y), None, Nested),
    "around forward, with properties that nobody asks for": Case(
        lambda m, x, y: around(m, x, y) if x.numel() else m.noise + m.unset, CALL, WithProperties
    ),
    "around forward, in a partial": Case(functools.partial(around), CALL, TwoParts),
    "called twice": Case(lambda m, x, y: plain(m, x, y) + m(x * 2).square().mean()),
    "called without gradients, too": Case(lambda m, x, y: (torch.no_grad()(m)(x * 2), plain(m, x, y))[1]),
    # other ways to train
    "manual, normalized": Case(scaled, VALUES, Manual),
    "manual, around forward": Case(around, CALL, Manual),
    "a first step that is skipped": Case(scaled, None, Skipping),
}


def said(module: Any, monitors: Any = None, **options: Any) -> list[str]:
    """What monitors say in a short fit."""
    monitors = [SensitivityMonitor()] if monitors is None else monitors
    kwargs = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, **options}
    return fitted_and_said(monitors, module, loader(64, seed=1), **kwargs)[1]


def assert_said(texts: list[str], problem: str | None, *monitors: str) -> None:
    """Each of the monitors has one warning of the problem, in any order."""
    starts = [f"`{name}` (val/*) may not measure what your step computes: {problem}" for name in monitors if problem]
    assert len(texts) == len(starts), texts
    for text, start in zip(sorted(texts), sorted(starts), strict=True):
        assert text.startswith(start) and ADVICE in text


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_does_not_compute_what_is_measured_is_said_once(name: str) -> None:
    case = CASES[name]
    monitor = SensitivityMonitor(**(case.options or {}))
    assert_said(said(case.module(case.step), monitor), case.said, "SensitivityMonitor")


@pytest.mark.parametrize("kinds", [(SensitivityMonitor, RiskMonitor), (RiskMonitor, SensitivityMonitor)])
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_passes_of_another_monitor_are_not_the_steps(kinds: Any, num_sanity_val_steps: int) -> None:
    names = [kind.__name__ for kind in kinds]
    for step, problem in ((plain, None), (scaled, VALUES), (around, CALL)):
        texts = said(TwoParts(step), [kind() for kind in kinds], num_sanity_val_steps=num_sanity_val_steps)
        assert_said(texts, problem, *names)
    assert said(Classifier(), [kind() for kind in kinds], num_sanity_val_steps=num_sanity_val_steps) == []


# What the step may do while it is watched


def saving(m: Any, x: Tensor, y: Tensor) -> Tensor:
    torch.save(m, io.BytesIO())
    torch.jit.trace(m, x)
    return plain(m, x, y)


def test_it_may_save_and_trace_the_module() -> None:
    assert said(Stepping(saving), [SensitivityMonitor(outputs=lambda y: y), RiskMonitor()], limit_train_batches=1) == []


def num_hooks(model: nn.Module) -> int:
    names = ["_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]
    everywhere = [getattr(torch_module, f"_global{name}", ()) for name in names]
    return sum(map(len, [*everywhere, *(getattr(module, name) for module in model.modules() for name in names)]))


def test_only_the_first_step_is_watched_and_nothing_stays() -> None:
    watched = list[bool]()
    model = Stepping(lambda m, x, y: (watched.append(num_hooks(m) > 0), plain(m, x, y))[1])
    assert said(model, [SensitivityMonitor(), RiskMonitor()]) == []
    assert watched == [True, False, False, False] and num_hooks(model) == 0


def test_nothing_stays_when_a_step_raises() -> None:
    model = Stepping(lambda m, x, y: plain(m, x[:, :1], y))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        said(model, [SensitivityMonitor(), RiskMonitor()])
    assert num_hooks(model) == 0


def test_training_batches_of_another_kind_than_validation_batches_are_not_watched() -> None:
    def image(batch: Any) -> Tensor:
        seen.append(isinstance(batch, dict))
        return batch["image"]

    val, seen = torch.utils.data.DataLoader([{"image": torch.rand(NUM_FEATURES)}] * 4, 2), list[bool]()
    assert said(Stepping(plain), SensitivityMonitor(inputs=image), val=val) == []
    assert seen.count(False) == 1  # and not in every step
