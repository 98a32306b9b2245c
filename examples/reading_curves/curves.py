"""Five real runs and their curves, for the page beside this script.

    python examples/reading_curves/curves.py --data FOLDER --out examples/reading_curves

FOLDER holds `cifar10.npz` and `mnist.npz` with x_train, y_train, x_test and y_test (images uint8, N x C x H x W).
Without `--data`, all runs are on scikit-learn's digits; `--quick` is for the tests.
"""

import argparse
import csv
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor


@dataclass
class Run:
    title: str
    data: str
    network: str
    num_train: int
    label_noise: float
    num_epochs: int
    lr: float = 1e-3  # of Adam
    cosine: bool = False  # SGD with a cosine schedule, and augmentation, in its place


RUNS = {
    "learning": Run("learning", "cifar10", "conv", 2000, 0.0, 15, lr=3e-4),
    "memorizing": Run("memorizing wrong labels", "cifar10", "conv", 2000, 0.4, 30),
    "easy": Run("an easy, clean task", "mnist", "mlp", 1000, 0.0, 30),
    "batch_norm": Run("batch norm, residual, augmentation", "cifar10", "residual", 2000, 0.0, 25, 0.1, True),
    "dont_stop": Run("don't stop", "mnist", "dropout", 1000, 0.0, 30, lr=3e-4),
}
TERMS = {"claim": "risk_claim", "overconfidence": "risk_overconfidence", "variance": "risk_variance"}


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(n, outputs, 3, padding=1, bias=False) for n in (inputs, outputs))
        self.block = nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs))
        self.short = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block(x) + self.short(x))


def network(kind: str, shape: torch.Size) -> nn.Sequential:
    channels, size = shape[0], shape.numel()
    if kind == "conv":
        body = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        body += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(64 * (shape[1] // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10))
    if kind == "residual":
        stem = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        blocks = [Residual(16, 16), nn.AvgPool2d(2), Residual(16, 32), nn.AvgPool2d(2), Residual(32, 64)]
        return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    drop = nn.Dropout(0.5 if kind == "dropout" else 0.0)
    body = [nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), drop, nn.Linear(256, 256), nn.ReLU(), drop]
    return nn.Sequential(*body, nn.Linear(256, 10))


class Module(LightningModule):
    def __init__(self, run: Run, shape: torch.Size, num_steps: int) -> None:
        super().__init__()
        self.run, self.num_steps, self.net = run, num_steps, network(run.network, shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.run.cosine:  # a shift by up to two pixels, and a flip of colour images
            i, j = torch.randint(0, 5, (2,)).tolist()
            x = pad(x, (2, 2, 2, 2))[..., i : i + x.shape[-2], j : j + x.shape[-1]]
            x = x.flip(-1) if x.shape[1] == 3 and torch.rand(()) < 0.5 else x
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        outputs, noise = self(batch[0]), self.run.label_noise
        p, true = outputs.softmax(1), one_hot(batch[1], 10)
        labels = (1 - noise) * true + noise * (1 - true) / 9  # as wrong as those of training
        self.log("true_loss", cross_entropy(outputs, batch[1]))
        self.log("true_score", (1 - 2 * (p * labels).sum(1) + p.square().sum(1)).mean())

    def configure_optimizers(self) -> Any:
        if not self.run.cosine:
            return torch.optim.Adam(self.parameters(), self.run.lr)
        optimizer = torch.optim.SGD(self.parameters(), self.run.lr, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name.removeprefix("val_"): float(v) for name, v in trainer.callback_metrics.items()})


def load(folder: Path | None, name: str) -> tuple[Tensor, Tensor]:
    if folder is None:
        digits = load_digits()
        return torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    with np.load(folder / f"{name}.npz") as file:
        return torch.tensor(file["x_train"][:5000]) / 255, torch.tensor(file["y_train"][:5000])


def train(run: Run, args: argparse.Namespace) -> dict[str, list[float]]:
    """What was logged, epoch by epoch."""
    seed_everything(args.seed, verbose=False)
    x, y = load(args.data, run.data)
    order = torch.randperm(len(x))
    first, new = order[: min(run.num_train, len(x) // 3)], order[-1000:]
    labels = (y[first] + (torch.rand(len(first)) < run.label_noise) * torch.randint(1, 10, (len(first),))) % 10
    loaders = DataLoader(TensorDataset(x[first], labels), 50, True), DataLoader(TensorDataset(x[new], y[new]), 250)
    num_epochs, recorder = 2 if args.quick else run.num_epochs, Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [RiskMonitor(), SensitivityMonitor(), recorder]
    trainer = Trainer(max_epochs=num_epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Module(run, x.shape[1:], num_epochs * len(loaders[0])), *loaders)
    return {name: [row[name] for row in recorder.rows] for name in recorder.rows[0]}


def draw(run: Run, curves: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    axes[0].plot(curves["true_loss"], "C0", label="true loss, unseen")
    axes[0].plot(curves["train_loss"], "C7", label="training loss")
    axes[1].plot(curves["risk_estimate"], "C1", label="estimate")
    axes[1].plot(curves["true_score"], "C0", label="true score")
    for color, (label, name) in zip(("C2", "C3", "C4"), TERMS.items(), strict=True):
        axes[1].plot(curves[name], color, linewidth=1, label=label)
    axes[2].plot(curves["sensitivity"], "C5")
    axes[2].set_yscale("log")
    for axis, title in zip(axes, ("loss", "Brier score: estimate and its terms", "sensitivity S"), strict=True):
        axis.axvline(np.argmin(curves["risk_estimate"]), color="C1", linestyle="--", linewidth=1)
        axis.set(xlabel="epoch", title=title)
    for axis in axes[:2]:
        axis.axvline(np.argmin(curves["true_loss"]), color="C0", linestyle=":", linewidth=1)
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False)
    figure.suptitle(run.title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the page on reading curves.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/reading_curves"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the log|found the lowest).*")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    print("                        lowest estimate          lowest loss    last epoch")
    print("run         epochs  epoch   loss  est./true    epoch   loss        loss")
    for name in args.only:
        curves = train(RUNS[name], args)
        draw(RUNS[name], curves, args.out / f"{name}.png")
        with (args.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(curves)
            writer.writerows([f"{value:.5g}" for value in row] for row in zip(*curves.values(), strict=True))
        losses, chosen, best = curves["true_loss"], *(int(np.argmin(curves[n])) for n in ("risk_estimate", "true_loss"))
        size = curves["risk_estimate"][chosen] / curves["true_score"][chosen]
        found = f"{chosen:5d}  {losses[chosen]:5.3f}  {size:9.2f}    {best:5d}  {losses[best]:5.3f}  {losses[-1]:10.3f}"
        print(f"{name:11} {len(losses):6d}  {found}", flush=True)
