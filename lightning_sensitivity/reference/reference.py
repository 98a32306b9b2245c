"""A reference: the best small model of the training labels, which never sees the network."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import ClassifierTags, RegressorTags, check_consistent_length
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task, find_task
from lightning_sensitivity.reference.calibration import error_quantiles, judge, measure_quality
from lightning_sensitivity.reference.kinds import MAX_FOREST_COLUMNS, Array, Samples, rows_of, shrunk
from lightning_sensitivity.reference.learners import Learner, fit_estimator, fit_learners
from lightning_sensitivity.reference.observations import Observations, choose_different, group_numbers
from lightning_sensitivity.reference.validation import read_labels, read_samples

_FEWEST = 4
_CHUNK = 10_000  # samples that are predicted at a time
_LEAST_SKILL = 0.02  # up to it, a reference is blind, unless it sees all inputs as columns
_FEW_SAMPLES = 250  # up to which it needs more, as chance makes more


class Reference(BaseEstimator):  # type: ignore[misc]
    r"""The best small model of training labels, and what it predicts of each label that it has not seen.

    The learner with the lower left-out score is fitted:

    - a **random forest** (Breiman, 2001) of columns, whose trees leave out what they did not draw;
    - **ridge regression on Nyström features** (Williams and Seeger, 2001) of columns, random patches (Coates and
      Ng, 2011) or words, which leaves one sample out in closed form.

    Probabilities are calibrated by a temperature (Guo et al., 2017); what that leaves too sure is smoothed. A
    sample that comes repeatedly counts once, except in a table of few categories. With ``groups``, both leave whole
    groups out.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        estimator: An estimator of scikit-learn in place of both, with ``predict_proba`` unless in a
            regression; it leaves samples out in five folds.

    Attributes:
        classes_: What the columns of predictions stand for, ``(C,)``.
        n_features_in_: How many numbers a sample has.
        feature_names_in_: The columns of a data frame.
        left_out_: Predictions for each training sample without it, ``(N, C)``.
        labels_: Their labels, ``(N, C)``.
        rows_: Which samples they are, ``(N,)``.
        groups_: The number of the group of each, ``(N,)``; None without groups.
        score_: The Brier score of ``left_out_``, or the mean squared error.
        skill_: How much lower it is than that of the mean label, up to 1.
        blind_labels_: Which of several labels it can't predict, ``(B,)``; the other attributes are means without them.
        accuracy_: The share of labels that ``left_out_`` hits, or nan.
        auroc_: Its area under the ROC curve, mean over classes, or nan.
        majority_: That of the most frequent class, or nan.
        inputs_tell_nothing_: Whether neither score nor order of the better learner beats chance, though a table has 60
            or more labels, or groups; then the mean label is predicted.
        unexplained_: The share of labels that can't be explained, or nan.
        temperature_: What logarithms of probabilities were divided by.
        smoothing_: The share of a prediction that is spread over classes, as labels are.
        learner_: ``"forest"``, ``"ridge"``, or the class of your estimator.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import Reference
        >>> x = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] > 0.5).long()
        >>> Reference().fit(x, labels).accuracy_ > 0.95
        True
    """

    def __init__(self, task: str = "multiclass", estimator: Any = None) -> None:
        self.task = task
        self.estimator = estimator

    def __sklearn_tags__(self) -> Any:
        """Say what it is."""
        is_regression = find_task(self.task).is_regression
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = is_regression
        tags.estimator_type = "regressor" if is_regression else "classifier"
        tags.regressor_tags = RegressorTags() if is_regression else None
        tags.classifier_tags = None if is_regression else ClassifierTags()
        return tags

    def fit(self, x: Samples, y: Array, groups: Array = None) -> "Reference":
        """Fit a small model to training labels, and predict each of them without it.

        Args:
            x: Training samples, as tensor, array, data frame or list. Floating ``(N, D)`` and data frames are
                columns, of which 4,096 evenly spaced ones are seen; images ``(N, C, H, W)`` and signals
                ``(N, C, L)`` are averaged if large; integers ``(N, L)`` are token ids, negative ones padding.
                A mapping of kinds (``"columns"``, ``"images"``, ``"signals"``, ``"tokens"``) to these is seen
                side by side.
            y: Their labels, which may be noisy: for ``"multiclass"`` integers or names of classes ``(N,)``,
                or one-hot or soft labels ``(N, K)``; for ``"binary"`` from 0 to 1, ``(N,)`` or ``(N, 1)``;
                for ``"multilabel"`` from 0 to 1, ``(N, L)``, each label by itself; for ``"regression"`` any
                numbers, ``(N,)`` or ``(N, D)``. What is -100, or nan for several labels or in a regression, is
                unknown, except that -100 is a number in a regression.
            groups: What samples of one group share, such as the patient, if new samples are of other ones: numbers
                or strings ``(N,)``. Whole groups are then left out, in five folds.

        Returns:
            The reference itself.

        Raises:
            ValueError: If shapes do not fit, there are fewer than four different samples, inputs are nan or
                inf, labels do not fit the task, or all samples are of one group.
        """
        task = find_task(self.task)
        seen = read_samples(x)
        validate_data(self, _frame(x), y, skip_check_array=True, ensure_2d=False)  # names of columns
        labels, classes = read_labels(y, task)
        task.check_learnable(labels)
        samples = Observations(seen, labels, None if groups is None else group_numbers(groups))
        check_consistent_length(*seen.values(), labels, samples.groups)
        indices, known = choose_different(samples, len(classes), task)
        if len(known) < _FEWEST:
            raise ValueError(f"Expected {_FEWEST} or more different samples with labels, but got {len(known)} samples.")
        known.seen = shrunk(known.seen)
        fit = fit_learners if self.estimator is None else partial(fit_estimator, self.estimator)
        learner, chosen = fit(known, task)
        self.classes_ = classes
        self._describe(learner, indices[chosen], task)
        return self

    def _describe(self, learner: Learner, indices: Tensor, task: Task) -> None:
        """Set what is known of the learner, and of the samples that it knows."""
        y, groups = learner.labels, learner.groups
        self._learner = learner
        self.n_features_in_ = sum(math.prod(shape[1:]) for shape in learner.features.shapes.values())
        # Of the rows of a table a forest and ridge regression were both tried.
        is_table = self.estimator is None and self.kind_ == "columns" and self.n_features_in_ <= MAX_FOREST_COLUMNS
        evidence = judge(learner.left_out, y, groups, task)
        self._is_clear_table = is_table and any(each.is_clear for each in evidence)
        self.inputs_tell_nothing_ = self._is_clear_table and all(each.is_nothing for each in evidence)
        are_blind = [not each.is_clear if self.inputs_tell_nothing_ else each.is_blind for each in evidence]
        blind = [label for label, is_blind in enumerate(are_blind) if task.is_by_column and is_blind]
        if self.inputs_tell_nothing_:
            learner.forget()
        self.learner_ = learner.name
        self.left_out_, self.labels_, self.rows_ = learner.left_out.numpy(), y.numpy(), indices.numpy()
        self.groups_ = None if groups is None else groups.numpy()
        self.temperature_, self.smoothing_ = 1 / learner.calibration.power, learner.calibration.smoothing
        quality = measure_quality(learner.left_out, learner.tempered, y, task, blind)
        self.score_, self.skill_, self.accuracy_, self.majority_, self.unexplained_, self.auroc_ = quality
        self.blind_labels_ = np.array(blind, dtype=int)

    @property
    def num_samples_(self) -> int:
        """How many samples it knows."""
        return len(self.labels_)

    @property
    def shares_(self) -> Array:
        """The mean label, ``(C,)``."""
        return torch.from_numpy(self.labels_).nanmean(0).numpy()

    @property
    def kind_(self) -> str:
        """The kinds of its inputs: ``"columns"``, ``"images"``, ``"signals"``, ``"tokens"``, or several."""
        return ", ".join(self._learner.features.shapes)

    @property
    def features_(self) -> str:
        """What it sees of samples, such as ``"columns"`` or ``"columns and words"``."""
        return self._learner.features.name

    @property
    def residuals_(self) -> Array:
        """Quantiles of left-out errors in a regression, with their mean square, ``(20, C)``; else none."""
        errors = self.labels_ - self.left_out_
        return error_quantiles(errors) if find_task(self.task).is_regression else errors[:0]

    @property
    def is_trusted_(self) -> bool:
        """Whether it sees enough to choose by, if its samples are all that a network sees."""
        return self.may_choose()

    def may_choose(self, sees_all: bool = True) -> bool:
        """Return whether it sees enough to choose an epoch or a model by; else a network may know more.

        Of columns it sees all there is, so that any skill will do, and from 60 labels on even none; else it needs more
        than 0.02, and of fewer than 250 samples N more than 5 / N.

        Args:
            sees_all: Whether the samples that it was fitted to are all that the network sees.
        """
        if sees_all and self.kind_ == "columns":
            return self.skill_ > 0 or self._is_clear_table
        return self.skill_ > _LEAST_SKILL * max(1, _FEW_SAMPLES / self.num_samples_)

    def __str__(self) -> str:
        """Say what it is, and how good."""
        if not hasattr(self, "skill_"):
            return repr(self)
        what = f"{self.learner_} on {self.features_}, {self.num_samples_} samples"
        return f"Reference({what}, skill {self.skill_:.2f})"

    @available_if(lambda self: not find_task(self.task).is_regression)  # type: ignore[untyped-decorator]
    def predict_proba(self, x: Samples) -> Array:
        """Predict the probabilities of all classes, or of each label, ``(M, C)``; two columns for ``"binary"``.

        Args:
            x: Samples as those that it was fitted to, ``(M, ...)``; images may have any size.

        Raises:
            ValueError: If samples are of another kind, or nan or inf.
        """
        return self.predict_matrix(x)

    def predict(self, x: Samples) -> Array:
        """Predict classes, ``(M,)``, several labels, ``(M, L)``, or targets, ``(M,)`` or ``(M, D)``.

        Args:
            x: As for :meth:`predict_proba`.

        Raises:
            ValueError: As by :meth:`predict_proba`.
        """
        return find_task(self.task).answers(torch.from_numpy(self.predict_matrix(x)), self.classes_)

    def score(self, x: Samples, y: Array) -> float:
        """Return the accuracy on all known labels; in a regression R2, the mean over targets.

        Args:
            x: As for :meth:`predict_proba`.
            y: Labels as for :meth:`fit`; of soft ones, the most likely class counts.
        """
        task, predicted = find_task(self.task), self.predict(x)
        labels, classes = read_labels(y, task)
        is_known = task.known(labels).numpy()
        answers = task.answers(task.label_matrix(labels, len(classes)), classes)
        answers, predicted = answers.reshape(is_known.shape), predicted.reshape(is_known.shape)
        if not task.is_regression:
            return float(accuracy_score(answers[is_known], predicted[is_known]))
        columns = zip(answers.T, predicted.T, is_known.T, strict=True)
        return float(np.mean([r2_score(target[rows], guess[rows]) for target, guess, rows in columns]))

    def predict_matrix(self, x: Samples) -> Array:
        """Predict what a network does after softmax or sigmoid, or the targets of a regression, ``(M, C)``.

        Args:
            x: As for :meth:`predict_proba`.

        Raises:
            ValueError: As by :meth:`predict_proba`.
        """
        check_is_fitted(self, "classes_")
        features = self._learner.features
        kind = self.kind_ if len(features.shapes) == 1 else ""
        seen = read_samples(x, kind)
        validate_data(self, _frame(x), reset=False, skip_check_array=True, ensure_2d=False)
        features.check(seen)
        starts = range(0, len(next(iter(seen.values()))), _CHUNK)
        parts = [rows_of(seen, slice(start, start + _CHUNK)) for start in starts]
        return np.concatenate([self._learner.predict(shrunk(part)).numpy() for part in parts])


def _frame(x: Samples) -> Any:
    """Return what may have names of columns."""
    return x.get("columns") if isinstance(x, Mapping) else x


def label_noise(x: Samples, y: Array, task: str = "multiclass", groups: Array = None) -> float:
    r"""Estimate the share of labels that can't be explained: wrong, or not to be known from the inputs.

    It fits a :class:`~lightning_sensitivity.Reference`, and compares labels with its left-out predictions q. It takes
    labels as redrawn at random among the K classes that occur, with a chance r, and else from q after these were
    sharpened by b around the shares s of the classes:

    .. math::
        L(r, b) = \prod_i \big[(1 - r)\, \operatorname{softmax}(\log s + b\,(q_i - s))_{y_i} + r / K\big], \qquad
        N = (1 - 1/K)\, \mathbb{E}\,r

    The mean is over r from 0 to 0.85, weighed by :math:`\max_b L(r, b)`. A label that is redrawn is right by chance in
    1 of K cases. To find *which* labels are wrong, use `cleanlab <https://github.com/cleanlab/cleanlab>`_.

    **A low number is no proof of correct labels, and a high one no proof of wrong ones.** Labels that are
    redrawn at random are found if the reference can learn the task. Where one class is turned into another,
    it learns that, too, and people are wrong where a sample looks like another class. On the other hand,
    inputs may not tell what the label is: of correct labels of two classes that overlap (AUC 0.68) it can't
    explain 7 to 28 %.

    Args:
        x: Samples, such as images or the rows of a table, or what a pretrained network makes of them; see
            :meth:`Reference.fit`.
        y: Their labels; see :meth:`Reference.fit`. Those of -100 are left out.
        task: ``"multiclass"``, ``"binary"``, or ``"multilabel"``, which takes the mean over labels.
        groups: What samples of one group share, such as the patient; see :meth:`Reference.fit`.

    Returns:
        The share, up to 0.85 (1 - 1/K); nan if it can't be estimated, since the reference has learned nothing.

    Raises:
        ValueError: If the task is another, shapes do not fit, there is no label, or numbers are not finite.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import label_noise
        >>> x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> correct = (x[:, 0] > 0.5).long()
        >>> noisy = correct.where(torch.arange(1000) % 5 > 0, 1 - correct)  # 20 % are wrong
        >>> [round(label_noise(x, y), 1) for y in (correct, noisy)]
        [0.0, 0.2]
    """
    if find_task(task).is_regression:
        raise ValueError(f"Expected a `task` of classes, but got {task!r}.")
    return Reference(task).fit(x, y, groups).unexplained_
