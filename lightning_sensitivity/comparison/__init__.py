"""Which of several models generalizes best: by what they do to the same samples, or by what they have logged."""

from lightning_sensitivity.comparison.models import compare_models
from lightning_sensitivity.comparison.runs import compare_runs
from lightning_sensitivity.comparison.scores import ModelScores
from lightning_sensitivity.comparison.table import Comparison, KendallTau

__all__ = ["Comparison", "KendallTau", "ModelScores", "compare_models", "compare_runs"]
