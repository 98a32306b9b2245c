"""What the monitors cost, counted and never timed; examples/studies/cost has the times."""

import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import NUM_FEATURES, Quiet, Watch, fitted, labelled

NUM_BATCHES, BATCH_SIZE = 60, 100  # of 6,000 validation samples, 600 are kept


def fit(model: LightningModule, *callbacks: Any, **kwargs: Any) -> None:
    train, val = (DataLoader(labelled(n * BATCH_SIZE), BATCH_SIZE) for n in (5, NUM_BATCHES))
    fitted([*callbacks], model, train, val, **{"num_sanity_val_steps": 0, "limit_train_batches": 5, **kwargs})


NUM_KEPT, NUM_TRAINING = 6, 5  # batches
PASSES: dict[str, tuple[list[Any], int]] = {  # of a batch
    "clean and noisy": ([SensitivityMonitor()], NUM_KEPT * 2),
    "clean and three draws": ([SensitivityMonitor(num_draws=3)], NUM_KEPT * 4),
    "half of the samples": ([SensitivityMonitor(num_samples=300)], NUM_KEPT // 2 * 2),
    "clean, twin, batch statistics, training samples": ([RiskMonitor()], NUM_KEPT * 3 + NUM_TRAINING),
    "clean, twin, training samples, without batch norm": ([RiskMonitor()], NUM_KEPT * 2 + NUM_TRAINING),
    "two twins for each of three": ([RiskMonitor(num_samples=300)], NUM_KEPT // 2 * 4 + NUM_TRAINING),
    "both": ([SensitivityMonitor(), RiskMonitor()], NUM_KEPT * 5 + NUM_TRAINING),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_validation_makes_a_pass_of_a_kept_batch_for(name: str) -> None:
    (monitors, expected), model, sizes = PASSES[name], Quiet(), defaultdict[int, list[int]](list)

    def note(model: Any, args: Any) -> None:
        if model.trainer.validating:
            sizes[model.current_epoch].append(len(args[0]))

    model.register_forward_pre_hook(note)
    if "without batch norm" in name:
        model.net[1] = nn.Identity()
    fit(model, *monitors, max_epochs=3)
    assert sizes == dict.fromkeys(range(3), [BATCH_SIZE] * expected)


def touched_in(hook: str) -> list[tuple[int, int]]:
    """For which epochs and batches monitors run an operation of torch in a hook of a fit."""
    touched = set[tuple[int, int]]()

    def watch(monitor: Any) -> Any:
        original = getattr(monitor, hook)

        def watched(trainer: Trainer, module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
            with Watch(lambda *_: touched.add((trainer.current_epoch, batch_idx))):
                original(trainer, module, batch, batch_idx, *args)

        setattr(monitor, hook, watched)
        return monitor

    fit(Quiet(), watch(SensitivityMonitor()), watch(RiskMonitor()))
    return sorted(touched)


def test_ever_fewer_validation_batches_are_copied_and_only_in_the_first_validation() -> None:
    copied = [*range(8), 9, 10, 12, 13, 15, 18, 23, 26, 31, 34, 39, 47]
    assert touched_in("on_validation_batch_start") == [(0, index) for index in copied]


@pytest.mark.parametrize(("num_samples", "num_touched"), [(1000, 5), (250, 3)])
def test_training_steps_after_the_first_epoch_and_beyond_the_kept_samples_cost_nothing(
    num_samples: int, num_touched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.risk.NUM_TRAINING", num_samples)
    assert touched_in("on_train_batch_start") == [(0, index) for index in range(num_touched)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and alive, without what an operation needs in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for storage in self.storages(result) - given:  # neither a view nor in place
            if storage not in self.made:
                self.made.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def storages(self, tree: Any) -> set[Any]:
        return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}

    def add(self, num_bytes: int) -> None:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)


class PeakOfSecondValidation(Callback):
    """In the first validation, monitors keep their samples."""

    def __init__(self) -> None:
        self.bytes = LiveBytes()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.bytes.__enter__()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.bytes.__exit__(None, None, None)


@pytest.mark.parametrize("has_batch_norm", [True, False])
@pytest.mark.parametrize(("monitor", "limit"), [(SensitivityMonitor, 2.2), (RiskMonitor, 4.3)])
def test_at_the_peak_there_are_two_batches_of_outputs_and_four_for_the_risk(
    monitor: Any, limit: float, has_batch_norm: bool
) -> None:
    x, y = torch.rand(512, NUM_FEATURES), torch.randint(2**11, (512,))
    norm = nn.BatchNorm1d(NUM_FEATURES) if has_batch_norm else nn.Identity()
    model, loader = Quiet(), DataLoader(TensorDataset(x, y), 512)
    model.net = nn.Sequential(norm, nn.Linear(NUM_FEATURES, 2**11))
    with torch.no_grad(), LiveBytes() as bare:
        outputs = model(x).nbytes
    fitted([monitor(), peak := PeakOfSecondValidation()], model, loader, loader, max_epochs=2, num_sanity_val_steps=0)
    beside = x.nbytes if monitor is SensitivityMonitor else sum(weights.nbytes for weights in model.parameters())
    assert 1.0 < (peak.bytes.peak - beside - (bare.peak - outputs)) / outputs < limit
