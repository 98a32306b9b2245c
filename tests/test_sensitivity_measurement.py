"""The budget, and the small-noise limit by a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import GaussianNoise, SaltAndPepper, UniformNoise
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.sensitivity_measurement import SensitivityMeasurement
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    Linear,
    brute_force,
    inputs,
    loader,
    trainer,
    unlabelled_loader,
)


def measurement(num_samples: int | None = None, num_draws: int = 1, first_batch: int = 10) -> SensitivityMeasurement:
    made = SensitivityMeasurement(
        GaussianNoise(), None, "noise", num_draws, num_samples, None, None, per_output=False, nan_strategy="error"
    )
    made._batch_sizes[0] = first_batch
    return made


@given(
    num_samples=st.integers(1, 5000),
    num_draws=st.integers(1, 5),
    batch_size=st.integers(1, 300),
    num_batches=st.integers(1, 200),
    world_size=st.integers(1, 8),
)
def test_as_many_batches_as_the_budget_needs_evenly_spaced(
    num_samples: int, num_draws: int, batch_size: int, num_batches: int, world_size: int
) -> None:
    made = measurement(num_samples, num_draws, batch_size)
    chosen = [idx for idx in range(num_batches) if made.wants(0, idx, num_batches, world_size)]
    needed = math.ceil(math.ceil(num_samples / world_size / num_draws) / batch_size)
    assert len(chosen) == min(num_batches, needed) == made.num_wanted(0, num_batches, world_size)
    assert chosen[0] == 0
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], num_batches], strict=True)]
    assert max(gaps) - min(gaps) <= 1


class Stream(IterableDataset):
    """100 samples, which it does not say."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(inputs(100))


@pytest.mark.parametrize("limit", [None, 4, 1000])
def test_of_a_loader_without_a_length_all_batches_are_measured_that_come(limit: int | None) -> None:
    values = []
    for num_samples in (10, None):
        run = trainer(callbacks=[SensitivityMonitor(num_samples=num_samples)], limit_val_batches=limit)
        torch.manual_seed(0)
        run.validate(Classifier(), DataLoader(Stream(), batch_size=10), verbose=False)
        values.append(run.callback_metrics["val_sensitivity"])
    assert values[0] == values[1]


def test_without_a_budget_or_a_length_all_batches_are_measured() -> None:
    assert all(measurement().wants(0, idx, 7, 1) for idx in range(7))
    assert all(measurement(10).wants(0, idx, math.inf, 1) for idx in range(7))
    assert measurement(10).num_wanted(1, 7, 1) == 7  # a loader of which no batch was measured yet


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_value_under_a_budget_is_that_of_its_batches(num_draws: int) -> None:
    model, val = Classifier(), unlabelled_loader(200, 10)
    run = trainer(callbacks=[SensitivityMonitor(num_samples=50, num_draws=num_draws)])
    run.validate(model, val, verbose=False)
    batches, step = list(val), 4 * num_draws
    chosen = range(0, 20, step) if num_draws == 1 else [idx for idx in range(20) if idx * 3 % 20 < 3]
    expected = [brute_force(model, [*[x[:0]] * idx, x], num_draws=num_draws) for idx in chosen for x in [batches[idx]]]
    assert run.callback_metrics["val_sensitivity"].item() == pytest.approx(
        torch.cat(expected).var(correction=0).item(), rel=1e-5
    )


