"""The Brier score on unseen samples without their labels: claim, overconfidence, memorization and variance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional import tasks as T

# Sums over holdout samples: number, claim, variance, claims of both sides of the variance, samples with the twin's very
# outputs. Over training samples: labels that count, score, claim, outputs that leave [0, 1]. The last entry of both
# counts samples with nan or inf.
NUM_HOLDOUT_SUMS, NUM_TRAINING_SUMS = 7, 5


class RiskTerms(NamedTuple):
    """Hold the risk estimate and the terms that it sums; scalar tensors.

    Attributes:
        estimate: The estimated Brier score on unseen samples.
        claim: The score if the model's probabilities were right.
        overconfidence: How much higher the score on training samples is than the model claims there.
        memorization: How much more certain the model is on training samples than on unseen ones; 0 for real twins.
        variance: Mean squared difference to the probabilities of a network that was trained on other samples.
    """

    estimate: Tensor
    claim: Tensor
    overconfidence: Tensor
    memorization: Tensor
    variance: Tensor


def holdout_sums(outputs: Tensor, twin_outputs: Tensor, task: str, reference: Tensor | None = None) -> Tensor:
    """Sum up claims and variance over a batch of unseen samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of a twin.
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        reference: Outputs to compare with the twin's, if others: those of batch norm by the batch.

    Returns:
        Shape ``(7,)``.
    """

    def sums(*chunk: Tensor) -> Tensor:
        p, twin_p, reference_p = (T.probabilities(each, task) for each in chunk)
        claim, *claims = (_claims(each, task) for each in (p, reference_p, twin_p))
        is_same = (chunk[1] == chunk[2])[..., None].flatten(1).all(1)
        return _finite_sums(torch.ones_like(claim), claim, _distances(reference_p, twin_p, task), *claims, is_same)

    return torch.stack(T.in_chunks(sums, outputs, twin_outputs, outputs if reference is None else reference)).sum(0)


def training_sums(outputs: Tensor, targets: Tensor, task: str) -> Tensor:
    """Sum up scores and claims over a batch of training samples.

    Args:
        outputs: Outputs in eval mode, ``(N, K, ...)`` or ``(N,)``.
        targets: Their labels.
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`.

    Returns:
        Shape ``(5,)``.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        p = T.probabilities(outputs, task)
        y, counts = T.target_probabilities(p, targets, task)
        is_outside = ((outputs < 0) | (outputs > 1)).reshape(p.shape).any(1)
        return _finite_sums(counts, _distances(p, y, task) * counts, _claims(p, task) * counts, is_outside)

    return torch.stack(T.in_chunks(sums, outputs, targets.to(outputs.device))).sum(0)


def risk_terms(holdout: Tensor, training: Tensor, strength: float | None = None, factor: float = 1.0) -> RiskTerms:
    """Estimate the risk from sums over all batches and processes.

    Args:
        holdout: Sums from :func:`holdout_sums`.
        training: Sums from :func:`training_sums`.
        strength: λ of simulated twins; None for real ones.
        factor: Factor of the variance for simulated twins, from :func:`variance_factor`.

    Returns:
        The terms; nan without training or holdout samples.
    """
    claim, variance, compared_claim, twin_claim = holdout[1:5] / holdout[0]
    score, training_claim = training[1:3] / training[0]
    overconfidence, memorization = score - training_claim, torch.zeros_like(claim)
    if strength is not None:
        overconfidence = torch.where(overconfidence > 0, overconfidence, overconfidence / 2)
        memorization = (claim - training_claim).clamp(min=0)
        variance = factor * variance / strength**2 * (compared_claim / twin_claim).clamp(max=1).nan_to_num(1.0)
    terms = claim, overconfidence, memorization, variance
    return RiskTerms(torch.stack(terms).sum(0), *terms)


def diagnostics(holdout: Tensor, training: Tensor) -> dict[str, str]:
    """Explain what makes an estimate doubtful, or keeps it from being one, with one sentence for each problem.

    Args:
        holdout: Sums from :func:`holdout_sums`.
        training: Sums from :func:`training_sums`.
    """
    messages = {}
    if training[0] > 0 and training[3] == 0:
        messages["probabilities"] = "All outputs lie in [0, 1]. If they are not logits, set `outputs=`."
    if holdout[-1] + training[-1] > 0:
        first, second = (math.ceil(float(sums[-1]) - 1e-6) for sums in (holdout, training))  # twins add parts
        messages["non-finite"] = f"{first} validation and {second} training samples gave nan or inf, and were left out."
    if holdout[5] > holdout[0] / 2:
        reason = "twins give the outputs of the model, which has learned nothing yet, or caches its weights"
        messages["no variance"] = f"There is no value: {reason}. `EarlyStopping(check_finite=False)` waits for one."
    elif not messages and not (holdout[0] > 0 and training[0] > 0):
        messages["no value"] = "There is no value: no kept training sample has a label, or no batch could be measured."
    return messages


def variance_factor(num_training: int, num_weights: int) -> float:
    r"""Compute how much of the variance of a simulated twin counts: :math:`\min(1, \sqrt{\sqrt{w} / n})`.

    Networks differ less if they have more training samples, and more if they have more weights; twins reflect neither.
    The form was chosen on random runs, and has no constant; see ``examples/studies/early_stopping/README.md``.

    Args:
        num_training: n, the number of training samples.
        num_weights: w, the number of weights that are trained.

    Example:
        >>> from lightning_sensitivity.functional import variance_factor
        >>> variance_factor(num_training=400, num_weights=10_000)
        0.5
    """
    return float(min(1.0, (num_weights**0.5 / num_training) ** 0.5))


def risk_estimate(
    outputs: Tensor,
    twin_outputs: Tensor,
    train_outputs: Tensor,
    train_targets: Tensor,
    task: str = "multiclass",
    strength: float | None = None,
    factor: float = 1.0,
) -> RiskTerms:
    r"""Estimate the Brier score on unseen samples from training labels and unlabelled samples.

    .. math::
        R = \underbrace{\mathbb{E}\,(1 - \|p\|^2)}_\text{claim}
            + \underbrace{\mathbb{E}_\text{train}[\|p - y\|^2 - (1 - \|p\|^2)]}_\text{overconfidence}
            + \underbrace{\mathbb{E}\|p - p'\|^2}_\text{variance}

    p are the probabilities, y the labels, and p' the probabilities of a *twin*: a network that was trained on other
    samples. This is the chain loss = bias + variance of arXiv:2007.15378 (Section 4). With a real twin it is exact
    where unseen labels agree with a network as its twins do, up to its miscalibration on its training samples,
    :math:`\mathbb{E}\,p \cdot y = \mathbb{E}\,p \cdot p' + \mathbb{E}_\text{train}\,p \cdot (y - p)`.

    :func:`~lightning_sensitivity.model.twins.twin` simulates a twin of strength λ without a second training. Then the
    variance is divided by λ², multiplied by min(1, claim of the network / claim of the twin), since noise makes a twin
    less certain than another network would be, and multiplied by :func:`variance_factor`. Overconfidence below 0 counts
    half: it may be memory of the training labels. And memorization is added, by how much the claim on unseen samples is
    above that on training samples, where it is. ``examples/studies/early_stopping/README.md`` has the measurements.

    Where training labels are wrong, it estimates the score against labels that are as wrong.

    Args:
        outputs: Outputs for unlabelled samples that the network was not trained on, before softmax or sigmoid,
            floating, shape ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of the twin for the same samples.
        train_outputs: Outputs for training samples, in eval mode, shape ``(M, K, ...)`` or ``(M,)``.
        train_targets: Their labels: ``(M, ...)`` integers (those of -100 don't count), or soft labels of the shape of
            ``train_outputs``, for ``"multiclass"``; of the shape of ``train_outputs`` for the others.
        task: ``"multiclass"`` scores the sum over classes of (p − y)²; ``"binary"`` and ``"multilabel"`` the mean over
            labels.
        strength: λ, if the twin is simulated; None for a real one.
        factor: Factor of the variance for a simulated twin, from :func:`variance_factor`.

    Returns:
        The estimate and its terms, scalar tensors, float64 (float32 on MPS).

    Raises:
        ValueError: If labels or shapes do not fit, there is no sample, or outputs are probabilities already.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import risk_estimate
        >>> outputs, twin_outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> train_outputs, train_targets = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
        >>> risk_estimate(outputs, twin_outputs, train_outputs, train_targets).estimate
        tensor(0.3832, dtype=torch.float64)
    """
    if task not in T.TASKS:
        raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, T.TASKS))}, but got {task!r}.")
    T.check_task(train_outputs, train_targets, task)
    tensors = {"outputs": outputs, "twin_outputs": twin_outputs, "train_outputs": train_outputs}
    if outputs.shape != twin_outputs.shape or outputs.shape[1:2] != train_outputs.shape[1:2]:
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        raise ValueError(f"Expected `{'`, `'.join(tensors)}` of the same K, but got {shapes}.")
    for name, tensor in tensors.items():
        valid = tensor.is_floating_point() and tensor.numel() > 0
        if not valid or (task == "multiclass" and T.are_probabilities(tensor)):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}, or probabilities"
            raise ValueError(f"Expected `{name}` to be floating logits of one sample or more, but got {got}.")
    training = training_sums(train_outputs, train_targets, task)
    if not training[0] > 0:
        raise ValueError("Expected `train_targets` to hold a label that counts, but all are -100.")
    return risk_terms(holdout_sums(outputs, twin_outputs, task), training, strength, factor)


def _claims(p: Tensor, task: str) -> Tensor:
    """Score predictions ``(N, K, ...)`` as they claim to be: their Gini impurity, ``(N, ...)``."""
    return 1 - p.square().sum(1) if task == "multiclass" else (p * (1 - p)).mean(1)


def _distances(p: Tensor, other: Tensor, task: str) -> Tensor:
    """Square the difference of predictions, or of predictions and labels, ``(N, ...)``."""
    squares = (p - other).square_()
    return squares.sum(1) if task == "multiclass" else squares.mean(1)


def _finite_sums(*values: Tensor) -> Tensor:
    """Sum up values over samples for which all are finite, and count the others, without waiting for the device."""
    dtype = T.wide_dtype(values[0].device)
    rows = torch.stack([each.to(dtype)[:, None].flatten(1).sum(1) for each in values], dim=1)
    is_finite = rows.isfinite().all(1)
    return torch.cat([rows.where(is_finite[:, None], 0.0).sum(0), (~is_finite).sum(0, keepdim=True)])
