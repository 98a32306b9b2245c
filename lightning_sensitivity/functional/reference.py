"""A reference: kernel ridge regression of training labels, which never sees the network."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.features import Transform, feature_makers, kind_of, make_features, shrunk
from lightning_sensitivity.functional.tasks import Task, find_task
from lightning_sensitivity.functional.tensors import as_tensor
from lightning_sensitivity.functional.unexplained import unexplained_share

MAX_SAMPLES = 3000  # that a reference knows
_PART = 1000  # samples by which features, width and ridge are chosen
_CHUNK = 500  # samples that are predicted at a time
_WIDTHS = (0.1, 0.4, 1.6)  # of the kernel, times the median squared distance
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_CLEAN = 1.3  # claim / score
_LEAST_SKILL = {"vectors": 0.0, "images": 0.05, "signals": 0.05, "tokens": 0.05}  # up to it, it is blind
_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_FEW_VALUES = 0.2  # share of different rows, in a table of categories
_ROUNDING = 1e-12  # of scores that are 0
_EQUAL = 1e-12  # relative squared distance of equal samples


class Reference(NamedTuple):
    """Hold what a reference predicts, and how good it is.

    Attributes:
        predictions: Probabilities (or targets, in a regression) of the new samples, ``(M, K)``, float64, on the CPU.
        shares: The mean label of the training samples, ``(K,)``.
        score: The leave-one-out score on training samples: Brier score, or squared error.
        chance: The score of ``shares`` as the prediction for each of them.
        claim: The score that leave-one-out predictions would have if they were right; nan for a regression.
        unexplained: The share of labels that can't be explained, by :func:`unexplained_share`; nan for a
            regression, and if the reference has learned nothing.
        leave_one_out: Predictions for each training sample by a fit without it, ``(N, K)``.
        labels: The labels of the same samples, ``(N, K)``.
        kind: The kind of the inputs: ``"vectors"``, ``"images"``, ``"signals"`` or ``"tokens"``.
        features: The features that were chosen, such as ``"patches"``.
    """

    predictions: Tensor
    shares: Tensor
    score: float
    chance: float
    claim: float
    unexplained: float
    leave_one_out: Tensor
    labels: Tensor
    kind: str
    features: str

    @property
    def num_samples(self) -> int:
        """The number of training samples that it knows."""
        return len(self.labels)

    @property
    def skill(self) -> float:
        """How much lower than chance the score is, from 1, if perfect, to 0 or less, if useless."""
        return 1 - self.score / self.chance if self.chance > _ROUNDING else 0.0

    @property
    def looks_clean(self) -> bool:
        """Whether it claims far more doubt than it has, so that labels are right, and the task is hard for it."""
        return self.claim >= _CLEAN * self.score

    @property
    def is_trusted(self) -> bool:
        """Whether it sees enough to choose by; else the network may know more of the inputs.

        Of a table it sees all there is, so that any skill will do. Of images, signals and texts it needs 0.05.
        """
        return self.skill > _LEAST_SKILL[self.kind]


class _Choice(NamedTuple):
    """Hold a leave-one-out score, and by what it was reached."""

    score: float
    features: str
    ridge: float
    width: float


class _Solution(NamedTuple):
    """Hold weights of training samples, ``(N, K)``, the errors if each is left out, ``(N, K)``, and their score."""

    weights: Tensor
    errors: Tensor
    score: float


class _Machine(NamedTuple):
    """Hold what predicts: a function from inputs (on a device) to features, those of known samples, a solution."""

    device: torch.device
    transform: Transform
    known: Tensor
    choice: _Choice
    solution: _Solution

    def __call__(self, inputs: Tensor) -> Tensor:
        """Predict labels less their mean."""
        features = make_features(self.transform, shrunk(inputs).to(self.device)).to(self.known)
        return _kernel(features, self.known, self.choice.width) @ self.solution.weights


def fit_reference(inputs: object, labels: object, new_inputs: object, task: str = "multiclass") -> Reference:
    r"""Fit a reference to labels, and predict those of new samples.

    The reference is kernel ridge regression (Saunders, Gammerman and Vovk, 1998) with a Gaussian kernel. With
    features x, labels y and their mean :math:`\bar y`, it predicts

    .. math::
        q(x) = \bar y + \sum_i k(x, x_i)\, \alpha_i, \qquad
        \alpha = (K + \lambda I)^{-1} (y - \bar y), \qquad
        k(x, x') = \exp\Big(-\frac{\|x - x'\|^2}{w\, d}\Big)

    where :math:`K_{ij} = k(x_i, x_j)`, and d is the median squared distance between samples. The features, the
    width w of 0.1, 0.4 and 1.6 and the ridge λ from 0.03 to 30 are those with the lowest leave-one-out score. The
    prediction for a sample that was left out has the error :math:`\alpha_i / [(K + \lambda I)^{-1}]_{ii}`, the
    identity behind PRESS (Allen, 1974); only :math:`\bar y` includes the sample.

    Args:
        inputs: Inputs of training samples, as tensor, array, table or list. Floating ``(N, D)`` are columns, which
            get units of their own. Images ``(N, C, H, W)`` and signals ``(N, C, L)`` are compared with random
            patches (Coates and Ng, 2011), large ones after averaging. Integers ``(N, L)`` are token ids, negative
            ones padding, and become bags of words.
        labels: Their labels, which may be noisy: for ``"multiclass"`` class indices ``(N,)``, or one-hot or soft
            labels ``(N, K)``; for ``"binary"`` from 0 to 1, ``(N,)`` or ``(N, 1)``; for ``"regression"`` any
            numbers, ``(N,)`` or ``(N, D)``. Samples with labels of -100 are left out, except in a regression.
        new_inputs: Inputs of the samples to predict, ``(M, ...)``.
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``, which says how labels are scored.

    Returns:
        The reference. It does not depend on the order of the samples, knows at most 3,000 of them, and counts
        one that comes repeatedly once.

    Raises:
        ValueError: If shapes do not fit, there is no training sample, inputs are nan or inf, or labels do not fit
            the task.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import fit_reference
        >>> inputs = torch.tensor([[0.0], [0.1], [0.2], [0.3], [1.0], [1.1], [1.2], [1.3]])
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0])  # the last one is noisy
        >>> reference = fit_reference(inputs, labels, torch.tensor([[0.15], [1.15]]))
        >>> reference.predictions.round(decimals=3)
        tensor([[0.9940, 0.0060],
                [0.1390, 0.8610]], dtype=torch.float64)
        >>> round(reference.skill, 3)
        0.528
    """
    kind = find_task(task)
    x, new_x = as_tensor("inputs", inputs), as_tensor("new_inputs", new_inputs)
    y = as_tensor("labels", labels)
    _check_inputs(x, y, new_x, kind)
    y = _checked_labels(y, kind)
    rows = _known_samples(x, y, kind)
    known = shrunk(x[rows.to(x.device)])
    y = kind.as_matrix(y)[rows.to(y.device)].to(_home(x)).double()
    machine = _fitted(known, y - y.mean(0), kind)
    leave_one_out = kind.clip(y - machine.solution.errors).cpu()
    reference = Reference(
        predictions=_predictions(machine, new_x, y.mean(0), kind),
        shares=y.mean(0).cpu(),
        score=machine.solution.score,
        chance=_score(y - y.mean(0), kind),
        claim=float(kind.claims(leave_one_out).mean()),
        unexplained=math.nan,
        leave_one_out=leave_one_out,
        labels=y.cpu(),
        kind=kind_of(x),
        features=machine.choice.features,
    )
    has_learned = reference.skill > max(_NO_SKILL, _NO_SKILL_PER_SAMPLE / len(y))
    if kind.has_classes and has_learned:
        reference = reference._replace(unexplained=unexplained_share(leave_one_out, reference.labels))
    return reference


def _fitted(x: Tensor, residuals: Tensor, task: Task) -> _Machine:
    """Choose features, width and ridge on at most 1,000 samples, and fit all; the ridge may move by a step."""
    transforms = {name: make(x) for name, make in feature_makers(x).items()}
    features = {name: make_features(each, x).to(residuals.device) for name, each in transforms.items()}
    part = slice(None, None, math.ceil(len(x) / _PART))
    choice = min(each for name in features for each in _choices(name, features[name][part], residuals[part], task))
    known = features[choice.features].double()
    kernel = _kernel(known, known, choice.width)
    ridges = (choice.ridge,) if len(x) <= _PART else _ridges_near(choice.ridge)
    solutions = [_solved(kernel, residuals, ridge, task) for ridge in ridges]
    solution = min(solutions, key=lambda each: each.score)
    return _Machine(x.device, transforms[choice.features], known, choice, solution)


def _predictions(machine: _Machine, inputs: Tensor, shares: Tensor, task: Task) -> Tensor:
    """Predict new samples, a few at a time."""
    if len(inputs) == 0:
        return shares.new_zeros(0, len(shares)).cpu()
    return torch.cat([task.clip(shares + machine(part)).cpu() for part in torch.split(inputs, _CHUNK)])


def _choices(name: str, features: Tensor, residuals: Tensor, task: Task) -> list[_Choice]:
    """Compute the leave-one-out score for each width and ridge, from one decomposition a width, single precision."""
    distances = _squared_distances(features, features)
    positive = distances[distances > _EQUAL * distances.max()]
    median = float(positive.median()) if len(positive) else 1.0
    scale = residuals.square().mean().sqrt().clamp(min=_ROUNDING)
    y = (residuals[:, residuals.any(0)] / scale).float()  # classes that no sample has add nothing
    choices = []
    for width in _WIDTHS:
        kernel = (-distances / (width * median)).exp()
        eigenvalues, vectors = torch.linalg.eigh(kernel.float())
        projected = vectors.T @ y
        for ridge in _RIDGES:
            inverse = 1 / (eigenvalues.clamp(min=0) + ridge)
            errors = vectors @ (inverse[:, None] * projected) / (vectors.square() @ inverse)[:, None]
            choices.append(_Choice(_score(errors, task), name, ridge, width * median))
    return choices


def _ridges_near(ridge: float) -> tuple[float, ...]:
    place = _RIDGES.index(ridge)
    return _RIDGES[max(0, place - 1) : place + 2]


def _solved(kernel: Tensor, residuals: Tensor, ridge: float, task: Task) -> _Solution:
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + ridge * identity))
    weights = inverse @ residuals
    errors = weights / inverse.diagonal()[:, None]
    return _Solution(weights, errors, _score(errors, task))


def _score(errors: Tensor, task: Task) -> float:
    return float(task.distances(errors, torch.zeros_like(errors)).mean())


def _kernel(first: Tensor, second: Tensor, width: float) -> Tensor:
    return (_squared_distances(first, second) / -width).exp()


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Compute the squared distances of all pairs."""
    first, second = first.double(), second.double()
    powers = first.square().sum(1)[:, None] + second.square().sum(1)
    return (powers - 2 * first @ second.T).clamp(min=0)


