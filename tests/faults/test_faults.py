"""Faults at moments: no run is lost, none is changed by a bit, and each monitor that is hit says so once."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils import parametrizations, parametrize

from tests.faults.subject import TAG, Fault, Outcome, Subject, assert_alike, monitors, run
from tests.helpers import Scheduled

ALL, BEFORE = ("sanity", "first", "later"), ("sanity", "first")
FLOATING, SAME_K, NO_MEMORY = "should be a floating tensor", "same number of outputs", "OutOfMemoryError.*out of memory"
NO_BATCH = "could not measure a batch of dataloader 0: .*"
LEFT_OUT = "leaves out kept training samples.*"


def fail(error: type[Exception] = ValueError, message: str = "broken") -> Any:
    raise error(message)


def no_memory() -> Any:
    return fail(torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1 GiB")


def fill(y: Tensor, value: float, where: Any = 0) -> Tensor:
    y = y.clone()
    y[where] = value
    return y


def is_noisy(x: Tensor) -> bool:  # samples are in [0, 1], and noise brings one of a batch out of it
    return bool(x.min() < 0) or bool(x.max() > 1)


def mark(m: Subject) -> None:
    m.pointer = m.net[0].weight.data_ptr()


def is_twin(m: Subject) -> bool:
    return m.net[0].weight.data_ptr() != m.pointer


def one_of_three(m: Subject) -> bool:
    return next(m.calls) % 3 == 1


def to_ids(m: Subject, batch: Any) -> Any:
    return [(9 * batch[0]).long(), batch[1]]


def widen(m: Subject, batch: Any) -> Any:
    return [pad(batch[0], (0, m.net[0].size - 12)), batch[1]]


def as_image(m: Subject, batch: Any) -> Any:
    return [batch[0][:, None, None], batch[1]]


def front(module: nn.Module) -> Callable[[Subject], Any]:
    return lambda m: m.net.insert(0, copy.deepcopy(module))


def plain(m: Subject, batch: Any) -> Tensor:
    """A step that does not call the module, and so never meets the fault."""
    return m.net(batch[0])


def with_gradient(m: Subject, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return x + torch.autograd.grad(m.net(z).sum(), z)[0]


def takes_name(m: Subject, batch: Any) -> Tensor:
    if m.now and not m.training:
        m.log("val_sensitivity", 1.0)
    return m(batch[0])


def lazy(m: Subject) -> None:
    m.net = nn.Sequential(nn.LazyLinear(16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.LazyLinear(4))


def nan_weights(m: Subject) -> None:
    m.net[4].bias.data[0] = math.nan


def new_head(m: Subject, num_classes: int = 4) -> None:
    m.net[4] = nn.Linear(16, num_classes)


def tokens(m: Subject) -> None:
    m.net = nn.Sequential(Apply(lambda x: (7 * x.clamp(0, 1)).long()), nn.EmbeddingBag(8, 4, sparse=True))


def user(kind: str, most: int) -> Callable[..., Any]:
    """A user's function that fails after some calls, on samples for validation (labels: for training)."""
    calls = 0

    def function(value: Any, *rest: Any) -> Any:
        nonlocal calls
        x = value[0] if isinstance(value, list) else value
        calls += (float(x[:, 0].mean()) > TAG / 2) == (kind == "targets")
        if calls > most:
            fail(message=f"in {kind}")
        return value[0] if kind == "inputs" else value[1] if kind == "targets" else 1.1 * value

    return function


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Growing(nn.Module):
    size = 12

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :12] if x.shape[1] == self.size else fail(message=f"{x.shape[1]} inputs")


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(16, 1)), nn.Parameter(torch.zeros(1, 12))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 100.0))

    def forward(self, y: Tensor) -> Tensor:
        return y + Normal(0.0, self.scale).variance  # which checks its arguments


class Uncopied(Tensor):
    """Neither copied nor compared."""

    clone = double = lambda self, *args, **kwargs: fail(message="no copy")


