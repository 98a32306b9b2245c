"""Any estimator of scikit-learn as a reference; samples are left out by parts."""

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reference.blocks import Matrix
from lightning_sensitivity.reference.features import Features
from lightning_sensitivity.reference.kinds import Array, possible_blocks
from lightning_sensitivity.reference.learners import FOLDS, Learner, check_groups, folds_of, quiet
from lightning_sensitivity.reference.observations import Observations
from lightning_sensitivity.reference.unknown import FEWEST, ByColumns, Folds, column_means, have_several, within


def fit_estimator(estimator: BaseEstimator, known: Observations, task: Task) -> tuple[Learner, Tensor]:
    """Fit a copy of an estimator; left-out predictions are those of five folds, of whole groups if there are any.

    Args:
        estimator: A classifier with ``predict_proba``, or a regressor. Where its random state is None, it is
            0.
        known: As for :func:`fit_learners`. It sees columns, patches or words; a classifier gets the class of the
            highest probability.
        task: The task.
    """
    features = Features(possible_blocks(known.seen)[0], known.seen)
    matrix, labels = features(known.seen), task.hard_labels(known.labels).numpy()
    model = clone(estimator)
    unset = [name for name, value in model.get_params().items() if value is None]
    model.set_params(**{name: 0 for name in unset if name.endswith("random_state")})
    check_groups(known)
    fit = _fit_by_columns if task.is_by_column or known.labels.isnan().any() else _fit_folds
    with quiet():
        model, left_out = fit(model, matrix, labels, task, folds_of(known))
    learner = Learner(type(estimator).__name__, features, model, left_out, known, task)
    return learner, torch.arange(len(known))


def _fit_folds(
    model: BaseEstimator, matrix: Matrix, labels: Array, task: Task, folds: Folds, number: int = FOLDS
) -> tuple[BaseEstimator, Array]:
    """Fit a model, and predict each fold without it; by default there are some folds of single samples."""
    labels = labels.squeeze()
    is_stratified = task.estimator_type == "classifier" and max(np.bincount(labels)) >= number
    kind = StratifiedKFold if is_stratified else KFold
    # Shuffled: samples come in an order that depends on their inputs.
    cv = folds or kind(min(number, len(labels)), shuffle=True, random_state=0)
    left_out = cross_val_predict(model, matrix, labels, cv=cv, method=task.estimator_method)
    return model.fit(matrix, labels), left_out


def _fit_by_columns(
    model: BaseEstimator, matrix: Matrix, labels: Array, task: Task, folds: Folds
) -> tuple[ByColumns, Array]:
    """Fit a copy of a model to the known labels of each column that has several values, and predict folds of it."""
    found, left_out = ByColumns(column_means(labels)), np.full_like(labels, np.nan)
    for column, known in enumerate(~np.isnan(labels.T)):
        samples = known.nonzero()[0]
        own, own_folds, number = labels[samples, column], within(folds, samples, len(labels)), FOLDS
        if task.estimator_type == "classifier":
            own = own.astype(int)
            counts = np.unique(own, return_counts=True)[1]
            number = min(FOLDS, counts.min(initial=FOLDS))  # of a class that occurs once, no fold could know anything
        if len(samples) >= FEWEST and number > 1 and have_several(own, own_folds):
            one, predicted = _fit_folds(clone(model), matrix[samples], own, task, own_folds, number)
            left_out[samples, column] = predicted.reshape(len(samples), -1)[:, -1]
            found.add(np.array([column]), one)
    return found, found.filled(left_out, matrix)
