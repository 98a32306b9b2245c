"""A pass leaves no trace, copies next to nothing, and refuses to write to parameters."""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from lightning_sensitivity.running import isolated

X = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))


class Stateful(LightningModule):
    """Its outputs depend on what its forward has changed in earlier passes."""

    def __init__(self, change: Callable[[Any, Tensor], Any] = lambda m, x: None) -> None:
        super().__init__()
        self.change, self.twice = change, nn.Module()
        buffers = {"memory": torch.arange(2.0), "sparse": torch.eye(2).to_sparse(), "large": torch.zeros(2**15)}
        buffers["table"] = torch.zeros(2**17)
        for name, buffer in (buffers | {"late": None, "expanded": torch.ones(1).expand(3)}).items():
            self.register_buffer(name, buffer)
        self.twice.register_buffer("memory", self.memory)
        self.bn, self.target = nn.BatchNorm1d(2).eval(), nn.Parameter(torch.zeros(2))
        self.hidden, self.of_graph = torch.zeros(2), 2 * self.target
        self.items, self.names, self.ids = [X.clone()], {"x": X}, {1}
        self.alias, self.counts, self.generator = self.names, Counter("a"), torch.Generator().manual_seed(1)
        self.array, self.random, self.numbers = np.zeros(2), random.Random(0), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        before = self.change(self, x)
        return x + (before if isinstance(before, Tensor) else 0)


def created_once(model: Any, name: str, part: Any) -> Tensor:
    is_new = not hasattr(model, name)
    setattr(model, name, part)
    return torch.tensor(int(is_new))


PUT_BACK: dict[str, Callable[[Any, Tensor], Any]] = {
    "a buffer that two modules share": lambda m, x: m.memory.add_(1) + m.twice.memory,
    "a buffer's size": lambda m, x: m.memory.resize_(5).fill_(1).sum(),
    "names": lambda m, x: [m.register_buffer("new", x), setattr(m, "prefix", 1), delattr(m, "memory")],
    "batch norm": lambda m, x: m.bn.train()(x) + m.bn.running_mean,
    "a large buffer, through its data": lambda m, x: m.large.data.add_(1)[0],
    "a very large buffer": lambda m, x: m.table.add_(1)[0],
    "a view of a very large buffer, and its size": lambda m, x: m.table[:2].add_(1)[0] + m.table.t_().resize_(3).sum(),
    "an attribute's values": lambda m, x: m.hidden.add_(1).sum(),
    "the result of a graph": lambda m, x: m.of_graph.detach().add_(1),
    "a list": lambda m, x: torch.tensor(len([*m.items, m.items.append(x)])),
    "a dict": lambda m, x: m.names.pop("x") + m.names.setdefault("y", x),
    "a counter": lambda m, x: torch.tensor([m.counts["a"], m.counts.update("a")][0]),
    "an array": lambda m, x: torch.from_numpy(m.array + m.array.__iadd__(1)),
    "a generator": lambda m, x: torch.rand(2, generator=m.generator),
    "a generator of Python": lambda m, x: torch.tensor(m.random.random()),
    "a generator of NumPy": lambda m, x: torch.tensor(m.numbers.random()),
    "a submodule that is created lazily": lambda m, x: created_once(m, "lazy", nn.Linear(2, 2)),
    "a parameter that is created lazily": lambda m, x: created_once(m, "scale", nn.Parameter(torch.ones(2))),
    "a hook": lambda m, x: m.bn(m.bn.register_forward_hook(lambda module, args, y: y + 1) and x),
    "what is logged": lambda m, x: [m.log("name", x), m.log_dict({"name": x})],
}


def contents(value: Any) -> Any:
    """What a value holds, by identity and by the numbers in it."""
    if isinstance(value, Tensor):
        return id(value), (value.to_dense() if value.is_sparse else value).tolist()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, random.Random | np.random.Generator):
        return id(value), str(value.getstate() if isinstance(value, random.Random) else value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return id(value), str(value)
    if isinstance(value, dict):
        return id(value), [(key, contents(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return id(value), [contents(item) for item in value if item is not value]
    return id(value)


def snapshot(model: Any) -> list[Any]:
    """All that modules have."""
    dicts = [each for m in model.modules() for each in (vars(m), m._buffers, m._parameters)]
    return [sorted((name, str(contents(value))) for name, value in each.items()) for each in dicts]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", PUT_BACK)
def test_a_pass_finds_what_the_one_before_found_and_leaves_no_trace(change: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        model = Stateful(PUT_BACK[change])
        before = snapshot(model)
        with isolated(model) as run:
            outputs = [run(model, X.clone()) for _ in range(3)]
            with pytest.raises(KeyboardInterrupt):
                run(lambda: (model(X.clone()), interrupt()))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with isolated(model) as run:  # outside, where torch lets nobody write to tensors of inference mode
        run(lambda: None)
    assert snapshot(model) == before


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_a_large_tensor_is_cloned_once_for_all_passes_and_again_after_a_write(in_inference_mode: bool) -> None:
    model = Stateful()
    with torch.inference_mode(in_inference_mode), isolated(model) as run:
        places = [run(lambda: model.table.data_ptr()) for _ in range(3)]
        assert len(set(places)) == 1 and places[0] != model.table.data_ptr()
        run(lambda: model.table.add_(1))
        assert run(lambda: float(model.table.sum())) == 0


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
        for _ in range(2):  # all runs meet the same stream of torch
            assert run(lambda: (draws()[2], any(state()))) == (first[2], False)
        raise KeyboardInterrupt
    assert draws() == first and state() == [True, True, False, True, True]


class OwnModes(LightningModule):
    """It validates with a part in training mode, such as one that scales outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Dropout(), nn.Sequential(nn.Identity())

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.scale.train()


def test_a_module_is_run_in_the_modes_in_which_it_validates() -> None:
    model = OwnModes()
    model.net.eval()
    for _ in range(2):
        with isolated(model) as run:
            assert run(lambda: [part.training for part in model.modules()]) == [False, False, True, True]
        assert [part.training for part in model.modules()] == [True, False, True, True]


def test_autocast_does_not_serve_weights_from_before_the_last_step() -> None:
    model, x = nn.Linear(2, 2), X.clone()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        model.weight.data.add_(1)
        with isolated(model) as run:
            outputs = run(model, x)
        assert model(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs, model(x))


def test_a_pass_compiles_nothing() -> None:
    graphs = list[Any]()
    model = torch.compile(nn.Linear(2, 2), backend=lambda graph, example: graphs.append(graph) or graph)
    with isolated(model) as run:
        run(model, X.clone())
    assert not graphs and model(X.clone()) is not None and len(graphs) == 1


def test_lazy_and_scripted_models_are_refused() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    lazy = nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False)  # the latter has no weights
    for model, match in (*zip(lazy, ["some are lazy"] * 2, strict=True), (scripted, "no scripted parts")):
        with pytest.raises(MisconfigurationException, match=match), isolated(model):
            pass


def test_a_pass_that_writes_to_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with (
        pytest.raises(MisconfigurationException, match="`forward` writes to parameters in eval"),
        isolated(model) as run,
    ):
        run(model, X)
        run(lambda: model[1].weight.zero_())
