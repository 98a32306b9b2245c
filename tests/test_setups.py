"""Every way to train: what is logged is what a plain loop over the same batches, weights and noise gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import noise_generator
from tests.helpers import Classifier, csv_rows, labelled, loader, trainer, unlabelled_loader

NUM_TRAIN_BATCHES = 4


def first_tensor(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


class Oracle(Callback):
    """Goes over the batches of each validation by a plain loop, with the weights that are in place then, and compares.

    It comes before the monitor in the list, so that it looks at the module as it is without it.
    """

    def __init__(self) -> None:
        self.num_validations = 0
        self.num_batches = 0
        self._changes: dict[int, list[Tensor]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._changes = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert not pl_module.training
        self.num_batches += not trainer.sanity_checking
        x = first_tensor(batch).clone()
        at = self._changes.setdefault(dataloader_idx, [])
        at.append(_changes(pl_module, x, trainer.global_rank, dataloader_idx, batch_idx))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.num_validations += 1
        metrics = trainer.callback_metrics
        for dataloader_idx, changes in self._changes.items():
            name = "val_sensitivity" + (f"/dataloader_idx_{dataloader_idx}" if len(self._changes) > 1 else "")
            expected = torch.cat(changes).var(unbiased=False)
            assert metrics[name].item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def _changes(model: Any, x: Tensor, *key: int) -> Tensor:
    noise = torch.randn(x.shape, generator=noise_generator(0, *key))
    return (model(x + 0.1 * noise).double() - model(x).double()).mean(1)


class Setup(NamedTuple):
    """What is trained, with what, and how often validation must then run."""

    num_validations: int
    kwargs: Mapping[str, Any] = MappingProxyType({})
    module: Callable[[], Any] = Classifier
    val: Callable[[], Any] = loader
    train: Callable[[], Any] = lambda: loader(16 * NUM_TRAIN_BATCHES, seed=1)
    callbacks: Callable[[], list[Callback]] = list
    has_risk: bool = True


class Endless(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(labelled(50))


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Adversarial(LightningModule):
    """Two networks and two optimizers; ``forward`` is the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))
        self.critic = nn.Linear(12, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer, sign in ((first, 1), (second, -1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self(batch)).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.critic)]


class Frozen(Classifier):
    """The first layers are frozen, and stay in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.net[:2]:
            part.requires_grad_(False).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert not self.net[1].training
        return super().training_step(batch, batch_idx)


class LateBuilt(Classifier):
    """Has no layers until Lightning asks for them."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Classifier().net


class Reloading(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(16 * NUM_TRAIN_BATCHES, seed=1)

    def val_dataloader(self) -> DataLoader:
        return loader(seed=self.trainer.current_epoch)


class Quiet(Classifier):
    """Validates nothing: a batch of a combined loader is a list of batches."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader([loader(50), loader(20, seed=3)], mode)


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
        if self._current_fx_name != "training_step" and self._current_fx_name != "validation_step":
            super().log(*args, **kwargs)


class Compiled(Classifier):
    """A submodule is compiled; without code generation, which takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def averaged_weights(**kwargs: Any) -> list[Callback]:
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # Lightning 2.6 and newer
    return [module.EMAWeightAveraging(decay=0.5, **kwargs)]


SETUPS = {
    "plain": Setup(2),
    "accumulate_grad_batches": Setup(2, {"accumulate_grad_batches": 2}),
    "gradient_clip_val": Setup(2, {"gradient_clip_val": 0.01}),
    "val_check_interval below 1": Setup(4, {"val_check_interval": 0.5}),
    "val_check_interval in batches": Setup(2, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "check_val_every_n_epoch": Setup(1, {"check_val_every_n_epoch": 2}),
    "limit_val_batches, a number": Setup(2, {"limit_val_batches": 2}),
    "limit_val_batches, a share": Setup(2, {"limit_val_batches": 0.5}),
    "limit_train_batches": Setup(2, {"limit_train_batches": 1}),
    "fast_dev_run": Setup(1, {"fast_dev_run": True}),
    "fast_dev_run of several batches": Setup(1, {"fast_dev_run": 3}),
    "overfit_batches": Setup(2, {"overfit_batches": 2}),
    "no sanity check": Setup(2, {"num_sanity_val_steps": 0}),
    "a sanity check of everything": Setup(2, {"num_sanity_val_steps": -1}),
    "max_steps in the middle of an epoch": Setup(1, {"max_steps": 6}),
    "iterable data without a length": Setup(2, val=lambda: DataLoader(Endless(), 16)),
    "iterable data for training": Setup(2, train=lambda: DataLoader(Endless(), 16)),
    "several loaders": Setup(2, val=lambda: [loader(50), unlabelled_loader(20, seed=3)]),
    "a dict of loaders": Setup(2, val=lambda: {"a": loader(50), "b": loader(20, seed=3)}),
    "CombinedLoader, sequential": Setup(2, val=combined("sequential")),
    "CombinedLoader, max_size_cycle": Setup(2, val=combined("max_size_cycle"), module=Quiet),
    "CombinedLoader, min_size": Setup(2, val=combined("min_size"), module=Quiet),
    "reload_dataloaders_every_n_epochs": Setup(2, {"reload_dataloaders_every_n_epochs": 1}, train=Reloading),
    "manual optimization": Setup(2, module=Manual),
    "two optimizers": Setup(
        2, module=Adversarial, has_risk=False, train=lambda: unlabelled_loader(64, seed=1), val=unlabelled_loader
    ),
    "frozen layers in eval mode": Setup(2, module=Frozen),
    "configure_model": Setup(2, module=LateBuilt),
    "anomaly detection": Setup(2, {"detect_anomaly": True}),
    "deterministic": Setup(2, {"deterministic": True}),
    "double precision": Setup(2, {"precision": "64-true"}),
    "averaged weights": Setup(2, callbacks=averaged_weights),
    "averaged weights, from the second epoch": Setup(2, callbacks=lambda: averaged_weights(update_starting_at_epoch=1)),
    # It adds an epoch for the statistics of batch norm.
    "stochastic weight averaging": Setup(4, {"max_epochs": 3}, callbacks=lambda: [StochasticWeightAveraging(0.01, 1)]),
    "pruning": Setup(3, {"max_epochs": 3}, callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.3)]),
    "torch.compile of the module": Setup(2, module=lambda: torch.compile(WithoutLog(), backend="eager")),
    "torch.compile of a submodule": Setup(2, module=Compiled),
    "batch size finder": Setup(2, module=Finding, callbacks=lambda: [BatchSizeFinder("power", 1, 4, max_trials=2)]),
    "learning rate finder": Setup(2, module=Finding, callbacks=lambda: [LearningRateFinder(num_training_steps=5)]),
}


