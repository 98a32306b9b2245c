"""Scores of models on the same samples: by their outputs, and by the predictions of the other models."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_sensitivity.functional.sensitivity import sensitivity_from_rows, sensitivity_rows, squared_deviations
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import by_position, wide_dtype

Samples = dict[str, Tensor]  # for each name one number per sample, or a row of them

_MIN_VOTERS = 3  # with two, each would be judged by the other alone
_UNDECIDED = 0.95  # share of the largest entropy, which predictions of untrained models come near


@dataclass(frozen=True)
class ModelScores:
    """Hold the scores of one model. A number that has no meaning for it is nan.

    Attributes:
        name: What the user calls it.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: Its standard error, over samples and noise.
        consensus_error: Expected share of wrong predictions, if labels were drawn from the mean prediction of the other
            models; see :func:`consensus_scores`.
        consensus_loss: Expected loss, in the same way.
        loss: The true loss: cross-entropy.
        error: The true share of wrong predictions.
        num_parameters: How many parameters it has.
        seconds: Time of all passes.
        note: Why it failed, or that it is undecided.
    """

    name: str
    sensitivity: float = math.nan
    sensitivity_stderr: float = math.nan
    consensus_error: float = math.nan
    consensus_loss: float = math.nan
    loss: float = math.nan
    error: float = math.nan
    num_parameters: float = math.nan
    seconds: float = math.nan
    note: str = ""


def score_samples(clean: Tensor, noisy: Iterable[Tensor], targets: Tensor | None, task: str | None) -> Samples:
    """Score the samples of a batch.

    Args:
        clean: Outputs f(x), logits ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs for each noise draw; one at a time is in memory.
        targets: Labels that fit the task, or None.
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`, or None for sensitivity alone.

    Returns:
        ``rows`` of :func:`~lightning_sensitivity.functional.sensitivity.sensitivity_rows`; with a task and one
        position, the log-probabilities ``log_p``, ``(N, decisions, classes)``; with labels ``loss`` and ``error``, sums
        over ``num_labels``.
    """
    scores = {"rows": sensitivity_rows(clean, noisy)}
    if task is None:
        return scores
    outputs = by_position(clean).to(wide_dtype(clean.device))
    if task == "multiclass":
        log_p = outputs.log_softmax(1)[:, None]  # (N, decisions, classes, positions): one decision, or K of no or yes
    else:
        log_p = torch.stack([logsigmoid(-outputs), logsigmoid(outputs)], 2)
    if log_p.shape[3] == 1:
        scores["log_p"] = log_p[..., 0].float()
    if targets is not None:
        kind = TASKS[task]
        y, counts = kind.target_probabilities(kind.probabilities(clean), targets)
        y, counts = by_position(y).to(log_p), counts[:, None].flatten(1)
        loss, error = _expected(log_p, y[:, None] if task == "multiclass" else torch.stack([1 - y, y], 2))
        scores |= {"loss": (loss * counts).sum(1), "error": (error * counts).sum(1), "num_labels": counts.sum(1)}
    return scores


def consensus_scores(
    log_probabilities: Mapping[str, Tensor], voters: Collection[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Compute the expected loss and error of each model, if labels were drawn from the mean prediction of the others.

    .. math::
        q_i = \operatorname{mean}_{j \ne i} p_j, \qquad
        L_i = -\sum_k q_{ik} \log p_{ik}, \qquad
        E_i = 1 - q_i(\arg\max_k p_{ik})

    Labels that models agree on are right more often than any single model is, if their mistakes are not the same. Where
    one training set or one architecture misleads all of them, the consensus is misled, too. Jiang et al.
    (arXiv:2106.13799) observed that disagreement between networks of one kind follows their error.

    Args:
        log_probabilities: For each model, of the same samples, ``(N, decisions, classes)``.
        voters: The models that vote, by default all. No model votes on itself.

    Returns:
        For each model the loss in nats and the share of wrong predictions, one number per sample; nothing for fewer
        than three voters, or where numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.scores import consensus_scores
        >>> agreeing, other = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.2, 0.8]]]).log()
        >>> scores = consensus_scores({"first": agreeing, "second": agreeing, "third": other})
        >>> {name: round(float(error), 2) for name, (_, error) in scores.items()}
        {'first': 0.45, 'second': 0.45, 'third': 0.9}
    """
    voters = log_probabilities.keys() if voters is None else voters
    if len(voters) < _MIN_VOTERS or len({values.shape for values in log_probabilities.values()}) > 1:
        return {}
    total, scores = sum(log_probabilities[name].double().exp() for name in voters), {}
    for name, values in log_probabilities.items():
        log_p, votes = values.double(), name in voters
        scores[name] = _expected(log_p, (total - votes * log_p.exp()).clamp(min=0) / (len(voters) - votes))
    return scores


def score_models(
    samples: Mapping[str, Samples], notes: Mapping[str, str]
) -> tuple[list[ModelScores], dict[str, Samples]]:
    """Score models by their samples.

    Args:
        samples: :func:`score_samples` of all batches, for each model, and its ``num_parameters`` and ``seconds``.
        notes: A note for each model, with those that failed; empty if there is nothing to note.

    Returns:
        A row for each model; and for each model and score one number per sample, with the score as their mean.
    """
    log_p = {name: scored["log_p"] for name, scored in samples.items() if "log_p" in scored}
    entropies = {name: torch.special.entr(values.exp()).sum(2).mean() for name, values in log_p.items()}
    undecided = [name for name, values in log_p.items() if entropies[name] > _UNDECIDED * math.log(values.shape[2])]
    notes = {name: note or "undecided (untrained?)" * (name in undecided) for name, note in notes.items()}
    consensus = consensus_scores(log_p, [name for name in log_p if not notes[name]])  # what has not learned has no vote
    models = [ModelScores(name, note=note) for name, note in notes.items() if name not in samples]
    by_sample: dict[str, Samples] = {}
    for name, scored in samples.items():
        scores = {"sensitivity": _ratio(squared_deviations(scored["rows"]), scored["rows"][:, 0])}
        scores |= dict(zip(("consensus_loss", "consensus_error"), consensus.get(name, ()), strict=False))
        scores |= {key: _ratio(scored[key], scored["num_labels"]) for key in ("loss", "error") if key in scored}
        numbers = {key: float(values.mean()) for key, values in scores.items()}
        numbers |= {key: float(scored[key]) for key in ("num_parameters", "seconds")}
        numbers["sensitivity_stderr"] = float(sensitivity_from_rows(scored["rows"]).stderr)
        models.append(ModelScores(name, note=notes[name], **numbers))
        by_sample[name] = scores
    return models, by_sample


def _ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Return numbers whose mean is Σ sums / Σ counts, and whose spread gives its standard error to first order."""
    ratio = sums.sum() / counts.sum()
    return ratio + (sums - ratio * counts) / counts.mean()


def _expected(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute loss and share of wrong decisions ``(N, ...)`` under labels ``(N, decisions, classes, ...)``."""
    # 0 · log 0 is 0: a class that neither the model nor the labels expect.
    loss = -(labels * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(2)
    error = 1 - labels.gather(2, log_p.argmax(2, keepdim=True)).squeeze(2)
    return loss.mean(1), error.mean(1)
