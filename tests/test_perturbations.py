import math
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sensitivity.image_perturbations import GaussianBlur, Rotation, Translation
from lightning_sensitivity.perturbations import (
    GaussianNoise,
    Interpolation,
    Perturbation,
    RademacherNoise,
    SaltAndPepper,
    UniformNoise,
    noise_generator,
)

NOISES = [GaussianNoise, UniformNoise, RademacherNoise]


def blur() -> GaussianBlur:
    pytest.importorskip("torchvision")
    return GaussianBlur(0.7)


MAKERS: list[Callable[[], Perturbation]] = [
    *(lambda noise=noise: noise([0.1, 0.2, 0.4]) for noise in NOISES),
    lambda: SaltAndPepper(0.3, -1, 2),
    lambda: Interpolation(0.3),
    lambda: Rotation(20),
    lambda: Translation(1.5),
    blur,
]
each_perturbation = pytest.mark.parametrize("make", MAKERS)


# What all of them promise
@each_perturbation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_type_shape_and_the_input(make: Callable[[], Perturbation], dtype: torch.dtype) -> None:
    x, perturbation = torch.rand(4, 3, 5, 7).to(dtype), make()
    before = x.clone()
    noisy = perturbation(x, noise_generator(0))
    assert noisy.dtype == dtype
    assert noisy.shape == x.shape
    assert torch.equal(x, before)
    assert not torch.equal(noisy, x)
    single = perturbation(x.float(), noise_generator(0))
    if dtype == torch.float64:
        torch.testing.assert_close(noisy, single.double(), rtol=0, atol=1e-5)
    else:  # rounded once
        assert torch.equal(noisy, single.to(dtype))


@each_perturbation
def test_channels_last_get_the_same_noise_and_stay_so(make: Callable[[], Perturbation]) -> None:
    x, perturbation = torch.rand(4, 3, 5, 7), make()
    last = x.contiguous(memory_format=torch.channels_last)
    noisy, noisy_last = perturbation(x, noise_generator(0)), perturbation(last, noise_generator(0))
    assert noisy.is_contiguous()
    assert noisy_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(noisy_last, noisy, rtol=0, atol=1e-6)


@each_perturbation
def test_autocast_changes_nothing(make: Callable[[], Perturbation]) -> None:
    x, perturbation = torch.rand(4, 3, 5, 7), make()
    with torch.autocast("cpu", torch.bfloat16):
        noisy = perturbation(x, noise_generator(0))
    assert torch.equal(noisy, perturbation(x, noise_generator(0)))


@each_perturbation
def test_random_numbers_come_from_the_generator_alone(make: Callable[[], Perturbation]) -> None:
    x, perturbation = torch.rand(4, 3, 5, 7), make()
    before = torch.get_rng_state()
    first, again, *others = (perturbation(x, noise_generator(seed)) for seed in (0, *range(9)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert all(torch.equal(first, other) for other in others) == isinstance(perturbation, GaussianBlur)


@each_perturbation
def test_shows_its_arguments_and_can_be_sent_to_another_process(make: Callable[[], Perturbation]) -> None:
    perturbation = make()
    for copy in (eval(repr(perturbation)), pickle.loads(pickle.dumps(perturbation))):
        assert type(copy) is type(perturbation)
        assert vars(copy) == vars(perturbation)


def test_repr() -> None:
    assert repr(GaussianNoise([0.1, 0.2])) == "GaussianNoise([0.1, 0.2])"
    assert repr(SaltAndPepper(1)) == "SaltAndPepper(1.0, 0.0, 1.0)"


@pytest.mark.parametrize("make", [SaltAndPepper, Interpolation, Rotation, Translation, GaussianBlur])
@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, -math.inf, "0.1", True, None, [0.1]])
def test_refuses(make: Callable[..., Perturbation], value: object) -> None:
    with pytest.raises(ValueError, match=r"^Expected `\w+` to be a finite number above 0.*, but got") as error:
        make(value)
    assert str(error.value).endswith(f" got {value!r}.")


def test_refuses_what_is_too_much() -> None:
    with pytest.raises(ValueError, match=r"`probability` to be a finite number above 0, at most 1, but got 1.1\."):
        SaltAndPepper(1.1)
    with pytest.raises(ValueError, match="`weight` .* at most 1, but got 2"):
        Interpolation(2)
    with pytest.raises(ValueError, match="`degrees` .* at most 180, but got 181"):
        Rotation(181)
    for low in (math.inf, math.nan, True, "0"):
        with pytest.raises(ValueError, match="`low` to be a finite number, but got"):
            SaltAndPepper(0.1, low)  # type: ignore[arg-type]
    for high in (0.5, math.inf, math.nan, None):
        with pytest.raises(ValueError, match="`high` to be a finite number above 0.5, but got"):
            SaltAndPepper(0.1, 0.5, high)  # type: ignore[arg-type]


