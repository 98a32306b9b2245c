"""The risk estimate as RiskMonitor logs it; what its terms are is tested with ``functional.risk``."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.risk import _MIN_TWINS, _STRENGTH
from lightning_sensitivity.functional import risk_estimate
from lightning_sensitivity.model import noise_generator
from lightning_sensitivity.model.twins import batch_statistics, initial_weights, twin
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    History,
    Linear,
    inputs,
    labelled,
    loader,
    trainer,
    unlabelled_loader,
    validated,
)

HOLDOUT = inputs(50, seed=1)  # in four batches: two twins each
NAMES = RiskMonitor.names
TERMS = {"val_" + name for name in NAMES}


class Plain(Classifier):
    """Without batch norm; in 64 bits, in which sums in another order are the same to nine digits."""

    def __init__(self, num_outputs: int = NUM_CLASSES, loss: Any = cross_entropy) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs))
        self.loss = loss
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[-1].weight))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def as_float(loss: Any) -> Any:
    return lambda outputs, targets: loss(outputs, targets.to(outputs).reshape(outputs.shape))


class Truth(Callback):
    """What a plain loop gives at each validation, by twins of the initial weights: those given, or the first ones."""

    def __init__(
        self,
        num_batches: int = 4,
        task: str = "multiclass",
        initial: dict[str, Tensor] | None = None,
        num_training: int = 50,
    ) -> None:
        self.num_batches, self.task, self.initial, self.num_training = num_batches, task, initial, num_training
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.terms: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial = self.initial or initial_weights(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self.batches) < self.num_batches:
            self.batches.append([part.clone() for part in batch])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.terms.append(self.estimate(copy.deepcopy(pl_module).eval()))

    @torch.no_grad()
    def estimate(self, model: LightningModule) -> Any:
        x, y = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        outputs, normalized, of_twins, train = [], [], [], model(x)
        num_twins = math.ceil(_MIN_TWINS / 4)
        for batch_idx, part in enumerate(HOLDOUT.split(16)):
            outputs += num_twins * [model(part)]
            for draw in range(num_twins):
                generator = noise_generator(0, 0, 0, batch_idx, -1 - draw)
                with batch_statistics(model):
                    normalized.append(model(part))
                    with twin(model, self.initial, generator, _STRENGTH):
                        of_twins.append(model(part))
        terms, by_batch = (
            risk_estimate(torch.cat(each), torch.cat(of_twins), train, y, self.task, _STRENGTH, self.num_training)
            for each in (outputs, normalized)
        )
        return terms._replace(variance=by_batch.variance)  # of batch norm: that of each batch, in both


def check(truth: Truth, rel: float = 1e-9, has_batch_norm: bool = False) -> None:
    assert truth.logged
    for logged, terms in zip(truth.logged, truth.terms, strict=True):
        found = [logged["val_" + name] for name in NAMES]
        assert found[has_batch_norm:] == pytest.approx([float(term) for term in terms[has_batch_norm:]], rel=rel)
        assert found[-1] > 0


def fit(
    model: LightningModule, monitor: RiskMonitor, truth: Any, train: Any, *more: Callback, **kwargs: Any
) -> Trainer:
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [each for each in (*more, monitor, truth) if each is not None]
    run = trainer(callbacks=callbacks, **{"max_epochs": 3, **kwargs})
    run.fit(model, train, DataLoader(HOLDOUT, 16), ckpt_path=ckpt_path)
    return run


X, Y = labelled(50).tensors
TASKS: dict[str, tuple[Any, Any, Tensor]] = {
    "multiclass": ("auto", Plain, Y.where(torch.arange(50) % 5 > 0, -100)),
    "multiclass, 8 bits": ("auto", lambda: Plain(loss=lambda y, t: cross_entropy(y, t.long())), Y.to(torch.uint8)),
    "multiclass, soft": ("multiclass", Plain, nn.functional.one_hot(Y, 4) * 0.9 + 0.025),
    "binary": ("auto", lambda: Plain(1, as_float(binary_cross_entropy_with_logits)), X[:, :1] > 0.5),
    "multilabel": ("auto", lambda: Plain(3, as_float(binary_cross_entropy_with_logits)), (X[:, :3] > 0.5).long()),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_terms_are_those_of_a_plain_loop(name: str) -> None:
    task, model, targets = TASKS[name]
    truth = Truth(task=name.split(",")[0])
    fit(model(), RiskMonitor(task), truth, DataLoader(TensorDataset(X, targets), 16))
    check(truth)
    assert len({logged["val_risk_estimate"] for logged in truth.logged}) == 3


def test_of_batch_norm_twins_are_normalized_by_the_batch() -> None:
    model, truth = Plain(), Truth()
    model.net.insert(1, nn.BatchNorm1d(16).double())
    fit(model, RiskMonitor(), truth, loader())
    check(truth, has_batch_norm=True)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize(("num_samples", "num_batches"), [(32, 2), (33, 3), (120, 4)])
def test_the_first_batches_of_a_fit_are_kept_once_and_scored_as_they_came(num_samples: int, num_batches: int) -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(num_training_samples=num_samples), Writer()
    for _ in range(2):  # a second fit has samples of its own, and the weights from before the first
        truth = Truth(num_batches, initial=None if monitor._initial.weights is None else dict(monitor._initial.weights))
        fit(model, monitor, truth, loader(shuffle=True), val_check_interval=2)
        check(truth)
        assert monitor._samples is None


def test_every_loader_gets_its_own() -> None:
    truth = Truth()
    run = trainer(callbacks=[RiskMonitor(), truth], max_epochs=1)
    run.fit(Plain(), loader(), [DataLoader(HOLDOUT, 16), loader(seed=2)])
    (values,), (terms,) = truth.logged, truth.terms
    found = [[values[f"val_{name}/dataloader_idx_{idx}"] for name in NAMES] for idx in (0, 1)]
    assert found[0] == pytest.approx([float(term) for term in terms], rel=1e-9)
    assert found[0][2] == found[1][2]  # the same training samples
    assert all(found[0][term] != found[1][term] for term in (0, 1, 3))


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="needs lightning 2.6")
def test_averaged_weights_are_what_is_scored() -> None:
    class Scores(Truth):
        """Looks while they are in place."""

        def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.found = self.estimate(copy.deepcopy(pl_module).eval()) if self.batches else None

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            self.terms[-1:] = [self.found] * len(self.logged)

    averaging = callbacks.WeightAveraging(avg_fn=lambda average, weight, count: average + 0.1 * (weight - average))
    fit(Plain(), RiskMonitor(), truth := Scores(4), loader(), averaging, max_epochs=1)
    check(truth)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    def risk(precision: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        run = trainer(callbacks=[RiskMonitor()], precision=precision)
        run.fit(Plain().float(), loader(200), unlabelled_loader(200, seed=1))
        return {name: float(run.callback_metrics[name]) for name in TERMS}

    assert risk(precision) == pytest.approx(risk("32-true"), rel=0.05, abs=0.01)


# Who follows it


def test_early_stopping_and_checkpoints_follow_it(tmp_path: Path) -> None:
    class Unlabelled(Classifier):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert isinstance(batch, Tensor)

    seed_everything(0, verbose=False)
    history, stopping = History(), EarlyStopping("val_risk_estimate", patience=3)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_risk_estimate", filename="{epoch}")
    run = trainer(callbacks=[stopping, checkpoint, RiskMonitor(), history], enable_checkpointing=True, max_epochs=200)
    x, y = labelled(50).tensors
    y[::4] = 0  # it learns, and then must memorize
    run.fit(Unlabelled(), DataLoader(TensorDataset(x, y), 16), unlabelled_loader(seed=1))
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    best = values.index(min(values))
    assert best > 0 and len(values) == best + 4 < 200
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    assert set(history.epochs[0]) - {"train_loss"} == TERMS


def test_the_estimate_alone_is_on_the_progress_bar_if_asked_for() -> None:
    run = fit(Plain(), RiskMonitor(prog_bar=True), None, loader(), max_epochs=1)
    assert [name for name in run.progress_bar_metrics if "risk" in name] == ["val_risk_estimate"]


# How many training samples there are


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(labelled(50))


def two_loaders() -> CombinedLoader:
    return CombinedLoader({"unlabelled": unlabelled_loader(), "labelled": loader()}, "min_size")


COUNTED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "all": (loader, {}, 50),
    "limit_train_batches": (loader, {"limit_train_batches": 2}, 32),
    "a share": (loader, {"limit_train_batches": 0.25}, 16),
    "drop_last": (lambda: loader(drop_last=True), {}, 48),
    "SubsetRandomSampler": (lambda: loader(sampler=SubsetRandomSampler(range(20))), {}, 20),
    "CombinedLoader": (two_loaders, {}, 50),
    "a stream": (lambda: DataLoader(Stream(), 16), {}, 50),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_samples_of_an_epoch_are_counted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Either(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(labelled_part(batch), batch_idx)

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counts.append(monitor._samples.num_in_epoch)

    def labelled_part(batch: Any) -> Any:
        return batch["labelled"] if isinstance(batch, dict) else batch

    def image(batch: Any) -> Tensor:
        return labelled_part(batch)[0] if isinstance(batch, dict | list) else batch

    (make, options, num_training), counts = COUNTED[name], list[int]()
    monitor = RiskMonitor(inputs=image, targets=lambda batch: labelled_part(batch)[1])
    with caplog.at_level(logging.INFO):
        fit(Either(), monitor, None, make(), Watch(), max_epochs=2, **options)
    assert counts == [num_training] * 2
    said = "a stream of" if name == "a stream" else str(num_training)
    assert f"`RiskMonitor` (val_*): {said} training samples" in caplog.text


def test_the_variance_knows_the_number_of_samples() -> None:
    fit(Plain(), RiskMonitor(), truth := Truth(num_batches=5, num_training=1000), loader(1000, 100))
    check(truth)


# The weights from before training


def test_it_goes_on_where_training_resumes(tmp_path: Path) -> None:
    def run(max_epochs: int, **kwargs: Any) -> tuple[Truth, Trainer]:
        seed_everything(0, verbose=False)
        model, truth = Plain(), Truth()
        model.net[2].p = 0.0
        model.net[0].requires_grad_(False)
        return truth, fit(model, RiskMonitor(), truth, loader(), max_epochs=max_epochs, **kwargs)

    whole, _ = run(4)
    _, first = run(2)
    first.save_checkpoint(path := tmp_path / "two.ckpt")
    resumed, _ = run(4, ckpt_path=path)
    assert [{name: row[name] for name in TERMS} for row in whole.logged[2:]] == [
        {name: row[name] for name in TERMS} for row in resumed.logged
    ]
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == whole.initial.keys()
    # No second copy of frozen weights.
    changed = {name: weight for name, weight in whole.initial.items() if "net.0" not in name}
    torch.testing.assert_close(dict(saved["RiskMonitor(prefix='val_')"]), changed, rtol=0, atol=0)

    seed_everything(0, verbose=False)  # or given
    model = Plain()
    model.load_state_dict(saved["state_dict"])
    truth = Truth(initial=whole.initial)
    fit(model, RiskMonitor(initial_weights=dict(whole.initial)), truth, loader(), max_epochs=1)
    check(truth)


@pytest.mark.parametrize("between", ["nothing", "validate", "a checkpoint", "a reset in place"])
def test_a_fresh_trainer_goes_on_with_the_module_and_begins_with_another(between: str, tmp_path: Path) -> None:
    monitor, model, other = RiskMonitor(), Plain(), Plain()
    untrained, of_other = initial_weights(model), initial_weights(other)
    run = fit(model, monitor, None, loader(), max_epochs=1)
    run.save_checkpoint(tmp_path / "one.ckpt")
    if between in ("validate", "a checkpoint"):
        path = tmp_path / "one.ckpt" if between == "a checkpoint" else None
        trainer(callbacks=[monitor]).validate(model, loader(), ckpt_path=path, verbose=False)
    fits = [(model, untrained), (other, of_other)]
    if between == "a reset in place":  # as in cross-validation
        model.load_state_dict(of_other)
        fits = [(model, of_other)]
    for module, weights in fits if between != "a checkpoint" else fits[1:]:
        fit(module, monitor, None, loader(), max_epochs=1)
        torch.testing.assert_close(monitor._initial.weights, weights, rtol=0, atol=0)


def test_weights_that_the_module_loads_as_training_starts_are_those_from_before() -> None:
    class Loading(Plain):
        def on_train_start(self) -> None:
            self.load_state_dict(other)

    other = initial_weights(Plain())
    fit(Loading(), RiskMonitor(), truth := Truth(initial=other), loader())
    check(truth)


def test_frozen_weights_of_integers_are_left_alone() -> None:
    model = Plain()
    model.net.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    fit(model, RiskMonitor(), truth := Truth(), loader())  # no warning
    check(truth)


class Cached(nn.Linear):
    """It keeps the weights that it computes until training goes on."""

    effective: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.effective = None
        elif self.effective is None:
            self.effective = self.weight.detach() / 2
        return nn.functional.linear(x, self.weight / 2 if self.training else self.effective)


class CachedFrom(Cached):
    """The same, kept in a list that is too long to be copied."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.effective_of: list[Any] = [None] * 2000

    effective = property(
        lambda self: self.effective_of[0], lambda self, value: self.effective_of.__setitem__(0, value)
    )


