"""The risk estimate as RiskMonitor logs it, how many samples it counts, and that it never ends a run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as cb
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.model.twins import NUM_TWINS, twin_numbers
from tests.callbacks.plain_loop import HOLDOUT, NAMES, REFERENCE_NAMES, Plain, Truth, bce, fit
from tests.helpers import Classifier, first_tensor, fitted, fitted_and_said, labelled, loader, logged
from tests.helpers import unlabelled_loader as unlabelled

X, Y = labelled(50).tensors
PARTLY = one_hot(Y, 4).where((torch.arange(50) % 5 > 0)[:, None] | (torch.arange(4) > 0), -100).float()
CODES = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)


def with_labels(labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(X[: len(labels)], labels), 16)


def changed(change: Any, kind: Any = Plain) -> Any:
    change(model := kind())
    return model


def scale_late(model: Plain) -> None:
    model.on_train_start = lambda: model.net[0].weight.data.mul_(2)


SCORED: dict[str, tuple[Tensor, Any]] = {  # labels and model, by task
    "multiclass, some without a label": (Y.where(torch.arange(50) % 5 > 0, -100), Plain),
    "multiclass, 8 bits": (Y.to(torch.uint8), lambda: Plain(loss=lambda y, t: cross_entropy(y, t.long()))),
    "multiclass, soft": (one_hot(Y, 4) * 0.9 + 0.025, Plain),
    "binary": (X[:, :1] > 0.5, lambda: Plain(1, bce)),
    "multilabel": ((X[:, :3] > 0.5).long(), lambda: Plain(3, bce)),
    "multiclass, batch norm": (Y, lambda: changed(lambda m: m.net.insert(1, nn.BatchNorm1d(16).double()))),
    "multiclass, frozen integers": (Y, lambda: changed(lambda m: m.register_parameter("codes", CODES))),
    "multiclass, averaged weights": (Y, Plain),
    "multiclass, without a sanity check": (Y, Plain),
    "multiclass, weights that come as training starts": (Y, lambda: changed(scale_late)),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_terms_are_those_of_a_plain_loop(name: str) -> None:
    (y, make), task = SCORED[name], name.split(",")[0]
    callbacks = [*(helpers.averaged_weights() if "averaged" in name else []), RiskMonitor(task), truth := Truth(task)]
    fit(make(), with_labels(y), *callbacks, num_sanity_val_steps=0 if "without a sanity check" in name else 2)
    assert all(epoch["val/risk_variance"] > 0 for epoch in truth.epochs)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_the_first_batches_of_a_fit_are_kept_once_and_scored_as_they_came() -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(), Writer()
    for _ in range(2):  # a second fit has samples and initial weights of its own
        fit(model, loader(shuffle=True), monitor, Truth(), val_check_interval=2, max_epochs=2)


def test_the_reference_learns_from_the_first_training_batches_of_which_evenly_spaced_ones_are_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.risk.NUM_TRAINING", 60)
    monkeypatch.setattr("lightning_sensitivity.callbacks.risk.NUM_SCORED", 20)
    truth = Truth(max_batches=4, scored=[0, 2])  # 64 of 120 are kept, and of these 32 scored
    fit(Plain(), loader(120), RiskMonitor(), truth)


def test_precisions_give_nearly_the_same() -> None:
    data, precisions = (loader(64), unlabelled(64, seed=1)), ("32-true", "bf16-mixed", "bf16-true", "64-true")
    found = [logged(fitted(RiskMonitor(), Classifier(0.0), *data, precision=each), "val") for each in precisions]
    assert found[1:] == [pytest.approx(found[0], rel=0.05, abs=0.02)] * 3


@pytest.mark.parametrize(("y", "num_outputs"), [(Y[:1], 4), (0 * Y, 4), (0.1 + 0.8 * one_hot(Y % 2, 2), 2)])
def test_one_sample_one_class_or_two_soft_ones_have_values_in_silence(y: Tensor, num_outputs: int) -> None:
    run, texts = fitted_and_said(RiskMonitor(), Plain(num_outputs), with_labels(y), unlabelled(seed=1))
    values = logged(run, "val/risk")
    assert not texts and values.keys() >= {*NAMES} and all(map(math.isfinite, values.values()))
    assert ("val/risk_label_noise" in values) == (num_outputs == 2)  # the others let a reference learn nothing


class Centred(Plain):
    """Its samples interact."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs - outputs.mean(0)


