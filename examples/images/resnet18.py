"""A torchvision ResNet-18 on small images with augmentation, from scratch or fine-tuned.

    python examples/images/resnet18.py --quick                     # embedded digits, under a minute
    python examples/images/resnet18.py --data FOLDER               # CIFAR-10, 3 minutes on an idle core
    python examples/images/resnet18.py --data FOLDER --finetune    # weights of other classes first

FOLDER holds `cifar10.npz` with x_train, y_train, x_test and y_test (images uint8, N x 3 x 32 x 32). Nothing is
downloaded: with `--finetune` the example makes its pretrained weights itself, on the first five classes.
"""

import argparse
import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="ResNet-18 with augmentation, and fine-tuning in two stages.")
parser.add_argument("--data", type=Path, help="folder of cifar10.npz; else scikit-learn's digits, enlarged")
parser.add_argument("--finetune", action="store_true", help="pretrain on five classes, then train on the other five")
parser.add_argument("--num-train", type=int, default=750)
parser.add_argument("--label-noise", type=float, default=0.0, help="share of training labels that are wrong")
parser.add_argument("--max-epochs", type=int, default=12)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="few images and epochs")
parser.add_argument("--figure", type=Path, help="where to put a picture of the curves")
args = parser.parse_args()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging|found the lowest).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)
NUM_TRAIN, NUM_EPOCHS, NUM_VAL = (96, 2, 64) if args.quick else (args.num_train, args.max_epochs, 250)

BATCH_SIZE = 16 if args.quick else 32


class Images(Dataset):
    def __init__(self, images: Tensor, labels: Tensor, augmentation: v2.Transform | None = None) -> None:
        self.images, self.labels, self.augmentation = images, labels, augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].float() / 255
        return image if self.augmentation is None else self.augmentation(image), self.labels[index]


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


def loaders(x: Tensor, y: Tensor, num_classes: int) -> tuple[DataLoader, DataLoader]:
    """Training images with augmentation and some wrong labels, and validation images."""
    crop: list[nn.Module] = [v2.RandomCrop(x.shape[-1], padding=x.shape[-1] // 8)]
    augmentation = v2.Compose([*crop, v2.RandomHorizontalFlip()] if args.data else crop)  # a flipped digit is none
    wrong = torch.rand(NUM_TRAIN) < args.label_noise
    y_train = torch.where(wrong, y[:NUM_TRAIN] + torch.randint(1, num_classes, (NUM_TRAIN,)), y[:NUM_TRAIN])
    train = Images(x[:NUM_TRAIN], y_train % num_classes, augmentation)
    val = Images(x[NUM_TRAIN : NUM_TRAIN + NUM_VAL], y[NUM_TRAIN : NUM_TRAIN + NUM_VAL])
    return DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True), DataLoader(val, 64)


class ResNet(LightningModule):
    def __init__(self, num_classes: int, lr: float, num_steps: int) -> None:
        super().__init__()
        self.net = resnet18(num_classes=num_classes)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # images are small: no stride here
        self.lr, self.num_steps = lr, num_steps

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_brier", (logits.softmax(1) - one_hot(batch[1], logits.shape[1])).square().sum(1).mean())

    def configure_optimizers(self) -> Any:
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, self.lr, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Table(Callback):
    """Prints what was logged, epoch by epoch, and keeps it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rows.append(row)
        numbers = "  ".join(f"{row[name]:8.3f}" for name in COLUMNS[:-1])
        print(f"{len(rows) - 1:5d}  {self.stage:5}  {numbers}  {row[COLUMNS[-1]]:8.2g}", flush=True)


TITLES = ["train", "val loss", "score", "estimate", "variance", "S"]
COLUMNS = ["train_loss", "val_loss", "val_brier", "val_risk_estimate", "val_risk_variance", "val_sensitivity"]
rows: list[dict[str, float]] = []


def fit(module: ResNet, data: tuple[DataLoader, DataLoader], num_epochs: int, callbacks: list[Callback]) -> None:
    trainer = Trainer(
        max_epochs=num_epochs,
        accelerator="auto",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *data)


# %%
x, y = load()
num_steps = NUM_EPOCHS * (NUM_TRAIN // BATCH_SIZE)
title = "epoch  stage  " + "  ".join(f"{title:>8}" for title in TITLES)
if not args.finetune:
    print(title)
    monitors = [RiskMonitor(), SensitivityMonitor()]
    fit(ResNet(10, 0.05, num_steps), loaders(x, y, 10), NUM_EPOCHS, [*monitors, Table("all")])
else:
    # Pretrained weights: those of the first five classes. In your case they come from elsewhere.
    module = ResNet(5, 0.05, num_steps)
    fit(module, loaders(x[y < 5], y[y < 5], 5), NUM_EPOCHS, [])
    # The task: the other classes, with fewer images, and a new head.
    NUM_TRAIN //= 4
    data = loaders(x[y >= 5], y[y >= 5] - 5, 5)
    module.net.fc = nn.Linear(512, 5)
    pretrained = copy.deepcopy(module.state_dict())
    print(title)
    # First the head alone. The fit begins with the pretrained weights, which is what `RiskMonitor` takes by default.
    for name, weight in module.named_parameters():
        weight.requires_grad = name.startswith("net.fc.")
    num_head = max(1, NUM_EPOCHS // 4)
    module.lr, module.num_steps = 0.02, num_head * len(data[0])
    fit(module, data, num_head, [RiskMonitor(), SensitivityMonitor(), Table("head")])
    # Then all weights. This fit begins with a trained head, so that the weights from before are told.
    module.requires_grad_()
    module.lr, module.num_steps = 0.01, NUM_EPOCHS * len(data[0])
    fit(module, data, NUM_EPOCHS, [RiskMonitor(initial_weights=pretrained), SensitivityMonitor(), Table("all")])

# %%
curves = {name: [row[name] for row in rows] for name in [*COLUMNS, "val_accuracy"]}
chosen, best = (int(np.argmin(curves[name])) for name in ("val_risk_estimate", "val_loss"))
print("\nstop at ...            epoch  validation loss  accuracy  estimate / true score")
for what, epoch in {"the lowest estimate": chosen, "the lowest loss": best, "the end": len(rows) - 1}.items():
    loss, accuracy, ratio = (curves[name][epoch] for name in ("val_loss", "val_accuracy", "val_risk_estimate"))
    print(f"{what:21}  {epoch:5d}  {loss:15.3f}  {accuracy:8.3f}  {ratio / curves['val_brier'][epoch]:21.2f}")
if args.figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, names in zip(axes, (COLUMNS[:2], COLUMNS[2:5], COLUMNS[5:]), strict=True):
        for name in names:
            axis.plot(curves[name], label=name)
        axis.axvline(chosen, color="gray", linestyle="--", label="lowest estimate")
        axis.set(xlabel="epoch", **({"yscale": "log"} if axis is axes[2] else {"ylim": (0, None)}))
        axis.legend(fontsize="small")
    figure.savefig(args.figure, dpi=100)
