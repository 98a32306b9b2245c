import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.perturbations import GaussianBlur, Rotation, Translation, noise_generator, shifted
from lightning_sensitivity.perturbations.images import _moved


def ramps(count: int, height: int, width: int) -> Tensor:
    """Images whose channels are the row and the column, from the centre; bilinear interpolation of them is exact."""
    rows, columns = (torch.arange(size) - (size - 1) / 2 for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(count, 2, height, width)


def angle(degrees: float) -> Tensor:
    return torch.full((2,), degrees)


# Moving
@given(height=st.integers(1, 6), width=st.integers(1, 6), down=st.integers(-5, 5), right=st.integers(-5, 5))
def test_a_translation_by_whole_pixels_is_a_shift(height: int, width: int, down: int, right: int) -> None:
    images = torch.rand(2, 3, height, width)
    moved = _moved(images, angle(0), torch.tensor([down, 0]), torch.tensor([0, right]))
    down, right = (max(min(by, size - 1), 1 - size) for by, size in ((down, height), (right, width)))
    expected = torch.stack((shifted(images, down, 0)[0], shifted(images, 0, right)[1]))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_quarter_turn_is_exact_on_squares(size: int) -> None:
    images = torch.rand(2, 3, size, size)
    for quarters in (-1, 1, 2):
        turned = _moved(images, angle(90.0 * quarters), torch.zeros(2), torch.zeros(2))
        torch.testing.assert_close(turned, images.rot90(quarters, (2, 3)), rtol=0, atol=1e-5)


def test_half_a_turn_is_exact_on_other_images() -> None:
    images = torch.rand(2, 3, 4, 9)
    turned = _moved(images, angle(180), torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(turned, images.flip(2, 3), rtol=0, atol=1e-5)


def test_every_image_turns_by_its_own_angle_and_is_not_stretched() -> None:
    images = ramps(2000, 9, 21)
    turned = Rotation(30)(images, noise_generator(0))
    # Where the centre's neighbour below and on the right comes from
    sine, cosine = turned[:, 0, 4, 11], turned[:, 1, 4, 11]
    torch.testing.assert_close(turned[:, 0, 5, 10], cosine, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[:, 1, 5, 10], -sine, rtol=0, atol=1e-5)
    torch.testing.assert_close(sine.square() + cosine.square(), torch.ones(2000), rtol=0, atol=1e-5)
    degrees = torch.atan2(sine, cosine).rad2deg()
    assert 29.9 < degrees.abs().max() <= 30
    assert degrees.mean().abs() < 4 * 30 / math.sqrt(3 * 2000)
    assert degrees.square().mean().item() == pytest.approx(30**2 / 3, rel=0.1)


def test_every_image_moves_by_its_own_offset() -> None:
    images = ramps(2000, 9, 12)
    moved = Translation(2.5)(images, noise_generator(0))
    offset = (images - moved)[:, :, 4, 6]
    torch.testing.assert_close((images - moved)[:, :, 3, 5], offset, rtol=0, atol=1e-5)
    assert 2.45 < offset.abs().max() <= 2.5 + 1e-5
    covariance = offset.T @ offset / 2000
    torch.testing.assert_close(covariance, torch.eye(2) * 2.5**2 / 3, rtol=0.1, atol=0.15)


def test_the_second_moments_of_small_movements() -> None:
    images = ramps(2000, 7, 9)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    turned = (Rotation(5)(images, noise_generator(0)) - images)[inner].square().mean(0)
    stated = math.radians(5) ** 2 / 3 * images[0].flip(0)[:, 1:-1, 1:-1].square()
    torch.testing.assert_close(turned, stated, rtol=0.1, atol=2e-4)
    moved = (Translation(0.5)(images, noise_generator(0)) - images)[inner].square().mean(0)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5**2 / 3), rtol=0.1, atol=0)
    assert Rotation(5).second_moment(images) is Translation(0.5).second_moment(images) is None


def test_what_turns_out_of_the_picture_is_filled_with_its_edge() -> None:
    images = torch.full((3, 1, 4, 6), 0.7)
    for perturbation in (Rotation(180), Translation(100)):
        torch.testing.assert_close(perturbation(images, noise_generator(0)), images)


# Blurring
@pytest.mark.parametrize("std", [0.5, 1.0, 1.4])
def test_a_point_becomes_a_gaussian(std: float) -> None:
    pytest.importorskip("torchvision")
    point = torch.zeros(1, 1, 21, 23)
    point[..., 10, 11] = 1
    radius = math.ceil(3 * std)
    rows, columns = (torch.arange(size).double() - size // 2 for size in (21, 23))
    kernels = [torch.exp(-(at**2) / (2 * std**2)) * (at.abs() <= radius) for at in (rows, columns)]
    expected = torch.outer(*(kernel / kernel.sum() for kernel in kernels)).float()
    blur = GaussianBlur(std)
    torch.testing.assert_close(blur(point, noise_generator(0))[0, 0], expected, rtol=0, atol=1e-6)
    assert blur.second_moment(point) is None


def test_the_example_of_the_blur() -> None:
    pytest.importorskip("torchvision")
    blurred = GaussianBlur(0.5)(torch.eye(3).reshape(1, 1, 3, 3), noise_generator(seed=0))
    expected = torch.tensor([[0.6640, 0.2514, 0.0462], [0.2514, 0.6422, 0.2514], [0.0462, 0.2514, 0.6640]])
    torch.testing.assert_close(blurred[0, 0], expected, rtol=0, atol=1e-4)


def test_an_image_that_is_smaller_than_the_kernel() -> None:
    pytest.importorskip("torchvision")
    blur = GaussianBlur(2)
    assert blur(torch.rand(1, 1, 7, 7), noise_generator(0)).shape == (1, 1, 7, 7)
    with pytest.raises(ValueError, match=r"more than 6 pixels .* for GaussianBlur\(2.0\), .* shape \(1, 1, 9, 6\)"):
        blur(torch.rand(1, 1, 9, 6), noise_generator(0))


def test_blurring_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.functional", None)
    with pytest.raises(ModuleNotFoundError, match="GaussianBlur needs torchvision: `pip install torchvision`"):
        GaussianBlur(1)


@pytest.mark.parametrize("shape", [(4, 3), (3, 8, 8), (1, 3, 2, 8, 8)])
@pytest.mark.parametrize("kind", [Rotation, Translation, GaussianBlur])
def test_other_ranks_are_no_images(kind: type[Rotation], shape: tuple[int, ...]) -> None:
    if kind is GaussianBlur:
        pytest.importorskip("torchvision")
    with pytest.raises(
        ValueError, match=rf"images \(N, C, H, W\) for {kind.__name__}\(1.0\), but got .* shape \({shape[0]},"
    ):
        kind(1)(torch.rand(shape), noise_generator(0))


# Shifts
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
