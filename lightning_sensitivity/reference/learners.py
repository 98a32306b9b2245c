"""Two learners that know what they would have predicted of a sample without it, and any other of scikit-learn's."""

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.linalg import eigh
from sklearn.base import clone
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reference.calibration import Calibration, calibrate
from lightning_sensitivity.reference.features import Rows, Seen, SeenTransform, make_transforms, raw_columns, spread

Array: TypeAlias = Any  # of NumPy

_PART = 1000  # samples on which the learner and its numbers are chosen
_MIN_SAMPLES = 4  # samples

_LEAF, _OTHER_LEAVES = 5, (2, 15, 40)  # samples in a leaf
_FIRST_COLUMNS, _MAX_COLUMNS = 30, 100  # tried at a split, of half of them and of all
_TREES_OF_PART, _TREES, _MIN_TREES = 80, 150, 75
_TARGETS_OF_TREES = 15_000_000  # rows times classes times trees, above which there are fewer trees
_MAX_TARGETS, _MAX_CELLS = 500_000, 2_500_000  # rows times classes, and times columns, of a forest
_MIN_ROWS = 2000  # of a forest, unless there are no more
_MAX_ID = 1000  # below, token ids may be the categories of a table
_NEAR = 1.1  # score of a forest's first try, over that of ridge regression, up to which its search begins

_WIDTHS = (0.1, 0.4, 1.6, 6.4)  # of the kernel, times the median squared distance
_ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_MAX_RIDGE_ROWS = 10_000
_CENTRES_OF_PART, _CENTRES, _MANY_CENTRES = 500, 1000, 2000  # of Nystroem features: of columns, and of all else
_PAIRS = 500  # samples whose distances give the median
_EQUAL = 1e-12  # relative squared distance of equal samples
_FOLDS = 5


@dataclass
class Learner:
    """A small model, fitted to training samples, and calibrated.

    Attributes:
        name: ``"forest"``, ``"ridge"``, ``"mean"``, or the class of an estimator.
        features: What it sees of the samples, such as ``"patches"``.
        transform: Makes rows of what is seen.
        model: An estimator of scikit-learn, fitted to rows.
        left_out: What it would have predicted of each sample without it, ``(N, C)``.
        labels: The labels of the same samples, ``(N, C)``.
        task: The task, which says how predictions are scored.
        calibration: What makes its predictions right as often as they say.
        score: The score of the left-out predictions.
    """

    name: str
    features: str
    transform: SeenTransform
    model: Any
    left_out: Tensor
    labels: Tensor
    task: Task
    calibration: Calibration = Calibration()  # noqa: RUF009
    score: float = math.nan

    def __post_init__(self) -> None:
        """Calibrate the left-out predictions."""
        left_out = self._as_matrix(self.left_out)
        self.calibration = calibrate(left_out, self.labels, self.task)
        self.left_out = self.calibration.apply(left_out, self.task)
        self.score = float(self.task.distances(self.left_out, self.labels).mean())

    def predict(self, seen: Seen) -> Tensor:
        """Predict new samples, ``(M, C)``."""
        rows = self.transform(seen)
        is_classifier = hasattr(self.model, "classes_")
        found = self._as_matrix(self.model.predict_proba(rows) if is_classifier else self.model.predict(rows))
        return self.calibration.apply(found, self.task)

    def _as_matrix(self, found: Array) -> Tensor:
        """Give classes their columns, also those that no sample has."""
        if hasattr(self.model, "classes_"):
            p = np.zeros((len(found), self.labels.shape[1]))
            p[:, self.model.classes_] = found
            found = p
        return _as_matrix(found, self.labels.shape[1], self.task)


def _as_matrix(found: Array, num_columns: int, task: Task) -> Tensor:
    """Turn what a learner predicts into a matrix ``(N, C)``, of probabilities if there are classes."""
    p = np.asarray(found, dtype=np.float64).reshape(len(found), -1)
    if p.shape[1] < num_columns:  # see `_targets`
        p = np.concatenate([1 - p, p], axis=1)
    return task.clip(torch.from_numpy(p))


def _score(left_out: Array, labels: Tensor, task: Task) -> float:
    p = _as_matrix(left_out, labels.shape[1], task)
    return float(task.distances(calibrate(p, labels, task).apply(p, task), labels).mean())


