"""What only a GPU can show; skipped without one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, fitted, loader, quick_risk, validated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA: dict[str, Any] = {"accelerator": "cuda", "devices": 1}


class Recurrent(Classifier):
    """It has an LSTM, whose weights cuDNN keeps in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(NUM_FEATURES, 8, batch_first=True), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None].repeat(1, 3, 1))[0][:, -1])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_values_agree_with_the_cpu_and_the_devices_stream_is_left_alone(precision: str) -> None:
    model, monitor = Classifier(dropout=0), SensitivityMonitor(num_draws=4, num_samples=None)
    on_cpu = validated(monitor, model, loader(4000, 500))
    before = torch.cuda.get_rng_state()
    on_gpu = validated(monitor, model, loader(4000, 500), precision=precision, **CUDA)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    error = on_cpu["val/output_sensitivity_stderr"]
    assert abs(on_gpu["val/output_sensitivity"] - on_cpu["val/output_sensitivity"]) < 5 * error  # of other noise


def fit(kind: Any, monitors: Any, **kwargs: Any) -> tuple[Any, list[dict[str, float]]]:
    run = fitted(monitors, model := kind(), loader(2000, 100), loader(600, 100, seed=1), **kwargs)
    return model, run.epochs


@pytest.mark.parametrize("kind", [Classifier, Recurrent])
def test_training_is_bit_identical_and_the_expected_loss_that_of_the_cpu(kind: Any) -> None:
    monitors = [SensitivityMonitor(), quick_risk()]
    _, on_cpu = fit(kind, monitors)
    allocated = torch.cuda.memory_allocated()
    with_monitors, on_gpu = fit(kind, monitors, deterministic=True, **CUDA)
    without, _ = fit(kind, [], deterministic=True, **CUDA)
    torch.testing.assert_close(with_monitors.state_dict(), without.state_dict(), rtol=0, atol=0)
    # Other noise, and other rounding in training.
    expected = on_cpu[-1]["val/expected_loss"]
    assert on_gpu[-1]["val/expected_loss"] == pytest.approx(expected, rel=0.1, abs=0.02)
    assert torch.cuda.memory_allocated() - allocated < 2**20  # nothing is left on the device


def test_samples_wait_in_the_memory_of_the_host() -> None:
    places = set[str]()

    class Looking(RiskMonitor):
        def compute_values(self, trainer: Any, dataloader_idx: int, *rows: Tensor) -> Any:
            kept = [batch for samples in self.run.samples for batch in samples.batches]
            inputs = [x for batch in kept for x in batch.call.arguments.values()]
            places.update(each.device.type for each in (*rows, *inputs))
            return super().compute_values(trainer, dataloader_idx, *rows)

    fit(Classifier, [Looking()], **CUDA)
    assert places == {"cpu"}
