"""What the other models say, in place of labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
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


def consensus_scores(
    log_probabilities: Mapping[str, Tensor], voters: Collection[str] | None = None
) -> dict[str, Consensus]:
    r"""Expected loss and error of each model, if labels were drawn from the mean prediction of the others.

    .. math::
        q_i = \operatorname{mean}_{j \ne i} p_j, \qquad
        L_i = -\sum_k q_{ik} \log p_{ik}, \qquad
        E_i = 1 - q_i(\arg\max_k p_{ik})

    Labels that models agree on are right more often than any single model is, if their mistakes are not the same. Where
    they are, because one training set or one architecture misleads all of them, the consensus is misled, too. That
    disagreement between networks follows their error was seen by Jiang et al. (`arXiv:2106.13799`_) for networks of one
    kind.

    Args:
        log_probabilities: Those of each model for the same samples, ``(N, K)``.
        voters: The models that are asked, by default all; of each of them the others are.

    Returns:
        One entry a model; none for fewer than three voters, or where numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.consensus import consensus_scores
        >>> agreeing, other = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> scores = consensus_scores({"first": agreeing, "second": agreeing, "third": other})
        >>> {name: round(float(error), 2) for name, (_, error) in scores.items()}
        {'first': 0.45, 'second': 0.45, 'third': 0.9}

    .. _arXiv:2106.13799: https://arxiv.org/abs/2106.13799
    """
    voters = log_probabilities.keys() if voters is None else voters
    shapes = {values.shape for values in log_probabilities.values()}
    if len(voters) < _MIN_MODELS or len(shapes) > 1 or not next(iter(shapes))[1]:
        return {}
    probabilities = (log_probabilities[name].double().exp() for name in voters)
    total = sum(probabilities, start=torch.zeros((), dtype=torch.float64))
    scores = {}
    for name, values in log_probabilities.items():
        log_p = values.double()
        votes = (total - log_p.exp()).clamp(min=0) / (len(voters) - 1) if name in voters else total / len(voters)
        # 0 · log 0 is 0: a class that neither the model nor the others expect.
        loss = -(votes * log_p.clamp(min=-1e300)).sum(1)
        error = 1 - votes.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1)
        scores[name] = Consensus(loss, error)
    return scores
