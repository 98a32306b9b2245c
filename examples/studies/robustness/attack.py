"""Random attack: `python examples/studies/robustness/attack.py [seconds]`; pairs of runs, with and without monitors.

Shapes, dtypes, nestings of batches, and what happens at a random hook are drawn by hypothesis. Both runs must
have the same weights to the bit and the same end, unless an error comes before the first step; S must be that of a
plain loop.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.model import noise_generator

sys.path.insert(0, str(Path(__file__).parents[3]))  # the tests' subject and comparison
from tests.faults.subject import Fault, Subject, assert_same_run, run

Pair = namedtuple("Pair", "x y")
NESTINGS = {  # a batch, and what the model gets
    "tensor": (lambda x, z, y: x, lambda b: b),
    "list": (lambda x, z, y: [x, y], lambda b: b[0]),
    "tuple": (lambda x, z, y: (x, y), lambda b: b[0]),
    "named tuple": (lambda x, z, y: Pair(x, y), lambda b: b.x),
    "dict": (lambda x, z, y: {"x": x, "label": y}, lambda b: b["x"]),
    "views": (lambda x, z, y: [[x, z], y], lambda b: b[0]),
    "dict of inputs": (lambda x, z, y: [{"a": x, "b": (z, y)}, y], lambda b: b[0]),
    "deep": (lambda x, z, y: [[{"a": [x]}, (z, "text", None)], y], lambda b: b[0]),
}
HOOKS = [name for name in dir(LightningModule) if name.startswith("on_") and not re.search("model|transfer", name)]


def fail(error: Exception) -> Any:
    raise error


# What a hook does to the module, or from then on to its outputs in eval mode.
ACTIONS: dict[str, Any] = {
    "nothing": lambda m: None,
    "raise": lambda m: fail(ValueError("user")),
    "stop": lambda m: setattr(m.trainer, "should_stop", True),
    "draw": lambda m: torch.rand(3),
    "eval": lambda m: m.net.eval(),
    "freeze": lambda m: m.net.norm.requires_grad_(False),
    "nan": lambda m: m.net.head.bias.data.fill_(torch.nan),
    "exchange": lambda m: setattr(m.net, "head", nn.Linear(8, m.net.head.out_features)),
    "drop": lambda m: setattr(m.net, "norm", nn.Identity()),
    "double": lambda m: m.double(),
}
OUTPUTS: dict[str, Any] = {
    "nan output": lambda y: y * torch.where(torch.arange(len(y)) == 0, torch.nan, 1.0).reshape(-1, *[1] * (y.ndim - 1)),
    "inf": lambda y: y - torch.inf,
    "none": lambda y: None,
    "complex": lambda y: y + 0j,
    "integer": lambda y: y.long(),
    "half": lambda y: y[: len(y) // 2],
    "empty": lambda y: y[:0],
    "scalar": lambda y: y.sum(),
    "tuple": lambda y: (y, None),
    "nested": lambda y: {"logits": {"a": y}},
    "transposed": lambda y: y.movedim(0, -1),
    "more": lambda y: torch.cat([y, y], 1) if y.ndim > 1 else y,
    "sparse": lambda y: y.to_sparse(),
    "constant": torch.zeros_like,
    "memory": lambda y: fail(torch.cuda.OutOfMemoryError("CUDA out of memory")),
    "error": lambda y: fail(KeyError("k")),
}
HARMLESS = ("nothing", "draw", "eval", "freeze")
EARLY = (MisconfigurationException, torch.cuda.OutOfMemoryError)  # for which a finder of batch sizes waits


@dataclass(frozen=True)
class Case:
    """A pair of runs."""

    nesting: str
    sizes: list[int]
    inputs: list[int]
    outputs: list[int]
    dtype: torch.dtype
    hook: str
    epoch: int
    action: str
    passes: str
    moment: str
    draws: int

    def batches(self) -> list[Any]:
        generator = torch.Generator().manual_seed(len(self.sizes))
        make, batches = NESTINGS[self.nesting][0], []
        for size in self.sizes:
            x, z = (torch.randn(size, *self.inputs, generator=generator).to(self.dtype) for _ in range(2))
            y = torch.randint(2, (size, *self.outputs[1:]), generator=generator)
            batches.append(make(x, z, y.bool() if self.outputs in ([], [1]) else y))
        return batches


@st.composite
def cases(draw: Any) -> Case:
    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    return Case(
        nesting=one(*NESTINGS),
        sizes=draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        inputs=[*draw(st.lists(st.integers(4, 6), max_size=2)), 6],  # of other sizes than the outputs
        outputs=one([], [1], [2], [3], [2, 3], [3, 1]),
        dtype=one(torch.float32, torch.float64, torch.bfloat16),
        hook=one(*HOOKS),
        epoch=one(0, 1),
        action=one(*ACTIONS, *OUTPUTS),
        passes=one("eval", "noisy", "twin"),
        moment=one("first", "later"),
        draws=one(1, 2),
    )


def tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for item in values for tensor in tensors(item)]


class Net(nn.Module):
    """Takes anything with tensors in it, and gives outputs of a shape."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.shape, num_outputs = shape, int(torch.tensor([1, *shape]).prod())
        self.body, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, num_outputs)

    def forward(self, value: Any) -> Tensor:
        x = torch.cat([tensor.flatten(1).to(self.body.weight.dtype) for tensor in tensors(value)], 1).clamp(-99, 99)
        x = torch.stack([x[:, index::6].sum(1) for index in range(6)], 1)
        return self.head(self.drop(self.norm(self.body(x)).relu())).reshape(-1, *self.shape)


