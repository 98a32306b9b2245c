import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sensitivity.twins import _give_back, initial_weights, twin

X = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))


def trained(scale: float = 0.5) -> tuple[Any, dict[str, Tensor]]:
    """A network, and its weights before it learned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    initial = initial_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model, initial


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_own_weights_come_back_bit_by_bit(error: type[BaseException] | None, dtype: torch.dtype) -> None:
    model = trained()[0].to(dtype)
    initial = trained(0.0)[1]
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with suppress(ValueError, KeyboardInterrupt), torch.no_grad(), twin(model, initial, noise()):
        assert not any(torch.equal(own, before[name]) for name, own in model.named_parameters())
        assert all(torch.equal(own, before[name]) for name, own in model.named_buffers())
        assert model(X.to(dtype)).isfinite().all()
        if error:
            raise error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places


def test_ctrl_c_while_weights_are_given_back_has_to_wait() -> None:
    class Place:
        """A parameter that gets a Ctrl-C the first time that it is given its data back."""

        interrupts = 1

        def __setattr__(self, name: str, value: str) -> None:
            if name == "data" and value == "own" and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    places = [Place(), Place(), Place()]
    with pytest.raises(KeyboardInterrupt):
        _give_back([(place, "own", "twin") for place in places])
    assert [place.data for place in places] == ["own"] * 3


def test_what_training_did_not_move_stays_and_an_untrained_network_is_its_own_twin() -> None:
    model, initial = trained()
    initial["0.weight"] = before = model[0].weight.detach().clone()
    inside = []
    for seed in (0, 0, 1):
        with torch.no_grad(), twin(model, initial, noise(seed)):
            inside.append(model(X))
            assert torch.equal(model[0].weight, before)
    assert torch.equal(inside[0], inside[1]) and not torch.equal(inside[0], inside[2])  # the generator decides
    untrained, same = trained(0.0)
    with torch.no_grad(), twin(untrained, same, noise()):
        alike = untrained(X)
    assert torch.equal(alike, untrained(X))


def test_a_graph_that_training_holds_stays_valid() -> None:
    gradients = []
    for has_twin in (False, True):
        model, initial = trained()
        loss = model(X).square().sum()
        if has_twin:
            with torch.no_grad(), twin(model, initial, noise()):
                model(X)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_variance_over_twins_of_a_linear_layer_is_known() -> None:
    """Each input of the layer gets noise of its own: Var f_k = Σ_j (d_kj x_j)², plus d_k² of the bias."""
    torch.manual_seed(0)
    model, learned, generator = nn.Linear(5, 3), {"weight": torch.randn(3, 5), "bias": torch.randn(3)}, noise()
    initial = {name: parameter.detach() - learned[name] for name, parameter in model.named_parameters()}
    changes = []
    with torch.no_grad():
        clean = model(X)
        for _ in range(8_000):
            with twin(model, initial, generator):
                changes.append(model(X) - clean)
    expected = X.square() @ learned["weight"].square().T + learned["bias"].square()
    torch.testing.assert_close(torch.stack(changes).var(0), expected, rtol=0.08, atol=0.0)
    assert torch.stack(changes).mean(0).abs().max() < 0.05 * expected.sqrt().max()


def factors(module: nn.Module, name: str = "weight") -> Tensor:
    """ξ of each weight, as if all of them had learned the same."""
    initial = {name: -torch.ones_like(parameter) for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    with twin(module, initial, noise()):
        return dict(module.named_parameters())[name].detach().clone()


@pytest.mark.parametrize(
    ("module", "shared"),  # along which dimension of the weights a factor is shared
    [(nn.Linear(3, 4), 0), (nn.Conv2d(3, 4, 2), 0), (nn.ConvTranspose2d(3, 4, 2), 1), (nn.Embedding(5, 4), 1)],
)
def test_a_factor_belongs_to_an_input_of_the_layer(module: nn.Module, shared: int) -> None:
    xi = factors(module)
    assert torch.equal(xi, xi.narrow(shared, 0, 1).expand_as(xi))
    assert len(xi.unique()) == xi.numel() // xi.shape[shared]


def test_a_factor_of_a_grouped_convolution_belongs_to_an_input_of_its_group() -> None:
    xi = factors(nn.Conv1d(4, 6, 3, groups=2))  # (6, 2, 3): three outputs for each group of two inputs
    assert torch.equal(xi[:3], xi[:1].expand(3, 2, 3)) and torch.equal(xi[3:], xi[3:4].expand(3, 2, 3))
    assert len(xi.unique()) == 2 * 2 * 3


WEIGHT_NORM = nn.utils.parametrizations.weight_norm(nn.Linear(3, 12))
NORMS = [(nn.LayerNorm((3, 4)), "weight"), (nn.BatchNorm1d(12), "weight"), (nn.Linear(3, 12), "bias")]


@pytest.mark.parametrize(("module", "name"), [*NORMS, (WEIGHT_NORM, "parametrizations.weight.original0")])
def test_what_has_no_inputs_has_a_factor_for_each_element(module: nn.Module, name: str) -> None:
    assert len(factors(module, name).unique()) == 12


def test_tied_lazy_and_later_weights() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.LazyLinear(2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    initial = initial_weights(model)
    assert set(initial) == {"0.weight", "0.bias", "1.bias", "3.weight", "3.bias"}
    model[3] = nn.Linear(2, 7)  # a head that was exchanged
    with torch.no_grad():
        model(X)  # makes the lazy one
        nn.init.zeros_(model[2].bias)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), twin(model, initial, noise()):
        assert model[1].weight is model[0].weight and model(X).shape == (4, 7)
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"2.weight", "3.weight", "3.bias"}  # later ones have been learned as a whole


def test_autocast_uses_the_weights_of_the_twin_and_then_the_own_ones() -> None:
    model = nn.Linear(5, 3, bias=False)
    initial = {"weight": model.weight.detach() - 1}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(X)
        with twin(model, initial, noise()):
            inside = model(X)
        after = model(X)
    assert not torch.equal(inside, before) and torch.equal(after, before)


def test_complex_weights_have_real_factors() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    with twin(model, {"weight": torch.full((3, 2), -1j)}, noise()):
        xi = model.weight.detach() / 1j
    torch.testing.assert_close(xi, torch.randn(1, 2, generator=noise()).expand(3, 2) + 0j)