def fit_learners(seen: Seen, labels: Tensor, task: Task) -> tuple[Learner, Tensor]:
    """Choose what suits the samples on a part of them, and fit it to all that it can take.

    Args:
        seen: What is seen of different samples, no larger than ``shrunk`` makes it.
        labels: Their labels as a matrix ``(N, C)``.
        task: The task, which says how predictions are scored.

    Returns:
        The learner, and which of the samples it knows.
    """
    number = len(labels)
    if number < _MIN_SAMPLES:
        return _fit_mean(seen, labels, task), torch.arange(number)
    with _quiet():
        chosen = spread(number, _PART)
        part = _at(seen, chosen), labels[chosen], task
        ridge = _choose_ridge(*part)
        rows = _rows_for_forest(seen, labels)
        forest = _choose_forest(*part, limit=_NEAR * ridge.score) if len(rows) else None
        if forest is not None and forest.score < ridge.score:
            return forest.fit(_at(seen, rows), labels[rows], task), rows
        rows = spread(number, _MAX_RIDGE_ROWS)
        return ridge.fit(_at(seen, rows), labels[rows], task), rows


def _targets(labels: Tensor, task: Task) -> Array:
    """Return what learners are fitted to, ``(N, C)``; of two classes, the second one says all."""
    return (labels[:, 1:] if task.has_classes and labels.shape[1] == 2 else labels).numpy()


def _at(seen: Seen, rows: Tensor) -> Seen:
    return {kind: values[rows] for kind, values in seen.items()}