class Target(Subject):
    """A module of a case."""

    def __init__(self, case: Case, moment: str) -> None:
        super().__init__(Fault(), moment)
        self.case, self.net, self.mode = case, Net(list(case.outputs)), None
        self.clean = [tensors(batch)[0] for batch in case.batches()]
        self.pointer = self.net.body.weight.data_ptr()

    def forward(self, x: Any) -> Any:
        y, passes = self.net(x), self.case.passes
        if self.mode is None or self.training:
            return y
        is_clean = any(torch.equal(tensors(x)[0], tensor) for tensor in self.clean)
        is_twin = self.net.body.weight.data_ptr() != self.pointer
        is_hit = passes == "eval" or (passes == "noisy" and not is_clean) or (passes == "twin" and is_twin)
        return OUTPUTS[self.mode](y) if is_hit else y

    def outputs(self, batch: Any) -> Tensor:
        y = self(NESTINGS[self.case.nesting][1](batch))
        return (y[0] if isinstance(y, tuple) else y).float().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.outputs(batch) if self.case.sizes[batch_idx] > 1 else None  # batch norm needs two

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.outputs(batch), batch_size=1)


def _act(name: str) -> Any:
    def hook(self: Target, *args: Any) -> None:
        if name == self.case.hook and self.current_epoch == self.case.epoch:
            self.mode = self.case.action if self.case.action in OUTPUTS else None
            ACTIONS.get(self.case.action, ACTIONS["nothing"])(self)
            self.pointer = self.net.body.weight.data_ptr()

    return hook


for _name in HOOKS:
    setattr(Target, _name, _act(_name))


@torch.no_grad()
def plain_loop(model: Target) -> Tensor:
    """S by its definition."""
    case, changes = model.case, []
    model.net.eval()
    for index, batch in enumerate(case.batches()):
        value = NESTINGS[case.nesting][1](batch)
        for draw in range(case.draws):
            generator = noise_generator(0, batch_idx=index, draw=draw)
            noisy = [(x + 0.1 * torch.randn(x.shape, generator=generator)).to(x.dtype) for x in tensors(value)]
            change = model.net(noisy).double() - model.net(value).double()
            changes.append(change.mean(1).flatten() if case.outputs else change)
    return torch.cat(changes).var(correction=0)


def check(case: Case) -> str:
    """Run a pair; returns how it ended."""
    note(repr(case))
    monitors: list[Any] = [SensitivityMonitor(num_draws=case.draws, num_samples=None)]
    is_dense = len(case.outputs) > 1 and case.outputs[1] > 1
    if case.nesting != "tensor" and not is_dense:  # there are labels, and they have an estimate
        task = "binary" if case.outputs in ([], [1]) else "multiclass"
        monitors.append(RiskMonitor(task, num_samples=None))

    def fit(callbacks: Any) -> Any:
        loaders = [DataLoader(case.batches(), batch_size=None, collate_fn=lambda batch: batch)] * 2
        return run(Fault(), case.moment, callbacks, lambda _, moment: Target(case, moment), loaders, max_epochs=2)

    monitored, bare = fit(monitors), fit(())
    if monitored.error is not None and monitored.trainer.global_step == 0 and isinstance(monitored.error, EARLY):
        return "an error before the first step"
    assert_same_run(monitored, bare)
    for name in ("SensitivityMonitor", "RiskMonitor"):
        messages = monitored.warnings_of(name)
        assert all(count <= 2 for count in Counter(messages).values()), messages  # again where it gets worse
    value = monitored.trainer.callback_metrics.get("val/output_sensitivity")
    if bare.error is not None:
        return "the same exception"
    if value is None or value.isnan():
        return "the same, without a value"
    if case.action not in HARMLESS:
        return "the same, with a value"
    expected = plain_loop(monitored.model)
    assert torch.isclose(value.double(), expected, rtol=1e-4), (value, expected)
    return "the same, and S that of a plain loop"


def attack(num_cases: int, number: int | None = None) -> Counter[str]:
    """Run so many pairs; always the same ones without a number."""
    ends: Counter[str] = Counter()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=num_cases, deadline=None, derandomize=number is None, database=None, suppress_health_check=checks
    )

    @given(cases())
    def pairs(case: Case) -> None:
        ends[check(case)] += 1

    options(pairs if number is None else seed(number)(pairs))()
    return ends


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    until, total, number = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else 600), Counter[str](), 1
    while time.monotonic() < until:
        total, number = total + attack(25, number), number + 1
        print(f"{sum(total.values())} pairs: {dict(total)}", flush=True)
