# %% [markdown]
# # Watch a network learn, and then memorize
#
# A network is trained on 500 small images (scikit-learn's digits), 40 % of whose labels are wrong. `SensitivityMonitor`
# logs output sensitivity, `RiskMonitor` the risk criterion, and Lightning's `ModelCheckpoint` keeps the epoch where the
# criterion is lowest. Neither monitor sees a validation label, or knows which labels are wrong.
#
#     python examples/track_generalization.py            # half a minute
#     python examples/track_generalization.py --noise 0  # correct labels

# %%
import argparse
import os
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on digits, and draw accuracy, loss, sensitivity and criterion.")
parser.add_argument("--noise", type=float, default=0.4, help="share of training labels that are wrong")
parser.add_argument("--max-epochs", type=int, default=40)
parser.add_argument("--seed", type=int, default=1)
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait

# %% [markdown]
# The data: 500 images to train on, with noisy labels. The other 1,297 are for validation.

# %%
digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # 1,797 images, 1 × 8 × 8
order = torch.randperm(len(x))
x, y = x[order], torch.tensor(digits.target)[order]
is_wrong = torch.rand(500) < args.noise
y_train = torch.where(is_wrong, y[:500] + torch.randint(1, 10, (500,)), y[:500]) % 10
train_loader = DataLoader(TensorDataset(x[:500], y_train), batch_size=50, shuffle=True)
val_loader = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=500)

# %% [markdown]
# The module knows nothing of the callbacks. `forward` returns logits. `step` puts all curves on an axis of epochs.


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log_dict({"train/loss": loss, "step": float(self.current_epoch)}, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])  # with correct labels, only to compare
        self.log_dict({"val/loss": cross_entropy(logits, batch[1]), "step": float(self.current_epoch)})
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self) -> None:
        if is_wrong.any():  # of the wrong training labels, how many does the network repeat?
            repeated = self(x[:500][is_wrong]).argmax(1) == y_train[is_wrong]
            self.log("val/wrong_labels_repeated", repeated.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Curves(Callback):
    """Keeps what was logged, epoch by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            curves.setdefault(name, []).append(float(value))


# %% [markdown]
# What to copy: two monitors, and a checkpoint that goes by the criterion. At the end, `RiskMonitor` says what it found.

# %%
monitors = [SensitivityMonitor(noise=0.1), RiskMonitor()]
checkpoint = ModelCheckpoint(monitor="val/risk_criterion", filename="{epoch}")
logger = TensorBoardLogger("runs/digits", name=None, default_hp_metric=False)

curves: dict[str, list[float]] = {}
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[*monitors, checkpoint, Curves()],
    logger=logger,
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), train_loader, val_loader)

# %%
accuracies, criteria = curves["val/accuracy"], curves["val/risk_criterion"]
last, chosen, best = len(criteria) - 1, criteria.index(min(criteria)), accuracies.index(max(accuracies))
columns = ["accuracy", "wrong_labels_repeated", "loss", "output_sensitivity", "risk_criterion"]
columns = [name for name in columns if f"val/{name}" in curves]
print(f"\nepoch  {'  '.join(columns)}")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}", *(f"{curves[f'val/{name}'][epoch]:{len(name)}.3g}" for name in columns), sep="  ")
print(f"\nThe criterion is lowest at epoch {chosen}: accuracy on correct labels {accuracies[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {accuracies[last]:.3f}; the best is epoch {best}, {accuracies[best]:.3f}.")

# %%
plt.rcParams.update({"font.size": 13, "axes.titlesize": 13, "lines.linewidth": 2.5})
plt.rcParams.update(dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"))  # for light and dark pages
grey = ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"]
plt.rcParams.update(dict.fromkeys(grey, "#808080"))
figure = plt.figure(figsize=(7, 4.8), layout="constrained")
panels = figure.subplot_mosaic([["accuracy", name] for name in columns[-3:]], width_ratios=[1.4, 1], sharex=True)
left = panels["accuracy"]
left.plot(accuracies, "C0")
left.set(ylim=(0, 1), xlabel="epoch")
left.set_title("Accuracy on correct labels", color="C0")
left.plot([chosen, last], [accuracies[chosen], accuracies[last]], "o", color="C0", markersize=8)
left.annotate(f"{accuracies[last]:.2f}", (last, accuracies[last] - 0.08), color="C0", ha="right")
if chosen < last:
    left.annotate(f"{accuracies[chosen]:.2f}", (chosen + 1, accuracies[chosen] + 0.03), color="C0")
if is_wrong.any():
    left.plot(curves["val/wrong_labels_repeated"], "C3")
    left.annotate("wrong training labels\nthat it repeats", (last, 0.08), color="C3", ha="right")
for name, color in zip(columns[-3:], ("C7", "C2", "C1"), strict=True):
    panels[name].plot(curves[f"val/{name}"], color)
    panels[name].set_title({"loss": "Validation loss"}.get(name, name.replace("_", " ").capitalize()), color=color)
panels["output_sensitivity"].set_yscale("log")
panels["risk_criterion"].set_xlabel("epoch")
for panel in panels.values():
    panel.axvline(chosen, color="C7", linestyle="--", linewidth=1)
if not in_notebook:
    figure.savefig("runs/track_generalization.png", dpi=150)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print("The picture is runs/track_generalization.png. For all curves:")
    print(f"  {tensorboard} --logdir {logger.log_dir}")
