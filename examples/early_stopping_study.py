# %% [markdown]
# # Can early stopping trust the label-free risk estimate?
#
# Real networks are trained on CIFAR-10 and MNIST with `SensitivityMonitor` in their Trainer, with clean and with wrong
# training labels, and never stopped. Afterwards every rule chooses an epoch from what it could see, and pays its
# *regret*: the test loss (cross-entropy against true labels) at that epoch over the best of the run, minus 1.
#
#     python examples/early_stopping_study.py --data FOLDER            # about 20 minutes on two cores
#     python examples/early_stopping_study.py --data FOLDER --quick    # about 2 minutes: few, short runs
#     python examples/early_stopping_study.py --data FOLDER --further  # 6 minutes more: other data, Fashion-MNIST
#
# `FOLDER` holds `cifar10.npz` and `mnist.npz` (`fashion.npz`) with `x_train, y_train, x_test, y_test` (images uint8,
# N × C × H × W), or torchvision keeps the data sets there or downloads them to it (`pip install torchvision`).
#
# Each run ends in one CSV file, with a row an epoch. Runs that have theirs are not trained again, so that a study that
# was cut off goes on where it stopped. The estimate was designed on the runs named `design`; `report` played no part.

# %%
from __future__ import annotations

import argparse
import copy
import csv
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_sensitivity import SensitivityMonitor

NUM_HOLDOUT, NUM_TEST = 1000, 4000
LABELLED = (50, 100, 500)
PATIENCE = 10


class Run(NamedTuple):
    data: str
    network: str
    num_samples: int
    label_noise: float
    optimizer: str
    batch_size: int
    normalized: bool = False  # inputs of mean 0 and deviation 1 per channel, or as they are, in [0, 1]
    half: str = "design"
    seed: int = 0

    @property
    def name(self) -> str:
        kind = f"{self.half}{self.seed:02d}-{self.data}-{self.network}-n{self.num_samples}-noise{self.label_noise:g}"
        return f"{kind}-{self.optimizer}-b{self.batch_size}" + "-normalized" * self.normalized


