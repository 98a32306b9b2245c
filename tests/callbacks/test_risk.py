"""The risk estimate as RiskMonitor logs it; what its terms are is tested with ``functional.risk``."""

import copy
import itertools
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch import callbacks as cb
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.samples import TrainingSamples
from lightning_sensitivity.functional import risk_estimate, variance_factor
from lightning_sensitivity.functional.risk import TWIN_STRENGTH as STRENGTH
from lightning_sensitivity.model import noise_generator
from lightning_sensitivity.model.twins import call_with_batch_statistics, copy_weights, has_batch_norm, twin
from tests.callbacks.test_training import averaged_weights
from tests.helpers import (
    NUM_CLASSES,
    Classifier,
    History,
    Quiet,
    Stream,
    first_tensor,
    fitted,
    inputs,
    labelled,
    loader,
    logged,
)
from tests.helpers import unlabelled_loader as unlabelled

HOLDOUT = inputs(50, seed=1)  # in four batches, measured together: four twins for each half
NAMES = ["val_" + name for name in RiskMonitor.names]


class Plain(Classifier):
    """Without batch norm; in 64 bits, in which sums in another order are the same to nine digits."""

    def __init__(self, num_outputs: int = 4, loss: Any = cross_entropy) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs))
        self.loss = loss
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[-1])


class Truth(History):
    """What a plain loop gives at each validation, by twins of the weights from before the first step."""

    def __init__(self, num_batches: int = 4, task: str = "multiclass") -> None:
        super().__init__()
        self.num_batches, self.task, self.initial = num_batches, task, None
        self.batches: list[Any] = []
        self.terms: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.initial = self.initial or copy_weights(pl_module.state_dict())
        if len(self.batches) < self.num_batches:
            self.batches.append([part.clone() for part in batch])

    @torch.no_grad()
    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.sanity_checking or batch_idx:
            return
        model, (x, y) = copy.deepcopy(pl_module), (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        labels = trainer.train_dataloader.dataset.tensors[-1].reshape(50, -1)
        num_training = int((labels != -100).any(1).sum())
        num_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        factor = variance_factor(num_training, num_weights, has_batch_norm(model))
        holdout, holdout_reference, of_twins = self.twins(model, HOLDOUT)
        eval_mode, by_batch = (
            risk_estimate(outputs, of_twins, model(x), y, self.task, strength=STRENGTH, factor=factor)
            for outputs in (holdout, holdout_reference)
        )
        # With batch norm, what is compared with twins is normalized by the batch, as they are.
        terms = [*eval_mode[1:4], by_batch.variance]
        self.terms.append([float(term) for term in (sum(terms), *terms)])

    def twins(self, model: Any, x: Tensor) -> list[Tensor]:
        """Outputs for each pass of a twin: clean, those that it is compared with, and its own."""
        draws, passes = itertools.count(-1, -1), []
        for part in x.chunk(2):  # four twins for each
            reference = call_with_batch_statistics(model, partial(model, part))
            for _ in range(4):
                with twin(model, self.initial, noise_generator(0, 0, 0, 0, next(draws)), STRENGTH):
                    outputs = call_with_batch_statistics(model, partial(model, part))
                passes.append((model(part), reference, outputs))
        return [torch.cat(each) for each in zip(*passes, strict=True)]


def fit(model: Any, train: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    return fitted([*callbacks], model, train, DataLoader(HOLDOUT, 16), **{"max_epochs": 3, **kwargs})


def compare(truth: Truth, model: Any, train: Any, *callbacks: Any, **kwargs: Any) -> None:
    fit(model, train, *callbacks, truth, **kwargs)
    values = [[epoch[name] for name in NAMES] for epoch in truth.epochs]
    assert values == [pytest.approx(terms, rel=1e-5) for terms in truth.terms]
    assert values[0] != values[1] != values[2] and all(variance > 0 for *_, variance in values)


X, Y = labelled(50).tensors
CODES = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs).reshape(outputs.shape))


def scale_late(model: Plain) -> None:
    model.on_train_start = lambda: model.net[0].weight.data.mul_(2)


