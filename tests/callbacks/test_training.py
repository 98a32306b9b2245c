"""Every way to train is bit-identical with and without the monitors, and what they log belongs to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.logged import loader_name
from tests.helpers import Classifier, Quiet, brute_force, csv_rows, labelled, loader, trainer, unlabelled_loader

NUM_TRAIN_BATCHES = 4
OURS = ("sensitivity", "loss_estimate", "risk_")


class Oracle(Callback):
    """Goes over the batches of each validation by a plain loop, with the weights that are in place then, and compares.

    It comes before the monitors, so that it looks at the module as it is without them.
    """

    def __init__(self) -> None:
        self.num_validations = 0
        self._changes: dict[int, list[Tensor]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._changes = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x = batch
        while not isinstance(x, Tensor):
            x = next(iter(x.values())) if isinstance(x, dict) else x[0]
        with trainer.precision_plugin.val_step_context():
            changes = brute_force(pl_module, {batch_idx: x}, loader=dataloader_idx)
        self._changes.setdefault(dataloader_idx, []).append(changes)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.num_validations += 1
        for dataloader_idx, changes in self._changes.items():
            name = loader_name("val_sensitivity", dataloader_idx, len(self._changes))
            expected = torch.cat(changes).var(correction=0).item()
            assert trainer.callback_metrics[name].item() == pytest.approx(expected, rel=1e-9)


class Setup(NamedTuple):
    """What is trained, with what, and how often validation must then run."""

    num_validations: int
    kwargs: Mapping[str, Any] = MappingProxyType({})
    module: Callable[[], Any] = Classifier
    val: Callable[[], Any] = loader
    train: Callable[[], Any] = lambda: loader(16 * NUM_TRAIN_BATCHES, seed=1)
    callbacks: Callable[[], list[Callback]] = list
    inputs: Any = None
    has_oracle: bool = True  # which would change a model that its own passes change


class Endless(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(labelled(50))


class Manual(Classifier):
    """With an optimizer for each of two layers."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.net[place].parameters(), lr=1e-2) for place in (0, 4)]


