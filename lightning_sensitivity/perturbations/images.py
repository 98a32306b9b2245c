"""What is done to images (N, C, H, W): turned and moved ones, whose change depends on the image."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from lightning_sensitivity.perturbations.noise import Perturbation, check_number


class _ImagePerturbation(Perturbation):
    """Checks the shape, and works in single precision or better, also under autocast."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a batch of images.

        Args:
            x: Floating tensor, shape ``(N, C, H, W)``.
            generator: Source of the random numbers, on the device of ``x``.

        Returns:
            A new tensor of the shape, type and memory format of ``x``.

        Raises:
            ValueError: If the input is no batch of images.
        """
        if x.ndim != 4:
            raise ValueError(f"Expected images (N, C, H, W) for {self}, but got an input of shape {tuple(x.shape)}.")
        with torch.autocast(x.device.type, enabled=False):
            images = self._perturbed(x.to(torch.promote_types(x.dtype, torch.float32)), generator)
        return torch.empty_like(x).copy_(images)

    @abstractmethod
    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


class Rotation(_ImagePerturbation):
    """Turn every image about its centre by an angle of its own, which is uniform on [−degrees, degrees].

    Between pixels it is bilinear; where a corner turns out of the picture, the nearest pixel of the edge fills the gap.

    Its second moment E[(x' − x)²] depends on the image (for small angles it is a²/3 times the square of the image's
    derivative by the angle, both in radians, with the largest angle a), and the changes of neighbouring pixels are not
    independent, so that Equation 9 of the paper has no meaning: :meth:`second_moment` is None.

    Args:
        degrees: The largest angle, over 0 and up to 180.

    Raises:
        ValueError: If the angle is not in (0, 180].

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import Rotation, noise_generator
        >>> Rotation(10.0)(torch.eye(3).reshape(1, 1, 3, 3), noise_generator(seed=0))
        tensor([[[[0.8258, 0.1700, 0.0000],
                  [0.0110, 1.0000, 0.0110],
                  [0.0000, 0.1700, 0.8258]]]])
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = check_number("degrees", degrees, above=0, most=180)

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        (degrees,) = _uniform(self.degrees, 1, images, generator)
        still = torch.zeros_like(degrees)
        return _moved(images, degrees, still, still)


class Translation(_ImagePerturbation):
    """Move every image by an offset of its own, down and right, each of them uniform on [−pixels, pixels].

    Between pixels it is bilinear; the pixels of the edge are repeated in the gap.

    Its second moment E[(x' − x)²] depends on the image (for small offsets it is pixels²/3 times the squared length of
    the image's gradient), and the changes of neighbouring pixels are not independent, so that Equation 9 of the paper
    has no meaning: :meth:`second_moment` is None.

    Args:
        pixels: The largest offset in pixels, which need not be whole.

    Raises:
        ValueError: If the offset is not a positive, finite number.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import Translation, noise_generator
        >>> Translation(1.0)(torch.eye(3).reshape(1, 1, 3, 3), noise_generator(seed=0))
        tensor([[[[0.0729, 0.4183, 0.5523],
                  [0.0000, 0.0295, 0.4183],
                  [0.0000, 0.0000, 0.4043]]]])
    """

    def __init__(self, pixels: float) -> None:
        self.pixels = check_number("pixels", pixels, above=0)

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        down, right = _uniform(self.pixels, 2, images, generator)
        return _moved(images, torch.zeros_like(down), down, right)


def _uniform(limit: float, count: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of one number an image, uniform on [−limit, limit]; drawn in float32, as all noise."""
    chance = torch.rand(count, len(images), generator=generator, dtype=torch.float32, device=images.device)
    return limit * (2 * chance.to(images.dtype) - 1)


def _moved(images: Tensor, degrees: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Turn each image counter-clockwise about its centre by its own angle, then move it by its own offset in pixels.

    Not by :func:`torch.nn.functional.affine_grid`, whose matrix product autocast and TensorFloat-32 round, and which
    counts in halves of height and width instead of pixels.
    """
    height, width = images.shape[2:]
    degrees, down, right = (each.reshape(-1, 1, 1) for each in (degrees, down, right))
    rows = torch.arange(height, dtype=images.dtype, device=images.device).reshape(1, -1, 1) - (height - 1) / 2 - down
    columns = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2 - right
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    grid = torch.stack(((cos * columns - sin * rows) * 2 / width, (sin * columns + cos * rows) * 2 / height), dim=-1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
