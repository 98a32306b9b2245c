"""A reference: the best small model of the training labels, which never sees the network."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sensitivity.functional.expected import NUM_DRAWS, default_metrics, metric_value
from lightning_sensitivity.functional.features import fit_size, kind_of, shrunk
from lightning_sensitivity.functional.learners import Learner, fit_estimator, fit_learners, spread
from lightning_sensitivity.functional.tasks import Task, find_task, of_all_classes
from lightning_sensitivity.functional.tensors import as_tensor
from lightning_sensitivity.functional.unexplained import unexplained_share

MAX_SAMPLES = {"vectors": 50_000}  # that a reference knows
_MAX_SAMPLES = 10_000  # of images, signals and texts
_MAX_LABELS = 20_000_000  # samples times classes
_CHUNK = 500  # samples that are looked at, at a time
_LEAST_SKILL = {"vectors": 0.0}  # up to it, a reference is blind
_LEAST_SKILL_OF_OTHERS = 0.05
_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_FEW_VALUES = 100  # in each column of a table of categories
_FEW_COMBINATIONS = 10  # of them, for each sample
_CONTRADICTORY = 0.05  # share of the variance of labels that is among equal inputs
_ROUNDING = 1e-12  # of scores that are 0
_MAX_ERRORS = 10_000  # errors, of which quantiles are taken


def max_samples(kind: str, num_outputs: int) -> int:
    """Return how many samples a reference knows at most; see :func:`kind_of`."""
    return min(MAX_SAMPLES.get(kind, _MAX_SAMPLES), max(1, _MAX_LABELS // num_outputs))


class Reference:
    """A small model that was fitted to training labels, and what it predicts of each label that it has not seen.

    Made by :func:`fit_reference`.

    Attributes:
        task: The name of the task.
        kind: The kind of the inputs: ``"vectors"``, ``"images"``, ``"signals"`` or ``"tokens"``.
        learner: ``"forest"``, ``"ridge"``, ``"mean"`` (of too few samples), or the class of your estimator.
        features: What it sees of the inputs, such as ``"columns"`` or ``"patches"``.
        left_out: Predictions for each training sample without it, ``(N, K)``, float64, on the CPU.
        labels: The labels of the same samples, ``(N, K)``.
        rows: Which of the inputs they are, ``(N,)``; of a sample that comes repeatedly, one.
        shares: The mean label, ``(K,)``.
        score: The mean Brier score of the left-out predictions, or their mean squared error.
        chance: The score of ``shares`` as the prediction for each sample.
        unexplained: The share of labels that can't be explained, by :func:`unexplained_share`; nan for a
            regression, and if the reference has learned nothing.
    """

    def __init__(self, task: str, kind: str, shape: torch.Size, learner: Learner, rows: Tensor) -> None:
        self.task = task
        self.kind = kind
        self.learner = learner.name
        self.features = learner.features
        self.left_out = learner.left_out
        self.labels = learner.labels
        self.rows = rows
        self.shares = learner.labels.mean(0)
        self.score = learner.score
        self.chance = float(self._task.distances(self.shares.expand_as(self.labels), self.labels).mean())
        self.unexplained = math.nan
        self._shape = shape
        self._predict = learner.predict
        if self._task.has_classes and self.skill > max(_NO_SKILL, _NO_SKILL_PER_SAMPLE / self.num_samples):
            self.unexplained = unexplained_share(self.left_out, self.labels)

    def __repr__(self) -> str:
        """Say what it is, and how good."""
        return f"Reference({self.learner} on {self.features}, {self.num_samples} samples, skill {self.skill:.2f})"

    @property
    def _task(self) -> Task:
        return find_task(self.task)

    @property
    def num_samples(self) -> int:
        """The number of training samples that it knows."""
        return len(self.labels)

    @property
    def skill(self) -> float:
        """How much lower than chance the score is, from 1, if perfect, to 0 or less, if useless."""
        return 1 - self.score / self.chance if self.chance > _ROUNDING else 0.0

    @property
    def is_trusted(self) -> bool:
        """Whether it sees enough to choose by; else the network may know more of the inputs.

        Of a table it sees all there is, so that any skill will do. Of images, signals and texts it needs 0.05.
        """
        return self.skill > _LEAST_SKILL.get(self.kind, _LEAST_SKILL_OF_OTHERS)

    @property
    def accuracy(self) -> float:
        """The share of training labels that it predicts without having seen them; nan for a regression."""
        is_right = self._task.classes(self.left_out) == self._task.classes(self.labels)
        return float(is_right.double().mean()) if self._task.has_classes else math.nan

    @property
    def majority(self) -> float:
        """The share of the most frequent class, which is the accuracy of always predicting it; nan for a regression."""
        if not self._task.has_classes:
            return math.nan
        counts = torch.unique(self._task.classes(self.labels), return_counts=True)[1]
        return float(counts.max()) / self.num_samples

    @property
    def auroc(self) -> float:
        """The area under the ROC curve of left-out predictions, mean over classes; nan without two classes."""
        metric = default_metrics(self._task, self.labels.shape[1]).get("auroc")
        if metric is None or self.majority == 1:
            return math.nan
        return float(metric_value(metric, self.left_out, self._task.classes(self.labels)[None], self._task))

    @property
    def residuals(self) -> Tensor:
        """Quantiles of the left-out errors, with their mean square, ``(20, K)``, in a regression; else none."""
        if self._task.has_classes:
            return self.labels[:0]
        errors = self.labels - self.left_out
        places = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
        found = torch.from_numpy(np.quantile(errors[:: math.ceil(len(errors) / _MAX_ERRORS)].numpy(), places, axis=0))
        found = found - found.mean(0)
        scale = errors.square().mean(0).sqrt() / found.square().mean(0).sqrt()
        return found * scale.nan_to_num(0.0, 0.0, 0.0)

    def predictions(self, inputs: object) -> Tensor:
        """Predict inputs as a network does after softmax or sigmoid: ``(M, K)``, with K = 1 for ``"binary"``.

        Args:
            inputs: Inputs as those that it was fitted to, ``(M, ...)``; images may have any size.

        Raises:
            ValueError: If inputs are of another kind, or nan or inf.
        """
        x = _as_inputs(inputs)
        has_shape = self.kind == "tokens" or (x.ndim == len(self._shape) and x.shape[1:2] == self._shape[1:2])
        if kind_of(x) != self.kind or not has_shape:
            got = f"{kind_of(x)} of shape {tuple(x.shape)}"
            raise ValueError(
                f"Expected `inputs` to be {self.kind} (M, {', '.join(map(str, self._shape[1:]))}), but got {got}."
            )
        _check_finite("inputs", x)
        if len(x) == 0:
            return self.left_out[:0]
        parts = [self._predict(fit_size(shrunk(part), self._shape)).cpu() for part in torch.split(x, _CHUNK)]
        return torch.cat(parts).reshape(-1, self.labels.shape[1])

    def predict_proba(self, inputs: object) -> Tensor:
        """Predict the probabilities of all classes, ``(M, C)``, with two columns for ``"binary"``.

        Args:
            inputs: As for :meth:`predictions`.

        Raises:
            AttributeError: In a regression.
            ValueError: As by :meth:`predictions`.
        """
        if not self._task.has_classes:
            raise AttributeError("A regression has no probabilities: use `predict`.")
        return of_all_classes(self.predictions(inputs), self._task)

    def predict(self, inputs: object) -> Tensor:
        """Predict classes, ``(M,)``, or the targets of a regression, ``(M,)`` or ``(M, D)``.

        Args:
            inputs: As for :meth:`predictions`.

        Raises:
            ValueError: As by :meth:`predictions`.
        """
        p = self.predictions(inputs)
        if self._task.has_classes:
            return self._task.classes(p)
        return p[:, 0] if p.shape[1] == 1 else p


def fit_reference(inputs: object, labels: object, task: str = "multiclass", *, estimator: Any = None) -> Reference:
    r"""Fit a small model to training labels, and predict each of them without it.

    Two learners of scikit-learn are fitted, and the one with the lower left-out score is the reference:

    - for columns of a table a **random forest** (Breiman, 2001), which predicts a training sample by the trees that
      did not draw it (*out of bag*); the share of columns and the size of leaves are chosen by this score;
    - **ridge regression on Nyström features** of a Gaussian kernel (Williams and Seeger, 2001) of columns, random
      patches (Coates and Ng, 2011) or words (tf-idf), for which leaving one sample out has a closed form; features,
      width of the kernel and ridge are chosen by this score.

    A forest is not fitted where it would take too much: above 500,000 samples times classes, or 2.5 million samples
    times columns, it takes fewer samples, at least 2,000.

    Args:
        inputs: Inputs of training samples, as tensor, array, table or list. Floating ``(N, D)`` and data frames are
            columns; images ``(N, C, H, W)`` and signals ``(N, C, L)`` are averaged if large; integers ``(N, L)`` are
            token ids, negative ones padding.
        labels: Their labels, which may be noisy: for ``"multiclass"`` class indices ``(N,)``, or one-hot or soft
            labels ``(N, K)``; for ``"binary"`` from 0 to 1, ``(N,)`` or ``(N, 1)``; for ``"regression"`` any
            numbers, ``(N,)`` or ``(N, D)``. Samples with labels of -100 are left out, except in a regression.
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``, which says how labels are scored.
        estimator: An estimator of scikit-learn to fit in place of both: a classifier with ``predict_proba``, or a
            regressor. It sees columns, patches or words; left-out predictions are those of five folds.

    Returns:
        The reference. It does not depend on the order of the samples, and knows at most 50,000 rows of a table, and
        10,000 other samples. A sample that comes repeatedly counts once, with the mean of its labels, except in a
        table of few categories, where different people have the same columns.

    Raises:
        ValueError: If shapes do not fit, there is no training sample, inputs are nan or inf, or labels do not fit
            the task.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import fit_reference
        >>> x = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] > 0.5).long()
        >>> reference = fit_reference(x[:300], labels[:300])
        >>> (reference.predict(x[300:]) == labels[300:]).float().mean() > 0.95
        tensor(True)
        >>> reference.accuracy > 0.95
        True
    """
    kind = find_task(task)
    x, y = _as_inputs(inputs), as_tensor("labels", labels)
    _check_inputs(x, y, kind)
    has_label = kind.has_label(y).cpu()
    rows, y = _observations(x, _checked_labels(y, kind).cpu().double(), has_label)
    known = shrunk(x[rows.to(x.device)])
    if estimator is None:
        learner, chosen = fit_learners(known, y, kind)
        return Reference(task, kind_of(x), known.shape, learner, rows[chosen])
    return Reference(task, kind_of(x), known.shape, fit_estimator(estimator, known, y, kind), rows)


def _as_inputs(inputs: object) -> Tensor:
    """Return inputs as a tensor; the columns of a data frame are numbers, also where they are integers."""
    x = as_tensor("inputs", inputs)
    return x.double() if hasattr(inputs, "columns") and not x.is_floating_point() else x


def _observations(x: Tensor, y: Tensor, has_label: Tensor) -> tuple[Tensor, Tensor]:
    """Choose different samples with labels, in an order that depends on the samples alone, with their mean labels.

    Samples are sorted by a random projection, which equal ones share. A sampler with replacement draws a sample
    repeatedly: that is no second observation, and a reference that leaves one of them out would still know its label.
    """
    place, label = _projected(x), _projected(y)
    order = label.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    order = order[has_label[order]]
    groups = torch.unique_consecutive(place[order], return_inverse=True)[1]
    first = torch.cat([groups.new_ones(1), groups.diff()]).bool()
    means = torch.zeros(int(first.sum()), y.shape[1], dtype=y.dtype).index_add_(0, groups, y[order])
    means /= groups.bincount()[:, None]
    labels = y[order]
    within, total = (means[groups] - labels).square().sum(), (labels - labels.mean(0)).square().sum()
    if not has_few_values(x, labels_differ=x.is_floating_point() and bool(within > _CONTRADICTORY * total)):
        order, labels = order[first], means
    chosen = spread(len(order), max_samples(kind_of(x), y.shape[1]))
    return order[chosen], labels[chosen]


def has_few_values(x: Tensor, labels_differ: bool = False) -> bool:
    """Return whether inputs are a table of categories, in which different samples may be equal.

    Args:
        x: The inputs, ``(N, ...)``.
        labels_differ: Whether equal inputs have different labels, so that they are hardly the same sample.
    """
    num_values = [len(torch.unique(column)) for column in x.T] if x.ndim == 2 else [_FEW_VALUES + 1]
    are_few = sum(map(math.log, num_values)) <= math.log(_FEW_COMBINATIONS * len(x))
    return max(num_values) <= _FEW_VALUES and (are_few or labels_differ)


def _projected(x: Tensor) -> Tensor:
    """Return a random projection of samples ``(N, ...)``, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x[0].numel(), generator=generator, dtype=torch.float64)
    return torch.cat([(part.flatten(1).cpu().double() * direction).sum(1) for part in torch.split(x[:, None], _CHUNK)])


