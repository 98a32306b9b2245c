"""Networks, optimizers and schedules as people build them, drawn one choice after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from data import NUM_WORDS
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.GELU, nn.SiLU)
Make = Callable[[], nn.Module]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def draw_mlp(r: np.random.RandomState, num_inputs: int, num_outputs: int) -> tuple[Make, str]:
    """Draw layers, their width, dropout and batch norm."""
    depth, width = int(r.randint(1, 4)), int(r.choice([64, 128, 256]))
    dropout, has_norm = float(r.choice([0, 0, 0.1, 0.25, 0.5])), bool(r.rand() < 0.5)
    activation = ACTIVATIONS[r.randint(4)]

    make = make_mlp(num_inputs, num_outputs, depth, width, dropout, has_norm, activation)
    return make, f"mlp {depth} x {width}" + ", batch norm" * has_norm + f", dropout {dropout:g}" * (dropout > 0)


def make_mlp(
    num_inputs: int, num_outputs: int, depth: int, width: int, dropout: float, has_norm: bool,
    activation: type[nn.Module],
) -> Make:  # fmt: skip
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        size = num_inputs
        for _ in range(depth):
            layers += [nn.Linear(size, width), *[nn.BatchNorm1d(width)] * has_norm, activation(), nn.Dropout(dropout)]
            size = width
        return nn.Sequential(*layers, nn.Linear(size, num_outputs))

    return make


class Block(nn.Module):
    """Two convolutions, and the input beside them if residual."""

    def __init__(self, inputs: int, outputs: int, has_norm: bool, is_residual: bool) -> None:
        super().__init__()
        norm: Any = nn.BatchNorm2d if has_norm else nn.Identity
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), norm(outputs),
        )  # fmt: skip
        self.short = nn.Conv2d(inputs, outputs, 1) if is_residual else None

    def forward(self, x: Tensor) -> Tensor:
        rest = 0 if self.short is None else self.short(x)
        return nn.functional.max_pool2d(torch.relu(self.body(x) + rest), 2)


def draw_cnn(r: np.random.RandomState, channels: int, num_outputs: int) -> tuple[Make, str]:
    """Draw blocks, width, batch norm, residual connections and dropout."""
    depth, width = int(r.choice([2, 3])), int(r.choice([16, 24, 32]))
    has_norm, is_residual = bool(r.rand() < 0.6), bool(r.rand() < 0.4)
    dropout = float(r.choice([0, 0, 0.25, 0.5]))
    names = ["batch norm"] * has_norm + ["residual"] * is_residual + [f"dropout {dropout:g}"] * (dropout > 0)
    make = make_cnn(channels, num_outputs, depth, width, has_norm, is_residual, dropout)
    return make, ", ".join([f"cnn {depth} x {width}", *names])


class Head(nn.Linear):
    """Computes logits in single precision, where the body has less."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def make_cnn(
    channels: int, num_outputs: int, depth: int, width: int, has_norm: bool, is_residual: bool, dropout: float
) -> Make:
    def make() -> nn.Module:
        sizes = [channels] + [width * 2**i for i in range(depth)]
        blocks = [Block(a, b, has_norm, is_residual) for a, b in pairwise(sizes)]
        body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(body, nn.Dropout(dropout), Head(4 * sizes[-1], num_outputs))

    return make


def draw_signal_network(r: np.random.RandomState, channels: int, length: int, num_outputs: int) -> tuple[Make, str]:
    """Draw an MLP, or convolutions over time."""
    if r.rand() < 0.3:
        return draw_mlp(r, channels * length, num_outputs)
    depth, width = int(r.choice([2, 3])), int(r.choice([16, 32, 64]))
    has_norm, dropout = bool(r.rand() < 0.5), float(r.choice([0, 0, 0.25, 0.5]))

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        sizes = [channels] + [width * 2**i for i in range(depth)]
        for a, b in pairwise(sizes):
            layers += [nn.Conv1d(a, b, 5, padding=2), *[nn.BatchNorm1d(b)] * has_norm, nn.ReLU(), nn.MaxPool1d(2)]
        head = nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * sizes[-1], num_outputs)
        return nn.Sequential(*layers, *head)

    names = ["batch norm"] * has_norm + [f"dropout {dropout:g}"] * (dropout > 0)
    return make, ", ".join([f"cnn {depth} x {width}", *names])


class Words(nn.Module):
    """The mean of word vectors, or a small transformer before it; negative ids are padding."""

    def __init__(self, width: int, depth: int, dropout: float, num_outputs: int) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS + 1, width, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(1, 100, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False) if depth else None
        layers = nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_outputs)
        self.head = nn.Sequential(*layers)

    def forward(self, ids: Tensor) -> Tensor:
        is_padding = (ids < 0) & (ids >= 0).any(1, keepdim=True)  # of a sentence without words, padding is read
        x = self.words((ids + 1).clamp(min=0))
        if self.layers is not None:
            x = self.layers(x + self.places[:, : x.shape[1]], src_key_padding_mask=is_padding)
        is_word = (~is_padding).float()[..., None]
        return self.head((x * is_word).sum(1) / is_word.sum(1).clamp(min=1))


def draw_words(r: np.random.RandomState, num_outputs: int) -> tuple[Make, str]:
    """Draw a bag of embeddings, or a transformer of one or two layers."""
    width, depth, dropout = int(r.choice([32, 64, 128])), int(r.choice([0, 1, 2])), float(r.choice([0, 0.1, 0.3]))
    name = f"transformer {depth} x {width}" if depth else f"bag of embeddings {width}"
    return lambda: Words(width, depth, dropout, num_outputs), f"{name}, dropout {dropout:g}"


def draw_optimizer(r: np.random.RandomState, has_sgd: bool = True) -> tuple[MakeOptimizer, str]:
    """Draw Adam, AdamW or SGD, learning rate and weight decay."""
    kind = str(r.choice(["adam", "adamw", "adamw", "sgd"][: 4 if has_sgd else 3]))
    rate = 10 ** r.uniform(0, 1) * (1e-2 if kind == "sgd" else 3e-4)
    decay = float(r.choice([0, 1e-4, 1e-3])) if kind == "sgd" else float(r.choice([0.01, 0.1]))
    make: dict[str, MakeOptimizer] = {
        "adam": lambda parameters: torch.optim.Adam(parameters, rate),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
        "sgd": lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay),
    }
    return make[kind], f"{kind} {rate:.1g}"
