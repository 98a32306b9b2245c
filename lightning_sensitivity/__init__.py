"""Two PyTorch Lightning callbacks and a torchmetrics metric that track generalization without validation labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks import RiskMonitor as RiskMonitor
    from lightning_sensitivity.callbacks import SensitivityMonitor as SensitivityMonitor
    from lightning_sensitivity.compare import ModelScores as ModelScores
    from lightning_sensitivity.compare import compare_models as compare_models
    from lightning_sensitivity.reference.reference import Reference as Reference
    from lightning_sensitivity.reference.reference import label_noise as label_noise

__version__ = "0.5.0"

_MODULES = {
    "ModelScores": "compare",
    "Reference": "reference.reference",
    "RiskMonitor": "callbacks",
    "SensitivityMonitor": "callbacks",
    "compare_models": "compare",
    "label_noise": "reference.reference",
}
__all__ = ["OutputSensitivity", "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on first use, so that the metric imports neither Lightning nor scikit-learn.
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
