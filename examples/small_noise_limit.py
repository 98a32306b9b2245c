# %% [markdown]
# # Is the gradient as good as noise?
#
# `SensitivityMonitor(method="gradient")` gives the limit of sensitivity for small noise, σ² E‖∇ mean_k f_k‖², by one
# backward pass. How far is it from S, how much smaller is its error, and is it worth its cost, alone or as a control
# variate of the noise, e² − β ((∇ · ε)² − σ² ‖∇‖²)?
#
#     python examples/small_noise_limit.py --data FOLDER  # 2 minutes on one core
#
# `FOLDER` holds `cifar10.npz` and `mnist.npz` with `x_train, y_train, x_test` (images uint8, N × C × H × W).

# %%
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NUM_TRAIN, NUM_TEST, NUM_EPOCHS, NUM_DRAWS = 1000, 2000, 20, 8
PASSES = 4  # a gradient costs about three forward passes, and a draw one

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--sigmas", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.3])
parser.add_argument("--epochs", type=int, default=NUM_EPOCHS)
args = parser.parse_args()
torch.set_num_threads(1)


# %%
def networks(channels: int, size: int) -> dict[str, nn.Sequential]:
    def convolutional(norm: type[nn.Module]) -> nn.Sequential:
        blocks: list[nn.Module] = []
        for inputs, outputs in ((channels, 32), (32, 64)):
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 10))

    pixels = channels * size**2
    fc = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
    return {
        "fully connected": fc.append(nn.Linear(300, 10)),
        "convolutional": convolutional(lambda _: nn.Identity()),  # type: ignore[arg-type]
        "batch norm": convolutional(nn.BatchNorm2d),
    }


def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def averages(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(batch).double().mean(1) for batch in x.split(250)])


def gradients(net: nn.Module, x: Tensor) -> Tensor:
    parts = []
    for batch in x.split(250):
        leaf = batch.clone().requires_grad_()
        parts += torch.autograd.grad(net(leaf).mean(1).sum(), leaf)
    return torch.cat(parts).flatten(1)


# %%
def within_and_between(values: Tensor) -> tuple[float, float]:
    """Variance over draws, and over samples without it, of values (draws, samples)."""
    within = values.var(0).mean()
    return within.item(), (values.mean(0).var() - within / len(values)).item()


def compare(net: nn.Module, x: Tensor, sigma: float) -> str:
    gradient = gradients(net, x)
    changes, linear = [], []
    clean = averages(net, x)
    for draw in range(NUM_DRAWS):
        noise = sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(draw))
        changes.append(averages(net, x + noise) - clean)
        linear.append((gradient * noise.flatten(1)).double().sum(1))
    squares = torch.stack(changes)
    squares = (squares - squares.mean()).square()
    sensitivity = squares.mean()
    limits = sigma**2 * gradient.double().square().sum(1)
    control = torch.stack(linear).square() - limits  # of mean 0 for each sample
    beta = (squares * control).mean() / control.square().mean()
    within, between = within_and_between(squares / sensitivity)
    left, between_left = within_and_between((squares - beta * control) / sensitivity)
    columns = [
        limits.mean() / sensitivity,
        within + between,
        limits.var() / limits.mean() ** 2,
        1 - left / within,
        (within + between) / PASSES,
        within / PASSES + between,
        left + between_left,
    ]
    return " ".join(f"{float(column):10.2f}" for column in columns)


# %%
print("Relative variances are a sample's; those at equal cost are of four forward passes a sample.")
titles = ("limit / S", "var noise", "var grad", "rho^2", "1 draw, 4n", "4 draws, n", "control, n")
print(f"{'data':8} {'network':16} {'sigma':>6} " + " ".join(f"{title:>10}" for title in titles))
for name in ("mnist", "cifar10"):
    arrays = np.load(args.data / f"{name}.npz")
    x_train, x_test = (
        torch.from_numpy(arrays[key][:count]).float() / 255
        for key, count in (("x_train", NUM_TRAIN), ("x_test", NUM_TEST))
    )
    labels = torch.from_numpy(arrays["y_train"][:NUM_TRAIN]).long()
    for kind in networks(1, 4):
        torch.manual_seed(args.seed)
        net = networks(x_train.shape[1], x_train.shape[2])[kind]
        train(net, x_train, labels)
        for sigma in args.sigmas:
            print(f"{name:8} {kind:16} {sigma:6g} {compare(net, x_test, sigma)}", flush=True)
