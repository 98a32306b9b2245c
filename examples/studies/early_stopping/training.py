"""Trains a run in Lightning's Trainer, never stops it, and writes down what every rule could have seen.

``train`` writes a CSV file with a row an epoch: what the monitors logged, what other rules look at, and the truth.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from runs import Run, augmented, draw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

RIGHT_COUNTS = (10, 20, 50, 100, 200)  # of labels, right ones, by which an epoch is chosen
WRONG_COUNTS = (*RIGHT_COUNTS, 1000)  # of labels that are as wrong as those of training
NUM_SUBSETS = 20  # of test samples, for each count
NUM_FITTED = 500  # training samples that are scored as the network is after an epoch


class Classifier(LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.net = run.make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch[0])
        loss = cross_entropy(logits, batch[1])
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(logits))
        return {"loss": loss, "labels": logits.detach().argmax(1)}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # there are no labels

    def configure_optimizers(self) -> Any:
        optimizer = self.run.make_optimizer(self.parameters())
        if not self.run.is_augmented:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
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
        return [augmented(batch[0], generator), batch[1]] if run.is_augmented else batch

    training = DataLoader(
        Samples(run.x, run.y),
        run.batch_size,
        sampler=Shuffled(len(run.x), generator),
        collate_fn=collate,
        drop_last=len(run.x) % run.batch_size == 1,  # batch norm can't take a batch of one
        generator=torch.Generator(),  # without it, loaders draw from the generator that dropout uses
    )
    return [training, DataLoader(TensorDataset(run.x_holdout), 100, generator=torch.Generator())]


class Recorder(Callback):
    """Leaves one row an epoch: what was logged, what other rules would have seen, and what is true."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[dict[str, float]] = []
        self.told: list[Tensor] = []  # labels that the model gave the samples of this epoch, in training
        self.labels: Tensor | None = None  # those of the epoch before, in the order of the samples
        r = np.random.RandomState((run.seed, 2))
        num_test = len(run.y_test)
        self.subsets = {
            count: torch.tensor(np.stack([r.permutation(num_test)[:count] for _ in range(NUM_SUBSETS)]))
            for count in WRONG_COUNTS
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.told.append(outputs["labels"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "changed": self.changed(trainer.train_dataloader.sampler.order)}
        row |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        network = copy.deepcopy(pl_module.net)  # so that nothing here can touch the training
        row |= self.truth(network.eval()) | {"evidence": evidence(network, self.run)}
        self.rows.append(row | {"disparity": disparity(network.train(), self.run)})

    def changed(self, order: Tensor) -> float:
        """Give the share of the training samples that got another label than in the epoch before."""
        told, before = torch.cat(self.told), self.labels
        self.told, self.labels = [], torch.full((len(order),), -1)
        self.labels[order[: len(told)]] = told
        return float("nan") if before is None else float((self.labels != before).float().mean())

    def truth(self, network: nn.Module) -> dict[str, float]:
        """Score the test samples, all of them and random subsets, by right labels and by wrong ones."""
        run = self.run
        with torch.no_grad():
            logits = torch.cat([network(x) for x in run.x_test.split(500)])
            fitted_loss = cross_entropy(network(run.x[:NUM_FITTED]), run.y[:NUM_FITTED])
        right, wrong = run.y_test, run.y_test_wrong
        row = {
            "test_loss": float(cross_entropy(logits, right)),
            "test_accuracy": float((logits.argmax(1) == right).float().mean()),
            "wrong_loss": float(cross_entropy(logits, wrong)),
            "wrong_brier": float((logits.softmax(1) - one_hot(wrong, run.num_classes)).square().sum(1).mean()),
            "fitted_loss": float(fitted_loss),
        }
        for name, labels, counts in (("right", right, RIGHT_COUNTS), ("wrong", wrong, WRONG_COUNTS)):
            losses = cross_entropy(logits, labels, reduction="none")
            for count in counts:
                means = losses[self.subsets[count]].mean(1).tolist()
                row |= {f"{name}_{count}_{index}": mean for index, mean in enumerate(means)}
        return row


# %% What other rules look at: gradients of the whole network, on a few training samples that stay the same.
def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(network.parameters()))])


def disparity(network: nn.Module, run: Run) -> float:
    """Give the mean distance between the gradients of five batches (Forouzesh & Thiran, ECML 2021).

    As in the authors' code, the network is in training mode, and losses are divided by their deviation in the batch.
    """
    size = min(run.batch_size, len(run.x) // 5)
    gradients = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same dropout in every epoch
        for x, y in zip(run.x[: 5 * size].split(size), run.y[: 5 * size].split(size), strict=True):
            losses = cross_entropy(network(x), y, reduction="none")
            gradients.append(gradient(network, (losses / losses.std().clamp(min=1e-12)).mean()))
    return float(np.mean([float((one - other).norm()) for one, other in combinations(gradients, 2)]))


def evidence(network: nn.Module, run: Run, num_samples: int = 256, size: int = 16) -> float:
    """Give how far the mean gradient is within its noise; above 0 it is noise (Mahsereci et al., 2017).

    The variance of the gradient is told by small batches. The factor makes the mean 0 where there is noise alone.
    """
    x, y = run.x[:num_samples], run.y[:num_samples]
    count = len(x) // size
    total = squares = torch.zeros(())
    for i in range(count):
        part = slice(i * size, (i + 1) * size)
        each = gradient(network, cross_entropy(network(x[part]), y[part]))
        total, squares = total + each, squares + each.square()
    mean = total / count
    variance = (squares / count - mean.square()) * count / (count - 1)
    counts = variance > 1e-20
    ratios = count * mean[counts].square() / variance[counts]
    return float(1 - ratios.mean() * (count - 3) / (count - 1))


def train(seed: int, data: Path | None, file: Path, wide: bool = False, epochs: int | None = None) -> None:
    """Train the run of a seed, and write its file, which is there only once the run is over."""
    torch.set_num_threads(1)  # the networks are small: several runs at a time use several cores better
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", ".*(does not have many workers|LeafSpec|is smaller than the logging|The class average holds).*"
    )
    start, run = time.perf_counter(), draw(seed, data, wide)
    run = replace(run, epochs=epochs or run.epochs)
    model, recorder = Classifier(run), Recorder(run)
    monitors = [SensitivityMonitor(), RiskMonitor(), RiskMonitor(seed=1, prefix="seed1_")]
    trainer = Trainer(
        max_epochs=run.epochs,
        accelerator="cpu",
        callbacks=[*monitors, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, *loaders(run))
    about = {"seed": seed, "kind": run.kind, "labels": run.labels, "n": len(run.x), "num_classes": run.num_classes}
    about |= {"weights": sum(weight.numel() for weight in model.parameters())}
    about |= {"is_augmented": run.is_augmented, "seconds": round(time.perf_counter() - start, 1)}
    rows = pd.concat([pd.DataFrame([about] * len(recorder.rows)), pd.DataFrame(recorder.rows)], axis=1)
    rows.to_csv(file.with_suffix(".part"), index=False, float_format="%.6g")
    file.with_suffix(".part").rename(file)
