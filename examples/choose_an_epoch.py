"""Choose an epoch without labels: 300 rows of scikit-learn's breast cancer data, 25 % of the labels flipped.

    python examples/choose_an_epoch.py               # validated on new rows without labels; 20 seconds
    python examples/choose_an_epoch.py --labels      # a fifth of the rows is held out, with its noisy labels
    python examples/choose_an_epoch.py --regression  # progression of diabetes, a number, in place of two classes

Real tables have some columns of large numbers: standardize them. The labels are floats, 0 or 1, and the network has one
output, so that the task is "binary". See docs/guide/data.md.
"""

import argparse
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Train on a noisy table, and keep the epoch of the best expected value.")
parser.add_argument("--labels", action="store_true", help="hold out a fifth of the rows, with its noisy labels")
parser.add_argument("--regression", action="store_true", help="a table whose targets are numbers")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)

# %% Data: 300 rows to train on; the others stand for new rows, and their labels only show how well it went
table = load_diabetes() if args.regression else load_breast_cancer()
order = torch.randperm(len(table.data))
x = torch.tensor(table.data, dtype=torch.float32)[order]
y = torch.tensor(table.target, dtype=torch.float32)[order]
x = (x - x[:300].mean(0)) / x[:300].std(0)
if args.regression:
    y = (y - y[:300].mean()) / y[:300].std()
    y_train = y[:300]  # what makes these numbers noisy is not in the table
else:
    y_train = torch.where(torch.rand(300) < 0.25, 1 - y[:300], y[:300])
x_new, y_new = x[300:], y[300:]
labelled = TensorDataset(x[:300], y_train)
train_set, val_set = random_split(labelled, [0.8, 0.2]) if args.labels else (labelled, TensorDataset(x_new))
train_loader = DataLoader(train_set, batch_size=30, shuffle=True)
val_loader = DataLoader(val_set, batch_size=300)


# %% The module
class Table(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)  # one logit, or one number, for each row

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = mse_loss if args.regression else binary_cross_entropy_with_logits
        return loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Curves(Callback):
    """Keeps the expected value and, for comparison, how good the network is on new rows."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            outputs = pl_module(x_new)
        correct = (outputs > 0) == (y_new > 0)
        explained = 1 - mse_loss(outputs, y_new) / y_new.var()
        expected.append(float(trainer.callback_metrics[monitored]))
        scores.append(float(explained if args.regression else correct.float().mean()))


# %% What to copy
if args.regression:
    task, monitored, mode = "regression", "val/expected_loss", "min"
else:
    task, monitored, mode = "binary", "val/expected_accuracy", "max"
risk = RiskMonitor(task, validation_labels=args.labels)
checkpoint = ModelCheckpoint(monitor=monitored, mode=mode, dirpath="runs/choose_an_epoch", filename="{epoch}")
expected: list[float] = []
scores: list[float] = []
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, Curves(), checkpoint],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Table(), train_loader, val_loader)

name = "share of the variance explained" if args.regression else "accuracy on correct labels"
best_of, word = (min, "lowest") if args.regression else (max, "highest")
chosen, best, last = expected.index(best_of(expected)), scores.index(max(scores)), len(scores) - 1
print(f"\nepoch  {monitored}  {name}")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}  {expected[epoch]:{len(monitored)}.4f}  {scores[epoch]:8.3f}")
print(f"\n`{monitored}` is {word} at epoch {chosen}: {name} {scores[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {scores[last]:.3f}; the best is epoch {best}, {scores[best]:.3f}.")

# The reference is a model, too: a rival, and a partner
both = risk.predict(Table.load_from_checkpoint(checkpoint.best_model_path), DataLoader(x_new, batch_size=300))
for who, found in (("The reference", both.reference), ("The mean of both", both.mean)):
    if args.regression:
        score = 1 - mse_loss(found[:, 0], y_new) / y_new.var()
    else:
        score = (found.argmax(1) == y_new).float().mean()
    print(f"{who}: {float(score):.3f}.")
