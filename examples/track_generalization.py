# %% [markdown]
# # Watch a network learn, and then memorize
#
# A network is trained on 500 small images (scikit-learn's digits) with 40 % noisy labels. `SensitivityMonitor` logs
# output sensitivity, `RiskMonitor` the risk criterion, and Lightning's `ModelCheckpoint` keeps the epoch where the
# criterion is lowest. Neither sees a validation label: loss and accuracy are logged only to compare.
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

parser = argparse.ArgumentParser(description="Train on digits, and draw loss, sensitivity and criterion.")
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
# What to copy: two monitors, and what goes by the criterion. TensorBoard shows loss, criterion
# and sensitivity in one group. Without `default_hp_metric=False` it would show an empty chart, too.

# %%
risk = RiskMonitor(prog_bar=True)
sensitivity = SensitivityMonitor()
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
model = Digits()
(before,) = trainer.validate(model, val_loader, verbose=False)  # sensitivity before training
trainer.fit(model, train_loader, val_loader)

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
print(f"\nBefore training, sensitivity was {before['val/output_sensitivity']:.2g}.")
print(f"The criterion is lowest at epoch {chosen}: accuracy {accuracies[chosen]:.3f}.")
print(f"Accuracy is highest at epoch {best}, {accuracies[best]:.3f}, ", end="")
print(f"and {accuracies[-1]:.3f} at the last one, epoch {last}.")

# %%
plt.rcParams["axes.titlesize"] = "medium"
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
losses, first = curves["val/loss"], before["val/output_sensitivity"]
left.plot(losses, color="C0")
left.set(title="validation loss: needs correct labels", ylim=(0, None))
for epoch, x, side in ((chosen, chosen + 1, "left"), (last, last + 1, "right")):
    left.plot(epoch, losses[epoch], "o", color="C0", markersize=4)
    left.annotate(f"accuracy {accuracies[epoch]:.2f}", (x, 0.4), color="C0", ha=side, fontsize="small")
middle.plot(curves["val/output_sensitivity"], color="C2")
middle.plot(-1, first, "o", color="C2", markersize=4)
middle.annotate("before training", (chosen + 1, first), color="C2", va="center", fontsize="small")
middle.plot([-1, chosen + 0.7], [first, first], color="C2", linewidth=0.5)
middle.set(title="output sensitivity: needs no labels", yscale="log")
right.plot(criteria, color="C1")
right.set(title="risk criterion: needs no validation labels")
right.annotate(f"lowest at epoch {chosen}", (chosen + 1, max(criteria)), color="C1", va="top", fontsize="small")
for axis in (left, middle, right):
    axis.axvline(chosen, color="C7", linestyle="--", linewidth=1)
    axis.set(xlabel="epoch", xlim=(-3, last + 2))
if not in_notebook:
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"The picture is {args.figure}. For all curves:")
    print(f"  {tensorboard} --logdir {logger.log_dir}")
