# %% [markdown]
# # The zoo: networks trained to convergence, once, for every script of this folder
#
# For each data set 59 networks are trained in the authors' setting: 1,000 training samples, cross-entropy,
# Adam with a learning rate of 1e-3, batches of 128, until the mean batch loss was below 1e-5 in ten epochs, or for
# `MAX_EPOCHS`. They are Lightning checkpoints, of the trained and of the untrained network:
#
#     python examples/studies/paper/zoo.py --data FOLDER            # about 2 hours on two cores
#     python examples/studies/paper/zoo.py --quick                  # 2 minutes: nine small networks on embedded digits
#
# `FOLDER` holds `cifar10.npz` and `mnist.npz` with `x_train, y_train, x_test, y_test` (images uint8, N × C × H × W), or
# torchvision keeps the data sets there or downloads them to it (`pip install torchvision`). Networks that have their
# checkpoint are not trained again, so that a zoo that was cut off goes on where it stopped. The other scripts train
# what they miss.

# %%
from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

NUM_TRAINING = 1000
MAX_EPOCHS = 600
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Spec(NamedTuple):
    """A network: convolutional layers of a width, then fully connected ones of a width, then ten logits."""

    fc_depth: int = 0
    fc_width: int = 300
    conv_depth: int = 0
    conv_width: int = 32
    init: str = "default"
    batch_norm: bool = False
    dropout: float = 0.0
    pool: bool = False
    activation: str = "relu"
    seed: int = 0
    fold: int = 0  # which 1,000 training samples

    @property
    def name(self) -> str:
        parts = [f"conv{self.conv_depth}x{self.conv_width}"] * bool(self.conv_depth)
        parts += [f"fc{self.fc_depth}x{self.fc_width}"] * bool(self.fc_depth)
        parts += [self.init] * (self.init != "default") + ["batchnorm"] * self.batch_norm
        parts += [f"dropout{self.dropout:g}"] * bool(self.dropout) + ["pool"] * self.pool
        parts += [self.activation] * (self.activation != "relu")
        parts = parts or ["linear"]
        parts += [f"fold{self.fold}"] * bool(self.fold) + [f"s{self.seed}"]
        return "-".join(parts)


# %% The networks of the experiments. Some belong to several, and are trained once.
FC_NORMAL = [Spec(4, width, init="normal") for width in (50, 100, 200, 300, 500)]
FC_NORMAL += [Spec(depth, 300, init="normal") for depth in (1, 2, 3, 5)]
DEPTH_WIDTH = [Spec(depth, width) for depth in (1, 2, 4, 6) for width in (100, 300, 600)]
INITS = [Spec(4, 300, init=init) for init in ("default", "kaiming", "normal")]
INITS += [Spec(conv_depth=3, init=init) for init in ("default", "kaiming", "normal")]
REGULARIZED = [Spec(4, 300), Spec(4, 300, batch_norm=True), Spec(4, 300, dropout=0.2), Spec(4, 300, dropout=0.5)]
REGULARIZED += [
    Spec(conv_depth=3, batch_norm=batch_norm, dropout=dropout, pool=pool)
    for batch_norm in (False, True)
    for dropout in (0.0, 0.3)
    for pool in (False, True)
]
CONV = [Spec(conv_depth=depth) for depth in (1, 2, 3, 4, 6)] + [Spec(conv_depth=3, conv_width=w) for w in (8, 16, 64)]
ADDED_CONV = [Spec(1, 200, conv_depth=1 + added) for added in range(4)]
ADDED_FC = [Spec(1 + added, 200, conv_depth=1) for added in range(4)]
SMOOTH = [Spec(4, 300, activation=activation) for activation in ACTIVATIONS]
SMOOTH += [Spec(2, 300, activation=activation) for activation in ACTIVATIONS]
SMOOTH += [Spec(conv_depth=3, activation=activation) for activation in ACTIVATIONS]
ZOO = list(
    dict.fromkeys([*FC_NORMAL, *DEPTH_WIDTH, *INITS, *REGULARIZED, *CONV, *ADDED_CONV, *ADDED_FC, *SMOOTH, Spec()])
)
QUICK = [Spec(depth, 64, init=init) for init in ("default", "normal") for depth in (1, 2, 4)]
QUICK += [Spec(conv_depth=2, conv_width=8), Spec(conv_depth=2, conv_width=8, pool=True), Spec(2, 64, dropout=0.2)]


# %%
@cache
def load(name: str, folder: Path | None) -> dict[str, np.ndarray]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = np.round(digits.images[:, None] * 255 / 16).astype(np.uint8), digits.target
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order], y[order]
        return {"x_train": x[:1000], "y_train": y[:1000], "x_test": x[1000:], "y_test": y[1000:]}
    if folder is None:
        raise SystemExit("Say with --data where the images are, or --quick to use embedded ones.")
    if (path := folder / f"{name}.npz").exists():
        return dict(np.load(path))
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}[name]
    arrays = {}
    for part, is_train in (("train", True), ("test", False)):
        images = kind(folder, train=is_train, download=True)
        x = np.asarray(images.data)
        arrays[f"x_{part}"] = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x[:, None]
        arrays[f"y_{part}"] = np.asarray(images.targets)
    return arrays