def _home(x: Tensor) -> torch.device:
    """Return where to solve: an Apple GPU has neither float64 nor decompositions."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _known_samples(x: Tensor, y: Tensor, task: Task) -> Tensor:
    """Choose at most 3,000 different samples with labels, in an order that depends on the samples alone.

    Samples are sorted by a random projection, which equal ones share, and by labels. A sampler with replacement
    draws a sample repeatedly, with the same label: that is no second observation, and a reference that leaves one
    of them out still knows its label. Where equal inputs have several labels, or only a few values are possible, as
    in a table of categories, rows are samples of their own.
    """
    place, label = _projected(x), _projected(task.as_matrix(y))
    order = label.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    order = order[task.has_label(y).cpu()[order]]
    is_new = place[order].diff(prepend=place.new_tensor([-math.inf])) != 0
    first = order[is_new][is_new.cumsum(0) - 1]
    if int(is_new.sum()) > _FEW_VALUES * len(order) and torch.equal(label[order], label[first]):
        order = order[is_new]
    chosen = torch.linspace(0, len(order) - 1, min(len(order), MAX_SAMPLES), dtype=torch.float64)
    return order[chosen.round().long()]


def _projected(x: Tensor) -> Tensor:
    """Return a random projection of samples ``(N, ...)``, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x[0].numel(), generator=generator, dtype=torch.float64)
    return torch.cat([(part.flatten(1).cpu().double() * direction).sum(1) for part in torch.split(x[:, None], _CHUNK)])


