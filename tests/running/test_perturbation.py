import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.running import GaussianNoise, ModelCall, isolated, noise_generator
from lightning_sensitivity.running.perturbation import check_noise, noisy_outputs, perturbation, submodule
from tests.helpers import module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_and_layout_gets_the_same_noise_and_keeps_its_own(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    before, state = x.clone(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        noisy = GaussianNoise(0.5)(x, noise_generator(0))
    expected = x.float() + 0.5 * torch.randn(x.shape, generator=noise_generator(0))
    torch.testing.assert_close(noisy, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert noisy.stride() == x.stride() and torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


def test_the_generator_depends_on_all_of_its_arguments_and_on_nothing_else() -> None:
    keys = [tuple(int(place == one) for place in range(5)) for one in range(6)]
    draws = [{tuple(torch.randn(3, generator=noise_generator(*key)).tolist()) for key in keys} for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) == 6
    assert noise_generator(np.int64(3)).initial_seed() == noise_generator(3).initial_seed()


def test_numbers_and_functions_are_noise_and_nothing_else() -> None:
    assert check_noise(np.float32(0.5)) == check_noise(0.5) == GaussianNoise(0.5) and check_noise(max) is max
    for noise in (0, -0.1, math.nan, math.inf, "0.1", True, None, [0.1, 0.2]):
        with pytest.raises(MisconfigurationException, match="`noise` should be .*, got "):
            check_noise(noise)  # type: ignore[arg-type]


def test_a_function_may_write_into_what_it_gets() -> None:
    x, key = torch.zeros(2, 3), (0, 1, 2, 3, 4)
    perturb = perturbation(lambda x, generator: x.add_(torch.rand(x.shape, generator=generator)), key)
    both = torch.rand(4, 3, generator=noise_generator(*key))  # one stream for all tensors of a draw
    assert torch.equal(torch.cat([perturb(x), perturb(x)]), both) and not x.any()


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, change: Tensor | float = 0.0) -> Tensor:
        hidden = self.rnn(x)[0] + change
        return self.head(hidden) - 3 * self.head(-hidden)


class Pair(NamedTuple):
    hidden: Tensor
    name: str


@pytest.mark.parametrize("make", [lambda x: (x, "b"), lambda x: [x, "b"], lambda x: Pair(x, "b")])
def test_a_submodule_returns_the_kind_of_collection_that_it_did(make: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        result = self.body(x)
        assert type(result) is type(make(x)) and result[1:] == make(x)[1:]
        return result[0]

    model, x = module(forward), torch.rand(5, 4)
    model.body = module(lambda self, x: make(x))
    with isolated(model) as run:
        call = ModelCall(model, x)
        noisy = noisy_outputs(run, call, lambda x, generator: x + 1, (0, 1, 2, 3), 1, submodule(model, "body"))
    torch.testing.assert_close(noisy, [x + 1])


@torch.no_grad()
def test_the_output_of_a_submodule_is_perturbed_each_time_that_it_runs() -> None:
    model, x = Siamese(), torch.rand(5, 4)

    def outputs(at: str | None, noise: Any) -> list[Tensor]:
        layer = None if at is None else submodule(model, at)
        with isolated(model) as run:
            return noisy_outputs(run, ModelCall(model, x), noise, (0, 1, 2, 3), 2, layer)

    noise = [0.5 * torch.randn(5, 4, generator=noise_generator(0, 1, 2, 3, draw)) for draw in range(2)]
    torch.testing.assert_close(outputs(None, GaussianNoise(0.5)), [model(x + each) for each in noise])
    torch.testing.assert_close(outputs("rnn", GaussianNoise(0.5)), [model(x, each) for each in noise])
    torch.testing.assert_close(outputs("head", lambda x, generator: x + 1), [model(x) - 2] * 2)