class Intrusive(Classifier):
    """Its forward draws from every random stream in eval mode, too, logs, writes into its input, and keeps a state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand()
        x.mul_(1 + 0.01 * torch.rand(1))
        self.seen += x.detach().mean()
        if not self.training:
            self.log("spread", x.std())
            self.log_dict({"mean": x.mean()})
        return super().forward(x)


class Finding(Classifier):
    """What the finders of Lightning set."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 16, 1e-2

    def train_dataloader(self) -> DataLoader:
        return loader(16 * NUM_TRAIN_BATCHES, self.batch_size, seed=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class WithoutLog(Classifier):
    """`self.log` in a compiled step fails in Lightning 2.6.6 on torch 2.13, without our callback, too."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        if self._current_fx_name not in ("training_step", "validation_step"):
            super().log(*args, **kwargs)


def averaged_weights(**kwargs: Any) -> list[Callback]:
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # Lightning 2.6 and newer
    return [module.EMAWeightAveraging(decay=0.5, **kwargs)]


def nested(batch: Any) -> Tensor:
    """The input, also of a loader of several."""
    return batch[0] if isinstance(batch[0], Tensor) else batch[0][0]


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader([loader(50), loader(20, seed=3)], mode)


SETUPS = {
    "plain": Setup(2),
    "accumulate_grad_batches, gradient_clip_val": Setup(2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
    "val_check_interval below 1": Setup(4, {"val_check_interval": 0.5}),
    "val_check_interval in batches": Setup(2, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "check_val_every_n_epoch": Setup(1, {"check_val_every_n_epoch": 2}),
    "limit_val_batches, a number": Setup(2, {"limit_val_batches": 2}),
    "limit_val_batches, a share": Setup(2, {"limit_val_batches": 0.5, "limit_train_batches": 1}),
    "fast_dev_run": Setup(1, {"fast_dev_run": 3}),
    "overfit_batches": Setup(2, {"overfit_batches": 2}),
    "no sanity check": Setup(2, {"num_sanity_val_steps": 0}),
    "max_steps in the middle of an epoch": Setup(1, {"max_steps": 6, "num_sanity_val_steps": -1}),
    "iterable data, limited to more than there is": Setup(
        2, {"limit_val_batches": 1000}, val=lambda: DataLoader(Endless(), 16)
    ),
    "iterable data": Setup(2, val=lambda: DataLoader(Endless(), 16), train=lambda: DataLoader(Endless(), 16)),
    "several loaders": Setup(2, val=lambda: [loader(50), unlabelled_loader(20, seed=3)]),
    "a dict of loaders": Setup(2, val=lambda: {"a": loader(50), "b": loader(20, seed=3)}),
    "CombinedLoader, sequential": Setup(2, val=combined("sequential")),
    "CombinedLoader, max_size_cycle": Setup(2, val=combined("max_size_cycle"), module=Quiet, inputs=nested),
    "CombinedLoader, min_size": Setup(2, val=combined("min_size"), module=Quiet, inputs=nested),
    "manual optimization, two optimizers": Setup(2, module=Manual),
    "a forward that draws, logs, writes": Setup(2, module=Intrusive, has_oracle=False),
    "deterministic, with anomaly detection": Setup(2, {"deterministic": True, "detect_anomaly": True}),
    "64-true": Setup(2, {"precision": "64-true"}),
    "bf16-mixed": Setup(2, {"precision": "bf16-mixed"}),
    "bf16-true": Setup(2, {"precision": "bf16-true"}),
    "averaged weights": Setup(2, callbacks=averaged_weights),
    "averaged weights, from the second epoch": Setup(2, callbacks=lambda: averaged_weights(update_starting_at_epoch=1)),
    # It adds an epoch for the statistics of batch norm.
    "stochastic weight averaging": Setup(
        4, {"max_epochs": 3}, callbacks=lambda: [callbacks.StochasticWeightAveraging(0.01, 1)]
    ),
    "pruning": Setup(3, {"max_epochs": 3}, callbacks=lambda: [callbacks.ModelPruning("l1_unstructured", amount=0.3)]),
    "torch.compile of the module": Setup(2, module=lambda: torch.compile(WithoutLog(), backend="eager")),
    "batch size finder": Setup(
        2, module=Finding, callbacks=lambda: [callbacks.BatchSizeFinder("power", 1, 4, max_trials=2)]
    ),
    "learning rate finder": Setup(
        2, module=Finding, callbacks=lambda: [callbacks.LearningRateFinder(num_training_steps=5)]
    ),
}


class Streams(Callback):
    """What training draws, and whether its modules are in training mode."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        draws = random.random(), np.random.rand(), torch.rand(1).item()
        self.seen.append((draws, [module.training for module in pl_module.modules()]))


def fit(setup: Setup, tmp_path: Path, ours: list[Callback]) -> tuple[Trainer, list[Any]]:
    """Train from one seed; gives the Trainer, and all that training is and has logged."""
    seed_everything(0, verbose=False)
    streams = Streams()
    run = trainer(
        callbacks=[*ours, *setup.callbacks(), streams],
        logger=CSVLogger(tmp_path, name=None),
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **setup.kwargs,
    )
    module, train, val = setup.module(), setup.train(), setup.val()
    if hasattr(module, "batch_size"):
        run.fit(module, val_dataloaders=val)
    else:
        run.fit(module, train, val)
    metrics = {name: value for name, value in run.callback_metrics.items() if not any(our in name for our in OURS)}
    has_logged = not run.fast_dev_run and Path(run.logger.log_dir, "metrics.csv").exists()
    rows = csv_rows(run.logger.log_dir) if has_logged else []
    rows = [sorted((k, v) for k, v in row.items() if v and not any(our in k for our in OURS)) for row in rows]
    rows = [row for row in rows if len(row) > 2]  # not of epoch and step alone
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    return run, [module.state_dict(), optimizers, metrics, sorted(rows), streams.seen]


@pytest.mark.filterwarnings("ignore:.*There will be no estimate")
@pytest.mark.filterwarnings("ignore:.*as learned as a whole")  # what pruning gives another name
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
@pytest.mark.parametrize("name", SETUPS)
def test_what_is_logged_is_what_a_plain_loop_gives_and_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    setup, oracle = SETUPS[name], Oracle()
    monitors = [SensitivityMonitor(inputs=setup.inputs), RiskMonitor(inputs=setup.inputs)]
    monitors.append(SensitivityMonitor(0.5, at="net", num_draws=2, prefix="b_", inputs=setup.inputs))
    run, with_monitors = fit(setup, tmp_path / "with", [*([oracle] if setup.has_oracle else []), *monitors])
    assert oracle.num_validations == setup.num_validations * setup.has_oracle
    assert any(key.startswith("val_risk_estimate") for key in run.callback_metrics)
    _, without = fit(setup, tmp_path / "without", [])
    torch.testing.assert_close(with_monitors[:3], without[:3], rtol=0, atol=0)
    assert with_monitors[3:] == without[3:]
    if not run.fast_dev_run:  # which logs nothing
        rows = csv_rows(run.logger.log_dir)
        key = next(key for key in rows[0] if key.startswith("val_sensitivity"))
        assert sum(bool(row[key]) for row in rows) == setup.num_validations  # and nothing of a finder's trials


def test_compiled_code_is_not_compiled_again_in_a_validation() -> None:
    for monitors in ([SensitivityMonitor(num_draws=2), RiskMonitor()], [SensitivityMonitor(at="net.0")]):
        torch.compiler.reset()
        compilations, model = CompileCounter(), WithoutLog()
        after_validations: list[int] = []
        model.on_validation_end = lambda: after_validations.append(compilations.frame_count)  # noqa: B023
        model.net = torch.compile(model.net, backend=compilations)
        # 64 samples: every batch has 16, so that no shape asks for code of its own.
        run = trainer(max_epochs=4, callbacks=monitors)
        run.fit(model, loader(64, seed=1), loader(64))
        _, first, *later = after_validations  # after the sanity check's
        assert first > 0 and set(later) == {first}
