"""The risk estimate as the callback logs it; what the terms are is tested with ``risk``."""

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.readings import RISK
from lightning_sensitivity.risk import training_sums
from lightning_sensitivity.risk_measurement import RiskMeasurement, num_twins
from lightning_sensitivity.twin import initial_weights
from tests.helpers import NUM_FEATURES, Classifier, inputs, labelled, loader, trainer, unlabelled_loader

NAMES = set(RISK.values())


class Truth(Callback):
    """What was logged at each validation, and what a plain loop finds."""

    def __init__(self, num_batches: int = 2, task: str = "multiclass", holdout: Tensor | None = None) -> None:
        self.num_batches, self.task = num_batches, task
        self.holdout = inputs(50, seed=1) if holdout is None else holdout
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.training: list[float] = []
        self.uncertainty: list[float] = []
        self.variance: list[float] = []
        self.initial: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self.batches) < self.num_batches:
            self.batches.append([part.clone() for part in batch])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        x, y = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        assert not pl_module.training
        count, impurity, score = training_sums(pl_module(x), y, self.task)[3:]
        assert set(count.tolist()) == {len(x)}
        q = self.probabilities(pl_module, self.holdout)
        gap = (q * (1 - q)).mean(0) - impurity / count if self.task != "regression" else torch.zeros(1)
        over_outputs = torch.sum if self.task == "multiclass" else torch.mean
        self.training.append(float(over_outputs(score / count)))
        self.uncertainty.append(float(over_outputs(gap)))
        differences = []
        for batch_idx, part in enumerate(self.holdout.split(16)):
            for draw in range(2):  # of four batches, eight twins
                g = noise_generator(0, 0, 0, batch_idx, -1 - draw)
                other = copy.deepcopy(pl_module)
                for name, value in other.named_parameters():
                    learned = value.detach() - self.initial[name]
                    noise = torch.randn(learned[:1].shape if learned.ndim > 1 else learned.shape, generator=g)
                    value.data = value.data + noise * learned
                difference = self.probabilities(pl_module, part) - self.probabilities(other, part)
                differences.append(difference.square().sum(0))
        self.variance.append(float(over_outputs(sum(differences) / (2 * len(self.holdout)))))

    def probabilities(self, model: LightningModule, x: Tensor) -> Tensor:
        outputs = model(x).double()
        scored = {"multiclass": lambda: outputs.softmax(1), "regression": lambda: outputs}
        return scored.get(self.task, outputs.sigmoid)().reshape(len(x), -1)


def logged(truth: Truth, term: str) -> list[float]:
    return [epoch[f"val_{RISK[term]}"] for epoch in truth.logged]


def check(truth: Truth) -> None:
    assert logged(truth, "training") == pytest.approx(truth.training, rel=1e-5)
    assert logged(truth, "variance") == pytest.approx(truth.variance, rel=1e-4, abs=1e-7)
    assert logged(truth, "uncertainty") == pytest.approx(truth.uncertainty, rel=1e-5, abs=1e-6)
    parts = zip(*(logged(truth, term) for term in ("training", "uncertainty", "variance")), strict=True)
    assert logged(truth, "risk") == pytest.approx([sum(terms) for terms in parts])


def fitted(model: LightningModule, monitor: SensitivityMonitor, truth: Truth, train: Any, **kwargs: Any) -> Trainer:
    run = trainer(callbacks=[monitor, truth], max_epochs=3, **kwargs)
    run.fit(model, train, DataLoader(truth.holdout, 16))
    return run


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_the_training_part_is_that_of_the_first_batches_in_eval_mode_after_the_epoch() -> None:
    seed_everything(0, verbose=False)
    truth = Truth()
    fitted(Classifier(), SensitivityMonitor(num_training_samples=32), truth, loader(shuffle=True))
    check(truth)
    assert len(truth.logged) == 3
    assert len(set(truth.training)) == 3  # the same samples, another network
    assert min(logged(truth, "variance")) > 0