def _checked_labels(labels: Tensor, task: Task) -> Tensor:
    """Return labels that fit a task as a matrix, or raise ValueError that says what to do."""
    if not bool(labels.isfinite().all()):
        raise ValueError("Expected `labels` to be finite, but got nan or inf. Leave such samples out.")
    num_outputs = labels[0].numel()
    if task.name == "multiclass" and num_outputs == 1:
        num_outputs = _num_classes(labels)
    elif task.name == "multiclass":
        labels = labels.float()  # one-hot labels may be integers
    task.check(torch.zeros(len(labels), 1 if task.has_one_output else num_outputs), labels)
    return task.as_matrix(labels, num_outputs)


def _num_classes(labels: Tensor) -> int:
    """Return one more than the highest class index, two at least, or raise ValueError."""
    if labels.ndim > 1 or labels.is_floating_point():
        got = f"but got {labels.dtype} of shape {tuple(labels.shape)}"
        advice = "Set task='binary' if they are from 0 to 1, make class numbers integers (N,) if not"
        raise ValueError(f"Expected `labels` to be class indices (N,) or probabilities (N, K), {got}. {advice}.")
    return max(2, int(labels.max()) + 1)


def _check_inputs(x: Tensor, y: Tensor, task: Task) -> None:
    if x.ndim == 0 or not 0 < len(x) == len(y):
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"Expected `inputs` (N, ...) and `labels` (N, ...), but got {got}.")
    if not bool(task.has_label(y).any()):
        raise ValueError("Expected at least one label in `labels` that is not -100, but got none.")
    _check_finite("inputs", x)


def _check_finite(name: str, x: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in torch.split(x, _CHUNK)):
        raise ValueError(f"Expected `{name}` to be finite, but got nan or inf.")