class Raising:
    """A loader that raises in the middle."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from list(self.loader)[:2]
        fail(OSError, "no disk")


FAULTS = [
    # samples that are not finite, and outputs that say nothing
    Fault("nan sample", "samples gave nan", "validation and 0 training .* nan", y=lambda m, x, y: fill(y, math.nan),
        moments=ALL),
    Fault("inf sample", "samples gave nan", "validation and 0 training .* nan", y=lambda m, x, y: fill(y, math.inf)),
    Fault("all nan", "20 samples gave nan", "20 validation .* nan", y=lambda m, x, y: y * math.nan, moments=ALL),
    Fault("nan kept sample", None, "0 validation and 3 training .* nan", kept=lambda m, x, y: fill(y, math.nan)),
    Fault("nan weights", "20 samples gave nan", "20 validation and 24 training .* nan", epoch=nan_weights),
    Fault("masked logits", "-inf in both", y=lambda m, x, y: fill(y, -math.inf, (slice(None), 3)), step=plain,
        moments=("first",)),
    Fault("constant outputs", "No output changed", y=lambda m, x, y: torch.zeros_like(y)),
    Fault("log-probabilities", "log-probabilities", init=lambda m: m.net.append(nn.LogSoftmax(1))),
    # outputs that are none, or others
    Fault("classes change", SAME_K, "outputs", y=lambda m, x, y: y[:, : 3 + len(x) // 8], step=plain),
    Fault("two heads", None, "3 outputs", y=lambda m, x, y: y[:, :3], step=plain, moments=ALL),
    Fault("double outputs", y=lambda m, x, y: y.double()),
    Fault("complex outputs", FLOATING, FLOATING, "outputs=", y=lambda m, x, y: y + 0j, step=plain, moments=ALL),
    Fault("integer outputs", FLOATING, FLOATING, "outputs=", y=lambda m, x, y: y.argmax(1), step=plain),
    Fault("a loss", FLOATING, FLOATING, "outputs=", y=lambda m, x, y: y.mean(), step=plain, moments=ALL),
    Fault("no outputs", FLOATING, FLOATING, "outputs=", y=lambda m, x, y: None, step=plain, moments=ALL),
    Fault("a tuple", y=lambda m, x, y: (y, x), step=plain),
    Fault("half the outputs", y=lambda m, x, y: y[: len(y) // 2], step=plain),
    Fault("probabilities", error="per_output=", init=lambda m: m.net.append(nn.Softmax(1)), moments=BEFORE),
    # batches
    Fault("token ids", error="at=", train=to_ids, batch=to_ids, init=front(Apply(Tensor.float)), moments=BEFORE),
    Fault("ids later", "dense floating", batch=to_ids, init=front(Apply(Tensor.float))),
    Fault("empty batches", "no value", "no value|no batch", batch=lambda m, b: [each[:0] for each in b]),
    Fault("None for batches", "no value", "no batch", batch=lambda m, b: None, moments=ALL),
    Fault("single samples", None, "more than 1 value per channel", batch=lambda m, b: [each[:1] for each in b]),
    Fault("without labels", batch=lambda m, b: b[:1], moments=ALL),
    Fault("unlabelled training", None, "leaves a training batch out", train=lambda m, b: b[: 2 - one_of_three(m)]),
    Fault("label out of range", None, "leaves a training batch out",
        train=lambda m, b: [b[0], b[1] + 9 * one_of_three(m)], loss=lambda y, t: cross_entropy(y, t % 4)),
    Fault("another ignore_index", None, "-100.*targets=", train=lambda m, b: [b[0], b[1] - 1], moments=("first",),
        loss=lambda y, t: cross_entropy(y, t, ignore_index=-1)),
    Fault("no label counts", None, "No label of the kept training samples counts",
        train=lambda m, b: [b[0], b[1] * 0 - 100], loss=lambda y, t: cross_entropy(y, t.clamp_min(0))),
    Fault("uncopied batches", None, "can't score .* training batch.* pickle",
        train=lambda m, b: [*b, (name for name in "ab")]),
    Fault("growing inputs", None, LEFT_OUT + "12 inputs", init=front(Growing()), train=widen, batch=widen,
        epoch=lambda m: setattr(m.net[0], "size", 20), run={"max_epochs": 2}),
    Fault("a hook that raises", train=lambda m, b: fail() if m.now else b, batch=lambda m, b: fail(), moments=ALL),
    Fault("a loader that raises", wrap=Raising, moments=("first",)),
    # a model that fails in some passes alone
    Fault("range of inputs", NO_BATCH + "out of range", None, "out of range",
        x=lambda m, x: fail(message="out of range") if is_noisy(x) else x, moments=ALL),
    Fault("no memory, noisy", NO_MEMORY, None, "out of memory", x=lambda m, x: no_memory() if is_noisy(x) else x,
        moments=("sanity", "later")),
    Fault("no memory, twin", None, NO_MEMORY, x=lambda m, x: no_memory() if is_twin(m) else x, init=mark),
    Fault("no memory, kept", None, LEFT_OUT + NO_MEMORY, kept=lambda m, x, y: no_memory()),
    Fault("one kept batch", None, LEFT_OUT + "broken", kept=lambda m, x, y: fail() if one_of_three(m) else y),
    Fault("no pass", NO_BATCH + "broken", NO_BATCH + "broken", "broken", x=lambda m, x: fail(), step=plain,
        moments=ALL),
    Fault("positive parameters", None, "Expected parameter scale", init=lambda m: m.net.append(Positive()),
        epoch=lambda m: m.net[-1].scale.data.fill_(1.0)),
    Fault("gradients in forward", x=with_gradient, moments=ALL),
    Fault("stochastic in eval", y=lambda m, x, y: y + torch.rand_like(y) * random.random(), moments=ALL),
    # functions of the user's
    Fault("inputs=", "in inputs", "in inputs", options={"inputs": user("inputs", 7)}),
    Fault("outputs=", "in outputs", "in outputs", options={"outputs": user("outputs", 20)}),
    Fault("targets=", None, "leaves a training batch out: in targets", r_options={"targets": user("targets", 1)}),
    Fault("perturbation", "in noise", s_options={"perturbation": user("noise", 5)}),
    Fault("no perturbation", error="perturbation", s_options={"perturbation": lambda x, g: x[:1]},
        moments=("sanity",)),
    # modules that change
    Fault("another head", epoch=new_head),
    Fault("more classes", None, "learned as a whole", epoch=lambda m: new_head(m, 5)),
    Fault("frozen layers", epoch=lambda m: m.net[0].requires_grad_(False)),
    Fault("another layer", None, "learned as a whole", epoch=lambda m: m.net.append(nn.Linear(4, 4))),
    Fault("low rank", None, "learned as a whole",
        epoch=lambda m: parametrize.register_parametrization(m.net[0], "weight", LowRank())),
    Fault("weight norm", init=lambda m: parametrizations.weight_norm(m.net[4])),
    Fault("spectral norm", init=lambda m: parametrizations.spectral_norm(m.net[4])),
    Fault("spectral norm by hooks", init=lambda m: nn.utils.spectral_norm(m.net[4])),
    Fault("lazy layers", None, "lazy", init=lazy, moments=("first",)),
    Fault("sparse gradients", init=tokens),
    Fault("weights of another", error="`initial_weights`", r_options={"initial_weights": {"other": torch.zeros(1)}}),
    # steps that do something else
    Fault("scaled in the step", "inputs=", "inputs=", step=lambda m, b: m((b[0] - 50) / 20), moments=BEFORE),
    Fault("head in the step", "also runs 'head'", "also runs 'head'",
        init=lambda m: m.add_module("head", nn.Linear(4, 4)), step=lambda m, b: m.head(m(b[0])), moments=BEFORE),
    Fault("rounded in the step", step=lambda m, b: m(b[0].bfloat16().float()), moments=BEFORE),
    Fault("at= is not run", error="submodule that `forward` calls", s_options={"at": "head"},
        init=lambda m: m.add_module("head", nn.Linear(4, 4)), moments=("sanity",)),
    Fault("flattened in the step", error="inputs=", train=as_image, batch=as_image,
        step=lambda m, b: m(b[0].flatten(1)), moments=BEFORE),
    Fault("uncopied in the step", step=lambda m, b: m(b[0].as_subclass(Uncopied)).as_subclass(Tensor)),
    Fault("written in the step", "inputs=", "inputs=", step=lambda m, b: m(b[0].mul_(2))),
    # names
    Fault("taken names", "leaves them to those", None, "prefix", step=takes_name, moments=ALL),
]  # fmt: skip


@cache
def fault_of(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


@cache
def bare(name: str, moment: str) -> Outcome:
    return run(fault_of(name), moment)


def assert_told(own: Outcome, fault: Fault, may_be_silent: bool = False) -> None:
    for name, pattern in (("SensitivityMonitor", fault.sensitivity), ("RiskMonitor", fault.risk)):
        found = own.of(name)
        assert len(found) == (pattern is not None) or (may_be_silent and not found), own.warned
        assert all(re.search(rf"^`{name}` \(val_\*\) .*({pattern})", each, re.DOTALL) for each in found), found


@pytest.mark.parametrize(
    ("fault", "moment"),
    [pytest.param(fault, moment, id=f"{fault.name}, {moment}") for fault in FAULTS for moment in fault.moments],
)
def test_nothing_waits(fault: Fault, moment: str) -> None:
    own = run(fault, moment, monitors(fault))
    if fault.error and (moment == "sanity" or not (fault.sensitivity or fault.risk)):
        assert isinstance(own.error, MisconfigurationException | torch.cuda.OutOfMemoryError), own.error
        assert re.search(fault.error, str(own.error)), own.error
        assert own.trainer.global_step == 0
        assert bare(fault.name, moment).error is None
        return
    assert_alike(own, bare(fault.name, moment))
    assert (own.error is None) == ("raises" not in fault.name)
    assert_told(own, fault, may_be_silent=moment == "sanity")


WAITING: dict[str, Callable[[str], Any]] = {
    "stopping": lambda name: EarlyStopping(name, patience=9),
    "checkpoint": lambda name: ModelCheckpoint(monitor=name),
    "scheduler": lambda name: None,
}


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize(("name", "moment"), [("nan sample", "later"), ("no pass", "first"), ("no pass", "later")])
def test_something_waits(name: str, moment: str, waiting: str, tmp_path: Path) -> None:
    fault = fault_of(name)
    callback = WAITING[waiting]("val_risk_estimate")
    make = type("Waiting", (Scheduled, Subject), {}) if waiting == "scheduler" else Subject
    callbacks = [*monitors(fault), *([callback] if callback else [])]
    kwargs = {"enable_checkpointing": waiting == "checkpoint", "default_root_dir": tmp_path}
    own = run(fault, moment, callbacks, make, **kwargs)
    assert_told(own, fault)
    if moment == "later":  # Lightning goes by the value of the epoch before
        assert own.error is None
        assert own.trainer.current_epoch == 3
    else:
        assert re.search("val_risk_estimate.*not (available|found)|could not find.*val_risk_estimate", str(own.error))


def test_copies_of_monitors_measure_the_same() -> None:
    own, nothing = monitors(Fault("nothing")), Fault("nothing")
    makers = (lambda: pickle.loads(pickle.dumps(own)), lambda: own, lambda: copy.deepcopy(own))
    values = [run(nothing, "later", make()).trainer.callback_metrics for make in makers]
    assert values[0] == values[1] == values[2]
    assert values[0].keys() >= {"val_sensitivity", "val_risk_estimate"}


def test_a_slice_of_the_random_attack() -> None:
    script = Path(__file__).parents[2] / "examples" / "robustness" / "attack.py"
    ends = runpy.run_path(str(script))["attack"](8)
    assert sum(ends.values()) >= 8
    assert ends["alike, and S that of a plain loop"] > 0
