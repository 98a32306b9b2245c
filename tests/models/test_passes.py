import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.utils import prune
from torchmetrics import CatMetric, MeanMetric, MetricCollection

from lightning_sensitivity.models import Passes, Probe, prepare_call
from tests.helpers import Watch

X = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
LARGE = 2**15


def plus_one(x: Tensor) -> Tensor:
    return x + 1


class Stateful(nn.Module):
    """Its outputs depend on what its forward has changed in earlier passes."""

    def __init__(self, change: Callable[[Any, Tensor], Any], size: int = 2) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("memory", torch.arange(float(size)))
        self.register_buffer("written", torch.zeros(size))
        self.register_buffer("late", None)
        self.register_buffer("expanded", torch.ones(1).expand(3))  # can't be written to
        self.register_buffer("lazy", nn.UninitializedBuffer())
        self.register_buffer("sparse", torch.eye(size).to_sparse() if size < 9 else None)
        self.hidden, self.items, self.names, self.count, self.state = torch.zeros(size), [X], {"x": X}, 0, None
        self.bn, self.metric = nn.BatchNorm1d(2), MetricCollection([MeanMetric(), CatMetric()])
        self.metric.update(X)
        self.linear = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
        self.twice = nn.Module()
        self.twice.register_buffer("memory", self.memory)

    def forward(self, x: Tensor) -> Tensor:
        before = self.change(self, x)
        return x + (before if isinstance(before, Tensor) else 0)


def delete(model: Any, x: Tensor) -> None:
    del model.memory, model.state
    model.register_buffer("new", x)
    model.newer = x


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a buffer in place": lambda m, x: m.memory.add_(1).sum(),
    "a buffer's data": lambda m, x: m.memory.data.add_(1).sum(),
    "a buffer by another": lambda m, x: [setattr(m, "memory", m.memory + 1), setattr(m, "late", x)],
    "a buffer's size": lambda m, x: m.memory.resize_(5).fill_(1).sum(),
    "names": delete,
    "a sparse buffer": lambda m, x: m.sparse.mul_(2).to_dense().sum(),
    "batch norm": lambda m, x: m.bn.train()(x),
    "its running mean": lambda m, x: batch_norm(x, m.bn.running_mean, m.bn.running_var, training=True),
    "an attribute": lambda m, x: [setattr(m, "state", x), setattr(m, "count", m.count + 1)],
    "an attribute's values": lambda m, x: m.hidden.add_(1).sum(),
    "a list": lambda m, x: torch.tensor(len([*m.items, m.items.append(x)])),
    "a dict": lambda m, x: m.names.pop("x") + m.names.setdefault("y", x),
    "pruned weights": lambda m, x: m.linear(x),
    "a metric": lambda m, x: m.metric.update(x) or m.metric["MeanMetric"].mean_value,
}


def snapshot(model: nn.Module) -> list[Any]:
    """All that modules have, by identity, and the values in it."""
    found = []
    for name, value in ((n, v) for m in model.modules() for n, v in [*vars(m).items(), *m._buffers.items()]):
        items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        numbers = type(value) is Tensor and (value.to_dense() if value.is_sparse else value).tolist()
        found.append((name, id(value), numbers, [id(each) for each in items]))
    return sorted(found, key=lambda each: each[:2])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_finds_what_the_one_before_found_and_leaves_no_trace(change: str, inference: bool) -> None:
    model = Stateful(CHANGES[change])
    before, passes = snapshot(model), Passes(model)
    for _ in range(2):  # batches
        with torch.inference_mode(inference):
            with passes.measuring():
                outputs = [passes.run(lambda: model(X)) for _ in range(3)]
                with pytest.raises(ZeroDivisionError):
                    passes.run(lambda: (model(X), 1 / 0))
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        assert snapshot(model) == before
    model(X)
    assert snapshot(model) != before  # which is no wonder


def test_large_buffers_are_copied_only_where_a_pass_was_seen_to_write_them() -> None:
    model = Stateful(lambda m, x: m.written.data.add_(1).sum(), LARGE)
    passes, counts = Passes(model), []

    def count(function: Any, args: Any, *_: Any) -> None:
        counts[-1] += function is torch.ops.aten.clone.default and args[0].numel() >= LARGE

    for _ in range(3):
        counts.append(0)
        with Watch(count), passes.measuring():
            for _ in range(3):
                passes.run(lambda: model(X))
        assert not model.written.any()
    assert counts[0] >= 4 and counts[1:] == [1, 1]  # all of them before the first pass; then the one that was written
    model.change = lambda m, x: m.hidden.add_(1).sum()
    match = "written into a large buffer of Stateful, which earlier passes had not"
    with pytest.warns(UserWarning, match=match), passes.measuring():
        passes.run(lambda: model(X))
    assert model.hidden.all()
    with passes.measuring():
        passes.run(lambda: model(X))
    assert torch.equal(model.hidden, torch.ones(LARGE))


