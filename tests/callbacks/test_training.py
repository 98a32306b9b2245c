"""Every way to train is bit-identical with and without the monitors, and what they log belongs to it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.compat import num_loaders
from tests.helpers import Classifier, Quiet, Stream, brute_force, csv_rows, first_tensor, loader, quick_risk, trainer
from tests.helpers import unlabelled_loader as unlabelled

NUM_TRAIN_BATCHES = 4


class Oracle(cb.Callback):
    """Goes over the batches of each validation by a plain loop, with the weights that are in place then, and compares.

    It comes before the monitors, so that it looks at the module as it is without them. Monitors measure the batches of
    the first validation, which are the same in all validations here.
    """

    def __init__(self) -> None:
        self.num_validations = 0
        self._changes: dict[int, list[Tensor]] = {}

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, idx: int, dataloader_idx: int = 0
    ) -> None:
        with trainer.precision_plugin.val_step_context():
            changes = brute_force(pl_module, {idx: first_tensor(batch)}, loader=dataloader_idx)
        self._changes.setdefault(dataloader_idx, []).append(changes)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by_loader, self._changes = self._changes, {}
        if trainer.sanity_checking:
            return
        self.num_validations += 1
        assert len(by_loader) == num_loaders(trainer)
        for dataloader_idx, changes in by_loader.items():
            name = "val/output_sensitivity" + f"/dataloader_idx_{dataloader_idx}" * (len(by_loader) > 1)
            expected = torch.cat(changes).var(correction=0).item()
            assert trainer.callback_metrics[name].item() == pytest.approx(expected, rel=1e-5)


class Setup(NamedTuple):
    """What is trained, with what, and how often it is validated."""

    num_validations: int
    kwargs: Any = None
    module: Callable[[], Any] = Classifier
    val: Callable[[], Any] = loader
    train: Callable[[], Any] = lambda: loader(16 * NUM_TRAIN_BATCHES, seed=1)
    more: Callable[[], list[cb.Callback]] = list
    inputs: Any = None


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
    """Its forward draws from every random stream in eval mode, too, logs, and writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        drawing(x)
        x.mul_(1 + 0.01 * torch.rand(1))
        if not self.training:
            self.log("spread", x.std())
            self.log_dict({"mean": x.mean()})
        return super().forward(x)


class Finding(Classifier):
    """What the finders of Lightning set."""

    batch_size = 16

    def train_dataloader(self) -> DataLoader:
        return loader(16 * NUM_TRAIN_BATCHES, self.batch_size, seed=1)


