"""Compare the predictions of models with what all of them predict together."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import are_probabilities, by_position, wide_dtype


def log_probabilities(clean: Tensor, task: str) -> Tensor:
    """Turn logits into log-probabilities ``(N, decisions, classes, positions)``: one decision or K."""
    if task == "multiclass" and (are_probabilities(clean) or by_position(clean).shape[1] == 1):
        raise ValueError("Expected logits of classes, got probabilities or one output (`task='binary'`).")
    logits = by_position(clean).to(wide_dtype(clean.device))
    if task == "multiclass":
        return logits.log_softmax(1)[:, None]
    return torch.stack([torch.zeros_like(logits), logits], 2).log_softmax(2)


def _expected_errors(log_p: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of wrong decisions of each sample, if labels have the given probabilities."""
    return 1 - labels.gather(2, log_p.argmax(2, keepdim=True)).squeeze(2).mean(1)


def consensus_errors(log_probabilities: Mapping[str, Tensor], voters: Iterable[str]) -> dict[str, float]:
    r"""Compute the expected error of each model if labels were drawn from the joint prediction of all models.

    The joint prediction is the product of the votes of :func:`calibrated_votes`:

    .. math::
        q \propto \prod_j v_j, \qquad E_i = 1 - \operatorname{mean} q(\arg\max_k p_{ik})

    The errors rank models. They are usually too low, since models agree on many of their mistakes. If one
    training set or one architecture misleads most models, the joint prediction is misled, too.

    Args:
        log_probabilities: For each model, for the same samples, ``(N, decisions, classes)``.
        voters: The models that vote.

    Returns:
        Shares of wrong predictions; empty if fewer than three models vote or the numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.consensus import consensus_errors
        >>> first = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]], [[0.6, 0.4]]]).log()
        >>> other = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]], [[0.4, 0.6]]]).log()
        >>> models = {"first": first, "second": first, "other": other}
        >>> {name: round(error, 2) for name, error in consensus_errors(models, models).items()}
        {'first': 0.09, 'second': 0.09, 'other': 0.26}
    """
    voting = [log_probabilities[name].double() for name in voters]
    shapes = {log_p.shape for log_p in log_probabilities.values()}
    if len(voting) < 3 or len(shapes) > 1:  # of two, each would be judged only by the other
        return {}
    joint = torch.stack(calibrated_votes(voting)).sum(0).softmax(2)
    return {name: float(_expected_errors(log_p, joint).mean()) for name, log_p in log_probabilities.items()}


def calibrated_votes(log_probabilities: Sequence[Tensor]) -> list[Tensor]:
    r"""Make each model as confident as the others agree with it, so that none gains by its confidence.

    :math:`v_j \propto p_j^{b_j}`, with :math:`b_j` such that the mean of :math:`\max_k v_{jk}` is the share
    of the other models that predict the same class.

    Args:
        log_probabilities: For each model, for the same samples, ``(N, decisions, classes)``.

    Returns:
        The logarithms of the votes.
    """
    predicted = torch.stack([log_p.argmax(2) for log_p in log_probabilities])
    votes = []
    for log_p, own in zip(log_probabilities, predicted, strict=True):
        num_agreeing = (predicted == own).sum(0) - 1
        agreement = float(num_agreeing.double().mean()) / (len(predicted) - 1)
        confidence = min(max(agreement, 1.2 / log_p.shape[2]), 0.995)  # above chance, below certainty
        vote = _with_confidence(log_p, confidence)
        votes.append(vote.clamp(min=math.log(1e-12)))  # no vote rules out a class
    return votes


def _with_confidence(log_p: Tensor, confidence: float) -> Tensor:
    """Sharpen or flatten predictions, by bisection, until their mean largest probability is as given."""
    low, high = 0.05, 20.0
    for _ in range(20):
        scale = math.sqrt(low * high)
        is_unsure = float((scale * log_p).softmax(2).amax(2).mean()) < confidence
        low, high = (scale, high) if is_unsure else (low, scale)
    return (math.sqrt(low * high) * log_p).log_softmax(2)
