"""A reference for the estimate: kernel ridge regression of training labels, which never sees the network."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.share_of_wrong_labels import estimate_noise
from lightning_sensitivity.functional.sums import TEMPERATURES, AgreementSums
from lightning_sensitivity.functional.tasks import Task, find_task

_WIDTHS = (0.1, 0.4, 1.6)  # of the kernel, times the median squared distance
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_WEIGHT = 2.0  # of a good reference that knows all training samples
_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_SKILL_RANGE = 0.02  # from no weight to full weight
_CAUTIOUS, _CAUTION_RANGE = 1.30, 0.15  # of claim / score: no weight here, and full weight below
NOISY = 0.05  # share of labels that look wrong
_UNCLEAR = 0.7  # of the gap, where noise is neither found nor excluded
_MAX_FACTOR = 3.0  # of the agreement
_CLEAR = 0.15  # share of the largest agreement so far
_MIN_AGREEMENT = 1e-4  # a network that has not moved agrees with nothing
_ROUNDING = 1e-12  # of scores that are 0


class Reference(NamedTuple):
    """Hold what a reference predicts, and how good it is.

    Attributes:
        predictions: Probabilities for the new samples, ``(M, K)``, float64, on the CPU.
        shares: The mean label of the training samples, ``(K,)``.
        score: The leave-one-out Brier score of the reference on its training samples.
        chance: The score of ``shares`` as the prediction for each of them.
        claim: The score that it would have if its leave-one-out predictions were right.
        noise: The share of labels that look wrong, by :func:`estimate_noise`; nan for ``"multilabel"``, and if
            the reference has learned nothing.
        leave_one_out: Probabilities for each training sample by a fit without it, ``(N, K)``.
    """

    predictions: Tensor
    shares: Tensor
    score: float
    chance: float
    claim: float
    noise: float
    leave_one_out: Tensor

    @property
    def num_samples(self) -> int:
        """The number of training samples that it knows."""
        return len(self.leave_one_out)

    @property
    def skill(self) -> float:
        """Compute how much lower than chance the score is, from 1, if perfect, to 0 or less, if useless."""
        return skill(self.score, self.chance)


class ReferenceSums(NamedTuple):
    """Hold sums over the training samples that references know, such as those of all processes.

    Attributes:
        num_samples: How many samples.
        score: Leave-one-out scores.
        chance: Scores of the shares.
        claim: Scores that are claimed.
        noise: Shares of labels that look wrong, where they are known.
        num_unknown: Samples for which they are not.
    """

    num_samples: float
    score: float
    chance: float
    claim: float
    noise: float
    num_unknown: float

    @classmethod
    def of(cls, reference: Reference) -> "ReferenceSums":
        """Return the sums of one reference."""
        is_known = not math.isnan(reference.noise)
        noise, unknown = (reference.noise, 0.0) if is_known else (0.0, 1.0)
        means = 1.0, reference.score, reference.chance, reference.claim, noise, unknown
        return cls(*(reference.num_samples * mean for mean in means))

    @property
    def mean_noise(self) -> float:
        """The share of labels that look wrong; nan if it is unknown for some samples."""
        return self.noise / self.num_samples if self.num_samples > 0 and self.num_unknown == 0 else math.nan

    @property
    def looks_clean(self) -> bool:
        """Whether no noise is found in the labels.

        It is not enough that few labels look wrong: with correct labels that are difficult for it, a reference is
        also too cautious, so that its claim is well above its score.
        """
        return self.mean_noise < NOISY and self.claim >= _CAUTIOUS * self.score

    @property
    def gap_weight(self) -> float:
        """How much of the gap between training score and estimate counts in the criterion.

        A network that memorizes correct labels hardly loses accuracy by it, so that the score on training samples
        tells when to stop. With noisy labels the estimate does. It is 0 if no noise is found, 1 if 5 % of the
        labels or more look wrong or nothing is known, and 0.7 in between.
        """
        if self.looks_clean:
            return 0.0
        return _UNCLEAR if self.mean_noise < NOISY else 1.0

    def weight(self, num_training: int | None) -> float:
        """Compute the weight of the references; see :func:`reference_weight`.

        Args:
            num_training: n; None if the references know all training samples.
        """
        score, chance, claim = (each / self.num_samples for each in (self.score, self.chance, self.claim))
        num_samples = int(self.num_samples)
        return reference_weight(score, chance, claim, num_samples, num_training or num_samples)


def skill(score: float, chance: float) -> float:
    """Compute 1 - score / chance; 0 if all labels are equal."""
    return 1 - score / chance if chance > _ROUNDING else 0.0


def least_skill(num_samples: int) -> float:
    """Return the skill that permuted labels reach."""
    return max(_NO_SKILL, _NO_SKILL_PER_SAMPLE / num_samples)


def fit_reference(features: Tensor, labels: Tensor, new_features: Tensor, task: str = "multiclass") -> Reference:
    r"""Fit a reference to labels, and predict those of new samples.

    The reference is kernel ridge regression (Saunders, Gammerman and Vovk, 1998) with a Gaussian kernel. With
    features x, labels y and their mean :math:`\bar y`, it predicts

    .. math::
        q(x) = \bar y + \sum_i k(x, x_i)\, \alpha_i, \qquad
        \alpha = (K + \lambda I)^{-1} (y - \bar y), \qquad
        k(x, x') = \exp\Big(-\frac{\|x - x'\|^2}{w\, d}\Big)

    where :math:`K_{ij} = k(x_i, x_j)`, and d is the median squared distance between samples. Of the widths w
    of 0.1, 0.4 and 1.6 and the ridges λ from 0.03 to 30, it takes those with the lowest leave-one-out Brier
    score. The prediction for a sample that was left out has the error
    :math:`\alpha_i / [(K + \lambda I)^{-1}]_{ii}`, the identity behind PRESS (Allen, 1974), so that one
    eigendecomposition for each width gives all scores, in single precision; only :math:`\bar y` includes the
    sample. The chosen width and ridge are solved in double precision. In the end, predictions are clipped to
    probabilities.

    Args:
        features: Features of training samples, such as :func:`principal_components`, floating, ``(N, D)``.
        labels: Their labels, which may be noisy: for ``"multiclass"`` class indices ``(N,)``, or one-hot or soft
            labels ``(N, K)``; else from 0 to 1, ``(N, K)``, for ``"binary"`` also ``(N,)``.
        new_features: Features of the samples to predict, ``(M, D)``.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``, which says how labels are scored.

    Returns:
        The reference, computed on the CPU in float64.

    Raises:
        ValueError: If shapes do not fit, there is no training sample, features are nan or inf, or labels are
            no probabilities.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import fit_reference
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [1.0], [1.1], [1.2], [1.3]])
        >>> labels = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 0]]  # the last one is noisy
        >>> reference = fit_reference(features, labels, torch.tensor([[0.15], [1.15]]))
        >>> reference.predictions.round(decimals=3)
        tensor([[0.9940, 0.0060],
                [0.1390, 0.8610]], dtype=torch.float64)
        >>> round(reference.skill, 3)
        0.528
    """
    kind = find_task(task)
    x, new_x, y = (each.detach().cpu().double() for each in (features, new_features, kind.as_matrix(labels)))
    _check_samples(x, new_x, y, kind)
    shares = y.mean(0)
    residuals = y - shares
    distances = _squared_distances(x, x)
    positive = distances[distances > 0]
    median = positive.median() if len(positive) else torch.ones(())
    width, ridge = _choose_width_and_ridge(distances / median, residuals, kind)
    kernel = (-distances / (width * median)).exp()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + ridge * torch.eye(len(x), dtype=torch.float64)))
    weights = inverse @ residuals
    errors = weights / inverse.diagonal()[:, None]
    new_kernel = (-_squared_distances(new_x, x) / (width * median)).exp()
    leave_one_out = kind.clip(y - errors)
    score = float(kind.distances(y, y - errors).mean())
    chance = float(kind.distances(y, shares.expand_as(y)).mean())
    has_noise = kind.has_label_noise and skill(score, chance) > least_skill(len(x))
    return Reference(
        predictions=kind.clip(shares + new_kernel @ weights),
        shares=shares,
        score=score,
        chance=chance,
        claim=float(kind.claims(leave_one_out).mean()),
        noise=estimate_noise(leave_one_out, y) if has_noise else math.nan,
        leave_one_out=leave_one_out,
    )


def _choose_width_and_ridge(distances: Tensor, residuals: Tensor, task: Task) -> tuple[float, float]:
    """Choose the kernel's width and the ridge that have the lowest leave-one-out score."""
    choices: list[tuple[float, float, float]] = []
    for width in _WIDTHS:
        scores = _leave_one_out_scores((-distances / width).exp(), residuals, task)
        choices += [(score, width, ridge) for score, ridge in zip(scores, _RIDGES, strict=True)]
    return min(choices)[1:]


