"""Measures a kept training by the real callback, as if it had been there.

A *replay* is a fit of the real Trainer with the real callback: the same network, the same loaders with the same random
numbers, but steps that learn nothing. At the end of each training epoch, before its validation, the weights of that
epoch are loaded. So the callback sees what it would have seen, and logs the same values to the last digit (a test of
`tests/test_examples.py` compares them).
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetuning import frozen_body
from lightning.pytorch import Callback, LightningModule, Trainer
from pools import DRAWS
from runs import Run, logits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import QUIET, Samples, be_quiet, split, training_loader

from lightning_sensitivity import RiskMonitor

NUM_HOLDOUT, NUM_TEST = 600, 1000  # samples
BATCH_SIZE = 120  # of validation
NO_LABEL = -100


class Replay(LightningModule):
    """Has the weights of a kept training, epoch by epoch."""

    def __init__(self, run: Run, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.run, self.weights = run, weights
        self.net = run.make_network()
        self._load(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 0:  # a monitor may look at the first step
            return self.run.loss(self(batch[0]), batch[1])
        return 0 * next(weight for weight in self.parameters() if weight.requires_grad).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_last_batch:
            self._load(self.current_epoch + 1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # most samples have no labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)  # does nothing, but counts steps

    def _load(self, index: int) -> None:
        self.net.load_state_dict({name: values[index] for name, values in self.weights.items()})


class Recorder(Callback):
    """Leaves one row an epoch: what was logged, and what is true; and the logits of some samples."""

    def __init__(self, run: Run, x_kept: Tensor) -> None:
        self.run, self.x_kept = run, x_kept
        self.rows: list[dict[str, float]] = []
        self.kept: list[Tensor] = []
        self.first_order = torch.empty(0)  # of the training samples, in the first epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.first_order = trainer.train_dataloader.sampler.order.clone()
        network = pl_module.net.eval()
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append(logged | truth(self.run, in_parts(network, self.run.x_test)))
        self.kept.append(logits(self.run, in_parts(network, self.x_kept)))
        network.train()

    def logits(self) -> np.ndarray:
        """Give the logits of the samples in each epoch, in half the size."""
        return torch.stack(self.kept).clamp(-6e4, 6e4).half().numpy()


class ClosingLines(logging.Handler):
    """Collects the last lines of monitors, in the order of the callbacks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def emit(self, record: logging.LogRecord) -> None:
        if " was lowest at epoch " in record.getMessage():
            self.lines.append(record.getMessage())

    def __enter__(self) -> ClosingLines:
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *args: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(logging.ERROR)


def in_parts(network: Any, x: Tensor) -> Tensor:
    """Give the outputs for many samples, a part at a time, without a graph."""
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(250)])


def truth(run: Run, outputs: Tensor) -> dict[str, float]:
    """Score outputs for the test samples, by correct labels and by noisy ones.

    The true score is what is estimated: the Brier score of labels as noisy as training's. Where chance made them noisy,
    it is the expected one.
    """
    found = logits(run, outputs)
    p, y, noisy = found.softmax(1), run.y_test, run.y_test_noisy
    squares = p.square().sum(1)
    people_said = p.gather(1, noisy[:, None])[:, 0]
    agreement = people_said if run.chances is None else (p * run.chances[y]).sum(1)
    return {
        "accuracy": float((p.argmax(1) == y).float().mean()),
        "loss": float(cross_entropy(found, y)),
        "true_score": float((1 + squares - 2 * agreement).mean()) / (1 + run.is_binary),  # as the package scores it
    }


# %% Replays.
def replayed(run: Run, weights: dict[str, Tensor], monitors: list[Callback], x: Tensor, y: Tensor) -> Recorder:
    """Replay a kept training with monitors and these validation samples; see the module."""
    recorder = Recorder(run, x)
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[*monitors, recorder], **QUIET)
    validation = DataLoader(Samples(x, y), BATCH_SIZE, collate_fn=list, generator=torch.Generator())
    trainer.fit(Replay(run, weights), training_loader(run), validation)
    return recorder


def measure(pool: str, seed: int, data: Path | None, folder: Path) -> None:
    """Replay both trainings of a run, and leave what every rule could have seen, and the truth, in one file."""
    be_quiet()
    run = DRAWS[pool](seed, data)
    kept, fewer = (torch.load(folder / f"{name}.pt") for name in ("full", "fewer"))
    test = {name: getattr(run, name)[:NUM_TEST] for name in ("x_test", "y_test", "y_test_noisy")}
    network = run.make_network()
    run = replace(run, epochs=len(kept["rows"]), make_network=lambda: copy.deepcopy(network), **test)
    options: dict[str, Any] = {"task": "binary" if run.is_binary else "multiclass"}
    monitors = [RiskMonitor(**options)]
    if pool == "fine-tuning":
        assert data is not None
        body = frozen_body(seed, data)
        monitors = [
            RiskMonitor(**options, features=lambda batch: body(batch[0])),
            RiskMonitor(**options, prefix="raw_"),
        ]
    x = run.x_holdout[:NUM_HOLDOUT]
    with ClosingLines() as closing:
        full = replayed(run, kept["weights"], monitors, x, torch.full((len(x),), NO_LABEL))

    rest, x_held, y_held = split(run)
    y = torch.cat([y_held, torch.full((len(x),), NO_LABEL)])
    held_monitors = [RiskMonitor(**options, validation_labels=True)]
    if pool == "fine-tuning":
        held_monitors = [RiskMonitor(**options, validation_labels=True, features=lambda batch: body(batch[0]))]
    part = replayed(rest, fewer["weights"], held_monitors, torch.cat([x_held, x]), y)

    columns = in_columns([one | other for one, other in zip(kept["rows"], full.rows, strict=True)])
    columns |= {f"fewer_{name}": values for name, values in in_columns(part.rows).items()}
    columns |= {"holdout": full.logits(), "fewer_held": part.logits()[:, : len(x_held)], "held_labels": y_held.numpy()}
    columns |= {"correct": run.y_holdout[: len(x)].numpy(), "noisy": run.y_holdout_noisy[: len(x)].numpy()}
    columns["closing"] = np.array(closing.lines)
    columns |= {f"about_{name}": value for name, value in about(pool, run).items()}
    np.savez(folder / "part.npz", **columns)
    (folder / "part.npz").rename(folder / "curves.npz")


def in_columns(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[-1]}


def about(pool: str, run: Run) -> dict[str, Any]:
    """Tell what a run is."""
    assert run.y_correct is not None
    weights = list(run.make_network().parameters())
    return {
        "pool": pool, "seed": run.seed, "kind": run.kind, "labels": run.labels, "n": len(run.x),
        "num_classes": run.num_classes, "weights": sum(weight.numel() for weight in weights),
        "has_frozen_body": not all(weight.requires_grad for weight in weights),
        "is_augmented": run.is_augmented, "has_batch_norm": run.has_batch_norm, "is_binary": run.is_binary,
        "share_wrong": float((run.y != run.y_correct).float().mean()),
    }  # fmt: skip
