"""Noise: small callables ``(x, generator) -> x'``, each of which states its second moment."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor


class Perturbation(ABC):
    """What is done to an input. The attributes of an instance are its arguments, as its ``repr`` shows them."""

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a batch.

        Args:
            x: Floating tensor, shape ``(N, ...)``. It is not written to.
            generator: The only source of random numbers, on the device of ``x``.

        Returns:
            A new tensor of the shape, type and memory format of ``x``.
        """

    def second_moment(self, x: Tensor) -> Tensor | float | None:
        """E[(x' − x)²] of each element, a number or a tensor that broadcasts to the shape of ``x``.

        None, unless the perturbation adds independent noise of mean zero, which does not depend on ``x``, to each
        element: the paper's Equation 9 has no meaning for another one, and there is no loss estimate.
        """
        return None

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"{type(self).__name__}({', '.join(map(repr, vars(self).values()))})"


# With the class beside the callable, a command line takes its subclasses by name.
AnyPerturbation = Perturbation | Callable[[Tensor, torch.Generator], Tensor]


class _IndependentNoise(Perturbation):
    """x' = x + σ ξ, with independent ξ of mean 0 and variance 1 for every element."""

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
        """Perturb a batch of floating tensors ``(N, ...)``, or ``(N, C, ...)`` for C different σ."""
        # Noise is drawn in float32 whatever the type of the input, so that every precision gets the same; 16-bit inputs
        # are perturbed there, too, and rounded once, like the data that the model was given.
        # Scaled and added apart: at once, it would be rounded otherwise than a plain `x + std * noise`.
        noise = self._standard(x.shape, generator).mul_(self._std_for(x))
        is_alike = (noise.dtype, noise.stride()) == (x.dtype, x.stride())
        return noise.add_(x) if is_alike else (x + noise).to(x.dtype)

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

    @abstractmethod
    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Noise of mean 0 and variance 1 in float32, on the device of the generator."""


class GaussianNoise(_IndependentNoise):
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

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)


class UniformNoise(_IndependentNoise):
    """Add independent uniform noise to every element of an input: x' = x + ε, ε uniform on [−√3 σ, √3 σ].

    Its second moment E[(x' − x)²] is σ² for every element, and no element moves by more than √3 σ.

    Args:
        std: σ in the units that the model receives, as in :class:`GaussianNoise`.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import UniformNoise, noise_generator
        >>> UniformNoise(0.1)(torch.zeros(2, 3), noise_generator(seed=0))
        tensor([[-0.1606,  0.1032, -0.0983],
                [ 0.0904, -0.1061,  0.0615]])
    """

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        chance = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
        return math.sqrt(3) * (2 * chance - 1)


class RademacherNoise(_IndependentNoise):
    """Move every element of an input up or down by σ, independently and with equal probability: x' = x ± σ.

    Its second moment (x' − x)² is σ² for every element, in every draw.

    Args:
        std: σ in the units that the model receives, as in :class:`GaussianNoise`.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import RademacherNoise, noise_generator
        >>> RademacherNoise(0.1)(torch.zeros(2, 3), noise_generator(seed=0))
        tensor([[-0.1000, -0.1000, -0.1000],
                [ 0.1000,  0.1000,  0.1000]])
    """

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return 2 * torch.randint(2, shape, generator=generator, dtype=torch.float32, device=generator.device) - 1


class SaltAndPepper(Perturbation):
    """Replace independent elements of an input by the lowest or the highest value, with equal probability.

    Its second moment E[(x' − x)²] is p/2 · [(low − x)² + (high − x)²] with the probability p. It depends on x, and the
    mean of the change is not zero, so that Equation 9 of the paper has no meaning: :meth:`second_moment` is None.

    Args:
        probability: That an element is replaced, over 0 and up to 1. Channels of a pixel are elements of their own.
        low: The lowest value ("pepper"), in the units that the model receives.
        high: The highest value ("salt").

    Raises:
        ValueError: If the probability is not in (0, 1], or the values are not finite numbers with low < high.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import SaltAndPepper, noise_generator
        >>> SaltAndPepper(0.5)(torch.full((2, 4), 0.3), noise_generator(seed=0))
        tensor([[0.0000, 0.3000, 0.0000, 0.3000],
                [0.0000, 0.3000, 0.3000, 0.3000]])
    """

    def __init__(self, probability: float, low: float = 0.0, high: float = 1.0) -> None:
        self.probability = check_number("probability", probability, above=0, most=1)
        self.low = check_number("low", low)
        self.high = check_number("high", high, above=self.low)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a batch of floating tensors of any shape."""
        chance = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
        replaced = x.clone().masked_fill_(chance < self.probability, self.high)
        return replaced.masked_fill_(chance < self.probability / 2, self.low)


class Interpolation(Perturbation):
    """Move every sample towards another one of its batch: x' = x + weight · (x_j − x).

    The others are the batch, moved on by a random number of places from 1 to N − 1, so that no sample meets itself, and
    each of the others is as likely. A batch of one sample is returned as it is, with a warning.

    Its second moment E[(x' − x)²] is weight² times the mean of (x_j − x)² over the other samples. It depends on x, and
    the mean of the change is not zero, so that Equation 9 of the paper has no meaning: :meth:`second_moment` is None.

    Args:
        weight: How far, over 0 and up to 1, at which the sample becomes the other one.

    Raises:
        ValueError: If the weight is not in (0, 1].

    Example:
        >>> import torch
        >>> from lightning_sensitivity.perturbations import Interpolation, noise_generator
        >>> Interpolation(0.1)(torch.tensor([[0.0, 1.0, 2.0]]).T, noise_generator(seed=0)).T
        tensor([[0.1000, 1.1000, 1.8000]])
    """

    def __init__(self, weight: float) -> None:
        self.weight = check_number("weight", weight, above=0, most=1)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a batch of floating tensors, shape ``(N, ...)``."""
        if (count := len(x)) < 2:
            warnings.warn(
                f"Expected a batch of two samples or more for {self}, but got an input of shape {tuple(x.shape)}, which"
                " stays as it is.",
                stacklevel=2,
            )
            return x.clone()
        places = torch.randint(1, count, (1,), generator=generator, device=x.device)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = wide[(torch.arange(count, device=x.device) + places) % count]
        return torch.lerp(wide, others, self.weight).to(x.dtype)


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
    return torch.Generator(device).manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)


def apply_perturbation(perturbation: AnyPerturbation, x: Tensor, generator: torch.Generator) -> Tensor:
    """What a perturbation makes of a tensor. A user's function gets a copy, which it may write into.

    Raises:
        TypeError: If it gives no tensor of the shape, type and device of ``x``.
    """
    new: object = perturbation(x if isinstance(perturbation, Perturbation) else x.clone(), generator)
    if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
        got = f"{new.dtype}, {tuple(new.shape)}, {new.device}" if isinstance(new, Tensor) else type(new).__name__
        raise TypeError(
            "`perturbation` should give a tensor like the one it got"
            f" ({x.dtype}, {tuple(x.shape)}, {x.device}), got {got}."
        )
    return new


def power(perturbation: AnyPerturbation, x: Tensor) -> Tensor | None:
    """Σ x² in units of the perturbation's second moment, for the C of Equation 9; None where there is none."""
    moment = getattr(perturbation, "second_moment", lambda x: None)(x)
    if moment is None:
        return None
    scaled = x.detach() / moment.sqrt() if isinstance(moment, Tensor) else x.detach()
    # Within a sample in single precision, which is much faster; over samples in the widest type.
    norms = torch.linalg.vector_norm(
        scaled[..., None].flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    squares: Tensor = norms.to(torch.float32 if x.device.type == "mps" else torch.float64).square().sum()
    return squares if isinstance(moment, Tensor) else squares / moment


def check_number(name: str, value: object, above: float = -math.inf, most: float = math.inf) -> float:
    """Require a finite number, which a bool is not, above one limit and at most another; ``name`` is the argument's."""
    if isinstance(value, Real) and not isinstance(value, bool) and above < float(value) <= most and value != math.inf:
        return float(value)
    expected = "a finite number" + f" above {above:g}" * (above > -math.inf) + f", at most {most:g}" * (most < math.inf)
    raise ValueError(f"Expected `{name}` to be {expected}, but got {value!r}.")
