"""Trains a run in Lightning's Trainer, never stops it, and keeps what every rule could have seen.

``train`` writes an NPZ file with an array for each column, of one number an epoch: what the monitor logged, what other
rules look at, and the truth. And the logits of the holdout samples, so that any of them can be given labels later.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from as_built import draw_as_built
from lightning.pytorch import Callback, LightningModule, Trainer
from others import averaged, disparity, evidence, in_parts, logits, trained_on_fewer
from runs import Run, draw
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lightning_sensitivity import RiskMonitor

DRAWS = {"random": draw, "as built": draw_as_built, "wide": partial(draw, wide=True)}
NUM_HOLDOUT, NUM_TEST = 500, 1000  # samples


class Classifier(LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.net = run.make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs = self(batch[0])
        loss = self.run.loss(outputs, batch[1])
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(outputs))
        return {"loss": loss, "labels": logits(self.run, outputs.detach()).argmax(1)}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # there are no labels

    def configure_optimizers(self) -> Any:
        optimizer = self.run.make_optimizer(self.parameters())
        schedule = self.run.make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        if schedule is None:
            return optimizer
        if self.run.schedule == "plateau":
            return [optimizer], [{"scheduler": schedule, "interval": "epoch", "monitor": "train_loss"}]
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Training samples that a loader takes by the batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self.x[indices], self.y[indices]]


class Shuffled(Sampler[int]):
    """A random order, which is kept for who wants to know which sample came when."""

    def __init__(self, num_samples: int, generator: torch.Generator) -> None:
        self.num_samples, self.generator = num_samples, generator

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        self.order = torch.randperm(self.num_samples, generator=self.generator)
        return iter(self.order.tolist())


def loaders(run: Run) -> list[DataLoader]:
    """Give the training loader, and that of the holdout samples."""
    generator = torch.Generator().manual_seed(run.seed)

    def collate(batch: list[Tensor]) -> list[Tensor]:
        return [run.augment(batch[0], generator), batch[1]]

    training = DataLoader(
        Samples(run.x, run.y),
        run.batch_size,
        sampler=Shuffled(len(run.x), generator),
        collate_fn=collate,
        drop_last=len(run.x) % run.batch_size == 1,  # batch norm can't take a batch of one
        generator=torch.Generator(),  # without it, loaders draw from the generator that dropout uses
    )
    holdout = TensorDataset(run.x_holdout[:NUM_HOLDOUT])
    return [training, DataLoader(holdout, -(-len(holdout) // 5), generator=torch.Generator())]


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


class Recorder(Callback):
    """Leaves one row an epoch: what was logged, what other rules would have seen, and what is true."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[dict[str, float]] = []
        self.holdout: list[Tensor] = []
        self.told: list[Tensor] = []  # labels that the model gave the samples of this epoch, in training
        self.labels: Tensor | None = None  # those of the epoch before, in the order of the samples

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = averaged(pl_module.net)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.told.append(outputs["labels"])
        self.average.update_parameters(pl_module.net)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self.run
        network = copy.deepcopy(pl_module.net).eval()  # so that nothing here can touch the training
        row = {"changed": self.changed(trainer.train_dataloader.sampler.order)}
        row |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        row |= truth(run, in_parts(network, run.x_test))
        self.holdout.append(logits(run, in_parts(network, run.x_holdout[:NUM_HOLDOUT])))
        with torch.enable_grad():
            row |= {"evidence": evidence(network, run), "disparity": disparity(network.train(), run)}
        self.rows.append(row)

    def changed(self, order: Tensor) -> float:
        """Give the share of the training samples that got another label than in the epoch before."""
        told, before = torch.cat(self.told), self.labels
        self.told, self.labels = [], torch.full((len(order),), -1)
        self.labels[order[: len(told)]] = told
        return float("nan") if before is None else float((self.labels != before).float().mean())


def train(kind: str, seed: int, data: Path | None, file: Path, epochs: int | None = None) -> None:
    """Train the run of a seed, and write its file, which is there only once the run is over."""
    torch.set_num_threads(1)  # the networks are small: several runs at a time use several cores better
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|is smaller than the logging).*")
    start, run = time.process_time(), DRAWS[kind](seed, data)
    test = {name: getattr(run, name)[:NUM_TEST] for name in ("x_test", "y_test", "y_test_noisy")}
    run = replace(run, epochs=epochs or run.epochs, **test)
    model, recorder = Classifier(run), Recorder(run)
    monitor = RiskMonitor(task="binary" if run.is_binary else "multiclass")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[monitor, recorder], **quiet)
    trainer.fit(model, *loaders(run))
    end = truth(run, in_parts(recorder.average.module.eval(), run.x_test))
    rows = [row | {f"fewer_{name}": value for name, value in truth_of.items()}
            for row, truth_of in zip(recorder.rows, trained_on_fewer(run, truth), strict=True)]  # fmt: skip
    about = {
        "pool": kind, "seed": seed, "kind": run.kind, "labels": run.labels, "n": len(run.x),
        "num_classes": run.num_classes, "weights": sum(weight.numel() for weight in model.parameters()),
        "is_augmented": run.is_augmented, "has_batch_norm": run.has_batch_norm, "is_binary": run.is_binary,
        "seconds": time.process_time() - start, **{f"averaged_{name}": value for name, value in end.items()},
    }  # fmt: skip
    columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[-1]}
    labels = {"correct": run.y_holdout[:NUM_HOLDOUT].numpy(), "noisy": run.y_holdout_noisy[:NUM_HOLDOUT].numpy()}
    holdout = torch.stack(recorder.holdout).clamp(-6e4, 6e4).half().numpy()
    part = file.with_suffix(".part.npz")
    np.savez(part, **columns, **{f"about_{name}": value for name, value in about.items()}, **labels, holdout=holdout)
    part.rename(file)
