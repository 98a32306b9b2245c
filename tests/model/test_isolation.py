import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from lightning_sensitivity.model import isolated, isolation
from lightning_sensitivity.model.isolation import is_isolated, restore_despite_interrupt, shared_state
from tests.helpers import Watch

X = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))


class RunningMean:
    """A helper that is no module."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(2), 0

    def update(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.mean.add_((x.mean(0) - self.mean) / self.count)


class Stateful(LightningModule):
    """Its outputs depend on what its forward has changed in earlier passes."""

    def __init__(self, change: Callable[[Any, Tensor], Any] = lambda m, x: None) -> None:
        super().__init__()
        self.change, self.twice = change, nn.Module()
        buffers = {"memory": torch.arange(2.0), "sparse": torch.eye(2).to_sparse()}
        for name, buffer in (buffers | {"late": None, "expanded": torch.ones(1).expand(3)}).items():
            self.register_buffer(name, buffer)
        self.twice.register_buffer("memory", self.memory)
        self.hidden, self.items, self.names = torch.zeros(2), [X.clone()], {"x": X}
        self.listed, self.large = [nn.BatchNorm1d(2)], dict.fromkeys(range(1001))
        self.bn, self.target = nn.BatchNorm1d(2).eval(), nn.Parameter(torch.zeros(2))
        self.queue, self.pair, self.nested = deque([X.clone()], 2), (torch.zeros(2), 1), {"a": {"b": [torch.zeros(2)]}}
        self.meter, self.array, self.of_graph = RunningMean(), np.zeros(2), 2 * self.target
        self.counts, self.groups = Counter(), defaultdict(list)
        self.alias, self.cycle = self.nested["a"], [torch.zeros(2)]
        self.cycle.append(self.cycle)

    def forward(self, x: Tensor) -> Tensor:
        before = self.change(self, x)
        return x + (before if isinstance(before, Tensor) else 0)


def created_once(model: Any, name: str, part: Any) -> Tensor:
    is_new = not hasattr(model, name)
    setattr(model, name, part)
    return torch.tensor(int(is_new))


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a buffer that two modules share": lambda m, x: m.memory.add_(1) + m.twice.memory,
    "a buffer's size": lambda m, x: m.memory.resize_(5).fill_(1).sum(),
    "names": lambda m, x: [m.register_buffer("new", x), setattr(m, "newer", x), delattr(m, "memory")],
    "batch norm": lambda m, x: m.bn.train()(x) + m.bn.running_mean,
    "a module in a list": lambda m, x: m.listed[0].train()(x) + m.listed[0].running_mean,
    "an attribute's values": lambda m, x: m.hidden.add_(1).sum(),
    "a list": lambda m, x: torch.tensor(len([*m.items, m.items.append(x)])) + m.items[0].add_(1).sum(),
    "a dict": lambda m, x: m.names.pop("x") + m.names.setdefault("y", x),
    "a deque": lambda m, x: m.queue[0].add_(m.queue.append(x) or 1) + len(m.queue),
    "a helper object": lambda m, x: m.meter.update(x),
    "a tensor in a tuple": lambda m, x: m.pair[0].add_(1),
    "a nested dict": lambda m, x: m.nested["a"]["b"][0].add_(1) + m.nested.setdefault("c", len(m.nested)),
    "a dict that two attributes share": lambda m, x: m.nested["a"]["b"][0].add_(1) + m.alias["b"][0],
    "a list that holds itself": lambda m, x: m.cycle[0].add_(1) + len(m.cycle[1][1]),
    "a numpy array": lambda m, x: torch.from_numpy(np.add(m.array, 1, out=m.array).copy()),
    "a Counter": lambda m, x: torch.tensor(m.counts.update("seen") or m.counts["s"]),
    "a defaultdict": lambda m, x: torch.tensor(m.groups["new"].append(x) or len(m.groups["new"])),
    "the result of a graph": lambda m, x: m.of_graph.detach().add_(1),
    "a submodule that is created lazily": lambda m, x: created_once(m, "lazy", nn.Linear(2, 2)),
    "a parameter that is created lazily": lambda m, x: created_once(m, "scale", nn.Parameter(torch.ones(2))),
    "a submodule that is replaced": lambda m, x: setattr(m, "bn", nn.Identity()),
    "what is logged": lambda m, x: [m.log("name", x), m.log_dict({"name": x}), is_isolated(m) or 1 // 0],
}


def contents(value: Any) -> Any:
    """What a value holds, by identity and by the numbers in it."""
    if isinstance(value, Tensor):
        return id(value), (value.to_dense() if value.is_sparse else value).tolist()
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return id(value), [(key, contents(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return id(value), [contents(item) for item in value if item is not value]
    return id(value), contents(vars(value)) if isinstance(value, RunningMean) else None


def snapshot(model: Any) -> list[Any]:
    """All that modules have."""
    dicts = [each for m in [*model.modules(), *model.listed] for each in (vars(m), m._buffers, m._parameters)]
    return [sorted((name, str(contents(value))) for name, value in each.items()) for each in dicts]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_large", [False, True])  # where a copy serves the next pass, too, unless it was written to
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_finds_what_the_one_before_found_and_leaves_no_trace(
    change: str, inference: bool, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large and change not in ("batch norm", "a module in a list"):  # whose kernels write without telling
        monkeypatch.setattr(isolation, "_LARGE", 0)
    with torch.inference_mode(inference):
        model = Stateful(CHANGES[change])
        before = snapshot(model)
        with isolated(model) as run:
            outputs = [run(model, X.clone()) for _ in range(3)]
            with pytest.raises(KeyboardInterrupt):
                run(lambda: (model(X.clone()), interrupt()))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with isolated(model) as run:  # outside, where torch lets nobody write to tensors of inference mode
        run(lambda: None)
    assert snapshot(model) == before and not is_isolated(model)


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_large_tensors_are_copied_once_for_all_passes_that_do_not_write_to_them() -> None:
    model = nn.Module()
    model.register_buffer("memory", torch.zeros(2**20))
    copies = list[Any]()
    watch = Watch(lambda function, args, kwargs, result: copies.append(function) if "clone" in str(function) else None)
    with isolated(model) as run, watch:
        for _ in range(3):
            assert run(lambda: model.memory.sum()) == 0 and len(copies) == 1
        run(lambda: model.memory.add_(1))
        assert run(lambda: model.memory.sum()) == 0 and len(copies) == 2
    assert not model.memory.any()


def test_modes_and_random_streams_go_on_as_if_nothing_had_run() -> None:
    model = type("Stubborn", (nn.Sequential,), {"train": None})(nn.Linear(2, 2), nn.Dropout().eval(), nn.BatchNorm1d(2))

    def state() -> list[bool]:
        return [*(module.training for module in model.modules()), torch.is_grad_enabled()]

    seed_everything(0, verbose=False)
    first = draws()
    seed_everything(0, verbose=False)
    with suppress(KeyboardInterrupt), isolated(model) as run:
        for _ in range(2):
            assert run(lambda: (draws(), any(state()))) == (first, False)
        raise KeyboardInterrupt
    assert draws() == first and state() == [True, True, False, True, True]


def test_ctrl_c_while_something_is_put_back_has_to_wait() -> None:
    calls: list[Any] = [interrupt, list]
    with pytest.raises(KeyboardInterrupt):
        restore_despite_interrupt(lambda: calls.pop(0)())
    assert not calls


def test_lazy_and_scripted_models_are_refused() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    for model, match in ((nn.LazyLinear(3), "some are lazy"), (scripted, "a part of it is scripted")):
        with pytest.raises(MisconfigurationException, match=match), isolated(model):
            pass


def test_what_cannot_be_copied_is_shared_and_named() -> None:
    model = Stateful()
    assert shared_state(model) == ["large"]
    model.lock, model.stream, model.held = threading.Lock(), (i for i in range(3)), [{"lock": threading.Lock()}]
    model.bn.many = [[0] * 600, [0] * 600]
    names = ["held", "large", "lock", "many", "stream"]
    assert shared_state(model) == names
    parts = [model.held, model.large, model.lock, model.bn.many, model.stream]
    with isolated(model) as run:
        inside = run(lambda: [model.held, model.large, model.lock, model.bn.many, model.stream])
        assert all(one is other for one, other in zip(inside, parts, strict=True))
        assert run(lambda: model.names) is not model.names


def test_what_belongs_to_something_that_cannot_be_copied_is_never_half_copied() -> None:
    model = nn.Linear(2, 2)
    model.held = {"first": [X, threading.Lock()]}
    model.part = model.held["first"]
    with isolated(model) as run:
        assert run(lambda: model.part) == model.held["first"]