@pytest.mark.parametrize("batch_size", [5, 16, 50])
def test_samples_that_interact_are_measured_by_batches_as_they_came_from_either_loader(batch_size: int) -> None:
    truth = Truth(max_batches=math.ceil(50 / batch_size), batch_size=batch_size)
    fitted([RiskMonitor(), truth], Centred(), loader(50, batch_size), DataLoader(HOLDOUT, batch_size))


@pytest.mark.parametrize("num_batches", [NUM_TWINS, 5, 8, 19, 600])
def test_neighbouring_batches_share_a_twin_and_all_twins_have_about_as_many(num_batches: int) -> None:
    numbers = [twin_numbers(place, num_batches) for place in range(num_batches)]
    assert all(len(each) == 1 for each in numbers)
    first = [each[0] for each in numbers]
    counts = [first.count(number) for number in {*first}]
    assert first == sorted(first) and max(counts) - min(counts) <= 1
    assert len(counts) == min(num_batches, NUM_TWINS)


@pytest.mark.parametrize(("sizes", "is_said"), [([1], True), ([7, 7, 2], True), ([8], False), ([16, 16, 2, 2], False)])
def test_few_samples_in_a_batch_are_too_few_for_batch_norm_which_is_said_once(sizes: list[int], is_said: bool) -> None:
    val = [unlabelled(size, size, seed=1).dataset for size in sizes]
    run, texts = fitted_and_said(RiskMonitor(), Classifier(), val=DataLoader(val, None))
    assert len(texts) == is_said and all("batches of fewer than 8 samples, too few for batch norm" in t for t in texts)
    assert run.callback_metrics["val/risk_variance"] > 0  # one sample has no statistics of its own


