"""The risk estimate as RiskMonitor logs it, how many samples it counts, and that it never ends a run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch import callbacks as cb
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, one_hot
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.callbacks.plain_loop import HOLDOUT, NAMES, REFERENCE_NAMES, Plain, Truth, bce, fit
from tests.helpers import Classifier, History, Stream, first_tensor, fitted, inputs, labelled, loader, logged
from tests.helpers import unlabelled_loader as unlabelled

X, Y = labelled(50).tensors
CODES = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)


def changed(change: Any) -> Any:
    change(model := Plain())
    return model


def scale_late(model: Plain) -> None:
    model.on_train_start = lambda: model.net[0].weight.data.mul_(2)


def averaged_weights() -> list[cb.Callback]:
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # Lightning 2.6 and newer
    return [module.EMAWeightAveraging(decay=0.5)]


SCORED: dict[str, tuple[Tensor, Any]] = {  # labels and model, by task
    "multiclass, some without a label": (Y.where(torch.arange(50) % 5 > 0, -100), Plain),
    "multiclass, 8 bits": (Y.to(torch.uint8), lambda: Plain(loss=lambda y, t: cross_entropy(y, t.long()))),
    "multiclass, soft": (one_hot(Y, 4) * 0.9 + 0.025, Plain),
    "binary": (X[:, :1] > 0.5, lambda: Plain(1, bce)),
    "multilabel": ((X[:, :3] > 0.5).long(), lambda: Plain(3, bce)),
    "multiclass, batch norm": (Y, lambda: changed(lambda m: m.net.insert(1, nn.BatchNorm1d(16).double()))),
    "multiclass, frozen integers": (Y, lambda: changed(lambda m: m.register_parameter("codes", CODES))),
    "multiclass, averaged weights": (Y, Plain),
    "multiclass, weights that come as training starts": (Y, lambda: changed(scale_late)),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_terms_are_those_of_a_plain_loop(name: str) -> None:
    (y, make), task = SCORED[name], name.split(",")[0]
    averaging = averaged_weights() if "averaged" in name else []
    fit(make(), DataLoader(TensorDataset(X, y), 16), *averaging, RiskMonitor(task), truth := Truth(task))
    truth.check()
    assert all(epoch["val_risk_variance"] > 0 for epoch in truth.epochs)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_the_first_batches_of_a_fit_are_kept_once_and_scored_as_they_came() -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(), Writer()
    for _ in range(2):  # a second fit has samples and initial weights of its own
        fit(model, loader(shuffle=True), monitor, truth := Truth(), val_check_interval=2, max_epochs=2)
        truth.check()


def test_the_terms_without_a_sanity_check() -> None:
    fit(Plain(), loader(), RiskMonitor(), truth := Truth(), num_sanity_val_steps=0)
    truth.check()


def test_only_some_training_samples_are_scored_in_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.training.NUM_SAMPLES", 40)
    fit(Plain(), loader(120), RiskMonitor(), truth := Truth(max_batches=3))  # 48 of 120
    truth.check()


def risk(num_samples: int = 64, **kwargs: Any) -> dict[str, float]:
    seed_everything(0, verbose=False)
    val = unlabelled(num_samples, seed=1)
    return logged(fitted([RiskMonitor()], Classifier(0.0), loader(num_samples), val, **kwargs), "val_")


def test_precisions_give_nearly_the_same() -> None:
    expected = pytest.approx(risk(), rel=0.05, abs=0.02)
    assert [risk(precision=precision) for precision in ("bf16-mixed", "bf16-true", "64-true")] == [expected] * 3


def test_a_model_that_takes_no_more_samples_than_a_batch_has_is_measured_batch_by_batch() -> None:
    class Small(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 16:
                raise RuntimeError("too many samples")
            return super().forward(x)

    def values(kind: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        return logged(fitted(RiskMonitor(), kind(), val=DataLoader(HOLDOUT, 4)), "val_risk_")

    joint, single = values(Plain), values(Small)
    # Only twins are others.
    assert single == pytest.approx(joint | {name: single[name] for name in ("val_risk_variance", "val_risk_estimate")})
    assert 0 < single["val_risk_variance"] != joint["val_risk_variance"]


def test_training_samples_that_interact_are_measured_batch_by_batch() -> None:
    class Centred(Plain):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            return outputs - outputs.mean(0)

    class Expected(History):
        """The overconfidence of batches by themselves."""

        def __init__(self) -> None:
            super().__init__()
            self.values: list[float] = []

        @torch.no_grad()
        def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                p = torch.cat([pl_module(x) for x in X.split(16)]).softmax(1)
                value = float(((p - one_hot(Y, 4)).square().sum(1) - 1 + p.square().sum(1)).mean())
                self.values.append(value if value > 0 else value / 2)

    fitted([RiskMonitor(), expected := Expected()], Centred(), val=DataLoader(HOLDOUT, 16))
    found = [epoch["val_risk_overconfidence"] for epoch in expected.epochs]
    assert found == pytest.approx(expected.values, rel=1e-5)


@pytest.mark.parametrize("has_batch_norm", [True, False])
def test_the_variance_does_not_depend_on_the_size_of_validation_batches(has_batch_norm: bool) -> None:
    def variance(batch_size: int) -> Any:
        seed_everything(0, verbose=False)
        model = Classifier() if has_batch_norm else Plain()
        run = fitted([RiskMonitor()], model, loader(), unlabelled(64, batch_size, seed=1), max_epochs=1)
        return float(run.callback_metrics["val_risk_variance"])

    assert [variance(size) for size in (1, 8)] == pytest.approx([variance(64)] * 2, rel=1e-5)


def test_each_of_several_loaders_has_an_estimate_under_lightnings_names() -> None:
    def values(loaders: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        model = changed(lambda model: setattr(model.net[2], "p", 0.0))  # each loader draws a random number
        return logged(fitted(RiskMonitor(), model, val=loaders), "val_risk_")

    first, second = unlabelled(48, seed=1), unlabelled(32, seed=2)
    both, alone = values([first, second]), values(first)
    expected = {f"{name}/dataloader_idx_0": value for name, value in alone.items()}
    assert expected == {name: pytest.approx(value) for name, value in both.items() if name.endswith("0")}
    assert {f"{name}/dataloader_idx_1" for name in alone} == both.keys() - expected.keys()


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
    assert history.epochs[0].keys() - {"train_loss"} == {*NAMES, *REFERENCE_NAMES}
    assert run.progress_bar_metrics.keys() & {*NAMES} == {"val_risk_estimate"}


def test_only_a_fit_has_an_estimate() -> None:
    run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[RiskMonitor()])
    run.validate(Plain(), loader(), verbose=False)
    assert run.callback_metrics.keys() == {"val_loss"}


@pytest.mark.parametrize("name", ["task", "targets", "features", "initial_weights", "num_training", "num_samples"])
def test_arguments_are_checked_at_once(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"`{name}` should be .*, got"):
        RiskMonitor(**{name: 1.5})


# What has no estimate is refused before the first step


def with_labels(labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(X, labels), 16)


class Dense(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., None].expand(-1, -1, 3)


class Sure(Plain):
    """Probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "labels above the classes": (Plain, lambda: with_labels(Y + 1), {}, "Expected labels from 0 to 3, .*`targets="),
    "one output": (lambda: Plain(1, bce), lambda: with_labels(Y % 2), {}, "task='binary'"),
    "several labels": (Plain, lambda: with_labels(one_hot(Y, 4)), {}, "task='multilabel'"),
    "class indices for multilabel": (Plain, loader, {"task": "multilabel"}, "Leave `task` out"),
    "dense outputs": (Dense, loader, {"outputs": lambda y: y}, "outputs are dense.*`SensitivityMonitor` works"),
    "probabilities": (Sure, loader, {}, "outputs are probabilities"),
    "no labels": (Plain, lambda: DataLoader(TensorDataset(X, Y, Y), 16), {}, "`targets=lambda batch: batch"),
    "targets that fail": (Plain, loader, {"targets": lambda b: b[2]}, r"`targets` failed on list of 2: .*IndexError"),
    "weights of another": (Plain, loader, {"initial_weights": {"other": X}}, "`initial_weights` should name"),
    "a stream": (Plain, lambda: DataLoader(Stream(has_labels=True), 16), {}, "unknown.*`num_training="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_estimate_is_refused_before_the_first_step(name: str) -> None:
    make, train, options, match = REFUSED[name]
    with pytest.raises(MisconfigurationException, match="^`RiskMonitor` .*" + match):
        fit(model := make(), train(), RiskMonitor(**options))
    assert model.trainer.global_step == 0


# How many training samples there are


def of_one(batch: Any) -> Any:
    """The batch of the first loader, of several."""
    return batch[0] if isinstance(batch[0], list) else batch


class Oversampling:
    """A batch sampler that draws each sample five times an epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.arange(250).remainder(50).view(-1, 10).tolist())

    def __len__(self) -> int:
        return 25


def dealt() -> DataLoader:
    return loader(sampler=DistributedSampler(labelled(50), 1, 0, shuffle=False))


COUNTED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "all": (loader, {}, 50),
    "limit_train_batches": (loader, {"limit_train_batches": 2}, 50),
    "DistributedSampler": (dealt, {"use_distributed_sampler": False}, 50),
    "SubsetRandomSampler": (lambda: loader(sampler=SubsetRandomSampler(range(20))), {}, 20),
    "with replacement": (lambda: loader(sampler=RandomSampler(X, True, 80)), {}, 50),
    "a batch sampler that repeats samples": (lambda: DataLoader(labelled(50), batch_sampler=Oversampling()), {}, 50),
    "items that are batches": (lambda: DataLoader([[X[:25], Y[:25]], [X[25:], Y[25:]]], None), {}, 50),
    "a labelled share": (lambda: with_labels(Y.where(torch.arange(50) % 5 > 0, -100)), {}, 40),
}


@pytest.mark.parametrize("name", COUNTED)
def test_different_training_samples_are_counted(name: str) -> None:
    make, options, expected = COUNTED[name]
    fit(Plain(), make(), monitor := RiskMonitor(), max_epochs=1, **options)
    assert monitor.fit_state.num_training == expected


GIVEN: dict[str, Any] = {
    "a stream": lambda: DataLoader(Stream(has_labels=True), 16),
    "an endless stream": lambda: DataLoader(Endless(has_labels=True), 16),
    "several loaders": lambda: CombinedLoader([loader(), loader(20)], "max_size_cycle"),
    "a loader of one's own": lambda: Own(),
}


class Endless(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


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

    assert run(700).fit_state.num_training == 700
    with pytest.raises(MisconfigurationException, match="the number of different training samples is unknown"):
        run(None)


class Sizes(cb.Callback):
    """n and w at each validation."""

    def __init__(self, monitor: RiskMonitor) -> None:
        self.monitor, self.seen = monitor, list[Any]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append((self.monitor.fit_state.num_training, self.monitor.fit_state.num_weights))


def test_n_and_w_are_fixed_at_the_first_validation_also_if_layers_are_unfrozen_later() -> None:
    model, history = Plain(), History()
    model.net[0].requires_grad_(False)
    model.on_train_epoch_start = lambda: model.net[0].requires_grad_(model.current_epoch > 0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.net[3].parameters(), 0.0)
    sizes = Sizes(monitor := RiskMonitor(initial_weights={"net.3.weight": model.net[3].weight.detach() / 2}))
    options = {"limit_train_batches": 3, "val_check_interval": 1, "max_epochs": 2}
    with pytest.warns(UserWarning, match="no initial weights for"):
        fit(model, loader(shuffle=True), monitor, sizes, history, **options)
    assert len(sizes.seen) == 6 and {*sizes.seen} == {(50, 16 * 4 + 4)}


# Nothing ends a run


def learning_rates(start: float) -> Any:
    """Learning rates that begin at 0: the first epoch moves nothing."""

    class Warm(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: start + float(epoch > 0))]

    return Warm()


class DomainNorm(nn.BatchNorm1d):
    """A batch norm that reads its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)