def changed(change: Any) -> Any:
    change(model := Plain())
    return model


SCORED: dict[str, tuple[Tensor, Any]] = {  # task, labels and model
    "multiclass": (Y.where(torch.arange(50) % 5 > 0, -100), Plain),
    "multiclass, 8 bits": (Y.to(torch.uint8), lambda: Plain(loss=lambda y, t: cross_entropy(y, t.long()))),
    "multiclass, soft": (nn.functional.one_hot(Y, 4) * 0.9 + 0.025, Plain),
    "binary": (X[:, :1] > 0.5, lambda: Plain(1, bce)),
    "multilabel": ((X[:, :3] > 0.5).long(), lambda: Plain(3, bce)),
    "multiclass, batch norm": (Y, lambda: changed(lambda m: m.net.insert(1, nn.BatchNorm1d(16).double()))),
    "multiclass, frozen integers": (Y, lambda: changed(lambda m: m.register_parameter("codes", CODES))),
    "multiclass, averaged weights": (Y, Plain),
    "multiclass, weights that come as training starts": (Y, lambda: changed(scale_late)),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_terms_are_those_of_a_plain_loop(name: str) -> None:
    (y, make), truth = SCORED[name], Truth(task=name.split(",")[0])
    averaging = averaged_weights() if "averaged" in name else []
    monitor = RiskMonitor("multiclass" if y.is_floating_point() else "auto")
    compare(truth, make(), DataLoader(TensorDataset(X, y), 16), *averaging, monitor)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize(("num_samples", "num_batches"), [(32, 2), (33, 3), (120, 4)])
def test_the_first_batches_of_a_fit_are_kept_once_and_scored_as_they_came(num_samples: int, num_batches: int) -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(num_training_samples=num_samples), Writer()
    for _ in range(2):  # a second fit has samples and initial weights of its own
        compare(Truth(num_batches), model, loader(shuffle=True), monitor, val_check_interval=2)


def risk(num_samples: int = 200, **kwargs: Any) -> dict[str, float]:
    seed_everything(0, verbose=False)
    val = unlabelled(num_samples, seed=1)
    return logged(fitted([RiskMonitor()], Classifier(0.0), loader(num_samples), val, **kwargs), "val_")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    assert risk(precision=precision) == pytest.approx(risk(), rel=0.05, abs=0.01)


def test_a_model_that_takes_no_more_samples_than_a_batch_has_is_measured_batch_by_batch() -> None:
    class Small(Plain):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) <= 16
            return super().forward(x)

    run = fitted(RiskMonitor(), Small(), val=DataLoader(HOLDOUT, 4))  # two of which can be joined, but not all
    assert all(math.isfinite(value) for value in logged(run, "val_").values())


@pytest.mark.parametrize(("label", "match"), [
    (-100, "No validation batch has labels"),
    (NUM_CLASSES, "could not score the labels .* does not use them"),
])  # fmt: skip
def test_labels_that_cannot_be_scored_cost_only_their_score(label: int, match: str) -> None:
    def run(monitor: RiskMonitor) -> dict[str, float]:
        seed_everything(0, verbose=False)
        model = Plain()
        model.validation_step = Quiet.validation_step.__get__(model)
        val = DataLoader(TensorDataset(HOLDOUT, torch.full_like(Y, label)), 16)
        return logged(fitted(monitor, model, val=val), "val_")

    with pytest.warns(UserWarning, match=match) as caught:
        values = run(RiskMonitor(validation_labels=True))
    assert sum("RiskMonitor" in str(each.message) for each in caught) == 1
    assert values.pop("val_risk_num_labels") == 0 and math.isnan(values.pop("val_risk_label_score"))
    assert values == run(RiskMonitor())


