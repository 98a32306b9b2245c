"""Random attack: `python examples/robustness/attack.py [seconds]`; pairs of runs, with the monitors and without.

Shapes, dtypes, nestings of batches, tasks, and what happens at a random hook are drawn by hypothesis. Both runs must
have the same weights to the bit and the same end, unless an error comes before the first step; S must be that of a
plain loop.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import time
from collections import Counter, namedtuple
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
from lightning_sensitivity.perturbations import noise_generator

sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' own subjects and comparison
from tests.faults.subject import Fault, Subject, assert_alike, run

Pair = namedtuple("Pair", "x y")
NESTINGS = {  # a batch, and what the model gets
    "tensor": (lambda x, z, y: x, lambda b: b),
    "list": (lambda x, z, y: [x, y], lambda b: b[0]),
    "tuple": (lambda x, z, y: (x, y), lambda b: b[0]),
    "named tuple": (lambda x, z, y: Pair(x, y), lambda b: b.x),
    "dict": (lambda x, z, y: {"x": x, "label": y}, lambda b: b["x"]),
    "views": (lambda x, z, y: [[x, z], y], lambda b: b[0]),
    "dict of inputs": (lambda x, z, y: [{"a": x, "b": (z, y)}, y], lambda b: b[0]),
    "dict alone": (lambda x, z, y: {"a": x, "b": z}, lambda b: b),
    "deep": (lambda x, z, y: [[{"a": [x]}, (z, "text", None)], y], lambda b: b[0]),
}
HOOKS = [name for name in dir(LightningModule) if name.startswith("on_") and not re.search("model|transfer", name)]
# What a hook does to the module, or from then on to its outputs in eval mode.
ACTIONS: dict[str, Any] = {
    "nothing": lambda m: None,
    "raise": lambda m: (_ for _ in ()).throw(ValueError("user")),
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
    "nan": lambda y: y * torch.where(torch.arange(len(y)) == 0, torch.nan, 1.0).reshape(-1, *[1] * (y.ndim - 1)),
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
    "memory": lambda y: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory")),
    "error": lambda y: (_ for _ in ()).throw(KeyError("k")),
}
EARLY = (MisconfigurationException, torch.cuda.OutOfMemoryError)  # which a finder of batch sizes waits for
WHERE = ("eval", "noisy", "twin")


class Net(nn.Module):
    """Takes anything with tensors in it, and gives outputs of a shape."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.shape, num = shape, int(torch.tensor([1, *shape]).prod())
        self.body, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, num)

    def forward(self, value: Any) -> Tensor:
        rows = [each.flatten(1).to(self.body.weight.dtype) for each in tensors(value)]
        x = torch.cat(rows, 1).clamp(-99, 99)
        x = torch.stack([x[:, index::6].sum(1) for index in range(6)], 1)
        return self.head(self.drop(self.norm(self.body(x)).relu())).reshape(-1, *self.shape)


class Target(Subject):
    """A module of a case."""

    case: Case

    def __init__(self, fault: Fault, moment: str) -> None:
        super().__init__(fault, moment)
        self.case = fault.options["case"]
        self.net, self.mode, self.own = Net(list(self.case.outputs)), None, id(None)
        self.own = self.net.body.weight.data_ptr()

    def forward(self, x: Any) -> Any:
        y, case = self.net(x), self.case
        is_noisy = not any(torch.equal(tensors(x)[0], tensors(b)[0]) for b in case.batches)
        is_twin = self.net.body.weight.data_ptr() != self.own
        hit = {"eval": True, "noisy": is_noisy, "twin": is_twin}[case.where]
        return OUTPUTS[self.mode](y) if self.mode and hit and not self.training else y

    def step(self, batch: Any) -> Tensor:
        y = self(NESTINGS[self.case.nesting][1](batch))
        return (y[0] if isinstance(y, tuple) else y).float().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.step(batch) if self.case.sizes[batch_idx] > 1 else None  # batch norm needs two

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=1)


def _act(name: str) -> Any:
    def hook(self: Target, *args: Any) -> None:
        if name == self.case.hook and self.current_epoch == self.case.epoch:
            self.mode = self.case.action if self.case.action in OUTPUTS else None
            ACTIONS.get(self.case.action, ACTIONS["nothing"])(self)
            self.own = self.net.body.weight.data_ptr()

    return hook


for _name in HOOKS:
    setattr(Target, _name, _act(_name))


@dataclasses.dataclass(frozen=True)
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
    where: str
    moment: str
    draws: int
    task: str
    batches: list[Any] = dataclasses.field(default_factory=list, compare=False, repr=False)


@st.composite
def cases(draw: Any) -> Case:
    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    dims = st.lists(st.integers(1, 4), max_size=2)
    sizes, inputs = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)), [*draw(dims), 3]
    outputs, dtype = one([], [1], [3], [3, 2], [2, 3], [3, 3]), one(torch.float32, torch.float64, torch.bfloat16)
    case = Case(
        one(*NESTINGS), sizes, inputs, outputs, dtype, one(*HOOKS), one(0, 1), one("nothing", *ACTIONS, *OUTPUTS),
        one(*WHERE), one("first", "later"), one(1, 2), one("auto", "regression", "multiclass"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(len(sizes))
    for size in sizes:
        x, z = (torch.randn(size, *inputs, generator=generator).to(dtype) for _ in range(2))
        y = torch.randint(2, (size, *outputs[1:]), generator=generator)
        case.batches.append(
            NESTINGS[case.nesting][0](x, z, x.new_zeros(size, *outputs) if case.task == "regression" else y)
        )
    return case


def tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [each for inner in values for each in tensors(inner)]


@torch.no_grad()
def plain_loop(model: Target, case: Case) -> Tensor:
    """S by its definition."""
    changes = []
    model.net.eval()
    for index, batch in enumerate(case.batches):
        value = NESTINGS[case.nesting][1](batch)
        for draw in range(case.draws):
            generator = noise_generator(0, 0, 0, index, draw)
            noisy = [x + 0.1 * torch.randn(x.shape, generator=generator) for x in tensors(value)]
            noisy = [new.to(x.dtype) for new, x in zip(noisy, tensors(value), strict=True)]
            change = model.net(noisy).double() - model.net(value).double()
            changes.append(change.mean(1).flatten() if case.outputs else change)
    return torch.cat(changes).var(correction=0)


def check(case: Case) -> str:
    """Run a pair; returns how it ended."""
    note(repr(case))
    monitors = [
        SensitivityMonitor(num_draws=case.draws, num_samples=None),
        RiskMonitor(task=case.task, num_samples=None),
    ]
    data = DataLoader(case.batches, batch_size=None, collate_fn=lambda batch: batch)
    fault = Fault("attack", wrap=lambda loader: data, options={"case": case}, run={"max_epochs": 2})
    own, bare = (run(fault, case.moment, callbacks, Target) for callbacks in (monitors, ()))
    if own.error is not None and own.trainer.global_step == 0 and isinstance(own.error, EARLY):
        return "an error before the first step"
    assert_alike(own, bare)
    for name in ("SensitivityMonitor", "RiskMonitor"):
        assert len(set(own.of(name))) == len(own.of(name)), own.of(name)
    value = own.trainer.callback_metrics.get("val_sensitivity")
    if bare.error is not None:
        return "the same exception"
    if value is None or case.action not in ("nothing", "draw", "freeze", "eval"):
        return "alike, without a value" if value is None else "alike, with a value"
    expected = plain_loop(own.model, case)
    assert torch.isclose(value.double(), expected, rtol=1e-6), (value, expected)
    return "alike, and S that of a plain loop"


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