STILL: dict[str, tuple[Any, dict[str, Any]]] = {
    "a learning rate of 0 at first": (lambda: learning_rates(0.0), {}),
    "steps that come after the first validation": (Plain, {"accumulate_grad_batches": 8, "val_check_interval": 2}),
    "bf16, tiny steps": (lambda: tiny(Classifier()), {"precision": "bf16-mixed"}),
    "a batch norm of one's own": (lambda: changed(lambda m: m.net.insert(1, DomainNorm(16).double())), {}),
}


def tiny(model: Any) -> Any:
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 1e-7)
    return model


@pytest.mark.parametrize("name", STILL)
def test_early_stopping_goes_on_with(name: str) -> None:
    make, options = STILL[name]
    stopping, history = cb.EarlyStopping("val_risk_estimate", patience=99), History()
    run = fit(make(), loader(), RiskMonitor(), stopping, history, max_epochs=4, **options)
    assert run.current_epoch == 4 and not run.should_stop
    assert all(math.isfinite(value) for epoch in history.epochs for value in epoch.values())
    if "own" not in name and "tiny" not in name:
        assert history.epochs[0]["val_risk_variance"] == 0  # it has not moved


def said(caught: Any) -> list[str]:
    """What monitors have warned of."""
    return [str(each.message) for each in caught if "Monitor`" in str(each.message)]


