"""What happens around a run: Ctrl-C, what is checked and warned of, who watches, and what Lightning hands in."""

import math
import operator
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
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.utilities import check_run, loader_name, num_batches
from tests.helpers import Classifier, History, Linear, Scheduled, labelled, loader, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]
of_each_monitor = pytest.mark.parametrize("monitor", MONITORS)


class Interrupted(Classifier):
    """Ctrl-C in one of the passes in eval mode after the sanity check: of our own, or of `validation_step`."""

    num_passes, last_pass = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.trainer.sanity_checking:
            Interrupted.num_passes += 1
            if self.num_passes == self.last_pass:
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
@pytest.mark.parametrize("last_pass", range(1, 12))
def test_ctrl_c_leaves_everything_as_it_was(last_pass: int) -> None:
    model, snapshot = Interrupted(), Snapshot()
    Interrupted.num_passes, Interrupted.last_pass = 0, last_pass
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
    def validation_step(self, dataloader_iter: Any) -> None: ...


class Writing(Linear):
    """Its forward writes to its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 4, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.embedding((x[:, 0] > 0.5).long())


NAME = "val_risk_estimate"
UNSEEN, WRITES = {"num_sanity_val_steps": 0}, "`forward` writes its parameters.*embedding.weight"
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no forward": (without("forward"), loader(), {}, "needs a `forward` that returns the logits"),
    "no step": (without("validation_step"), loader(), {}, "`def validation_step.*pass` is enough"),
    "no loader": (Classifier(), None, {}, "needs a validation loop: pass `val_dataloaders`"),
    "no batches": (Classifier(), loader(), {"limit_val_batches": 0}, "leave `limit_val_batches` above 0"),
    "an iterator": (Drawing(), loader(), {}, "takes `dataloader_iter`"),
    "max_norm": (Writing(), loader(), {}, WRITES),
    "max_norm, unseen": (Writing(), loader(), UNSEEN, WRITES),
}


@of_each_monitor
@pytest.mark.filterwarnings("ignore:.*(Skipping val loop|`dataloader_iter` step flavor)")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_run_is_refused_before_the_first_step(name: str, monitor: Any) -> None:
    model, val, options, match = REFUSED[name]
    run = trainer(callbacks=[monitor()], **options)
    with pytest.raises(MisconfigurationException, match=f"`{monitor.__name__}` .*{match}"):
        run.fit(model, loader(), val)
    assert run.global_step == 0


def test_strategies_that_can_not_be_measured_under_are_refused() -> None:
    def check(strategy: Any, match: str, model: Any = None) -> None:
        run = SimpleNamespace(strategy=strategy, datamodule=None, world_size=2, enable_validation=True)
        with pytest.raises(MisconfigurationException, match=match):
            check_run("M", run, model or BoringModel(), "fit")

    other, model = pytest.importorskip("pytorch_lightning.strategies"), BoringModel()
    for kind in (DeepSpeedStrategy, other.DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy):
        check(kind.__new__(kind), "`M` needs all weights in every process.* sharded")
    model.allow_zero_length_dataloader_with_multiple_devices = True
    check(None, "needs a batch in every process", model)


def test_monitors_that_log_the_same_names_need_two_prefixes() -> None:
    for kind in MONITORS:
        for other in (kind, type("Sub", (kind,), {})):
            with pytest.raises(MisconfigurationException, match="`prefix` should be another one for each monitor"):
                trainer(callbacks=[kind(), other()]).fit(Classifier(), loader(), loader())
    two = [kind(prefix=prefix) for prefix in ("val_", "b_") for kind in MONITORS]
    trainer(callbacks=two, fast_dev_run=True).fit(Classifier(), loader(), loader())


def test_a_callback_that_logs_one_of_our_names_before_us_costs_the_value() -> None:
    class Other(Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.log("val_sensitivity", 1.0)

    with pytest.warns(UserWarning, match="could not log 'val_sensitivity'.*self.log"):
        run = trainer(callbacks=[Other(), SensitivityMonitor()], num_sanity_val_steps=0)
        run.fit(Classifier(), loader(), loader())
    assert run.callback_metrics["val_sensitivity"] == 1 and run.callback_metrics["val_sensitivity_stderr"] > 0


# What the step of the user does


STEPS: dict[str, tuple[Any, Any]] = {  # what the step gives the model more than we do, and how to say all of it
    "mask": (lambda batch: {"mask": batch[2]}, lambda batch: (batch[0], batch[2])),
    "scale": (lambda batch: {"scale": 4}, lambda batch: (batch[0], None, 4)),
}


@pytest.mark.parametrize("stage", ["training", "validation"])
@pytest.mark.parametrize("name", STEPS)
def test_arguments_that_the_step_gives_and_we_do_not_are_named(name: str, stage: str) -> None:
    class Masked(Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
            return scale * self.net(x if mask is None else x * mask)

    def fit(**options: Any) -> None:
        x, y = labelled(50).tensors
        data, model = DataLoader(TensorDataset(x, y, (x > 0.5).float()), 16), Masked()  # whose validation is a stub
        step = lambda batch, batch_idx: cross_entropy(model(batch[0], **more(batch)), batch[1])  # noqa: E731
        for each in {stage, "training"}:
            setattr(model, f"{each}_step", step)
        trainer(callbacks=[SensitivityMonitor(**options), RiskMonitor(targets=lambda batch: batch[1], **options)]).fit(
            model, data, data
        )

    more, chosen = STEPS[name]
    with pytest.warns(UserWarning) as caught:
        fit()
    warned = [each for each in caught if each.category is UserWarning]
    assert [str(each.message).split("`")[1] for each in warned] == ["SensitivityMonitor", "RiskMonitor"]
    assert all(f"The step calls the model with another {name}:" in str(each.message) for each in warned)
    assert {each.filename for each in warned} == {__file__}  # the user's
    fit(inputs=chosen)


def test_hooks_of_the_user_run_in_our_passes() -> None:
    model, calls = Linear(), list[int]()
    model.net.register_forward_hook(lambda *_: calls.append(1))
    trainer(callbacks=[SensitivityMonitor()], max_epochs=1, num_sanity_val_steps=0).fit(model, loader(64), loader(64))
    assert len(calls) == 4 + 1 + 1 + 4 * 2  # of training, and ours: two that look at the outputs, and two a batch


# Who watches our values


def test_who_watches_a_value_the_wrong_way_is_warned_of(tmp_path: Path) -> None:
    class Plateau(Scheduled, Classifier):
        waits_for = "val_sensitivity/dataloader_idx_0"

    names, monitors = ["val_sensitivity/dataloader_idx_1", "val_risk_estimate"], [SensitivityMonitor(), RiskMonitor()]
    names[1] += "/dataloader_idx_0"
    kinds = [(EarlyStopping, "min"), (EarlyStopping, "max"), (ModelCheckpoint, "min"), (ModelCheckpoint, "max")]
    watchers = [kind(monitor=name, mode=mode) for kind, mode in kinds for name in names]
    run = trainer(callbacks=[*watchers, *monitors], max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.warns(UserWarning) as caught:
        run.fit(Plateau(), loader(), [loader(), loader(seed=1)])
    warned = [each for each in caught if "imizes" in str(each.message)]
    who = sorted(str(each.message).split(", ")[0] for each in warned)
    least, most = (f"minimizes `{names[0]}`", f"maximizes `{names[1]}`")
    owners = [f"`{kind}` {what}" for kind in ("EarlyStopping", "ModelCheckpoint") for what in (most, least)]
    assert who == [*owners, "`ReduceLROnPlateau` minimizes `val_sensitivity/dataloader_idx_0`"]
    assert {each.filename for each in warned} == {__file__}


# The faults' `test_something_waits` has a run for each watcher.
@pytest.mark.parametrize("every_n_epochs", [1, 2])
@pytest.mark.filterwarnings("ignore:.*sees the previous")
def test_a_run_goes_on_if_the_first_validation_has_no_value(every_n_epochs: int, tmp_path: Path) -> None:
    class Overflowing(Scheduled, Classifier):
        def forward(self, x: Tensor) -> Tensor:
            is_bad = self.trainer.validating and self.current_epoch == 0 and every_n_epochs == 1
            return super().forward(x) * (math.nan if is_bad else 1.0)

    watchers = [EarlyStopping(NAME, patience=9, check_finite=False), ModelCheckpoint(tmp_path, monitor=NAME), History()]
    monitor = RiskMonitor(every_n_epochs=every_n_epochs)
    run = trainer(callbacks=[monitor, *watchers], max_epochs=3, enable_checkpointing=True, **UNSEEN)
    with pytest.warns(UserWarning, match="50 validation .* gave nan") if every_n_epochs == 1 else nullcontext():
        run.fit(Overflowing(), loader(), loader())
    values = [epoch[NAME] for epoch in watchers[-1].epochs]
    assert [math.isnan(value) for value in values] == [every_n_epochs == 1, False, False]
    assert (values[0] == values[1]) == (every_n_epochs == 2)  # Lightning keeps the last one


# The loops of Lightning


def test_predict_is_left_alone() -> None:
    model = without("forward")
    model.predict_step = lambda batch, batch_idx: batch[0]
    assert len(trainer(callbacks=[SensitivityMonitor(), RiskMonitor()]).predict(model, loader())) == len(loader())


def test_validations_that_are_left_out() -> None:
    class EverySecond(SensitivityMonitor):
        def should_measure(self, trainer: Trainer) -> bool:
            return trainer.current_epoch % 2 == 1

    run = trainer(callbacks=[EverySecond(), history := History()], max_epochs=4)
    run.fit(Classifier(), loader(), [loader(), loader(seed=1)])
    values = [epoch.get("val_sensitivity/dataloader_idx_1") for epoch in history.epochs]
    assert values[0] is None and values[1] == values[2] != values[3]  # Lightning keeps the last one


MODES = [(None, 4, [4, 2]), (None, 2, [2, 2]), ("sequential", 4, [4, 2]), ("min_size", 4, [2])]
MODES += [("max_size", 4, [4]), ("max_size_cycle", 4, [4])]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(("mode", "limit", "expected"), MODES)
def test_as_many_batches_come_as_are_said(stage: str, mode: str | None, limit: int, expected: list[int]) -> None:
    model, loaders = Classifier(), [loader(50), loader(20, seed=3)]  # of 4 and 2 batches
    counts = dict.fromkeys(range(len(expected)), 0)

    def step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert num_batches(model.trainer) == expected
        counts[dataloader_idx] += 1
        model.log("seen", 1.0, batch_size=1)

    model.validation_step = model.test_step = step
    val = loaders if mode is None else CombinedLoader(loaders, mode)
    run = trainer(max_epochs=1, limit_val_batches=limit, limit_test_batches=limit, **UNSEEN)
    run.fit(model, loader(), val) if stage == "fit" else getattr(run, stage)(model, val, verbose=False)
    assert list(counts.values()) == expected
    assert {loader_name("seen", idx, len(expected)) for idx in counts} <= run.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_the_other_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = nn.Linear(12, 4), 1.0

        forward, configure_optimizers = Linear.forward, Linear.configure_optimizers
        training_step, validation_step = Linear.training_step, Classifier.validation_step

    def fit(make: Any, *monitors: Any) -> Any:
        torch.manual_seed(0)
        model = make()
        logger = other.loggers.TensorBoardLogger(tmp_path, name=None)
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1, "accelerator": "cpu"}
        run = other.Trainer(callbacks=[*monitors], logger=logger, **quiet)
        run.fit(model, loader(), loader())
        return run

    with pytest.raises(MisconfigurationException, match="needs a `validation_step`"):
        fit(lambda: without("validation_step", Model, other.LightningModule), SensitivityMonitor())
    run = fit(Model, SensitivityMonitor(2.0), RiskMonitor())
    assert run.callback_metrics["val_loss"] == fit(Model).callback_metrics["val_loss"]
    assert {"val_sensitivity", "val_risk_estimate"} <= run.callback_metrics.keys()
    run.logger.experiment.flush()
    (events,) = Path(run.logger.log_dir).glob("events*")
    assert b"custom_scalars" in events.read_bytes()


def first_part(batch: Any) -> Any:
    return batch[0]


def last_part(batch: Any) -> Any:
    return batch[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 on jsonargparse 4.5
def test_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    arguments = [
        {"noise": [0.1] * 12, "num_draws": 2, "inputs": f"{__name__}.first_part", "prefix": "val/"},
        {"at": "net", "outputs": "operator.pos"},
        {"task": "multiclass", "targets": f"{__name__}.last_part", "num_samples": None},
    ]
    names = ["SensitivityMonitor", "SensitivityMonitor", "RiskMonitor"]
    config = [{"class_path": f"lightning_sensitivity.{name}"} for name in names]
    config = [each | {"init_args": more} for each, more in zip(config, arguments, strict=True)]
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "logger": False}
    cli = LightningCLI(Linear, run=False, args={"trainer": options | {"callbacks": config}}, save_config_callback=None)
    first, second, third = [each for each in cli.trainer.callbacks if isinstance(each, tuple(MONITORS))]
    assert first.inputs is first_part and second.outputs is operator.pos and third.num_samples is None
    cli.trainer.fit(cli.model, loader(), loader())
    assert {"val/sensitivity", "val_sensitivity", "val_risk_estimate"} <= cli.trainer.callback_metrics.keys()