def _fit_mean(seen: Seen, labels: Tensor, task: Task) -> Learner:
    """Predict the mean label: there are too few samples to learn from."""
    transform, model = next(iter(make_transforms(seen).values())), DummyRegressor()
    rows = transform(seen)
    return Learner("mean", "none", transform, model, model.fit(rows, labels.numpy()).predict(rows), labels, task)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep scikit-learn from warning of what we know, and from more threads than torch has: they would wait in vain.

    Threads of a decomposition wait for each other: with other processes on the same cores it takes 30 times as long.
    """
    with warnings.catch_warnings(), threadpool_limits({"openmp": torch.get_num_threads(), "blas": 1}):
        warnings.simplefilter("ignore")
        yield


_score_of = attrgetter("score")


# A random forest


def _rows_for_forest(seen: Seen, labels: Tensor) -> Tensor:
    """Choose the rows that a forest takes; none where it would take too much memory or time, or sees no columns."""
    number, kind = len(labels), _kind_of_columns(seen)
    if kind is None:
        return torch.arange(0)
    most = min(number, _MAX_TARGETS // labels.shape[1], _MAX_CELLS // max(1, seen[kind].shape[1]))
    return spread(number, most) if most >= min(number, _MIN_ROWS) else torch.arange(0)


def _kind_of_columns(seen: Seen) -> str | None:
    """Return the kind that a forest sees: columns, or token ids that may be categories; None without them."""
    if "columns" in seen:
        return "columns"
    return "tokens" if [*seen] == ["tokens"] and int(seen["tokens"].max()) < _MAX_ID else None


def _choose_forest(part: Seen, labels: Tensor, task: Task, limit: float) -> "_Forest | None":
    """Choose the smallest leaf, then the columns of a split, by left-out predictions; None if the first try is bad."""
    x, y = _raw(part)(part), _targets(labels, task)

    def tried(num_columns: int, leaf: int) -> _Forest:
        forest = _forest(x, y, _TREES_OF_PART, num_columns, leaf)
        return _Forest(num_columns, leaf, _score(forest.oob_prediction_, labels, task))

    total = x.shape[1]
    half = max(1, total // 2)
    first = tried(min(half, _FIRST_COLUMNS), _LEAF)
    if first.score > limit:
        return None
    best = min([first, *(tried(first.num_columns, leaf) for leaf in _OTHER_LEAVES)], key=_score_of)
    sizes = {min(size, _MAX_COLUMNS) for size in (int(math.sqrt(total)), half, total)} - {first.num_columns}
    return min([best, *(tried(size, best.leaf) for size in sorted(sizes))], key=_score_of)


@dataclass
class _Forest:
    """A random forest: the columns that are tried at a split, the samples of a leaf, and its score on the part.

    Left-out predictions are those of the trees that did not draw a sample. The regression of one-hot labels is a
    classification: its squared error is the Gini impurity.
    """

    num_columns: int
    leaf: int
    score: float

    def fit(self, seen: Seen, labels: Tensor, task: Task) -> Learner:
        """Fit it to all."""
        transform, y = _raw(seen), _targets(labels, task)
        trees = min(_TREES, max(_MIN_TREES, _TARGETS_OF_TREES // y.size))
        forest = _forest(transform(seen), y, trees, self.num_columns, self.leaf)
        return Learner("forest", "columns", transform, forest, forest.oob_prediction_, labels, task)


def _raw(seen: Seen) -> SeenTransform:
    return raw_columns(_kind_of_columns(seen) or "columns", seen)


def _forest(x: Array, y: Array, trees: int, num_columns: int, leaf: int) -> Any:
    options = {"min_samples_leaf": leaf, "oob_score": True, "random_state": 0, "n_jobs": torch.get_num_threads()}
    return RandomForestRegressor(trees, max_features=num_columns, **options).fit(x, y if y.shape[1] > 1 else y[:, 0])


# Ridge regression on features of a kernel


def _choose_ridge(part: Seen, labels: Tensor, task: Task) -> "_Ridge":
    """Choose features, the width of the kernel and the ridge by left-out predictions."""
    y, found = _targets(labels, task), []
    for name, transform in make_transforms(part).items():
        rows = transform(part)
        for width in _WIDTHS:
            gamma = 1 / (width * _median_distance(rows))
            features = _nystroem(gamma, min(_CENTRES_OF_PART, len(y))).fit_transform(rows)
            for place, left_out in enumerate(_leave_one_out(features, y, _ALPHAS)):
                found.append((np.square(left_out - y).mean(), name, gamma, place, left_out))
    _, name, gamma, place, left_out = min(found, key=lambda each: each[0])
    return _Ridge(name, gamma, place, _score(left_out, labels, task))


@dataclass
class _Ridge:
    """Ridge regression on Nystroem features: what is seen, the width of the kernel, the ridge, and a score on the part."""

    features: str
    gamma: float
    place: int
    score: float

    def fit(self, seen: Seen, labels: Tensor, task: Task) -> Learner:
        """Fit it to all; a ridge beside the chosen one may then be better."""
        transform, y = make_transforms(seen)[self.features], _targets(labels, task)
        kernel = _nystroem(self.gamma, min(_CENTRES if [*seen] == ["columns"] else _MANY_CENTRES, len(y)))
        features = kernel.fit_transform(transform(seen))
        alphas = _ALPHAS[max(0, self.place - 1) : self.place + 2]
        found = zip(_leave_one_out(features, y, alphas), alphas, strict=True)
        left_out, alpha = min(found, key=lambda each: float(np.square(each[0] - y).mean()))
        model = make_pipeline(kernel, Ridge(alpha).fit(features, y))
        return Learner("ridge", self.features, transform, model, left_out, labels, task)


def _nystroem(gamma: float, num_centres: int) -> Any:
    return Nystroem(gamma=gamma, n_components=num_centres, random_state=0)


def _median_distance(rows: Rows) -> float:
    """Return the median of squared distances of different samples."""
    distances = pairwise.euclidean_distances(rows[:: math.ceil(rows.shape[0] / _PAIRS)], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    return float(np.median(positive)) if len(positive) else 1.0


def _leave_one_out(features: Array, y: Array, alphas: tuple[float, ...]) -> Iterator[Array]:
    """Yield what ridge regression would predict of each sample without it, ``(N, C)``, for each ridge."""
    x, targets = features - features.mean(0), y - y.mean(0)
    values, vectors = eigh(x.T @ x)
    basis = x @ vectors
    products, squares = basis.T @ targets, basis**2
    for alpha in alphas:
        weights = 1 / (values.clip(0) + alpha)
        residuals = targets - basis @ (weights[:, None] * products)
        yield y - residuals / (1 - 1 / len(y) - squares @ weights)[:, None]


# Any estimator of scikit-learn


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Give an estimator that draws from global streams the same numbers in every call, and leave the streams alone."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def fit_estimator(estimator: Any, seen: Seen, labels: Tensor, task: Task) -> Learner:
    """Fit a copy of an estimator; left-out predictions are those of five folds.

    Args:
        estimator: A classifier with ``predict_proba``, or a regressor.
        seen: As for :func:`fit_learners`; it sees columns, patches or words.
        labels: As for :func:`fit_learners`; a classifier gets the class of the highest probability.
        task: The task.
    """
    features, transform = next(iter(make_transforms(seen).items()))
    x, y, method = transform(seen), labels.numpy(), "predict"
    if task.has_classes:
        y, method = task.classes(labels).numpy(), "predict_proba"
    elif labels.shape[1] == 1:
        y = y[:, 0]
    largest = int(np.bincount(y).max()) if task.has_classes else 1
    if largest == len(y):  # one sample, or one class
        return _fit_mean(seen, labels, task)
    # Shuffled: samples come in an order that depends on their inputs.
    kind, most = (StratifiedKFold, largest) if largest > 1 else (KFold, len(y))
    folds = kind(min(_FOLDS, most), shuffle=True, random_state=0)
    with _quiet(), _own_random_numbers():
        left_out = cross_val_predict(clone(estimator), x, y, cv=folds, method=method)
        model = clone(estimator).fit(x, y)
    return Learner(type(estimator).__name__, features, transform, model, left_out, labels, task)