def test_the_variance_does_not_depend_on_the_size_of_small_batches_without_batch_norm() -> None:
    def variance(batch_size: int) -> float:
        run = fitted([RiskMonitor()], Plain(), loader(), unlabelled(64, batch_size, seed=1), max_epochs=1)
        return float(run.callback_metrics["val/risk_variance"])

    assert [variance(size) for size in (1, 4)] == pytest.approx([variance(64 // NUM_TWINS)] * 2, rel=1e-5)


def test_each_of_several_loaders_has_an_estimate_under_lightnings_names() -> None:
    def values(loaders: Any) -> dict[str, float]:
        model = changed(lambda model: setattr(model.net[2], "p", 0.0))  # each loader draws a random number
        return logged(fitted(RiskMonitor(), model, val=loaders), "val/risk_")

    first, second = unlabelled(48, seed=1), unlabelled(32, seed=2)
    both, alone = values([first, second]), values(first)
    expected = {f"{name}/dataloader_idx_0": value for name, value in alone.items()}
    assert expected == {name: pytest.approx(value) for name, value in both.items() if name.endswith("0")}
    assert {f"{name}/dataloader_idx_1" for name in alone} == both.keys() - expected.keys()


def test_early_stopping_and_checkpoints_follow_it_and_the_progress_bar_shows_it(tmp_path: Path) -> None:
    stopping = cb.EarlyStopping("val/risk_estimate", patience=3)
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor="val/risk_estimate", filename="{epoch}")
    callbacks, labels = [stopping, checkpoint, RiskMonitor(prog_bar=True)], Y.clone()
    labels[::4] = 0  # it learns, and then must memorize
    options = {"enable_checkpointing": True, "max_epochs": 200}
    run = fitted(callbacks, Classifier(), with_labels(labels), unlabelled(seed=1), **options)
    values = [epoch["val/risk_estimate"] for epoch in run.epochs]
    best = values.index(min(values))
    assert best > 0 and len(values) == best + 4 < 200
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    assert run.epochs[0].keys() >= {*NAMES, *REFERENCE_NAMES}
    assert run.progress_bar_metrics.keys() & {*NAMES} == {NAMES[0]}


# How many training samples there are


def of_one(batch: Any) -> Any:
    """The batch of the first loader, of several."""
    return batch[0] if isinstance(batch[0], list) else batch


def batched(batches: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_sampler=batches)


COUNTED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "limit_train_batches": (lambda: loader(shuffle=True), {"limit_train_batches": 2}, 50),
    "limit_train_batches, in order": (loader, {"limit_train_batches": 2}, 32),
    "SubsetRandomSampler": (lambda: loader(sampler=SubsetRandomSampler(range(20))), {}, 20),
    "a batch sampler": (lambda: batched(BatchSampler(RandomSampler(X), 16, False)), {"limit_train_batches": 2}, 50),
    "batches without a length": (lambda: batched(iter([[0, 1], [2, 3]])), {}, 50),
    "token budgets, in order": (lambda: batched(Budgets()), {}, 50),
    "DistributedSampler, in order": (lambda: loader(sampler=in_order()), {"limit_train_batches": 2}, 32),
    "a loader of one's own, with a data set": (lambda: OwnWithData(), {}, 50),
    "with replacement": (lambda: loader(sampler=RandomSampler(X, True, 80)), {}, 50),
    "items that are batches": (lambda: DataLoader([[X[:25], Y[:25]], [X[25:], Y[25:]]], None), {}, 50),
    "a labelled share": (lambda: with_labels(Y.where(torch.arange(50) % 5 > 0, -100)), {}, 40),
    "samples without an ignored label": (lambda: with_labels(PARTLY), {}, 40),
}


class Budgets:
    """Batches of samples in their order, without a length."""

    def __init__(self) -> None:
        self.sampler = SequentialSampler(X)

    def __iter__(self) -> Any:
        return iter([[*range(30)], [*range(30, 50)]])


def in_order() -> DistributedSampler:
    return DistributedSampler(X, num_replicas=1, rank=0, shuffle=False)


class OwnWithData:
    """It has a data set, but no batch sampler."""

    def __init__(self) -> None:
        self.dataset = labelled(50)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.parametrize("name", COUNTED)
def test_different_training_samples_are_counted(name: str) -> None:
    make, options, expected = COUNTED[name]
    fit(Plain(), make(), monitor := RiskMonitor(), max_epochs=1, **options)
    assert monitor.record.num_training == expected


GIVEN: dict[str, Any] = {
    "a stream": lambda: DataLoader(helpers.Stream(has_labels=True), 16),
    "several loaders": lambda: CombinedLoader([loader(), loader(20)], "max_size_cycle"),
    "a loader of one's own": lambda: Own(),
}


class Own:
    batch_size = 16

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.parametrize("name", GIVEN)
def test_where_samples_cannot_be_counted_their_number_is_given(name: str) -> None:
    def run(num_training: int | None) -> RiskMonitor:
        model = Plain()
        model.training_step = lambda batch, batch_idx: Plain.training_step(model, of_one(batch), batch_idx)
        monitor = RiskMonitor(inputs=first_tensor, targets=lambda b: of_one(b)[1], num_training=num_training)
        options = {"max_epochs": 1, "limit_train_batches": 8, "val_check_interval": 2, "check_val_every_n_epoch": None}
        fit(model, GIVEN[name](), monitor, **options)
        return monitor

    assert run(700).record.num_training == 700
    with pytest.raises(MisconfigurationException, match="the number of different training samples is unknown"):
        run(None)


def test_n_and_w_are_fixed_at_the_first_validation_also_if_layers_are_unfrozen_later() -> None:
    model = Plain()
    model.net[0].requires_grad_(False)
    model.on_train_epoch_start = lambda: model.net[0].requires_grad_(model.current_epoch > 0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.net[3].parameters(), 0.0)
    monitor, seen = RiskMonitor(initial_weights={"net.3.weight": model.net[3].weight.detach() / 2}), list[Any]()
    model.on_validation_end = lambda: seen.append((monitor.record.num_training, monitor.record.num_weights))
    options = {"limit_train_batches": 3, "val_check_interval": 1, "max_epochs": 2}
    with pytest.warns(UserWarning, match="no initial weights for"):
        fit(model, loader(shuffle=True), monitor, **options)
    assert len(seen) == 7 and {*seen[1:]} == {(50, 16 * 4 + 4)}  # without the sanity check


# Nothing ends a run


class Warm(Plain):
    """The first epoch moves nothing."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [LambdaLR(optimizer, lambda epoch: float(epoch > 0))]


STILL: dict[str, tuple[Any, dict[str, Any]]] = {
    "a learning rate of 0 at first": (Warm, {}),
    "steps that come after the first validation": (Plain, {"accumulate_grad_batches": 8, "val_check_interval": 2}),
    "bf16, tiny steps": (
        lambda: changed(lambda model: setattr(model, "lr", 1e-7), Classifier),
        {"precision": "bf16-mixed"},
    ),
}


@pytest.mark.parametrize("name", STILL)
def test_early_stopping_goes_on_with(name: str) -> None:
    make, options = STILL[name]
    stopping = cb.EarlyStopping("val/risk_estimate", patience=99)
    run = fit(make(), loader(), RiskMonitor(), stopping, max_epochs=4, **options)
    assert run.current_epoch == 4 and not run.should_stop
    assert all(math.isfinite(value) for epoch in run.epochs for value in epoch.values())
    if "tiny" not in name:
        assert run.epochs[0]["val/risk_variance"] == 0  # it has not moved


def test_a_first_value_that_is_missing_is_logged_as_the_worst_score_and_later_ones_are_gaps() -> None:
    stopping = cb.EarlyStopping("val/risk_estimate", patience=99)
    model = helpers.Acting(lambda m, x, epoch: x.mul_(math.nan) if epoch in (0, 1, 3) else x)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)  # with a schedule that waits for the value, too
    schedule = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/risk_criterion"}
    model.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": schedule}
    run, messages = fitted_and_said([RiskMonitor(), stopping], model, max_epochs=5)
    values = [epoch["val/risk_estimate"] for epoch in run.epochs]
    assert run.current_epoch == 5 and values[:2] == [2.0, 2.0] and values[2] == values[3] != values[4] < 2
    assert "val/risk_claim" not in run.epochs[0]
    assert len(messages) == 2 and "gave nan or inf" in messages[0] and "logs the worst possible" in messages[1]


class Always(RiskMonitor):
    def should_measure(self, trainer: Any) -> bool:
        return True


class Late(RiskMonitor):
    def should_measure(self, trainer: Any) -> bool:
        return trainer.current_epoch > 1


def test_early_stopping_waits_for_a_first_value_that_comes_late() -> None:
    stopping = cb.EarlyStopping("val/risk_estimate", patience=99)
    run, messages = fitted_and_said([Late(), stopping], Plain(), max_epochs=4)
    values = [epoch["val/risk_estimate"] for epoch in run.epochs]
    assert messages == [] and values[:2] == [2.0, 2.0] and max(values[2:]) < 2 and stopping.stopped_epoch == 0


def test_nothing_is_measured_or_logged_without_a_fit() -> None:
    with helpers.said() as texts:
        assert helpers.validated([Always()], Classifier(), loader()).keys() == {"val_loss"}
    assert texts == []


def test_unlabelled_inputs_may_have_other_rows_than_outputs() -> None:
    class Crops(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1) if x.ndim == 3 else x)

    crops = DataLoader(torch.stack([HOLDOUT, HOLDOUT], 1), 16)
    run, messages = fitted_and_said(RiskMonitor(), Crops(), with_labels(Y), crops, max_epochs=1)
    assert logged(run)["val/risk_estimate"] < 2 and len(messages) == 1 and "has no reference" in messages[0]


def test_an_estimate_above_every_brier_score_is_said_once() -> None:
    model = Plain()
    model.forward = lambda x: 1e3 * Plain.forward(model, x)
    _, messages = fitted_and_said(RiskMonitor(), model, with_labels(Y.flip(0)))
    assert len(messages) == 1 and "no Brier score is above 2" in messages[0]