def _leave_one_out_scores(kernel: Tensor, residuals: Tensor, task: Task) -> list[float]:
    """Compute the leave-one-out score for each ridge, in single precision to be fast."""
    eigenvalues, vectors = torch.linalg.eigh(kernel.float())
    projected = vectors.T @ residuals[:, residuals.any(0)].float()  # classes that no sample has add nothing
    inverses = 1 / (eigenvalues.clamp(min=0)[:, None] + torch.tensor(_RIDGES, dtype=torch.float32))
    diagonals = vectors.square() @ inverses
    scores = []
    for inverse, diagonal in zip(inverses.T, diagonals.T, strict=True):
        errors = vectors @ (inverse[:, None] * projected) / diagonal[:, None]
        scores.append(float(task.distances(errors, torch.zeros_like(errors)).mean()))
    return scores


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Compute the distances of all pairs, exactly 0 for equal samples."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def _check_samples(x: Tensor, new_x: Tensor, y: Tensor, task: Task) -> None:
    if not (x.ndim == y.ndim == 2 and 0 < len(x) == len(y) and new_x.shape[1:] == x.shape[1:]):
        got = f"{tuple(x.shape)}, {tuple(new_x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"Expected `features` (N, D), `new_features` (M, D) and `labels` (N, K), but got {got}.")
    if not bool(torch.cat([x, new_x]).isfinite().all()):
        raise ValueError("Expected `features` and `new_features` to be finite, but got nan or inf.")
    sums = y.sum(1) if task.sums_to_one else torch.ones(1)
    if not bool((y.clamp(0, 1) == y).all() and ((sums - 1).abs() < 1e-3).all()):
        raise ValueError("Expected `labels` to be probabilities, which sum to 1 for 'multiclass'.")


