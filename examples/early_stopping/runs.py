"""The runs of the study: data, networks, and what is written down on every epoch."""

from __future__ import annotations

import logging
import random
import re
import warnings
import zlib
from functools import cache, partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks import risk

NUM_HOLDOUT, NUM_TEST = 1000, 3000
LABELLED = (20, 50, 100, 200, 500)
# Beside the monitor at its defaults, in runs that are cheap: other draws of its twins, and smaller budgets.
CHEAP = ("digits", "cancer", "diabetes")
OTHERS = {"seed1_": {"seed": 1}, "seed2_": {"seed": 2}, "n300_": {"num_samples": 300}, "n600_": {"num_samples": 600}}


class Run(NamedTuple):
    data: str
    network: str
    num_samples: int
    noise: float | str  # share of wrong labels, or whose labels of CIFAR-10N
    optimizer: str
    batch_size: int
    options: str = ""  # normalized: inputs of mean 0 and deviation 1 per channel; augmented: shifted and flipped
    max_epochs: int = 38
    seed: int = 0

    @property
    def name(self) -> str:
        parts = self.data, self.network, f"n{self.num_samples}", self.noise, self.optimizer, f"b{self.batch_size}"
        return f"{self.seed}-" + "-".join(map(str, parts)) + "".join(f"-{o}" for o in self.options.split())

    @property
    def kind(self) -> str:
        if "augmented" in self.options:
            return "residual nets"
        if self.data in ("text", "cancer", "diabetes"):
            return "text, tables"
        if isinstance(self.noise, str):
            return "human noise"
        if self.noise:
            return "synthetic noise"
        return "clean, hard" if self.data == "cifar10" else "clean, easy"


