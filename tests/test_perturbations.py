import math

import numpy as np
import pytest
import torch

from lightning_sensitivity.perturbations import GaussianNoise, noise_generator, shifted


def test_noise_has_the_standard_deviation_it_states() -> None:
    x = torch.rand(200, 3, 16, 16)
    change = GaussianNoise(0.3)(x, noise_generator(0)) - x
    assert change.mean().abs() < 0.3 * 4 / math.sqrt(x.numel())
    assert change.std().item() == pytest.approx(0.3, rel=0.02)
    assert GaussianNoise(0.3).second_moment(x) == pytest.approx(0.09)


def test_one_standard_deviation_per_channel() -> None:
    x = torch.rand(200, 3, 16, 16)
    noise = GaussianNoise([0.1, 0.2, 0.4])
    change = noise(x, noise_generator(0)) - x
    torch.testing.assert_close(change.std((0, 2, 3)), torch.tensor([0.1, 0.2, 0.4]), rtol=0.02, atol=0)
    second_moment = noise.second_moment(x)
    assert isinstance(second_moment, torch.Tensor)
    torch.testing.assert_close(second_moment.flatten(), torch.tensor([0.01, 0.04, 0.16]))
    assert noise(torch.rand(5, 3), noise_generator(0)).shape == (5, 3)


@pytest.mark.parametrize("shape", [(4, 2, 8), (4,)])
def test_the_number_of_channels_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"per channel.*got 3 for an input of shape \(4"):
        GaussianNoise([0.1, 0.2, 0.4])(torch.rand(shape), noise_generator(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_type_shape_and_the_input(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3).to(dtype)
    before = x.clone()
    noisy = GaussianNoise(0.1)(x, noise_generator(0))
    assert noisy.dtype == dtype
    assert noisy.shape == x.shape
    assert torch.equal(x, before)
    single = GaussianNoise(0.1)(x.float(), noise_generator(0))
    if dtype != torch.float64:  # the same noise at every precision, rounded once
        assert torch.equal(noisy, single.to(dtype))


@pytest.mark.parametrize("std", [0, 0.0, -0.1, math.nan, math.inf, "0.1", True, None, [], [0.1, 0.0], [0.1, "x"]])
def test_refuses(std: object) -> None:
    with pytest.raises(ValueError, match="positive, finite number, or a list of one per channel, but got"):
        GaussianNoise(std)


def test_numpy_numbers_are_numbers() -> None:
    assert GaussianNoise(np.float32(0.5)).std == 0.5
    assert GaussianNoise([np.float64(0.5)]).std == [0.5]
    assert GaussianNoise(1 / np.array([2.0, 4.0])).std == [0.5, 0.25]
    assert GaussianNoise(torch.tensor([0.5])).std == [0.5]


def test_the_generator_depends_on_its_arguments_alone() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=noise_generator(*key)).tolist())

    keys = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(5, 1, 2, 3, 4) == draw(5, 1, 2, 3, 4)


def test_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    GaussianNoise(0.1)(torch.zeros(4, 3), noise_generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_repr() -> None:
    assert repr(GaussianNoise([0.1, 0.2])) == "GaussianNoise([0.1, 0.2])"


@pytest.mark.parametrize(("down", "right"), [(1, 0), (-2, 0), (0, 2), (0, -1), (1, -1)])
def test_images_move_and_repeat_their_edge(down: int, right: int) -> None:
    images = torch.rand(2, 3, 5, 4)
    moved = shifted(images, down, right)
    for row in range(5):
        for column in range(4):
            source = images[:, :, min(max(row - down, 0), 4), min(max(column - right, 0), 3)]
            assert torch.equal(moved[:, :, row, column], source)


def test_what_can_not_be_moved() -> None:
    with pytest.raises(ValueError, match=r"Expected images \(N, C, H, W\) .* got an input of shape \(2, 3\)"):
        shifted(torch.rand(2, 3), 1, 0)
    with pytest.raises(ValueError, match="moved by 3 and 0 pixels"):
        shifted(torch.rand(2, 1, 3, 4), 3, 0)
