"""What the monitor keeps, and what it holds at most, in bytes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.readings import LoaderStatistics
from tests.helpers import trainer

BATCH, FEATURES, CLASSES = 64, 4000, 10
INPUTS = BATCH * FEATURES * 4  # bytes of a batch; its outputs, and the weights, are small beside it


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._sizes: dict[int, int] = {}
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_pointer(tensor) for tensor in tree_leaves((args, kwargs or {})) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (_pointer(tensor) in self._sizes or _pointer(tensor) not in inputs):
                key = _pointer(tensor)
                self._sizes[key] = tensor.untyped_storage().nbytes()
                self._owners[key] = self._owners.get(key, 0) + 1
                weakref.finalize(tensor, self._drop, key)
        self.most = max(self.most, sum(self._sizes.values()))
        return result

    def _drop(self, key: int) -> None:
        self._owners[key] -= 1
        if self._owners[key] == 0:
            del self._owners[key], self._sizes[key]


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Model(LightningModule):
    """Its activations are small: what counts are the batches."""

    def __init__(self, is_reused: bool) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)
        self.is_reused = is_reused

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.is_reused:
            self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Watch(Callback):
    """Around the hooks of the others: first in the list for the start of a batch, and last for its end."""

    def __init__(self) -> None:
        self.most: list[int] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode = Alive()
        self.mode.__enter__()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode.__exit__(None, None, None)
        self.most.append(self.mode.most)


def most_bytes(monitors: list[SensitivityMonitor], num_batches: int = 3, is_reused: bool = True) -> int:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(BATCH * num_batches, FEATURES), torch.zeros(BATCH * num_batches, dtype=torch.long))
    loader, watch = DataLoader(data, BATCH), Watch()
    run = trainer(callbacks=[watch, *monitors], max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0)
    run.fit(Model(is_reused), loader, loader)
    return watch.most[0]


@pytest.mark.parametrize("is_reused", [True, False])
def test_at_most_one_batch_of_inputs_more_whatever_the_number_of_draws(is_reused: bool) -> None:
    plain = most_bytes([], is_reused=is_reused)
    assert plain >= INPUTS
    extra = [
        most_bytes([SensitivityMonitor(task=None, num_draws=num_draws)], num_batches, is_reused) - plain
        for num_draws, num_batches in ((1, 3), (8, 3), (8, 6))
    ]
    # The noisy batch; outputs and sums on top. (The copy of the batch, which the step may write into, finds room where
    # the loader has put the samples together.)
    assert 0 < extra[0] <= 1.05 * INPUTS
    assert extra[1] <= 1.02 * extra[0]
    assert extra[2] <= 1.02 * extra[0]


def test_the_state_is_a_few_numbers() -> None:
    statistics = LoaderStatistics("a loader", None)
    for _ in range(3):
        statistics.update(torch.randn(1000, CLASSES), torch.randn(1000, CLASSES))
    states = [getattr(statistics, name) for name in statistics._defaults]
    assert sum(state.numel() * state.itemsize for state in states) == 8 * (5 * 3 + 10 + 3 + 6)
