import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.isolation import complete, is_isolated

X = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))


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

    def forward(self, x: Tensor) -> Tensor:
        before = self.change(self, x)
        return x + (before if isinstance(before, Tensor) else 0)


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a buffer that two modules share": lambda m, x: m.memory.add_(1) + m.twice.memory,
    "a buffer's size": lambda m, x: m.memory.resize_(5).fill_(1).sum(),
    "names": lambda m, x: [m.register_buffer("new", x), setattr(m, "newer", x), delattr(m, "memory")],
    "batch norm": lambda m, x: m.bn.train()(x) + m.bn.running_mean,
    "a module in a list": lambda m, x: m.listed[0].train()(x) + m.listed[0].running_mean,
    "an attribute's values": lambda m, x: m.hidden.add_(1).sum(),
    "a list": lambda m, x: torch.tensor(len([*m.items, m.items.append(x)])) + m.items[0].add_(1).sum(),
    "a dict": lambda m, x: m.names.pop("x") + m.names.setdefault("y", x),
    "what is logged": lambda m, x: [m.log("name", x), m.log_dict({"name": x}), is_isolated(m) or 1 // 0],
}


def snapshot(model: Any) -> list[Any]:
    """All that modules have, by identity, and the values in it."""
    state = []
    for attributes in (each for m in [*model.modules(), *model.listed] for each in (vars(m), m._buffers)):
        for name, value in attributes.items():
            items = list(value.values() if isinstance(value, dict) else value if isinstance(value, list) else [])
            tensors = [x for x in (value, *items) if type(x) is Tensor]
            values = [(x.to_dense() if x.is_sparse else x).tolist() for x in tensors]
            state.append((name, id(value), sorted(map(id, items)), sorted(map(str, values))))
    return sorted(state)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_finds_what_the_one_before_found_and_leaves_no_trace(change: str, inference: bool) -> None:
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
        complete(lambda: calls.pop(0)())
    assert not calls


def test_lazy_and_scripted_models_are_refused_and_large_containers_are_not_copied() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    for model, match in ((nn.LazyLinear(3), "some are lazy"), (scripted, "a part of it is scripted")):
        with pytest.raises(MisconfigurationException, match=match), isolated(model):
            pass
    with isolated(model := Stateful()) as run:
        inside = run(lambda: (model.large, model.names))
    assert inside[0] is model.large and inside[1] is not model.names