def _checked_labels(labels: Tensor, task: Task) -> Tensor:
    """Return labels that fit a task, or raise ValueError that says what to do."""
    if not bool(labels.isfinite().all()):
        raise ValueError("Expected `labels` to be finite, but got nan or inf. Leave such samples out.")
    num_outputs = labels[0].numel()
    if task.name == "multiclass" and num_outputs == 1:
        num_outputs = _num_classes(labels)
    elif task.name == "multiclass":
        labels = labels.float()  # one-hot labels may be integers
    task.check(torch.zeros(len(labels), 1 if task.has_one_output else num_outputs), labels)
    return labels


def _num_classes(labels: Tensor) -> int:
    """Return one more than the highest class index, two at least, or raise ValueError."""
    if labels.ndim > 1 or labels.is_floating_point():
        got = f"but got {labels.dtype} of shape {tuple(labels.shape)}"
        advice = "Set task='binary' if they are from 0 to 1, make class numbers integers (N,) if not"
        raise ValueError(f"Expected `labels` to be class indices (N,) or probabilities (N, K), {got}. {advice}.")
    return max(2, int(labels.max()) + 1)


def _check_inputs(x: Tensor, y: Tensor, new_x: Tensor, task: Task) -> None:
    kind = kind_of(x)
    fits = x.ndim == new_x.ndim > 0 and (x.shape[1:] == new_x.shape[1:] or kind == "tokens")
    if not (fits and kind_of(new_x) == kind and 0 < len(x) == len(y)):
        got = f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(new_x.shape)}"
        raise ValueError(f"Expected `inputs` (N, ...), `labels` (N, ...) and `new_inputs` (M, ...), but got {got}.")
    if not bool(task.has_label(y).any()):
        raise ValueError("Expected `labels` of which some are not ignored, but got none.")
    for name, each in (("inputs", x), ("new_inputs", new_x)):
        if not all(bool(part.isfinite().all()) for part in torch.split(each, _CHUNK)):
            raise ValueError(f"Expected `{name}` to be finite, but got nan or inf.")
