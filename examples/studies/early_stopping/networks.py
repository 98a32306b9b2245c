"""Networks of the runs: the plain ones of `draw`, and those of `draw_as_built`, which are put together at random."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)


# %% The plain ones.
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

    def __init__(self, inputs: int, size: int, width: int, depth: int, dropout: float, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, size // 4, size // 4)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.encoder = encoder(width, depth, dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT + self.positions).mean(1))


# %% Those that are put together at random.
CHANNELS = {64: 8, 128: 12, 256: 16}  # of the first convolution, by the width of a recipe


@dataclass
class Recipe:
    """What a network is made of."""

    body: str  # "mlp", "convolutions", "transformer" or "words"
    norm: str  # "batch norm", "group norm" or "no norm"; an MLP has layer norm for group norm
    down: str  # how convolutions get to fewer pixels: "max-pooling", "average pooling" or "stride"
    head: str  # after convolutions: "flatten", "mean" over pixels, or a "hidden" layer
    dropout: float
    is_residual: bool
    depth: int
    width: int  # of layers of an MLP; a half of it of a vision transformer, a quarter of one that reads words
    activation: type[nn.Module]

    def __str__(self) -> str:
        parts = [self.body, self.norm] if self.body in ("mlp", "convolutions") else [self.body]
        parts += [self.down] if self.body == "convolutions" else []
        parts += ["dropout"] if self.dropout else []
        parts += ["residual"] if self.is_residual and self.body in ("mlp", "convolutions") else []
        return ", ".join([*parts, f"depth {self.depth}", f"width {self.width}"])


def compose(recipe: Recipe, shape: torch.Size, num_outputs: int, num_words: int = 0) -> nn.Module:
    """Build a network whose last layer, `head`, is linear."""
    if recipe.body == "words":
        return SentenceTransformer(num_words, recipe.width // 4, recipe.depth, recipe.dropout, num_outputs)
    if recipe.body == "transformer":
        return VisionTransformer(shape[0], shape[1], recipe.width // 2, recipe.depth, recipe.dropout, num_outputs)
    body, size = _mlp(recipe, shape.numel()) if recipe.body == "mlp" else _convolutions(recipe, shape)
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(size, num_outputs)))


def _mlp(recipe: Recipe, size: int) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(recipe.depth):
        layer: list[nn.Module] = [nn.Linear(recipe.width if i else size, recipe.width)]
        layer += {"batch norm": [nn.BatchNorm1d(recipe.width)], "group norm": [nn.LayerNorm(recipe.width)]}.get(
            recipe.norm, []
        )
        layer += [recipe.activation(), *([nn.Dropout(recipe.dropout)] if recipe.dropout else [])]
        layers += [Skip(nn.Sequential(*layer), nn.Identity()) if i and recipe.is_residual else nn.Sequential(*layer)]
    return nn.Sequential(*layers), recipe.width


def _convolutions(recipe: Recipe, shape: torch.Size) -> tuple[nn.Module, int]:
    inputs, pixels = shape[0], shape[1]
    layers: list[nn.Module] = []
    for i in range(recipe.depth):
        outputs = CHANNELS[recipe.width] * min(2**i, 4)
        has_stride = pixels > 4 and recipe.down == "stride"
        layers += [nn.Conv2d(inputs, outputs, 3, 1 + has_stride, 1), *_norm(recipe.norm, outputs), recipe.activation()]
        if pixels > 4 and not has_stride:
            layers += [(nn.MaxPool2d if recipe.down == "max-pooling" else nn.AvgPool2d)(2, ceil_mode=True)]
        inputs, pixels = outputs, -(-pixels // 2) if pixels > 4 else pixels
        if recipe.is_residual:
            body = nn.Conv2d(inputs, inputs, 3, 1, 1), *_norm(recipe.norm, inputs), recipe.activation()
            layers += [Skip(nn.Sequential(*body), nn.Identity())]
    layers += [nn.AdaptiveAvgPool2d(1)] if recipe.head == "mean" else []
    layers += [nn.Flatten(), *([nn.Dropout(recipe.dropout)] if recipe.dropout else [])]
    size = inputs if recipe.head == "mean" else inputs * pixels**2
    if recipe.head == "hidden":
        layers += [nn.Linear(size, recipe.width), recipe.activation()]
        layers += [nn.Dropout(recipe.dropout)] if recipe.dropout else []
        size = recipe.width
    return nn.Sequential(*layers), size


def _norm(norm: str, channels: int) -> list[nn.Module]:
    return {"batch norm": [nn.BatchNorm2d(channels)], "group norm": [nn.GroupNorm(4, channels)]}.get(norm, [])


class Skip(nn.Module):
    """Adds what a shortcut passes on."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class SentenceTransformer(nn.Module):
    """Reads the ids of words; 0 is padding."""

    def __init__(self, num_words: int, width: int, depth: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.encoder = encoder(width, depth, dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        is_word = (ids > 0).float()[..., None]
        found = self.encoder(self.words(ids) + self.positions[: ids.shape[1]], src_key_padding_mask=ids == 0)
        return self.head((found * is_word).sum(1) / is_word.sum(1))


def encoder(width: int, depth: int, dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