DESIGN = [
    Run("cifar10", "fc2x1024", 1000, 0.0, "adam1e-3", 64),
    Run("cifar10", "fc4x300", 1500, 0.2, "sgd.05m.9", 64),
    Run("mnist", "fc1x512", 1500, 0.4, "adam1e-3", 64),
    Run("mnist", "fc6x256", 1000, 0.2, "adam3e-4", 50),
    Run("cifar10", "fc2x512-dropout", 2000, 0.4, "adam1e-3", 128),
    Run("mnist", "fc3x300", 1000, 0.0, "sgd.05", 50, normalized=True),
    Run("cifar10", "conv", 1500, 0.0, "adam1e-3", 64),
    Run("cifar10", "conv", 1000, 0.4, "sgd.05m.9", 64, normalized=True),
    Run("mnist", "conv", 1000, 0.4, "adam1e-3", 50),
    Run("cifar10", "conv-batchnorm", 1500, 0.0, "adam1e-3", 64),
    Run("mnist", "conv-batchnorm", 1000, 0.2, "adam3e-4", 50),
    Run("cifar10", "conv-batchnorm", 2000, 0.2, "sgd.05", 128, normalized=True),
    Run("cifar10", "conv-dropout", 1500, 0.2, "adam1e-3", 64),
    Run("mnist", "conv-dropout", 2000, 0.4, "sgd.05m.9", 128),
    Run("cifar10", "conv-pool", 1000, 0.2, "adam3e-4", 50),
    Run("mnist", "conv-pool", 1500, 0.2, "adam1e-3", 64, normalized=True),
    Run("mnist", "fc2x512", 1000, 0.0, "adam1e-3", 64),
    Run("mnist", "conv", 1500, 0.0, "adam3e-4", 64),
    Run("cifar10", "fc1x512", 2000, 0.4, "sgd.05m.9", 128),
    Run("cifar10", "conv-batchnorm", 1000, 0.4, "adam1e-3", 50),
    Run("mnist", "conv-pool", 2000, 0.0, "sgd.05m.9", 128),
    Run("cifar10", "fc6x256", 1000, 0.2, "adam3e-4", 64, normalized=True),
    Run("mnist", "conv-batchnorm", 2000, 0.0, "adam1e-3", 128),
    Run("cifar10", "conv-dropout", 1000, 0.0, "sgd.05m.9", 50),
]
REPORT = [
    Run("mnist", "fc2x1024", 1500, 0.2, "adam1e-3", 64),
    Run("cifar10", "fc1x512", 1000, 0.2, "adam3e-4", 64),
    Run("cifar10", "fc6x256", 2000, 0.0, "adam1e-3", 128),
    Run("mnist", "fc4x300", 1000, 0.4, "sgd.05m.9", 50, normalized=True),
    Run("mnist", "fc2x512-dropout", 1000, 0.2, "adam1e-3", 50),
    Run("cifar10", "fc3x300", 1500, 0.4, "sgd.05", 64),
    Run("mnist", "conv", 2000, 0.2, "adam3e-4", 128),
    Run("cifar10", "conv", 1000, 0.2, "adam1e-3", 64),
    Run("cifar10", "conv", 1500, 0.0, "sgd.05m.9", 50, normalized=True),
    Run("mnist", "conv-batchnorm", 1500, 0.4, "adam1e-3", 64),
    Run("cifar10", "conv-batchnorm", 1000, 0.2, "sgd.05m.9", 64),
    Run("cifar10", "conv-batchnorm", 1500, 0.0, "adam3e-4", 64, normalized=True),
    Run("cifar10", "conv-dropout", 1000, 0.0, "adam1e-3", 50),
    Run("cifar10", "conv-dropout", 2000, 0.4, "adam3e-4", 128, normalized=True),
    Run("mnist", "conv-pool", 1000, 0.4, "sgd.05m.9", 50),
    Run("cifar10", "conv-pool", 1500, 0.0, "adam1e-3", 64),
    Run("mnist", "fc4x300", 1500, 0.0, "adam1e-3", 64),
    Run("mnist", "conv-batchnorm", 1000, 0.0, "sgd.05m.9", 50, normalized=True),
    Run("cifar10", "fc2x1024", 1500, 0.4, "sgd.05m.9", 64),
    Run("cifar10", "conv-batchnorm", 2000, 0.4, "adam1e-3", 128),
    Run("mnist", "conv-dropout", 1500, 0.0, "adam3e-4", 64),
    Run("mnist", "conv", 1000, 0.0, "adam1e-3", 64),
    Run("cifar10", "conv-pool", 1000, 0.4, "adam1e-3", 50, normalized=True),
    Run("cifar10", "fc4x300", 1000, 0.0, "adam3e-4", 50),
]
FURTHER = [
    Run("fashion", "fc2x512", 1500, 0.0, "adam1e-3", 64),
    Run("fashion", "fc4x256", 1000, 0.2, "sgd.05m.9", 50),
    Run("fashion", "fc1x1024", 2000, 0.4, "adam1e-3", 128),
    Run("fashion", "fc3x512-dropout", 1500, 0.2, "adam1e-3", 64),
    Run("fashion", "fc6x128", 1500, 0.0, "adam1e-3", 64),
    Run("fashion", "conv", 2000, 0.0, "adam1e-3", 128),
    Run("fashion", "conv", 1000, 0.4, "adam3e-4", 64, normalized=True),
    Run("fashion", "conv-batchnorm", 1500, 0.2, "adam1e-3", 64),
    Run("fashion", "conv-batchnorm", 1000, 0.0, "sgd.05m.9", 50, normalized=True),
    Run("fashion", "conv-dropout", 1000, 0.4, "adam1e-3", 50),
    Run("fashion", "conv-pool", 1500, 0.2, "sgd.05m.9", 64),
    Run("fashion", "conv-pool", 1000, 0.0, "adam1e-3", 64),
]
RUNS = [
    run._replace(half=half, seed=seed)
    for half, runs in (("design", DESIGN), ("report", REPORT), ("further", FURTHER))
    for seed, run in enumerate(runs)
]