class Other(Classifier):
    """The same network for another task: another head and another loss."""

    def __init__(self, num_outputs: int, loss: Any) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(16, num_outputs)
        self.loss = loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1].float())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("task", "targets", "loss"),
    [
        ("binary", inputs(50)[:, :1] > 0.5, binary_cross_entropy_with_logits),
        ("multilabel", (inputs(50)[:, :3] > 0.5).long(), binary_cross_entropy_with_logits),
        ("regression", 100 + inputs(50)[:, :2], mse_loss),
    ],
)
def test_every_task(task: str, targets: Tensor, loss: Any, told: bool) -> None:
    train = DataLoader(TensorDataset(inputs(50), targets), 16)
    truth = Truth(4, task)
    told = told or task == "regression"
    fitted(Other(targets.shape[1], loss), SensitivityMonitor(task=task if told else "auto"), truth, train)
    check(truth)


def test_labels_of_one_dimension_fit_outputs_of_two() -> None:
    class Regression(Other):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return mse_loss(self(batch[0])[:, 0], batch[1])

    x = inputs(50)
    truth = Truth(4, "regression")
    fitted(
        Regression(1, None), SensitivityMonitor(task="regression"), truth, DataLoader(TensorDataset(x, x.sum(1)), 16)
    )
    check(truth)


# Early stopping and checkpoints, as they are


def test_early_stopping_and_checkpoints_follow_it(tmp_path: Path) -> None:
    class Unlabelled(Classifier):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert isinstance(batch, Tensor)

    seed_everything(0, verbose=False)
    truth = Truth(4)
    stopping = EarlyStopping(monitor="val_risk_estimate", patience=3)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_risk_estimate", filename="{epoch}")
    run = trainer(
        callbacks=[stopping, checkpoint, SensitivityMonitor(), truth], enable_checkpointing=True, max_epochs=200
    )
    x, y = labelled(50).tensors
    y[::4] = 0  # it learns, and then must memorize
    run.fit(Unlabelled(), DataLoader(TensorDataset(x, y), 16), unlabelled_loader(seed=1))
    values = logged(truth, "risk")
    best = int(np.argmin(values))
    assert best > 0 and len(values) == best + 4 < 200
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"


