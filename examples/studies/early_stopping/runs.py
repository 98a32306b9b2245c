"""Training runs that are drawn at random, so that no choice of runs can flatter a rule.

``draw(seed, data)`` makes everything of a run from its seed: task, network, optimizer, sizes and samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
}
NUM_HOLDOUT = 1000


# %% Drawing.
@dataclass
class Run:
    """One training run. Inputs are in [0, 1], but for those of a teacher, which are standard normal."""

    seed: int
    kind: str  # a line that says what it is
    labels: str  # of training: "right", "random" (some are drawn at random) or "people" (people's, some of them wrong)
    num_classes: int
    make_network: Callable[[], nn.Module]
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    is_augmented: bool  # shifts and flips, and a cosine schedule over all steps
    x: Tensor
    y: Tensor
    x_holdout: Tensor  # no rule sees their labels
    x_test: Tensor
    y_test: Tensor  # right
    y_test_wrong: Tensor  # as wrong as those of training
    batch_size: int
    epochs: int


def draw(seed: int, data: Path | None = None, wide: bool = False) -> Run:
    """Draw the run of a seed. Teachers and digits need no folder of data.

    Wide networks have up to a hundred times the weights for the same tasks and samples, and some are transformers.
    """
    r = np.random.RandomState(seed)  # the order of its calls makes the run
    is_large = r.rand() < 0.1
    source = str(r.choice(["teacher", "teacher", "digits", "mnist", "fashion", "cifar10", "cifar10", "people"]))
    noise = float(r.choice([0, 0, 0.2, 0.4]))
    n = int(r.choice([10000, 20000] if is_large else [300, 600, 1000, 2000, 4000]))
    network = "fc" if source == "teacher" else str(r.choice(["fc", "plain", "bn", "drop", "pool", "res"]))
    if source == "digits":
        n = int(r.choice([150, 300, 600]))
    elif network in ("res", "pool"):
        n = min(n, 4000 if is_large else 1000)
    activation = ACTIVATIONS[r.randint(4)]
    width, depth = int(r.choice([64, 128, 256])), int(r.choice([1, 2, 3, 4]))
    dropout, channels = float(r.choice([0, 0, 0.2])), int(r.choice([8, 12, 16]))
    optimizer, batch_size = str(r.choice(["adam", "adam", "momentum", "sgd"])), int(r.choice([32, 64, 128]))
    people, num_inputs, num_classes = str(r.choice(["aggre_label", "worse_label"])), int(r.choice([5, 20, 100])), 10
    if wide:
        other = np.random.RandomState((seed, 3))
        width, channels = int(other.choice([256, 512, 1024])), int(other.choice([24, 32, 48]))
        if source != "teacher" and other.rand() < 0.25:
            network, n = "vit", min(n, 2000)
    is_augmented = bool(network == "res" and source in ("cifar10", "people") and (is_large or r.rand() < 0.7))
    if source == "teacher":
        num_classes = int(r.choice([2, 5, 10]))
        x, y = teacher(r, n + 3000, num_inputs, num_classes)
    else:
        x, y = digits() if source == "digits" else images(data, "cifar10" if source == "people" else source)
    order = np.arange(len(x)) if source == "teacher" else r.permutation(len(x))
    chosen, holdout, test = np.split(order[: n + 3000], [n, min(n + NUM_HOLDOUT, len(order) - 300)])
    if source == "people":
        said, what = labels_by_people(data, people), f"people's {people}"
        y_train, y_test_wrong = said[chosen], said[test]
    else:
        what = f"{source} {100 * noise:.0f} % wrong"
        y_train = partly_wrong(r, y[chosen], noise, num_classes)
        y_test_wrong = partly_wrong(np.random.RandomState((seed, 1)), y[test], noise, num_classes)
    shape = x.shape[1:]

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        if network == "fc":
            return fully_connected(shape.numel(), width, depth, activation, dropout, num_classes)
        if network == "res":
            return residual(shape[0], channels)
        if network == "vit":
            return VisionTransformer(shape[0], shape[1], 4 * channels, depth, dropout)
        return convolutional(shape[0], shape[1], channels, network, activation)

    epochs = int(np.clip((2000 if optimizer == "sgd" else 1500) // -(-n // batch_size), 12, 60))
    if network in ("res", "pool", "vit") or (network != "fc" and n >= 4000):
        epochs = min(epochs, 22)
    return Run(
        seed=seed,
        kind=f"{what}, {network}, {n} samples, {optimizer}" + ", augmented, cosine" * is_augmented,
        labels="people" if source == "people" else "random" if noise > 0 else "right",
        num_classes=num_classes,
        make_network=make_network,
        make_optimizer=OPTIMIZERS[optimizer],
        is_augmented=is_augmented,
        x=scaled(x[chosen]),
        y=y_train,
        x_holdout=scaled(x[holdout]),
        x_test=scaled(x[test]),
        y_test=y[test],
        y_test_wrong=y_test_wrong,
        batch_size=batch_size,
        epochs=epochs,
    )


def partly_wrong(r: np.random.RandomState, y: Tensor, noise: float, num_classes: int) -> Tensor:
    """Draw a share of the labels anew, from all classes."""
    is_drawn = torch.tensor(r.rand(len(y)) < noise)
    return torch.where(is_drawn, torch.tensor(r.randint(0, num_classes, len(y))), y)


def teacher(r: np.random.RandomState, n: int, num_inputs: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw inputs, and label them by a random network."""
    generator = torch.Generator().manual_seed(int(r.randint(2**31)))
    first = torch.randn(num_inputs, 64, generator=generator) / num_inputs**0.5
    second = torch.randn(64, num_classes, generator=generator)
    x = torch.randn(n, num_inputs, generator=generator)
    return x, (relu(x @ first) @ second).argmax(1)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images).float()[:, None] / 16, torch.tensor(found.target).long()