# %%
@cache
def arrays(folder: Path, data: str) -> dict[str, np.ndarray]:
    file = folder / f"{data}.npz"
    if file.exists():
        return dict(np.load(file))
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[data]
    train, test = (source(folder, train=train, download=True) for train in (True, False))
    images = [np.asarray(part.data) for part in (train, test)]
    x_train, x_test = (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x[:, None] for x in images)
    y_train, y_test = (np.asarray(part.targets) for part in (train, test))
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


class Data(NamedTuple):
    train: TensorDataset
    holdout: TensorDataset  # with the true labels, for the rules that may see labels
    noisy_labels: Tensor  # of the holdout, as wrong as those of training
    test: TensorDataset


def load(folder: Path, run: Run) -> Data:
    source = arrays(folder, run.data)
    rng = np.random.default_rng([run.seed, RUNS.index(run)])
    train = rng.permutation(len(source["x_train"]))[: run.num_samples]
    unseen = rng.permutation(len(source["x_test"]))[: NUM_HOLDOUT + NUM_TEST]

    def corrupted(labels: np.ndarray) -> Tensor:
        wrong = rng.random(len(labels)) < run.label_noise
        return torch.tensor(np.where(wrong, labels + rng.integers(1, 10, len(labels)), labels) % 10).long()

    def images(split: str, indices: np.ndarray) -> Tensor:
        return torch.tensor(source[f"x_{split}"][indices] / 255, dtype=torch.float32)

    x_train, x_unseen = images("train", train), images("test", unseen)
    if run.normalized:
        mean, std = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
        x_train, x_unseen = (x_train - mean) / std, (x_unseen - mean) / std
    y_unseen = torch.tensor(source["y_test"][unseen]).long()
    return Data(
        TensorDataset(x_train, corrupted(source["y_train"][train])),
        TensorDataset(x_unseen[:NUM_HOLDOUT], y_unseen[:NUM_HOLDOUT]),
        corrupted(source["y_test"][unseen[:NUM_HOLDOUT]]),
        TensorDataset(x_unseen[NUM_HOLDOUT:], y_unseen[NUM_HOLDOUT:]),
    )


