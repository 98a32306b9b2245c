"""What only a GPU can show; skipped without one."""

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, loader, trainer, validated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_values_agree_with_the_cpu_and_the_devices_stream_is_left_alone(precision: str) -> None:
    def risk(**kwargs: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        run = trainer(callbacks=[RiskMonitor()], **kwargs)
        run.fit(Classifier(dropout=0), loader(2000, 100), loader(2000, 100, seed=1))
        return {name: float(value) for name, value in run.callback_metrics.items() if "risk" in name}

    model, monitor = Classifier(dropout=0), SensitivityMonitor(num_draws=4)
    on_cpu = validated(monitor, model, loader(4000, 500))
    before = torch.cuda.get_rng_state()
    on_gpu = validated(monitor, model, loader(4000, 500), accelerator="cuda", devices=1, precision=precision)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert abs(on_gpu["val_sensitivity"] - on_cpu["val_sensitivity"]) < 5 * on_cpu["val_sensitivity_stderr"]
    # Other noise, and other rounding in training.
    assert risk(accelerator="cuda", devices=1, precision=precision) == pytest.approx(risk(), rel=0.1, abs=0.02)
