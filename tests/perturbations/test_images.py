import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.perturbations import Rotation, Translation, noise_generator
from lightning_sensitivity.perturbations.images import _moved


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def ramps(count: int, height: int, width: int) -> Tensor:
    """Images whose channels are the row and the column, from the centre; bilinear interpolation of them is exact."""
    rows, columns = (torch.arange(size) - (size - 1) / 2 for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(count, 2, height, width)


@given(height=st.integers(1, 6), width=st.integers(1, 6), down=st.integers(-5, 5), right=st.integers(-5, 5))
def test_whole_pixels_are_a_shift_which_repeats_the_edge(height: int, width: int, down: int, right: int) -> None:
    x = images(1, 3, height, width)
    down, right = (max(min(by, size - 1), 1 - size) for by, size in ((down, height), (right, width)))
    rows, columns = ((torch.arange(size) - by).clamp(0, size - 1) for by, size in ((down, height), (right, width)))
    close(_moved(x, torch.zeros(1), torch.tensor([down]), torch.tensor([right])), x[:, :, rows][..., columns])


@pytest.mark.parametrize(
    ("size", "degrees"), [*(((n, n), d) for n in (1, 4, 7) for d in (-90, 90, 180)), ((4, 9), 180)]
)
def test_quarter_turns_of_squares_and_half_turns_are_exact(size: tuple[int, int], degrees: int) -> None:
    x, still = images(2, 3, *size), torch.zeros(2)
    close(_moved(x, torch.full((2,), float(degrees)), still, still), x.rot90(degrees // 90, (2, 3)))


def test_every_image_turns_by_its_own_angle_and_is_not_stretched() -> None:
    turned = Rotation(30)(ramps(2000, 9, 21), noise_generator(0))
    # Where the centre's neighbour below and on the right comes from
    sine, cosine = turned[:, 0, 4, 11], turned[:, 1, 4, 11]
    close(turned[:, :, 5, 10], torch.stack([cosine, -sine], dim=1))
    close(sine.square() + cosine.square(), torch.ones(2000))
    degrees = torch.atan2(sine, cosine).rad2deg()
    assert 29.9 < degrees.abs().max() <= 30 and degrees.mean().abs() < 4 * 30 / math.sqrt(3 * 2000)
    assert degrees.square().mean().item() == pytest.approx(30**2 / 3, rel=0.1)


def test_every_image_moves_by_its_own_offset() -> None:
    x = ramps(2000, 9, 12)
    change = x - Translation(2.5)(x, noise_generator(0))
    offset = change[:, :, 4, 6]
    close(change[:, :, 3, 5], offset)
    assert 2.45 < offset.abs().max() <= 2.5 + 1e-5
    close(offset.T @ offset / 2000, torch.eye(2) * 2.5**2 / 3, 0.15, 0.1)


def test_what_turns_out_of_the_picture_is_filled_with_its_edge_and_no_noise_is_added() -> None:
    x = torch.full((3, 1, 4, 6), 0.7)
    for perturbation in (Rotation(180), Translation(100)):
        close(perturbation(x, noise_generator(0)), x)
        assert perturbation.second_moment(x) is None


@pytest.mark.parametrize("kind", [Rotation, Translation])
def test_other_ranks_are_no_images(kind: type[Rotation]) -> None:
    for shape in ((4, 3), (3, 8, 8), (1, 3, 2, 8, 8)):
        match = rf"images \(N, C, H, W\) for {kind.__name__}\(1.0\), but got .* shape \({shape[0]},"
        with pytest.raises(ValueError, match=match):
            kind(1)(images(*shape), noise_generator(0))
