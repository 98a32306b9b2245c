"""Small runs on scikit-learn's digits, and what sensitivity says about them.

python examples/studies/reading_curves/curves.py --out examples/studies/reading_curves  # all pictures of the page
python examples/studies/reading_curves/curves.py --only robust                          # one of them
"""

import argparse
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor

NETWORKS: dict[str, dict[str, Any]] = {
    "two layers of 256": {},
    "the same with tanh": {"activation": nn.Tanh},
    "five layers of 128": {"widths": (128,) * 5},
    "with batch norm": {"batch_norm": True},
}
SENSITIVITIES = {"output_sensitivity": "S", "per_output_sensitivity": "per output"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "weight decay of 1": {"weight_decay": 1.0},
    "augmentation": {"shift": True},
    "noise, σ = 0.3": {"noise": 0.3},
}


class Classifier(LightningModule):
    def __init__(
        self,
        train_set: TensorDataset,
        widths: tuple[int, ...] = (256, 256),
        activation: type[nn.Module] = nn.ReLU,
        batch_norm: bool = False,
        weight_decay: float = 0.0,
        shift: bool = False,  # each training image by up to one pixel
        noise: float = 0.0,  # σ of the noise on training images
    ) -> None:
        super().__init__()
        self.train_set, self.weight_decay, self.shift, self.noise = train_set, weight_decay, shift, noise
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in zip((64, *widths), widths, strict=False):
            layers += [nn.Linear(fan_in, fan_out), *[nn.BatchNorm1d(fan_out)] * batch_norm, activation()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.shift:
            moves = torch.randint(0, 3, (len(x), 2)).tolist()
            padded = pad(x, (1, 1, 1, 1))
            x = torch.stack([image[i : i + 8, j : j + 8] for image, (i, j) in zip(padded, moves, strict=True)])
        return cross_entropy(self(x + self.noise * torch.randn_like(x)), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits, (x_train, y_train) = self(x), self.train_set.tensors
        noisy = self(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        loss, train_loss = cross_entropy(logits, y), cross_entropy(self(x_train), y_train)
        self.log_dict({"loss": loss, "train_loss": train_loss, "gap": loss - train_loss})
        self.log("error_under_noise", (noisy.argmax(1) != y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=self.weight_decay)


class Recorder(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@cache
def fit(seed: int = 0, noisy: float = 0.2, num_epochs: int = 30, **options: Any) -> dict[str, np.ndarray]:
    """Train on 500 images, and return what was logged; a share of the labels is noisy, in training and validation."""
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    x, y = torch.tensor(digits.images[order] / 16, dtype=torch.float32), digits.target[order]
    y = torch.tensor(np.where(rng.random(len(y)) < noisy, y + rng.integers(1, 10, len(y)), y) % 10)
    train_set, val_set = TensorDataset(x[:500], y[:500]), TensorDataset(x[500:], y[500:])
    seed_everything(seed, verbose=False)
    recorder = Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    monitors = [SensitivityMonitor(prefix=""), SensitivityMonitor(prefix="", per_output=True)]
    epochs = 2 if args.quick else num_epochs
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*monitors, recorder], **quiet)
    loaders = DataLoader(train_set, batch_size=50, shuffle=True), DataLoader(val_set, batch_size=1297)
    trainer.fit(Classifier(train_set, **options), *loaders)
    return {name: np.array([row[name] for row in recorder.rows]) for name in recorder.rows[0]}


def gap() -> Figure:
    curves = fit()
    with plt.rc_context({"font.size": 15, "lines.linewidth": 2.5}):  # to be read on a phone
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
        loss, train_loss = curves["loss"], curves["train_loss"]
        left.plot(loss, "C0")
        left.plot(train_loss, "C7")
        left.fill_between(range(len(loss)), train_loss, loss, color="C1", alpha=0.4, linewidth=0)
        left.annotate("validation", (len(loss) // 2, loss.max() * 0.7), color="C0", ha="center")
        left.annotate("gap", (0.8 * len(loss), (loss[-1] + train_loss[-1]) / 2), color="C1", ha="center", va="center")
        left.annotate("training", (len(loss) // 3, train_loss.min()), color="C7", ha="center")
        right.plot(curves["output_sensitivity"], "C2")
        right.set_yscale("log")
        for axis, title in ((left, "Loss"), (right, "Output sensitivity")):
            axis.set(title=title, xlabel="epoch")
    taus = {name: spearmanr(curves["output_sensitivity"], curves[name])[0] for name in ("gap", "loss")}
    print("Spearman correlation of S over epochs, with the gap {gap:.2f}, with the loss {loss:.2f}".format(**taus))
    return figure


def seeds() -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    print("                         sensitivity, where the gap is 0.3    Spearman with the gap")
    for axis, (key, title) in zip(axes, SENSITIVITIES.items(), strict=True):
        for color, (name, options) in zip(("C1", "C0", "C2", "C3"), NETWORKS.items(), strict=True):
            runs = [fit(seed, **options) for seed in range(3)]
            for run in runs:
                axis.plot(run["gap"], run[key], ".-", color=color, markersize=3, linewidth=0.7)
            axis.plot([], [], color=color, label=name)
            at = [np.exp(np.interp(0.3, run["gap"], np.log(run[key]))) for run in runs]
            pooled = spearmanr(*(np.concatenate([run[each] for run in runs]) for each in (key, "gap")))[0]
            print(f"{title:11} {name:18} {min(at):13.5f} to {max(at):.5f} {pooled:27.2f}")
        axis.set(xlabel="gap", ylabel="sensitivity", title=title, yscale="log")
    axes[0].legend(fontsize="small")
    return figure


def robust() -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    shown = {"output_sensitivity": "sensitivity S", "gap": "gap", "error_under_noise": "error under noise, σ = 0.3"}
    print("last epoch, mean of three seeds        S  per output    gap   loss  error under noise")
    for name, options in TECHNIQUES.items():
        runs = [fit(seed, **options) for seed in range(3)]
        mean = {key: np.mean([run[key] for run in runs], 0) for key in runs[0]}
        for axis, (key, title) in zip(axes, shown.items(), strict=True):
            axis.plot(mean[key], label=name)
            axis.set(title=title, xlabel="epoch", yscale="log" if key == "output_sensitivity" else "linear")
        keys = (*SENSITIVITIES, "gap", "loss", "error_under_noise")
        numbers = "{:8.5f}  {:10.3f}  {:5.3f}  {:5.3f}  {:17.3f}".format(*(mean[key][-1] for key in keys))
        print(f"{name:31} {numbers}")
    axes[0].legend(fontsize="small")
    return figure


PICTURES = {picture.__name__: picture for picture in (gap, seeds, robust)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the page on reading curves.")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=Path("runs/reading_curves"))
    parser.add_argument("--quick", action="store_true", help="two epochs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the log).*")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        print(f"\n{name}")
        PICTURES[name]().savefig(args.out / f"{name}.png", dpi=100)
