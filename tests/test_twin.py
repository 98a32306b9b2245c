import copy

import pytest
import torch
from torch import nn

from lightning_sensitivity.twin import _give_back, initial_weights, learned_weights, twin
from tests.helpers import NUM_FEATURES, Classifier, inputs


def trained(scale: float = 0.1) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Classifier().eval()
    initial = initial_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model, initial


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_untrained_network_is_its_own_twin() -> None:
    model = Classifier().eval()
    x, learned = inputs(5), learned_weights(model, initial_weights(model))
    with torch.no_grad():
        before = model(x)
        with twin(model, learned, noise()):
            assert torch.equal(model(x), before)


def test_own_weights_come_back_bit_by_bit() -> None:
    model, initial = trained()
    before = copy.deepcopy(model.state_dict())
    learned = learned_weights(model, initial)
    with pytest.raises(KeyboardInterrupt), twin(model, learned, noise()):
        assert not torch.equal(model.net[0].weight, before["net.0.weight"])
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_training_did_not_move_stays() -> None:
    model, initial = trained()
    with torch.no_grad():
        model.net[0].weight.copy_(initial["net.0.weight"])
    before = model.net[0].weight.clone()
    with twin(model, learned_weights(model, initial), noise()):
        assert torch.equal(model.net[0].weight, before)
        assert not torch.equal(model.net[-1].weight, initial["net.4.weight"])


def test_the_same_generator_gives_the_same_twin() -> None:
    model, initial = trained()
    learned, x = learned_weights(model, initial), inputs(5)
    outputs = []
    for seed in (0, 0, 1):
        with torch.no_grad(), twin(model, learned, noise(seed)):
            outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_variance_over_twins_of_a_linear_layer_is_known() -> None:
    """Each input of the layer gets noise of its own: Var f_k = Σ_j (d_kj x_j)², plus d_k² of the bias."""
    torch.manual_seed(0)
    model = nn.Linear(NUM_FEATURES, 3)
    initial = initial_weights(model)
    nn.init.normal_(model.weight)
    nn.init.normal_(model.bias)
    learned, x = learned_weights(model, initial), inputs(4)
    generator = noise()
    with torch.no_grad():
        clean = model(x)
        changes = []
        for _ in range(10_000):
            with twin(model, learned, generator):
                changes.append(model(x) - clean)
    expected = x.square() @ learned["weight"].square().T + learned["bias"].square()
    variance = torch.stack(changes).var(0)
    torch.testing.assert_close(variance, expected, rtol=0.08, atol=0.0)
    assert torch.stack(changes).mean(0).abs().max() < 0.05 * expected.sqrt().max()


def test_a_twin_of_one_layer_has_coherent_outputs() -> None:
    """The noise belongs to an input, so that outputs that learned the same from it change alike."""
    model = nn.Linear(NUM_FEATURES, 2, bias=False)
    initial = initial_weights(model)
    with torch.no_grad():
        model.weight.add_(1.0)
        change = -model(inputs(4))
        with twin(model, learned_weights(model, initial), noise()):
            change += model(inputs(4))
    torch.testing.assert_close(change[:, 0], change[:, 1])


def test_16_bit_weights_and_buffers() -> None:
    model, initial = trained()
    model = model.bfloat16()
    learned = learned_weights(model, initial)
    assert {value.dtype for value in learned.values()} == {torch.bfloat16}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), twin(model, learned, noise()):
        assert model(inputs(5).bfloat16()).isfinite().all()
        assert torch.equal(model.net[1].running_mean, before["net.1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_came_later_were_learned_as_a_whole() -> None:
    model, initial = trained()
    model.net[-1] = nn.Linear(16, 7)
    model.net.append(nn.Linear(7, 2))
    learned = learned_weights(model, initial)
    assert torch.equal(learned["net.4.weight"], model.net[4].weight)
    assert torch.equal(learned["net.5.bias"], model.net[5].bias)
    with torch.no_grad(), twin(model, learned, noise()):
        assert model(inputs(5)).shape == (5, 2)


def learned_alone(module: nn.Module) -> dict[str, torch.Tensor]:
    """As if all of it had been learned, and the same everywhere."""
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def factors(module: nn.Module) -> torch.Tensor:
    with twin(module, learned_alone(module), noise()):
        return module.weight.detach() - 1


@pytest.mark.parametrize(
    ("module", "shared"),  # along which dimension of the weights a factor is shared
    [
        (nn.Linear(3, 4), 0),
        (nn.Conv2d(3, 4, 2), 0),
        (nn.ConvTranspose2d(3, 4, 2), 1),
        (nn.Embedding(5, 4), 1),
    ],
)
def test_a_factor_belongs_to_an_input_of_the_layer(module: nn.Module, shared: int) -> None:
    xi = factors(module)
    assert torch.equal(xi, xi.narrow(shared, 0, 1).expand_as(xi))
    assert len(xi.unique()) == xi.numel() // xi.shape[shared]


def test_a_factor_of_a_grouped_convolution_belongs_to_an_input_of_its_group() -> None:
    xi = factors(nn.Conv1d(4, 6, 3, groups=2))  # (6, 2, 3): three outputs for each group of two inputs
    assert torch.equal(xi[0], xi[1]) and torch.equal(xi[0], xi[2])
    assert torch.equal(xi[3], xi[5])
    assert len(xi.unique()) == 2 * 2 * 3


def test_what_has_no_inputs_has_a_factor_for_each_element() -> None:
    for module in (nn.LayerNorm((3, 4)), nn.BatchNorm1d(12), nn.utils.parametrizations.weight_norm(nn.Linear(3, 12))):
        learned = learned_alone(module)
        name = "parametrizations.weight.original0" if "parametrizations.weight.original0" in learned else "weight"
        with twin(module, learned, noise()):
            assert len(dict(module.named_parameters())[name].detach().unique()) == 12


def test_tied_and_lazy_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(2))
    model[1].weight = model[0].weight
    initial = initial_weights(model)
    assert set(initial) == {"0.weight", "0.bias", "1.bias"}
    with torch.no_grad():
        model(inputs(3)[:, :4])  # makes the lazy one
    learned = learned_weights(model, initial)
    assert torch.equal(learned["2.weight"], model[2].weight)
    with twin(model, learned, noise()):
        assert model[1].weight is model[0].weight


def test_ctrl_c_while_weights_are_given_back_has_to_wait() -> None:
    class Place:
        """A parameter that gets a Ctrl-C the first time that it is given its data back."""

        interrupts = 1

        @property
        def data(self) -> str:
            return self.content

        @data.setter
        def data(self, value: str) -> None:
            if value == "own" and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            self.content = value

    places = [Place(), Place(), Place()]
    for place in places:
        place.data = "twin"
    with pytest.raises(KeyboardInterrupt):
        _give_back([(place, "own", "twin") for place in places])
    assert [place.data for place in places] == ["own"] * 3


def test_autocast_uses_the_weights_of_the_twin_and_then_the_own_ones() -> None:
    model, initial = trained(1.0)
    learned, x = learned_weights(model, initial), inputs(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with twin(model, learned, noise()):
            inside = model(x)
        after = model(x)
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)


def test_complex_weights_answer_to_noisy_inputs_too() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    initial, own = initial_weights(model), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1j)
    with twin(model, learned_weights(model, initial), noise()):
        factors = (model.weight.detach() - own) / 1j
    torch.testing.assert_close(factors, (1 + torch.randn(1, 2, generator=noise())).expand(3, 2) + 0j)