@pytest.mark.parametrize("change", [lambda m: m.written.add_(1), lambda m: m.written.data.add_(1)])
def test_what_a_later_pass_begins_to_write_or_to_draw_is_put_back(change: Callable[[Any], Tensor]) -> None:
    model = Stateful(lambda m, x: x, 2)
    passes = Passes(model)
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    for has_begun in (False, True):
        with passes.measuring():
            passes.run(lambda: model(X))
            if has_begun:  # a perturbation, for one, is not in the first pass
                passes.run(lambda: (change(model), np.random.rand(3)))
        assert not model.written.any()
    assert (np.random.rand(3) == expected).all()


def test_a_first_pass_that_failed_has_shown_nothing() -> None:
    model = Stateful(lambda m, x: m.written.add_(1).sum(), LARGE)
    passes = Passes(model)
    with suppress(ZeroDivisionError), passes.measuring():
        passes.run(lambda: 1 // 0)
    with passes.measuring():
        passes.run(lambda: model(X))
    assert not model.written.any()


@pytest.mark.parametrize("size", [2, LARGE])
def test_inference_tensors_and_those_without_memory_are_no_obstacle(size: int) -> None:
    with torch.inference_mode():
        model = Stateful(lambda m, x: m.memory.add_(1).sum(), size)
    model.meta, model.freed = torch.zeros(2, device="meta"), torch.zeros(4)
    model.freed.untyped_storage().resize_(0)  # as of a sharded model
    passes = Passes(model)
    for _ in range(2):
        with torch.inference_mode(), passes.measuring():
            assert torch.equal(passes.run(lambda: model(X)), passes.run(lambda: model(X)))
        assert torch.equal(model.memory, torch.arange(float(size)))
    model.change = lambda m, x: None
    with passes.measuring():  # outside, where torch does not let anyone write to them
        passes.run(lambda: model(X))


# Modes and dice


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_modes_and_random_streams_go_on_as_if_nothing_had_run(error: type[BaseException] | None) -> None:
    class Stubborn(nn.Sequential):
        train = None  # type: ignore[assignment]

    model = Stubborn(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].training = model[2].training = False
    modes, passes = [module.training for module in model.modules()], Passes(model)

    def run() -> tuple[float, ...]:
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        drawn = draws()
        if error:
            raise error
        return drawn

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])
    with suppress(ValueError, KeyboardInterrupt), passes.measuring():
        assert passes.run(run) == passes.run(run) == expected  # the same in each pass
        draws()
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


# Other modules


def test_a_lazy_module_becomes_what_it_would_and_stays_that() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    passes = Passes(model)
    with passes.measuring():
        outputs = [passes.run(lambda: model(X)) for _ in range(2)]
    assert torch.equal(*outputs)
    assert (model[0].in_features, model[1].num_features) == (2, 3)
    assert torch.equal(model.eval()(X), outputs[0])


# Submodules


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.head, self.spare = nn.Embedding(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)

    def forward(self, ids: Tensor) -> Any:
        return {"logits": self.compare(self.embeddings(ids).mean(1))}

    def compare(self, embedded: Tensor) -> Tensor:
        return self.head(embedded) - 3 * self.head(-embedded)


def probe_of(model: nn.Module, batch: Any, perturbs_inputs: bool = False) -> tuple[Passes, Probe]:
    passes = Passes(model)
    return passes, Probe(passes, model, prepare_call(model, batch, None, perturbs_inputs))


@torch.no_grad()
def test_the_output_of_a_submodule_is_perturbed_each_time_that_it_runs() -> None:
    model, ids = Siamese(), torch.tensor([[0, 2], [1, 1]])
    passes, probe = probe_of(model, {"ids": ids, "label": ids[:, 0]})
    with passes.measuring():
        clean = probe.outputs()
        perturbed = probe.outputs_at(model.embeddings, plus_one)
        torch.testing.assert_close(perturbed, model.compare(model.embeddings(ids).mean(1) + 1))
        torch.testing.assert_close(probe.outputs_at(model.head, plus_one), clean - 2)
        with pytest.raises(MisconfigurationException, match="`at` should name a submodule that `forward` calls"):
            probe.outputs_at(model.spare, plus_one)
        with pytest.raises(ZeroDivisionError):
            probe.outputs_at(model.head, lambda x: x / (1 // 0))
        assert torch.equal(probe.outputs(), clean)
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_are_those_of_their_pass_without_a_graph_and_the_batch_stays() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.zeros(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.memory.copy_(x.mul_(2))

    batch = X.clone().requires_grad_()
    passes, probe = probe_of(Written(), batch, perturbs_inputs=True)
    with passes.measuring():
        clean, noisy = probe.outputs(), probe.outputs(plus_one)
    assert torch.equal(clean, 2 * X) and torch.equal(noisy, 2 * X + 2)
    assert torch.equal(batch, X) and not clean.requires_grad
    assert probe.tensors[0] is batch
