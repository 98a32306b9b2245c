"""What happens around a run: Ctrl-C, names that others log, what is checked, and what Lightning hands in."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.checks import check_run
from lightning_sensitivity.callbacks.logged import loader_name, num_batches, without_loader
from tests.helpers import Classifier, History, Linear, loader, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]
each = pytest.mark.parametrize("monitor", MONITORS)


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

    taken: Any = None

    @staticmethod
    def of(model: LightningModule) -> Any:
        tensors = {name: value.tolist() for name, value in model.state_dict().items()}
        return tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.taken = self.of(pl_module)

    on_validation_batch_start = on_train_batch_start


# In this order: a training batch is kept; with the first validation batch clean and noisy, at a layer, clean for the
# risk, the training sample, by batch, two twins; the step.
@pytest.mark.parametrize("where", range(1, 11))
def test_ctrl_c_leaves_everything_as_it_was(where: int) -> None:
    model, snapshot = Interrupted(where), Snapshot()
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="b_"), RiskMonitor(num_training_samples=8)]
    run = trainer(callbacks=[snapshot, *monitors], precision="bf16-mixed")
    with pytest.raises(SystemExit):  # Lightning's way to end on Ctrl-C
        run.fit(model, loader(64, seed=1), loader())
    assert run.state.status == "interrupted"
    assert snapshot.of(model) == snapshot.taken
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not torch.nn.modules.module._global_forward_hooks
    assert "log" not in vars(model) and "predict_step" not in vars(model)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert all(monitor._watch is None for monitor in monitors)


# Names


def recall(name: str, hook: str) -> Classifier:
    """A model that logs a name of ours in one of its hooks."""
    model = Classifier()
    setattr(model, hook, lambda *args: model.log(name, 7.0))
    return model


@pytest.mark.parametrize("name", ["val_sensitivity", "val_loss_estimate", "val_risk_claim"])
@pytest.mark.parametrize("where", ["on_train_batch_start", "on_validation_batch_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("num_sanity_val_steps", [1, 0])
def test_a_name_that_somebody_else_logs_is_theirs(name: str, where: str, num_sanity_val_steps: int) -> None:
    monitor = RiskMonitor if "risk" in name else SensitivityMonitor
    run = trainer(callbacks=[monitor()], num_sanity_val_steps=num_sanity_val_steps, max_epochs=3)
    message = f"`prefix` should give `{monitor.__name__}` names of its own, but '{name}' is logged"
    is_early = num_sanity_val_steps and "validation" in where  # later, it is too late to end a run for it
    with pytest.raises(MisconfigurationException, match=message) if is_early else pytest.warns(match=message):
        run.fit(recall(name, where), loader(), loader())
    assert (run.global_step, run.current_epoch) == ((0, 0) if is_early else (12, 3))
    assert is_early or run.callback_metrics[name] == 7
    own = trainer(callbacks=[monitor(prefix="mine/")], max_epochs=1)
    own.fit(recall(name, where), loader(), loader())  # no error, no warning


def test_two_monitors_of_a_kind_need_two_prefixes() -> None:
    with pytest.raises(MisconfigurationException, match="`prefix` should be .*for each `Sens.*, got .'val_', 'val_'."):
        trainer(callbacks=[SensitivityMonitor(), SensitivityMonitor()]).fit(Classifier(), loader(), loader())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `RiskMonitor`"):  # Lightning's own
        trainer(callbacks=[RiskMonitor(), RiskMonitor()])
    two = [kind(prefix=prefix) for prefix in ("val_", "b_") for kind in MONITORS]
    trainer(callbacks=two, fast_dev_run=True).fit(Classifier(), loader(), loader())


# What is checked before a run


def without(name: str, kind: Any = Classifier, base: Any = LightningModule) -> Any:
    return type("Lacking", (kind,), {name: getattr(base, name)})()


@each
@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_can_not_run_is_said(monitor: Any) -> None:
    class Drawing(Classifier):
        def validation_step(self, dataloader_iter: Iterator[Any]) -> None: ...

    for model, val, options, match in (
        (without("forward"), loader(), {}, "Lacking has no `forward`.*returns the logits"),
        (without("validation_step"), loader(), {}, "no `validation_step`.*a stub is enough.*def validation_step"),
        (Classifier(), None, {}, "no validation loader.*`val_dataloaders`.*no labels"),
        (Classifier(), loader(), {"limit_val_batches": 0}, "`limit_val_batches=0`"),
        (Drawing(), loader(), {}, r"`validation_step\(dataloader_iter\)`"),
    ):
        with pytest.raises(MisconfigurationException, match=match):
            trainer(callbacks=[monitor()], **options).fit(model, loader(), val)


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
    with pytest.raises(MisconfigurationException, match="got .* with `tensor_parallel_size=2`. With 1 it works"):
        check(strategy)
    model = BoringModel()
    model.allow_zero_length_dataloader_with_multiple_devices = True
    with pytest.raises(MisconfigurationException, match="should get a batch in every process"):
        check(None, model)


# The loops of Lightning


@each
def test_a_fit_that_never_validates_says_so(monitor: Any) -> None:
    run = trainer(callbacks=[monitor()], check_val_every_n_epoch=5, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="has measured nothing in this fit"):
        run.fit(Classifier(), loader(), loader())


def test_predict_is_left_alone_and_callbacks_can_be_copied() -> None:
    model = without("forward")
    model.predict_step = lambda batch, batch_idx: batch[0]
    monitors = [copy.deepcopy(kind()) for kind in (*MONITORS, SensitivityMonitor)]  # one prefix twice: no matter here
    assert len(trainer(callbacks=monitors).predict(model, loader())) == len(loader())


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
    assert {without_loader(name) for name in names} == {"seen"}


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

    with pytest.raises(MisconfigurationException, match="no `validation_step`"):
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
            init_args: {{noise_std: {[0.1] * 12}, num_draws: 2, inputs: 0, prefix: "val/"}}
          - class_path: lightning_sensitivity.SensitivityMonitor
            init_args: {{at: [net], outputs: operator.pos}}
          - class_path: lightning_sensitivity.RiskMonitor
            init_args: {{task: multiclass, targets: 1, num_samples: null}}
        """
    )
    arguments = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Linear, run=False, args=arguments, save_config_callback=None)
    first, second, third = [each for each in cli.trainer.callbacks if isinstance(each, tuple(MONITORS))]
    assert first.options.inputs == 0 and second.options.outputs is operator.pos and third.options.num_samples is None
    cli.trainer.fit(cli.model, loader(), loader())
    assert {"val/sensitivity", "val_sensitivity/net", "val_risk_estimate"} <= cli.trainer.callback_metrics.keys()
