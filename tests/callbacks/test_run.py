"""What happens around a run: Ctrl-C, what is checked before it, and what Lightning hands in."""

import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.checks import check_run
from lightning_sensitivity.running.isolation import same_streams
from tests.helpers import Classifier, Linear, Quiet, fitted, loader, quick_risk, refused, trainer, unlabelled_loader

MONITORS = [SensitivityMonitor, RiskMonitor]


class Interrupted(Classifier):
    """Ctrl-C in one of the passes in eval mode after the sanity check: of our own, or of `validation_step`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.trainer.sanity_checking and self.next_pass() == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def snapshot(model: LightningModule) -> Any:
    """Weights, buffers, modes and random state."""
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()


# Of the passes in eval mode of an epoch: the first training batch for the risk (0, 1) and for the first step of each
# monitor (2 to 4), validation steps (5 to 8), clean and noisy (9 to 16), also at a layer (17 to 24), clean (25 to 28).
@pytest.mark.parametrize("num_passes", [0, 1, 2, 4, 5, 9, 10, 18, 25, 28])
def test_ctrl_c_leaves_everything_as_it_was(num_passes: int) -> None:
    model, first, before = Interrupted(), Callback(), list[Any]()
    model.next_pass = partial(next, itertools.count(num_passes, -1))  # not among what is put back
    first.on_train_batch_start = lambda run, model, *_: before.append(snapshot(model))
    first.on_validation_batch_start = first.on_train_batch_start
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="b_"), quick_risk()]
    run = trainer(callbacks=[first, *monitors], precision="bf16-mixed")
    with pytest.raises(SystemExit):  # Lightning's way to end on Ctrl-C
        run.fit(model, loader(64, seed=1), loader())
    assert run.state.status == "interrupted"
    assert snapshot(model) == before[-1]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not torch.nn.modules.module._global_forward_hooks
    assert "log" not in vars(model) and "predict_step" not in vars(model)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert all(monitor.run.samples == [] for monitor in monitors)


def streams() -> str:
    """The next number of each random stream, which stays the next one."""
    with same_streams():
        return str((torch.rand(1), np.random.rand()))


def test_ctrl_c_in_the_reference_leaves_random_streams_as_they_were() -> None:
    seen = list[Any]()

    class Stopped(GaussianNB):
        def fit(self, x: Any, y: Any) -> Any:
            seen.append(streams())
            np.random.rand(7), torch.rand(7)
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fitted(quick_risk(reference=Stopped()), Quiet(), val=unlabelled_loader(), num_sanity_val_steps=0)
    assert len(seen) == 1 and streams() == seen[0]


# What is checked before a run


def without(name: str, kind: Any = Classifier, base: Any = LightningModule) -> Any:
    return type("Lacking", (kind,), {name: getattr(base, name)})()


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no forward": (without("forward"), loader(), "needs a `forward` that returns the logits"),
    "no step": (without("validation_step"), loader(), "`def validation_step.*pass` is enough"),
    "no loader": (Classifier(), None, "needs a validation loop: pass `val_dataloaders`"),
}


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_run_is_refused_before_the_first_step(name: str, monitor: Any) -> None:
    model, val, match = REFUSED[name]
    refused(monitor(), model, loader(), val, match=f"`{monitor.__name__}` .*{match}")


def test_strategies_that_can_not_be_measured_under_are_refused() -> None:
    other, model = pytest.importorskip("pytorch_lightning.strategies"), BoringModel()
    for kind in (DeepSpeedStrategy, other.DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy):
        run = SimpleNamespace(strategy=kind.__new__(kind), enable_validation=True)
        with pytest.raises(MisconfigurationException, match="`M` does not support sharded weights .*; use DDP"):
            check_run("M", run, model, "fit")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_strategies_that_lose_what_a_fit_leaves_are_said(strategy: str) -> None:
    chosen: Any = {"enable_validation": True, "callbacks": [], "lr_scheduler_configs": [], "fast_dev_run": False}
    chosen |= {"global_step": 1}
    run = SimpleNamespace(strategy=trainer(strategy=strategy, devices=2).strategy, **chosen)
    with helpers.said() as texts:
        SensitivityMonitor().setup(run, Classifier(), "fit")
    assert ["Set `strategy='ddp'`" in text for text in texts] == [True] * (strategy != "ddp")


def test_monitors_that_log_the_same_names_need_two_prefixes() -> None:
    for kind in MONITORS:
        refused([kind(), kind()], Classifier(), match="`prefix` should be different in monitors")
    kinds = (SensitivityMonitor, quick_risk)
    fitted([kind(prefix=prefix) for prefix in ("val_", "b_") for kind in kinds], Classifier(), fast_dev_run=True)


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_the_other_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale, self.lr = nn.Linear(12, 4), 1.0, 0.01

        forward, configure_optimizers = Linear.forward, Linear.configure_optimizers
        training_step, validation_step = Linear.training_step, Classifier.validation_step

        def on_after_batch_transfer(self, batch: list[Any], dataloader_idx: int) -> list[Any]:
            return [1 - batch[0], *batch[1:]]

    lacking = without("validation_step", Model, other.LightningModule)
    refused(SensitivityMonitor(), lacking, match="needs a `validation_step`", kind=other.Trainer)
    logger = other.loggers.TensorBoardLogger(tmp_path, name=None)
    keep = other.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="val/expected_loss")
    stop = other.callbacks.EarlyStopping("val/expected_accuracy", mode="max")
    callbacks, options = [SensitivityMonitor(2.0), risk := quick_risk(), stop, keep], {"enable_checkpointing": True}
    run = fitted(callbacks, model := Model(), kind=other.Trainer, logger=logger, **options)
    x = helpers.inputs(20, seed=3)
    predicted = risk.predict(model, [[x, x]]).network
    torch.testing.assert_close(predicted, model(1 - x).softmax(1).detach(), check_dtype=False)
    assert {"val/output_sensitivity", "val/expected_loss"} <= run.callback_metrics.keys()
    run.logger.experiment.flush()
    (events,) = Path(run.logger.log_dir).glob("events*")
    assert b"val/expected_loss" in events.read_bytes()