@pytest.mark.parametrize(
    ("estimates", "warned"),
    [([5, 4, 6, *range(7, 20)], 1), (range(20, 0, -1), None), ([2, 1], None), ([math.inf] * 12, None)],
)
def test_a_minimum_in_the_first_validations_of_a_long_fit_is_warned_of(
    estimates: Any, warned: int | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    values = iter([torch.tensor(float(value)) for value in estimates])
    add = RiskMeasurement.add_estimate
    monkeypatch.setattr(RiskMeasurement, "add_estimate", lambda self, idx, _: add(self, idx, next(values)))
    trainer(callbacks=[SensitivityMonitor()], max_epochs=len(estimates)).fit(Plain(), loader(), loader(seed=1))
    expected = [] if warned is None else [f"`val_risk_estimate` was lowest at validation {warned}, counted from 0."]
    messages = [str(warning.message) for warning in recwarn if "was lowest" in str(warning.message)]
    assert [message[: len(text)] for message, text in zip(messages, expected, strict=True)] == expected


# When it is logged


def test_without_training_it_is_not_logged() -> None:
    monitor, model = SensitivityMonitor(), Classifier()
    run = trainer(callbacks=[monitor])
    run.fit(model, loader(), loader(seed=1))
    assert {f"val_{name}" for name in NAMES} <= run.callback_metrics.keys()
    (values,) = run.validate(model, loader(seed=1), verbose=False)
    (tested,) = run.test(model, loader(seed=1), verbose=False)
    assert not any(name in key for key in (*values, *tested) for name in NAMES)


def test_it_can_be_left_out() -> None:
    class Autoencoder(Classifier):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    run = trainer(callbacks=[SensitivityMonitor(task=None)])
    run.fit(Autoencoder(), unlabelled_loader(), unlabelled_loader(seed=1))
    assert "val_sensitivity" in run.callback_metrics
    assert not any(name in key for key in run.callback_metrics for name in NAMES)


def test_every_loader_gets_its_own() -> None:
    truth = Truth(4)
    run = trainer(callbacks=[SensitivityMonitor(), truth], max_epochs=1)
    run.fit(Classifier(), loader(), [loader(seed=1), loader(seed=2)])
    (values,) = truth.logged
    for idx in (0, 1):
        assert {f"val_{name}/dataloader_idx_{idx}" for name in NAMES} <= values.keys()
    first, second = (values[f"val_risk_training/dataloader_idx_{idx}"] for idx in (0, 1))
    assert first == second == pytest.approx(truth.training[0], rel=1e-5)
    assert values["val_risk_uncertainty/dataloader_idx_0"] == pytest.approx(truth.uncertainty[0], rel=1e-5)
    assert values["val_risk_uncertainty/dataloader_idx_1"] != pytest.approx(truth.uncertainty[0], rel=1e-5)


def test_a_validation_within_the_first_epoch_uses_what_it_has() -> None:
    truth = Truth(1)
    run = trainer(callbacks=[SensitivityMonitor(), truth], max_epochs=1, val_check_interval=1, limit_train_batches=1)
    run.fit(Classifier(), loader(), DataLoader(truth.holdout, 16))
    check(truth)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_a_small_training_set_is_kept_once() -> None:
    truth = Truth(4)
    fitted(Classifier(), SensitivityMonitor(num_training_samples=120), truth, loader(shuffle=True))
    check(truth)


def test_a_second_fit_has_samples_of_its_own() -> None:
    monitor, model = SensitivityMonitor(), Classifier()
    for seed in (3, 4):
        truth = Truth(4)
        run = trainer(callbacks=[monitor, truth], max_epochs=1)
        run.fit(model, loader(seed=seed), DataLoader(truth.holdout, 16))
        check(truth)
    assert monitor._risk._training_samples is None  # and they are freed


def test_a_step_that_writes_into_its_batch_does_not_matter() -> None:
    class Writer(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    truth = Truth(4)
    fitted(Writer(), SensitivityMonitor(), truth, loader())
    check(truth)


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="needs lightning 2.6")
def test_averaged_weights_are_what_is_scored() -> None:
    class Scores(Truth):
        def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.swapped = [parameter.clone() for parameter in pl_module.parameters()]

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                with torch.no_grad():
                    for parameter, value in zip(pl_module.parameters(), self.swapped, strict=True):
                        parameter.copy_(value)
                super().on_validation_end(trainer, pl_module)

    truth = Scores(4)
    averaging = callbacks.WeightAveraging(avg_fn=lambda average, weight, count: average + 0.1 * (weight - average))
    run = trainer(callbacks=[averaging, SensitivityMonitor(), truth], max_epochs=1)
    run.fit(Plain(), loader(), DataLoader(truth.holdout, 16))
    check(truth)


class Plain(Classifier):
    """Without batch norm, of which averaging keeps other statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.ReLU(), nn.Linear(16, 4))


# Where training goes on


def test_it_goes_on_where_training_resumes(tmp_path: Path) -> None:
    def run(max_epochs: int, **kwargs: Any) -> tuple[Truth, Trainer]:
        seed_everything(0, verbose=False)
        truth = Truth(4)
        fit = trainer(callbacks=[SensitivityMonitor(), truth], max_epochs=max_epochs)
        fit.fit(Plain(), loader(), DataLoader(truth.holdout, 16), **kwargs)
        return truth, fit

    whole, _ = run(4)
    _, first = run(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = run(4, ckpt_path=tmp_path / "two.ckpt")
    for term in RISK:
        assert logged(resumed, term) == pytest.approx(logged(whole, term)[2:], rel=1e-5), term


def test_a_second_fit_of_the_same_trainer_goes_on_and_another_trainer_starts_anew() -> None:
    monitor, model = SensitivityMonitor(), Plain()
    untrained = initial_weights(model)
    run = trainer(callbacks=[monitor], max_epochs=1)
    for max_epochs in (1, 2):
        run.fit_loop.max_epochs = max_epochs
        run.fit(model, loader(), loader())
        torch.testing.assert_close(monitor._risk.initial_weights, untrained)
    another = Plain()
    run.fit_loop.max_epochs = 3
    run.fit(another, loader(), loader())
    assert monitor._risk.initial_weights["net.0.weight"].ne(untrained["net.0.weight"]).any()
    before_tuning = initial_weights(model)
    trainer(callbacks=[monitor], max_epochs=1).fit(model, loader(), loader())
    torch.testing.assert_close(monitor._risk.initial_weights, before_tuning)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resuming_without_the_weights_from_before_training_is_an_error(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Plain(), loader(), loader())
    first.save_checkpoint(tmp_path / "without.ckpt")
    for monitor in (SensitivityMonitor(), SensitivityMonitor(task="multiclass")):
        resumed = trainer(callbacks=[monitor], max_epochs=2)
        fit = partial(resumed.fit, Plain(), loader(), loader(), ckpt_path=tmp_path / "without.ckpt")
        message = "`SensitivityMonitor` should have been in the"
        if monitor.task == "auto":
            with pytest.warns(UserWarning, match="There will be no risk estimate. " + message):
                fit()
            assert "val_sensitivity" in resumed.callback_metrics
        else:
            with pytest.raises(MisconfigurationException, match=message):
                fit()
    resumed = trainer(callbacks=[SensitivityMonitor(task=None)], max_epochs=2)
    resumed.fit(Plain(), loader(), loader(), ckpt_path=tmp_path / "without.ckpt")


# What it costs


def test_its_forward_passes_are_counted() -> None:
    class Counting(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.eval_samples: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.eval_samples.append(len(x))
            return super().forward(x)

    def passes(max_epochs: int, **kwargs: Any) -> tuple[int, int]:
        model = Counting()
        run = trainer(callbacks=[SensitivityMonitor(**kwargs)], max_epochs=max_epochs, num_sanity_val_steps=0)
        run.fit(model, loader(100, 10), unlabelled_loader(50, 25))
        return len(model.eval_samples), sum(model.eval_samples)

    validation = (2 * 2, 2 * 50)  # clean and noisy
    assert passes(1, task=None) == validation
    kept, scored, twins = (4, 40), (4, 40), (8, 200)  # two batches: four twins each
    expected = [sum(parts) for parts in zip(validation, kept, scored, twins, strict=True)]
    assert passes(1, num_training_samples=35) == tuple(expected)
    expected = [a + b for a, b in zip(expected, (validation[0] + 12, validation[1] + 240), strict=True)]
    assert passes(2, num_training_samples=35) == tuple(expected)


@pytest.mark.parametrize(
    ("num_batches", "world_size", "expected"),
    [(1, 1, 8), (3, 1, 3), (8, 1, 1), (100, 1, 1), (3, 2, 2), (math.inf, 1, 1)],
)
def test_a_loader_has_eight_twins_or_one_a_batch(num_batches: float, world_size: int, expected: int) -> None:
    assert num_twins(num_batches, world_size) == expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    def risk(precision: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        run = trainer(callbacks=[SensitivityMonitor()], max_epochs=2, precision=precision)
        run.fit(Plain(), loader(200), unlabelled_loader(200, seed=1))
        return {name: float(run.callback_metrics[f"val_{name}"]) for name in NAMES}

    assert risk(precision) == pytest.approx(risk("32-true"), rel=0.05, abs=0.01)


# Bad input


@pytest.mark.parametrize(
    ("monitor", "batch", "message"),
    [
        ({}, inputs(20), r"got a tensor \(torch.float32, shape \(10, 12\)\).*`targets=`.*`task=`.*`task=None`"),
        ({}, (inputs(20), inputs(20)[:, :4]), "told what floating labels are"),
        ({}, (inputs(20), inputs(20), torch.zeros(20).long()), "one more element, the labels"),
        ({"targets": 5}, (inputs(20), torch.zeros(20).long()), "`targets=5` should name a part of the batch"),
        ({"targets": lambda batch: batch["label"]}, (inputs(20), torch.zeros(20).long()), "list indices must be"),
        ({"task": "regression"}, (inputs(20), torch.zeros(20).long()), "one label per output"),
        ({}, (inputs(20), torch.full((20,), 4)), "labels from 0 to 3, got 4 to 4"),
        ({"task": "multiclass"}, (inputs(20), torch.full((20,), 4)), "labels from 0 to 3, got 4 to 4"),
        (
            {"outputs": lambda y: y.softmax(1), "per_output": True},
            (inputs(20), torch.zeros(20).long()),
            "probabilities",
        ),
    ],
)
def test_labels_that_can_not_be_told_are_an_error_before_the_first_step(
    monitor: dict[str, Any], batch: Any, message: str
) -> None:
    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

    data = TensorDataset(*batch) if isinstance(batch, tuple) else batch
    stopping = EarlyStopping(monitor="val_risk_estimate")
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=[SensitivityMonitor(**monitor), stopping]).fit(Never(), DataLoader(data, 10), loader())


@pytest.mark.parametrize("targets", [None, lambda batch: batch])
def test_without_labels_there_is_a_warning_and_no_estimate_unless_it_is_wanted(targets: Any) -> None:
    class Autoencoder(Classifier):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    run = trainer(callbacks=[SensitivityMonitor(targets=targets)], max_epochs=2)
    if targets is None:
        with pytest.warns(UserWarning, match="There will be no risk estimate.*`task=None`"):
            run.fit(Autoencoder(), unlabelled_loader(), unlabelled_loader(seed=1))
        assert "val_sensitivity" in run.callback_metrics
        assert "val_risk_estimate" not in run.callback_metrics
    else:
        with pytest.raises(MisconfigurationException, match="told what floating labels are"):
            run.fit(Autoencoder(), unlabelled_loader(), unlabelled_loader(seed=1))


def test_a_training_batch_that_the_model_can_not_be_called_on_does_not_end_the_fit() -> None:
    """The step flattens what training gives; validation gives it flat."""

    class Flattening(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0].flatten(1)), batch[1])

    x, y = labelled(48).tensors
    train = DataLoader(TensorDataset(x.reshape(-1, 3, 4), y), 16)
    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=1)
    with pytest.warns(UserWarning, match="There will be no risk estimate.*mat1 and mat2"):
        run.fit(Flattening(), train, loader())
    assert "val_sensitivity" in run.callback_metrics
    with pytest.raises(MisconfigurationException, match="mat1 and mat2"):
        trainer(callbacks=[SensitivityMonitor(task="multiclass")], max_epochs=1).fit(Flattening(), train, loader())


def test_a_schedule_that_follows_it_requires_it() -> None:
    class Scheduled(Classifier):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_risk_estimate"}}

    with pytest.raises(MisconfigurationException, match="can't tell how to score"):
        trainer(callbacks=[SensitivityMonitor()]).fit(Scheduled(), unlabelled_loader(), unlabelled_loader(seed=1))


def test_a_later_batch_of_other_labels_does_not_end_the_fit() -> None:
    x, y = labelled(48).tensors
    y[40] = 9  # of which the loss makes something, or nothing

    class Lenient(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1].clamp_max(3))

    truth = Truth(2)
    run = trainer(callbacks=[SensitivityMonitor(), truth], max_epochs=1)
    with pytest.warns(UserWarning, match="leaves a training batch out.*labels from 0 to 3, got 0 to 9"):
        run.fit(Lenient(), DataLoader(TensorDataset(x, y), 16), DataLoader(truth.holdout, 16))
    check(truth)


def test_labels_that_are_all_ignored_are_warned_of() -> None:
    class Nothing(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    data = TensorDataset(inputs(48), torch.full((48,), -100))
    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=1)
    with pytest.warns(UserWarning, match="no label of the training samples counts"):
        run.fit(Nothing(), DataLoader(data, 16), loader())
    assert "val_risk_estimate" not in run.callback_metrics


@pytest.mark.parametrize("fails", ["nan", "raises"])
def test_a_twin_that_fails_costs_the_estimate_and_not_the_fit(fails: str) -> None:
    class Positive(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((NUM_FEATURES,), 0.01))

        def forward(self, x: Tensor) -> Tensor:
            if fails == "raises" and bool((self.scale <= 0).any()):
                raise ValueError("scale must be positive")
            return super().forward(x * self.scale.sqrt())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": [self.scale], "lr": 0.0}, {"params": self.net.parameters()}], lr=0.1)

        def on_train_epoch_start(self) -> None:
            with torch.no_grad():
                self.scale.fill_(1.0)  # far from where it began: one twin in six has it negative

    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=2)
    with pytest.warns(UserWarning, match="with perturbed weights the model failed, or gave nan or inf"):
        run.fit(Positive(), loader(), loader(seed=1))
    assert run.current_epoch == 2
    assert "val_sensitivity" in run.callback_metrics
    assert "val_risk_estimate" not in run.callback_metrics


def test_sigmoid_outputs_are_warned_of() -> None:
    class Sigmoid(Other):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    data = TensorDataset(inputs(48), inputs(48)[:, :1] > 0.5)
    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=5)
    with pytest.warns(UserWarning, match=r"all in \[0, 1\].*before the sigmoid"):
        run.fit(Sigmoid(1, nn.BCELoss()), DataLoader(data, 16), unlabelled_loader())


def test_a_graph_that_training_holds_over_a_validation_stays_valid() -> None:
    class Accumulating(Plain):
        automatic_optimization = False
        held: Any = 0.0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.held = self.held + cross_entropy(self(batch[0]), batch[1])
            if batch_idx % 4 == 3:
                self.manual_backward(self.held)
                self.held = 0.0
                self.optimizers().step()

    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=1, val_check_interval=2)
    run.fit(Accumulating(), loader(64), loader(seed=1))
    assert run.global_step == 1


def test_a_fit_that_failed_leaves_no_samples_to_a_validation() -> None:
    class Failing(Plain):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("out of luck")

    monitor, model = SensitivityMonitor(), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(callbacks=[monitor]).fit(model, loader(), loader())
    (values,) = trainer(callbacks=[monitor]).validate(model, loader(), verbose=False)
    assert not any("risk" in name for name in values)


def test_the_device_holds_no_copy_of_the_weights_while_training() -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert monitor._risk._learned is None

    monitor = SensitivityMonitor()
    trainer(callbacks=[monitor, Watch()], max_epochs=3).fit(Plain(), loader(), loader())


@pytest.mark.parametrize("batch_type", ["mapping", "triple"])
def test_labels_are_found_or_told(batch_type: str) -> None:
    class Step(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch["x"] if batch_type == "mapping" else batch[0]), labels(batch))

    def labels(batch: Any) -> Tensor:
        return batch["label"] if batch_type == "mapping" else batch[2]

    samples: list[Any] = [(x, index, y) for index, (x, y) in enumerate(labelled(50))]
    if batch_type == "mapping":
        samples = [{"x": x, "index": index, "label": y} for x, index, y in samples]
    monitor = SensitivityMonitor(targets=None if batch_type == "mapping" else 2)
    run = trainer(callbacks=[monitor], max_epochs=1)
    run.fit(Step(), DataLoader(samples, 16), unlabelled_loader())
    assert 0 < run.callback_metrics["val_risk_training"] < 2
    monitor = SensitivityMonitor(targets=labels)
    again = trainer(callbacks=[monitor], max_epochs=1)
    again.fit(Step(), DataLoader(samples, 16), unlabelled_loader())
    assert "val_risk_training" in again.callback_metrics


@pytest.mark.parametrize("argument", [{"task": "classification"}, {"targets": 1.5}, {"num_training_samples": 0}])
def test_arguments_are_checked_at_once(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(MisconfigurationException, match=f"`{name}` should be .*, got"):
        SensitivityMonitor(**argument)


@pytest.mark.parametrize("strategy", ["error", "warn"])
def test_nan_on_training_samples_alone(strategy: str) -> None:
    class OnTraining(Plain):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits if self.training or len(x) != 10 else logits / 0

    run = trainer(callbacks=[SensitivityMonitor(nan_strategy=strategy)], max_epochs=1)
    if strategy == "error":
        with pytest.raises(ValueError, match="dataloader 0: outputs for training samples had nan or inf"):
            run.fit(OnTraining(), loader(50, 10), loader())
    else:
        with pytest.warns(UserWarning, match="outputs for training samples had nan or inf"):
            run.fit(OnTraining(), loader(50, 10), loader())
        assert "val_sensitivity" in run.callback_metrics
        assert "val_risk_estimate" not in run.callback_metrics


class Graph:
    """A batch that is moved in place, as of torch_geometric."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.num_moves = x, y, 0

    def to(self, device: Any, **_: Any) -> "Graph":
        self.num_moves += 1
        return self


def test_batches_that_are_objects_are_kept_as_they_were() -> None:
    class OfGraphs(Classifier):
        def __init__(self, is_graph: bool) -> None:
            super().__init__()
            self.is_graph = is_graph

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = (batch.x, batch.y) if self.is_graph else batch
            if self.is_graph:
                assert batch.num_moves == 1  # by Lightning
            x.mul_(0.5)
            return cross_entropy(self(x), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    def graphs(items: list[Any]) -> Graph:
        return Graph(*(torch.stack(parts) for parts in zip(*items, strict=True)))

    values = []
    for options in ({"collate_fn": graphs}, {}):
        torch.manual_seed(0)
        chosen = {"inputs": lambda batch: batch.x, "targets": lambda batch: batch.y} if options else {}
        run = trainer(callbacks=[SensitivityMonitor(task="multiclass", **chosen)])
        run.fit(OfGraphs(bool(options)), loader(**options), loader(**options))
        values.append({name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val_")})
    assert values[0] == values[1]


def test_a_training_batch_that_can_not_be_copied_is_no_sample() -> None:
    class Named(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["x"], batch["y"]], batch_idx)

    train = DataLoader(
        labelled(32),
        16,
        collate_fn=lambda items: {
            "x": torch.stack([x for x, _ in items]),
            "y": torch.stack([y for _, y in items]),
            "names": SimpleNamespace(x=torch.zeros(1), names=(name for name in "ab")),
        },
    )
    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=1)
    with pytest.warns(UserWarning, match="There will be no risk estimate.*can't be copied"):
        run.fit(Named(), train, loader())
    assert "val_risk_estimate" not in run.callback_metrics


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_weights_that_nobody_has_made_before_training() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0] = nn.LazyLinear(16)

    weights = []
    for monitors in ([SensitivityMonitor()], []):
        torch.manual_seed(0)
        model = Lazy()
        run = trainer(callbacks=monitors, num_sanity_val_steps=0)
        if monitors:
            with pytest.warns(UserWarning, match="There will be no risk estimate.*lazy ones"):
                run.fit(model, loader(), loader())
            assert "val_sensitivity" in run.callback_metrics
        else:
            run.fit(model, loader(), loader())
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    with pytest.raises(MisconfigurationException, match="lazy ones"):
        trainer(callbacks=[SensitivityMonitor(task="multiclass")], num_sanity_val_steps=0).fit(
            Lazy(), loader(), loader()
        )


@pytest.mark.parametrize("name", ["val_risk_score", "val_risk_estimates"])
def test_only_our_own_names_make_labels_required(name: str) -> None:
    class Own(Other):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(name, self(batch[0]).square().mean())

    labels = DataLoader(TensorDataset(inputs(32), inputs(32)[:, :1]), 16)
    run = trainer(callbacks=[SensitivityMonitor(), EarlyStopping(name)])
    with pytest.warns(UserWarning, match="There will be no risk estimate"):
        run.fit(Own(1, mse_loss), labels, labels)
