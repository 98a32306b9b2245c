"""Two learners that know what they would have predicted of a sample without it, and any other of scikit-learn's."""

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.base import clone
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import RidgeCV
from sklearn.metrics import pairwise
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reference.calibration import best_power
from lightning_sensitivity.reference.features import Rows, Seen, SeenTransform, make_transforms, raw_columns, spread

Array: TypeAlias = Any  # of NumPy

_PART = 1000  # samples on which the learner and its numbers are chosen
_MIN_SAMPLES = 4  # samples

_SHARE, _OTHER_SHARES = 0.5, ("sqrt", 1.0)  # of columns tried at a split
_LEAF, _OTHER_LEAVES = 5, (2, 15, 40)  # samples in a leaf
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
        power: The inverse temperature.
        score: The score of the left-out predictions.
    """

    name: str
    features: str
    transform: SeenTransform
    model: Any
    left_out: Tensor
    labels: Tensor
    task: Task
    power: float = 1.0
    score: float = math.nan

    def __post_init__(self) -> None:
        """Calibrate the left-out predictions."""
        self.left_out = self._as_matrix(self.left_out)
        self.power = best_power(self.left_out, self.labels, self.task)
        self.left_out = self.task.sharpen(self.left_out, self.power)
        self.score = float(self.task.distances(self.left_out, self.labels).mean())

    def predict(self, seen: Seen) -> Tensor:
        """Predict new samples, ``(M, C)``."""
        rows = self.transform(seen)
        is_classifier = hasattr(self.model, "classes_")
        found = self._as_matrix(self.model.predict_proba(rows) if is_classifier else self.model.predict(rows))
        return self.task.sharpen(found, self.power)

    def _as_matrix(self, found: Array) -> Tensor:
        """Give classes their columns, also those that no sample has."""
        num_columns = self.labels.shape[1]
        if hasattr(self.model, "classes_"):
            p = np.zeros((len(found), num_columns))
            p[:, self.model.classes_] = found
            found = p
        return self.task.clip(torch.from_numpy(np.asarray(found, dtype=np.float64)).reshape(-1, num_columns))


def fit_learners(seen: Seen, labels: Tensor, task: Task) -> tuple[Learner, Tensor]:
    """Fit what suits the samples, and return the learner whose left-out predictions are best, and what it knows.

    Args:
        seen: What is seen of different samples, no larger than ``shrunk`` makes it.
        labels: Their labels as a matrix ``(N, C)``.
        task: The task, which says how predictions are scored.
    """
    number = len(labels)
    rows = spread(number, _MAX_RIDGE_ROWS)
    if number < _MIN_SAMPLES:
        return _fit_mean(seen, labels, task), rows
    with _quiet():
        found = [(_fit_ridge(_at(seen, rows), labels[rows], task), rows)]
        rows = _rows_for_forest(seen, labels)
        if len(rows):
            found.append((_fit_forest(_at(seen, rows), labels[rows], task), rows))
    return min(found, key=lambda each: each[0].score)


def _at(seen: Seen, rows: Tensor) -> Seen:
    return {kind: values[rows] for kind, values in seen.items()}


def _fit_mean(seen: Seen, labels: Tensor, task: Task) -> Learner:
    """Predict the mean label: there are too few samples to learn from."""
    transform, model = next(iter(make_transforms(seen).values())), DummyRegressor()
    rows = transform(seen)
    return Learner("mean", "none", transform, model, model.fit(rows, labels.numpy()).predict(rows), labels, task)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep scikit-learn from warning of what we know, and from more threads than torch has: they would wait in vain."""
    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        warnings.simplefilter("ignore")
        yield


# A random forest


