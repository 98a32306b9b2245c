"""What is done to an input: small callables ``(x, generator) -> x'``, each of which states its second moment."""

from lightning_sensitivity.perturbations.images import Rotation, Translation
from lightning_sensitivity.perturbations.noise import (
    GaussianNoise,
    Interpolation,
    Perturbation,
    RademacherNoise,
    SaltAndPepper,
    UniformNoise,
    noise_generator,
)

__all__ = [
    "GaussianNoise",
    "Interpolation",
    "Perturbation",
    "RademacherNoise",
    "Rotation",
    "SaltAndPepper",
    "Translation",
    "UniformNoise",
    "noise_generator",
]