def fit(setup: Setup, tmp_path: Path, callbacks: list[Callback]) -> tuple[Trainer, dict[str, Tensor]]:
    """Train from one seed; gives the Trainer and the final weights."""
    torch.manual_seed(0)
    run = trainer(
        callbacks=[*callbacks, *setup.callbacks()],
        logger=CSVLogger(tmp_path, name=None),
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **setup.kwargs,
    )
    module, train, val = setup.module(), setup.train(), setup.val()
    if isinstance(train, LightningDataModule):
        run.fit(module, datamodule=train)
    elif hasattr(module, "batch_size"):
        run.fit(module, val_dataloaders=val)
    else:
        run.fit(module, train, val)
    return run, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:There will be no risk estimate")
@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
@pytest.mark.parametrize("name", SETUPS)
def test_what_is_logged_is_what_a_plain_loop_gives_and_training_is_the_same(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    oracle, monitor = Oracle(), SensitivityMonitor()
    run, weights = fit(setup, tmp_path / "with", [oracle, monitor])
    assert oracle.num_validations == setup.num_validations
    assert oracle.num_batches >= setup.num_validations
    assert any(name.startswith("val_risk_estimate") for name in run.callback_metrics) == setup.has_risk

    run_without, weights_without = fit(setup, tmp_path / "without", [])
    torch.testing.assert_close(weights, weights_without, rtol=0, atol=0)
    ours = {name for name in run.callback_metrics if name.startswith(("val_risk", "val_sensitivity", "val_loss_est"))}
    assert {name: v for name, v in run.callback_metrics.items() if name not in ours} == run_without.callback_metrics
    if not run.fast_dev_run:  # which logs nothing
        rows = csv_rows(run.logger.log_dir)
        name = next(name for name in rows[0] if name.startswith("val_sensitivity"))
        assert sum(bool(row[name]) for row in rows) == setup.num_validations  # and nothing of a finder's trials


class Compilations(Callback):
    """A backend of torch.compile that counts, and how many compilations each validation ended with."""

    def __init__(self) -> None:
        self.count = 0
        self.after_validations: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        self.count += 1
        return graph.forward

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_validations.append(self.count)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("monitor", [{}, {"num_draws": 3}, {"at": "net.0", "task": None}])
def test_compiled_code_is_not_compiled_again_in_a_validation(whole: bool, monitor: dict[str, Any]) -> None:
    counts = {}
    for is_monitored in (False, True):
        torch.compiler.reset()
        compilations = Compilations()
        model: Any = WithoutLog()
        if whole:
            model = torch.compile(model, backend=compilations)
        else:
            model.net = torch.compile(model.net, backend=compilations)
        monitors = [SensitivityMonitor(**monitor)] if is_monitored else []
        # 64 samples: every batch has 16, so that no shape asks for code of its own.
        run = trainer(max_epochs=4, callbacks=[compilations, *monitors])
        run.fit(model, loader(64, seed=1), loader(64))
        _, first, *later = compilations.after_validations  # after the sanity check's
        assert set(later) == {first}
        counts[is_monitored] = first
    # Steps of our own run outside of the compiled `validation_step`, in which the module's code is inlined.
    assert counts[True] <= counts[False] + 2
