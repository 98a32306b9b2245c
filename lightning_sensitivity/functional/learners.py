"""Two learners that know what they would have predicted of a sample without it, and any other of scikit-learn's."""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity.functional.features import Transform, feature_makers, flat, kind_of, make_rows
from lightning_sensitivity.functional.tasks import Task

Array: TypeAlias = Any  # of NumPy, or a sparse matrix of SciPy
Predict = Callable[[Tensor], Tensor]  # inputs to predictions (M, K)

_PART = 1000  # samples on which the numbers of a learner are chosen
_MIN_SAMPLES = 4  # samples

_SHARE, _OTHER_SHARES, _LEAVES = 0.5, ("sqrt", 1.0), (2, 5, 15, 40)  # of columns tried at a split; samples in a leaf
_TREES_OF_PART, _TREES, _MIN_TREES = 80, 150, 75
_TARGETS_OF_TREES = 15_000_000  # rows times classes times trees, above which there are fewer trees
_MAX_TARGETS, _MAX_CELLS = 500_000, 2_500_000  # rows times classes, and times columns, of a forest
_MIN_ROWS = 2000  # of a forest, unless there are no more

_WIDTHS = (0.1, 0.4, 1.6, 6.4)  # of the kernel, times the median squared distance
_ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_MAX_RIDGE_ROWS = 10_000
_CENTRES_OF_PART, _CENTRES, _MANY_CENTRES = 500, 1000, 2000  # of Nystroem features: of vectors, and of all else
_PAIRS = 500  # samples whose distances give the median
_EQUAL = 1e-12  # relative squared distance of equal samples
_FOLDS = 5


@dataclass
class Learner:
    """A small model, fitted to training samples.

    Attributes:
        name: ``"forest"``, ``"ridge"``, ``"mean"``, or the class of an estimator.
        features: What it sees of the inputs, such as ``"patches"``.
        left_out: What it would have predicted of each sample without it, ``(N, K)``.
        labels: The labels of the same samples, ``(N, K)``.
        predict: Predicts new inputs, ``(M, K)``, as they may be: probabilities from 0 to 1.
        score: The mean squared difference of the two, as the task has it.
    """

    name: str
    features: str
    left_out: Tensor
    labels: Tensor
    predict: Predict
    score: float


def fit_learners(inputs: Tensor, labels: Tensor, task: Task) -> tuple[Learner, Tensor]:
    """Fit what suits the inputs, and return the one whose left-out predictions are best, and the samples that it knows.

    Args:
        inputs: Inputs ``(N, ...)`` of different samples, no larger than ``shrunk`` makes them.
        labels: Their labels as a matrix ``(N, K)``.
        task: The task, which says how predictions are scored.
    """
    rows = spread(len(inputs), _MAX_RIDGE_ROWS)
    if len(inputs) < _MIN_SAMPLES:
        return _mean(labels, task), rows
    with _quiet():
        found = [(_fit_ridge(inputs[rows], labels[rows], task), rows)]
        rows = _rows_for_forest(inputs, labels)
        if len(rows):
            found.append((_fit_forest(inputs[rows], labels[rows], task), rows))
    return min(found, key=lambda each: each[0].score)


def _make(name: str, features: str, left_out: Array, labels: Tensor, predict: Predict, task: Task) -> Learner:
    found = task.clip(torch.from_numpy(np.asarray(left_out, dtype=np.float64)).reshape(len(labels), -1))
    score = float(task.distances(found, labels).mean())
    return Learner(name, features, found, labels, partial(_clipped, predict=predict, task=task), score)


def _clipped(inputs: Tensor, predict: Predict, task: Task) -> Tensor:
    return task.clip(predict(inputs))


def _mean(labels: Tensor, task: Task) -> Learner:
    """Predict the mean label: there are too few samples to learn from."""
    predict = partial(_repeat, row=labels.mean(0))
    return _make("mean", "none", predict(labels), labels, predict, task)


def _repeat(inputs: Tensor, row: Tensor) -> Tensor:
    return row.repeat(len(inputs), 1)


