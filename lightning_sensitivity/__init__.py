"""Watch output sensitivity, and stop PyTorch Lightning models without validation labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity, RefinedScore

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks import RiskMonitor, SensitivityMonitor
    from lightning_sensitivity.compare import ModelScores, compare_models
    from lightning_sensitivity.reference import Reference, label_noise

__version__ = "0.5.0"

__all__ = [
    "ModelScores",
    "OutputSensitivity",
    "Reference",
    "RefinedScore",
    "RiskMonitor",
    "SensitivityMonitor",
    "__version__",
    "compare_models",
    "label_noise",
]

_MODULES = {
    "ModelScores": "compare",
    "Reference": "reference",
    "RiskMonitor": "callbacks",
    "SensitivityMonitor": "callbacks",
    "compare_models": "compare",
    "label_noise": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on first use, so that the metrics import neither Lightning nor scikit-learn.
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
