"""A small model of training labels, checked and calibrated on labels that it has not seen."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sensitivity.reference.calibration import unexplained_share
    from lightning_sensitivity.reference.reference import Reference, label_noise

__all__ = ["Reference", "label_noise", "unexplained_share"]

_MODULES = {"Reference": "reference", "label_noise": "reference", "unexplained_share": "calibration"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on first use, so that others never import scikit-learn.
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
