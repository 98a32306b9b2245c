"""The risk estimate as RiskMonitor logs it; what its terms are is tested with ``functional.risk``."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.risk import _MIN_TWINS, _STRENGTH
from lightning_sensitivity.functional import risk_estimate, variance_factor
from lightning_sensitivity.model import noise_generator
from lightning_sensitivity.model.twins import batch_statistics, copy_weights, twin
from tests.helpers import Classifier, History, Stream, inputs, labelled, loader, trainer, unlabelled_loader

HOLDOUT = inputs(50, seed=1)  # in four batches: two twins each
NAMES = RiskMonitor.names
TERMS = {"val_" + name for name in NAMES}


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


def as_float(loss: Any) -> Any:
    return lambda outputs, targets: loss(outputs, targets.to(outputs).reshape(outputs.shape))


class Truth(Callback):
    """What a plain loop gives at each validation, by twins of the initial weights: those given, or the first ones."""

    def __init__(self, num_batches: int = 4, task: str = "multiclass", initial: Any = None) -> None:
        self.num_batches, self.task, self.initial = num_batches, task, initial
        self.num_training = self.num_seen = 0
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.terms: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial = self.initial or copy_weights(pl_module.state_dict())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        labels = batch[-1].reshape(len(batch[-1]), -1)
        self.num_seen = (batch_idx > 0) * self.num_seen + int((labels != -100).any(1).sum())
        self.num_training = max(self.num_training, self.num_seen)
        if len(self.batches) < self.num_batches:
            self.batches.append([part.clone() for part in batch])

    @torch.no_grad()
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or batch_idx or dataloader_idx:
            return
        model, (x, y) = copy.deepcopy(pl_module), (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        outputs, normalized, of_twins, num_twins = [], [], [], math.ceil(_MIN_TWINS / 4)
        for index, part in enumerate(HOLDOUT.split(16)):
            outputs += num_twins * [model(part)]
            for draw in range(num_twins):
                with batch_statistics(model):
                    normalized.append(model(part))
                    with twin(model, self.initial, noise_generator(0, 0, 0, index, -1 - draw), _STRENGTH):
                        of_twins.append(model(part))
        factor = variance_factor(self.num_training, sum(p.numel() for p in model.parameters() if p.requires_grad))
        terms, by_batch = (
            risk_estimate(torch.cat(each), torch.cat(of_twins), model(x), y, self.task, _STRENGTH, factor)
            for each in (outputs, normalized)
        )
        self.terms.append(terms._replace(variance=by_batch.variance))  # of batch norm: that of each batch, in both

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def check(self, has_batch_norm: bool = False) -> None:
        assert self.logged
        for logged, terms in zip(self.logged, self.terms, strict=True):
            values = [logged[f"val_{name}"] for name in NAMES[has_batch_norm:]]
            assert values == pytest.approx([float(term) for term in terms[has_batch_norm:]], rel=1e-9)
            assert values[-1] > 0


def fit(model: Any, monitor: RiskMonitor, truth: Any, train: Any, *more: Callback, **kwargs: Any) -> Trainer:
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [each for each in (*more, monitor, truth) if each is not None]
    run = trainer(callbacks=callbacks, **{"max_epochs": 3, **kwargs})
    run.fit(model, train, DataLoader(HOLDOUT, 16), ckpt_path=ckpt_path)
    return run


X, Y = labelled(50).tensors
TASKS: dict[str, tuple[str, Any, Tensor]] = {
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
    truth.check()
    assert len({logged["val_risk_estimate"] for logged in truth.logged}) == 3


def test_of_batch_norm_twins_are_normalized_by_the_batch() -> None:
    model, truth = Plain(), Truth()
    model.net.insert(1, nn.BatchNorm1d(16).double())
    fit(model, RiskMonitor(), truth, loader())
    truth.check(has_batch_norm=True)


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
        truth = Truth(num_batches)
        fit(model, monitor, truth, loader(shuffle=True), val_check_interval=2)
        truth.check()


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="needs lightning 2.6")
def test_averaged_weights_are_what_is_scored() -> None:
    averaging = callbacks.WeightAveraging(avg_fn=lambda average, weight, count: average + 0.1 * (weight - average))
    fit(Plain(), RiskMonitor(), truth := Truth(), loader(), averaging)
    truth.check()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    def risk(precision: Any) -> dict[str, float]:
        seed_everything(0, verbose=False)
        run = trainer(callbacks=[RiskMonitor()], precision=precision)
        run.fit(Classifier(0.0), loader(200), unlabelled_loader(200, seed=1))
        return {name: float(run.callback_metrics[name]) for name in TERMS}

    assert risk(precision) == pytest.approx(risk("32-true"), rel=0.05, abs=0.01)


def test_early_stopping_and_checkpoints_follow_it_and_the_progress_bar_shows_it(tmp_path: Path) -> None:
    history, stopping = History(), EarlyStopping("val_risk_estimate", patience=3)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_risk_estimate", filename="{epoch}")
    monitor, labels = RiskMonitor(prog_bar=True), Y.clone()
    run = trainer(callbacks=[stopping, checkpoint, monitor, history], enable_checkpointing=True, max_epochs=200)
    labels[::4] = 0  # it learns, and then must memorize
    run.fit(Classifier(), DataLoader(TensorDataset(X, labels), 16), unlabelled_loader(seed=1))
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    best = values.index(min(values))
    assert best > 0 and len(values) == best + 4 < 200
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    assert set(history.epochs[0]) - {"train_loss"} == TERMS
    assert TERMS & run.progress_bar_metrics.keys() == {"val_risk_estimate"}


# How many training samples there are


def of_one(batch: Any) -> Any:
    """The batch of the first loader, of several."""
    return batch[0] if isinstance(batch[0], list) else batch


COUNTED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "all": (loader, {}, 50),
    "limit_train_batches": (loader, {"limit_train_batches": 2}, 32),
    "drop_last": (lambda: loader(drop_last=True), {}, 48),
    "with replacement": (lambda: loader(sampler=RandomSampler(X, True, 80)), {}, 50),
    "batches of batches": (lambda: DataLoader([[X, Y]], 1, collate_fn=lambda x: x[0]), {}, 50),
    "no batch sampler": (lambda: DataLoader([[X, Y]], None), {}, 50),
    "SubsetRandomSampler": (lambda: loader(sampler=SubsetRandomSampler(range(20))), {}, 20),
    "CombinedLoader": (lambda: CombinedLoader([loader(), loader()], "min_size"), {}, 50),
    "a stream": (lambda: DataLoader(Stream(has_labels=True), 16), {}, 50),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_samples_of_an_epoch_are_counted(name: str) -> None:
    class Either(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(of_one(batch), batch_idx)

    make, options, expected = COUNTED[name]
    monitor = RiskMonitor(inputs=lambda x: x if isinstance(x, Tensor) else of_one(x)[0], targets=lambda x: of_one(x)[1])
    fit(Either(), monitor, None, make(), max_epochs=2, **options)
    assert monitor._num_training == expected


class Growing(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(16 if self.trainer.current_epoch == 0 else 50)

    def val_dataloader(self) -> Any:
        return DataLoader(HOLDOUT, 16)


def test_those_of_the_longest_epoch_count_also_where_training_resumes(tmp_path: Path) -> None:
    monitor = RiskMonitor()
    run = trainer(callbacks=[monitor], max_epochs=2, reload_dataloaders_every_n_epochs=1)
    run.fit(Plain(), datamodule=Growing())
    assert monitor._num_training == 50
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    fit(Plain(), resumed := RiskMonitor(), None, loader(), ckpt_path=path, limit_train_batches=1)
    assert resumed._num_training == 50


def test_the_variance_knows_how_many_there_are() -> None:
    fit(Plain(), RiskMonitor(), truth := Truth(num_batches=5), DataLoader(labelled(1000), 100))
    truth.check()


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
    rows, others = ([{name: row[name] for name in TERMS} for row in truth.logged[-2:]] for truth in (whole, resumed))
    assert rows == others and len(resumed.logged) == 2
    saved = torch.load(path, weights_only=True)
    ours = saved["RiskMonitor(prefix='val_')"]
    assert saved["state_dict"].keys() == whole.initial.keys()
    # No second copy of frozen weights.
    changed = {name: weight for name, weight in whole.initial.items() if "net.0" not in name}
    torch.testing.assert_close(dict(ours["initial_weights"]), changed, rtol=0, atol=0)


def test_a_fit_begins_with_the_weights_of_its_start_unless_its_trainer_goes_on(tmp_path: Path) -> None:
    monitor, model = RiskMonitor(), Plain()
    first = copy_weights(model.state_dict())
    run = fit(model, monitor, None, loader(), max_epochs=1)
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    run.validate(model, loader(), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())
    torch.testing.assert_close(monitor._initial.weights, first, rtol=0, atol=0)
    for module in (model, Plain()):  # the next of k folds
        weights = copy_weights(module.state_dict())
        fit(module, monitor, None, loader(), max_epochs=1)
        torch.testing.assert_close(monitor._initial.weights, weights, rtol=0, atol=0)
    fit(Plain(), monitor, None, loader(), max_epochs=2, ckpt_path=path)
    torch.testing.assert_close(monitor._initial.weights, first, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resuming_without_the_weights_from_before_training(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Plain(), loader(), loader())
    first.save_checkpoint(path := tmp_path / "without.ckpt")
    match = "initial weights are unknown.*`initial_weights=`"
    with pytest.warns(UserWarning, match="can give no estimate: .*" + match):
        run = fit(Plain(), RiskMonitor(), None, loader(), SensitivityMonitor(), ckpt_path=path)
    assert "val_sensitivity" in run.callback_metrics and not TERMS & run.callback_metrics.keys()
    with pytest.raises(MisconfigurationException, match=match):
        fit(Plain(), RiskMonitor(), None, loader(), EarlyStopping("val_risk_estimate"), ckpt_path=path)


@pytest.mark.parametrize("kind", ["loaded in on_train_start", "frozen integers"])
def test_weights_of_other_kinds(kind: str) -> None:
    model, truth = Plain(), Truth()
    if kind == "loaded in on_train_start":
        truth.initial = copy_weights(Plain().state_dict())
        model.on_train_start = lambda: model.load_state_dict(truth.initial)
        truth.on_train_end = lambda *_: delattr(model, "on_train_start")
    else:
        model.net.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    fit(model, RiskMonitor(), truth, loader())  # no warning
    truth.check()


def test_of_layers_that_keep_the_weights_that_they_compute_there_is_no_estimate() -> None:
    class Cached(nn.Linear):
        kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = None if self.training else self.weight.detach() / 2 if self.kept is None else self.kept
            return nn.functional.linear(x, self.weight / 2 if self.kept is None else self.kept)

    model = Plain()
    model.net = nn.Sequential(Cached(12, 4).double())  # which keeps them from the first step of a validation on
    model.validation_step = lambda batch, batch_idx: model(batch)
    with pytest.warns(UserWarning, match="twins give the outputs of the model") as caught:
        run = fit(model, RiskMonitor(), None, loader())
    assert len([each for each in caught if each.category is UserWarning]) == 1
    assert all(math.isnan(run.callback_metrics[name]) for name in TERMS)


# Labels and tasks


def of_square(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.square().mean()


LABELS = torch.zeros(20).long()


@pytest.mark.parametrize("is_followed", [True, False])
@pytest.mark.parametrize(("options", "batch", "match"), [
    ({}, [inputs(20)], "such as `targets=lambda"),
    ({}, [inputs(20), LABELS, LABELS], "such as `targets=lambda"),
    ({}, [inputs(20), inputs(20)[:, :4]], "Labels are floating. Set `task='binary'`, "),
    ({"outputs": lambda y: y[..., None].expand(-1, -1, 3)}, [inputs(20), LABELS[:, None].expand(-1, 3)], "dense"),
])  # fmt: skip
def test_labels_that_can_not_be_told(options: dict[str, Any], batch: Any, match: str, is_followed: bool) -> None:
    train, model, monitor = DataLoader(TensorDataset(*batch), 10), Plain(loss=of_square), RiskMonitor(**options)
    if is_followed:
        with pytest.raises(MisconfigurationException, match=match):
            fit(model, monitor, None, train, EarlyStopping("val_risk_estimate"))
        assert model.trainer.global_step == 0
    else:
        with pytest.warns(UserWarning, match=f"can give no estimate: .*{match}") as caught:
            run = fit(model, monitor, None, train, EarlyStopping("val_risk", strict=False), max_epochs=1)
        assert not TERMS & run.callback_metrics.keys()
        assert {each.filename for each in caught if each.category is UserWarning} == {__file__}


@pytest.mark.parametrize("name", ["task", "targets", "num_training_samples", "initial_weights", "prefix", "prog_bar"])
def test_arguments_are_checked_at_once(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"`{name}` should be .*, got"):
        RiskMonitor(**{name: 1.5})