FRESH = [  # kinds alternate, so that a study that is cut off is still a fair sample
    Run("cifar10", "conv-gelu", 2000, "aggre", "adam1e-3", 64),
    Run("digits", "fc2x384-gelu", 500, 0.0, "adam1e-3", 32, max_epochs=60),
    Run("fashion", "fc3x256", 1500, 0.2, "adam1e-3", 64),
    Run("cifar10", "resnet16", 1500, 0.0, "sgd.05m.9cos", 64, "normalized augmented"),
    Run("text", "bag96", 1500, 0.0, "adam1e-3", 32),
    Run("cifar10", "fc3x384", 2000, "worse", "adam3e-4", 64, "normalized"),
    Run("mnist", "conv-gelu", 1500, 0.0, "adam1e-3", 64),
    Run("cifar10", "conv-silu", 1500, 0.0, "adam1e-3", 50),
    Run("cifar10", "conv-gelu", 1500, 0.4, "adam1e-3", 64),
    Run("cifar10", "conv-batchnorm", 1500, "worse", "sgd.05m.9", 64),
    Run("digits", "conv-silu", 500, 0.0, "adam1e-3", 32, max_epochs=60),
    Run("cancer", "fc3x48", 200, 0.0, "adam1e-3", 16, "normalized", max_epochs=60),
    Run("mnist", "fc2x384-tanh", 1000, 0.4, "sgd.05m.9", 50),
    Run("cifar10", "fc2x768-silu", 1500, "aggre", "sgd.02m.9", 50),
    Run("fashion", "conv", 2000, 0.0, "adam1e-3", 64),
    Run("cifar10", "resnet16", 1000, "aggre", "sgd.05m.9cos", 64, "normalized augmented"),
    Run("fashion", "conv-batchnorm", 1500, 0.4, "adam1e-3", 64),
    Run("cifar10", "fc4x384", 2000, 0.0, "adam3e-4", 64, "normalized"),
    Run("cifar10", "conv-batchnorm", 2000, "aggre", "adam3e-4", 64),
    Run("mnist", "fc3x384", 2000, 0.0, "adam1e-3", 64),
    Run("diabetes", "fc2x96-tanh", 200, 0.0, "adam1e-3", 16, "normalized", max_epochs=60),
    Run("mnist", "conv-pool", 1500, 0.2, "adam1e-3", 64),
    Run("cifar10", "conv-pool", 2000, "worse", "adam1e-3", 64),
    Run("digits", "fc3x128-tanh", 400, 0.0, "sgd.05m.9", 20, max_epochs=60),
    Run("cifar10", "resnet12", 1000, "worse", "sgd.1m.9cos", 50, "normalized augmented"),
    Run("cifar10", "conv-batchnorm", 1500, 0.2, "adam1e-3", 64),
    Run("text", "bag64", 2000, 0.2, "adam3e-3", 64),
    Run("cifar10", "conv-dropout", 2000, "worse", "adam1e-3", 64),
    Run("mnist", "conv-batchnorm", 1000, 0.0, "sgd.05m.9", 50, "normalized"),
    Run("fashion", "conv-dropout", 1000, 0.2, "adam1e-3", 50),
    Run("cifar10", "conv-pool", 2000, 0.0, "sgd.05m.9", 64),
    Run("cifar10", "fc4x256-gelu", 2000, "worse", "adam1e-3", 128),
    Run("fashion", "fc2x512-silu", 1500, 0.0, "adam3e-4", 64),
    Run("cifar10", "fc2x512-silu", 2000, 0.4, "adam1e-3", 64),
    Run("cifar10", "resnet16", 1000, 0.2, "sgd.05m.9cos", 64, "normalized augmented"),
    Run("text", "bag48", 1000, 0.0, "adam1e-3", 16),
    Run("cifar10", "conv-tanh", 1500, "aggre", "adam1e-3", 50, "normalized"),
    Run("mnist", "fc4x300", 1500, 0.2, "sgd.05m.9", 64),
    Run("cifar10", "conv-batchnorm", 1500, 0.0, "sgd.05", 64, "normalized"),
    Run("digits", "fc2x192", 500, 0.4, "adam3e-3", 32, max_epochs=60),
]
REPORT = [  # the half that was held back of an earlier study, with new seeds
    Run("mnist", "fc2x1024", 1500, 0.2, "adam1e-3", 64),
    Run("cifar10", "fc1x512", 1000, 0.2, "adam3e-4", 64),
    Run("cifar10", "fc6x256", 2000, 0.0, "adam1e-3", 128),
    Run("mnist", "fc4x300", 1000, 0.4, "sgd.05m.9", 50, "normalized"),
    Run("mnist", "fc2x512-dropout", 1000, 0.2, "adam1e-3", 50),
    Run("cifar10", "fc3x300", 1500, 0.4, "sgd.05", 64),
    Run("mnist", "conv", 2000, 0.2, "adam3e-4", 128),
    Run("cifar10", "conv", 1000, 0.2, "adam1e-3", 64),
    Run("cifar10", "conv", 1500, 0.0, "sgd.05m.9", 50, "normalized"),
    Run("mnist", "conv-batchnorm", 1500, 0.4, "adam1e-3", 64),
    Run("cifar10", "conv-batchnorm", 1000, 0.2, "sgd.05m.9", 64),
    Run("cifar10", "conv-batchnorm", 1500, 0.0, "adam3e-4", 64, "normalized"),
    Run("cifar10", "conv-dropout", 1000, 0.0, "adam1e-3", 50),
    Run("cifar10", "conv-dropout", 2000, 0.4, "adam3e-4", 128, "normalized"),
    Run("mnist", "conv-pool", 1000, 0.4, "sgd.05m.9", 50),
    Run("cifar10", "conv-pool", 1500, 0.0, "adam1e-3", 64),
    Run("mnist", "fc4x300", 1500, 0.0, "adam1e-3", 64),
    Run("mnist", "conv-batchnorm", 1000, 0.0, "sgd.05m.9", 50, "normalized"),
    Run("cifar10", "fc2x1024", 1500, 0.4, "sgd.05m.9", 64),
    Run("cifar10", "conv-batchnorm", 2000, 0.4, "adam1e-3", 128),
    Run("mnist", "conv-dropout", 1500, 0.0, "adam3e-4", 64),
    Run("mnist", "conv", 1000, 0.0, "adam1e-3", 64),
    Run("cifar10", "conv-pool", 1000, 0.4, "adam1e-3", 50, "normalized"),
    Run("cifar10", "fc4x300", 1000, 0.0, "adam3e-4", 50),
]
POOLS = {
    "fresh": [run._replace(seed=300 + i) for i, run in enumerate(FRESH)],
    "report": [run._replace(seed=500 + i) for i, run in enumerate(REPORT)],
    "second": [run._replace(seed=400 + i) for i, run in enumerate(FRESH)],  # the fresh networks with other seeds
}
QUICK = [
    Run("digits", "fc1x64", 300, 0.2, "adam1e-3", 32, max_epochs=6, seed=300),
    Run("digits", "conv-batchnorm", 300, 0.0, "sgd.05m.9", 32, max_epochs=6, seed=301),
]


