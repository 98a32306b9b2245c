"""Training that is stopped, resumed or interrupted: the curves go on, and everything is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, loader, trainer


class Curve(Callback):
    """What each validation has logged, by step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self.rows[trainer.global_step] = {name: value for name, value in metrics.items() if name != "train_loss"}


class ResumableLoader:
    """Gives its batches in one order, and goes on where it was."""

    def __init__(self, num_samples: int = 64) -> None:
        self.batches = list(loader(num_samples, seed=1))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(folder: Path, ckpt_path: Any = None, **kwargs: Any) -> Curve:
    """Train, and keep a checkpoint of every step."""
    torch.manual_seed(0)
    curve = Curve()
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(max_epochs=4, enable_checkpointing=True, callbacks=[SensitivityMonitor(**kwargs), curve, checkpoints])
    run.fit(Classifier(dropout=0.0), ResumableLoader(), loader(), ckpt_path=ckpt_path)
    return curve


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [8, 6, 1])  # after the second epoch, in the middle of it, in the first
@pytest.mark.parametrize("num_training_samples", [30, 500])  # two batches are enough; all are not
def test_a_resumed_curve_is_that_of_an_uninterrupted_run_bit_for_bit(
    tmp_path: Path, step: int, num_training_samples: int
) -> None:
    kwargs = {"num_training_samples": num_training_samples, "save_training_samples": True}
    whole = fit(tmp_path / "whole", **kwargs)
    resumed = fit(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt", **kwargs)
    assert list(whole.rows) == [4, 8, 12, 16]
    assert resumed.rows == {at: row for at, row in whole.rows.items() if at > step}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_without_the_samples_all_but_the_risks_sampling_error_is_the_same(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", num_training_samples=30)
    path = tmp_path / "whole" / "step=6.ckpt"
    resumed = fit(tmp_path / "resumed", path, num_training_samples=30)
    sampled = {"val_risk_estimate", "val_risk_training", "val_risk_uncertainty"}
    for at, row in resumed.rows.items():
        assert {name for name in row if row[name] != whole.rows[at][name]} == sampled
    checkpoint = torch.load(path, weights_only=False)
    assert [key for key in checkpoint if "sensitivity" in key] == ["lightning_sensitivity.initial_weights"]  # no data


def test_samples_of_a_checkpoint_that_was_only_validated_are_forgotten(tmp_path: Path) -> None:
    monitor = SensitivityMonitor(save_training_samples=True)
    run = trainer(callbacks=[monitor], max_epochs=1)
    model = Classifier()
    run.fit(model, ResumableLoader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    run.validate(model, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    torch.manual_seed(0)
    other = trainer(callbacks=[monitor], max_epochs=1)
    other.fit(model := Classifier(dropout=0.0), loader(32, 32, seed=7), loader())
    x, y = next(iter(loader(32, 32, seed=7)))
    score = (model.eval()(x).softmax(1) - torch.nn.functional.one_hot(y, 4)).square().sum(1).mean()
    assert other.callback_metrics["val_risk_training"].item() == pytest.approx(score.item(), rel=1e-5)


def test_batches_that_a_checkpoint_could_not_be_loaded_with_are_refused() -> None:
    class Sampled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch.x, batch.y], batch_idx)

    @dataclass
    class Sample:
        x: Tensor
        y: Tensor

    globals()["Sample"] = Sample  # so that it can be pickled
    Sample.__qualname__ = "Sample"
    data = DataLoader([Sample(*batch) for batch in loader()], batch_size=None)
    monitor = SensitivityMonitor(save_training_samples=True, task="multiclass")
    with pytest.raises(MisconfigurationException, match="`save_training_samples=True` needs batches of tensors"):
        trainer(callbacks=[monitor]).fit(Sampled(), data, loader())


def test_each_monitor_has_its_samples(tmp_path: Path) -> None:
    def monitors() -> list[Callback]:
        return [
            SensitivityMonitor(0.1, num_training_samples=16, save_training_samples=True),
            SensitivityMonitor(0.2, num_training_samples=48, save_training_samples=True, prefix="wide/"),
        ]

    run = trainer(callbacks=monitors())
    run.fit(Classifier(), ResumableLoader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    for prefix, num_batches in (("val_", 1), ("wide/", 3)):
        state = checkpoint[f"lightning_sensitivity.training_samples.{prefix}"]
        assert len(state["samples"]["batches"]) == num_batches
    run = trainer(callbacks=monitors(), max_epochs=3)
    run.fit(Classifier(), ResumableLoader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert run.callback_metrics["wide/sensitivity"] > run.callback_metrics["val_sensitivity"]


@pytest.mark.parametrize("callbacks", [[], [SensitivityMonitor(task=None)], [SensitivityMonitor()]])
def test_a_checkpoint_with_the_callback_resumes_without_and_the_other_way_round(
    tmp_path: Path, callbacks: list[Callback]
) -> None:
    for before, after in ((callbacks, []), ([], callbacks)):
        first = trainer(max_epochs=1, callbacks=copy.deepcopy(before))
        first.fit(Classifier(), ResumableLoader(), loader())
        first.save_checkpoint(tmp_path / "first.ckpt")
        second = trainer(max_epochs=2, callbacks=copy.deepcopy(after))
        no_risk = bool(after) and after[0].task is not None
        with pytest.warns(UserWarning, match="no risk estimate") if no_risk else nullcontext():
            second.fit(Classifier(), ResumableLoader(), loader(), ckpt_path=tmp_path / "first.ckpt")
        assert second.global_step == 8
        assert ("val_sensitivity" in second.callback_metrics) == bool(after)


# In eval mode, in this order: when a training batch is kept, and with the first validation batch.
PASSES = ["", "kept", "clean", "noisy", "training samples", "twin", "another twin", "validation_step"]


class Interrupted(Classifier):
    """Ctrl-C in a forward pass: of our own, or of `validation_step`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.trainer.sanity_checking:
            self.num_passes += 1
            if self.num_passes == PASSES.index(self.where):
                raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("where", PASSES[1:])
@pytest.mark.parametrize("at", [None, "net.0"])
def test_ctrl_c_during_validation_leaves_everything_as_it_was(where: str, at: str | None) -> None:
    model, snapshot = Interrupted(where), Snapshot()
    run = trainer(callbacks=[snapshot, SensitivityMonitor(at=at, num_training_samples=8)])
    with pytest.raises(SystemExit):  # Lightning's way to end on Ctrl-C
        run.fit(model, ResumableLoader(), loader())
    assert run.state.status == "interrupted"
    assert snapshot.taken
    assert snapshot.of(model) == snapshot.taken
    assert not any(module._forward_hooks for module in model.modules())
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert all(not torch.is_inference(parameter) for parameter in model.parameters())


class Snapshot(Callback):
    """Weights, buffers, modes and random state before each batch."""

    taken: Any = None

    @staticmethod
    def of(model: LightningModule) -> Any:
        tensors = {name: value.tolist() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        return tensors, modes, torch.get_rng_state().tolist()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.taken = self.of(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.taken = self.of(pl_module)
