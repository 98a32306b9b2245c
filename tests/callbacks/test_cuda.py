"""What only a GPU can show; skipped without one."""

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_sensitivity import OutputSensitivity, RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, loader, trainer, validated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
precisions = pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])


@precisions
def test_sensitivity_agrees_with_the_cpu_and_leaves_the_devices_stream_alone(precision: str) -> None:
    model, monitor = Classifier(dropout=0), SensitivityMonitor(num_draws=4)
    on_cpu = validated(monitor, model, loader(4000, 500))
    before = torch.cuda.get_rng_state()
    on_gpu = validated(monitor, model, loader(4000, 500), accelerator="cuda", devices=1, precision=precision)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    difference = abs(on_gpu["val_sensitivity"] - on_cpu["val_sensitivity"])
    assert difference < 5 * on_cpu["val_sensitivity_stderr"]


@precisions
def test_the_risk_estimate_agrees_with_the_cpu(precision: str) -> None:
    def risk(**kwargs: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        run = trainer(callbacks=[RiskMonitor()], **kwargs)
        run.fit(Classifier(dropout=0), loader(2000, 100), loader(2000, 100, seed=1))
        return {name: float(value) for name, value in run.callback_metrics.items() if "risk" in name}

    on_gpu = risk(accelerator="cuda", devices=1, precision=precision)
    assert on_gpu == pytest.approx(risk(), rel=0.1, abs=0.02)  # other noise, and other rounding in training


def test_updating_the_metric_never_waits_for_the_device() -> None:
    metric = OutputSensitivity().to("cuda")
    clean, noisy = torch.randn(2, 64, 10, device="cuda")
    metric.update(clean, noisy)  # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(clean, noisy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.compute() > 0
