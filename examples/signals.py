"""Windows of sensor data from several machines, 30 % noisy labels: which of five states is a machine in?

    python examples/signals.py           # trained on eight machines, validated on eight others without labels
    python examples/signals.py --labels  # one of the eight is held out, with its noisy labels

The signals are made here: two sensors, a vibration with a frequency of its own for each state, and for each machine
another amplitude, drift and hum. Whole machines are held out, since windows of one machine are alike: a random split
would say too little about a new machine. See docs/guide/data.md.
"""

import argparse
import math
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Train a 1-D CNN on noisy windows, and keep the epoch to choose.")
parser.add_argument("--labels", action="store_true", help="hold out a machine, with its noisy labels")
parser.add_argument("--max-epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)
NUM_STATES, LENGTH = 5, 128


# %% Data: 8 machines with noisy labels, 8 others without labels, and 8 to compare with at the end
def windows_of_a_machine(num_windows: int) -> tuple[Tensor, Tensor]:
    """Windows (N, 2, 128) of one machine, and its states."""
    states = torch.randint(NUM_STATES, (num_windows,))
    time = torch.arange(LENGTH) / LENGTH
    amplitude, hum, drift = 0.6 + torch.rand(3, 1) * torch.tensor([[0.8], [1.0], [1.0]])
    frequency = (4 + 2.5 * states + torch.randn(num_windows))[:, None]
    phase = 2 * math.pi * torch.rand(num_windows, 1)
    vibration = amplitude * torch.sin(2 * math.pi * frequency * time + phase)
    envelope = 1 + 0.5 * torch.sin(2 * math.pi * (1 + states[:, None] % 3) * time)
    sensors = torch.stack([vibration, vibration.roll(3, 1) * envelope], 1)
    sensors += hum * torch.sin(2 * math.pi * 25 * time + phase)[:, None] + drift * time
    return sensors + 0.8 * torch.randn_like(sensors), states


def windows(num_machines: int, per_machine: int) -> tuple[Tensor, Tensor]:
    x, y = zip(*(windows_of_a_machine(per_machine) for _ in range(num_machines)), strict=True)
    x = torch.cat(x)
    x = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)  # each window by itself: machines differ
    return x, torch.cat(y)


x, y = windows(8, 75)
x_new, _ = windows(8, 75)
x_test, y_test = windows(8, 200)  # only for comparison
is_noisy = torch.rand(len(y)) < 0.3
y_noisy = torch.where(is_noisy, y + torch.randint(1, NUM_STATES, y.shape), y) % NUM_STATES
labelled = TensorDataset(x, y_noisy)
first, others = Subset(labelled, range(75)), Subset(labelled, range(75, 600))  # the first machine, and all others
train_set, val_set = (others, first) if args.labels else (labelled, TensorDataset(x_new))
train_loader = DataLoader(train_set, batch_size=50, shuffle=True)
val_loader = DataLoader(val_set, batch_size=100)


# %% The module: a 1-D CNN
class States(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv1d(2, 32, 9, padding=4), nn.ReLU(), nn.MaxPool1d(4)]
        second = [nn.Conv1d(32, 64, 9, padding=4), nn.ReLU(), nn.MaxPool1d(4)]
        self.net = nn.Sequential(
            *first, *second, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, NUM_STATES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Curves(Callback):
    """Keeps the expected accuracy and, for comparison, the accuracy on correct labels of other machines."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            correct = pl_module(x_test).argmax(1) == y_test
        expected.append(float(trainer.callback_metrics["val/expected_accuracy"]))
        accuracies.append(float(correct.float().mean()))


# %% What to copy
risk = RiskMonitor(validation_labels=args.labels)
checkpoint = ModelCheckpoint(monitor="val/expected_accuracy", mode="max", dirpath="runs/signals", filename="{epoch}")
expected: list[float] = []
accuracies: list[float] = []
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[risk, Curves(), checkpoint],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(States(), train_loader, val_loader)

chosen, best, last = expected.index(max(expected)), accuracies.index(max(accuracies)), len(accuracies) - 1
print("\nepoch  expected accuracy  accuracy on correct labels of other machines")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}  {expected[epoch]:17.4f}  {accuracies[epoch]:8.3f}")
print(f"\nThe expected accuracy is highest at epoch {chosen}: accuracy on correct labels {accuracies[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {accuracies[last]:.3f}; the best is epoch {best}, {accuracies[best]:.3f}.")
