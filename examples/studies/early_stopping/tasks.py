"""Tasks of the runs: inputs and their correct labels, from disk or from a random generator; and noisy labels."""

from __future__ import annotations

import ast
import importlib
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, relu

NUM_WORDS, MAX_LENGTH = 2000, 20  # of sentences
PACKAGES = ("torch", "sklearn", "scipy", "pandas", "matplotlib", "numpy")  # which of them does a sentence document?


# %% Inputs and labels.
def teacher(r: np.random.RandomState, n: int, num_inputs: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw inputs, and label them by a random network."""
    generator = torch.Generator().manual_seed(int(r.randint(2**31)))
    first = torch.randn(num_inputs, 64, generator=generator) / num_inputs**0.5
    second = torch.randn(64, num_classes, generator=generator)
    x = torch.randn(n, num_inputs, generator=generator)
    return x, (relu(x @ first) @ second).argmax(1)


def generated_table(r: np.random.RandomState, n: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw a table by scikit-learn, some of whose columns tell nothing."""
    from sklearn.datasets import make_classification

    num_informative = int(r.choice([5, 10, 20]))
    x, y = make_classification(
        n_samples=n,
        n_features=num_informative + int(r.choice([0, 10, 30])),
        n_informative=num_informative,
        n_redundant=0,
        n_classes=num_classes,
        n_clusters_per_class=int(r.choice([1, 2])),
        class_sep=float(r.choice([0.7, 1.0, 1.5])),
        flip_y=0,
        random_state=int(r.randint(2**31)),
    )
    return torch.tensor(x).float(), torch.tensor(y).long()


@cache
def breast_cancer() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's table of breast cancer, in standard units."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    x = torch.tensor(found.data).float()
    return (x - x.mean(0)) / x.std(0), torch.tensor(found.target).long()


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


@cache
def sentences(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Give the ids of the words of docstrings' sentences, and the package; as many of each.

    They depend on the versions that are installed, so that they are kept in the folder.
    """
    file = folder / "sentences.npz" if folder is not None else None
    if file is None or not file.exists():
        found = [sorted(_sentences(package)) for package in PACKAGES]
        number = min(len(each) for each in found)
        chosen = [np.random.RandomState(0).permutation(len(each))[:number] for each in found]
        ids = [_ids(found[label][index]) for label, indices in enumerate(chosen) for index in indices]
        x, y = torch.stack(ids), torch.arange(len(PACKAGES)).repeat_interleave(number)
        if file is None:
            return x, y
        np.savez(file, x=x.numpy(), y=y.numpy())
    with np.load(file) as kept:
        return torch.from_numpy(kept["x"]), torch.from_numpy(kept["y"])


def _sentences(package: str) -> set[tuple[str, ...]]:
    """Find sentences of docstrings, without those that name a package or hold code."""
    root = Path(str(importlib.import_module(package).__file__)).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        if "test" in str(path.relative_to(root)):
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore")))
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        text = "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            words = tuple(re.findall("[a-z]+", sentence.lower()))
            is_code = re.search(r"torch|sklearn|scikit|scipy|tensor|pandas|pyplot|numpy|[\\<>=_:]", sentence)
            if 6 <= len(words) <= MAX_LENGTH and not is_code:
                found.add(words)
    return found


def _ids(words: tuple[str, ...]) -> Tensor:
    """Give the hashes of words; 0 is padding."""
    ids = torch.tensor([1 + zlib.crc32(word.encode()) % (NUM_WORDS - 1) for word in words])
    return pad(ids, (0, MAX_LENGTH - len(ids)))


# %% Noisy labels.
def partly_redrawn(r: np.random.RandomState, y: Tensor, noise: float, num_classes: int) -> Tensor:
    """Draw a share of the labels anew, from all classes."""
    is_drawn = torch.tensor(r.rand(len(y)) < noise)
    return torch.where(is_drawn, torch.tensor(r.randint(0, num_classes, len(y))), y)


def transition(kind: str, noise: float, num_classes: int) -> Tensor:
    """Give the chance of each noisy label (a column) for each correct label (a row)."""
    correct = torch.eye(num_classes)
    other = correct.roll(1, 1) if kind == "by class" else torch.full_like(correct, 1 / num_classes)
    return (1 - noise) * correct + noise * other


def noisy(r: np.random.RandomState, y: Tensor, chances: Tensor) -> Tensor:
    """Draw noisy labels."""
    bounds = chances[y].cumsum(1)
    drawn = torch.tensor(r.rand(len(y))).float()[:, None]
    return (drawn > bounds).sum(1).clamp(max=chances.shape[1] - 1)
