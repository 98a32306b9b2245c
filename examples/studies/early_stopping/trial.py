"""A trial as a new user would make it: a network of one's own, 30 % noisy labels, and 20 labels for validation.

    python examples/studies/early_stopping/trial.py  # three seeds, two trainings each: five minutes

The network is the usual one: three convolutions with batch norm, max-pooling and dropout, AdamW, and a learning rate
that falls on a plateau of the training loss. Its data are scikit-learn's digits: 1,078 to train, 319 to validate, 20 of
them with labels as noisy as training's, and 400 to test, with correct labels.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor

NUM_TRAINING, NUM_VALIDATION, NUM_LABELS = 1078, 319, 20


class Digits(LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        layers: list[nn.Module] = []
        for channels, before in ((32, 1), (64, 32), (64, 64)):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.3)]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1], ignore_index=-100))  # of those that have labels

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train/loss"}}


class Curves(Callback):
    """Keeps what was logged, and the accuracy on test samples."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.rows = x, y, list[dict[str, float]]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            accuracy = float((pl_module(self.x).argmax(1) == self.y).float().mean())
        pl_module.train()
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()} | {"test": accuracy})


def trained(train: TensorDataset, validation: TensorDataset, test: Any, rate: float, epochs: int) -> pd.DataFrame:
    monitors = [RiskMonitor(prefix="val/"), RiskMonitor(prefix="both/", validation_labels=True)]
    curves = Curves(*test)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*monitors, curves], **quiet)
    loaders = DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(validation, NUM_VALIDATION)
    trainer.fit(Digits(rate), *loaders)
    return pd.DataFrame(curves.rows)


def trial(seed: int, rate: float, epochs: int) -> dict[str, float]:
    """Train on all samples and on nine tenths, and give the test accuracy of the epochs that are chosen."""
    seed_everything(seed, verbose=False)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
    noisy = torch.where(torch.rand(len(y)) < 0.3, (y + torch.randint(1, 10, (len(y),))) % 10, y)
    end = NUM_TRAINING + NUM_VALIDATION
    few = torch.full((NUM_VALIDATION,), -100)
    few[:NUM_LABELS] = noisy[NUM_TRAINING : NUM_TRAINING + NUM_LABELS]
    validation, test = TensorDataset(x[NUM_TRAINING:end], few), (x[end:], y[end:])
    full = trained(TensorDataset(x[:NUM_TRAINING], noisy[:NUM_TRAINING]), validation, test, rate, epochs)
    cut = NUM_TRAINING * 9 // 10
    held_out = TensorDataset(x[cut:NUM_TRAINING], noisy[cut:NUM_TRAINING])
    seed_everything(seed, verbose=False)
    fewer = trained(TensorDataset(x[:cut], noisy[:cut]), held_out, test, rate, epochs)
    return {
        "best epoch": full["test"].max(),
        "last epoch": full["test"].iloc[-1],
        "the estimate": full["test"][full["val/risk_estimate"].idxmin()],
        f"the estimate and {NUM_LABELS} labels": full["test"][full["both/risk_estimate"].idxmin()],
        f"loss of the {NUM_LABELS} labels": full["test"][full["val/loss"].idxmin()],
        "10 % held out, by its loss": fewer["test"][fewer["val/loss"].idxmin()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A network of one's own, 30 % noisy labels, 20 labels to validate.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 7e-4], help="learning rates")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
    for rate in args.rates:
        found = pd.DataFrame([trial(seed, rate, args.epochs) for seed in args.seeds])
        each = found.map("{:.3f}".format).agg(", ".join)
        print(pd.DataFrame({f"accuracy, rate {rate:g}": found.mean().round(3), "each seed": each}).to_string())
        print(flush=True)


if __name__ == "__main__":
    main()