# %%
PACKAGES = [
    "wandb",
    "pygments",
    "torchmetrics",
    "matplotlib",
    "lightning",
    "tensorboard",
    "mypy",
    "torchvision",
    "opentelemetry",
    "google",
]  # none of them in the design


@cache
def text(length: int = 64, buckets: int = 4096) -> dict[str, np.ndarray]:
    """Six lines of source each, and the package they are from; no file gives lines to both splits."""
    site, rng = Path(torch.__file__).parents[1], random.Random(0)
    found: dict[str, list[tuple[list[int], int]]] = {"train": [], "test": []}
    for label, package in enumerate(PACKAGES):
        files = sorted(file for file in (site / package).rglob("*.py") if file.stat().st_size > 2000)
        for index, file in enumerate(rng.sample(files, min(len(files), 400))):
            own = re.compile(rf"\s*(from|import|>>> (from|import))\b|.*{package}", re.IGNORECASE)
            lines = [
                line for line in file.read_text(errors="ignore").splitlines() if line.strip() and not own.match(line)
            ]
            starts = range(0, len(lines) - 6, 6)
            for start in rng.sample(starts, min(len(starts), 12)):
                tokens = re.findall(r"[A-Za-z_]+|[^\sA-Za-z_]", "\n".join(lines[start : start + 6]))[:length]
                ids = [1 + zlib.crc32(token.encode()) % (buckets - 1) for token in tokens]
                found["train" if index % 2 else "test"].append((ids + [0] * (length - len(ids)), label))
    arrays = {}
    for split, items in found.items():
        arrays |= {f"x_{split}": np.array([ids for ids, _ in items]), f"y_{split}": np.array([y for _, y in items])}
    return arrays


@cache
def arrays(folder: Path | None, data: str) -> dict[str, np.ndarray]:
    if data == "text":
        return text()
    assert folder is not None, f"--data is needed for {data}"
    return dict(np.load(folder / f"{data}.npz"))


class Data(NamedTuple):
    train: TensorDataset
    holdout: TensorDataset  # with the true labels, for the rules that may see labels
    noisy_labels: Tensor  # of the holdout, as wrong as those of training
    test: TensorDataset
    num_classes: int


