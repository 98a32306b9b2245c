"""Tune a network with a validation split, train it anew on all labels, and stop by a bound on output sensitivity.

    python examples/stop_by_sensitivity.py  # half a minute

Images of digits come with scikit-learn. A fifth of the labels is drawn anew, as if people had made errors. 400 labels
are for training and 200 for tuning, then all 600 for training; of 500 more images there are no labels. The others have
correct labels, and show how accurate the network is.
"""

import argparse
import warnings

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor

parser = argparse.ArgumentParser(description="Stop by a bound on output sensitivity, which a tuning run gives.")
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
    """Keeps sensitivity and accuracy, epoch by epoch."""

    def __init__(self) -> None:
        self.sensitivity: list[float] = []
        self.accuracy: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sensitivity.append(float(trainer.callback_metrics[watch.name]))
        self.accuracy.append(accuracy(pl_module))
        pl_module.train()


def trainer(*callbacks: Callback) -> Trainer:
    """Make a quiet Trainer."""
    return Trainer(
        max_epochs=args.max_epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        default_root_dir="runs/digits",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# %% What to copy: a tuning run, the sensitivity at its lowest validation loss, and a final run with a bound
watch = SensitivityMonitor(noise=0.1, per_output=True)
model = Digits()
tuning = trainer(watch, ModelCheckpoint(monitor="val/loss"))
tuning.fit(model, train_loader, val_loader)
value = tuning.validate(model, val_loader, ckpt_path="best", verbose=False)[0][
    watch.name
]  # it loads the best weights, too

torch.manual_seed(args.seed)
new_model = Digits()
new_model.validation_step = lambda batch, batch_idx: None  # no labels are left
stop = EarlyStopping(watch.name, divergence_threshold=2 * value, patience=1000)
final = trainer(watch, stop)
final.fit(new_model, all_labels_loader, unlabelled_loader)

# %% The same run without the bound, to show what it saves
torch.manual_seed(args.seed)
whole, curves = Digits(), Curves()
whole.validation_step = lambda batch, batch_idx: None
trainer(watch, curves).fit(whole, all_labels_loader, unlabelled_loader)

print("\nepoch  sensitivity  accuracy")
for epoch in range(0, args.max_epochs, max(1, args.max_epochs // 8)):
    print(f"{epoch:5d}  {curves.sensitivity[epoch]:11.4f}  {curves.accuracy[epoch]:8.3f}")
stopped = final.current_epoch - 1
print(f"\nTuned on 400 labels, at its lowest validation loss: accuracy {accuracy(model):.3f}.")
print(f"Trained on 600 labels, stopped at epoch {stopped} by the bound, {2 * value:.3g}: {accuracy(new_model):.3f}.")
print(f"Trained on 600 labels to the end: {curves.accuracy[-1]:.3f}.")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(curves.sensitivity, "C2")
left.axhline(2 * value, color="C2", linestyle="--", linewidth=1)
left.set(title="Output sensitivity, and its bound", xlabel="epoch")
right.plot(curves.accuracy, "C0")
right.set(title="Accuracy on correct labels", xlabel="epoch")
for ax in (left, right):
    ax.axvline(stopped, color="C7", linestyle=":")
figure.savefig("runs/digits/stop_by_sensitivity.png", dpi=120)
print("The picture is runs/digits/stop_by_sensitivity.png.")