@pytest.mark.parametrize("layer", [Cached, CachedFrom])
def test_of_layers_that_keep_the_weights_that_they_compute_there_is_no_estimate(layer: Any) -> None:
    class Caching(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(layer(NUM_FEATURES, NUM_CLASSES, dtype=torch.float64))

    with pytest.warns(UserWarning, match="Twins give the outputs of the model") as caught:
        run = fit(Caching(), RiskMonitor(), None, loader())
    assert len([each for each in caught if each.category is UserWarning]) == 1
    assert all(math.isnan(run.callback_metrics[name]) for name in TERMS)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resuming_without_the_weights_from_before_training(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Plain(), loader(), loader())
    first.save_checkpoint(path := tmp_path / "without.ckpt")
    match = "needs the weights from before training, which the checkpoint lacks.*`initial_weights=`"
    with pytest.warns(UserWarning, match="can give no estimate: .*" + match):
        run = fit(Plain(), RiskMonitor(), None, loader(), SensitivityMonitor(), ckpt_path=path)
    assert "val_sensitivity" in run.callback_metrics and not TERMS & run.callback_metrics.keys()
    with pytest.raises(MisconfigurationException, match=match):
        fit(Plain(), RiskMonitor(), None, loader(), EarlyStopping("val_risk_estimate"), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_weights_are_those_that_the_sanity_check_has_made() -> None:
    model = Plain()
    model.net[0] = nn.LazyLinear(16, dtype=torch.float64)
    fit(model, RiskMonitor(), truth := Truth(), loader())
    check(truth)


# What it costs


def test_the_device_holds_no_copy_of_the_weights_while_training() -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert not monitor._weights and monitor._training is None

    monitor = RiskMonitor()
    fit(Plain(), monitor, None, loader(), Watch())


# Labels and tasks


class Unused(Plain):
    """Trains without the labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0]).square().mean()


LABELS = torch.zeros(20).long()


@pytest.mark.parametrize("is_followed", [True, False])
@pytest.mark.parametrize(("options", "batch", "match"), [
    ({}, inputs(20), "Say where the labels are.*`targets=.*got a tensor"),
    ({}, (inputs(20), inputs(20)[:, :4]), "Labels are floating. Say `task='binary'` or"),
    ({}, (inputs(20), LABELS, LABELS), "such as `targets=1`"),
    ({"outputs": lambda y: y[..., None].expand(-1, -1, 3)}, (inputs(20), LABELS[:, None].expand(-1, 3)), "dense"),
])  # fmt: skip
def test_labels_that_can_not_be_told(options: dict[str, Any], batch: Any, match: str, is_followed: bool) -> None:
    train = DataLoader(TensorDataset(*batch) if isinstance(batch, tuple) else batch, 10)
    model = Unused()
    if is_followed:
        with pytest.raises(MisconfigurationException, match=match):
            fit(model, RiskMonitor(**options), None, train, EarlyStopping("val_risk_estimate"))
        assert model.trainer.global_step == 0
    else:
        with pytest.warns(UserWarning, match=f"can give no estimate: .*{match}") as caught:
            run = fit(model, RiskMonitor(**options), None, train, max_epochs=1)
        assert not TERMS & run.callback_metrics.keys()
        assert {each.filename for each in caught if each.category is UserWarning} == {__file__}


@pytest.mark.parametrize("name", ["val_risk_score", "val_risk_estimates"])
def test_only_our_own_names_make_labels_required(name: str) -> None:
    class Own(Unused):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(name, self(batch).square().mean())

    with pytest.warns(UserWarning, match="can give no estimate"):
        fit(Own(), RiskMonitor(), None, unlabelled_loader(), EarlyStopping(name), max_epochs=1)


def test_sigmoid_outputs_are_warned_of() -> None:
    data, model = TensorDataset(inputs(48), inputs(48)[:, :1] > 0.5), Plain(1, as_float(nn.BCELoss()))
    model.net.append(nn.Sigmoid())
    model.forward = lambda x: model.net(x.double())
    with pytest.warns(UserWarning, match=r"All outputs lie in \[0, 1\].*use logits"):
        fit(model, RiskMonitor(), None, DataLoader(data, 16), max_epochs=1)


class Graph:
    """A batch that is moved in place, as of torch_geometric."""

    def __init__(self, items: list[Any]) -> None:
        (self.x, self.kind), self.num_moves = (torch.stack(parts) for parts in zip(*items, strict=True)), 0

    def to(self, device: Any, **_: Any) -> Graph:
        self.num_moves += 1
        return self

    def __iter__(self) -> Iterator[Tensor]:
        assert self.num_moves == 1  # by Lightning
        return iter((self.x, self.kind))


def test_batches_that_are_objects_are_kept_as_they_were() -> None:
    class OfGraphs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return cross_entropy(self(x.mul_(0.5)), y)

        validation_step = Linear.validation_step

    values = []
    for options in ({"collate_fn": Graph}, {}):
        seed_everything(0, verbose=False)
        chosen = {"inputs": lambda batch: batch.x, "targets": lambda batch: batch.kind} if options else {}
        run = trainer(callbacks=[RiskMonitor(task="multiclass", **chosen)])
        run.fit(OfGraphs(), loader(**options), loader(**options))
        values.append({name: float(run.callback_metrics[name]) for name in TERMS})
    assert values[0] == values[1]


# When it is logged


def test_without_training_it_is_not_logged_even_after_a_fit_that_failed() -> None:
    class Failing(Plain):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("out of luck")

    monitor, model = RiskMonitor(), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(model, monitor, None, loader())
    assert validated(monitor, model, loader()).keys() == {"val_loss"}
    (values,) = trainer(callbacks=[monitor]).test(model, loader(), verbose=False)
    assert values.keys() == {"test_loss"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("task", "classification"), ("targets", 1.5), ("num_training_samples", 0), ("initial_weights", 3), ("prefix", 3)],
)
def test_arguments_are_checked_at_once(name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"`{name}` should be .*, got"):
        RiskMonitor(**{name: value})