def test_early_stopping_and_checkpoints_follow_it_and_the_progress_bar_shows_it(tmp_path: Path) -> None:
    history, stopping = History(), cb.EarlyStopping("val_risk_estimate", patience=3)
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor="val_risk_estimate", filename="{epoch}")
    callbacks, labels = [stopping, checkpoint, RiskMonitor(prog_bar=True), history], Y.clone()
    labels[::4] = 0  # it learns, and then must memorize
    train, val = DataLoader(TensorDataset(X, labels), 16), unlabelled(seed=1)
    run = fitted(callbacks, Classifier(), train, val, enable_checkpointing=True, max_epochs=200)
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    best = values.index(min(values))
    assert best > 0 and len(values) == best + 4 < 200
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    assert history.epochs[0].keys() - {"train_loss"} == {*NAMES}
    assert run.progress_bar_metrics.keys() & {*NAMES} == {"val_risk_estimate"}


def test_nan_is_not_the_lowest_estimate(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RiskMonitor()
    monitor.fit_state.history = [(0, math.nan), (1, 0.5), (2, 0.6)]
    with caplog.at_level(logging.INFO):
        monitor.on_train_end(SimpleNamespace(checkpoint_callbacks=[]), Plain())
    assert "lowest at epoch 1 (0.500)." in caplog.text


# How many training samples there are


class Own:
    batch_size = 16

    def __iter__(self) -> Any:
        return iter(loader())


class Oversampling:
    """A batch sampler that draws each sample five times an epoch."""

    def __iter__(self) -> Any:
        return iter(torch.arange(250).remainder(50).view(-1, 10).tolist())

    def __len__(self) -> int:
        return 25


class Changing(Stream):
    """Each epoch has as many samples as is said."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(has_labels=True)
        self.sizes = itertools.cycle(sizes)

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), next(self.sizes))


def of_one(batch: Any) -> Any:
    """The batch of the first loader, of several."""
    return batch[0] if isinstance(batch[0], list) else batch


COUNTED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "all": (loader, {}, 50),
    "limit_train_batches": (loader, {"limit_train_batches": 2}, 32),
    "drop_last": (lambda: loader(drop_last=True), {}, 48),
    "with replacement": (lambda: loader(sampler=RandomSampler(X, True, 80)), {}, 50),
    "batches of batches": (lambda: DataLoader([[X[:49], Y[:49]], [X[49:], Y[49:]]], 1, collate_fn=of_one), {}, 50),
    "a loader without a dataset": (Own, {}, 50),
    "a batch sampler that repeats samples": (lambda: DataLoader(labelled(50), batch_sampler=Oversampling()), {}, 50),
    "limit_train_batches, shuffled": (lambda: loader(shuffle=True), {"limit_train_batches": 2}, 50),
    "no batch sampler": (lambda: DataLoader([[X, Y]], None), {}, 50),
    "SubsetRandomSampler": (lambda: loader(sampler=SubsetRandomSampler(range(20))), {}, 20),
    "CombinedLoader": (lambda: CombinedLoader([loader(), loader()], "min_size"), {}, 50),
    "a stream, in its longest epoch": (lambda: DataLoader(Changing(16, 40, 20, 20), 16), {}, 40),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_samples_of_an_epoch_are_counted_also_where_training_resumes(name: str, tmp_path: Path) -> None:
    make, options, expected = COUNTED[name]
    model, ckpt_path = Plain(), None
    model.training_step = lambda batch, batch_idx: Plain.training_step(model, of_one(batch), batch_idx)
    for max_epochs in (4, 5):
        monitor = RiskMonitor(inputs=first_tensor, targets=lambda batch: of_one(batch)[1])
        run = fit(model, make(), monitor, ckpt_path=ckpt_path, max_epochs=max_epochs, **options)
        assert monitor.num_training == expected
        run.save_checkpoint(ckpt_path := tmp_path / "a.ckpt")
        options = options | {"limit_train_batches": 1}


def test_samples_with_16_bit_labels_are_counted_in_integers() -> None:
    samples = TrainingSamples("multiclass", 0, 0)
    for _ in range(300):
        samples.count(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert int(samples._num_seen) == 1200


def test_targets_get_the_batch_itself_unless_they_write_to_it() -> None:
    seen, batches = list[int](), list[int]()

    class Noting(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            batches.append(batch[0].data_ptr())
            return super().training_step(batch, batch_idx)

    def reads(batch: list[Tensor]) -> Tensor:
        seen.append(batch[0].data_ptr())
        return batch[1]

    fit(Noting(), loader(200), RiskMonitor(targets=reads, num_training_samples=8), num_sanity_val_steps=0)
    assert {*batches[1:13]} <= {*seen}
    before = loader(50).dataset.tensors[1].clone()
    run = fit(Plain(), train := loader(50), RiskMonitor(targets=lambda batch: batch.pop().sub_(0)))
    assert torch.equal(train.dataset.tensors[1], before) and run.callback_metrics["val_risk_estimate"] > 0


def test_a_targets_function_that_fails_is_named_with_what_it_got() -> None:
    with pytest.raises(MisconfigurationException, match=r"`targets` failed on list of 2: .*IndexError"):
        fit(Plain(), loader(), RiskMonitor(targets=lambda batch: batch[2]))


def test_loaders_that_repeat_samples_are_refused() -> None:
    combined, model = CombinedLoader([loader(), loader(20)], "max_size_cycle"), Plain()
    model.training_step = lambda batch, batch_idx: Plain.training_step(model, of_one(batch), batch_idx)
    monitor = RiskMonitor(inputs=first_tensor, targets=lambda batch: of_one(batch)[1])
    with pytest.raises(MisconfigurationException, match="cannot estimate the risk: Training loaders .* repeat samples"):
        fit(model, combined, monitor)


# The weights from before training


def test_it_continues_where_training_resumes(tmp_path: Path) -> None:
    def run(max_epochs: int, **kwargs: Any) -> tuple[list[Any], Trainer]:
        seed_everything(0, verbose=False)
        model, history = Plain(), History()
        model.net[2].p = 0.0
        model.net[0].requires_grad_(False)
        return history.epochs, fit(model, loader(), RiskMonitor(), history, max_epochs=max_epochs, **kwargs)

    (whole, _), (_, first) = run(4), run(2)
    first.save_checkpoint(path := tmp_path / "two.ckpt")
    assert run(4, ckpt_path=path)[0] == whole[2:]
    saved = torch.load(path, weights_only=True)["RiskMonitor(prefix='val_')"]["initial_weights"]
    assert saved.keys() == {"net.3.weight", "net.3.bias"}  # no second copy of frozen weights


def test_a_fit_begins_with_the_weights_of_its_start_unless_its_trainer_resumes(tmp_path: Path) -> None:
    monitor, model = RiskMonitor(), Plain()

    def check(expected: dict[str, Tensor]) -> None:
        torch.testing.assert_close(monitor.initial.weights, expected, rtol=0, atol=0)

    first = copy_weights(model.state_dict())
    run = fit(model, loader(), monitor, max_epochs=1)
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    run.validate(model, loader(), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())
    check(first)
    for module in (model, Plain()):  # the next of k folds
        weights = copy_weights(module.state_dict())
        fit(module, loader(), monitor, max_epochs=1)
        check(weights)
    fit(Plain(), loader(), monitor, max_epochs=2, ckpt_path=path)
    check(first)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_what_has_no_estimate_is_an_error_before_the_first_step_if_it_is_followed(tmp_path: Path) -> None:
    fitted([], Plain(), max_epochs=1).save_checkpoint(path := tmp_path / "without.ckpt")
    match = "initial weights are unknown.*`initial_weights=`"
    other = cb.EarlyStopping("val_output_sensitivity", mode="max")
    with pytest.warns(UserWarning, match="cannot estimate the risk: .*" + match):
        run = fit(Plain(), loader(), RiskMonitor(), SensitivityMonitor(), other, ckpt_path=path)
    assert "val_output_sensitivity" in run.callback_metrics and run.callback_metrics.keys().isdisjoint(NAMES)
    with pytest.raises(MisconfigurationException, match=match):
        fit(model := Plain(), loader(), RiskMonitor(), cb.EarlyStopping("val_risk_estimate"), ckpt_path=path)
    assert model.trainer.global_step == 4


def test_a_monitor_of_another_prefix_takes_the_initial_weights_and_every_n_epochs_keeps_its_phase(
    tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")

    def measured(max_epochs: int, prefix: str, **kwargs: Any) -> tuple[list[int], Trainer]:
        monitor = RiskMonitor(prefix=prefix, every_n_epochs=3)
        epochs, watch = list[int](), cb.Callback()
        watch.on_validation_epoch_end = lambda run, _: epochs.append(run.current_epoch) if monitor.session else None
        run = fit(Plain(), loader(), monitor, watch, max_epochs=max_epochs, num_sanity_val_steps=0, **kwargs)
        assert monitor.fit_state.samples is None  # freed
        return epochs, run

    assert measured(7, "val_")[0] == [0, 3, 6]
    epochs, run = measured(2, "val_")
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    assert epochs == [0] and measured(7, "val_", ckpt_path=path)[0] == [3, 6]
    assert measured(3, "b_", ckpt_path=path)[0] == [2]
    assert "takes the initial weights that `RiskMonitor(prefix='val_')` saved" in caplog.text


def test_a_line_at_the_end_says_where_the_estimate_was_lowest(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor="val_risk_estimate", filename="{epoch}")
    history = History()
    fit(Plain(), loader(), RiskMonitor(), checkpoint, history, enable_checkpointing=True)
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    line = f"`val_risk_estimate` was lowest at epoch {values.index(min(values))} ({min(values):.3f})"
    assert line in caplog.text and f"The checkpoint is {checkpoint.best_model_path}." in caplog.text


@pytest.mark.parametrize("has_batch_norm", [True, False])
def test_the_variance_does_not_depend_on_the_size_of_validation_batches(has_batch_norm: bool) -> None:
    def variance(batch_size: int) -> Any:
        seed_everything(0, verbose=False)
        model = Classifier() if has_batch_norm else Plain()
        run = fitted([RiskMonitor()], model, loader(), unlabelled(64, batch_size, seed=1), max_epochs=1)
        return float(run.callback_metrics["val_risk_variance"])

    assert [variance(size) for size in (1, 2, 8)] == pytest.approx([variance(64)] * 3, rel=1e-5)


class Scaled(Plain):
    """Cosines, which only the loss scales."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.net(x.double()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(100 * self(batch[0]), batch[1])


class Inner(Plain):
    """A step that prepares its inputs, and calls the network in place of the module."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net((batch[0].double() - 0.5) / 0.3), batch[1])


class Sure(Plain):
    """Sure, and wrong: no Brier score is as high as its estimate."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * super().forward(x)


@pytest.mark.parametrize(("model", "match"), [
    (Scaled, "cannot be the cross-entropy of the measured outputs"),
    (Inner, "measures `forward`, which your training step does not call"),
    (Sure, "no Brier score is above 2"),
])  # fmt: skip
def test_what_may_not_be_what_the_step_trains_is_said_once(model: Any, match: str) -> None:
    with pytest.warns(UserWarning, match=match) as caught:
        fit(model(), loader(), RiskMonitor())
    assert sum(match.split()[-1] in str(each.message) for each in caught) == 1


def test_nan_weights_are_logged_as_nan_so_that_a_stopping_stops() -> None:
    def break_weights(model: Any) -> None:
        if model.current_epoch == 2:
            model.net[0].weight.data.fill_(math.nan)

    model, history = Plain(), History()
    model.on_train_epoch_end = lambda: None
    model.on_validation_start = lambda: break_weights(model)
    stopping = cb.EarlyStopping("val_risk_estimate", patience=9)
    with pytest.warns(UserWarning, match="gave nan or inf"):
        run = fit(model, loader(), RiskMonitor(), SensitivityMonitor(), stopping, history, max_epochs=9)
    assert run.current_epoch == 3 and math.isnan(run.callback_metrics["val_risk_estimate"])
    assert math.isnan(run.callback_metrics["val_output_sensitivity"]) and math.isfinite(
        history.epochs[1]["val_risk_estimate"]
    )


@pytest.mark.parametrize("name", ["task", "targets", "num_training_samples", "initial_weights", "prefix", "prog_bar"])
def test_arguments_are_checked_at_once(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"`{name}` should be .*, got"):
        RiskMonitor(**{name: 1.5})
