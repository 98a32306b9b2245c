"""Watch output sensitivity, and stop PyTorch Lightning models without validation labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity, RefinedScore

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks import RiskMonitor, SensitivityMonitor
    from lightning_sensitivity.compare import ModelScores, compare_models

__version__ = "0.4.0"

__all__ = [
    "ModelScores",
    "OutputSensitivity",
    "RefinedScore",
    "RiskMonitor",
    "SensitivityMonitor",
    "__version__",
    "compare_models",
]

_MODULES = {
    "ModelScores": "compare",
    "RiskMonitor": "callbacks",
    "SensitivityMonitor": "callbacks",
    "compare_models": "compare",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on first use, so that the metrics never import Lightning.
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