# Independent noise
@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_the_moments_it_states(noise: type[GaussianNoise]) -> None:
    x = torch.rand(200, 3, 16, 16)
    change = noise(0.3)(x, noise_generator(0)) - x
    assert change.mean().abs() < 0.3 * 4 / math.sqrt(x.numel())
    assert change.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise(0.3).second_moment(x) == pytest.approx(0.09)
    neighbours = (change[..., 1:] * change[..., :-1]).mean()
    assert neighbours.abs() < 0.09 * 4 / math.sqrt(x.numel())


@pytest.mark.parametrize("noise", NOISES)
def test_one_standard_deviation_per_channel(noise: type[GaussianNoise]) -> None:
    x = torch.rand(200, 3, 16, 16)
    perturbation = noise([0.1, 0.2, 0.4])
    change = perturbation(x, noise_generator(0)) - x
    second_moment = perturbation.second_moment(x)
    assert isinstance(second_moment, torch.Tensor)
    torch.testing.assert_close(second_moment.flatten(), torch.tensor([0.01, 0.04, 0.16]))
    torch.testing.assert_close(change.square().mean((0, 2, 3)), second_moment.flatten(), rtol=0.03, atol=0)
    assert perturbation(torch.rand(5, 3), noise_generator(0)).shape == (5, 3)


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


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("std", [0, 0.0, -0.1, math.nan, math.inf, "0.1", True, None, [], [0.1, 0.0], [0.1, "x"]])
def test_refuses_standard_deviations(noise: type[GaussianNoise], std: object) -> None:
    with pytest.raises(ValueError, match="positive, finite number, or a list of one per channel, but got"):
        noise(std)


def test_numpy_numbers_are_numbers() -> None:
    assert GaussianNoise(np.float32(0.5)).std == 0.5
    assert GaussianNoise([np.float64(0.5)]).std == [0.5]
    assert GaussianNoise(1 / np.array([2.0, 4.0])).std == [0.5, 0.25]
    assert GaussianNoise(torch.tensor([0.5])).std == [0.5]


# Salt and pepper
def test_salt_and_pepper_are_as_frequent_as_stated() -> None:
    x = torch.rand(100, 1000)
    noisy = SaltAndPepper(0.2, low=-2, high=3)(x, noise_generator(0))
    low, high = noisy == -2, noisy == 3
    for replaced in (low, high):
        assert replaced.float().mean().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy[~(low | high)], x[~(low | high)])
    stated = 0.2 / 2 * ((-2 - x) ** 2 + (3 - x) ** 2)
    assert (noisy - x).square().mean().item() == pytest.approx(stated.mean().item(), rel=0.05)
    assert SaltAndPepper(0.2).second_moment(x) is None
    assert set(SaltAndPepper(1)(x, noise_generator(0)).unique().tolist()) == {0.0, 1.0}


# Interpolation
@given(count=st.integers(2, 9), seed=st.integers(0, 1000))
def test_interpolation_to_the_end_is_a_permutation_without_fixed_points(count: int, seed: int) -> None:
    x = torch.rand(count, 2, 3)
    others = Interpolation(1)(x, noise_generator(seed))
    partners = [[torch.equal(other, sample) for sample in x].index(True) for other in others]
    assert sorted(partners) == list(range(count))
    assert all(partner != place for place, partner in enumerate(partners))
    torch.testing.assert_close(Interpolation(0.3)(x, noise_generator(seed)), x + 0.3 * (others - x))


def test_interpolation_meets_all_others_alike_and_has_the_second_moment_it_states() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    others = torch.cat([Interpolation(1)(x, noise_generator(seed)) for seed in range(600)], dim=1)
    for sample, met in zip(x, others, strict=True):
        values, counts = met.unique(return_counts=True)
        assert values.tolist() == [other for other in x.flatten().tolist() if other != sample]
        assert counts.min() > 200 - 4 * math.sqrt(600 * 2 / 9)
    change = torch.cat([Interpolation(0.5)(x, noise_generator(seed)) - x for seed in range(600)], dim=1)
    stated = 0.5**2 * (x - x.T).square().sum(1) / 3
    torch.testing.assert_close(change.square().mean(1), stated, rtol=0.1, atol=0)
    assert Interpolation(0.5).second_moment(x) is None


def test_a_sample_alone_has_no_other() -> None:
    x = torch.rand(1, 3)
    with pytest.warns(UserWarning, match=r"two samples or more for Interpolation\(0.5\), .* of shape \(1, 3\)"):
        same = Interpolation(0.5)(x, noise_generator(0))
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):  # once, not in every epoch
            Interpolation(0.5)(x, noise_generator(0))
    assert len(caught) == 1


# The generator
def test_the_generator_depends_on_its_arguments_alone() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=noise_generator(*key)).tolist())

    keys = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(5, 1, 2, 3, 4) == draw(5, 1, 2, 3, 4)
