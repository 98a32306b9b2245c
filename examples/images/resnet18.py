"""A torchvision ResNet-18 on small images: from scratch, with mixup, or fine-tuned in two stages.

    python examples/images/resnet18.py --quick             # embedded digits, under a minute
    python examples/images/resnet18.py --quick --mixup     # images are mixed in the step
    python examples/images/resnet18.py --quick --finetune  # weights of other classes first
    python examples/images/resnet18.py --data FOLDER       # CIFAR-10, 3 minutes on an idle core

There is no schedule that ends at zero: with one, and with augmentation, the last epoch is as good as any, and there is
nothing to choose (docs/guide/stopping.md).
It needs `pip install -e ".[images]"`. FOLDER holds `cifar10.npz` with x_train and y_train (uint8, N x 3 x 32 x 32).
Nothing is downloaded: with `--finetune` the example makes its pretrained weights itself, on the first five classes. See
docs/guide/data.md.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="ResNet-18 from scratch, with mixup, or fine-tuned.")
parser.add_argument("--data", type=Path, help="folder of cifar10.npz; else scikit-learn's digits, enlarged")
parser.add_argument("--finetune", action="store_true", help="pretrain on five classes, then train on the other five")
parser.add_argument("--mixup", action="store_true", help="mix training images and their labels")
parser.add_argument("--quick", action="store_true", help="few images and epochs")
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(0, verbose=False)
torch.set_num_threads(1)
NUM_TRAIN, NUM_VAL, NUM_EPOCHS, BATCH_SIZE = (96, 64, 2, 16) if args.quick else (750, 250, 12, 32)


class Images(Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 255, self.labels[index]


def load() -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, H, W) and labels, in random order."""
    if args.data:
        with np.load(args.data / "cifar10.npz") as file:
            x, y = torch.tensor(file["x_train"][:20000]), torch.tensor(file["y_train"][:20000])
    else:
        digits = load_digits()
        small = torch.tensor(digits.images * 255 / 16, dtype=torch.uint8)
        x = small.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
        y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    return x[order], y[order].long()


def loaders(x: Tensor, y: Tensor, num_train: int) -> tuple[DataLoader, DataLoader]:
    """Training images, and validation images."""
    train = Images(x[:num_train], y[:num_train])
    val = Images(x[num_train : num_train + NUM_VAL], y[num_train : num_train + NUM_VAL])
    return DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True), DataLoader(val, 64)


class ResNet(LightningModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = resnet18(num_classes=num_classes)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # images are small: no stride here
        self.mixup = v2.MixUp(num_classes=num_classes) if args.mixup else nn.Identity()
        self.lr = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = self.mixup(batch)  # not in the loader: the reference has to see images as they are
        return cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, self.lr)


class Table(Callback):
    """Prints what was logged, epoch by epoch, and keeps it."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows.append([float(trainer.callback_metrics[name]) for name in COLUMNS])
        print(f"{len(rows) - 1:5d}  " + "  ".join(f"{number:8.3g}" for number in rows[-1]), flush=True)


COLUMNS = ("val/loss", "val/expected_loss", "val/output_sensitivity")
rows: list[list[float]] = []


def fit(module: ResNet, data: tuple[DataLoader, DataLoader], num_epochs: int, *callbacks: Callback) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=num_epochs, callbacks=list(callbacks), **quiet).fit(module, *data)


x, y = load()
print("epoch      loss   expected  sensitivity")
if not args.finetune:
    module = ResNet(10)
    monitors = [RiskMonitor(validation_labels=True), SensitivityMonitor()]
    fit(module, loaders(x, y, NUM_TRAIN), NUM_EPOCHS, *monitors, Table())
else:
    # Pretrained weights, on the first five classes; yours come from elsewhere.
    module = ResNet(5)
    fit(module, loaders(x[y < 5], y[y < 5], NUM_TRAIN), NUM_EPOCHS)
    # The task: the other classes, with fewer images, and a new head.
    data = loaders(x[y >= 5], y[y >= 5] - 5, NUM_TRAIN // 4)
    module.net.fc = nn.Linear(512, 5)
    # The reference sees patches. Give it `features=` of a larger network, if you have one; the backbone that you tune
    # knows less than the network will, and so does harm (docs/guide/encoders.md).
    # First only the head, then all weights.
    module.requires_grad_(False).net.fc.requires_grad_()
    for lr, num_epochs in ((1e-2, max(1, NUM_EPOCHS // 4)), (1e-4, NUM_EPOCHS)):
        module.lr = lr
        monitors = [RiskMonitor(validation_labels=True), SensitivityMonitor()]
        fit(module, data, num_epochs, *monitors, Table())
        module.requires_grad_()

losses, expected = np.array(rows)[:, 0], np.array(rows)[:, 1]
chosen, best = int(np.argmin(expected)), int(np.argmin(losses))
print(f"The expected loss is lowest at epoch {chosen}, with a loss of {losses[chosen]:.3f};")
print(f"the loss is lowest at epoch {best}, {losses[best]:.3f}, and {losses[-1]:.3f} at the end.")
