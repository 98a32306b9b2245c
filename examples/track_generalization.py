# %% [markdown]
# # Keep the checkpoint from before a network memorizes
#
# A network is trained on 500 small images (scikit-learn's digits) with 40 % noisy labels. It learns, and then it
# memorizes. `RiskMonitor` logs a criterion from training labels and unlabelled images, and Lightning's
# `ModelCheckpoint` keeps the epoch where it is lowest. `SensitivityMonitor` logs how strongly the outputs respond to
# noise on the inputs. Neither sees a validation label: loss and accuracy are logged only to compare.
#
#     python examples/track_generalization.py                  # half a minute
#     python examples/track_generalization.py --patience 13    # stops early

# %%
import argparse
import os
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on digits, and keep the epoch with the lowest criterion.")
parser.add_argument("--max-epochs", type=int, default=40)
parser.add_argument("--patience", type=int, default=40, help="default: never stop")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--figure", type=Path, default=Path("runs/curves.png"))
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait

# %% [markdown]
# The data: 500 images to train on, with 40 % noisy labels. The other 1,297 are for validation.

# %%
digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32)  # 1,797 images, 8 × 8
order = torch.randperm(len(x))
x, y = x[order], torch.tensor(digits.target)[order]
is_noisy = torch.rand(500) < 0.4
y_train = torch.where(is_noisy, y[:500] + torch.randint(1, 10, (500,)), y[:500]) % 10
train_loader = DataLoader(TensorDataset(x[:500], y_train), batch_size=50, shuffle=True)
val_loader = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=500)

# %% [markdown]
# The module knows nothing of the callbacks. `forward` returns logits.


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(64, 256), nn.Linear(256, 256)
        self.body = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])  # with correct labels, only to compare
        self.log("val/loss", cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Curves(Callback):
    """Keeps what was logged, epoch by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            curves.setdefault(name, []).append(float(value))


# %% [markdown]
# What to copy: two monitors, and what goes by the criterion. With the prefix `val/`, TensorBoard shows loss, criterion
# and sensitivity in one group. Without `default_hp_metric=False` it would show an empty chart, too.

# %%
risk = RiskMonitor(prefix="val/", prog_bar=True)
sensitivity = SensitivityMonitor(prefix="val/")
stopping = EarlyStopping(monitor="val/risk_criterion", patience=args.patience)
checkpoint = ModelCheckpoint(monitor="val/risk_criterion", filename="{epoch}")
logger = TensorBoardLogger("runs/digits", name=None, default_hp_metric=False)

curves: dict[str, list[float]] = {}
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, sensitivity, stopping, checkpoint, Curves()],
    logger=logger,
    log_every_n_steps=10,
    enable_progress_bar=sys.stdout.isatty(),
    enable_model_summary=False,
)
trainer.fit(Digits(), train_loader, val_loader)

# %%
accuracies, criteria = curves["val/accuracy"], curves["val/risk_criterion"]
last, chosen = len(criteria) - 1, criteria.index(min(criteria))
best = accuracies.index(max(accuracies))
print("\n            with correct labels    |   without validation labels")
print("epoch  train loss  val loss  accuracy | criterion  sensitivity ± its error")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    row = {name.removeprefix("val/"): values[epoch] for name, values in curves.items()}
    print(f"{epoch:5d}  {row['train/loss']:10.3f}  {row['loss']:8.3f}", end="")
    print(f"  {row['accuracy']:8.3f} | {row['risk_criterion']:9.3f}", end="")
    print(f"  {row['output_sensitivity']:11.2g} ± {row['output_sensitivity_stderr']:.1g}")
print(f"\nThe criterion is lowest at epoch {chosen}: accuracy {accuracies[chosen]:.3f}.")
print(f"Accuracy is highest at epoch {best}, {accuracies[best]:.3f}, ", end="")
print(f"and {accuracies[-1]:.3f} at the last one, epoch {last}.")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(criteria, color="C1")
left.set(title="risk criterion, without validation labels", xlabel="epoch")
right.plot(accuracies, color="C0")
right.set(title="accuracy on correct labels", xlabel="epoch")
right.set(xlim=(None, last + 5), ylim=(0.5, 1))
for axis in (left, right):
    axis.axvline(chosen, color="C1", linestyle="--", label="lowest criterion")
    axis.legend(loc="upper center")
for epoch in (chosen, last):
    accuracy = accuracies[epoch]
    right.plot(epoch, accuracy, "o", color="C0")
    right.annotate(f"{accuracy:.2f}", (epoch + 0.7, accuracy + 0.015))
if not in_notebook:
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"The picture is {args.figure}. For all curves:")
    print(f"  {tensorboard} --logdir {logger.log_dir}")