def network(name: str, shape: torch.Size) -> nn.Sequential:
    kind, _, extra = name.partition("-")
    if kind.startswith("fc"):
        depth, width = map(int, kind[2:].split("x"))
        widths = [shape.numel(), *[width] * depth]
        hidden = []
        for i, o in pairwise(widths):
            hidden += [nn.Linear(i, o), nn.ReLU(), *([nn.Dropout(0.5)] if extra == "dropout" else [])]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
    hidden = []
    for index, (i, o) in enumerate(pairwise([shape[0], 32, 48, 64])):
        pooled = extra == "pool" and index > 0
        hidden.append(nn.Conv2d(i, o, 3, stride=1 if pooled else 2, padding=1))
        hidden += [nn.BatchNorm2d(o)] if extra == "batchnorm" else []
        hidden += [nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
        hidden += [nn.Dropout(0.3)] if extra == "dropout" else []
    size = 64 * ((shape[-1] + 7) // 8) ** 2 if extra != "pool" else 64 * ((shape[-1] + 1) // 2 // 4) ** 2
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(size, 10))


def optimizer(name: str, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    if name.startswith("adam"):
        return torch.optim.Adam(parameters, lr=float(name.removeprefix("adam")))
    lr, _, momentum = name.removeprefix("sgd.").partition("m")
    return torch.optim.SGD(parameters, lr=float(f".{lr}"), momentum=float(momentum or 0))


class Classifier(LightningModule):
    """An ordinary classifier; what it logs of training, it logs in train mode, as everybody does."""

    def __init__(self, run: Run, shape: torch.Size) -> None:
        super().__init__()
        self.net = network(run.network, shape)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = cross_entropy(logits, batch[1])
        scores = {"train_loss": loss, "running_brier": brier(logits, batch[1]), "running_power": power(logits)}
        self.log_dict({name: value.detach() for name, value in scores.items()}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # no labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.run.optimizer, self.parameters())


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(1) - one_hot(labels, 10)).square().sum(1).mean()


def power(logits: Tensor) -> Tensor:
    return logits.softmax(1).square().sum(1).mean()


def gradient_disparity(model: nn.Module, batches: list[list[Tensor]]) -> float:
    """Forouzesh and Thiran (2021), after their code: in train mode, each loss over the deviation within its batch."""
    model = copy.deepcopy(model).train()
    gradients = []
    with torch.random.fork_rng(), torch.enable_grad():
        for x, y in batches:
            losses = cross_entropy(model(x), y, reduction="none")
            gradient = torch.autograd.grad((losses / losses.std()).mean(), list(model.parameters()))
            gradients.append(torch.cat([part.flatten() for part in gradient]))
    return float(np.mean([float((a - b).norm()) for a, b in combinations(gradients, 2)]))


class Recorder(Callback):
    """One row an epoch: what was logged, and what the other rules would have seen."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data = data
        self.batches = [list(data.train[i * batch_size : (i + 1) * batch_size]) for i in range(5)]
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        pl_module.eval()
        with torch.no_grad():
            test, holdout, train = (
                torch.cat([pl_module(x) for x in part.tensors[0].split(500)])
                for part in (self.data.test, self.data.holdout, self.data.train)
            )
            x = self.data.holdout.tensors[0]
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            noisy = {std: torch.cat([pl_module(part) for part in (x + std * noise).split(500)]) for std in (0.03, 0.01)}
        pl_module.train()
        y_test, y_holdout, y_train = (p.tensors[1] for p in (self.data.test, self.data.holdout, self.data.train))
        row |= {"test_loss": cross_entropy(test, y_test), "test_brier": brier(test, y_test)}
        row |= {
            "holdout_brier": brier(holdout, y_holdout),
            "noisy_holdout_brier": brier(holdout, self.data.noisy_labels),
        }
        row |= {
            "all_train_brier": brier(train, y_train),
            "all_train_power": power(train),
            "holdout_power": power(holdout),
        }
        for size in LABELLED:  # as many disjoint sets as there are samples for
            for index, (logits, y) in enumerate(zip(holdout.split(size), y_holdout.split(size), strict=True)):
                row[f"labelled_{size}_{index}"] = cross_entropy(logits, y)
        for std, logits in noisy.items():  # 2 · C · V
            changes = (logits.softmax(1) - holdout.softmax(1)).square().sum(1).mean()
            row[f"input_noise_{std}"] = 2 * x.square().mean() / std**2 * changes
        row["gradient_disparity"] = gradient_disparity(pl_module, self.batches)
        self.rows.append({"epoch": trainer.current_epoch} | {name: float(value) for name, value in row.items()})


def train(folder: Path, out: Path, run: Run, max_epochs: int) -> None:
    torch.set_num_threads(1)  # the networks are small: two runs at a time use two cores better
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|is smaller than the logging).*")
    seed_everything(RUNS.index(run), verbose=False)
    data = load(folder, run)
    recorder = Recorder(data, run.batch_size)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[SensitivityMonitor(), recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (
        DataLoader(data.train, run.batch_size, shuffle=True, drop_last=True),
        DataLoader(data.holdout, 250),
    )
    trainer.fit(Classifier(run, data.train.tensors[0].shape[1:]), *loaders)
    file = out / f"{run.name}.csv"
    with file.with_suffix(".part").open("w", newline="") as part:
        writer = csv.DictWriter(part, list(recorder.rows[-1]), restval="nan")
        writer.writeheader()
        writer.writerows(recorder.rows)
    file.with_suffix(".part").rename(file)  # a file is a finished run


# %%
Series = dict[str, np.ndarray]  # of one run, by name, one value an epoch


def read(file: Path) -> Series:
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def lowest(values: np.ndarray) -> int:
    return int(np.nanargmin(values))


def patient(values: np.ndarray) -> int:
    """The checkpoint that is left when `EarlyStopping(patience=PATIENCE)` ends a run."""
    best = 0
    for epoch, value in enumerate(values):
        if value < values[best]:
            best = epoch
        elif epoch - best >= PATIENCE:
            break
    return best


def fifth_rise(values: np.ndarray) -> int:
    rises = np.flatnonzero(np.diff(values) > 0) + 1
    return int(rises[4]) if len(rises) > 4 else len(values) - 1


def with_training_part(series: Series, kind: str) -> np.ndarray:
    """The estimate with another training part than that of the kept samples in eval mode."""
    uncertainty = series[f"{kind}_power"] - series["holdout_power"]
    return series[f"{kind}_brier"] + uncertainty + series["val_risk_variance"]


def disjoint(series: Series, size: int) -> list[int]:
    return [lowest(series[f"labelled_{size}_{index}"]) for index in range(NUM_HOLDOUT // size)]


ESTIMATE = "**`val_risk_estimate`**, minimum"

# Each rule gives the epochs that it chooses in a run, several if it depends on which samples are labelled.
Rule = Callable[[Series], list[int]]
RULES: dict[str, Rule] = {
    "never stop": lambda s: [len(s["epoch"]) - 1],
    "training loss": lambda s: [lowest(s["train_loss"])],
    "sensitivity alone": lambda s: [lowest(s["val_sensitivity"])],
    "gradient disparity, fifth rise": lambda s: [fifth_rise(s["gradient_disparity"])],
    "training loss + Equation 9": lambda s: [lowest(s["train_loss"] + s["val_loss_estimate"])],
    "training Brier + 2CV, input noise σ = 0.03": lambda s: [lowest(s["all_train_brier"] + s["input_noise_0.03"])],
    "training + uncertainty + 2CV, input noise σ = 0.01": lambda s: [
        lowest(s["val_risk_training"] + s["val_risk_uncertainty"] + s["input_noise_0.01"])
    ],
    ESTIMATE: lambda s: [lowest(s["val_risk_estimate"])],
    f"**`val_risk_estimate`**, `EarlyStopping(patience={PATIENCE})`": lambda s: [patient(s["val_risk_estimate"])],
    "the same, training part over the whole training set": lambda s: [lowest(with_training_part(s, "all_train"))],
    "the same, training part as it trained (train mode)": lambda s: [lowest(with_training_part(s, "running"))],
    **{f"{size} labelled holdout samples": lambda s, size=size: disjoint(s, size) for size in LABELLED},
    "ceiling: Brier score, 1,000 samples labelled as wrongly as training": lambda s: [lowest(s["noisy_holdout_brier"])],
    "ceiling: Brier score, 1,000 labelled samples": lambda s: [lowest(s["holdout_brier"])],
}


# Kinds of runs, told from their name and what happened.
KINDS: dict[str, Callable[[str, Series], bool]] = {
    "CIFAR-10": lambda name, s: "-cifar10-" in name,
    "MNIST": lambda name, s: "-mnist-" in name,
    "MNIST, clean labels": lambda name, s: "-mnist-" in name and "-noise0-" in name,
    "clean labels": lambda name, s: "-noise0-" in name,
    "20 % wrong": lambda name, s: "-noise0.2-" in name,
    "40 % wrong": lambda name, s: "-noise0.4-" in name,
    "fully connected": lambda name, s: "-fc" in name,
    "convolutional, plain": lambda name, s: "-conv-n" in name,
    "batch norm": lambda name, s: "-batchnorm-" in name,
    "dropout": lambda name, s: "-dropout-" in name,
    "max-pooling": lambda name, s: "-pool-" in name,
    "inputs of mean 0 and deviation 1": lambda name, s: "normalized" in name,
    "minimum in the first five epochs": lambda name, s: lowest(s["val_risk_estimate"]) < 5,
    "minimum later": lambda name, s: lowest(s["val_risk_estimate"]) >= 5,
}


def regrets(runs: list[Series], rule: Rule) -> np.ndarray:
    """In percent, one for each run and choice."""
    loss = [s["test_loss"] for s in runs]
    return np.array([100 * (v[epoch] / v.min() - 1) for s, v in zip(runs, loss, strict=True) for epoch in rule(s)])


def summary(values: np.ndarray) -> str:
    return f"{np.median(values):.1f} | {values.mean():.1f} | {np.quantile(values, 0.9):.1f} | {values.max():.1f}"


def report(runs: dict[str, Series], title: str) -> str:
    """Markdown: the regret of every rule, and the size of the estimate."""
    all_series = list(runs.values())
    lines = [f"### {title}: {len(runs)} runs", "", "| rule | median | mean | 90 % | worst |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {summary(regrets(all_series, rule))} |" for name, rule in RULES.items()]
    epochs = range(min(len(s["epoch"]) for s in all_series))
    fixed = min(epochs, key=lambda epoch: regrets(all_series, lambda s: [epoch]).mean())
    fixed_regrets = regrets(all_series, lambda s: [fixed])
    lines.insert(5, f"| best fixed epoch in hindsight ({fixed}) | {summary(fixed_regrets)} |")
    chosen = {name: lowest(s["val_risk_estimate"]) for name, s in runs.items()}
    regret = {name: float(regrets([s], RULES[ESTIMATE])[0]) for name, s in runs.items()}
    ratios = {
        truth: {
            name: s["val_risk_estimate"][chosen[name]] / s[f"{truth}_brier"][chosen[name]] for name, s in runs.items()
        }
        for truth in ("test", "noisy_holdout")
    }
    lines += ["", "Regret of the minimum of `val_risk_estimate` by kind of run:", ""]
    lines += ["| runs | number | median | mean | 90 % | worst |", "|---|---|---|---|---|---|"]
    for kind, member in KINDS.items():
        if members := [regret[name] for name, s in runs.items() if member(name, s)]:
            lines.append(f"| {kind} | {len(members)} | {summary(np.array(members))} |")
    found = list(regret.values())
    signs = {"its epoch": list(chosen.values())}
    for term in ("training", "uncertainty", "variance"):
        signs[f"the share of {term}"] = [
            s[f"val_risk_{term}"][chosen[name]] / s["val_risk_estimate"][chosen[name]] for name, s in runs.items()
        ]
    foretold = [
        f"{name} {spearmanr(v, found).statistic:+.2f}" for name, v in signs.items() if np.ptp(v) and np.ptp(found)
    ]
    lines += [
        "",
        f"Spearman correlation of that regret, over runs, with what is seen at the minimum: {', '.join(foretold)}.",
    ]
    lines += ["", "Estimate over true holdout Brier score at the chosen epoch:", ""]
    lines += [
        "| training labels | holdout labels | runs | range | median | off by (median) |",
        "|---|---|---|---|---|---|",
    ]
    for training, holdout, truth in (
        ("clean", "clean", "test"),
        ("wrong", "clean", "test"),
        ("wrong", "as wrong", "noisy_holdout"),
    ):
        found = [ratio for name, ratio in ratios[truth].items() if ("-noise0-" in name) == (training == "clean")]
        lines.append(
            f"| {training} | {holdout} | {len(found)} | {min(found):.2f} to {max(found):.2f} |"
            f" {np.median(found):.2f} | {np.median(np.abs(np.array(found) - 1)):.0%} |"
        )
    lines += [
        "",
        "| run | regret of the estimate, % | chosen | best | estimate / true score |",
        "|---|---|---|---|---|",
    ]
    for name, s in runs.items():
        best = lowest(s["test_loss"])
        lines.append(f"| {name} | {regret[name]:.1f} | {chosen[name]} | {best} | {ratios['test'][name]:.2f} |")
    return "\n".join(lines)


def figure(runs: dict[str, Series], file: Path) -> None:
    """The estimate, its parts and the truth: the run of median regret, and the worst."""
    import matplotlib.pyplot as plt

    rule = RULES[ESTIMATE]
    by_regret = sorted(runs, key=lambda name: float(regrets([runs[name]], rule)[0]))
    shown = {"works": by_regret[len(by_regret) // 2], "fails": by_regret[-1]}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, (verdict, name) in zip(axes, shown.items(), strict=True):
        s = runs[name]
        (regret,) = regrets([s], rule)
        axis.plot(s["epoch"], s["test_brier"], color="black", lw=2.5, label="true holdout Brier score (needs labels)")
        axis.plot(s["epoch"], s["val_risk_estimate"], color="C3", lw=2.5, label="val_risk_estimate (needs none)")
        axis.plot(s["epoch"], s["val_risk_training"], color="C0", label="  training term")
        axis.plot(s["epoch"], s["val_risk_uncertainty"], color="C1", label="  uncertainty term")
        axis.plot(s["epoch"], s["val_risk_variance"], color="C2", label="  variance term, from sensitivity")
        axis.axvline(lowest(s["val_risk_estimate"]), color="C3", ls=":", label="chosen epoch")
        axis.axvline(lowest(s["test_loss"]), color="black", ls=":", label="lowest test loss")
        axis.set(ylim=(0, 1.15 * max(s["test_brier"].max(), s["val_risk_estimate"][0])), xlabel="epoch")
        title = name.split("-", 1)[1]
        axis.set_title(f"where it {verdict} (regret {regret:.1f} %)\n{title}", fontsize=9)
    axes[0].set_ylabel("Brier score")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(file, dpi=110)


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description="Regret of early stopping on the label-free risk estimate.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10.npz and mnist.npz, or torchvision's"
    )
    parser.add_argument("--out", type=Path, help="folder of the results [runs/early_stopping_study or ..._quick]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--further", action="store_true", help="also train on Fashion-MNIST, as a check on other data")
    parser.add_argument(
        "--quick", action="store_true", help="a dozen runs of 12 epochs: does it run, not what it finds"
    )
    args = parser.parse_args()
    out = args.out or Path(f"runs/early_stopping_study{'_quick' * args.quick}")
    out.mkdir(parents=True, exist_ok=True)
    wanted = [run for run in RUNS if run.half != "further" or args.further]
    runs, max_epochs = (wanted[::4], 12) if args.quick else (wanted, 40)
    missing = [run for run in runs if not (out / f"{run.name}.csv").exists()]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train, args.data, out, run, max_epochs) for run in missing]
        for job in tqdm(as_completed(jobs), "runs", len(runs), initial=len(runs) - len(missing)):
            job.result()
    done = {run: read(out / f"{run.name}.csv") for run in runs}
    halves = {
        half: {run.name: s for run, s in done.items() if run.half == half} for half in ("design", "report", "further")
    }
    text = [report(members, half) for half, members in halves.items() if members]
    text.append(report(halves["design"] | halves["report"], "both halves"))
    (out / "report.md").write_text("\n\n".join(text) + "\n")
    figure(halves["report"], out / "figure.png")
    print("\n\n".join(text), f"\n\nIn {out}: report.md, figure.png, and a CSV file for each run.", sep="")


if __name__ == "__main__":
    main()
