import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_sensitivity.model import twins
from lightning_sensitivity.model.twins import InitialWeights, copy_weights, twin

X = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def train(model: nn.Module, seed: int = 0) -> None:
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=noise(seed)))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return copy_weights(dict(model.named_parameters()))


def trained() -> tuple[Any, dict[str, Tensor]]:
    """A network, and its weights before it learned."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    initial = weights_of(model)
    train(model)
    return model, initial


def are_equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SCALE = nn.Module()
SCALE.temperature = nn.Parameter(torch.ones(()))  # of no dimension


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as transformers has it: its weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.zeros(nf))


@pytest.mark.parametrize(("model", "shapes"), [  # of the factors, where there is not one for each element
    (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), {"0.weight": (1, 5), "2.weight": (1, 6)}),
    (SCALE, {}), (nn.Embedding(5, 4), {"weight": (5, 1)}), (nn.LayerNorm((3, 4)), {}),
    (nn.Conv2d(3, 4, 2), {"weight": (1, 3, 2, 2)}), (nn.ConvTranspose2d(3, 4, 2), {"weight": (3, 1, 2, 2)}),
    (nn.Conv1d(4, 6, 3, groups=2), {"weight": (2, 1, 2, 3)}),  # three outputs for each group of two inputs
    (weight_norm(nn.Linear(3, 12)), {"parametrizations.weight.original1": (1, 3)}),
    (weight_norm(nn.ConvTranspose2d(3, 4, 2)), {"parametrizations.weight.original1": (3, 1, 2, 2)}),
    (nn.Sequential(weight_norm(nn.Embedding(5, 4))), {"0.parametrizations.weight.original1": (5, 1)}),
    (Conv1D(5, 4), {"weight": (4, 1)}),
])  # fmt: skip
def test_the_weights_of_a_twin_are_those_by_hand(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    initial = weights_of(model)
    train(model)
    weights = weights_of(model)
    for seed, g in ((1, noise(1)), (2, noise(2))):
        with twin(model, initial, noise(seed), strength=0.5):
            for name, weight in model.named_parameters():
                learned, shape = weights[name] - initial[name], shapes.get(name, weight.shape)
                learned = learned.unflatten(0, (2, 3)) if len(shape) > weight.ndim else learned
                learned = learned * (1 + 0.5 * torch.randn(shape, generator=g))  # one for each input of the layer
                torch.testing.assert_close(weight.detach(), initial[name] + learned.reshape(weight.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_come_back_bit_by_bit_and_a_graph_stays_valid(dtype: torch.dtype) -> None:
    model, initial = trained()
    before, places = copy.deepcopy(model.to(dtype)), [parameter.data_ptr() for parameter in model.parameters()]
    losses = [each(X.to(dtype)).square().sum() for each in (model, before)]
    with suppress(KeyboardInterrupt), torch.no_grad(), twin(model, initial, noise()):
        assert not any(map(torch.equal, model.parameters(), before.parameters()))
        raise KeyboardInterrupt
    assert are_equal(model.state_dict(), before.state_dict())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    gradients = [torch.autograd.grad(loss, [*m.parameters()]) for loss, m in zip(losses, (model, before), strict=True)]
    assert all(map(torch.equal, *gradients))


@torch.no_grad()
def test_tied_weights_are_one_and_later_ones_have_been_learned_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    model[1].weight = model[0].weight
    initial = weights_of(model)
    model[2], more = nn.Linear(5, 7), model.append(nn.Linear(7, 2))  # a head that was exchanged, and a new one
    weights, later = weights_of(more), ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert twins.unknown_parameters(model, initial) == later
    with twin(model, initial, noise()):
        assert model[1].weight is model[0].weight
        assert later == [name for name, weight in model.named_parameters() if not torch.equal(weight, weights[name])]


def test_batch_norm_goes_by_the_batch_and_keeps_its_statistics() -> None:
    model = trained()[0]
    before, by_batch = copy.deepcopy(model.state_dict()), copy.deepcopy(model).train()(X)
    torch.testing.assert_close(twins.call_with_batch_statistics(model, lambda: model(X)), by_batch)
    assert are_equal(model.state_dict(), before) and twins.has_batch_norm(model)


# The weights from before training


def test_initial_weights_are_captured_at_step_0_and_kept_by_a_fit_that_is_resumed() -> None:
    (model, first), weights = trained(), InitialWeights()
    for seed, step, source in (
        (1, 0, "at the start of this fit"),
        (2, 7, "of the fit that is resumed"),
        (3, 0, "start"),
    ):
        first = weights_of(model) if step == 0 else first
        weights.begin(model, step)
        assert source in weights.source and are_equal(weights.weights, first)
        train(model, seed)


def test_initial_weights_are_given_or_restored_else_they_have_to_be_known() -> None:
    (model, initial), resumed = trained(), InitialWeights()
    initial["0.weight"] = model[0].weight.detach().clone()  # frozen
    given = InitialWeights(initial)
    given.begin(model, 7)
    resumed.restore(given.changed(model.state_dict()), model.state_dict())
    train(model)  # what was restored are copies
    resumed.begin(model, 7)
    for weights in (given.weights, resumed.weights):
        assert all(torch.equal(weights[name], weight) for name, weight in initial.items())
    for unknown in (InitialWeights({"other": X}), InitialWeights()):
        with pytest.raises(MisconfigurationException, match="`initial_weights"):
            unknown.begin(model, 7)


def test_another_module_is_not_mistaken_for_the_one_whose_weights_were_captured() -> None:
    weights, first = InitialWeights(), nn.Linear(2, 2)
    weights.begin(first, 0)
    captured = dict(weights.weights)
    del first  # the next module may get its address
    with pytest.raises(MisconfigurationException, match="the initial weights are unknown"):
        weights.begin(nn.Linear(2, 2), 7)
    for copied in (pickle.loads(pickle.dumps(weights)), copy.deepcopy(weights)):
        copied.begin(nn.Linear(2, 2), 7)  # in another process every module is another object
        assert are_equal(copied.weights, captured)
