"""Tune a network with a validation split, train it anew on all labels, and stop where it is as far as the tuned one.

    python examples/stop_by_sensitivity.py  # half a minute

Images of digits come with scikit-learn. A fifth of the labels is drawn anew, as if people had made errors. 400 labels
are for training and 200 for tuning, then all 600 for training; of 500 more images there are no labels. The others have
correct labels, and show how accurate the network is.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor

parser = argparse.ArgumentParser(description="Stop a final run by a tuning run, and by output sensitivity.")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|Checkpoint directory|log_every_n_steps).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)  # the network is small: a second thread would only wait

# %% Data
images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
x, y = torch.tensor(images)[order].float() / 16, torch.tensor(digits)[order]
labels = y.clone()
labels[::5] = torch.randint(10, labels[::5].shape)
x_test, y_test = x[1100:], y[1100:]
train_loader = DataLoader(TensorDataset(x[:400], labels[:400]), 32, shuffle=True)
val_loader = DataLoader(TensorDataset(x[400:600], labels[400:600]), 200)
all_labels_loader = DataLoader(TensorDataset(x[:600], labels[:600]), 32, shuffle=True)
unlabelled_loader = DataLoader(TensorDataset(x[600:1100]), 500)


class Digits(LightningModule):
    """A network, and a validation step that needs labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on correct labels."""
    with torch.no_grad():
        return float((model.eval()(x_test).argmax(1) == y_test).float().mean())


class Curves(Callback):
    """Keeps progress and accuracy, epoch by epoch."""

    def __init__(self) -> None:
        self.progress: list[float] = []
        self.accuracy: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.append(float(trainer.callback_metrics["val/stop_progress"]))
        self.accuracy.append(accuracy(pl_module))
        pl_module.train()


def trainer(*callbacks: Callback) -> Trainer:
    """Make a quiet Trainer."""
    return Trainer(
        max_epochs=args.max_epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# %% What to copy: a tuning run, and a final run that stops by it
watch = SensitivityMonitor()
model = Digits()
tuning = trainer(watch)
tuning.fit(model, train_loader, val_loader)

torch.manual_seed(args.seed)
stop = watch.early_stopping("val/loss")
new_model = Digits()
new_model.validation_step = lambda batch, batch_idx: None  # no labels are left
final = trainer(watch, stop)
final.fit(new_model, all_labels_loader, unlabelled_loader)

# %% The same run without the stop, to show what it saves
torch.manual_seed(args.seed)
whole, curves = Digits(), Curves()
whole.validation_step = lambda batch, batch_idx: None
trainer(watch, curves).fit(whole, all_labels_loader, unlabelled_loader)

print("\nepoch  stop_progress  accuracy")
for epoch in range(0, args.max_epochs, max(1, args.max_epochs // 8)):
    print(f"{epoch:5d}  {curves.progress[epoch]:13.2f}  {curves.accuracy[epoch]:8.3f}")
stopped = final.current_epoch - 1
print(f"\nTuned on 400 labels, to the end: accuracy {accuracy(model):.3f}.")
print(f"Trained on 600 labels, stopped at epoch {stopped}: {accuracy(new_model):.3f}.")
print(f"Trained on 600 labels to the end: {curves.accuracy[-1]:.3f}.")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(curves.progress, "C2")
left.axhline(1, color="C2", linestyle="--", linewidth=1)
left.set(title="val/stop_progress", xlabel="epoch")
right.plot(curves.accuracy, "C0")
right.set(title="Accuracy on correct labels", xlabel="epoch")
for ax in (left, right):
    ax.axvline(stopped, color="C7", linestyle=":")
Path("runs/digits").mkdir(parents=True, exist_ok=True)
figure.savefig("runs/digits/stop_by_sensitivity.png", dpi=120)
print("The picture is runs/digits/stop_by_sensitivity.png.")
