"""A jury of models, in which a reference has a seat: what it predicts, and who differs from it."""

import math

import torch
from torch import Tensor

_SURE = 0.995  # no reference is more certain
_NEARLY_CHANCE = 1.2  # times chance: none is less certain
_NUM_RESAMPLES = 2000


def sharpened(reference: Tensor, probabilities: Tensor) -> Tensor:
    """Make a reference as certain as the models agree with it.

    Its probabilities are raised to one power and normalized, such that their mean largest one is the share of
    models that predict the same class as the reference.

    Args:
        reference: Probabilities of the reference, ``(..., K)``.
        probabilities: Those of M models for the same samples, ``(M, ..., K)``.

    Returns:
        The new probabilities, ``(..., K)``.
    """
    agreement = float((probabilities.argmax(-1) == reference.argmax(-1)).double().mean())
    wanted = min(max(agreement, _NEARLY_CHANCE / reference.shape[-1]), _SURE)
    log_r = reference.double().clamp(min=1e-12).log()
    low, high = 0.05, 20.0
    for _ in range(20):
        power = math.sqrt(low * high)
        is_unsure = float((power * log_r).softmax(-1).amax(-1).mean()) < wanted
        low, high = (power, high) if is_unsure else (low, power)
    return (math.sqrt(low * high) * log_r).softmax(-1)


def jury_classes(probabilities: Tensor, reference: Tensor | None = None, share_known: float = 1.0) -> Tensor:
    r"""Let models and a reference vote on the class of each sample.

    .. math::
        \arg\max_k \Big[\sum_j p_{jk} + \frac{M}{2} \min\Big(1, \frac{m}{n}\Big)\, r_k\Big]

    p are the probabilities of M models, and r those of the reference, :func:`sharpened`. The form was chosen
    on random tasks; see ``examples/studies/comparing``.

    Args:
        probabilities: p, for the same samples, ``(M, ..., K)``.
        reference: The probabilities of the reference, ``(..., K)``; None for a jury of the models alone.
        share_known: m / n, the share of the training samples that the reference knows.

    Returns:
        Class indices, ``(...)``.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.consensus import jury_classes
        >>> models = torch.tensor([[[0.9, 0.1], [0.52, 0.48]], [[0.8, 0.2], [0.52, 0.48]]])
        >>> reference = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> jury_classes(models), jury_classes(models, reference)
        (tensor([0, 0]), tensor([0, 1]))
    """
    votes = probabilities.sum(0, dtype=torch.float64)
    if reference is not None:
        votes += len(probabilities) / 2 * min(1.0, share_known) * sharpened(reference, probabilities)
    return torch.argmax(votes, -1)


def as_good_as_first(losses: Tensor) -> Tensor:
    """Find the models that a paired bootstrap over samples can't tell apart from the first one.

    Args:
        losses: What each model loses on each sample, ``(M, N)``.

    Returns:
        For each model, whether the 95 % interval of its mean difference from the first one holds 0, ``(M,)``.
        The random numbers are the same in every call.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.consensus import as_good_as_first
        >>> as_good_as_first(torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 2, 1, 1]]))
        tensor([ True,  True, False])
    """
    differences = losses.double() - losses[0].double()
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(_NUM_RESAMPLES):
        chosen = torch.randint(losses.shape[1], losses.shape[1:], generator=generator)
        means.append(differences[:, chosen].mean(1))
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return torch.logical_and(low <= 0, high >= 0)