def test_the_cost_under_a_budget_does_not_grow_with_the_data() -> None:
    class Counting(Classifier):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += not self.training
            return super().forward(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    passes = []
    for num_samples in (200, 800):
        model = Counting()
        run = trainer(callbacks=[SensitivityMonitor(num_samples=100)], max_epochs=2, num_sanity_val_steps=0)
        run.fit(model, loader(64), unlabelled_loader(num_samples, 10))
        passes.append(model.passes)
    assert passes[0] == passes[1]


def test_the_same_batches_are_measured_every_epoch() -> None:
    values = []

    class Fixed(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

        def on_validation_end(self) -> None:
            values.append(self.trainer.callback_metrics.get("val_sensitivity"))

    run = trainer(callbacks=[SensitivityMonitor(num_samples=30)], max_epochs=3)
    run.fit(Fixed(), loader(32), unlabelled_loader(200, 10))
    _, first, *others = values
    assert others == [first, first]


# The small-noise limit


def validate(model: Any, val: Any = None, **kwargs: Any) -> dict[str, float]:
    run = trainer(callbacks=[SensitivityMonitor(**kwargs)])
    run.validate(model, unlabelled_loader(2000, 100) if val is None else val, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}


def test_a_linear_models_limit_is_exact_for_any_noise() -> None:
    model = Linear()
    values = validate(model, noise_std=0.7, method="gradient")
    assert values["val_sensitivity"] == pytest.approx(model.sensitivity(0.7), rel=1e-5)
    assert values["val_sensitivity_stderr"] < 1e-6 * values["val_sensitivity"]
    noisy = validate(model, noise_std=0.7)
    assert values["val_loss_estimate"] == pytest.approx(noisy["val_loss_estimate"], rel=0.1)


def test_it_is_the_limit_of_small_noise_with_smaller_error_bars() -> None:
    torch.manual_seed(0)
    model = Classifier()
    model.net[2] = nn.Tanh()
    for noise_std in (1e-3, 1e-2):
        noisy = validate(model, noise_std=noise_std, num_draws=4)
        limit = validate(model, noise_std=noise_std, method="gradient")
        difference = abs(noisy["val_sensitivity"] - limit["val_sensitivity"])
        assert difference < 4 * noisy["val_sensitivity_stderr"]
        assert limit["val_sensitivity_stderr"] < 0.5 * noisy["val_sensitivity_stderr"]
    assert validate(model, perturbation=UniformNoise(0.01), method="gradient")["val_sensitivity"] == pytest.approx(
        limit["val_sensitivity"]
    )


@torch.no_grad()
def test_squares_are_those_of_the_jacobian() -> None:
    model, x = Classifier().eval(), inputs(5)
    outputs, squares = Probe(model, x, None, None).gradient(lambda x: 0.04)
    torch.testing.assert_close(outputs, model(x))
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x).mean(1).sum(), x)
    torch.testing.assert_close(squares, 0.04 * jacobian.double().square().sum(1), rtol=1e-5, atol=0)
    assert squares.shape == (5,)


def test_one_standard_deviation_per_channel_and_hidden_layers() -> None:
    model = Linear()
    stds = [0.1 * (1 + idx) for idx in range(12)]
    values = validate(model, noise_std=stds, method="gradient")
    weight = model.net.weight.mean(0)
    assert values["val_sensitivity"] == pytest.approx((weight.square() * torch.tensor(stds).square()).sum().item())
    hidden = validate(model, noise_std=0.5, method="gradient", at=["net"])
    assert hidden["val_sensitivity/net"] == pytest.approx(0.25 / NUM_CLASSES)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_it_has_no_noise_of_rounding_to_warn_of(precision: str) -> None:
    run = trainer(callbacks=[SensitivityMonitor(noise_std=1e-4, method="gradient")], precision=precision)
    model = Linear()
    run.validate(model, unlabelled_loader(200, 100), verbose=False)
    expected = model.sensitivity(1e-4)
    assert run.callback_metrics["val_sensitivity"].item() == pytest.approx(expected, rel=0.02)


def test_training_with_it_leaves_no_gradients_and_changes_nothing() -> None:
    weights = []
    for callbacks in ([], [SensitivityMonitor(method="gradient")]):
        torch.manual_seed(0)
        model = Classifier()
        run = trainer(callbacks=callbacks)
        run.fit(model, loader(), loader())
        weights.append(model.state_dict())
        if callbacks:
            assert run.callback_metrics["val_risk_estimate"].isfinite()
    torch.testing.assert_close(*weights, rtol=0, atol=0)

    class Checking(Classifier):
        def on_validation_epoch_end(self) -> None:
            assert all(parameter.grad is None for parameter in self.parameters())

    trainer(callbacks=[SensitivityMonitor(method="gradient")]).validate(Checking(), loader(), verbose=False)


