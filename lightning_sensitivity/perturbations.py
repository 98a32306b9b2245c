"""What is done to an input: small callables ``(x, generator) -> x'``, each of which states its second moment."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GaussianNoise", "four_shifts", "noise_generator", "shifted"]


class GaussianNoise:
    """Add independent normal noise to every element of an input: x' = x + ε, ε ~ N(0, σ² I).

    Its second moment E[(x' − x)²] is σ² for every element.

    Args:
        std: σ in the units that the model receives, one for all elements or one per channel (dimension 1). After
            ``Normalize(mean, std)``, noise of σ in pixel units is ``[σ / s for s in std]``.

    Raises:
        ValueError: If a σ is not a positive, finite number, or if there is none.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import GaussianNoise, noise_generator
        >>> noise = GaussianNoise(0.1)
        >>> x = torch.zeros(2, 3)
        >>> noise(x, noise_generator(seed=0))
        tensor([[-0.0420,  0.1564, -0.0608],
                [-0.0201, -0.0759,  0.0250]])
    """

    def __init__(self, std: float | Sequence[float] = 0.1) -> None:
        std = std.tolist() if hasattr(std, "tolist") else std  # of numpy or torch
        stds = list(std) if isinstance(std, Sequence) and not isinstance(std, str) else [std]
        valid = [isinstance(s, Real) and not isinstance(s, bool) and 0 < float(s) < math.inf for s in stds]
        if not stds or not all(valid):
            raise ValueError(
                "Expected the noise's standard deviation to be a positive, finite number, or a list of one per channel,"
                f" but got {std!r}."
            )
        self.std = [float(s) for s in stds] if isinstance(std, Sequence) else float(std)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a batch.

        Args:
            x: Floating tensor, shape ``(N, ...)``, or ``(N, C, ...)`` for σ per channel.
            generator: Source of the noise, on the device of ``x``.

        Returns:
            A new tensor of the shape and type of ``x``.

        Raises:
            ValueError: If the number of σ is not the number of channels.
        """
        # 16-bit inputs are perturbed in float32 and rounded once, like the data that the model was given.
        dtype = torch.promote_types(x.dtype, torch.float32)
        noise = torch.randn(x.shape, generator=generator, dtype=dtype, device=x.device)
        return (x + self._std_for(x) * noise).to(x.dtype)

    def second_moment(self, x: Tensor) -> Tensor | float:
        """E[(x' − x)²] of each element: σ², a number or a tensor that broadcasts to the shape of ``x``."""
        return self._std_for(x) ** 2

    def _std_for(self, x: Tensor) -> Tensor | float:
        if isinstance(self.std, float):
            return self.std
        if x.ndim < 2 or x.shape[1] != len(self.std):
            raise ValueError(
                "Expected one standard deviation of the noise (`noise_std`) per channel (dimension 1 of the input), but"
                f" got {len(self.std)} for an input of shape {tuple(x.shape)}."
            )
        return torch.tensor(self.std, dtype=torch.float32, device=x.device).reshape(-1, *[1] * (x.ndim - 2))

    def __repr__(self) -> str:
        """Show the argument."""
        return f"{type(self).__name__}({self.std!r})"


def noise_generator(
    seed: int,
    rank: int = 0,
    dataloader_idx: int = 0,
    batch_idx: int = 0,
    draw: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """The generator of one noise draw on one batch.

    It depends on its arguments alone, so the same batch gets the same noise in every epoch, and a curve over epochs
    moves only when the model does. It never touches the global random state, which belongs to training.

    Args:
        seed: The user's seed.
        rank: Global rank of the process.
        dataloader_idx: Index of the validation loader.
        batch_idx: Index of the batch in its loader.
        draw: Index of the noise draw.
        device: Where the noise is needed.

    Returns:
        A freshly seeded generator.
    """
    # Hashed, because neighbouring seeds of some generators give correlated streams.
    key = repr((seed, rank, dataloader_idx, batch_idx, draw)).encode()
    generator = torch.Generator(device)
    return generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Move images by whole pixels; the pixels of the edge are repeated in the gap.

    Args:
        images: Shape ``(N, C, H, W)``.
        down: By how many pixels, negative for up.
        right: By how many pixels, negative for left.

    Returns:
        The moved images, of the same shape.

    Raises:
        ValueError: If the input is no batch of images, or too small.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import shifted
        >>> shifted(torch.tensor([[[[1.0, 2.0, 3.0]]]]), down=0, right=1)
        tensor([[[[1., 1., 2.]]]])
    """
    if images.ndim != 4 or images.shape[2] <= abs(down) or images.shape[3] <= abs(right):
        raise ValueError(
            f"Expected images (N, C, H, W) that can be moved by {down} and {right} pixels (`shifts`), but got an input"
            f" of shape {tuple(images.shape)}."
        )
    height, width = images.shape[2:]
    padded = pad(images, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode="replicate")
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, :, top : top + height, left : left + width]


def four_shifts(images: Tensor, pixels: int) -> Iterator[Tensor]:
    """The images moved down, up, right and left.

    Args:
        images: Shape ``(N, C, H, W)``.
        pixels: By how many pixels.

    Yields:
        What :func:`shifted` gives, one direction at a time.
    """
    for down, right in ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
        yield shifted(images, down, right)
