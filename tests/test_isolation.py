import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection

from lightning_sensitivity.isolation import evaluating, preserved_rng, preserved_tensors


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_random_streams_go_on_as_if_nothing_was_drawn(error: type[BaseException] | None) -> None:
    def seed() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    if error is None:
        with preserved_rng({torch.device("cpu")}):
            draws()
    else:
        with pytest.raises(error), preserved_rng({torch.device("cpu")}):
            draws()
            raise error
    assert draws() == expected


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_buffers_get_their_values_back(inference: bool, made_in_inference_mode: bool) -> None:
    model = nn.Module()
    with torch.inference_mode(made_in_inference_mode):
        model.register_buffer("written", torch.zeros(2))
        model.register_buffer("replaced", torch.zeros(2))
    model.register_buffer("expanded", torch.ones(1).expand(3))  # can't be written to
    model.register_buffer("lazy", nn.UninitializedBuffer())
    model.register_buffer("unset", None)
    model.register_buffer("resized", torch.zeros(2))
    model.register_buffer("deleted", torch.zeros(2))
    model.shared = nn.Module()
    model.shared.register_buffer("written", model.written)
    before = dict(model.named_buffers(remove_duplicate=False))
    with torch.inference_mode(inference), preserved_tensors(model):
        if inference or not made_in_inference_mode:  # elsewhere torch refuses to write
            model.written += 1
        model.replaced = model.replaced + 1
        model.unset = torch.ones(2)
        model.resized.resize_(5).fill_(1)
        model.register_buffer("new", torch.ones(1))
        del model.deleted
    after = dict(model.named_buffers(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert model.unset is None
    assert torch.equal(model.resized, torch.zeros(2))
    assert all(after[name] is buffer for name, buffer in before.items())
    assert torch.equal(model.written, torch.zeros(2))
    assert torch.equal(model.replaced, torch.zeros(2))


def test_attributes_that_hold_tensors_are_those_from_before() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    pruned, other = torch.zeros(2), torch.ones(2)
    model.hidden, model[0].pruned, model.gone, model.count, model.kind = None, pruned, other, 0, "a"
    names = [list(vars(module)) for module in model.modules()]
    with preserved_tensors(model):
        model.hidden, model[0].pruned, model[0].new = (other, [other]), other, {"cache": other}
        del model.gone
        model.count, model.kind = 1, "b"
    assert model.hidden is None
    assert model[0].pruned is pruned
    assert model.gone is other
    assert [sorted(vars(module)) for module in model.modules()] == [sorted(own) for own in names]
    assert (model.count, model.kind) == (0, "a")  # what goes with the tensors


def test_attributes_without_tensors_beside_them_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.calls, model[0].cached = 0, None
    with preserved_tensors(model):
        model.calls, model[0].cached = 1, torch.ones(1)
    assert model.calls == 1
    assert model[0].cached is None


def test_a_tree_with_parents_is_no_trap() -> None:
    model = nn.Module()
    model.tree = {"x": torch.zeros(1)}
    with preserved_tensors(model):
        node = {"x": torch.ones(1)}
        node["itself"] = node
        model.tree, model.ids = node, range(10**12)
    assert not model.tree["x"].any()


@pytest.mark.parametrize("error", [None, ValueError])
def test_what_is_written_into_attributes_is_put_back(error: type[Exception] | None) -> None:
    model = nn.Module()
    model.hidden, model.cache, model.memory = torch.zeros(2), [torch.zeros(1)], {"first": torch.ones(1)}
    model.calls = []
    model.metric = MetricCollection([MeanMetric(), CatMetric()])
    model.metric.update(torch.ones(3))
    memory = dict(model.memory)
    with suppress(ValueError), preserved_tensors(model):
        model.hidden += 1
        model.cache.append(torch.ones(3))
        model.memory["second"] = torch.ones(1)
        model.memory["first"] = torch.zeros(1)
        model.calls.append("a")
        model.metric.update(torch.zeros(3))
        if error:
            raise error
    assert model.calls == []  # beside tensors
    assert not model.hidden.any()
    assert len(model.cache) == 1
    assert model.memory == memory
    assert model.metric.compute()["MeanMetric"] == 1
    assert torch.equal(model.metric.compute()["CatMetric"], torch.ones(3))
    assert all(metric._update_count == 1 for metric in model.metric.values())


def test_freed_memory_is_not_read() -> None:
    """As of a model whose weights are in other processes."""
    model = nn.Module()
    model.weight = torch.zeros(4)
    model.weight.untyped_storage().resize_(0)
    with preserved_tensors(model):
        pass
    assert model.weight.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("error", [None, ValueError])
def test_every_submodule_gets_its_own_mode_back(error: type[Exception] | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model[2].eval()
    model[2][0].train()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def run() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == before
