"""What other rules look at, and what people do instead of a rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from runs import Run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SHARE = 0.1  # of the training samples that is held out


def logits(run: Run, outputs: Tensor) -> Tensor:
    """Give one logit a class; a single output is that of class 1, beside 0."""
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if run.is_binary else outputs


def in_parts(network: nn.Module, x: Tensor) -> Tensor:
    """Give the outputs for many samples, a part at a time, without a graph."""
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(250)])


# %% What people do instead.
def averaged(network: nn.Module) -> AveragedModel:
    """Average the weights of all steps exponentially: by 0.99 a step, and those of batch norm with them."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)


def trained_on_fewer(run: Run, truth: Callable[[Run, Tensor], dict[str, float]]) -> list[dict[str, float]]:
    """Train on 90 % of the training samples, and score the others, whose labels are as noisy; an epoch's in a dict."""
    number = round(SHARE * len(run.x))
    x, y, x_held, y_held = run.x[number:], run.y[number:], run.x[:number], run.y[:number]
    network, generator = run.make_network(), torch.Generator().manual_seed(run.seed)
    optimizer = run.make_optimizer(network.parameters())
    schedule = run.make_schedule(optimizer, run.epochs * -(-len(x) // run.batch_size))
    rows = []
    for _ in range(run.epochs):
        network.train()
        losses = []
        for batch in torch.randperm(len(x), generator=generator).split(run.batch_size):
            if len(batch) == 1:  # batch norm can't take it
                continue
            optimizer.zero_grad()
            loss = run.loss(network(run.augment(x[batch], generator)), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if schedule is not None and run.schedule != "plateau":
                schedule.step()
        if run.schedule == "plateau":
            schedule.step(np.mean(losses))
        network.eval()
        held = logits(run, in_parts(network, x_held))
        row = {"held_loss": float(cross_entropy(held, y_held))}
        row |= {"held_accuracy": float((held.argmax(1) == y_held).float().mean())}
        rows.append(row | truth(run, in_parts(network, run.x_test)))
    return rows


# %% What other rules look at: gradients of the whole network, on a few training samples that stay the same.
def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


def disparity(network: nn.Module, run: Run) -> float:
    """Give the mean distance between the gradients of five batches (Forouzesh & Thiran, ECML 2021).

    As in the authors' code, the network is in training mode, and losses are divided by their deviation in the batch.
    """
    size = min(run.batch_size, len(run.x) // 5)
    gradients = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same dropout in every epoch
        for x, y in zip(run.x[: 5 * size].split(size), run.y[: 5 * size].split(size), strict=True):
            losses = cross_entropy(logits(run, network(x)), y, reduction="none")
            gradients.append(gradient(network, (losses / losses.std().clamp(min=1e-12)).mean()))
    return float(np.mean([float((one - other).norm()) for one, other in combinations(gradients, 2)]))


def evidence(network: nn.Module, run: Run, num_samples: int = 256, size: int = 16) -> float:
    """Give how far the mean gradient is within its noise; above 0 it is noise (Mahsereci et al., 2017).

    The variance of the gradient is told by small batches. The factor makes the mean 0 where there is only noise.
    """
    x, y = run.x[:num_samples], run.y[:num_samples]
    count = len(x) // size
    total = squares = torch.zeros(())
    for i in range(count):
        part = slice(i * size, (i + 1) * size)
        each = gradient(network, cross_entropy(logits(run, network(x[part])), y[part]))
        total, squares = total + each, squares + each.square()
    mean = total / count
    variance = (squares / count - mean.square()) * count / (count - 1)
    counts = variance > 1e-20
    ratios = count * mean[counts].square() / variance[counts]
    return float(1 - ratios.mean() * (count - 3) / (count - 1))
