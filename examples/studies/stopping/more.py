"""Runs that were added for what the first left open: photos, signals and texts, larger networks, larger tables.

All of them are for the check half.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import data
import networks
import numpy as np
import torch
from encoders import image_features, minilm_ids, text_features
from runs import NUM_UNSEEN, Run, _mlp_run, _run, redrawn, seeded
from torch import Tensor, nn
from tuned import Tuned
from tuned import _run as _tuned_run

NUM_OF_PHOTOS = 8000  # the first ones, of which an encoder's features are computed once
RATINGS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")
NUM_TEST = 1000
LEAST_ROWS, FEWEST_COLUMNS, MOST_COLUMNS = 8400, 4, 25


# %% Photos.
def _photos(r: np.random.RandomState, index: int, n: int, folder: Path) -> tuple[Tensor, Tensor, Tensor, str]:
    """Draw photos with what people said of them: one of three raters, what most said, or the worst of them."""
    x, y = data.images("cifar10", folder)
    chosen = torch.tensor(r.permutation(NUM_OF_PHOTOS)[: n + NUM_UNSEEN + NUM_TEST])
    said, y = data.labels_by_people(RATINGS[index % len(RATINGS)], folder)[chosen], y[chosen]
    return x[chosen].float() / 255, said, y, f"photos by people, {100 * float((said != y).float().mean()):.0f} % wrong"


def photos_more(r: np.random.RandomState, index: int, folder: Path) -> Run:
    n = int(600 * 2.5 ** r.rand())
    x, said, y, told = _photos(r, index, n, folder)
    make, network = networks.draw_cnn(r, 3, 10)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    is_augmented = bool(r.rand() < 0.35)
    return _run(
        r, "photos_more", index, x, said, y, n, task="multiclass", num_classes=10, is_design=False,
        kind=f"{told}, {n}, {network}, {optimizer}" + ", augmented" * is_augmented, make_network=seeded(make, index),
        make_optimizer=make_optimizer, epochs=int(np.clip(18_000 / n, 12, 25)), batch_size=int(r.choice([32, 64])),
        is_augmented=is_augmented, judges={"lite0": partial(image_features, size=0, side=96, folder=folder)},
    )  # fmt: skip


def resnet18(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Train ResNet-18 of torchvision, 11 million weights, from scratch on 3,000 photos of 32 pixels."""
    from torchvision.models import resnet18

    x, said, y, told = _photos(r, index, 3000, folder)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    return _run(
        r, "resnet18", index, x, said, y, 3000, task="multiclass", num_classes=10, is_design=False, epochs=10,
        kind=f"{told}, ResNet-18, {optimizer}", make_network=seeded(lambda: resnet18(num_classes=10), index),
        make_optimizer=make_optimizer, judges={"lite0": partial(image_features, size=0, side=96, folder=folder)},
    )  # fmt: skip


# %% Texts.
@cache
def _features_of_texts(source: str, folder: Path) -> Tensor:
    """Return what all-MiniLM-L6-v2 says of all texts of a source; it is kept in a file."""
    file = folder / f"minilm-{source}.npy"
    if not file.exists():
        np.save(file, text_features(minilm_ids(data.texts(source, folder)[0])).half().numpy())
    return torch.from_numpy(np.load(file)).float()


class Words(nn.Module):
    """A network of words, where a row begins with the number of the text."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.network(rows[:, 1:])
        return found


def _texts(r: np.random.RandomState, pool: str, index: int, source: str, sizes: tuple[int, float], folder: Path) -> Run:
    """Draw texts of a source, and a network of words; a judge sees words, or all-MiniLM-L6-v2's features."""
    texts, votes, correct = data.texts(source, folder)
    noisy = torch.tensor([r.choice(each) for each in votes])
    y, n = torch.tensor(correct), int(sizes[0] * sizes[1] ** r.rand())
    order = torch.tensor(r.permutation(len(texts))[: n + NUM_UNSEEN + NUM_TEST])
    ids = data.token_ids([data.words(texts[place]) for place in order], n)
    num_classes = int(y.max()) + 1
    make, network = networks.draw_words(r, num_classes)
    make_optimizer, optimizer = networks.draw_optimizer(r, has_sgd=False)
    wrong = 100 * float((noisy[order] != y[order]).float().mean())
    training, unseen, test = torch.arange(len(order)).split([n, NUM_UNSEEN, NUM_TEST])
    x, noisy, y = torch.cat([order[:, None], ids], 1), noisy[order], y[order]
    return Run(
        pool, index, False, f"{source} by people, {wrong:.0f} % wrong, {n}, {network}, {optimizer}",
        "multiclass", num_classes, x[training], noisy[training], x[unseen], noisy[unseen], y[unseen], x[test], y[test],
        noisy[test], make_network=seeded(lambda: Words(make()), index), make_optimizer=make_optimizer,
        epochs=int(np.clip(20_000 / n, 12, 25)), batch_size=int(r.choice([32, 64])),
        has_schedule=bool(r.rand() < 0.25),
        judges={
            "inputs": lambda rows: rows[:, 1:],
            "minilm": lambda rows: _features_of_texts(source, folder)[rows[:, 0]],
        },
    )  # fmt: skip


