"""How a model is run and perturbed: the options that callbacks and comparison share, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sensitivity.models.call import Inputs, Selector
from lightning_sensitivity.perturbations.noise import AnyPerturbation, GaussianNoise

DEFAULT_NOISE_STD = 0.1


@dataclass(frozen=True)
class Options:
    """What users say about noise, samples, inputs and outputs; see :class:`~lightning_sensitivity.SensitivityMonitor`.

    Attributes:
        noise_std: σ of Gaussian noise, one number or one per channel.
        perturbation: What takes its place, or None.
        at: Name of a submodule, a list of them, or None.
        num_draws: Noise draws per sample.
        num_samples: How many samples are measured, or None for all.
        seed: Seed of the noise.
        inputs: What is perturbed.
        outputs: Which outputs are compared.
        targets: Where labels are.
        per_output: Whether the mean square of the single outputs is meant.

    Raises:
        MisconfigurationException: If one of them is not what it should be.
    """

    noise_std: float | Sequence[float] = DEFAULT_NOISE_STD
    perturbation: AnyPerturbation | None = None
    at: Sequence[str] | str | None = None
    num_draws: int = 1
    num_samples: int | None = None
    seed: int = 0
    inputs: Inputs = None
    outputs: Selector = None
    targets: Selector = None
    per_output: bool = False

    def __post_init__(self) -> None:
        """Check them."""
        self.chosen_perturbation()
        check_int("num_draws", self.num_draws, minimum=1)
        if self.num_samples is not None:
            check_int("num_samples", self.num_samples, minimum=1)
        check_int("seed", self.seed)
        is_valid = self.at is None or _are_keys(self.at, str)
        check_argument("at", self.at, is_valid, "a submodule's name, a list of them or None")
        for name, value in (("inputs", self.inputs), ("outputs", self.outputs), ("targets", self.targets)):
            may_be_list = name == "inputs"
            is_valid = _are_keys(value) and (may_be_list or not isinstance(value, list | tuple))
            expected = f"a key (str), an index (int),{' a list of different ones,' * may_be_list} a function or None"
            check_argument(name, value, value is None or callable(value) or is_valid, expected)
        check_argument("per_output", self.per_output, isinstance(self.per_output, bool), "a bool")

    def chosen_perturbation(self) -> AnyPerturbation:
        """What is done to a tensor.

        Raises:
            MisconfigurationException: If it is no perturbation, or both noise and perturbation are given.
        """
        if self.perturbation is None:
            try:
                return GaussianNoise(self.noise_std)
            except ValueError:
                raise MisconfigurationException(
                    "`noise_std` should be a positive, finite number, or a list of one per channel, got"
                    f" {self.noise_std!r}."
                ) from None
        valid = callable(self.perturbation) and not isinstance(self.perturbation, type)
        expected = "a function (x, generator) -> x', such as UniformNoise(0.1)"
        check_argument("perturbation", self.perturbation, valid, expected)
        is_left_out = isinstance(self.noise_std, float) and self.noise_std == DEFAULT_NOISE_STD
        check_argument("noise_std", self.noise_std, is_left_out, "left out beside a `perturbation`")
        return self.perturbation

    @property
    def sites(self) -> dict[str | None, str]:
        """What is perturbed, inputs (None) or outputs of submodules, and what is put behind the logged names."""
        return {self.at: ""} if self.at is None or isinstance(self.at, str) else {name: f"/{name}" for name in self.at}


def check_argument(name: str, value: object, valid: bool, expected: str) -> None:
    """Require that an argument is what it should be.

    Args:
        name: Its name.
        value: What came.
        valid: Whether it is.
        expected: What it should be.

    Raises:
        MisconfigurationException: If it is not.
    """
    if not valid:
        raise MisconfigurationException(f"`{name}` should be {expected}, got {value!r}.")


def check_int(name: str, value: object, minimum: float = -math.inf) -> None:
    """Require an int, which a bool is not.

    Args:
        name: Name of the argument.
        value: What came.
        minimum: The least that is allowed.

    Raises:
        MisconfigurationException: If it is something else.
    """
    valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum
    check_argument(name, value, valid, "an int" + f" of {minimum} or more" * math.isfinite(minimum))


def _are_keys(value: object, kinds: Any = (str, Integral)) -> bool:
    """Whether it is a key or an index, or a list of different ones."""
    keys = list(value) if isinstance(value, list | tuple) else [value]
    valid = all(isinstance(key, kinds) and not isinstance(key, bool) and key != "" for key in keys)
    return valid and 0 < len(set(keys)) == len(keys)
