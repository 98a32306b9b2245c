"""Learners that know what they would have predicted of a sample without it: two of ours, and any of scikit-learn."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.sparse import hstack, issparse
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reference.blocks import SOME, Block, Matrix, columns, some, spread
from lightning_sensitivity.reference.calibration import Calibration, MeanLabel, calibrate
from lightning_sensitivity.reference.kinds import KINDS, MAX_FOREST_COLUMNS, MOST, Array, Seen, possible_blocks
from lightning_sensitivity.reference.observations import Observations, count_groups
from lightning_sensitivity.reference.unknown import ByColumns, Folds, KnownTargets, same_samples

Model: TypeAlias = Callable[[Matrix], Array]  # predicts labels, (M, C), of the matrix that features make

_EQUAL = 1e-12  # relative squared distance of equal rows
_PART = 1000  # samples on which a learner is chosen

_MAX_ID = 1000  # below, token ids may be the categories of a table
_LEAF, _OTHER_LEAVES = 5, (2, 15, 40)  # samples in a leaf
_FEW_COLUMNS, _MAX_COLUMNS = 30, 100  # tried at a split: at first, and at most
_TREES_OF_PART, _TREES, _MIN_TREES = 80, 150, 75
_MAX_WORK = 160_000_000  # rows times classes times columns tried times trees; above, there are fewer trees
_MAX_TARGETS, _MAX_CELLS = 500_000, 2_500_000  # rows times classes, and times columns, of a forest
_MIN_ROWS = _MAX_CELLS // MAX_FOREST_COLUMNS  # 2,000 of a forest, unless there are no more
# Scores of a forest on the part, over that of ridge regression. On 32 design tables (every third of each list,
# 73 pairs of a table and a size from 400 to 12,000 rows) no forest whose first try was above 1.04 was better in
# the end; and of those within 2 % most were better on all rows, of which a forest makes more. Lost: 0.2 % of the
# score of chance.
_NEAR, _GAIN = 1.1, 1.02  # up to which its search begins; up to which it wins if there are more samples

_WIDTHS = (0.1, 0.4, 1.6, 6.4)  # of the kernel, times the median squared distance
_ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_CENTRES_OF_PART, _CENTRES, _MANY_CENTRES = 500, 1000, 1500  # of Nystroem features: columns, and all else
FOLDS = 5  # where samples are left out by parts


class Features:
    """What makes a matrix of samples: a block for each kind, side by side, scaled so that none drowns the others.

    Args:
        blocks: A block for each kind: ``columns``, ``values``, ``patches`` or ``words``.
        seen: Training samples, no larger than ``shrunk`` makes them.

    Attributes:
        name: The names of the blocks.
        shapes: The shape of the samples of each kind.
    """

    def __init__(self, blocks: dict[str, Block], seen: Seen) -> None:
        self.name = " and ".join(block.__name__ for block in blocks.values())
        self.shapes = {kind: x.shape for kind, x in seen.items()}
        self._transforms = {kind: block(seen[kind]) for kind, block in blocks.items()}
        self._scales = dict.fromkeys(blocks, 1.0)
        if len(blocks) > 1:
            for kind, transform in self._transforms.items():
                self._scales[kind] = math.sqrt(_median_distance(transform(some(seen[kind]))))

    def __call__(self, seen: Seen) -> Matrix:
        """Return the matrix of samples, of any size."""
        fitted = {kind: KINDS[kind].fitted(seen[kind], shape) for kind, shape in self.shapes.items()}
        matrices = [transform(fitted[kind]) / self._scales[kind] for kind, transform in self._transforms.items()]
        if len(matrices) == 1:
            return matrices[0]
        return hstack(matrices, format="csr") if any(map(issparse, matrices)) else np.hstack(matrices)

    def check(self, seen: Seen) -> None:
        """Raise ValueError if samples lack a kind, or have other dimensions, columns or channels."""
        for kind, shape in self.shapes.items():
            given = seen.get(kind, torch.empty(0)).shape
            fixed = slice(1, KINDS[kind].num_fixed)
            if len(given) != len(shape) or given[fixed] != shape[fixed]:
                got = ", ".join(f"{kind} of shape {tuple(each.shape)}" for kind, each in seen.items())
                sizes = f"X has {given[1:].numel()} features, but Reference is expecting {shape[1:].numel()} features"
                wanted = ", ".join(map(str, shape[1:]))
                raise ValueError(f"{sizes} as input: `x` has to have {kind} (M, {wanted}), but got {got}.")


def _median_distance(matrix: Matrix) -> float:
    """Return the median of squared distances of different rows, of at most 500."""
    distances = euclidean_distances(matrix[spread(matrix.shape[0], SOME).numpy()], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    return float(np.median(positive)) if len(positive) else 1.0


class Learner:
    """A small model, fitted to training samples, and calibrated.

    Args:
        name: ``"forest"``, ``"ridge"``, or the class of an estimator.
        features: What it sees of the samples.
        predict: Its model.
        left_out: What it would have predicted of each sample without it, or without its group.
        samples: The samples.
        task: The task.

    Attributes:
        labels: The labels of the samples, ``(N, C)``.
        groups: The number of the group of each, ``(N,)``; None without groups.
        calibration: What its predictions need.
        left_out: The left-out predictions, calibrated, ``(N, C)``.
        tempered: The same, calibrated by a temperature alone.
    """

    def __init__(
        self, name: str, features: Features, predict: Model, left_out: Array, samples: Observations, task: Task
    ) -> None:
        self.name = name
        self.features = features
        self.labels = samples.labels
        self.groups = samples.groups
        self._predict = predict
        p = torch.from_numpy(left_out).reshape(self.labels.shape)
        calibration = calibrate(p, samples.labels, task, samples.groups)
        self.calibration: Calibration | MeanLabel = calibration
        self.left_out = calibration(p)
        self.tempered = Calibration(task, calibration.temperatures)(p)

    def forget(self) -> None:
        """Predict the mean label of every sample, since no more is known."""
        self.calibration = MeanLabel(self.labels.nanmean(0).nan_to_num(0.5))
        self.left_out = self.calibration(self.left_out)

    def predict(self, seen: Seen) -> Tensor:
        """Predict new samples, ``(M, C)``."""
        p = torch.from_numpy(self._predict(self.features(seen)))
        return self.calibration(p.reshape(len(p), -1))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep scikit-learn from warning of what we know, and from more threads than torch has.

    Decompositions get one: their threads wait for each other, and take 30 times as long if cores are shared.
    """
    with warnings.catch_warnings(), threadpool_limits({"openmp": torch.get_num_threads(), "blas": 1}):
        warnings.simplefilter("ignore")
        yield