class WithoutLog(Quiet):
    """`self.log` in a compiled step fails in Lightning 2.6.6 on torch 2.13, without our callback, too."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


def compiled(kind: Any, path: str, **options: Any) -> Any:
    """A module of which the forward of a part is compiled, with a counter of that."""
    torch.compiler.reset()
    module = kind()
    module.counter, owner = CompileCounter(), module.get_submodule(path)
    owner.forward = torch.compile(owner.forward, backend=module.counter, **options)
    return module


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader([loader(50), loader(20, seed=3)], mode)


def drawing(batch: Any) -> Tensor:
    """Inputs and features, by a function that draws from every random stream."""
    random.random(), np.random.rand(), torch.rand(1)
    return first_tensor(batch)


def averaged_weights() -> list[cb.Callback]:
    module = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # Lightning 2.6 and newer
    return [module.EMAWeightAveraging(decay=0.5, update_starting_at_epoch=1)]


def stream(seed: int = 0) -> DataLoader:
    return DataLoader(Stream(has_labels=True, seed=seed), 16)


SETUPS = {
    "plain": Setup(2),
    "accumulate_grad_batches, gradient_clip_val": Setup(2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
    "val_check_interval in batches": Setup(2, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "check_val_every_n_epoch": Setup(1, {"check_val_every_n_epoch": 2}),
    "overfit_batches": Setup(2, {"overfit_batches": 2}),
    "max_steps in the middle of an epoch": Setup(1, {"max_steps": 6, "num_sanity_val_steps": -1}),
    "iterable data": Setup(2, val=stream, train=lambda: stream(seed=1)),
    "several loaders": Setup(2, val=lambda: [loader(50), unlabelled(20, seed=3)]),
    "CombinedLoader, max_size_cycle": Setup(2, val=combined("max_size_cycle"), module=Quiet, inputs=first_tensor),
    "functions of the user that draw": Setup(2, inputs=drawing),
    "manual optimization, two optimizers": Setup(2, module=Manual),
    "a forward that draws, logs, writes": Setup(2, module=Intrusive),
    "bf16-mixed": Setup(2, {"precision": "bf16-mixed"}),
    "averaged weights, from the second epoch": Setup(2, more=averaged_weights),
    # It adds an epoch for the statistics of batch norm.
    "stochastic weight averaging": Setup(4, {"max_epochs": 3}, more=lambda: [cb.StochasticWeightAveraging(0.01, 1)]),
    "pruning": Setup(3, {"max_epochs": 3}, more=lambda: [cb.ModelPruning("l1_unstructured", amount=0.3)]),
    "torch.compile of the module": Setup(2, module=lambda: torch.compile(WithoutLog(), backend="eager")),
    "a compiled forward": Setup(2, module=lambda: compiled(Quiet, "net")),
    "a compiled layer as one graph": Setup(2, module=lambda: compiled(Quiet, "net.0", fullgraph=True)),
    "batch size finder": Setup(2, module=Finding, more=lambda: [cb.BatchSizeFinder("power", 1, 4, max_trials=2)]),
    "learning rate finder": Setup(2, module=Finding, more=lambda: [cb.LearningRateFinder(num_training_steps=5)]),
}


LONG = ("torch.compile of the module", "a compiled forward", "stochastic weight averaging", "batch size finder")


def observed(module: Any) -> Any:
    """What training draws, whether its modules are in training mode, and what was compiled."""
    num_compiled = module.counter.frame_count if hasattr(module, "counter") else 0
    draws = random.random(), np.random.rand(), torch.rand(1).item()
    return draws, [each.training for each in module.modules()], num_compiled


def is_ours(name: str) -> bool:
    return "sensitivity" in name or "expected_" in name


def fit(setup: Setup, tmp_path: Path, ours: list[cb.Callback]) -> tuple[Trainer, list[Any], list[Any]]:
    """Train from one seed; gives the Trainer, the rows of its log, and all that training is and has logged."""
    watch, seen, logger, module = cb.Callback(), list[Any](), CSVLogger(tmp_path, name=None), setup.module()
    watch.on_train_batch_end = lambda *_: seen.append(observed(module))
    options = {"default_root_dir": tmp_path, "log_every_n_steps": 1, **(setup.kwargs or {})}
    train = None if isinstance(module, Finding) else setup.train()
    run = trainer(callbacks=[*ours, *setup.more(), watch], logger=logger, **options)
    run.fit(module, train, setup.val())
    rows = csv_rows(logger.log_dir) if Path(logger.log_dir, "metrics.csv").exists() else []
    theirs = [sorted((k, v) for k, v in row.items() if v and not is_ours(k)) for row in rows]
    theirs = sorted(row for row in theirs if len(row) > 2)  # not of epoch and step alone
    metrics = {name: value for name, value in run.callback_metrics.items() if not is_ours(name)}
    states = [each.state_dict() for each in (module, *run.optimizers)]
    return run, rows, [states, metrics, theirs, seen]


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.long] * (each in LONG)) for each in SETUPS])
def test_what_is_logged_is_what_a_plain_loop_gives_and_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    setup, oracle = SETUPS[name], Oracle()
    has_oracle = setup.module is not Intrusive and "compiled" not in name  # it isolates nothing, and would compile
    monitors = [SensitivityMonitor(inputs=setup.inputs)]
    monitors.append(quick_risk(inputs=setup.inputs, features=setup.inputs))
    monitors.append(SensitivityMonitor(0.5, at="net", num_draws=2, prefix="b_", inputs=setup.inputs))
    run, rows, with_monitors = fit(setup, tmp_path / "with", [*[oracle] * has_oracle, *monitors])
    assert oracle.num_validations == setup.num_validations * has_oracle
    assert any(key.startswith("val/expected_loss") for key in run.callback_metrics)
    *_, without = fit(setup, tmp_path / "without", [])
    torch.testing.assert_close(with_monitors[:2], without[:2], rtol=0, atol=0)
    assert with_monitors[2:] == without[2:]
    assert (without[-1][-1][-1] > 0) == ("compiled" in name)
    key = next(key for key in rows[0] if key.startswith("val/output_sensitivity"))
    assert sum(bool(row[key]) for row in rows) == setup.num_validations  # and nothing of a finder's trials