@cache
def images(folder: Path | None, name: str) -> tuple[Tensor, Tensor]:
    """Load the training images and labels of a data set."""
    assert folder is not None, f"--data is needed: a folder with {name}.npz"
    with np.load(folder / f"{name}.npz") as found:
        return torch.from_numpy(found["x_train"]), torch.from_numpy(found["y_train"]).long()


@cache
def labels_by_people(folder: Path, name: str) -> Tensor:
    """Load what people said of the training images of CIFAR-10."""
    with np.load(folder / "cifar10n.npz") as found:
        return torch.from_numpy(found[name]).long()


def scaled(x: Tensor) -> Tensor:
    """Bring bytes into [0, 1]; leave other numbers as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images, and shift each by up to four pixels."""
    n, num_channels, height, width = x.shape
    is_flipped = torch.rand(n, generator=generator) < 0.5
    padded = pad(torch.where(is_flipped[:, None, None, None], x.flip(3), x), (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n), generator=generator)
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(num_channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def learned(accuracies: np.ndarray, num_classes: int) -> bool:
    """Tell whether a run was ever right twice as often as chance; 1.3 times for two classes."""
    return bool(accuracies.max() > min(2, 0.5 + 0.4 * num_classes) / num_classes)


# %% Networks.
def fully_connected(
    size: int, width: int, depth: int, activation: type[nn.Module], dropout: float, num_classes: int
) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(width if i else size, width), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def convolutional(inputs: int, size: int, channels: int, kind: str, activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for outputs in (channels, 2 * channels, 2 * channels):
        layers += [nn.Conv2d(inputs, outputs, 3, 1 if kind == "pool" else 2, 1)]
        layers += [nn.BatchNorm2d(outputs)] if kind == "bn" else []
        layers += [activation()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if kind == "pool" else []
        inputs, size = outputs, -(-size // 2)
    layers += [nn.Flatten(), *([nn.Dropout(0.3)] if kind == "drop" else [])]
    return nn.Sequential(*layers, nn.Linear(inputs * size**2, 10))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.body = nn.Sequential(*first, *second)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.skip(x))


def residual(inputs: int, channels: int) -> nn.Module:
    stem = nn.Conv2d(inputs, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    blocks = Block(channels, channels, 1), Block(channels, 2 * channels, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10))


class VisionTransformer(nn.Module):
    """Sees an image as 16 patches."""

    def __init__(self, inputs: int, size: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, size // 4, size // 4)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT + self.positions).mean(1))
