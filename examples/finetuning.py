"""Fine-tuning on noisy labels: a network that knows the digits 0 to 4 learns 5 to 9 from 200 images, 40 % labels wrong.

    python examples/finetuning.py           # trained on all 200, validated on new images without labels
    python examples/finetuning.py --labels  # a quarter of them is held out, with its noisy labels

The reference sees images through an encoder that knows more than the network: a larger one, which has learned all ten
digits from other images. It stands for the one that you download. See docs/guide/encoders.md.
"""

import argparse
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Fine-tune a small network on noisy labels.")
parser.add_argument("--labels", action="store_true", help="hold out a quarter of the images, with its noisy labels")
parser.add_argument("--max-epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging|val_dataloader).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)

# %% Data: 200 images of the digits 5 to 9 with noisy labels, 300 new ones, and all others for what is pretrained
digits = load_digits()
order = torch.randperm(len(digits.images))
x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
y = torch.tensor(digits.target)[order]
is_small = y < 5
ours = (~is_small).nonzero()[:500, 0]
is_other = torch.ones(len(y), dtype=torch.bool).index_fill(0, ours, False)
small = TensorDataset(x[is_small], y[is_small])  # the network has seen these
others = TensorDataset(x[is_other], y[is_other])  # the encoder has seen these
x, y = x[ours], y[ours] - 5
x_new, y_new = x[200:], y[200:]  # y_new is only for comparison
is_noisy = torch.rand(200) < 0.4
y_train = torch.where(is_noisy, y[:200] + torch.randint(1, 5, (200,)), y[:200]) % 5
labelled = TensorDataset(x[:200], y_train)
train_set, val_set = random_split(labelled, [0.75, 0.25]) if args.labels else (labelled, TensorDataset(x_new))
train_loader = DataLoader(train_set, batch_size=20, shuffle=True)
val_loader = DataLoader(val_set, batch_size=len(x_new))


# %% The module: a body and a head
class Digits(LightningModule):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()]
        pooled = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * width, 4 * width), nn.ReLU()]
        self.body = nn.Sequential(*layers, *pooled)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Curves(Callback):
    """Keeps the expected accuracy and, for comparison, the accuracy on correct labels."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            correct = pl_module(x_new).argmax(1) == y_new
        expected.append(float(trainer.callback_metrics["val/expected_accuracy"]))
        accuracies.append(float(correct.float().mean()))


# %% Pretrained weights; yours come from elsewhere
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def pretrained(width: int, data: TensorDataset, num_classes: int) -> Digits:
    model = Digits(width, num_classes)
    Trainer(max_epochs=10, accelerator="cpu", **quiet).fit(model, DataLoader(data, batch_size=50, shuffle=True))
    return model


model = pretrained(16, small, 5)
model.head = nn.Linear(64, 5)  # for the new classes
encoder = pretrained(64, others, 10).body

# %% What to copy
risk = RiskMonitor(features=encoder, validation_labels=args.labels)
checkpoint = ModelCheckpoint(monitor="val/expected_accuracy", mode="max", dirpath="runs/finetuning", filename="{epoch}")
expected: list[float] = []
accuracies: list[float] = []
quiet["enable_checkpointing"] = True
trainer = Trainer(max_epochs=args.max_epochs, accelerator="cpu", callbacks=[risk, Curves(), checkpoint], **quiet)
trainer.fit(model, train_loader, val_loader)

chosen, best, last = expected.index(max(expected)), accuracies.index(max(accuracies)), len(accuracies) - 1
print("\nepoch  expected accuracy  accuracy on correct labels")
for epoch in sorted({*range(0, last, max(1, last // 7)), chosen, best, last}):
    print(f"{epoch:5d}  {expected[epoch]:17.4f}  {accuracies[epoch]:8.3f}")
print(f"\nThe expected accuracy is highest at epoch {chosen}: accuracy on correct labels {accuracies[chosen]:.3f}.")
print(f"At the last one, epoch {last}, it is {accuracies[last]:.3f}; the best is epoch {best}, {accuracies[best]:.3f}.")