def broken_in(*epochs: int) -> Plain:
    """A model whose outputs are nan in the validations of some epochs, the sanity check aside."""
    model = Plain()

    def forward(x: Tensor) -> Tensor:
        trainer = model.trainer
        is_now = trainer.validating and not trainer.sanity_checking and trainer.current_epoch in epochs
        return Plain.forward(model, x) * (math.nan if is_now else 1.0)

    model.forward = forward
    model.validation_step = lambda batch, batch_idx: None
    return model


def test_a_first_value_that_is_missing_is_logged_as_the_worst_score_and_later_ones_are_gaps() -> None:
    stopping, history = cb.EarlyStopping("val_risk_estimate", patience=99), History()
    with pytest.warns(UserWarning) as caught:
        run = fit(broken_in(0, 1, 3), loader(), RiskMonitor(), stopping, history, max_epochs=5)
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    assert run.current_epoch == 5 and values[:2] == [2.0, 2.0] and values[2] == values[3] != values[4] < 2
    assert history.epochs[0].keys() == {"val_risk_estimate"}
    messages = said(caught)
    assert len(messages) == 2
    assert "gave nan or inf" in messages[0] and "logs the worst possible score" in messages[1]


def test_nan_weights_leave_the_last_value_and_cost_a_stopping_its_patience() -> None:
    def break_weights() -> None:
        if model.current_epoch == 2:
            model.net[0].weight.data.fill_(math.nan)

    model, history = Plain(), History()
    model.on_validation_start = break_weights
    stopping = cb.EarlyStopping("val_risk_estimate", patience=2)
    with pytest.warns(UserWarning) as caught:
        run = fit(model, loader(), RiskMonitor(), SensitivityMonitor(), stopping, history, max_epochs=9)
    assert sum("gave nan or inf" in message for message in said(caught)) == 2
    assert run.current_epoch == 4  # two validations after the last value
    assert history.epochs[1]["val_risk_estimate"] == history.epochs[-1]["val_risk_estimate"]