class Calibration(NamedTuple):
    """Hold what the epochs so far say about the factor of the agreement, at each temperature.

    A reference that is poor agrees less with a network than unseen labels do. The labels of training samples
    agree more, since the network has learned them; least so before it memorizes. So the factor is the
    smallest ratio so far of their agreement to that of the reference.

    Attributes:
        largest_agreements: The largest agreement of network and reference on unseen samples.
        smallest_ratios: The smallest ratio of the agreement of training labels to it, where it is clear of 0.
    """

    largest_agreements: tuple[float, ...] = (0.0,) * len(TEMPERATURES)
    smallest_ratios: tuple[float, ...] = (math.inf,) * len(TEMPERATURES)

    @property
    def factors(self) -> list[float]:
        """The factor of the agreement at each temperature, from 1 to 3."""
        return [min(max(ratio, 1.0), _MAX_FACTOR) for ratio in self.smallest_ratios]

    def updated(self, agreements: Tensor, training_agreements: Tensor) -> "Calibration":
        """Include an epoch; one without samples, which gives nan, changes nothing.

        Args:
            agreements: Means of p · (q − s) over unseen samples at each temperature: network p, reference q,
                shares s.
            training_agreements: Means of p · (y − s) over training samples with labels y.
        """
        if not bool((agreements + training_agreements).isfinite().all()):
            return self
        found = agreements.tolist()
        largest = tuple(map(max, self.largest_agreements, found))
        ratios = [
            min(smallest, training / agreement) if agreement > max(_CLEAR * most, _MIN_AGREEMENT) else smallest
            for smallest, training, agreement, most in zip(
                self.smallest_ratios, training_agreements.tolist(), found, largest, strict=True
            )
        ]
        return Calibration(largest, tuple(ratios))


def reference_weight(score: float, chance: float, claim: float, num_samples: int, num_training: int) -> float:
    r"""Compute the weight of a reference beside the estimate, :math:`2\,g\,h \min(1, m / n)`.

    g rises from 0 to 1 over 0.02 of skill, from 0.01 on, or from 1.5 / m below 150 samples: permuted labels
    reach that. h tells noisy labels from a difficult task. With noisy labels the reference is calibrated: its
    claim is near its score. Where labels are right and the task is too difficult for it, it is too cautious,
    and claims more. So h falls from 1 to 0 as claim / score rises from 1.15 to 1.30.

    Args:
        score: The leave-one-out score of the reference.
        chance: The score of the shares of the classes.
        claim: The score that the reference claims.
        num_samples: m, how many training samples the reference knows.
        num_training: n, how many the network is trained on.

    Example:
        >>> from lightning_sensitivity.functional import reference_weight
        >>> reference_weight(score=0.7, chance=0.9, claim=0.7, num_samples=1000, num_training=4000)
        0.5
    """
    has_skill = _ramp((skill(score, chance) - least_skill(num_samples)) / _SKILL_RANGE)
    is_calibrated = _ramp((_CAUTIOUS - claim / score) / _CAUTION_RANGE) if score > _ROUNDING else 0.0
    return _WEIGHT * has_skill * is_calibrated * min(1.0, num_samples / num_training)


def _ramp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def reference_score(unseen: AgreementSums, training: AgreementSums, calibration: Calibration) -> Tensor:
    r"""Estimate the Brier score on unseen samples by the agreement with the reference.

    .. math::
        \mathbb{E}\|y\|^2 + \mathbb{E}\|p\|^2 - 2\,\big[\mathbb{E}\,p \cdot s + c\,\mathbb{E}\,p \cdot (q - s)\big]

    p are predictions of the network, q those of the reference, y training labels, s their mean, and c the
    factor of the calibration.

    Args:
        unseen: Sums over unseen samples with predictions of the reference.
        training: Sums over training samples with their labels.
        calibration: What gives the factor; it includes this epoch.

    Returns:
        The score at each temperature, ``(T,)``.
    """
    factors = unseen.agreement.new_tensor(calibration.factors)
    agreement = (unseen.by_shares + factors * unseen.agreement) / unseen.num_scored
    label_power = training.other_power / training.num_scored
    return label_power + unseen.power / unseen.num_scored - 2 * agreement