def spread(number: int, most: int) -> Tensor:
    """Return the indices of at most so many evenly spaced samples."""
    return torch.linspace(0, number - 1, min(number, most), dtype=torch.float64).round().long()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep scikit-learn from warning of what we know, and from more threads than torch has: they would wait in vain."""
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        warnings.simplefilter("ignore")
        yield


# A random forest


def _rows_for_forest(inputs: Tensor, labels: Tensor) -> Tensor:
    """Choose the rows that a forest takes; none where it would take too much memory or time, or sees no columns."""
    number, num_columns = len(inputs), inputs[0].numel()
    is_table = kind_of(inputs) == "vectors" or (kind_of(inputs) == "tokens" and int(inputs.max()) < _PART)
    most = min(number, _MAX_TARGETS // labels.shape[1], _MAX_CELLS // num_columns)
    return spread(number, most) if is_table and most >= min(number, _MIN_ROWS) else torch.arange(0)


def _fit_forest(inputs: Tensor, labels: Tensor, task: Task) -> Learner:
    """Fit a random forest, whose left-out predictions are those of the trees that did not draw a sample.

    The regression of one-hot labels is a classification: its squared error is the Gini impurity. The smallest leaf,
    then the share of columns, are chosen by this score on a part.
    """
    x, y = flat(inputs).cpu().double().numpy(), labels.numpy()
    part = spread(len(x), _PART)

    def score(share: Any, leaf: int) -> float:
        return float(np.square(_forest(x[part], y[part], _TREES_OF_PART, share, leaf)[1] - y[part]).mean())

    of_leaves = {leaf: score(_SHARE, leaf) for leaf in _LEAVES}
    leaf = min(of_leaves, key=lambda each: of_leaves[each])
    of_shares = {share: score(share, leaf) for share in _OTHER_SHARES} | {_SHARE: of_leaves[leaf]}
    share = min(of_shares, key=lambda each: of_shares[each])
    trees = min(_TREES, max(_MIN_TREES, _TARGETS_OF_TREES // y.size))
    forest, left_out = _forest(x, y, trees, share, leaf)
    return _make("forest", "columns", left_out, labels, partial(_predict_columns, forest=forest), task)


def _predict_columns(inputs: Tensor, forest: Any) -> Tensor:
    columns = flat(inputs).cpu().double()
    columns = pad(columns, (0, forest.n_features_in_ - columns.shape[1]), value=-1)  # integers may have any length
    return torch.from_numpy(forest.predict(columns.numpy())).reshape(len(inputs), -1)


def _forest(x: Array, y: Array, trees: int, share: Any, leaf: int) -> tuple[Any, Array]:
    """Fit a forest, and return it with its left-out predictions ``(N, K)``."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(
        trees,
        max_features=share,
        min_samples_leaf=leaf,
        oob_score=True,
        random_state=0,
        n_jobs=torch.get_num_threads(),
    )
    forest.fit(x, y if y.shape[1] > 1 else y[:, 0])
    return forest, forest.oob_prediction_.reshape(y.shape)


# Ridge regression on features of a kernel


def _fit_ridge(inputs: Tensor, labels: Tensor, task: Task) -> Learner:
    """Fit ridge regression on Nystroem features; left-out predictions have a closed form."""
    transforms = {name: make(inputs) for name, make in feature_makers(inputs).items()}
    part = spread(len(inputs), _PART)
    found = {name: _choose(make_rows(each, inputs[part]), labels[part]) for name, each in transforms.items()}
    features = min(found, key=lambda name: found[name].score)
    best, transform = found[features], transforms[features]
    place = _ALPHAS.index(best.alpha)
    alphas = _ALPHAS[max(0, place - 1) : place + 2]
    centres = _CENTRES if kind_of(inputs) == "vectors" else _MANY_CENTRES
    model = _KernelRidge(make_rows(transform, inputs), labels.numpy(), best.gamma, alphas, centres)
    predict = partial(_predict_rows, model=model, transform=transform)
    return _make("ridge", features, model.left_out, labels, predict, task)


def _predict_rows(inputs: Tensor, model: Callable[[Array], Array], transform: Transform) -> Tensor:
    return torch.from_numpy(model(make_rows(transform, inputs)))


