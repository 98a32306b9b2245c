"""Noise: functions ``(x, generator) -> x'``, for inputs or outputs of a submodule, with seeded generators."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, check_argument, describe
from lightning_sensitivity.running.batches import first_of, is_floating
from lightning_sensitivity.running.call import ModelCall, Perturb
from lightning_sensitivity.running.isolation import RunIsolated

NoiseFunction = Callable[[Tensor, torch.Generator], Tensor]
Noise = float | NoiseFunction
Device = torch.device | str
Key = tuple[int, ...]  # what a noise draw depends on


@dataclass(frozen=True)
class GaussianNoise:
    """Independent normal noise, which is added to every element: x' = x + ε, ε ~ N(0, σ² I).

    Args:
        std: σ in the units of the model's inputs.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.running.perturbation import GaussianNoise, noise_generator
        >>> GaussianNoise(0.1)(torch.zeros(2, 3), noise_generator(seed=0))
        tensor([[-0.0420,  0.1564, -0.0608],
                [-0.0201, -0.0759,  0.0250]])
    """

    std: float

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Perturb a floating tensor."""
        # Draw in float32 for every input type, so that all precisions get the same noise, rounded only once.
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=x.device).mul_(self.std)
        return (x + noise).to(x.dtype)


def check_noise(noise: Noise) -> NoiseFunction:
    """Turn the argument ``noise`` into a function.

    Args:
        noise: σ, or a function.

    Raises:
        MisconfigurationException: If ``noise`` is something else.
    """
    if callable(noise):
        return noise
    is_std = isinstance(noise, Real) and not isinstance(noise, bool) and 0 < float(noise) < math.inf
    check_argument("noise", noise, is_std, "a positive number, or a function (x, generator) -> x'")
    return GaussianNoise(float(noise))


def noise_generator(
    seed: int, rank: int = 0, dataloader_idx: int = 0, batch_idx: int = 0, draw: int = 0, *, device: Device = "cpu"
) -> torch.Generator:
    """Make the generator of one noise draw on one batch.

    The generator depends only on the arguments, so a batch gets the same noise in every epoch, and a curve
    over epochs changes only when the model does. The global random state, which belongs to training, is
    never touched.

    Args:
        seed: The user's seed.
        rank: Global rank of the process.
        dataloader_idx: Index of the validation loader.
        batch_idx: Index of the batch in its loader.
        draw: Index of the noise draw.
        device: Where the noise is needed.
    """
    # Hash the key, because in some generators neighbouring seeds give correlated streams.
    key = repr(tuple(map(int, (seed, rank, dataloader_idx, batch_idx, draw)))).encode()  # also of NumPy
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def perturbation(noise: NoiseFunction, key: Key) -> Perturb:
    """Return a function that adds one noise draw to each tensor that it gets.

    Args:
        noise: The noise.
        key: Seed, rank, loader, batch and draw; see :func:`noise_generator`.
    """
    generators: dict[torch.device, torch.Generator] = {}  # whose streams several tensors share

    def perturb(x: Tensor) -> Tensor:
        if x.device not in generators:
            generators[x.device] = noise_generator(*key, device=x.device)
        return noise(x.clone(), generators[x.device])  # a user's function may write to it

    return perturb


def noisy_outputs(
    run: RunIsolated, call: ModelCall, noise: NoiseFunction, key: Key, num_draws: int, at: nn.Module | None = None
) -> list[Tensor]:
    """Run a model on a batch with each noise draw, and list the outputs.

    Args:
        run: Calls a function that runs the model; from :func:`~lightning_sensitivity.running.isolated`.
        call: Calls the model on a batch.
        noise: The noise.
        key: Seed, rank, loader and batch; see :func:`noise_generator`.
        num_draws: Number of noise draws.
        at: The submodule whose output is perturbed; None to perturb the inputs.
    """
    draws = [perturbation(noise, (*key, draw)) for draw in range(num_draws)]
    if at is None:
        return [run(call, perturb) for perturb in draws]
    return [run(_call_perturbed_at, at, call, perturb) for perturb in draws]


def _call_perturbed_at(module: nn.Module, call: Callable[[], Tensor], perturb: Perturb) -> Tensor:
    """Run the model, and perturb the first tensor that a submodule returns, each time that it runs."""

    def hook(module: nn.Module, args: object, result: Any) -> object:
        first = first_of(result)
        if not is_floating(first):
            raise Refused(f"`at` should name a module with floating outputs, got {describe(result)}.", "noise")
        if first is result:
            return perturb(first)
        rebuild = getattr(result, "_make", type(result))  # the former of a named tuple
        return rebuild((perturb(first), *result[1:]))

    with module.register_forward_hook(hook):
        return call()


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Find the submodule that ``at`` names.

    Args:
        model: The module.
        name: The name.

    Raises:
        MisconfigurationException: If no submodule has this name; an empty one means the model itself.
    """
    modules: dict[str, nn.Module] = dict(original_module(model).named_modules())
    check_argument("at", name, name != "" and name in modules, "the name of a submodule")
    return modules[name]
