"""Trains a run in Lightning's Trainer, without any monitor and to its end, and keeps its weights of every epoch.

Monitors do not change a training, not by a bit, so that what they would have seen can be measured afterwards, by the
real callback (`replay.py`). Here no rule is applied and no test sample is looked at.
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
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pools import DRAWS
from runs import Run, logits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler

SHARE = 0.1  # of the training samples that is held out
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


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

    def configure_optimizers(self) -> Any:
        optimizer = self.run.make_optimizer(self.parameters())
        schedule = self.run.make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        if schedule is None:
            return optimizer
        if self.run.schedule == "plateau":
            return [optimizer], [{"scheduler": schedule, "interval": "epoch", "monitor": "train_loss"}]
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


# %% The samples.
class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples that a loader takes by the batch."""

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


def training_loader(run: Run) -> DataLoader:
    generator = torch.Generator().manual_seed(run.seed)

    def collate(batch: list[Tensor]) -> list[Tensor]:
        return [run.augment(batch[0], generator), batch[1]]

    return DataLoader(
        Samples(run.x, run.y),
        run.batch_size,
        sampler=Shuffled(len(run.x), generator),
        collate_fn=collate,
        drop_last=len(run.x) % run.batch_size == 1,  # batch norm can't take a batch of one
        generator=torch.Generator(),  # without it, loaders draw from the generator that dropout uses
    )


def split(run: Run) -> tuple[Run, Tensor, Tensor]:
    """Hold out a tenth of the training samples: give the run without them, and them with their labels."""
    number = round(SHARE * len(run.x))
    return replace(run, x=run.x[number:], y=run.y[number:]), run.x[:number], run.y[:number]


# %% What is kept of a training.
class Keeper(Callback):
    """Keeps the weights of every epoch, and what rules look at that need more than weights."""

    def __init__(self, run: Run, with_disparity: bool) -> None:
        self.run, self.with_disparity = run, with_disparity
        self.weights: list[dict[str, Tensor]] = []
        self.rows: list[dict[str, float]] = []
        self.told: list[Tensor] = []  # labels that the model gave the samples of this epoch, in training
        self.labels: Tensor | None = None  # those of the epoch before, in the order of the samples

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_weights(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.told.append(outputs["labels"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_weights(pl_module)
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row |= {"changed": self._changed(trainer.train_dataloader.sampler.order)}
        if self.with_disparity:
            row |= {"disparity": disparity(copy.deepcopy(pl_module.net).train(), self.run)}
        self.rows.append(row)

    def _keep_weights(self, pl_module: LightningModule) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    def _changed(self, order: Tensor) -> float:
        """Give the share of the training samples that got another label than in the epoch before."""
        told, before = torch.cat(self.told), self.labels
        self.told, self.labels = [], torch.full((len(order),), -1)
        self.labels[order[: len(told)]] = told
        return float("nan") if before is None else float((self.labels != before).float().mean())


def disparity(network: nn.Module, run: Run) -> float:
    """Give the mean distance between the gradients of five batches (Forouzesh & Thiran, ECML 2021).

    As in the authors' code, the network is in training mode, and losses are divided by their deviation in the batch.
    """
    size = min(run.batch_size, len(run.x) // 5)
    gradients = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)  # the same dropout in every epoch
        for x, y in zip(run.x[: 5 * size].split(size), run.y[: 5 * size].split(size), strict=True):
            losses = cross_entropy(logits(run, network(x)), y, reduction="none")
            loss = (losses / losses.std().clamp(min=1e-12)).mean()
            trained_weights = [weight for weight in network.parameters() if weight.requires_grad]
            found = torch.autograd.grad(loss, trained_weights, allow_unused=True)
            gradients.append(torch.cat([each.flatten() for each in found if each is not None]))
    return float(np.mean([float((one - other).norm()) for one, other in combinations(gradients, 2)]))


# %% Training.
def be_quiet() -> None:
    """Use one thread, since the networks are small, and leave out what Lightning says of every fit."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignored = ("does not have many workers", "in eval mode at the start", "LeafSpec", "is smaller than the logging")
    warnings.filterwarnings("ignore", f".*({'|'.join(ignored)}).*")


def trained(run: Run, with_disparity: bool = False) -> dict[str, Any]:
    """Train a run to its end; give the weights before training and after every epoch, and a row of numbers an epoch."""
    start, keeper = time.process_time(), Keeper(run, with_disparity)
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[keeper], **QUIET)
    trainer.fit(Classifier(run), training_loader(run))
    weights = {name: torch.stack([each[name] for each in keeper.weights]) for name in keeper.weights[0]}
    return {"weights": weights, "rows": keeper.rows, "seconds": time.process_time() - start}


def train(pool: str, seed: int, data: Path | None, folder: Path, epochs: int | None = None, twice: bool = True) -> None:
    """Train the run of a seed, and once more on 90 % of its samples, if asked to; leave a file for each."""
    be_quiet()
    folder.mkdir(parents=True, exist_ok=True)
    run = DRAWS[pool](seed, data)
    run = replace(run, epochs=epochs or run.epochs)
    for name, each in (("full", run), ("fewer", split(run)[0]))[: 1 + twice]:
        if not (folder / f"{name}.pt").exists():
            torch.save(trained(each, with_disparity=name == "full"), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.pt")
