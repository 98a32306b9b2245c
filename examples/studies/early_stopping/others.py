"""What people do instead of a rule: hold training samples out, and average weights."""

from __future__ import annotations

from collections.abc import Callable

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
        with torch.no_grad():
            held = torch.cat([logits(run, network(part)) for part in x_held.split(250)])
            outputs = torch.cat([network(part) for part in run.x_test.split(250)])
        row = {"held_loss": float(cross_entropy(held, y_held))}
        row |= {"held_accuracy": float((held.argmax(1) == y_held).float().mean())}
        rows.append(row | truth(run, outputs))
    return rows
