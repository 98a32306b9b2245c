# %% [markdown]
# # Stop before a network memorizes, without validation labels
#
# A network is trained on 500 small images (scikit-learn's digits), 40 % of them with a wrong label. It learns, and then
# it memorizes. `RiskMonitor` estimates the Brier score on unseen images, and Lightning's `EarlyStopping` goes by it.
# `SensitivityMonitor` logs how strongly the outputs answer to noise on the inputs, which follows the gap between
# validation and training loss. Both see no validation label: validation loss and true score are there to compare.
#
#     python examples/track_generalization.py                   # half a minute
#     python examples/track_generalization.py --patience 40     # goes on, to show what follows

# %%
import argparse
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on scikit-learn's digits, and stop by the risk estimate.")
parser.add_argument("--max-epochs", type=int, default=40)
parser.add_argument("--patience", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--figure", type=Path, help="where to put a picture of the curves")
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait for the first

# %% [markdown]
# The data: 500 images to train on, the other 1,297 to validate. 40 % of the training labels are wrong.

# %%
digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32)  # 1,797 images, 8 × 8, in [0, 1]
order = torch.randperm(len(x))
x, y = x[order], torch.tensor(digits.target)[order]
y_train = torch.where(torch.rand(500) < 0.4, y[:500] + torch.randint(1, 10, (500,)), y[:500]) % 10
train_loader = DataLoader(TensorDataset(x[:500], y_train), batch_size=50, shuffle=True)
val_loader = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=500)

# %% [markdown]
# The module knows nothing of the callbacks. `forward` returns logits.


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val/loss", cross_entropy(logits, batch[1]), prog_bar=True)
        # What the estimate is of: the Brier score against labels as wrong as those of training.
        p, truth = logits.softmax(1), one_hot(batch[1], 10)
        chances = 0.6 * truth + 0.4 * (1 - truth) / 9
        self.log("val/true_score", (1 - 2 * (p * chances).sum(1) + p.square().sum(1)).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Curves(Callback):
    """Keeps what was logged, epoch by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            curves.setdefault(name, []).append(float(value))


# %% [markdown]
# What to copy: two monitors, and what goes by the estimate. With the prefix `val/`, TensorBoard shows loss, estimate
# and sensitivity in one group.

# %%
monitors = [RiskMonitor(prefix="val/", prog_bar=True), SensitivityMonitor(prefix="val/")]
stopping = EarlyStopping(monitor="val/risk_estimate", patience=args.patience)
checkpoint = ModelCheckpoint(monitor="val/risk_estimate", filename="{epoch}")

curves: dict[str, list[float]] = {}
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[*monitors, stopping, checkpoint, Curves()],
    logger=TensorBoardLogger("runs/track_generalization", name=None),
    log_every_n_steps=10,
    enable_progress_bar=not in_notebook,
    enable_model_summary=False,
)
trainer.fit(Digits(), train_loader, val_loader)

# %%
losses, estimates = curves["val/loss"], curves["val/risk_estimate"]
last, chosen, best = len(losses) - 1, estimates.index(min(estimates)), losses.index(min(losses))
print("\n              with labels            |   without validation labels")
print("epoch  train loss  val loss  true score | estimate  sensitivity ± its error")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    row = {name.removeprefix("val/"): values[epoch] for name, values in curves.items()}
    print(
        f"{epoch:5d}  {row['train/loss']:10.3f}  {row['loss']:8.3f}  {row['true_score']:10.3f} |"
        f" {row['risk_estimate']:8.3f}  {row['sensitivity']:11.2g} ± {row['sensitivity_stderr']:.1g}"
    )
print(f"\nThe estimate is lowest at epoch {chosen}, where the validation loss is {losses[chosen]:.3f}.")
print(f"The validation loss is lowest at epoch {best}, {losses[best]:.3f}; at the last epoch it is {losses[-1]:.3f}.")
print(f"The run ended at epoch {last}. Its checkpoint:\n  {os.path.relpath(checkpoint.best_model_path)}")
tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
print(f"Look at the curves:\n  {tensorboard} --logdir {trainer.log_dir}")

# %%
if args.figure or in_notebook:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    shown = ("val/loss", "train/loss"), ("val/risk_estimate", "val/true_score"), ("val/output_sensitivity",)
    titles = "loss (cross-entropy)", "Brier score, 40 % of labels wrong", "sensitivity S"
    for axis, names, title, color in zip(axes, shown, titles, ("C0", "C1", "C1"), strict=True):
        for name in names:
            axis.plot(curves[name], label=name, color=color if name is names[0] else "C7")
        axis.axvline(chosen, color="C1", linestyle="--", label="lowest estimate")
        axis.set(title=title, xlabel="epoch", **({"ylim": (0, None)} if len(names) > 1 else {"yscale": "log"}))
    axes[0].axvline(best, color="C0", linestyle=":", label="lowest loss")
    for axis in axes:
        axis.legend(fontsize="small")
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.figure, dpi=100)