def few_texts(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw 100 to 400 sentences of films and shops, of which a reference of words knows little; all are for design."""
    source = ("films", "shops")[index % 2]
    return replace(_texts(r, "few_texts", index, source, (100, 4), folder), is_design=True)


def texts_more(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw newspapers and tweets that people rated, reviews of food, tweets by device, reports of birds by flight."""
    source = data.SOURCES[index % len(data.SOURCES)]
    return _texts(r, "texts_more", index, source, (600, 2.7), folder)


def minilm_more(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Fine-tune all-MiniLM-L6-v2, 22 million weights, on 500 to 2,000 texts."""
    from encoders import TextFeatures

    source = data.SOURCES[index % len(data.SOURCES)]
    texts, votes, correct = data.texts(source, folder)
    n = int(500 * 4 ** r.rand())
    chosen = r.permutation(len(texts))[: n + 400 + 1000]
    noisy = torch.tensor([r.choice(votes[place]) for place in chosen])
    y = torch.tensor(correct)[torch.tensor(chosen)]
    wrong = 100 * float((noisy != y).float().mean())
    return _tuned_run(
        "minilm_more", index, f"MiniLM, {source}, {wrong:.0f} % wrong", minilm_ids([texts[place] for place in chosen]),
        noisy, y, max(correct) + 1, lambda: Tuned(TextFeatures(), TextFeatures.WIDTH, max(correct) + 1), r, (-4.7, -4),
        epochs=int(np.clip(4000 / n, 3, 6)), judges={"body": text_features},
    )  # fmt: skip


# %% Signals.
def signals_more(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw windows of a series, with whether it rises: half-hourly demand twice, calls of a bank, passengers of trains.

    Weeks are divided, so that no window is near one of training. A fifth or two fifths of the labels may be redrawn.
    """
    sources = (*data.SERIES, "modeldata/Chicago")
    name, share, ahead = sources[index % 4], (0.0, 0.2, 0.4)[index // 4 % 3], int(r.choice([4, 8, 12]))
    x, y, periods = data.rises(name, ahead, folder)
    noisy = redrawn(r, y, share)
    order = torch.tensor(r.permutation(int(periods.max()) + 1))
    parts = order.tensor_split([int(0.5 * len(order)), int(0.75 * len(order))])
    training, unseen, test = (torch.isin(periods, part).nonzero()[:, 0] for part in parts)
    training = training[torch.tensor(r.permutation(len(training))[: int(r.choice([600, 1000, 1500]))])]
    unseen = unseen[torch.tensor(r.permutation(len(unseen))[:NUM_UNSEEN])]
    make, network = networks.draw_signal_network(r, x.shape[1], x.shape[2], 2)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    told = f"{name} rises in {ahead}, {100 * share:.0f} % redrawn, {len(training)}"
    return Run(
        "signals_more", index, False, f"{told}, {network}, {optimizer}", "multiclass", 2, x[training], noisy[training],
        x[unseen], noisy[unseen], y[unseen], x[test], y[test], noisy[test], make_network=seeded(make, index),
        make_optimizer=make_optimizer, epochs=30, batch_size=int(r.choice([16, 32, 64])),
        has_schedule=bool(r.rand() < 0.25),
    )  # fmt: skip


def waves(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw the current of appliances, or spoken digits, none, a fifth or two fifths of whose labels are redrawn."""
    name, share = data.WAVES[index % 2], (0.0, 0.2, 0.4)[index // 2 % 3]
    x, y = data.waves(name, folder)
    num_classes, n = int(y.max()) + 1, 500 if name == "appliances" else int(600 * 2 ** r.rand())
    make, network = networks.draw_signal_network(r, x.shape[1], x.shape[2], num_classes)
    make_optimizer, optimizer = networks.draw_optimizer(r)
    return _run(
        r, "waves", index, x, redrawn(r, y, share), y, n, task="multiclass", num_classes=num_classes, epochs=30,
        kind=f"{name}, {100 * share:.0f} % redrawn, {n}, {network}, {optimizer}",
        make_network=seeded(make, index), make_optimizer=make_optimizer, batch_size=int(r.choice([16, 32, 64])),
        is_design=False,
    )  # fmt: skip


# %% Tables: a larger network, and more rows.
@cache
def _narrow(folder: Path) -> list[str]:
    """Return the tables of 3,500 or more rows, and 4 to 25 columns."""
    lines = [*data.table_lines()[0], *data.large_table_lines()]
    shapes = {line: data.table(line, folder)[0].shape for line in lines}
    return [line for line, (rows, n) in shapes.items() if rows >= 3500 and FEWEST_COLUMNS <= n <= MOST_COLUMNS]


def transformer(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Train an FT-Transformer of `rtdl_revisiting_models`, a token for each column, on 2,000 rows of a table."""
    from rtdl_revisiting_models import FTTransformer

    lines, share, rate = _narrow(folder), 0.2 * (index % 2), 10 ** r.uniform(-4, -3)
    line = lines[(5 * index) % len(lines)]
    x, y = data.table(line, folder)
    kept = torch.tensor(r.permutation(len(x))[: 2000 + NUM_UNSEEN + NUM_TEST])
    x, y = x[kept], y[kept]
    num_classes, blocks = int(y.max()) + 1, int(r.choice([2, 3]))

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = FTTransformer.get_default_kwargs(n_blocks=blocks)
            self.network = FTTransformer(
                n_cont_features=x.shape[1], cat_cardinalities=[], d_out=num_classes, **settings
            )

        def forward(self, rows: Tensor) -> Tensor:
            found: Tensor = self.network(rows, None)
            return found

    told = line.split()[1] + (", a fifth redrawn" if share else "")
    return _run(
        r, "transformer", index, x, redrawn(r, y, share), y, 2000, task="multiclass", num_classes=num_classes,
        kind=f"{told}, FT-Transformer of {blocks}, adamw {rate:.1g}", make_network=seeded(Columns, index),
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=1e-5), epochs=15,
        is_design=False,
    )  # fmt: skip


def few_large(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a large table whose rarest class is positive: 1 to 10 % of 5,000 to 20,000 rows."""
    lines = data.large_table_lines()
    line, most = lines[index % len(lines)], 10 ** r.uniform(-2, -1)
    x, y = data.table(line, folder)
    counts = y.bincount()
    rarest = int((counts >= 0.01 * len(y)).nonzero()[-1])  # classes are in order of their frequency
    is_positive = y == rarest
    others = int((~is_positive).sum())
    positives = is_positive.nonzero()[:, 0]
    positives = positives[torch.tensor(r.permutation(len(positives))[: int(most / (1 - most) * others)])]
    rows = torch.cat([(~is_positive).nonzero()[:, 0], positives])
    x, y = x[rows], is_positive[rows].long()
    n, task = int(r.choice([5000, 10000, 20000])), ("binary", "multiclass")[index // 2 % 2]
    told = f"{line.split()[1]}, {100 * float(y.float().mean()):.0f} % positive"
    more = {"n": n, "batch_size": int(r.choice([64, 128, 256])), "is_design": False, "epochs": 20}
    return _mlp_run(r, "few_large", index, 1, x, y, y, task, told, **more)


def numbers_large(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Draw a regression on 5,000 to 20,000 rows: targets as they are, or with as much noise."""
    lines, noise = data.large_number_lines(), index % 2
    line = lines[index // 2 % len(lines)]
    x, y = data.table(line, folder)
    noisy = y + noise * torch.tensor(r.randn(len(y))).float()
    told = line.split()[1] + ", noisy" * noise
    n, batch_size = int(r.choice([5000, 10000, 20000])), int(r.choice([64, 128, 256]))
    more = {"n": n, "batch_size": batch_size, "is_design": False, "epochs": 20}
    return _mlp_run(r, "numbers_large", index, 1, x, noisy, y, "regression", told, **more)