def test_one_forward_pass_a_batch() -> None:
    class Counting(Classifier):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    model = Counting()
    validate(model, unlabelled_loader(100, 10), method="gradient")
    assert model.passes == 10


def test_a_cache_that_the_first_pass_makes() -> None:
    class Caching(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.full((NUM_FEATURES,), 2.0), persistent=False)
            return super().forward(x * self.cache)

    model = Caching()
    values = validate(model, noise_std=0.1, method="gradient")
    assert values["val_sensitivity"] == pytest.approx(4 * model.sensitivity(0.1), rel=1e-5)


def test_a_layer_that_runs_twice_and_writes_in_place() -> None:
    class Twice(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(12, 12)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            first = self.cell(x)
            second = self.act(self.cell(3 * first) + 2)  # all positive, so that it is linear
            return self.net(0.5 * first + second)

    torch.manual_seed(0)
    model, val = Twice(), unlabelled_loader(4000, 100)
    model.cell.weight.data.mul_(0.1)
    limit = validate(model, val, noise_std=0.01, method="gradient", at="cell")
    noisy = validate(model, val, noise_std=0.01, at="cell")
    error = noisy["val_sensitivity_stderr"]
    # Noise is drawn for each call; the derivative is by both.
    assert limit["val_sensitivity"] == pytest.approx(noisy["val_sensitivity"], abs=4 * error)
    assert validate(model, val, noise_std=0.01, method="gradient", at="net")["val_sensitivity"] > 0


def test_a_model_that_writes_into_its_input() -> None:
    class Writing(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    model = Writing()
    values = validate(model, noise_std=0.1, method="gradient")
    assert values["val_sensitivity"] == pytest.approx(4 * model.sensitivity(0.1), rel=1e-5)


def test_where_no_gradient_arrives_is_said() -> None:
    class Detached(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    class Ignoring(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.ones_like(x))

    for model in (Detached(), Ignoring()):
        with pytest.raises(ValueError, match="none reaches it"):
            validate(model, method="gradient")


def test_a_budget_counts_the_samples_of_the_outputs() -> None:
    class SequenceFirst(Linear):
        def forward(self, x: Tensor, temperature: Any = 1) -> Tensor:
            return super().forward(x.mean(0))

    sequences = [{"temperature": torch.tensor(2.0), "x": x.expand(30, 5, 12)} for x in inputs(100).split(5)]
    run = trainer(callbacks=[SensitivityMonitor(num_samples=40, inputs="x")])
    run.validate(SequenceFirst(), DataLoader(sequences, batch_size=None), verbose=False)
    assert run.callback_metrics["val_sensitivity"] > 0
    seen: list[int] = []

    class Counting(SequenceFirst):
        def forward(self, x: Tensor, temperature: Any = 1) -> Tensor:
            seen.append(x.shape[1])
            return super().forward(x, temperature)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    run = trainer(callbacks=[SensitivityMonitor(num_samples=40, inputs="x")])
    run.validate(Counting(), DataLoader(sequences, batch_size=None), verbose=False)
    assert sum(seen) == 2 * 40


def test_outputs_with_positions_are_refused() -> None:
    class Map(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., None].expand(-1, -1, 3)

    with pytest.raises(ValueError, match=r"Expected outputs \(N, K\) or \(N,\) of N samples for `method='gradient'`"):
        validate(Map(), method="gradient")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "jacobian"}, "`method` should be 'noise' or 'gradient', got 'jacobian'"),
        ({"method": "gradient", "num_draws": 2}, "`num_draws` should be 1 with `method='gradient'`"),
        ({"method": "gradient", "per_output": True}, "`per_output` should be False with `method='gradient'`"),
        ({"method": "gradient", "perturbation": SaltAndPepper(0.1)}, "`perturbation` should be independent noise"),
        ({"num_samples": 0}, "`num_samples` should be an int of 1 or more, got 0"),
        ({"num_samples": 1.5}, "`num_samples` should be an int"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        SensitivityMonitor(**kwargs)