def test_an_estimate_above_every_brier_score_is_said_once() -> None:
    model = Plain()
    model.forward = lambda x: 1e3 * Plain.forward(model, x)
    with pytest.warns(UserWarning, match="no Brier score is above 2") as caught:
        fit(model, with_labels(Y.flip(0)), RiskMonitor())
    assert len(said(caught)) == 1


def test_a_pass_that_fails_in_a_validation_costs_its_value_and_training_goes_on() -> None:
    model, history = Plain(), History()

    def forward(x: Tensor) -> Tensor:
        if model.trainer.validating and not model.trainer.sanity_checking and model.current_epoch == 1:
            raise RuntimeError("out of luck")
        return Plain.forward(model, x)

    model.forward, model.validation_step = forward, lambda batch, batch_idx: None
    with pytest.warns(UserWarning, match="could not measure the samples of dataloader 0: RuntimeError: out of luck"):
        run = fit(model, loader(), RiskMonitor(), history)
    assert run.current_epoch == 3
    assert history.epochs[0] == history.epochs[1] != history.epochs[2]


def test_a_first_value_that_is_missing_is_replaced_on_each_loader_by_itself() -> None:
    class Half(Plain):
        def forward(self, x: Tensor) -> Tensor:
            is_first = not self.training and not self.trainer.sanity_checking and self.current_epoch == 0
            is_second_loader = len(x) > 1 and bool((x[0] == second[0]).all())
            return super().forward(x) * (math.nan if is_first and is_second_loader else 1.0)

    second, history = inputs(16, seed=7), History()
    with pytest.warns(UserWarning) as caught:
        vals = [unlabelled(16, seed=6), unlabelled(16, seed=7)]
        fitted([RiskMonitor(), history], Half(), val=vals)
    values = [[epoch[f"val_risk_estimate/dataloader_idx_{index}"] for epoch in history.epochs] for index in (0, 1)]
    assert values[1][0] == 2.0 and values[1][1] < 2 and max(values[0]) < 2
    assert sum("has no first value" in message for message in said(caught)) == 1
