"""Pairs of trainings, an earlier and a later one, which differ in one thing more than samples and seed.

    python examples/studies/bounds/pairs.py RUNS DATA --share 0.67  # a file for each training, made once

DATA holds what `stopping/data.py` reads. Of each data set, two earlier trainings differ in the noise of their labels;
seven later ones have other samples and another seed, and one has all labels of the earlier one: those of its training
samples, and the 300 by which its best epoch was chosen. Every epoch measures sensitivity as `SensitivityMonitor` does:
with the same noise on the same unseen samples, which are in standard units, or on the word vectors of texts. A third of
the data sets is for design.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot

from lightning_sensitivity import Reference
from lightning_sensitivity.functional import output_sensitivity
from lightning_sensitivity.running import GaussianNoise, noise_generator

sys.path.insert(0, str(Path(__file__).parents[1] / "stopping"))
import data
import networks
from runs import augmented, redrawn  #

KINDS = {  # and their numbers of data sets
    "tables": 60,
    "digits": 6,
    "fashion": 3,
    "photos": 12,
    "photos augmented": 4,
    "texts": 12,
    "regressions": 20,
    "regressions noisy": 20,
}
EPOCHS = {"digits": 30, "fashion": 15, "photos": 30, "photos augmented": 30, "texts": 25}  # others 40
NUM_TRAINING = {"digits": 224, "fashion": 400, "photos": 600, "photos augmented": 600}
MOST_UNSEEN, NUM_LABELS, REDRAWN = 600, 300, 0.2
COSTLY = ("samples x 2", "width x 2")  # of photos, not trained
LABELS = ("aggre_label", "worse_label")  # of photos, 9 % and 40 % wrong


@dataclass(frozen=True)
class Training:
    """What differs between the trainings of a data set."""

    name: str
    is_later: bool
    noise: int  # 0, or 1: a fifth of the labels drawn anew, photos' 40 % wrong for 9 %, one rater, noise on targets
    samples: int = 1
    rate: float = 1
    batch: int = 1
    width: int = 1
    has_all_labels: bool = False  # those of the earlier training samples, and of its validation samples


def trainings(noise: int) -> list[Training]:
    earlier = [Training(f"earlier-{each}", False, each) for each in (0, 1)]
    later = [Training(f"later-{each}", True, each) for each in (0, 1)]
    plain = later[noise]
    changed = [
        replace(plain, name="samples x 2", samples=2),
        replace(plain, name="rate div 3", rate=1 / 3),
        replace(plain, name="rate x 3", rate=3),
        replace(plain, name="batch x 4", batch=4),
        replace(plain, name="width x 2", width=2),
        replace(plain, name="all labels", has_all_labels=True),
    ]
    return [*earlier, *later, *changed]


def pairs(noise: int) -> dict[str, tuple[str, str]]:
    """Give the earlier and the later training of each change."""
    earlier, later = f"earlier-{noise}", f"later-{noise}"
    found = {"samples, seed": (earlier, later), "more noise": ("earlier-0", "later-1")}
    found["less noise"] = ("earlier-1", "later-0")
    return found | {each.name: (earlier, each.name) for each in trainings(noise)[4:]}


# %% Data sets, drawn by kind and index.
@dataclass
class Dataset:
    """Samples in standard units, their labels by noise, and what is trained on them."""

    x: Tensor
    noisy: tuple[Tensor, Tensor]
    y: Tensor
    num_classes: int
    task: str  # "multiclass", "binary" (one logit) or "regression"
    is_augmented: bool
    epochs: int
    batch_size: int
    parts: dict[str, Tensor]  # rows
    make: Any  # width -> a function that makes a network
    make_optimizer: networks.MakeOptimizer


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def samples(
    kind: str, index: int, folder: Path, r: np.random.RandomState
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return samples in standard units, labels with less and more noise, and correct ones."""
    if kind.startswith("regressions"):
        x, y = data.table(data.table_lines()[1][index], folder)
        return x, (y, y + torch.tensor(r.randn(len(y))).float()), y
    if kind == "texts":
        words, votes, correct = data.texts(list(data.FILES)[index % 4], folder)
        order = r.permutation(len(words))
        ids = data.token_ids([data.words(" ".join(words[place])) for place in order], len(words))
        one_rater, y = torch.tensor([r.choice(votes[place]) for place in order]), torch.tensor(correct)[order]
        return ids, (y, one_rater), y
    if kind == "tables":
        x, y = data.table(data.table_lines()[0][index], folder)
    elif kind == "digits":
        images, y = load_digits(return_X_y=True)
        x, y = standardized(torch.tensor(images).float().reshape(-1, 1, 8, 8)), torch.tensor(y)
    else:
        images, y = data.images("fashion" if kind == "fashion" else "cifar10", folder)
        chosen = torch.tensor(r.permutation(len(y))[:4200])
        x, y = standardized(images[chosen].float() / 255), y[chosen]
        if kind != "fashion":
            said = [data.labels_by_people(name, folder)[chosen] for name in LABELS]
            return x, (said[0], said[1]), y
    return x, (y, redrawn(r, y, REDRAWN)), y


