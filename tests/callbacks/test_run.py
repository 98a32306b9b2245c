"""What happens around a run: Ctrl-C, what is checked and warned of, who watches, and what Lightning hands in."""

from __future__ import annotations

import copy
import logging
import math
import operator
import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.checks import check_run
from lightning_sensitivity.callbacks.utilities import loader_name, num_batches
from tests.helpers import NUM_FEATURES, Classifier, History, Linear, Scheduled, labelled, loader, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]
of_each_monitor = pytest.mark.parametrize("monitor", MONITORS)


class Interrupted(Classifier):
    """Ctrl-C in one of the passes in eval mode after the sanity check: of our own, or of `validation_step`."""

    def __init__(self, where: int) -> None:
        super().__init__()
        self.passes, self.where = deque[int](), where

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.trainer.sanity_checking:
            self.passes.append(1)
            if len(self.passes) == self.where:
                raise KeyboardInterrupt
        return super().forward(x)


class Snapshot(Callback):
    """Weights, buffers, modes and random state before each batch."""

    last: Any = None

    @staticmethod
    def of(model: LightningModule) -> Any:
        tensors = {name: value.tolist() for name, value in model.state_dict().items()}
        return tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.last = self.of(pl_module)

    on_validation_batch_start = on_train_batch_start


# In this order: a training batch is kept; with the first validation batch clean and noisy, at a layer, clean for the
# risk, the training sample, by batch, two twins; the step.
@pytest.mark.parametrize("where", range(1, 12))
def test_ctrl_c_leaves_everything_as_it_was(where: int) -> None:
    model, snapshot = Interrupted(where), Snapshot()
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="b_"), RiskMonitor(num_training_samples=8)]
    run = trainer(callbacks=[snapshot, *monitors], precision="bf16-mixed")
    with pytest.raises(SystemExit):  # Lightning's way to end on Ctrl-C
        run.fit(model, loader(64, seed=1), loader())
    assert run.state.status == "interrupted"
    assert snapshot.of(model) == snapshot.last
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not torch.nn.modules.module._global_forward_hooks
    assert "log" not in vars(model) and "predict_step" not in vars(model)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


# What is checked before a run


def without(name: str, kind: Any = Classifier, base: Any = LightningModule) -> Any:
    return type("Lacking", (kind,), {name: getattr(base, name)})()


class Drawing(Classifier):
    def validation_step(self, dataloader_iter: Iterator[Any]) -> None: ...


class Normalizing(Linear):
    """Its forward writes to its parameters."""

    def __init__(self, by_version: bool) -> None:
        super().__init__()
        self.by_version, self.embedding = by_version, nn.Embedding(2, 1, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_version:
            return super().forward(x) + self.embedding((x[:, 0] > 0.5).long())
        self.embedding.weight.data.mul_(0.9)
        return super().forward(x) + self.embedding.weight.sum()


class Certain(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no forward": (without("forward"), loader(), {}, "needs a `forward` that returns the logits"),
    "no step": (without("validation_step"), loader(), {}, "a stub is enough: `def validation_step.*pass`"),
    "no loader": (Classifier(), None, {}, "needs a validation loop: pass `val_dataloaders`"),
    "no batches": (Classifier(), loader(), {"limit_val_batches": 0}, "leave `limit_val_batches` above 0"),
    "an iterator": (Drawing(), loader(), {}, "takes `dataloader_iter`"),
    "probabilities": (Certain(), loader(), {}, "should get logits, got probabilities"),
    "probabilities, unseen": (Certain(), loader(), {"num_sanity_val_steps": 0}, "should get logits, got probabilities"),
    "max_norm": (Normalizing(True), loader(), {}, "`forward` writes its parameters.*embedding.weight"),
    "data": (Normalizing(False), loader(), {}, "`forward` writes its parameters.*embedding.weight"),
    "max_norm, unseen": (
        Normalizing(True), loader(), {"num_sanity_val_steps": 0}, "`forward` writes its parameters.*embedding.weight"
    ),
}  # fmt: skip


@of_each_monitor
@pytest.mark.filterwarnings("ignore:.*(Skipping val loop|can give no estimate)")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_run_is_refused_before_the_first_step(name: str, monitor: Any) -> None:
    model, val, options, match = REFUSED[name]
    run = trainer(callbacks=[monitor()], **options)
    with pytest.raises(MisconfigurationException, match=f"`{monitor.__name__}` .*{match}"):
        run.fit(model, loader(), val)
    assert run.global_step == 0


def test_strategies_that_can_not_be_measured_under_are_refused() -> None:
    def check(strategy: Any, model: Any = None) -> None:
        run = SimpleNamespace(strategy=strategy, datamodule=None, world_size=2, enable_validation=True)
        check_run("M", run, model or BoringModel(), "fit")

    other = pytest.importorskip("pytorch_lightning.strategies")
    for kind in (DeepSpeedStrategy, other.DeepSpeedStrategy):  # their constructors need the package
        with pytest.raises(MisconfigurationException, match="`M` does not support `DeepSpeedStrategy`"):
            check(kind.__new__(kind))
    strategy, size = ModelParallelStrategy(), 1
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: size)}
    check(strategy)
    size = 2
    with pytest.raises(MisconfigurationException, match="needs other samples .* `tensor_parallel_size=1`"):
        check(strategy)
    model = BoringModel()
    model.allow_zero_length_dataloader_with_multiple_devices = True
    with pytest.raises(MisconfigurationException, match="needs a batch in every process"):
        check(None, model)


