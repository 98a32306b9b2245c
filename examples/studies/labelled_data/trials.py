"""Two small trials: what to validate on if all data are labelled, and some of the labels are wrong.

python examples/studies/labelled_data/trials.py  # minutes on one core; writes results.csv beside this file
python examples/studies/tables.py                # puts its numbers into README.md
"""

import logging.handlers
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from pandas import DataFrame
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from lightning_sensitivity import RiskMonitor

SEEDS, NUM_UNLABELLED, NUM_SPLIT_OFF, NO_LABEL = range(5), 500, 50, -100
RULES = {  # the fit that a rule is for, and the value that is lowest at the epoch it chooses
    "tenth_with_labels": ("tenth", "risk_criterion"),
    "tenth_without_labels": ("tenth without labels", "risk_criterion"),
    "tenth_by_loss": ("tenth", "loss"),
    "tenth_by_brier": ("tenth", "brier"),
    "training_set": ("training set", "risk_criterion"),
    "unlabelled": ("unlabelled", "risk_criterion"),
    "split_off": ("split off", "risk_criterion"),
    "last_epoch": ("training set", "epochs_left"),
    "best_of_nine_tenths": ("tenth", "error"),
    "best_of_all": ("training set", "error"),
}


class Trial(NamedTuple):
    train: TensorDataset  # some labels are wrong
    unlabelled: TensorDataset
    test: tuple[Tensor, Tensor]  # with correct labels
    make_network: Callable[[], nn.Sequential]
    learning_rate: float
    batch_size: int
    num_epochs: int


def draw(x: Tensor, y: Tensor, seed: int, num_train: int, wrong: float, *options: Any) -> Trial:
    """Split at random, and turn a share of the training labels into another class."""
    generator = torch.Generator().manual_seed(100 + seed)
    order, num_classes = torch.randperm(len(x), generator=generator), len(y.unique())
    train, unlabelled, test = order.tensor_split([num_train, num_train + NUM_UNLABELLED])
    is_wrong = torch.rand(num_train, generator=generator) < wrong
    noisy = (y[train] + is_wrong * torch.randint(1, num_classes, (num_train,), generator=generator)) % num_classes
    no_labels = torch.full((NUM_UNLABELLED,), NO_LABEL)
    return Trial(TensorDataset(x[train], noisy), TensorDataset(x[unlabelled], no_labels), (x[test], y[test]), *options)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


def cnn() -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((1, 24), (24, 48), (48, 48)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 10))


def table(seed: int) -> Trial:
    x, y = make_classification(4000, 20, n_informative=10, n_classes=4, flip_y=0, random_state=seed)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    return draw(x, torch.tensor(y), seed, 800, 0.2, mlp, 1e-3, 32, 60)


def digits(seed: int) -> Trial:
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    return draw(x.float().reshape(-1, 1, 8, 8) / 16, y, seed, 600, 0.3, cnn, 2e-3, 64, 30)


class Classifier(LightningModule):
    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.network, self.learning_rate, self.test = trial.make_network(), trial.learning_rate, trial.test
        self.rows: list[dict[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = (tensor[batch[1] != NO_LABEL] for tensor in batch)
        if len(y) > 0:
            logits = self(x)
            brier = (logits.softmax(1) - one_hot(y, logits.shape[1])).square().sum(1).mean()
            self.log_dict({"loss": cross_entropy(logits, y), "brier": brier}, batch_size=len(y))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            error = (self(self.test[0]).argmax(1) != self.test[1]).float().mean()
            values = {"error": error, "epochs_left": -self.current_epoch, **self.trainer.callback_metrics}
            self.rows.append({name: float(value) for name, value in values.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def fit(trial: Trial, seed: int, train: Dataset, validation: Dataset, labels: bool = False) -> tuple[DataFrame, str]:
    """Train to the end, and return the curves and the last line."""
    seed_everything(seed, verbose=False)
    logging.getLogger("lightning.pytorch").handlers = [log := logging.handlers.BufferingHandler(1000)]
    module, risk = Classifier(trial), RiskMonitor(prefix="", validation_labels=labels)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=trial.num_epochs, accelerator="cpu", callbacks=[risk], **quiet)
    loaders = DataLoader(train, trial.batch_size, shuffle=True), DataLoader(validation, trial.batch_size)
    trainer.fit(module, *loaders)
    return DataFrame(module.rows), next(line for line in map(log.format, log.buffer) if "was lowest" in line)


def results(make_trial: Callable[[int], Trial], seed: int) -> Iterator[dict[str, Any]]:
    """Give the epoch of each rule, the accuracy there, and how much less that is than the best, trained on all."""
    trial, num_tenth = make_trial(seed), len(make_trial(seed).train) // 10
    nine_tenths, tenth = TensorDataset(*trial.train[:-num_tenth]), TensorDataset(*trial.train[-num_tenth:])
    others, split_off = TensorDataset(*trial.train[:-NUM_SPLIT_OFF]), TensorDataset(*trial.train[-NUM_SPLIT_OFF:])
    fits = {
        "tenth": fit(trial, seed, nine_tenths, tenth, labels=True),
        "tenth without labels": fit(trial, seed, nine_tenths, tenth),
        "training set": fit(trial, seed, trial.train, trial.train),
        "unlabelled": fit(trial, seed, trial.train, trial.unlabelled),
        "split off": fit(trial, seed, others, ConcatDataset([split_off, trial.unlabelled]), labels=True),
    }
    for rule, (name, value) in RULES.items():
        curves, line = fits[name]
        epoch = curves[value].argmin()
        error, lowest = curves["error"][epoch], fits["training set"][0]["error"].min()
        row = {"data": make_trial.__name__, "seed": seed, "rule": rule, "epoch": epoch, "accuracy": 1 - error}
        yield row | {"accuracy_lost": 100 * (error - lowest), "last_line": line if value == "risk_criterion" else ""}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the log).*")
    torch.set_num_threads(1)
    runs = DataFrame([row for make in (table, digits) for seed in SEEDS for row in results(make, seed)])
    runs.to_csv(Path(__file__).with_name("results.csv"), index=False, float_format="%.4f", lineterminator="\n")
