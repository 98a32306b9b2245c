"""Checks of the arguments that the callback and the comparison share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sensitivity.nested import is_sequence
from lightning_sensitivity.perturbations import GaussianNoise, RademacherNoise, UniformNoise

AnyPerturbation = Callable[[Tensor, torch.Generator], Tensor]
DEFAULT_NOISE_STD = 0.1


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


def check_int(name: str, value: object, minimum: int | None = None) -> None:
    """Require an int, which a bool is not.

    Args:
        name: Name of the argument.
        value: What came.
        minimum: The least that is allowed.

    Raises:
        MisconfigurationException: If it is something else.
    """
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    valid = is_int and (minimum is None or value >= minimum)  # type: ignore[operator]
    check_argument(name, value, valid, "an int" + ("" if minimum is None else f" of {minimum} or more"))


def check_selector(name: str, value: object) -> None:
    """Require what can choose a part of a batch or of a model's result.

    Args:
        name: Name of the argument.
        value: What came.

    Raises:
        MisconfigurationException: If it is something else.
    """
    valid = value is None or _is_key(value) or callable(value)
    check_argument(name, value, valid, "a key (str), an index (int), a callable or None")


def check_inputs(value: object) -> None:
    """Require what can choose the inputs to perturb: as a selector does, or a list of keys and indices.

    Args:
        value: What came.

    Raises:
        MisconfigurationException: If it is something else.
    """
    if isinstance(value, list | tuple):
        valid = len(value) > 0 and all(map(_is_key, value)) and len(set(value)) == len(value)
        check_argument("inputs", value, valid, "a list of different keys (str) or indices (int), one or more")
    else:
        check_selector("inputs", value)


def check_at(value: object) -> None:
    """Require a name of a submodule, or a list of them.

    Args:
        value: What came.

    Raises:
        MisconfigurationException: If it is something else.
    """
    names = value if is_sequence(value) else [] if value is None else [value]
    assert isinstance(names, Sequence)
    valid = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
    check_argument(
        "at", value, valid and (value is None or len(names) > 0), "a submodule's name, a list of them or None"
    )


def chosen_perturbation(noise_std: float | Sequence[float], perturbation: AnyPerturbation | None) -> AnyPerturbation:
    """The perturbation that the arguments mean.

    Args:
        noise_std: σ of Gaussian noise, or one per channel.
        perturbation: What takes its place, or None.

    Raises:
        MisconfigurationException: If one of them is not what it should be, or both are given.
    """
    if perturbation is None:
        return gaussian_noise(noise_std)
    valid = callable(perturbation) and not isinstance(perturbation, type)
    check_argument("perturbation", perturbation, valid, "a callable (x, generator) -> x', such as GaussianNoise(0.1)")
    if not (isinstance(noise_std, float) and noise_std == DEFAULT_NOISE_STD):
        raise MisconfigurationException(
            f"`noise_std` should be left out beside a `perturbation`, whose place it would take, got {noise_std!r}."
        )
    return perturbation


def check_method(method: object, perturbation: AnyPerturbation, num_draws: object, per_output: object) -> None:
    """Require a method that can do with the other arguments.

    Args:
        method: What came.
        perturbation: The perturbation.
        num_draws: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        per_output: The same.

    Raises:
        MisconfigurationException: If it can't.
    """
    check_argument("method", method, method in ("noise", "gradient"), "'noise' or 'gradient'")
    if method == "gradient":
        has_moment = isinstance(perturbation, GaussianNoise | UniformNoise | RademacherNoise)
        expected = "independent noise (Gaussian, uniform or Rademacher) with `method='gradient'`"
        check_argument("perturbation", perturbation, has_moment, expected)
        check_argument("num_draws", num_draws, num_draws == 1, "1 with `method='gradient'`, which draws nothing")
        check_argument("per_output", per_output, per_output is False, "False with `method='gradient'`")


def gaussian_noise(noise_std: float | Sequence[float]) -> GaussianNoise:
    """The noise that ``noise_std`` means.

    Args:
        noise_std: σ, or one per channel.

    Raises:
        MisconfigurationException: If it is no such thing.
    """
    try:
        return GaussianNoise(noise_std)
    except ValueError as error:
        raise MisconfigurationException(
            f"`noise_std` should be a positive, finite number, or a list of one per channel, got {noise_std!r}."
        ) from error


def _is_key(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Integral) and not isinstance(value, bool))