def _rows_for_forest(seen: Seen, labels: Tensor) -> Tensor:
    """Choose the rows that a forest takes; none where it would take too much memory or time, or sees no columns."""
    number, kind = len(labels), "columns" if "columns" in seen else "tokens"
    is_table = kind in seen and (kind == "columns" or (len(seen) == 1 and int(seen[kind].max()) < _MAX_ID))
    if not is_table:
        return torch.arange(0)
    most = min(number, _MAX_TARGETS // labels.shape[1], _MAX_CELLS // max(1, seen[kind].shape[1]))
    return spread(number, most) if most >= min(number, _MIN_ROWS) else torch.arange(0)


def _fit_forest(seen: Seen, labels: Tensor, task: Task) -> Learner:
    """Fit a random forest, whose left-out predictions are those of the trees that did not draw a sample.

    The regression of one-hot labels is a classification: its squared error is the Gini impurity. The smallest leaf,
    then the share of columns, are chosen by this score on a part.
    """
    transform = raw_columns("columns" if "columns" in seen else "tokens", seen)
    x, y = transform(seen), labels.numpy()
    part = spread(len(x), _PART)

    def score(share: Any, leaf: int) -> float:
        forest = _forest(x[part], y[part], _TREES_OF_PART, share, leaf)
        return float(np.square(forest.oob_prediction_.reshape(y[part].shape) - y[part]).mean())

    of_leaves = {leaf: score(_SHARE, leaf) for leaf in (_LEAF, *_OTHER_LEAVES)}
    leaf = min(of_leaves, key=lambda each: of_leaves[each])
    of_shares = {share: score(share, leaf) for share in _OTHER_SHARES} | {_SHARE: of_leaves[leaf]}
    share = min(of_shares, key=lambda each: of_shares[each])
    trees = min(_TREES, max(_MIN_TREES, _TARGETS_OF_TREES // y.size))
    forest = _forest(x, y, trees, share, leaf)
    return Learner("forest", "columns", transform, forest, forest.oob_prediction_, labels, task)


def _forest(x: Array, y: Array, trees: int, share: Any, leaf: int) -> Any:
    """Fit a forest, which knows its left-out predictions."""
    options = {"min_samples_leaf": leaf, "oob_score": True, "random_state": 0, "n_jobs": torch.get_num_threads()}
    return RandomForestRegressor(trees, max_features=share, **options).fit(x, y if y.shape[1] > 1 else y[:, 0])


# Ridge regression on features of a kernel


def _fit_ridge(seen: Seen, labels: Tensor, task: Task) -> Learner:
    """Fit ridge regression on Nystroem features; the features, then the ridge, are chosen by left-out predictions."""
    transforms = make_transforms(seen)
    part, y = spread(len(labels), _PART), labels.numpy()
    found = []
    for name, transform in transforms.items():
        rows = transform(_at(seen, part))
        for width in _WIDTHS:
            gamma = 1 / (width * _median_distance(rows))
            model = _ridge(rows, y[part], gamma, _ALPHAS, _CENTRES_OF_PART)
            error = np.square(_left_out(model, y[part]) - y[part]).mean()
            found.append((error, name, gamma, _ALPHAS.index(model[-1].alpha_)))
    _, features, gamma, place = min(found)
    centres = _CENTRES if [*seen] == ["columns"] else _MANY_CENTRES
    rows = transforms[features](seen)
    model = _ridge(rows, y, gamma, _ALPHAS[max(0, place - 1) : place + 2], centres)
    return Learner("ridge", features, transforms[features], model, _left_out(model, y), labels, task)


def _median_distance(rows: Rows) -> float:
    """Return the median of squared distances of different samples."""
    distances = pairwise.euclidean_distances(rows[:: math.ceil(rows.shape[0] / _PAIRS)], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    return float(np.median(positive)) if len(positive) else 1.0


def _ridge(rows: Rows, y: Array, gamma: float, alphas: tuple[float, ...], num_centres: int) -> Any:
    """Fit a pipeline of Nystroem features and ridge regression."""
    features = Nystroem(gamma=gamma, n_components=min(num_centres, rows.shape[0]), random_state=0)
    # With a scorer, it keeps predictions in place of errors.
    return make_pipeline(features, RidgeCV(alphas, scoring="neg_mean_squared_error", store_cv_results=True)).fit(
        rows, y
    )


def _left_out(model: Any, y: Array) -> Array:
    """Return what the pipeline would have predicted of each sample without it, which has a closed form."""
    return model[-1].cv_results_[..., list(model[-1].alphas).index(model[-1].alpha_)].reshape(y.shape)


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