# The better one of both


class _Choice(NamedTuple):
    """A learner that was tried on a part of the samples.

    Attributes:
        score: Its left-out score there.
        name: Its name.
        blocks: What it sees; see :class:`Features`.
        fit: Fits it to a matrix and targets, by folds, and returns a model and left-out predictions.
    """

    score: float
    name: str
    blocks: dict[str, Block]
    fit: Callable[[Matrix, Array, Folds], tuple[Any, Array]]


def _folds_of(samples: Observations, are_all: bool = False) -> Folds:
    """Return at most five folds that leave out whole groups; None without groups.

    Of a part of a single group there are none, either; if these are all samples, ValueError is raised.
    """
    if samples.groups is None:
        return None
    if (number := count_groups(samples.groups, 0)) > 1:
        return list(GroupKFold(min(FOLDS, number)).split(samples.groups, groups=samples.groups.numpy()))
    if are_all:
        raise ValueError("Expected samples of two or more groups, but all are of one: leave `groups` out.")
    return None


def fit_learners(samples: Observations, task: Task) -> tuple[Learner, Tensor]:
    """Choose what suits the samples on a part of them, and fit it to all that it can take.

    Args:
        samples: Different samples, no larger than ``shrunk`` makes them, with a matrix of labels, ``(N, C)``. Where
            they have groups, whole groups are left out.
        task: The task, which says how predictions are scored.

    Returns:
        The learner, and which of the samples it knows.
    """
    part = samples.take(spread(len(samples), _PART))
    with quiet():
        best, most, of_forest = _choose_ridge(part, task), MOST, _most_of_forest(samples)
        if of_forest:
            forest = _choose_forest(part, task, limit=_NEAR * best.score)
            limit = best.score * (_GAIN if len(samples) > _PART else 1)
            best, most = (forest, of_forest) if forest.score < limit else (best, most)
        indices = spread(len(samples), most)
        samples = samples.take(indices)
        features = Features(best.blocks, samples.seen)
        model, left_out = best.fit(features(samples.seen), samples.labels.numpy(), _folds_of(samples, are_all=True))
    return Learner(best.name, features, model.predict, left_out, samples, task), indices


def _score(left_out: Array, samples: Observations, task: Task) -> float:
    p = torch.from_numpy(left_out).reshape(samples.labels.shape)
    return float(task.distances(calibrate(p, samples.labels, task, samples.groups)(p), samples.labels).nanmean())


# A random forest


def _blocks_of_forest(seen: Seen) -> dict[str, Block]:
    """Return what a forest sees: columns, or token ids that may be categories."""
    if "columns" in seen:
        return {"columns": columns}
    is_table = [*seen] == ["tokens"] and int(seen["tokens"].max()) < _MAX_ID
    return {"tokens": columns} if is_table else {}