def _choose(rows: Array, labels: Tensor) -> "_KernelRidge":
    """Choose the width of the kernel and the ridge by the left-out score on a part."""
    from sklearn.metrics import pairwise

    distances = pairwise.euclidean_distances(rows[:: math.ceil(rows.shape[0] / _PAIRS)], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    median = float(np.median(positive)) if len(positive) else 1.0
    found = (_KernelRidge(rows, labels.numpy(), 1 / (width * median), _ALPHAS, _CENTRES_OF_PART) for width in _WIDTHS)
    return min(found, key=lambda each: each.score)


class _KernelRidge:
    """Ridge regression on the Nystroem features of rows, with its left-out predictions ``(N, K)``."""

    def __init__(self, rows: Array, y: Array, gamma: float, alphas: tuple[float, ...], num_centres: int) -> None:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import RidgeCV

        num_centres = min(num_centres, rows.shape[0])
        self.gamma = gamma
        self._features = Nystroem(gamma=gamma, n_components=num_centres, random_state=0)
        # With a scorer, it keeps predictions in place of errors.
        self._ridge = RidgeCV(alphas, scoring="neg_mean_squared_error", store_cv_results=True)
        self._occurs = y.any(0)  # classes that no sample has add nothing
        self._mean = y[:, self._occurs].mean(0)
        self.left_out = np.zeros(y.shape)
        self.alpha = alphas[0]
        if self._occurs.any():
            self._fit(self._features.fit_transform(rows), y[:, self._occurs] - self._mean)
        self.score = float(np.square(self.left_out - y).mean())

    def _fit(self, features: Array, y: Array) -> None:
        self._ridge.fit(features, y)
        self.alpha = float(self._ridge.alpha_)
        place = list(self._ridge.alphas).index(self._ridge.alpha_)
        found = self._ridge.cv_results_[..., place].reshape(y.shape)
        self.left_out[:, self._occurs] = found + self._mean

    def __call__(self, rows: Array) -> Array:
        """Predict rows, ``(M, K)``."""
        found = np.zeros((rows.shape[0], len(self._occurs)))
        if self._occurs.any() and rows.shape[0]:
            residuals = self._ridge.predict(self._features.transform(rows)).reshape(len(found), -1)
            found[:, self._occurs] = residuals + self._mean
        return found


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


def fit_estimator(estimator: Any, inputs: Tensor, labels: Tensor, task: Task) -> Learner:
    """Fit a copy of an estimator; left-out predictions are those of five folds.

    Args:
        estimator: A classifier with ``predict_proba``, or a regressor.
        inputs: As for :func:`fit_learners`; it sees columns, patches or words.
        labels: As for :func:`fit_learners`; a classifier gets the class of the highest probability.
        task: The task.
    """
    from sklearn.base import clone
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

    features, make = next(iter(feature_makers(inputs).items()))
    transform = make(inputs)
    x, y, method = make_rows(transform, inputs), labels.numpy(), "predict"
    if task.has_classes:
        y, method = task.classes(labels).numpy(), "predict_proba"
    elif labels.shape[1] == 1:
        y = y[:, 0]
    largest = int(np.bincount(y).max()) if task.has_classes else 1
    if largest == len(y):  # one sample, or one class
        return _mean(labels, task)
    fitted = _Estimator(clone(estimator), method, labels.shape[1], task)
    # Shuffled: samples come in an order that depends on their inputs.
    kind, most = (StratifiedKFold, largest) if largest > 1 else (KFold, len(y))
    folds = kind(min(_FOLDS, most), shuffle=True, random_state=0)
    with _quiet(), _own_random_numbers():
        left_out = cross_val_predict(fitted.model, x, y, cv=folds, method=method)
        fitted.model.fit(x, y)
    predict = partial(_predict_rows, model=fitted, transform=transform)
    return _make(type(estimator).__name__, features, fitted.as_outputs(left_out), labels, predict, task)


@dataclass
class _Estimator:
    """An estimator, and how to ask it for predictions ``(N, K)``."""

    model: Any
    method: str
    num_outputs: int
    task: Task

    def as_outputs(self, found: Array) -> Array:
        """Give classes their columns, also those that no sample has."""
        if not self.task.has_classes:
            return found.reshape(len(found), -1)
        p = np.zeros((len(found), max(2, self.num_outputs)))
        p[:, self.model.classes_] = found
        return p[:, 1:] if self.task.has_one_output else p

    def __call__(self, rows: Array) -> Array:
        """Predict rows, ``(M, K)``."""
        return self.as_outputs(getattr(self.model, self.method)(rows)).astype(np.float64)
