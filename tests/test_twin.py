import copy

import pytest
import torch
from torch import nn

from lightning_sensitivity.twin import initial_weights, learned_weights, twin
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