def load(folder: Path | None, run: Run, variant: str = "main") -> Data | None:
    """The data of a run; ``real``: other training samples, None if there are none; ``bootstrap``: drawn from them."""
    rng = np.random.default_rng([run.seed, 7])
    n = run.num_samples
    if run.data in ("digits", "cancer", "diabetes"):
        from sklearn import datasets

        table = {"cancer": datasets.load_breast_cancer}.get(run.data) or getattr(datasets, f"load_{run.data}")
        found = table()
        x, y = found.data.astype(np.float32), found.target
        if run.data == "digits":
            x = x.reshape(-1, 1, 8, 8) / 16
        elif run.data == "diabetes":  # thirds of a number
            y = np.searchsorted(np.quantile(y, [1 / 3, 2 / 3]), y)
        order, size = rng.permutation(len(x)), 500 if run.data == "digits" else 120
        parts = order[:n], order[n : n + size], order[n + size if run.data == "digits" else n :]
        (x_train, x_holdout, x_test), (train, holdout, test) = ([v[part] for part in parts] for v in (x, y))
        if variant == "real":
            return None
    else:
        source = arrays(folder, run.data)
        order, unseen = rng.permutation(len(source["x_train"])), rng.permutation(len(source["x_test"]))
        order = order[n : 2 * n] if variant == "real" else order[:n]
        if len(order) < n:
            return None
        parts = unseen[:NUM_HOLDOUT], unseen[NUM_HOLDOUT : NUM_HOLDOUT + NUM_TEST]
        (x_holdout, x_test), (holdout, test) = ([source[key][part] for part in parts] for key in ("x_test", "y_test"))
        x_train, train = source["x_train"][order], source["y_train"][order]
        if run.data != "text":
            x_train, x_holdout, x_test = ((v / 255).astype(np.float32) for v in (x_train, x_holdout, x_test))
    num_classes = int(max(train.max(), test.max())) + 1
    share = 0.0 if isinstance(run.noise, str) else run.noise
    if isinstance(run.noise, str):
        labels = arrays(folder, "cifar10n")[f"{run.noise}_label"]
        share, train = float((labels != source["y_train"]).mean()), labels[order]

    def corrupted(y: np.ndarray) -> np.ndarray:
        wrong = rng.random(len(y)) < share
        return np.where(wrong, (y + rng.integers(1, num_classes, len(y))) % num_classes, y)

    noisy = corrupted(holdout)
    train = train if isinstance(run.noise, str) else corrupted(train)
    if "normalized" in run.options:
        axes = (0, 2, 3) if x_train.ndim == 4 else (0,)
        mean, std = x_train.mean(axes, keepdims=True), x_train.std(axes, keepdims=True) + 1e-6
        x_train, x_holdout, x_test = ((v - mean) / std for v in (x_train, x_holdout, x_test))
    if variant == "bootstrap":
        drawn = rng.integers(0, n, n)
        x_train, train = x_train[drawn], train[drawn]
    pairs = (x_train, train), (x_holdout, holdout), (x_test, test)
    sets = [TensorDataset(torch.tensor(x), torch.tensor(y).long()) for x, y in pairs]
    return Data(sets[0], sets[1], torch.tensor(noisy).long(), sets[2], num_classes)


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
        self.skip = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


def network(name: str, shape: torch.Size, num_classes: int) -> nn.Sequential:
    kind, _, extra = name.partition("-")
    if kind.startswith("bag"):
        width = int(kind.removeprefix("bag"))
        bag = nn.EmbeddingBag(4096, width, mode="mean", padding_idx=0)
        return nn.Sequential(bag, nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, num_classes))
    if kind.startswith("resnet"):
        w = int(kind.removeprefix("resnet"))
        stem = nn.Conv2d(shape[0], w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()
        blocks = Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2)
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, num_classes))
    activation = {"gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}.get(extra, nn.ReLU)
    hidden: list[nn.Module] = []
    if kind.startswith("fc"):
        depth, width = map(int, kind[2:].split("x"))
        for i, o in pairwise([shape.numel(), *[width] * depth]):
            hidden += [nn.Linear(i, o), activation(), *([nn.Dropout(0.5)] if extra == "dropout" else [])]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))
    for index, (i, o) in enumerate(pairwise([shape[0], 32, 48, 64])):
        pooled = extra == "pool" and index > 0
        hidden.append(nn.Conv2d(i, o, 3, stride=1 if pooled else 2, padding=1))
        hidden += [nn.BatchNorm2d(o)] if extra == "batchnorm" else []
        hidden += [activation(), *([nn.MaxPool2d(2)] if pooled else [])]
        hidden += [nn.Dropout(0.3)] if extra == "dropout" else []
    size = 64 * ((shape[-1] + 7) // 8) ** 2 if extra != "pool" else 64 * ((shape[-1] + 1) // 2 // 4) ** 2
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(size, num_classes))


