# %% [markdown]
# # Track generalization without labels
#
# A network is trained on 500 small images (scikit-learn's digits), 40 % of them with a wrong label. It learns, and then
# it memorizes. Two callbacks follow it on images whose labels they never see. `RiskMonitor` estimates the Brier score
# on unseen images, and its minimum says when to stop. `SensitivityMonitor` measures how strongly the outputs answer to
# noise on the inputs. The validation loss and the true score need labels; they are there to compare.
#
#     python examples/track_generalization.py                     # half a minute
#     python examples/track_generalization.py --label-noise 0.2   # fewer wrong labels

# %%
import argparse
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on scikit-learn's digits and watch risk estimate and sensitivity.")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--label-noise", type=float, default=0.4, help="share of labels that are wrong")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs/track_generalization"))
parser.add_argument("--figure", type=Path, help="where to put a picture of the curves")
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait for the first

# %% [markdown]
# The data: 500 images for training, the other 1,297 to validate. Labels of training are wrong at random.

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

# %% [markdown]
# The module knows nothing of the callbacks. `forward` returns logits.


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]), prog_bar=True)
        # The Brier score that labels as wrong as those of training would give: what the estimate is of.
        p, truth = logits.softmax(1), one_hot(batch[1], 10)
        chances = (1 - args.label_noise) * truth + args.label_noise * (1 - truth) / 9
        self.log("val_brier", (1 - 2 * (p * chances).sum(1) + p.square().sum(1)).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Table(Callback):
    """Keeps what was logged, to print it at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# %% [markdown]
# The checkpoint is chosen by the estimate. `EarlyStopping(monitor="val_risk_estimate", patience=10)` would also end the
# run. Here it goes on, to show what follows.

# %%
table = Table()
logger = TensorBoardLogger(args.out, name=None)
checkpoint = ModelCheckpoint(monitor="val_risk_estimate", filename="{epoch}")
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[RiskMonitor(), SensitivityMonitor(noise_std=0.1), checkpoint, table],
    logger=logger,
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), train_loader, val_loader)

# %%
curves = {name: [row[name] for row in table.rows] for name in table.rows[0]}
losses, estimates = curves["val_loss"], curves["val_risk_estimate"]
chosen, best = (min(range(len(values)), key=values.__getitem__) for values in (estimates, losses))
print("\n              with labels            |            without labels")
print("epoch  train loss  val loss  true score | estimate  sensitivity ± its error")
for epoch in sorted({*range(0, args.max_epochs, max(1, args.max_epochs // 12)), chosen, best, args.max_epochs - 1}):
    row = {name: values[epoch] for name, values in curves.items()}
    mark = "  <-" if epoch == chosen else ""
    print(
        f"{epoch:5d}  {row['train_loss']:10.3f}  {row['val_loss']:8.3f}  {row['val_brier']:10.3f} |"
        f" {row['val_risk_estimate']:8.3f}  {row['val_sensitivity']:11.2g} ± {row['val_sensitivity_stderr']:.1g}{mark}"
    )
print(f"\nThe estimate is lowest at epoch {chosen} (<-); the validation loss is {losses[chosen]:.3f} there.")
print(f"The validation loss is lowest at epoch {best}, {losses[best]:.3f}, and {losses[-1]:.3f} at the end.")
waited = [epoch - min(range(epoch + 1), key=estimates.__getitem__) for epoch in range(len(estimates))]
end = f"end the run at epoch {waited.index(10)}" if 10 in waited else "not end the run"
print(f"EarlyStopping with a patience of 10 epochs would {end}.")
print(f"The checkpoint: {os.path.relpath(checkpoint.best_model_path)}")

# %%
if args.figure or in_notebook:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    names = (
        {"validation": "val_loss", "training": "train_loss"},
        {"risk estimate": "val_risk_estimate", "true score": "val_brier"},
        {"sensitivity": "val_sensitivity"},
    )
    titles = ("loss (cross-entropy)", f"Brier score, {args.label_noise:.0%} of labels wrong", "sensitivity S")
    for axis, title, lines in zip(axes, titles, names, strict=True):
        for (label, name), color in zip(lines.items(), ("C0" if axis is axes[0] else "C1", "C7"), strict=False):
            axis.plot(curves[name], label=label, color=color)
        axis.axvline(chosen, color="C1", linestyle="--", label="lowest estimate")
        axis.set(title=title, xlabel="epoch", **({"yscale": "log"} if axis is axes[2] else {"ylim": (0, None)}))
    axes[0].axvline(best, color="C0", linestyle=":", label="lowest loss")
    for axis in axes:
        axis.legend(fontsize="small")
    if args.figure:
        figure.savefig(args.figure, dpi=100)

tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
print(f"\nLook at the curves:\n  {tensorboard} --logdir {logger.log_dir}")