def test_monitors_that_log_the_same_names_need_two_prefixes() -> None:
    for kind in MONITORS:
        for other in (kind, type("Sub", (kind,), {})):
            with pytest.raises(MisconfigurationException, match="`prefix` should be another one for each monitor"):
                trainer(callbacks=[kind(), other()]).fit(Classifier(), loader(), loader())
    two = [kind(prefix=prefix) for prefix in ("val_", "b_") for kind in MONITORS]
    trainer(callbacks=two, fast_dev_run=True).fit(Classifier(), loader(), loader())


# What the step of the user does


class Masked(Linear):
    """Its step gives the model more than the batch's first element."""

    def __init__(self, stage: str, **more: Any) -> None:
        super().__init__()
        self.stage, self.more = stage, more

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return scale * self.net(x if mask is None else x * mask)

    def logits(self, batch: Any, stage: str) -> Tensor:
        x, y, mask = batch
        more = {"mask": mask} if not self.more else self.more
        return self(x, **more) if stage == self.stage else self(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.logits(batch, "training"), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.stage == "validation":
            self.logits(batch, "validation")


@pytest.mark.parametrize("stage", ["training", "validation"])
@pytest.mark.parametrize(("more", "names"), [({}, "'mask'"), ({"scale": 4}, "'scale': 4")])
def test_arguments_that_the_step_gives_and_we_do_not_are_named(more: Any, names: str, stage: str) -> None:
    def fit(**options: Any) -> None:
        x, y = labelled(50).tensors
        data = DataLoader(TensorDataset(x, y, (torch.rand(50, NUM_FEATURES) > 0.5).float()), 16)
        monitors = [SensitivityMonitor(**options), RiskMonitor(targets=1, **options)]
        trainer(callbacks=monitors).fit(Masked(stage, **more), data, data)

    with pytest.warns(UserWarning) as caught:
        fit()
    warned = [each for each in caught if each.category is UserWarning]
    assert [str(each.message).split("`")[1] for each in warned] == ["SensitivityMonitor", "RiskMonitor"]
    assert all(f"The step calls the model with another {names}" in str(each.message) for each in warned)
    assert {each.filename for each in warned} == {__file__}  # the user's
    fit(inputs=lambda batch: (batch[0], None, 4) if more else (batch[0], batch[2]))


def test_hooks_of_the_user_run_in_our_passes() -> None:
    model, num_calls = Linear(), 0

    def hook(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    model.net.register_forward_hook(hook)
    trainer(callbacks=[SensitivityMonitor()], max_epochs=1, num_sanity_val_steps=0).fit(model, loader(64), loader(64))
    assert num_calls == 4 + 1 + 4 * 2 + 1  # training's, and ours: before the first step, and two a batch


# Who watches our values


@pytest.mark.parametrize(
    ("name", "mode", "match"),
    [
        ("val_sensitivity", "min", "minimizes `.*`, which is lowest before training.*risk_estimate"),
        ("val_sensitivity", "max", None),
        ("val_risk_estimate", "max", "maximizes .*low values are good"),
        ("val_risk_estimate", "min", None),
    ],
)
def test_who_watches_a_value_the_wrong_way_is_warned_of(name: str, mode: str, match: str | None, tmp_path: Any) -> None:
    class Plateau(Scheduled, Classifier):
        waits_for, waits_for_mode = f"{name}/dataloader_idx_1", mode

    watchers = [kind(monitor=Plateau.waits_for, mode=mode) for kind in (EarlyStopping, ModelCheckpoint)]
    run = trainer(
        callbacks=[*watchers, SensitivityMonitor(), RiskMonitor()],
        max_epochs=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Plateau(), loader(), [loader(), loader(seed=1)])
    warned = [each for each in caught if match and re.search(match, str(each.message))]
    assert len(warned) == 3 * bool(match) == len([each for each in caught if "imizes `" in str(each.message)])
    assert {each.filename for each in warned} <= {__file__}


WATCHERS: dict[str, tuple[Any, int]] = {
    "stopping": (lambda: [EarlyStopping("val_risk_estimate", patience=9)], 1),  # nan stops it
    "lenient stopping": (lambda: [EarlyStopping("val_risk_estimate", patience=9, check_finite=False)], 3),
    "checkpoints": (lambda: [ModelCheckpoint(monitor="val_risk_estimate")], 3),
    "a schedule": (list, 3),
}


@pytest.mark.parametrize("every_n_epochs", [1, 2])
@pytest.mark.parametrize("name", WATCHERS)
def test_a_run_goes_on_if_the_first_validation_has_no_value(name: str, every_n_epochs: int, tmp_path: Any) -> None:
    class Overflowing(Scheduled, Classifier):
        if name != "a schedule":
            configure_optimizers = Classifier.configure_optimizers

        def forward(self, x: Tensor) -> Tensor:
            is_bad = self.trainer.validating and self.current_epoch == 0 and every_n_epochs == 1
            return super().forward(x) * (float("nan") if is_bad else 1.0)

    (make, num_epochs), history = WATCHERS[name], History()
    monitor = RiskMonitor(every_n_epochs=every_n_epochs)
    options = {"enable_checkpointing": name == "checkpoints", "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
    run = trainer(callbacks=[monitor, *make(), history], max_epochs=3, **options)
    with pytest.warns(UserWarning, match="50 validation .* gave nan") if every_n_epochs == 1 else nullcontext():
        run.fit(Overflowing(), loader(), loader())
    assert run.current_epoch == len(history.epochs) == num_epochs
    values = [epoch["val_risk_estimate"] for epoch in history.epochs]
    assert math.isnan(values[0]) and not any(map(math.isnan, values[1:]))


# The loops of Lightning


@of_each_monitor
def test_a_fit_that_never_validates_says_so(monitor: Any) -> None:
    run = trainer(callbacks=[monitor()], check_val_every_n_epoch=5, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="has measured nothing in this fit"):
        run.fit(Classifier(), loader(), loader())


def test_predict_is_left_alone_and_callbacks_can_be_copied() -> None:
    model = without("forward")
    model.predict_step = lambda batch, batch_idx: batch[0]
    monitors = [copy.deepcopy(kind()) for kind in (*MONITORS, SensitivityMonitor)]  # one prefix twice: no matter here
    assert len(trainer(callbacks=monitors).predict(model, loader())) == len(loader())


def test_validate_alone_says_which_values_belong_to_a_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[SensitivityMonitor(), RiskMonitor()]).validate(Classifier(), loader(), verbose=False)
    assert [each.message for each in caplog.records if "RiskMonitor" in each.message] == [
        "`RiskMonitor` (val_*) logs in `Trainer.fit` alone: it scores training samples."
    ]


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_validations_that_are_left_out(num_loaders: int) -> None:
    class EverySecond(SensitivityMonitor):
        def should_measure(self, trainer: Trainer) -> bool:
            return trainer.current_epoch % 2 == 1

    history = History()
    run = trainer(callbacks=[EverySecond(), history], max_epochs=4)
    run.fit(Classifier(), loader(), [loader(seed=idx) for idx in range(num_loaders)])
    values = [epoch.get(loader_name("val_sensitivity", num_loaders - 1, num_loaders)) for epoch in history.epochs]
    assert values[0] is None and values[1] == values[2] != values[3]  # Lightning keeps the last one


MODES = [(None, 4, [4, 2]), (None, 2, [2, 2]), ("sequential", 4, [4, 2]), ("min_size", 4, [2])]
MODES += [("max_size", 4, [4]), ("max_size_cycle", 4, [4])]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(("mode", "limit", "expected"), MODES)
def test_as_many_batches_come_as_are_said(stage: str, mode: str | None, limit: int, expected: list[int]) -> None:
    model, loaders = Classifier(), [loader(50), loader(20, seed=3)]  # of 4 and 2 batches
    came = dict.fromkeys(range(len(expected)), 0)

    def step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert num_batches(model.trainer) == expected
        came[dataloader_idx] += 1
        model.log("seen", 1.0, batch_size=1)

    model.validation_step = model.test_step = step
    val = loaders if mode is None else CombinedLoader(loaders, mode)
    run = trainer(max_epochs=1, limit_val_batches=limit, limit_test_batches=limit, num_sanity_val_steps=0)
    run.fit(model, loader(), val) if stage == "fit" else getattr(run, stage)(model, val, verbose=False)
    assert list(came.values()) == expected
    names = {loader_name("seen", idx, len(expected)) for idx in range(len(expected))}
    assert names == {name for name in run.callback_metrics if name.startswith("seen")}


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_the_other_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.log("spread", x.std())
            return self.net(x)

        training_step, configure_optimizers = Linear.training_step, Linear.configure_optimizers

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    def fit(model: Any, monitors: list[Any]) -> Any:
        torch.manual_seed(0)
        logger = other.loggers.TensorBoardLogger(tmp_path, name=None)
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1, "accelerator": "cpu"}
        run = other.Trainer(callbacks=monitors, logger=logger, **quiet)
        run.fit(model, loader(), loader())
        return run

    with pytest.raises(MisconfigurationException, match="needs a `validation_step`"):
        fit(without("validation_step", Model, other.LightningModule), [SensitivityMonitor()])
    run = fit(Model(), [SensitivityMonitor(2.0), RiskMonitor()])
    assert run.callback_metrics["spread"] == fit(Model(), []).callback_metrics["spread"]
    assert {"val_sensitivity", "val_risk_estimate"} <= run.callback_metrics.keys()
    run.logger.experiment.flush()
    (events,) = Path(run.logger.log_dir).glob("events*")
    assert b"custom_scalars" in events.read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 on jsonargparse 4.5
def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    (tmp_path / "config.yaml").write_text(
        f"""
        seed_everything: 1
        trainer:
          {{accelerator: cpu, max_epochs: 1, default_root_dir: {tmp_path}, enable_checkpointing: false, logger: false}}
        trainer.callbacks:
          - class_path: lightning_sensitivity.SensitivityMonitor
            init_args: {{noise: {[0.1] * 12}, num_draws: 2, inputs: 0, prefix: "val/"}}
          - class_path: lightning_sensitivity.SensitivityMonitor
            init_args: {{at: net, outputs: operator.pos}}
          - class_path: lightning_sensitivity.RiskMonitor
            init_args: {{task: multiclass, targets: 1, num_samples: null}}
        """
    )
    arguments = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Linear, run=False, args=arguments, save_config_callback=None)
    first, second, third = [each for each in cli.trainer.callbacks if isinstance(each, tuple(MONITORS))]
    assert first.inputs == 0 and second.outputs is operator.pos and third.num_samples is None
    cli.trainer.fit(cli.model, loader(), loader())
    assert {"val/sensitivity", "val_sensitivity", "val_risk_estimate"} <= cli.trainer.callback_metrics.keys()
