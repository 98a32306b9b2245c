"""Runs, drawn by pool and index: data, labels as people have them, and a network as people build them.

A third of each pool is for design: every third table or run; of texts, films and shops. The rest is the check half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import data
import networks
import numpy as np
import torch
from encoders import image_features
from torch import Tensor, nn
from torch.nn.functional import pad

ALIKE, NUM_ALIKE = ("alike", "photos_alike"), 6  # networks on the same data
WAYS = ("plain", "weights", "sampler", "undersampled")
SHIFTED = ("sampler", "undersampled")  # show the reference other shares of classes than unseen samples have
FEWEST, MOST = 0.03, 0.3  # positives
NUM_UNSEEN, NUM_TEST = 600, 2000
PASSES = {"cnn": 36_000, "words": 40_000}  # of samples through a network, in all epochs, for the time that it takes


@dataclass
class Run:
    """What is trained, and on what it is judged; `kind` is told in tables."""

    pool: str
    index: int
    is_design: bool
    kind: str
    task: str  # "multiclass", "binary" (one logit) or "regression"
    num_classes: int
    x: Tensor
    y: Tensor  # as noisy as people's
    x_unseen: Tensor
    y_unseen: Tensor  # as noisy as those of training
    correct_unseen: Tensor
    x_test: Tensor
    y_test: Tensor
    noisy_test: Tensor  # labels as noisy as those of training
    make_network: networks.Make
    make_optimizer: networks.MakeOptimizer
    epochs: int
    batch_size: int = 64
    way: str = "plain"  # or class weights, a weighted sampler, or the frequent class undersampled
    has_schedule: bool = False
    is_augmented: bool = False
    judges: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # features for further references

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.index:03d}"

    @property
    def num_outputs(self) -> int:
        return self.num_classes if self.task == "multiclass" else 1

    @property
    def x_kept(self) -> Tensor:
        """Training samples as a monitor gets them from the loader, augmented if they are."""
        generator = torch.Generator().manual_seed(self.index)
        return augmented(self.x, generator) if self.is_augmented else self.x


# %% Parts that pools share.
def _split(r: np.random.RandomState, number: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.tensor(r.permutation(number))
    n = min(n, int(0.6 * number))
    num_unseen = min(NUM_UNSEEN, (number - n) // 2)
    num_test = min(NUM_TEST, number - n - num_unseen)
    training, unseen, test = order[: n + num_unseen + num_test].split([n, num_unseen, num_test])
    return training, unseen, test


def _run(
    r: np.random.RandomState, pool: str, index: int, x: Tensor, noisy: Tensor, y: Tensor, n: int, **more: Any
) -> Run:
    training, unseen, test = _split(r, len(x), n)
    parts = {"x": x[training], "y": noisy[training], "x_unseen": x[unseen], "y_unseen": noisy[unseen]}
    parts |= {"correct_unseen": y[unseen], "x_test": x[test], "y_test": y[test], "noisy_test": noisy[test]}
    found = {"is_design": index % 3 == 0} | more
    return Run(pool=pool, index=index, has_schedule=bool(r.rand() < 0.25), **parts, **found)


def redrawn(r: np.random.RandomState, y: Tensor, share: float) -> Tensor:
    """Draw a share of the labels anew, from all classes."""
    is_drawn = torch.tensor(r.rand(len(y)) < share)
    return torch.where(is_drawn, torch.tensor(r.randint(0, int(y.max()) + 1, len(y))), y)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images by up to 4 pixels, and turn half of them."""
    places = torch.randint(9, (2, len(x)), generator=generator)
    is_turned = torch.rand(len(x), generator=generator) < 0.5
    rows, columns = (places[:, :, None] + torch.arange(x.shape[-1])).unbind(0)
    columns = torch.where(is_turned[:, None], columns.flip(1), columns)
    wide = pad(x, (4, 4, 4, 4))
    samples = torch.arange(len(x))[:, None, None]
    return wide.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


def seeded(make: networks.Make, seed: int) -> networks.Make:
    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return make_network


