"""Checks of the arguments that the callback and the comparison share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sensitivity.perturbations import GaussianNoise


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
    """
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    valid = is_int and (minimum is None or value >= minimum)  # type: ignore[operator]
    check_argument(name, value, valid, "an int" + ("" if minimum is None else f" of {minimum} or more"))


def check_selector(name: str, value: object) -> None:
    """Require what can choose a part of a batch or of a model's result.

    Args:
        name: Name of the argument.
        value: What came.
    """
    is_index = isinstance(value, Integral) and not isinstance(value, bool)
    valid = value is None or isinstance(value, str) or is_index or callable(value)
    check_argument(name, value, valid, "a key (str), an index (int), a callable or None")


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
