import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sensitivity.perturbations import (
    GaussianNoise,
    Interpolation,
    Perturbation,
    RademacherNoise,
    Rotation,
    SaltAndPepper,
    Translation,
    UniformNoise,
    noise_generator,
)
from lightning_sensitivity.perturbations.noise import apply_perturbation

NOISES = [GaussianNoise, UniformNoise, RademacherNoise]


PERTURBATIONS = [*(noise([0.1, 0.2, 0.4]) for noise in NOISES), SaltAndPepper(0.3, -1, 2), Interpolation(0.3)]
PERTURBATIONS += [Rotation(20), Translation(1.5)]
each_perturbation = pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
each_noise = pytest.mark.parametrize("noise", NOISES)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (4, 3, 5, 7), generator=torch.Generator().manual_seed(0))


# What all of them promise
@each_perturbation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_type_and_layout(perturbation: Perturbation, dtype: torch.dtype, memory_format: Any) -> None:
    x = images().to(dtype).contiguous(memory_format=memory_format)
    before = x.clone()
    noisy = perturbation(x, noise_generator(0))
    assert noisy.dtype == dtype and noisy.stride() == x.stride()
    assert torch.equal(x, before) and not torch.equal(noisy, x)
    single = perturbation(x.float().contiguous(), noise_generator(0))  # others are rounded once
    torch.testing.assert_close(noisy, single.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@each_perturbation
def test_random_numbers_come_from_the_generator_alone_under_autocast_too(perturbation: Perturbation) -> None:
    x, before = images(), torch.get_rng_state()
    first, *others = (perturbation(x, noise_generator(seed)) for seed in range(9))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perturbation(x, noise_generator(0)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not all(torch.equal(first, other) for other in others)
    for copy in (eval(repr(perturbation)), pickle.loads(pickle.dumps(perturbation))):  # for another process, too
        assert type(copy) is type(perturbation) and vars(copy) == vars(perturbation)


LIMITS = [(SaltAndPepper, "probability", 1), (Interpolation, "weight", 1), (Rotation, "degrees", 180)]
LIMITS += [(Translation, "pixels", None)]


@pytest.mark.parametrize(("kind", "name", "limit"), LIMITS)
def test_refuses(kind: Callable[..., Perturbation], name: str, limit: float | None) -> None:
    most = f", at most {limit}" if limit else ""
    for value in (0, -0.1, math.nan, math.inf, "0.1", True, None, [0.1], *([limit + 0.1] if limit else [])):
        match = rf"^Expected `{name}` to be a finite number above 0{most}.*, but got {re.escape(repr(value))}"
        with pytest.raises(ValueError, match=match):
            kind(value)


@pytest.mark.parametrize("values", [{"low": math.nan}, {"low": True}, {"high": "0"}, {"low": 0.5, "high": 0.5}])
def test_refuses_values_in_the_wrong_order_or_none(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{[*values][-1]}` to be a finite number.*, but got"):
        SaltAndPepper(0.1, **values)


# Independent noise
@each_noise
def test_noise_is_independent_and_has_the_moments_that_it_states(noise: type[GaussianNoise]) -> None:
    x = images(200, 3, 16, 16)
    perturbation = noise([0.1, 0.2, 0.4])
    change = perturbation(x, noise_generator(0)) - x
    stated = perturbation.second_moment(x)
    torch.testing.assert_close(stated.flatten(), torch.tensor([0.01, 0.04, 0.16]))
    torch.testing.assert_close(change.square().mean((0, 2, 3)), stated.flatten(), rtol=0.03, atol=0)
    scaled = change / stated.sqrt()
    assert scaled.mean().abs() < 4 / math.sqrt(x.numel())
    assert (scaled[..., 1:] * scaled[..., :-1]).mean().abs() < 4 / math.sqrt(x.numel())
    assert noise(0.3).second_moment(x) == pytest.approx(0.09)
    same = noise([0.3, 0.3, 0.3])(x, noise_generator(0))
    torch.testing.assert_close(noise(0.3)(x, noise_generator(0)), same)


def test_the_shapes_of_the_noise() -> None:
    x = torch.zeros(100, 1000)
    gaussian, uniform, rademacher = (noise(0.5)(x, noise_generator(0)) / 0.5 for noise in NOISES)
    assert torch.equal(gaussian * 0.5, torch.randn(x.shape, generator=noise_generator(0)) * 0.5)
    assert uniform.abs().max().item() == pytest.approx(math.sqrt(3), rel=1e-3)
    assert (uniform**4).mean().item() == pytest.approx(9 / 5, rel=0.02)
    assert torch.equal(rademacher.abs(), torch.ones_like(x))


@pytest.mark.parametrize("shape", [(4, 2, 8), (4,)])
def test_the_number_of_channels_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"per channel.*got 3 for an input of shape \(4"):
        GaussianNoise([0.1, 0.2, 0.4])(torch.rand(shape), noise_generator(0))
    assert GaussianNoise([0.1, 0.2, 0.4])(torch.zeros(5, 3), noise_generator(0)).all()


@each_noise
@pytest.mark.parametrize("std", [0, 0.0, -0.1, math.nan, math.inf, "0.1", True, None, [], [0.1, 0.0], [0.1, "x"]])
def test_refuses_standard_deviations(noise: type[GaussianNoise], std: Any) -> None:
    with pytest.raises(ValueError, match="positive, finite number, or a list of one per channel, but got"):
        noise(std)


NUMBERS = [(np.float32(0.5), 0.5), (1 / np.array([2.0, 4.0]), [0.5, 0.25]), (torch.tensor([0.5]), [0.5])]


@pytest.mark.parametrize(("std", "expected"), NUMBERS)
def test_numpys_numbers_are_numbers(std: Any, expected: Any) -> None:
    assert GaussianNoise(std).std == expected


# Others
def test_salt_and_pepper_are_as_frequent_as_stated() -> None:
    x = images(100, 1000)
    noisy = SaltAndPepper(0.2, low=-2, high=3)(x, noise_generator(0))
    low, high = noisy == -2, noisy == 3
    for replaced in (low, high):
        assert replaced.float().mean().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy[~(low | high)], x[~(low | high)])
    assert SaltAndPepper(0.2).second_moment(x) is None
    assert set(SaltAndPepper(1)(x, noise_generator(0)).unique().tolist()) == {0.0, 1.0}


@given(count=st.integers(2, 9), seed=st.integers(0, 1000))
def test_interpolation_to_the_end_is_a_permutation_without_fixed_points(count: int, seed: int) -> None:
    x = images(count, 2, 3)
    others = Interpolation(1)(x, noise_generator(seed))
    partners = [[torch.equal(other, sample) for sample in x].index(True) for other in others]
    assert sorted(partners) == list(range(count))
    assert all(partner != place for place, partner in enumerate(partners))
    torch.testing.assert_close(Interpolation(0.3)(x, noise_generator(seed)), x + 0.3 * (others - x))


def test_interpolation_meets_all_others_alike() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    others = torch.cat([Interpolation(1)(x, noise_generator(seed)) for seed in range(600)], dim=1)
    for sample, met in zip(x, others, strict=True):
        values, counts = met.unique(return_counts=True)
        assert values.tolist() == [other for other in x.flatten().tolist() if other != sample]
        assert counts.min() > 200 - 4 * math.sqrt(600 * 2 / 9)
    assert Interpolation(0.5).second_moment(x) is None


def test_a_sample_alone_has_no_other_which_is_said_once() -> None:
    x = images(1, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        same = [Interpolation(0.5)(x, noise_generator(0)) for _ in range(3)]
    assert torch.equal(same[0], x) and same[0].data_ptr() != x.data_ptr()
    (warning,) = caught
    assert "two samples or more for Interpolation(0.5), but got an input of shape (1, 3)" in str(warning.message)


@pytest.mark.parametrize(("function", "match"), [
    (lambda x: None, r"like the one it got \(torch.float32, \(2, 3\), cpu\), got NoneType"),
    (lambda x: x[:1], r"got torch.float32, \(1, 3\), cpu"),
    (lambda x: x.double(), "got torch.float64"),
    (lambda x: x.to("meta"), "meta"),
])  # fmt: skip
def test_a_function_may_write_into_what_it_gets_and_gives_the_like(function: Any, match: str) -> None:
    x = torch.zeros(2, 3)
    assert apply_perturbation(lambda x, generator: x.add_(1), x, noise_generator(0)).sum() == 6
    assert not x.any()
    with pytest.raises(TypeError, match=match):
        apply_perturbation(lambda x, generator: function(x), x, noise_generator(0))


def test_the_generator_depends_on_all_of_its_arguments_and_on_nothing_else() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=noise_generator(*key)).tolist())

    keys = [tuple(int(place == one) for place in range(5)) for one in range(6)]
    assert len({draw(*key) for key in keys}) == 6
    assert draw(5, 1, 2, 3, 4) == draw(5, 1, 2, 3, 4)