def _most_of_forest(samples: Observations) -> int:
    """Return how many samples a forest takes; 0 where it would take too long, or sees no columns."""
    num_columns = sum(samples.seen[kind].shape[1] for kind in _blocks_of_forest(samples.seen))
    most = min(len(samples), _MAX_TARGETS // samples.labels.shape[1], _MAX_CELLS // max(1, num_columns))
    return most if num_columns and most >= min(len(samples), _MIN_ROWS) else 0


def _choose_forest(part: Observations, task: Task, limit: float) -> _Choice:
    """Try leaves of several sizes, then several numbers of columns at a split.

    Of many columns, which take long, there is no more than a first try if that is above the limit.
    """
    blocks, y, folds = _blocks_of_forest(part.seen), KnownTargets(part.labels.numpy()), _folds_of(part)
    matrix = Features(blocks, part.seen)(part.seen)

    def score(num_columns: int, leaf: int) -> float:
        forest = _forest(y.targets, num_columns, leaf, _TREES_OF_PART)
        return _score(_leave_out(forest, matrix, y, folds), part, task)

    total = matrix.shape[1]
    half = max(1, total // 2)
    few = min(half, _FEW_COLUMNS)
    scores = {(few, _LEAF): score(few, _LEAF)}
    if few == half or scores[few, _LEAF] <= limit:
        scores |= {(few, leaf): score(few, leaf) for leaf in _OTHER_LEAVES}
        leaf = min(scores, key=lambda each: scores[each])[1]
        sizes = {min(size, _MAX_COLUMNS) for size in (math.isqrt(total), half, total)} - {few}
        scores |= {(size, leaf): score(size, leaf) for size in sorted(sizes)}
    best = min(scores, key=lambda each: scores[each])
    return _Choice(scores[best], "forest", blocks, partial(_fit_forest, num_columns=best[0], leaf=best[1]))


def _forest(y: Array, num_columns: int, leaf: int, trees: int) -> RandomForestRegressor:
    """Make a forest. The regression of one-hot labels is a classification: its squared error is the Gini impurity."""
    trees = min(trees, max(_MIN_TREES, _MAX_WORK // (y.size * num_columns)))
    options = {"max_features": num_columns, "min_samples_leaf": leaf, "random_state": 0}
    return RandomForestRegressor(trees, n_jobs=torch.get_num_threads(), **options)


def _leave_out(forest: RandomForestRegressor, matrix: Matrix, model: KnownTargets, folds: Folds) -> Array:
    """Predict samples by the trees that did not draw them, or by half as many trees of the other folds."""
    targets = model.targets.squeeze()
    if folds is None:
        return model.labels(forest.set_params(oob_score=True).fit(matrix, targets).oob_prediction_)
    few = clone(forest).set_params(n_estimators=forest.n_estimators // 2)
    return model.labels(cross_val_predict(few, matrix, targets, cv=folds))


def _fit_forest(matrix: Matrix, y: Array, folds: Folds, *, num_columns: int, leaf: int) -> tuple[Any, Array]:
    """Fit a forest, and predict the samples that it leaves out."""
    model = KnownTargets(y)
    model.forest = _forest(model.targets, num_columns, leaf, _TREES)
    left_out = _leave_out(model.forest, matrix, model, folds)
    if folds is not None:
        model.forest.fit(matrix, model.targets.squeeze())
    return model, left_out


# Ridge regression on features of a kernel


def _choose_ridge(part: Observations, task: Task) -> _Choice:
    """Try all features, with several widths of the kernel."""
    y, folds, choices = part.labels.numpy(), _folds_of(part), []
    centres = _CENTRES if [*part.seen] == ["columns"] else _MANY_CENTRES
    for blocks in possible_blocks(part.seen):
        matrix = Features(blocks, part.seen)(part.seen)
        distance = _median_distance(matrix)
        for width in _WIDTHS:
            fit = partial(_fit_ridge, gamma=1 / (width * distance), centres=centres)
            score = _score(fit(matrix, y, folds, centres=_CENTRES_OF_PART)[1], part, task)
            choices.append(_Choice(score, "ridge", blocks, fit))
    return min(choices, key=lambda each: each.score)


def _fit_ridge(matrix: Matrix, y: Array, folds: Folds, *, gamma: float, centres: int) -> tuple[Any, Array]:
    """Fit ridge regression on Nystroem features; the ridge is chosen by left-out predictions."""
    kernel = Nystroem(gamma=gamma, n_components=min(centres, len(y)), random_state=0).set_output(transform="default")
    features = kernel.fit_transform(matrix)
    groups = same_samples(y, folds)
    left_out = np.full((len(_ALPHAS), *y.shape), np.nan)
    for samples, which, own_folds in groups:
        places = np.ix_(samples, which)
        leave_out = _leave_one_out if own_folds is None else partial(_leave_folds_out, folds=own_folds)
        left_out[:, samples[:, None], which] = leave_out(features[samples], y[places])
    best = min(range(len(_ALPHAS)), key=lambda place: float(np.nanmean(np.square(left_out[place] - y))))
    model = ByColumns(y)
    for samples, which, _ in groups:
        ridge = Ridge(_ALPHAS[best]).fit(features[samples], y[np.ix_(samples, which)])
        model.parts.append((which, make_pipeline(kernel, ridge)))
    return model, model.filled(left_out[best], matrix)


def _leave_one_out(features: Array, y: Array) -> list[Array]:
    """Return what ridge regression would predict of each sample without it, in closed form, for each ridge."""
    x, targets = features - features.mean(0), y - y.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    basis = x @ vectors
    products, squares = basis.T @ targets, basis**2
    left_out = []
    for alpha in _ALPHAS:
        weights = 1 / (values.clip(0) + alpha)
        residuals = targets - basis @ (weights[:, None] * products)
        left_out.append(y - residuals / (1 - 1 / len(y) - squares @ weights)[:, None])
    return left_out


def _leave_folds_out(features: Array, y: Array, folds: list[tuple[Array, Array]]) -> list[Array]:
    """Return what ridge regression would predict of each fold without it, for each ridge."""
    left_out = [np.tile(y.mean(0), (len(y), 1)) for _ in _ALPHAS]
    for known, new in folds:
        mean, mean_label = features[known].mean(0), y[known].mean(0)
        x = features[known] - mean
        values, vectors = np.linalg.eigh(x.T @ x)
        products, basis = vectors.T @ (x.T @ (y[known] - mean_label)), (features[new] - mean) @ vectors
        for alpha, of_alpha in zip(_ALPHAS, left_out, strict=True):
            of_alpha[new] = mean_label + basis @ (products / (values.clip(0) + alpha)[:, None])
    return left_out


# Any estimator of scikit-learn


def fit_estimator(estimator: BaseEstimator, samples: Observations, task: Task) -> tuple[Learner, Tensor]:
    """Fit a copy of an estimator; left-out predictions are those of five folds, of whole groups if there are any.

    Args:
        estimator: A classifier with ``predict_proba``, or a regressor. Where its random state is None, it is
            0.
        samples: As for :func:`fit_learners`. It sees columns, patches or words; a classifier gets the class of the
            highest probability, or all labels.
        task: The task.

    Raises:
        ValueError: If some of several labels are unknown, or the estimator raises an error.
    """
    name = type(estimator).__name__
    if samples.labels.isnan().any():
        raise ValueError(f"{name} needs all labels of a sample, but some are unknown.")
    features = Features(possible_blocks(samples.seen)[0], samples.seen)
    matrix, labels = features(samples.seen), task.hard_labels(samples.labels).numpy()
    labels = labels.squeeze() if task.is_regression else labels
    model = clone(estimator)
    unset = [key for key, value in model.get_params().items() if value is None]
    model.set_params(**{key: 0 for key in unset if key.endswith("random_state")})
    has_one_class = labels.ndim == 1 and not task.is_regression
    is_stratified = has_one_class and max(np.bincount(labels)) >= FOLDS
    kind = StratifiedKFold if is_stratified else KFold
    # Shuffled: samples come in an order that depends on their inputs.
    folds = kind(min(FOLDS, len(labels)), shuffle=True, random_state=0).split(labels, labels)
    left_out = np.empty(samples.labels.shape)
    predict = partial(_predict, task=task, num_columns=left_out.shape[1])
    with quiet():
        try:
            for known, new in _folds_of(samples, are_all=True) or folds:
                left_out[new] = predict(matrix[new], clone(model).fit(matrix[known], labels[known]))
            model.fit(matrix, labels)
        except Exception as error:
            raise ValueError(f"{name} can't be fitted: {error}") from error
    return Learner(name, features, partial(predict, model=model), left_out, samples, task), torch.arange(len(samples))


def _predict(matrix: Matrix, model: Any, task: Task, num_columns: int) -> Array:
    """Predict labels, ``(M, C)``: 0 of a class without a sample, and of several labels the probability of yes."""
    p = getattr(model, task.estimator_method)(matrix)
    if isinstance(p, list):  # of both answers to each label, or of the only one that there was
        p = np.stack([each @ classes for each, classes in zip(p, model.classes_, strict=True)], 1)
    elif task.is_by_column and num_columns == 1:
        p = p @ model.classes_
    elif not task.is_by_column and not task.is_regression:
        p = p @ np.eye(num_columns)[model.classes_]
    return np.asarray(p, dtype=float).reshape(matrix.shape[0], num_columns)