def parts_of(r: np.random.RandomState, number: int, n: int, num_test: int) -> dict[str, Tensor]:
    """Divide samples: for training, as many for a later one and its double, unseen ones of both, and a test."""
    num_unseen = min(MOST_UNSEEN, max(NUM_LABELS, number // 8))
    sizes = {"earlier": n, "later": n, "double": n, "earlier_unseen": num_unseen, "later_unseen": num_unseen}
    rest = min(num_test, number - sum(sizes.values()))
    order = torch.tensor(r.permutation(number))
    found = order[: sum(sizes.values()) + rest].split([*sizes.values(), rest])
    return dict(zip([*sizes, "test"], found, strict=True))


def noise_of(kind: str, index: int) -> int:
    """Give the noise of the labels where it is not what changes."""
    if kind.startswith("regressions"):
        return int(kind == "regressions noisy")
    return index // 3 % 2 if kind == "tables" else index % 2


def is_for_design(index: int) -> bool:
    return index % 3 == 0


class Convolution(nn.Module):
    """A convolution over the vectors of words, in place of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.layer(x.masked_fill(src_key_padding_mask[..., None], 0).mT).relu().mT


@lru_cache(maxsize=1)
def draw(kind: str, index: int, folder: Path) -> Dataset:
    r = np.random.RandomState((list(KINDS).index(kind), index, 75))
    x, noisy, y = samples(kind, index, folder, r)
    num_classes = 1 if y.is_floating_point() else int(y.max()) + 1
    task = "regression" if num_classes == 1 else "binary" if num_classes == 2 and index % 2 == 0 else "multiclass"
    num_outputs = num_classes if task == "multiclass" else 1
    if kind == "tables" or task == "regression":
        n, num_test = min(int(r.choice([300, 600, 1000])), len(x) // (8 if kind == "tables" else 12)), 2000
        depth, width, dropout = int(r.randint(1, 4)), int(r.choice([64, 128, 256])), float(r.choice([0, 0, 0.1, 0.25]))
        has_norm, activation = bool(r.rand() < 0.5), networks.ACTIVATIONS[r.randint(4)]

        def make(times: int) -> networks.Make:
            sizes = x.shape[1], num_outputs, depth, width * times
            return networks.make_mlp(*sizes, dropout, has_norm, activation)
    elif kind == "texts":
        n, num_test = min(800, len(x) // 8), 800
        width, dropout = int(r.choice([32, 64])), float(r.choice([0, 0.1, 0.3]))

        def make(times: int) -> networks.Make:
            def words() -> nn.Module:
                network = networks.Words(width * times, int(index >= 8), dropout, num_outputs)
                network.layers = Convolution(width * times) if 4 <= index < 8 else network.layers
                return network

            return words
    else:
        n, num_test = NUM_TRAINING[kind], 1000
        depth, is_residual = 3 if kind.startswith("photos") else 2, kind.startswith("photos") and index // 2 % 2 == 0

        def make(times: int) -> networks.Make:
            return networks.make_cnn(x.shape[1], num_outputs, depth, 8 * times, is_residual, is_residual, 0.0)

    make_optimizer, _ = networks.draw_optimizer(r, has_sgd=kind != "texts")
    batch_size, parts = int(r.choice([32, 64])), parts_of(r, len(x), n, num_test)
    is_augmented = kind == "photos augmented"
    epochs = EPOCHS.get(kind, 40)
    return Dataset(x, noisy, y, num_classes, task, is_augmented, epochs, batch_size, parts, make, make_optimizer)


# %% Training
def loss(outputs: Tensor, y: Tensor, task: str) -> Tensor:
    if task == "multiclass":
        return cross_entropy(outputs, y)
    return {"binary": binary_cross_entropy_with_logits, "regression": mse_loss}[task](outputs[:, 0], y.float())


def error(outputs: Tensor, y: Tensor, task: str) -> float:
    """Return the share of wrong classes, or the mean squared error."""
    if task == "regression":
        return float(mse_loss(outputs[:, 0], y))
    said = outputs.argmax(1) if task == "multiclass" else (outputs[:, 0] > 0).long()
    return float((said != y).double().mean())


def run_on(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(200)])


def run_with_noise(network: nn.Module, x: Tensor) -> Tensor:
    """Run a network with noise on its inputs, or on the vectors of words."""
    noise, generator = GaussianNoise(0.1), noise_generator(seed=0)
    if x.is_floating_point():
        return run_on(network, noise(x, generator))
    assert isinstance(network, networks.Words)
    with network.words.register_forward_hook(lambda _module, _inputs, vectors: noise(vectors, generator)):
        return run_on(network, x)


def rows_of(dataset: Dataset, training: Training) -> Tensor:
    if not training.is_later:
        return dataset.parts["earlier"]
    if training.has_all_labels:
        return torch.cat([dataset.parts["earlier"], dataset.parts["earlier_unseen"][:NUM_LABELS]])
    return torch.cat([dataset.parts[name] for name in ("later", "double")[: training.samples]])


def train(dataset: Dataset, training: Training) -> Iterator[tuple[nn.Module, float]]:
    """Train, and give the network after each epoch, with the loss of its training batches."""
    rows, labels, seed = rows_of(dataset, training), dataset.noisy[training.noise], int(training.is_later)
    torch.manual_seed(seed)
    network, generator = dataset.make(training.width)(), torch.Generator().manual_seed(seed)
    optimizer = dataset.make_optimizer(network.parameters())
    for group in optimizer.param_groups:
        group |= {"lr": group["lr"] * training.rate, "fused": True, "foreach": False}
    for _ in range(dataset.epochs):
        network.train()
        whole_loss = 0.0
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(dataset.batch_size * training.batch):
            if len(batch) == 1:  # batch norm needs more
                continue
            x = augmented(dataset.x[batch], generator) if dataset.is_augmented else dataset.x[batch]
            optimizer.zero_grad()
            outputs = network(x)
            of_batch = loss(outputs, labels[batch], dataset.task)
            of_batch.backward()
            optimizer.step()
            whole_loss += len(batch) * of_batch.item()
        network.eval()
        yield network, whole_loss / len(rows)


def measured(dataset: Dataset, training: Training) -> dict[str, np.ndarray]:
    """Train, and return what was measured in each epoch."""
    unseen = dataset.parts["later_unseen" if training.is_later else "earlier_unseen"]
    x, (x_test, y_test) = dataset.x[unseen], (each[dataset.parts["test"]] for each in (dataset.x, dataset.y))
    found: dict[str, list[Any]] = {}
    for network, train_loss in train(dataset, training):
        clean = run_on(network, x)
        values: dict[str, Any] = {
            "per_output": float(output_sensitivity(clean, run_with_noise(network, x), per_output=True)),
            "train_loss": train_loss,
            "test_error": error(run_on(network, x_test), y_test, dataset.task),
            "unseen": clean.clamp(-6e4, 6e4).half().numpy(),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    size, num_samples = dataset.batch_size * training.batch, len(rows_of(dataset, training))
    arrays = {name: np.stack(values) for name, values in found.items()}
    steps = num_samples // size + (num_samples % size > 1)
    about = {"steps": np.array(steps), "task": np.array(dataset.task)}
    return arrays | about | {"y_unseen": dataset.noisy[training.noise][unseen].numpy()}


def reference_says(dataset: Dataset, training: Training) -> np.ndarray:
    """Return what a reference of the training samples, as a monitor gets them, says of the unseen ones."""
    rows = rows_of(dataset, training)
    x, y = dataset.x[rows], dataset.noisy[training.noise][rows]
    x = augmented(x, torch.Generator().manual_seed(0)) if dataset.is_augmented else x
    if dataset.task == "regression":
        reference = Reference("regression").fit(x, y)
        found = np.reshape(reference.predict(dataset.x[dataset.parts["later_unseen"]]), (-1, 1))
    else:
        reference = Reference("multiclass").fit(x, one_hot(y, dataset.num_classes).float())
        found = reference.predict_proba(dataset.x[dataset.parts["later_unseen"]])
    return found if reference.is_trusted_ else np.full_like(found, np.nan)


# %% Files
def file_of(runs: Path, kind: str, index: int, name: str) -> Path:
    return runs / f"{kind}-{index:02d}-{name}.npz".replace(" ", "_")


def reference_file(runs: Path, kind: str, index: int, training: Training) -> Path:
    """Return the file of a reference, which trainings on the same samples and labels share."""
    name = "all" if training.has_all_labels else training.samples
    return file_of(runs, kind, index, f"reference-{training.noise}-{name}")


def save(file: Path, found: dict[str, np.ndarray]) -> None:
    part = file.with_suffix(".part.npz")
    np.savez_compressed(part, **found)
    part.rename(file)
    print(f"{time.strftime('%H:%M:%S')} {time.process_time():.0f} s {file.stem}", flush=True)


def record(kind: str, index: int, runs: Path, folder: Path, epochs: int, *, all_references: bool) -> None:
    """Train what is not there yet, and fit the reference of the plain later training, or all references."""
    noise = noise_of(kind, index)
    for training in trainings(noise):
        if kind.startswith("photos") and training.name in COSTLY:
            continue
        file = file_of(runs, kind, index, training.name)
        if not file.exists():
            save(file, measured(replace(draw(kind, index, folder), epochs=epochs), training))
        file = reference_file(runs, kind, index, training)
        is_plain = training.noise == noise and training.samples == 1 and not training.has_all_labels
        if training.is_later and (is_plain or all_references) and not file.exists():
            save(file, {"reference": reference_says(draw(kind, index, folder), training)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pairs of all data sets.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--share", type=float, default=1, help="of the data sets of each kind")
    parser.add_argument("--all-references", action="store_true", help="also those for other noise, and more samples")
    parser.add_argument("--quick", action="store_true", help="one set of digits, two epochs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    places = [((index + 1) / KINDS[kind], kind, index) for kind in arguments.kinds for index in range(KINDS[kind])]
    for place, kind, index in [(0.0, "digits", 0)] if arguments.quick else sorted(places):
        if place <= arguments.share:
            epochs = 2 if arguments.quick else EPOCHS.get(kind, 40)
            record(kind, index, arguments.runs, arguments.data, epochs, all_references=arguments.all_references)


if __name__ == "__main__":
    main()