def without_tenth(run: Run) -> Run:
    """Return the same training without a random tenth of its samples, which stands where the unseen ones do."""
    order = torch.randperm(len(run.y), generator=torch.Generator().manual_seed(run.index))
    held, rest = order.split([len(order) // 10, len(order) - len(order) // 10])
    x, y = run.x[held], run.y[held]
    return replace(run, x=run.x[rest], y=run.y[rest], x_unseen=x, y_unseen=y, correct_unseen=y)


# %% Tables.
def _mlp_run(
    r: np.random.RandomState, pool: str, index: int, line: int, x: Tensor, noisy: Tensor, y: Tensor, task: str,
    told: str, n: int | None = None, of_data: np.random.RandomState | None = None, **more: Any,
) -> Run:  # fmt: skip
    """Draw an MLP for samples that are given; `of_data` draws which of them."""
    n = n or int(r.choice([600, 1000, 2000, 2000, 3000]))
    num_classes = 1 if task == "regression" else int(y.max()) + 1
    make, network = networks.draw_mlp(r, x[0].numel(), num_classes if task == "multiclass" else 1)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    epochs, batch_size = int(r.randint(30, 41)), int(r.choice([32, 64, 64, 128]))
    more = {"epochs": epochs, "batch_size": batch_size, "is_design": line % 3 == 0} | more
    more |= {"make_network": seeded(make, index), "make_optimizer": make_optimizer}
    kind = f"{told}, {network}, {optimizer}"
    return _run(of_data or r, pool, index, x, noisy, y, n, task=task, kind=kind, num_classes=num_classes, **more)


def table(r: np.random.RandomState, index: int, folder: Path) -> Run:
    line, share = index // 2 % 60, 0.2 * (index % 2)
    x, y = data.table(data.table_lines()[0][line], folder)
    is_binary = int(y.max()) == 1 and (line + index // 120) % 2 == 0
    told = data.table_lines()[0][line].split()[1] + (", a fifth redrawn" if share else "")
    task = "binary" if is_binary else "multiclass"
    return _mlp_run(r, "tables", index, line, x, redrawn(r, y, share), y, task, told)


def alike(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw one of several networks for the same samples of a table, to compare runs."""
    line = index // NUM_ALIKE
    of_data = np.random.RandomState((line, 52))
    x, y = data.table(data.table_lines()[0][line], folder)
    share, n = float(of_data.choice([0, 0.2])), int(of_data.choice([600, 1000, 2000]))
    noisy = redrawn(of_data, y, share)
    told = data.table_lines()[0][line].split()[1] + f", {100 * share:.0f} % redrawn"
    return _mlp_run(r, "alike", index, line, x, noisy, y, "multiclass", told, n, of_data)


def large(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a table of which 5,000 to 20,000 rows are for training: labels as they are, then a fifth redrawn."""
    lines = data.large_table_lines()
    line, share = index % len(lines), 0.2 * (index // len(lines))
    x, y = data.table(lines[line], folder)
    told = lines[line].split()[1] + (", a fifth redrawn" if share else "")
    n, batch_size = int(r.choice([5000, 10000, 20000])), int(r.choice([64, 128, 256]))
    more = {"n": n, "batch_size": batch_size, "is_design": False}
    return _mlp_run(r, "large", index, line, x, redrawn(r, y, share), y, "multiclass", told, **more)


def few_positives(folder: Path) -> list[int]:
    """Return the tables of two classes, one of which is rare."""
    found = []
    for line, text in enumerate(data.table_lines()[0]):
        y = data.table(text, folder)[1]
        if int(y.max()) == 1 and FEWEST <= float((y == 1).float().mean()) <= MOST:
            found.append(line)
    return found


def few(r: np.random.RandomState, index: int, folder: Path) -> Run:
    line, way = few_positives(folder)[index // len(WAYS)], WAYS[index % len(WAYS)]
    x, y = data.table(data.table_lines()[0][line], folder)
    task = "binary" if r.rand() < 0.5 else "multiclass"
    told = f"{data.table_lines()[0][line].split()[1]}, {way}"
    run = _mlp_run(r, "few", index, line, x, y, y, task, told, 3000 if way == "undersampled" else None, way=way)
    if way == "undersampled":
        positives = (run.y == 1).nonzero()[:, 0]
        rows = torch.cat([positives, (run.y == 0).nonzero()[: len(positives), 0]])
        run.x, run.y = run.x[rows], run.y[rows]
    return run


def numbers(r: np.random.RandomState, index: int, folder: Path) -> Run:
    line, noise = index // 2, index % 2
    x, y = data.table(data.table_lines()[1][line], folder)
    noisy = y + noise * torch.tensor(r.randn(len(y))).float()
    told = data.table_lines()[1][line].split()[1] + ", noisy" * noise
    return _mlp_run(r, "numbers", index, line, x, noisy, y, "regression", told)


# %% Photos and texts.
def _cnn_run(
    r: np.random.RandomState, pool: str, index: int, x: Tensor, noisy: Tensor, y: Tensor, told: str, n: int,
    augments: bool,
) -> Run:  # fmt: skip
    """Draw a CNN for images that are given."""
    num_classes = int(y.max()) + 1
    make, network = networks.draw_cnn(r, x.shape[1], num_classes)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    epochs, is_augmented = int(np.clip(PASSES["cnn"] / n, 12, 25)), augments and bool(r.rand() < 0.35)
    kind = f"{told}, {network}, {optimizer}" + ", augmented" * is_augmented
    return _run(
        r, pool, index, x, noisy, y, n, task="multiclass", kind=kind, num_classes=num_classes, epochs=epochs,
        make_network=seeded(make, index), make_optimizer=make_optimizer, is_augmented=is_augmented,
        batch_size=int(r.choice([32, 64])),
    )  # fmt: skip


def photo_judges(folder: Path, names: Iterable[str] = ("lite0", "lite2")) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return encoders of photos: EfficientNet-Lite0 at 96 pixels, and Lite2 at 128."""
    sides = {"lite0": (0, 96), "lite2": (2, 128)}
    return {name: partial(image_features, size=sides[name][0], side=sides[name][1], folder=folder) for name in names}


def draw_images(r: np.random.RandomState, name: str, folder: Path, number: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = data.images(name, folder)
    chosen = torch.tensor(r.permutation(len(x))[:number])
    return x[chosen].float() / 255, y[chosen], chosen


def photos(r: np.random.RandomState, index: int, folder: Path) -> Run:
    n = int(600 * 5 ** r.rand())
    labels = ("worse_label", "aggre_label")[index // 3 % 2]
    x, y, chosen = draw_images(r, "cifar10", folder, n + NUM_UNSEEN + NUM_TEST)
    said = data.labels_by_people(labels, folder)[chosen]
    told = f"photos by people, {100 * float((said != y).float().mean()):.0f} % wrong, {n}"
    run = _cnn_run(r, "photos", index, x, said, y, told, n, augments=True)
    run.judges = photo_judges(folder)
    return run


def texts(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw sentences of films and shops for design; of newspapers and tweets for the check half."""
    is_design = index % 3 == 0
    source = (("films", "shops") if is_design else ("newspapers", "tweets"))[index // 3 % 2]
    by_rules = index // 6 % 3 == 2
    words, ratings, lexicon = data.sentences(source, folder)
    found = []
    for place in r.permutation(len(words)):
        votes = [each for each in ratings[place] if each]
        score = sum(lexicon.get(word, 0.0) for word in words[place])
        if votes and sum(votes) and (score or not by_rules):
            label = score > 0 if by_rules else r.choice(votes) > 0
            found.append((words[place], int(label), int(sum(votes) > 0)))
    chosen, noisy, correct = zip(*found, strict=True)
    n = min(int(r.randint(800, 2001)), len(found) // 2)
    ids = data.token_ids(list(chosen), n)
    make, network = networks.draw_words(r, 2)
    make_optimizer, optimizer = networks.draw_optimizer(r, has_sgd=False)
    wrong = float(np.mean(np.array(noisy) != np.array(correct)))
    told = f"{source} by {'rules' if by_rules else 'people'}, {100 * wrong:.0f} % wrong, {n}"
    return _run(
        r, "texts", index, ids, torch.tensor(noisy), torch.tensor(correct), n, task="multiclass", num_classes=2,
        kind=f"{told}, {network}, {optimizer}", make_network=seeded(make, index), make_optimizer=make_optimizer,
        epochs=int(np.clip(PASSES["words"] / n, 15, 25)), batch_size=int(r.choice([32, 64])), is_design=is_design,
    )  # fmt: skip


# %% Labels redrawn at random.
def redrawn_labels(r: np.random.RandomState, index: int, folder: Path) -> Run:
    source = ("cifar10", "made", "fashion", "made", "mnist")[index % 5]
    share, n = (0.0, 0.2, 0.4)[index // 3 % 3], int(300 * 10 ** r.rand())
    if source != "made":
        x, y, _ = draw_images(r, source, folder, n + NUM_UNSEEN + NUM_TEST)
        told = f"{source}, {100 * share:.0f} % redrawn, {n}"
        return _cnn_run(r, "redrawn", index, x, redrawn(r, y, share), y, told, n, augments=source == "cifar10")
    from sklearn.datasets import make_classification

    num_informative, num_classes = int(r.choice([5, 10, 20])), int(r.choice([2, 3, 5, 10]))
    num_features = num_informative + int(r.choice([0, 10, 30]))
    made = make_classification(
        n + NUM_UNSEEN + NUM_TEST, num_features, n_informative=num_informative, n_redundant=0, n_classes=num_classes,
        n_clusters_per_class=1, class_sep=float(r.choice([0.7, 1.0, 1.5])), flip_y=0,
        random_state=int(r.randint(2**31)),
    )  # fmt: skip
    x, y = torch.tensor(made[0]).float(), torch.tensor(made[1])
    told = f"made table, {num_classes} classes, {100 * share:.0f} % redrawn, {n}"
    return _mlp_run(r, "redrawn", index, index, x, redrawn(r, y, share), y, "multiclass", told, n)


# %% Pools that were added with the best small model; all of their runs are for the check.
NUM_OF_PHOTOS_ALIKE = 1500
RATERS = ("first", "agree", "both")


def signals(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a set of signals, none, a fifth or two fifths of whose labels are redrawn."""
    name, share = data.SIGNALS[index % 3], (0.0, 0.2, 0.4)[index // 3 % 3]
    x, y = data.signals(name, folder)
    n, num_classes = int(0.6 * len(x)), int(y.max()) + 1
    make, network = networks.draw_signal_network(r, x.shape[1], x.shape[2], num_classes)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    return _run(
        r, "signals", index, x, redrawn(r, y, share), y, n, task="multiclass", num_classes=num_classes, epochs=40,
        kind=f"{name}, {100 * share:.0f} % redrawn, {n}, {network}, {optimizer}", make_network=seeded(make, index),
        make_optimizer=make_optimizer, batch_size=int(r.choice([16, 32, 64])), is_design=False,
    )  # fmt: skip


def series(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a series whose values some hours later are targets, as they are or noisy; its weeks are divided."""
    name, ahead, noise = data.SERIES[index % 3], (12, 24)[index // 3 % 2], index // 6 % 2
    x, y, periods = data.series(name, ahead, folder)
    noisy = y + 0.5 * noise * torch.tensor(r.randn(len(y))).float()
    order = torch.tensor(r.permutation(int(periods.max()) + 1))
    parts = order.tensor_split([int(0.6 * len(order)), int(0.8 * len(order))])
    training, unseen, test = (torch.isin(periods, part).nonzero()[:, 0] for part in parts)
    training = training[torch.tensor(r.permutation(len(training))[:2000])]
    unseen = unseen[torch.tensor(r.permutation(len(unseen))[:NUM_UNSEEN])]
    make, network = networks.draw_signal_network(r, 1, x.shape[2], 1)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    return Run(
        "series", index, False, f"{name}, {ahead} steps later{', noisy' * noise}, {network}, {optimizer}",
        "regression", 1, x[training], noisy[training], x[unseen], noisy[unseen], y[unseen], x[test], y[test],
        noisy[test], make_network=seeded(make, index), make_optimizer=make_optimizer, epochs=30,
        batch_size=int(r.choice([32, 64])), has_schedule=bool(r.rand() < 0.25),
    )  # fmt: skip


def annotators(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw sentences with two ratings each: the first counts, those that agree, or both as two samples."""
    group, way = index // len(RATERS), RATERS[index % len(RATERS)]
    of_data = np.random.RandomState((group, 54))
    source = list(data.FILES)[group % 4]
    words, ratings, _ = data.sentences(source, folder)
    found = []
    for place in of_data.permutation(len(words)):
        votes = [each > 0 for each in ratings[place] if each]
        if len(votes) > 1 and sum(ratings[place]):
            found.append((words[place], *of_data.choice(votes, 2, replace=False), sum(ratings[place]) > 0))
    chosen, first, second, correct = zip(*found, strict=True)
    n = min(int(of_data.randint(800, 2001)), len(found) // 2)
    x = data.token_ids(list(chosen), n)
    y1, y2, y = (torch.tensor(each).long() for each in (first, second, correct))
    make, network = networks.draw_words(of_data, 2)
    make_optimizer, optimizer = networks.draw_optimizer(of_data, has_sgd=False)
    told = f"{source} by {way}, {100 * float((y1 != y).float().mean()):.0f} % wrong, {n}, {network}, {optimizer}"
    run = _run(
        of_data, "annotators", index, x, torch.stack([y1, y2], 1), y, n, task="multiclass", num_classes=2, kind=told,
        make_network=seeded(make, group), make_optimizer=make_optimizer, is_design=False,
        epochs=int(np.clip(PASSES["words"] / n, 15, 25)), batch_size=int(of_data.choice([32, 64])),
    )  # fmt: skip
    run.y_unseen, run.noisy_test = run.y_unseen[:, 0], run.noisy_test[:, 0]
    agree = run.y[:, 0] == run.y[:, 1]
    rows = {"first": slice(None), "agree": agree, "both": torch.arange(len(run.x)).repeat(2)}[way]
    run.y = run.y.T.flatten() if way == "both" else run.y[rows, 0]
    run.x = run.x[rows]
    return run


def photos_alike(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw one of several CNNs for the same photos with human labels."""
    group = index // NUM_ALIKE
    of_data = np.random.RandomState((group, 55))
    n = NUM_OF_PHOTOS_ALIKE
    labels = ("worse_label", "aggre_label")[group % 2]
    x, y, chosen = draw_images(of_data, "cifar10", folder, n + NUM_UNSEEN + NUM_TEST)
    said = data.labels_by_people(labels, folder)[chosen]
    training, unseen, test = torch.arange(len(x)).split([n, NUM_UNSEEN, NUM_TEST])
    make, network = networks.draw_cnn(r, 3, 10)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    told = f"photos by people, {100 * float((said != y).float().mean()):.0f} % wrong, {n}, {network}, {optimizer}"
    return Run(
        "photos_alike", index, False, told, "multiclass", 10, x[training], said[training], x[unseen], said[unseen],
        y[unseen], x[test], y[test], said[test], epochs=20, batch_size=int(r.choice([32, 64])),
        is_augmented=bool(r.rand() < 0.35),
        make_network=seeded(make, index), make_optimizer=make_optimizer, has_schedule=bool(r.rand() < 0.25),
        judges=photo_judges(folder),
    )  # fmt: skip


def made(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a table of numbers whose classes, all of them correct, a network made; nobody should stop there."""
    num_columns, num_classes, n = int(r.choice([10, 20, 40])), int(r.choice([2, 3, 5])), 5000
    x = torch.tensor(r.randn(9000, num_columns)).float()
    first, second = r.randn(num_columns, 64) / num_columns**0.5, r.randn(64, num_classes)
    y = torch.tensor((np.tanh(2 * x.numpy() @ first) @ second).argmax(1))
    told = f"made by a network, {num_columns} columns, {num_classes} classes"
    return _mlp_run(r, "made", index, 1, x, y, y, "multiclass", told, n)
