"""Training runs that are drawn at random, so that no choice of runs can flatter a rule.

``draw(seed, data)`` makes everything of a run from its seed: task, network, optimizer, sizes and samples.
``draw_as_built(seed, data)`` draws from more: networks, optimizers and schedules as people put them together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from networks import ACTIVATIONS, VisionTransformer, convolutional, fully_connected, residual
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
}
NUM_HOLDOUT = 1000


# %% A run.
@dataclass
class Run:
    """One training run."""

    seed: int
    kind: str  # a line that says what it is
    labels: str  # of training: "correct", "random", "by class" or "people" (all of these are noisy)
    num_classes: int
    make_network: Callable[[], nn.Module]
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    x: Tensor
    y: Tensor
    x_holdout: Tensor
    y_holdout: Tensor  # correct; a rule sees some of them at most
    y_holdout_noisy: Tensor  # as noisy as those of training
    x_test: Tensor
    y_test: Tensor  # correct
    y_test_noisy: Tensor
    batch_size: int
    epochs: int
    is_augmented: bool = False  # shifts, and flips if these are photos or clothes
    is_flipped: bool = True
    schedule: str = ""  # "", "cosine", "one-cycle", "plateau" or "steps"
    smoothing: float = 0.0  # of labels
    is_binary: bool = False  # one output, whose sigmoid is the probability of class 1
    has_batch_norm: bool = False
    chances: Tensor | None = field(default=None, repr=False)  # of noisy labels, by correct label; None: people's
    y_correct: Tensor | None = field(default=None, repr=False)  # of training; no rule sees any of them

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Give the training loss."""
        if self.is_binary:
            targets = y.float() * (1 - self.smoothing) + self.smoothing / 2
            return binary_cross_entropy_with_logits(outputs[:, 0], targets)
        return cross_entropy(outputs, y, label_smoothing=self.smoothing)

    def make_schedule(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Make the schedule; that of a plateau is stepped once an epoch by the training loss, others every step."""
        schedules = torch.optim.lr_scheduler
        if self.schedule == "cosine":
            return schedules.CosineAnnealingLR(optimizer, num_steps)
        if self.schedule == "one-cycle":
            return schedules.OneCycleLR(optimizer, 2 * optimizer.param_groups[0]["lr"], num_steps)
        if self.schedule == "steps":
            return schedules.MultiStepLR(optimizer, [num_steps // 2, 3 * num_steps // 4], 0.1)
        if self.schedule == "plateau":
            return schedules.ReduceLROnPlateau(optimizer, factor=0.3, patience=2)
        return None

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Shift and flip a batch, if this run does."""
        return augmented(x, generator, self.is_flipped) if self.is_augmented else x


@dataclass(frozen=True)
class Request:
    """What a pool asks of a draw. What is not as asked is drawn anew, from random numbers of its own."""

    smallest: int  # number of training samples
    largest: int
    is_noisy: bool  # whether training labels are noisy

    def size(self, seed: int, n: int) -> int:
        """Give the number of training samples, if the draw said n."""
        if self.smallest <= n <= self.largest:
            return n
        position = np.random.RandomState((seed, 13)).rand()
        return int(self.smallest * (self.largest / self.smallest) ** position)


def augmented(x: Tensor, generator: torch.Generator, is_flipped: bool = True) -> Tensor:
    """Flip half of the images, and shift each by up to an eighth."""
    n, num_channels, height, width = x.shape
    flips = torch.rand(n, generator=generator) < 0.5 * is_flipped
    most = height // 8
    padded = pad(torch.where(flips[:, None, None, None], x.flip(3), x), (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(num_channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def learned(accuracies: np.ndarray, num_classes: int) -> bool:
    """Tell whether a run was ever correct twice as often as chance; 1.3 times for two classes."""
    return bool(accuracies.max() > min(2, 0.5 + 0.4 * num_classes) / num_classes)


def logits(run: Run, outputs: Tensor) -> Tensor:
    """Give one logit a class; a single output is that of class 1, beside 0."""
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if run.is_binary else outputs


def scaled(x: Tensor) -> Tensor:
    """Bring bytes into [0, 1]; leave other numbers as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


# %% Plain networks.
def draw(seed: int, data: Path | None = None, wide: bool = False, request: Request | None = None) -> Run:
    """Draw the run of a seed. Teachers and digits need no folder of data.

    Wide networks have up to a hundred times the weights for the same tasks and samples, and some are transformers.
    A request changes sizes and noise.
    """
    r = np.random.RandomState(seed)  # the order of its calls makes the run
    is_large = r.rand() < 0.1
    source = str(r.choice(["teacher", "teacher", "digits", "mnist", "fashion", "cifar10", "cifar10", "people"]))
    noise = float(r.choice([0, 0, 0.2, 0.4]))
    n = int(r.choice([10000, 20000] if is_large else [300, 600, 1000, 2000, 4000]))
    network = "fc" if source == "teacher" else str(r.choice(["fc", "plain", "bn", "drop", "pool", "res"]))
    if request is not None:
        n, is_large = request.size(seed, n), request.smallest >= 4000
        noise = noise_as_requested(seed, noise, request)
        source = "cifar10" if source == "people" and not request.is_noisy else source
    if source == "digits":
        n = int(r.choice([150, 300, 600] if request is None else [200, 300, 600]))
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
        x, y = tasks.teacher(r, n + 3000, num_inputs, num_classes)
    else:
        x, y = tasks.digits() if source == "digits" else tasks.images(data, "cifar10" if source == "people" else source)
    order = np.arange(len(x)) if source == "teacher" else r.permutation(len(x))
    chosen, holdout, test = np.split(order[: n + 3000], [n, min(n + NUM_HOLDOUT, len(order) - 300)])
    if source == "people":
        said, what, noise, chances = tasks.labels_by_people(data, people), f"people's {people}", 1.0, None
        y_train, y_holdout_noisy, y_test_noisy = said[chosen], said[holdout], said[test]
    else:
        what, chances = f"{source} {100 * noise:.0f} % noisy", tasks.transition("random", noise, num_classes)
        y_train = tasks.partly_redrawn(r, y[chosen], noise, num_classes)
        y_test_noisy = tasks.partly_redrawn(np.random.RandomState((seed, 1)), y[test], noise, num_classes)
        y_holdout_noisy = tasks.partly_redrawn(np.random.RandomState((seed, 4)), y[holdout], noise, num_classes)
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
        labels="people" if source == "people" else "random" if noise > 0 else "correct",
        num_classes=num_classes,
        make_network=make_network,
        make_optimizer=OPTIMIZERS[optimizer],
        x=scaled(x[chosen]),
        y=y_train,
        x_holdout=scaled(x[holdout]),
        y_holdout=y[holdout],
        y_holdout_noisy=y_holdout_noisy,
        x_test=scaled(x[test]),
        y_test=y[test],
        y_test_noisy=y_test_noisy,
        batch_size=batch_size,
        epochs=epochs,
        is_augmented=is_augmented,
        schedule="cosine" if is_augmented else "",
        has_batch_norm=network in ("bn", "res"),
        chances=chances,
        y_correct=y[chosen],
    )


def noise_as_requested(seed: int, noise: float, request: Request) -> float:
    if not request.is_noisy:
        return 0.0
    return noise if noise > 0 else float(np.random.RandomState((seed, 12)).choice([0.2, 0.4]))


def draw_large_teacher(seed: int, data: Path | None = None) -> Run:
    """Draw a fully connected network on 5,000 correct samples of 20 inputs, where nobody should stop early."""
    r = np.random.RandomState((seed, 11))
    num_classes = (10, 5, 2, 10, 5)[seed % 5]
    x, y = tasks.teacher(r, 5000 + 2 * NUM_HOLDOUT, 20, num_classes)
    width, depth = int(r.choice([64, 128, 256])), int(r.choice([1, 2, 3]))
    optimizer = str(r.choice(["adam", "momentum"]))
    training, holdout, test = torch.arange(len(x)).split([5000, NUM_HOLDOUT, NUM_HOLDOUT])

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        return fully_connected(20, width, depth, nn.ReLU, 0.0, num_classes)

    return Run(
        seed=seed,
        kind=f"teacher, {num_classes} classes, correct, fc, depth {depth}, width {width}, 5000 samples, {optimizer}",
        labels="correct",
        num_classes=num_classes,
        make_network=make_network,
        make_optimizer=OPTIMIZERS[optimizer],
        x=x[training],
        y=y[training],
        x_holdout=x[holdout],
        y_holdout=y[holdout],
        y_holdout_noisy=y[holdout],
        x_test=x[test],
        y_test=y[test],
        y_test_noisy=y[test],
        batch_size=64,
        epochs=20,
        chances=tasks.transition("random", 0.0, num_classes),
        y_correct=y[training],
    )
