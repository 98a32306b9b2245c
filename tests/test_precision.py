"""Sensitivity in other precisions against that in 32 bits, on real images, through a Trainer."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import trainer

datasets = pytest.importorskip("sklearn.datasets")

IN_16_BITS = pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])


@cache
def digits() -> TensorDataset:
    images, labels = datasets.load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


class DigitNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Widening(DigitNet):
    """Returns float32, as many language models do, whatever it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@cache
def trained() -> DigitNet:
    seed_everything(0, verbose=False)
    model = DigitNet()
    trainer(max_epochs=5).fit(model, DataLoader(digits(), 64, shuffle=True))
    return model


def measured(noise_std: float, precision: str, model: nn.Module | None = None, **kwargs: Any) -> tuple[Any, list[str]]:
    """What the monitor logs in a validation, and its warnings of rounding."""
    loader = DataLoader(digits(), 600)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = SensitivityMonitor(noise_std=noise_std, **kwargs)
        (values,) = trainer(callbacks=[monitor], precision=precision).validate(
            copy.deepcopy(model or trained()), loader, verbose=False
        )
    return values, [text for warning in caught if "may be off" in (text := str(warning.message))]


@cache
def in_32_bits(noise_std: float, per_output: bool = False) -> float:
    values, rounding = measured(noise_std, "32-true", per_output=per_output)
    assert not rounding
    return values["val_sensitivity"]


def agrees(values: dict[str, float], reference: float) -> bool:
    return abs(values["val_sensitivity"] - reference) <= 3 * values["val_sensitivity_stderr"]


@IN_16_BITS
def test_16_bits_agree_silently_under_strong_noise(precision: str) -> None:
    values, rounding = measured(0.3, precision)
    assert agrees(values, in_32_bits(0.3))
    assert not rounding


@IN_16_BITS
def test_16_bits_warn_once_of_noise_below_the_rounding(precision: str) -> None:
    values, rounding = measured(1e-3, precision)
    assert not agrees(values, in_32_bits(1e-3))
    (warning,) = rounding
    assert warning.startswith("`SensitivityMonitor`, `val_sensitivity`: Output sensitivity")
    assert "epsilon 0.0078" in warning


@IN_16_BITS
@pytest.mark.parametrize("noise_std", [0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("per_output", [False, True])
def test_16_bits_agree_or_warn(precision: str, noise_std: float, per_output: bool) -> None:
    values, rounding = measured(noise_std, precision, per_output=per_output)
    assert agrees(values, in_32_bits(noise_std, per_output)) or rounding


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_outputs_that_the_model_has_widened_warn_too(precision: str) -> None:
    model = Widening()
    model.load_state_dict(trained().state_dict())
    assert measured(1e-3, precision, model)[1]


def test_64_bits_agree_silently_down_to_noise_where_32_bits_warn() -> None:
    strong, silent = measured(0.1, "64-true")
    assert agrees(strong, in_32_bits(0.1))
    weak, also_silent = measured(1e-7, "64-true")
    assert not silent + also_silent
    # Weak noise sees a linear model, of a sensitivity that goes with the variance of the noise.
    assert weak["val_sensitivity"] == pytest.approx(1e-8 * measured(1e-3, "64-true")[0]["val_sensitivity"], rel=0.05)
    in_32, rounding = measured(1e-7, "32-true")
    assert not agrees(in_32, weak["val_sensitivity"])
    assert 'precision="64-true"' in rounding[0]


def test_64_bits_warn_of_noise_below_theirs() -> None:
    assert "epsilon 2.2e-16" in measured(1e-16, "64-true")[1][0]


@pytest.mark.parametrize("before_training", [False, True])
def test_a_fit_warns_once_and_not_in_the_sanity_check(before_training: bool) -> None:
    monitor = SensitivityMonitor(noise_std=1e-3, task=None, before_training=before_training)
    loader = DataLoader(digits(), 600)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(callbacks=[monitor], precision="bf16-mixed", max_epochs=3)
        run.fit(DigitNet(), loader, loader)
    assert sum("may be off" in str(warning.message) for warning in caught) == 1
    assert sum("What is perturbed is rounded" in str(warning.message) for warning in caught) == 1


def test_noise_below_the_rounding_of_the_input_is_said() -> None:
    class Wide(DigitNet):
        """All but the input is in 64 bits."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.bfloat16().float())

    # Beside what the outputs' type shows, the noise itself is lost.
    for noise_std, is_said in ((0.1, False), (0.02, False), (0.003, True)):
        monitor = SensitivityMonitor(noise_std=noise_std)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callbacks=[monitor], precision="bf16-mixed").validate(
                Wide(), DataLoader(digits(), 600), verbose=False
            )
        texts = [str(warning.message) for warning in caught]
        assert any("What is perturbed is rounded, by about" in text for text in texts) == is_said
