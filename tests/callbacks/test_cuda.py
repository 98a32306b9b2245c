"""What only a GPU can show; skipped without one."""

import pytest
import torch

from lightning_sensitivity import SensitivityMonitor
from tests.callbacks.test_risk import risk
from tests.helpers import Classifier, loader, validated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_values_agree_with_the_cpu_and_the_devices_stream_is_left_alone(precision: str) -> None:
    model, monitor = Classifier(dropout=0), SensitivityMonitor(num_draws=4)
    cuda = {"accelerator": "cuda", "devices": 1, "precision": precision}
    on_cpu = validated(monitor, model, loader(4000, 500))
    before = torch.cuda.get_rng_state()
    on_gpu = validated(monitor, model, loader(4000, 500), **cuda)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert (
        abs(on_gpu["val_output_sensitivity"] - on_cpu["val_output_sensitivity"])
        < 5 * on_cpu["val_output_sensitivity_stderr"]
    )
    # Other noise, and other rounding in training.
    assert risk(2000, **cuda) == pytest.approx(risk(2000), rel=0.1, abs=0.02)
