"""What the monitors cost, counted and never timed; examples/studies/cost has the times."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import NUM_FEATURES, Quiet, Watch, fitted, labelled, quick_risk

NUM_TRAINING, NUM_VALIDATION = 850, 5930  # samples, in batches of 90, and of fewer at the end
NUM_KEPT, BATCH_SIZE = 600, 90


def fit(model: LightningModule, *callbacks: Any, **kwargs: Any) -> None:
    train, val = DataLoader(labelled(NUM_TRAINING), BATCH_SIZE), DataLoader(labelled(NUM_VALIDATION, 1), BATCH_SIZE)
    fitted([*callbacks], model, train, val, **{"num_sanity_val_steps": 0, **kwargs})


PASSES: dict[str, tuple[list[Any], int]] = {  # over how many samples a validation runs the model, but for a last batch
    "kept samples, clean and noisy": ([SensitivityMonitor()], 2 * NUM_KEPT),
    "kept samples, clean and with three draws": ([SensitivityMonitor(num_draws=3)], 4 * NUM_KEPT),
    "half of the samples": ([SensitivityMonitor(num_samples=300)], NUM_KEPT),
    "kept samples": ([quick_risk()], NUM_KEPT),
    "both": ([SensitivityMonitor(), quick_risk()], 3 * NUM_KEPT),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_validation_runs_the_model_on(name: str) -> None:
    (monitors, num_samples), model, counts = PASSES[name], Quiet(), Counter[int]()

    def note(model: Any, args: Any) -> None:
        if model.trainer.validating:
            counts[model.current_epoch] += len(args[0])

    model.register_forward_pre_hook(note)
    fit(model, *monitors, max_epochs=2)
    first, second = counts[0], counts[1]
    # Shares are rounded up.
    assert num_samples <= second <= 1.07 * num_samples and second <= first <= second + NUM_KEPT * len(monitors)


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

    fit(Quiet(), watch(SensitivityMonitor()), watch(quick_risk()))
    return sorted(touched)


def test_ever_fewer_validation_batches_are_copied_and_only_in_the_first_validation() -> None:
    touched = touched_in("on_validation_batch_start")
    assert {epoch for epoch, _ in touched} == {0} and len(touched) < 50  # of 66
    assert sum(index >= 33 for _, index in touched) < 18


def test_training_steps_after_the_first_epoch_cost_nothing() -> None:
    assert {epoch for epoch, _ in touched_in("on_train_batch_start")} == {0}


class LiveBytes(Watch):
    """Counts the bytes of the tensors that are made inside and alive, without what an operation needs in itself."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.alive = self.peak = 0
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        for storage in self.storages(result) - self.storages((args, kwargs)):  # neither a view nor in place
            if storage not in self.made:
                self.made.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())

    def storages(self, tree: Any) -> set[Any]:
        return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}

    def add(self, num_bytes: int) -> None:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)


@pytest.mark.filterwarnings("ignore:.*1020 are the class of none of 512")
@pytest.mark.parametrize(("monitor", "limit"), [(SensitivityMonitor, 2.2), (RiskMonitor, 17)])
def test_at_the_peak_there_are_two_batches_of_outputs_and_sixteen_for_the_risk(monitor: Any, limit: float) -> None:
    # Predictions of network and reference, and their differences, are in 64 bits.
    x = torch.rand(512, NUM_FEATURES)
    model, loader = Quiet(), DataLoader(labelled(512), 512)
    model.net = nn.Sequential(nn.BatchNorm1d(NUM_FEATURES), nn.Linear(NUM_FEATURES, 2**10))
    with torch.no_grad(), LiveBytes() as bare:
        outputs = model(x).nbytes
    second = LiveBytes()  # of the second validation; in the first one, monitors keep their samples
    watch = LambdaCallback(
        on_validation_start=lambda trainer, module: trainer.current_epoch == 1 and second.__enter__(),
        on_validation_end=lambda trainer, module: trainer.current_epoch == 1 and second.__exit__(None, None, None),
    )
    fitted([monitor(), watch], model, loader, DataLoader(x, 512), max_epochs=2, num_sanity_val_steps=0)
    assert 1.0 < (second.peak - x.nbytes - (bare.peak - outputs)) / outputs < limit