def brier(logits: Tensor, y: Tensor) -> float:
    return float((logits.softmax(1) - one_hot(y, logits.shape[1])).square().sum(1).mean())


class Classifier(LightningModule):
    def __init__(self, run: Run, shape: torch.Size, num_classes: int) -> None:
        super().__init__()
        self.net = network(run.network, shape, num_classes)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # no labels

    def configure_optimizers(self):
        name = self.run.optimizer
        if name.startswith("adam"):
            return torch.optim.Adam(self.parameters(), lr=float(name.removeprefix("adam")))
        is_cosine, (lr, _, momentum) = name.endswith("cos"), name.removesuffix("cos").removeprefix("sgd").partition("m")
        decay = 5e-4 if is_cosine else 0.0
        optimizer = torch.optim.SGD(self.parameters(), float(lr), float(momentum or 0), weight_decay=decay)
        if not is_cosine:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ManyTwins(RiskMonitor):
    """Three twins for each of the 10 batches, where one is the default."""

    def measure(self, *args: Any) -> None:
        own, risk._MIN_TWINS = risk._MIN_TWINS, 30
        try:
            super().measure(*args)
        finally:
            risk._MIN_TWINS = own


def augmented(generator: torch.Generator, samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch of images, each shifted by up to four pixels, and half of them mirrored."""
    x, y = default_collate(samples)
    (dy, dx), size = torch.randint(0, 9, (2, len(x)), generator=generator).tolist(), x.shape[-1]
    padded = pad(x, (4, 4, 4, 4))
    x = torch.stack([image[:, i : i + size, j : j + size] for image, i, j in zip(padded, dy, dx, strict=True)])
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return [torch.where(mirrored[:, None, None, None], x.flip(3), x), y]


class Recorder(Callback):
    """One row an epoch: what was logged, and what the other rules would have seen."""

    def __init__(self, data: Data, batch_size: int, is_twin: bool) -> None:
        self.data, self.batch_size, self.is_twin = data, batch_size, is_twin
        self.rows: list[dict[str, float]] = []
        self.predictions: list[np.ndarray] = []  # on the holdout set
        self.labels: Tensor | None = None  # that the model gave the training samples

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        pl_module.eval()
        row |= self.seen(pl_module)
        pl_module.train()
        self.rows.append({"epoch": trainer.current_epoch} | row)

    def seen(self, model: Classifier) -> dict[str, float]:
        def logits(part: TensorDataset) -> Tensor:
            with torch.no_grad():
                return torch.cat([model(x) for x in part.tensors[0].split(500)])

        holdout, y = logits(self.data.holdout), self.data.holdout.tensors[1]
        self.predictions.append(holdout.softmax(1).numpy().astype(np.float16))
        if self.is_twin:
            return {"holdout_loss": float(cross_entropy(holdout, y))}
        test, train = logits(self.data.test), logits(self.data.train)
        y_test, y_train = self.data.test.tensors[1], self.data.train.tensors[1]
        labels = train.argmax(1)
        changed = float("nan") if self.labels is None else float((labels != self.labels).float().mean())
        self.labels = labels
        row = {"test_loss": float(cross_entropy(test, y_test)), "test_brier": brier(test, y_test)}
        row |= {"test_error": float((test.argmax(1) != y_test).float().mean()), "changed": changed}
        row |= {"train_brier": brier(train, y_train), "train_claim": 1 - float(train.softmax(1).square().sum(1).mean())}
        row |= {"holdout_brier": brier(holdout, y), "noisy_brier": brier(holdout, self.data.noisy_labels)}
        for size in LABELLED:  # as many disjoint sets as there are samples for
            for index in range(len(y) // size):
                part = slice(index * size, (index + 1) * size)
                row[f"labelled_{size}_{index}"] = float(cross_entropy(holdout[part], y[part]))
        return row | self.of_gradients(model)

    def of_gradients(self, model: Classifier, num: int = 512, size: int = 16) -> dict[str, float]:
        """Gradient disparity of five batches, and the evidence (Mahsereci et al.) of gradients of ``num`` samples."""
        x, y = self.data.train.tensors

        def gradient(part: slice) -> Tensor:
            loss = cross_entropy(model(x[part]), y[part])
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

        own = [gradient(slice(i * self.batch_size, (i + 1) * self.batch_size)) for i in range(5)]
        disparity = float(np.mean([float((a - b).norm()) for a, b in combinations(own, 2)]))
        starts = range(0, min(num, len(x)) - size + 1, size)
        count, total, squares = len(starts), torch.zeros_like(own[0]), torch.zeros_like(own[0])
        for start in starts:
            g = gradient(slice(start, start + size))
            total, squares = total + g, squares.addcmul_(g, g)
        mean = total / count
        variance = (squares / count - mean.square()) * count / (count - 1)
        alive = variance > 1e-20
        f = count * mean[alive].square() / variance[alive] * (count - 3) / (count - 1)  # its mean is 1 for pure noise
        return {"disparity": disparity, "evidence": float(1 - f.mean())}


def train(folder: Path | None, file: Path, run: Run, variant: str = "main") -> None:
    """Train a run or a twin of it, and write its CSV file; ``held_out`` trains on four fifths, and sees the last."""
    torch.set_num_threads(1)  # the networks are small: two runs at a time use two cores better
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|is smaller than the logging).*")
    data = load(folder, run, variant)
    if data is None:
        return
    if variant == "held_out":
        num = len(data.train) * 4 // 5
        kept, held = ([v[part] for v in data.train.tensors] for part in (slice(num), slice(num, None)))
        data = data._replace(train=TensorDataset(*kept), holdout=TensorDataset(*held))
    seed_everything(run.seed, verbose=False)  # twins begin with the weights of the run
    model = Classifier(run, data.train.tensors[0].shape[1:], data.num_classes)
    recorder = Recorder(data, run.batch_size, variant != "main")
    monitors: list[Callback] = []
    if variant == "main":
        monitors = [SensitivityMonitor(at="net.0" if run.data == "text" else None), RiskMonitor()]
        if run in POOLS["second"]:
            monitors += [RiskMonitor(prefix="seed1_", seed=1)]
            monitors += [ManyTwins(prefix="many0_", seed=0), ManyTwins(prefix="many1_", seed=1)]
        elif run.data in CHEAP:
            monitors += [RiskMonitor(prefix=prefix, **kwargs) for prefix, kwargs in OTHERS.items()]
    trainer = Trainer(
        max_epochs=run.max_epochs,
        accelerator="cpu",
        callbacks=[*monitors, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if monitors else 0,
    )
    generator = torch.Generator().manual_seed(run.seed + 1000 * (variant != "main"))
    collate = partial(augmented, generator) if "augmented" in run.options else None
    loader = DataLoader(data.train, run.batch_size, True, drop_last=True, generator=generator, collate_fn=collate)
    trainer.fit(model, loader, DataLoader(data.holdout, 100))
    rows = pd.DataFrame(recorder.rows)
    np.save(file.with_suffix(".npy"), np.array(recorder.predictions))
    rows.to_csv(file.with_suffix(".part"), index=False, float_format="%.6g")
    file.with_suffix(".part").rename(file)  # a file is a finished run
