"""Warnings that point at the user's line."""

import sys
import warnings

_LIBRARIES = (
    "contextlib",
    "functools",
    "lightning",
    "lightning_fabric",
    "lightning_sensitivity",
    "lightning_utilities",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
)


def warn(message: str) -> None:
    """Warn at the innermost line outside the libraries, which is the user's."""
    frame = sys._getframe(1)
    level = 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
