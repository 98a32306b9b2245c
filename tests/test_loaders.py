"""How many batches each loader has, as Lightning counts and names them."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_sensitivity.loaders import loader_name, num_batches, without_loader
from tests.helpers import Classifier, loader, trainer

STAGES = ["sanity check", "fit", "validate", "test"]


class Model(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("seen", 1.0, batch_size=1)

    test_step = validation_step


class Count(Callback):
    """What is said at the start of an epoch, and how many batches came."""

    def __init__(self) -> None:
        self.epochs: list[tuple[list[float], list[int]]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        said = num_batches(trainer)
        self.epochs.append((said, [0] * len(said)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.epochs[-1][1][dataloader_idx] += 1

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end


@pytest.mark.parametrize("mode", [None, "sequential", "min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("stage", STAGES)
def test_as_many_batches_come_as_are_said(stage: str, mode: str | None) -> None:
    loaders = [loader(50), loader(20, seed=3)]  # of 4 and 2 batches
    val = loaders if mode is None else CombinedLoader(loaders, mode)
    count = Count()
    run = trainer(callbacks=[count], max_epochs=1, num_sanity_val_steps=1 if stage == "sanity check" else 0)
    if stage in ("sanity check", "fit"):
        run.fit(Model(), loader(), val)
    else:
        getattr(run, stage)(Model(), val, verbose=False)
    for said, came in count.epochs:
        assert said == came
    expected = [4, 2] if mode in (None, "sequential") else [2] if mode == "min_size" else [4]
    assert count.epochs[-1][0] == expected
    names = {loader_name("seen", idx, len(expected)) for idx in range(len(expected))}
    assert names == {name for name in run.callback_metrics if name.startswith("seen")}
    assert {without_loader(name) for name in names} == {"seen"}
