import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.twins import (
    batch_statistics,
    copy_weights,
    has_batch_norm,
    twin_weights,
    unknown_parameters,
)

X = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def train(model: nn.Module, seed: int = 0) -> None:
    for parameter in model.parameters():
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=noise(seed)))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return copy_weights(dict(model.named_parameters()))


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
        for name, weight in twin_weights(model, initial, noise(seed), strength=0.5).items():
            learned, shape = weights[name] - initial[name], shapes.get(name, weight.shape)
            learned = learned.unflatten(0, (2, 3)) if len(shape) > weight.ndim else learned
            learned = learned * (1 + 0.5 * torch.randn(shape, generator=g))  # one for each input of the layer
            torch.testing.assert_close(weight, initial[name] + learned.reshape(weight.shape))


class Wrapped(LightningModule):
    """Calls a part; its own ``forward`` can be replaced."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        result = self.part(x)
        return result[0] if isinstance(result, tuple) else result


def with_replaced_forward() -> nn.Module:
    model = Wrapped(nn.Linear(5, 5))
    model.forward = lambda x: model.part(2 * x)  # type: ignore[method-assign]
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a recurrent network": lambda: Wrapped(nn.LSTM(5, 3, num_layers=2, bidirectional=True)),
    "attention": lambda: nn.TransformerEncoderLayer(5, 1, 8, batch_first=True).eval(),
    "weight norm": lambda: Wrapped(weight_norm(nn.Linear(5, 4))),
    "spectral norm": lambda: Wrapped(spectral_norm(nn.Linear(5, 4))).eval(),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)),
    "a forward that was replaced": with_replaced_forward,
    "a compiled module": lambda: compiled(nn.Linear(5, 4)),
    "a compiled part": lambda: Wrapped(compiled(nn.Linear(5, 4))),
    "a compiled LightningModule": lambda: from_compiled(compiled(Wrapped(nn.Linear(5, 4)))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_twin_gives_the_outputs_of_a_model_with_its_weights(name: str) -> None:
    model = MODELS[name]()
    initial = weights_of(model)
    train(model)
    trained_state = copy.deepcopy(model.state_dict())
    weights, x = twin_weights(model, initial, noise()), X.clone()
    with isolated(model) as run:
        clean, twin = run(ModelCall(model, x)), run(lambda: ModelCall(model, x)(weights=weights))
        assert torch.equal(run(ModelCall(model, x)), clean) and not torch.allclose(twin, clean)
    assert are_equal(model.state_dict(), trained_state)
    for parameter, weight in zip(model.parameters(), weights.values(), strict=True):
        parameter.copy_(weight)
    with isolated(model) as run:
        torch.testing.assert_close(run(ModelCall(model, x)), twin)


@torch.no_grad()
def test_tied_weights_are_one_and_later_ones_have_been_learned_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    model[1].weight = model[0].weight
    initial = weights_of(model)
    model[2], more = nn.Linear(5, 7), model.append(nn.Linear(7, 2))  # a head that was exchanged, and a new one
    trained, later = weights_of(more), ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert unknown_parameters(model, initial) == later
    twin = twin_weights(model, initial, noise())
    assert "1.weight" not in twin and later == [name for name in twin if not torch.equal(twin[name], trained[name])]


@torch.no_grad()
def test_frozen_weights_without_initial_ones_stay() -> None:
    model = nn.Linear(5, 2).requires_grad_(False)
    assert unknown_parameters(model, {}) == [] and are_equal(twin_weights(model, {}, noise()), weights_of(model))


def test_batch_norm_goes_by_the_batch_and_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()).eval()
    before, by_batch = copy.deepcopy(model.state_dict()), copy.deepcopy(model).train()(X)
    with suppress(KeyboardInterrupt), batch_statistics(model):
        torch.testing.assert_close(model(X), by_batch)
        raise KeyboardInterrupt
    assert are_equal(model.state_dict(), before) and has_batch_norm(model)
    assert not has_batch_norm(nn.BatchNorm1d(6, track_running_stats=False))


class OwnNorm(nn.BatchNorm1d):
    """It reads its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


def test_a_batch_norm_with_a_forward_of_its_own_keeps_its_running_statistics() -> None:
    replaced = nn.BatchNorm1d(5).eval()
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    for norm in (OwnNorm(5).eval(), replaced):
        before = norm(X)
        with batch_statistics(norm):
            assert torch.equal(norm(X), before)
        assert not has_batch_norm(norm)
