# %% [markdown]
# # Track generalization without labels
#
# A network is trained on 500 real images (scikit-learn's digits), 20 % of them with a wrong label. It learns, and then
# memorizes. `SensitivityMonitor` follows it on images whose labels it never sees, and estimates the Brier score on
# them. The validation loss and the true score, which do need the labels, are logged beside it to compare.
#
#     python examples/track_generalization.py

# %%
import argparse
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on scikit-learn's digits and watch the output sensitivity.")
parser.add_argument("--max-epochs", type=int, default=100)
parser.add_argument("--label-noise", type=float, default=0.2, help="share of training labels that are wrong")
parser.add_argument("--out", type=Path, default=Path("runs/track_generalization"))
args = parser.parse_args()

warnings.filterwarnings("ignore", ".*does not have many workers.*")
seed_everything(0, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait for the first

# %%
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)  # 1,797 images, 8 × 8, in [0, 1]
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, val = order[:500], order[500:]
wrong = torch.rand(len(train)) < args.label_noise
train_labels = torch.where(wrong, labels[train] + torch.randint(1, 10, (len(train),)), labels[train]) % 10
train_loader = DataLoader(TensorDataset(images[train], train_labels), batch_size=50, shuffle=True)
val_loader = DataLoader(TensorDataset(images[val], labels[val]), batch_size=500)


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val/loss", cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val/brier", (logits.softmax(1) - one_hot(batch[1], 10)).square().sum(1).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Table(Callback):
    """Keeps what was logged, to print it at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# %%
table = Table()
logger = TensorBoardLogger(args.out, name=None)
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[
        SensitivityMonitor(noise_std=0.1, num_draws=4, num_samples=None, prefix="val/", before_training=True),
        table,
    ],
    logger=logger,
    log_every_n_steps=10,
)
trainer.fit(Digits(), train_loader, val_loader)

# %%
print("\nepoch  train loss  val loss  val Brier score  estimate without labels  sensitivity ± standard error")
shown = range(0, len(table.rows), max(1, len(table.rows) // 10))
for epoch in sorted({*shown, len(table.rows) - 1}):
    row = table.rows[epoch]
    print(
        f"{epoch:5d}  {row['train_loss']:10.3f}  {row['val/loss']:8.3f}  {row['val/brier']:15.3f}"
        f"  {row['val/risk_estimate']:23.3f}  {row['val/sensitivity']:11.5f} ± {row['val/sensitivity_stderr']:.5f}"
    )
print(
    f"\nThe estimate is of the score against labels of which {args.label_noise:.0%} are wrong, as in training. Use it"
    " for its\nminimum, not for its size, which is far too large long after it."
)
losses = [row["val/loss"] for row in table.rows]
chosen, best = (
    min(range(len(losses)), key=lambda epoch: table.rows[epoch][name]) for name in ("val/risk_estimate", "val/loss")
)
print(f"\nThe estimate is lowest at epoch {chosen}, with a validation loss of {losses[chosen]:.3f};")
print(f"the validation loss is lowest at epoch {best}, {losses[best]:.3f}, and {losses[-1]:.3f} at the end.")
print(f"\nLook at the curves:\n  tensorboard --logdir {logger.log_dir}")
