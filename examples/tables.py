"""A two-class table with noisy labels: 300 rows of scikit-learn's breast cancer data, 25 % of the labels flipped.

    python examples/tables.py               # a tenth of the rows is held out, with its noisy labels; 20 seconds
    python examples/tables.py --unlabelled  # trained on all 300 rows, validated on new ones without labels

Real tables have some columns of large numbers: standardize them. The labels are floats, 0 or 1, and the network has one
output, so that the task is "binary". See docs/guide/data.md.
"""

import argparse
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Train on a noisy table, and keep the epoch with the lowest criterion.")
parser.add_argument("--unlabelled", action="store_true", help="validate on new rows, without labels")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)

# %% Data: 300 rows with noisy labels; the others stand for new rows
table = load_breast_cancer()
order = torch.randperm(len(table.data))
x = torch.tensor(table.data, dtype=torch.float32)[order]
y = torch.tensor(table.target, dtype=torch.float32)[order]
x = (x - x[:300].mean(0)) / x[:300].std(0)
y_noisy = torch.where(torch.rand(300) < 0.25, 1 - y[:300], y[:300])
x_new, y_new = x[300:], y[300:]  # y_new is only for comparison
labelled = TensorDataset(x[:300], y_noisy)
train_set, val_set = (labelled, TensorDataset(x_new)) if args.unlabelled else random_split(labelled, [0.9, 0.1])
train_loader = DataLoader(train_set, batch_size=30, shuffle=True)
val_loader = DataLoader(val_set, batch_size=300)


# %% The module
class Table(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)  # one logit for each row

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if not args.unlabelled:
            self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Curves(Callback):
    """Keeps the criterion and, for comparison, the accuracy on correct labels."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            correct = (pl_module(x_new) > 0) == (y_new > 0)
        criteria.append(float(trainer.callback_metrics["val/risk_criterion"]))
        accuracies.append(float(correct.float().mean()))


# %% What to copy
risk = RiskMonitor(task="binary", validation_labels=not args.unlabelled)
checkpoint = ModelCheckpoint(monitor="val/risk_criterion", dirpath="runs/tables", filename="{epoch}")
criteria: list[float] = []
accuracies: list[float] = []
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, Curves(), checkpoint],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Table(), train_loader, val_loader)

chosen, best, last = criteria.index(min(criteria)), accuracies.index(max(accuracies)), len(accuracies) - 1
print("\nepoch  criterion  accuracy on correct labels")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}  {criteria[epoch]:9.3f}  {accuracies[epoch]:8.3f}")
print(f"\nThe criterion is lowest at epoch {chosen}, where the accuracy is {accuracies[chosen]:.3f}.")
print(f"It is highest at epoch {best}, {accuracies[best]:.3f}, and {accuracies[last]:.3f} at the last, epoch {last}.")
