"""What the other models say, in place of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

_MIN_MODELS = 3  # of two, each would be measured by the other alone


class Consensus(NamedTuple):
    """How far the predictions of a model are from the others', one number a sample.

    Attributes:
        loss: Expected cross-entropy, in nats.
        error: Expected share of wrong predictions.
    """

    loss: Tensor
    error: Tensor


def consensus_scores(log_probabilities: Mapping[str, Tensor]) -> dict[str, Consensus]:
    r"""Expected loss and error of each model, if labels were drawn from the mean prediction of the others.

    .. math::
        q_i = \frac{1}{M - 1} \sum_{j \ne i} p_j, \qquad
        L_i = -\sum_k q_{ik} \log p_{ik}, \qquad
        E_i = 1 - q_i(\arg\max_k p_{ik})

    Labels that models agree on are right more often than any single model is, if their mistakes are not the same. Where
    they are, because one training set or one architecture misleads all of them, the consensus is misled, too. That
    disagreement between networks follows their error was seen by Jiang et al. (`arXiv:2106.13799`_) for networks of one
    kind.

    Args:
        log_probabilities: Those of each model for the same samples, ``(N, K)``.

    Returns:
        One entry a model; none for fewer than three models, or where their numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.consensus import consensus_scores
        >>> agreeing, other = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> scores = consensus_scores({"first": agreeing, "second": agreeing, "third": other})
        >>> {name: round(float(error), 2) for name, (_, error) in scores.items()}
        {'first': 0.45, 'second': 0.45, 'third': 0.9}

    .. _arXiv:2106.13799: https://arxiv.org/abs/2106.13799
    """
    shapes = {values.shape for values in log_probabilities.values()}
    if len(log_probabilities) < _MIN_MODELS or len(shapes) > 1 or not next(iter(shapes))[1]:
        return {}
    total = sum(values.double().exp() for values in log_probabilities.values())
    scores = {}
    for name, values in log_probabilities.items():
        log_p = values.double()
        others = (total - log_p.exp()).clamp(min=0) / (len(log_probabilities) - 1)
        # 0 · log 0 is 0: a class that neither the model nor the others expect.
        loss = -(others * log_p.clamp(min=-1e300)).sum(1)
        error = 1 - others.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1)
        scores[name] = Consensus(loss, error)
    return scores