class Images(LightningDataModule):
    """Images in [0, 1]: 1,000 to train on, `fold` says which, and the test images to validate on."""

    def __init__(self, name: str = "digits", folder: Path | None = None, fold: int = 0, num_test: int = 10_000) -> None:
        super().__init__()
        self.name, self.folder, self.fold, self.num_test = name, folder, fold, num_test

    def setup(self, stage: str) -> None:
        arrays = load(self.name, self.folder)
        order = np.random.default_rng(0).permutation(len(arrays["x_train"]))
        size = min(NUM_TRAINING, len(order) // 4 if self.name == "digits" else NUM_TRAINING)
        subset = order[self.fold * size :][:size]
        self.train_set = _dataset(arrays["x_train"][subset], arrays["y_train"][subset])
        self.test_set = _dataset(arrays["x_test"][: self.num_test], arrays["y_test"][: self.num_test])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=min(128, len(self.train_set) // 4), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=500)


def _dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    return TensorDataset(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(labels).long())


# %%
class Network(LightningModule):
    """A network of the zoo, which stops its training when it has memorized its samples."""

    def __init__(self, spec: tuple[Any, ...], image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.spec = spec = Spec(*spec)
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for index in range(spec.conv_depth):
            shrinks = index < 2
            stride = 2 if shrinks and not spec.pool else 1
            layers += [nn.Conv2d(channels, spec.conv_width, 3, stride, padding=1)]
            layers += [nn.BatchNorm2d(spec.conv_width)] * spec.batch_norm + [ACTIVATIONS[spec.activation]()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] * (shrinks and spec.pool)
            layers += [nn.Dropout(spec.dropout)] * bool(spec.dropout)
            channels = spec.conv_width
            height, width = (math.ceil(size / 2) if shrinks else size for size in (height, width))
        widths = [channels * height * width, *[spec.fc_width] * spec.fc_depth]
        layers.append(nn.Flatten())
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out)]
            layers += [nn.BatchNorm1d(fan_out)] * spec.batch_norm + [ACTIVATIONS[spec.activation]()]
            layers += [nn.Dropout(spec.dropout)] * bool(spec.dropout)
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        if spec.init != "default":
            for module in self.net.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    self._initialize(module)
        self.losses: list[Tensor] = []
        self.epochs_below = 0

    def _initialize(self, module: nn.Linear | nn.Conv2d) -> None:
        if self.spec.init == "normal":
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs_below += int(torch.stack(self.losses).mean() < 1e-5)
        self.losses.clear()
        self.trainer.should_stop = self.epochs_below >= 10

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


# %%
class Checkpoints(NamedTuple):
    trained: Path
    untrained: Path


def checkpoints(spec: Spec, data: str, out: Path) -> Checkpoints:
    return Checkpoints(*(out / "zoo" / data / f"{spec.name}{suffix}.ckpt" for suffix in ("", "-untrained")))


def train(spec: Spec, data: str, folder: Path | None, out: Path, max_epochs: int) -> str:
    """Train a network, unless it is there, and say how it went."""
    paths = checkpoints(spec, data, out)
    if paths.trained.exists():
        return f"{data} {spec.name}: there already"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|logging interval).*")
    torch.set_num_threads(1)
    images = Images(data, folder, spec.fold)
    images.setup("fit")
    seed_everything(spec.seed, verbose=False)
    model = Network(tuple(spec), tuple(images.train_set[0][0].shape))
    trainer = Trainer(max_epochs=max_epochs, accelerator="cpu", **QUIET)
    paths.trained.parent.mkdir(parents=True, exist_ok=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(paths.untrained, weights_only=True)
    trainer.fit(model, images.train_dataloader())
    partial = paths.trained.with_suffix(f".{os.getpid()}")
    trainer.save_checkpoint(partial, weights_only=True)
    partial.rename(paths.trained)  # in one step, so that a training that was cut off leaves no checkpoint
    return f"{data} {spec.name}: {trainer.current_epoch} epochs" + " (cut off)" * (trainer.current_epoch == max_epochs)


def train_all(
    specs: Iterable[Spec], data: str, folder: Path | None, out: Path, max_epochs: int, num_processes: int
) -> None:
    """Train those networks that are not there yet."""
    missing = [spec for spec in specs if not checkpoints(spec, data, out).trained.exists()]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        jobs = [pool.submit(train, spec, data, folder, out, max_epochs) for spec in missing]
        for job in tqdm(as_completed(jobs), f"zoo, {data}", len(jobs)):
            tqdm.write(job.result())


# %%
def parse_arguments(description: str) -> argparse.Namespace:
    """The arguments that all scripts of this folder share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="a folder with cifar10.npz and mnist.npz, or torchvision's")
    parser.add_argument("--quick", action="store_true", help="few small networks on embedded digits")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where checkpoints and results go")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.names = ["digits"] if args.quick else ["cifar10", "mnist"]
    args.max_epochs = 100 if args.quick else MAX_EPOCHS
    return args


if __name__ == "__main__":
    args = parse_arguments("Train the zoo.")
    for name in args.names:
        train_all(QUICK if args.quick else ZOO, name, args.data, args.out, args.max_epochs, args.processes)
