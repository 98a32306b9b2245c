"""Scores of models on the same samples: by their outputs, and by votes of all models."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from lightning_sensitivity.functional.sensitivity import sensitivity_from_rows, sensitivity_rows, squared_deviations
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import by_position, wide_dtype

MIN_VOTERS = 3  # of two, each would be judged only by the other

_UNDECIDED = 0.95  # share of the maximal entropy; predictions of untrained models come near the maximum
_MAX_CONFIDENCE, _MIN_RATIO = 0.995, 1.2  # of a vote; of its confidence to that of 1 / K
_MIN_LOG_P = -1e9  # of classes that a model rules out, instead of -inf
_MIN_LOG_VOTE = math.log(1e-12)  # no vote can rule out a class
_MIN_SCALE, _MAX_SCALE = 0.05, 20.0  # of logits
_NUM_BISECTIONS = 20


@dataclass(frozen=True)
class ModelScores:
    """Hold the scores of one model. Scores that have no meaning for the model are nan.

    Attributes:
        name: The name that the user gave it.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: Its standard error, over samples and noise.
        consensus_error: Expected share of wrong predictions, if labels were drawn from a joint prediction of all
            models; see ``functional.scores.consensus_scores``.
        consensus_loss: Mean loss if labels were what the other models predict.
        loss: The true cross-entropy.
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


@dataclass(frozen=True)
class SampleScores:
    """Hold the measurements of one model for each sample. Those that have no meaning for the outputs are None.

    Attributes:
        rows: From :func:`~lightning_sensitivity.functional.sensitivity.sensitivity_rows`.
        log_p: Log-probabilities ``(N, decisions, classes)``, with a task and one position per sample.
        loss: With labels, the sum of the losses of a sample's labels.
        error: With labels, how many labels the model predicts incorrectly.
        num_labels: With labels, how many labels there are.
    """

    rows: Tensor
    log_p: Tensor | None = None
    loss: Tensor | None = None
    error: Tensor | None = None
    num_labels: Tensor | None = None


@dataclass(frozen=True)
class MeasuredModel:
    """Hold the measurements of one model.

    Attributes:
        samples: The measurements of each sample.
        num_parameters: How many parameters the model has.
        seconds: Time of all passes.
    """

    samples: SampleScores
    num_parameters: int
    seconds: float


def score_samples(clean: Tensor, noisy: Iterable[Tensor], targets: Tensor | None, task: str | None) -> SampleScores:
    """Score the samples of a batch.

    Args:
        clean: Outputs f(x), logits ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs for each noise draw; one at a time is in memory.
        targets: Labels that fit the task, or None.
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`, or None for sensitivity only.
    """
    rows = sensitivity_rows(clean, noisy)
    if task is None:
        return SampleScores(rows)
    log_p = _log_probabilities(clean, task)
    kept = log_p[..., 0].float() if log_p.shape[3] == 1 else None
    if targets is None:
        return SampleScores(rows, kept)
    kind = TASKS[task]
    y, counts = kind.target_probabilities(kind.probabilities(clean), targets)
    y = by_position(y).to(log_p)
    counts = counts[:, None].flatten(1)
    labels = y[:, None] if task == "multiclass" else torch.stack([1 - y, y], 2)
    loss = (expected_losses(log_p, labels) * counts).sum(1)
    error = (expected_errors(log_p, labels) * counts).sum(1)
    return SampleScores(rows, kept, loss, error, counts.sum(1))


def join_samples(parts: Sequence[SampleScores]) -> SampleScores:
    """Join the scores of batches, on the CPU.

    Args:
        parts: The scores of each batch.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    if sum(len(part.rows) for part in parts) < 2:
        raise ValueError("Expected `dataloader` to give two samples or more.")
    joined: dict[str, Tensor] = {}
    for field in fields(SampleScores):
        values = [getattr(part, field.name) for part in parts]
        if all(value is not None for value in values):
            joined[field.name] = torch.cat([value.cpu() for value in values])
    return SampleScores(**joined)


def consensus_scores(
    log_probabilities: Mapping[str, Tensor], voters: Collection[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Compute the expected loss and error of each model if labels were drawn from what all models predict.

    For the error, all models vote with their predictions, rescaled so that a model is as confident as the others agree
    with it (see :func:`calibrated_votes`). The joint prediction is the product of the votes. For the loss, the labels
    are the classes that the other models predict.

    .. math::
        q \propto \prod_j v_j, \qquad
        E_i = 1 - q(\arg\max_k p_{ik}), \qquad
        L_i = -\operatorname{mean}_{j \ne i} \log p_i(\arg\max_k p_{jk})

    Both rank models. The error is usually too low, since models agree on many of their mistakes. If one training set or
    one architecture misleads most models, the joint prediction is misled, too.

    Args:
        log_probabilities: For each model, for the same samples, ``(N, decisions, classes)``.
        voters: The models that vote, by default all.

    Returns:
        For each model the loss in nats and the share of wrong predictions, one number per sample. Empty if there are
        fewer than three voters, or if the numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.scores import consensus_scores
        >>> first = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]], [[0.6, 0.4]]]).log()
        >>> other = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]], [[0.4, 0.6]]]).log()
        >>> scores = consensus_scores({"first": first, "second": first, "other": other})
        >>> {name: round(float(error.mean()), 2) for name, (_, error) in scores.items()}
        {'first': 0.09, 'second': 0.09, 'other': 0.26}
    """
    voters = log_probabilities.keys() if voters is None else voters
    shapes = {values.shape for values in log_probabilities.values()}
    if len(voters) < MIN_VOTERS or len(shapes) > 1:
        return {}
    finite = {name: log_p.double().clamp(min=_MIN_LOG_P) for name, log_p in log_probabilities.items()}
    voting = {name: log_p for name, log_p in finite.items() if name in voters}
    joint = _sum(calibrated_votes(voting).values()).softmax(2)
    counts = _sum(map(_predictions, voting.values()))
    scores = {}
    for name, log_p in finite.items():
        of_others, num_others = counts, len(voting)
        if name in voting:
            of_others, num_others = counts - _predictions(log_p), len(voting) - 1
        scores[name] = (expected_losses(log_p, of_others / num_others), expected_errors(log_p, joint))
    return scores


def calibrated_votes(log_probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Make each model as confident as the others agree with it, so that none gains by over- or underconfidence.

    :math:`v_j \propto p_j^{b_j}`, with :math:`b_j` such that the mean of :math:`\max_k v_{jk}` is the share of the
    other models that predict the same class.

    Args:
        log_probabilities: For each model, for the same samples, ``(N, decisions, classes)``; finite.

    Returns:
        The logarithms of the votes, of the same shape.
    """
    counts = _sum(map(_predictions, log_probabilities.values()))
    votes = {}
    for name, log_p in log_probabilities.items():
        num_agreeing = counts.gather(2, log_p.argmax(2, keepdim=True)) - 1
        agreement = float(num_agreeing.double().mean()) / (len(log_probabilities) - 1)
        confidence = min(max(agreement, _MIN_RATIO / log_p.shape[2]), _MAX_CONFIDENCE)
        votes[name] = _with_confidence(log_p, confidence).clamp(min=_MIN_LOG_VOTE)
    return votes


def _predictions(log_p: Tensor) -> Tensor:
    """Return 1 for the predicted class, 0 for the others."""
    return one_hot(log_p.argmax(2), log_p.shape[2])


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Add one or more tensors of one shape."""
    return reduce(torch.add, tensors)


def _with_confidence(log_p: Tensor, confidence: float) -> Tensor:
    """Sharpen or flatten predictions, by bisection, until the mean of their largest probabilities is as given."""
    low, high = _MIN_SCALE, _MAX_SCALE
    for _ in range(_NUM_BISECTIONS):
        scale = math.sqrt(low * high)
        if float((scale * log_p).softmax(2).amax(2).mean()) < confidence:
            low = scale
        else:
            high = scale
    return (math.sqrt(low * high) * log_p).log_softmax(2)


def score_models(models: Mapping[str, MeasuredModel]) -> tuple[list[ModelScores], dict[str, dict[str, Tensor]]]:
    """Score models by their measurements on the same samples.

    Args:
        models: The measurements of each model.

    Returns:
        A row for each model; and for each model and score, one number per sample, whose mean is the score.
    """
    log_p = {name: model.samples.log_p for name, model in models.items() if model.samples.log_p is not None}
    undecided = {name for name, values in log_p.items() if _is_undecided(values)}
    consensus = consensus_scores(log_p, log_p.keys() - undecided)  # models that have not learned anything get no vote
    rows: list[ModelScores] = []
    by_sample: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        scores = _scores_by_sample(model.samples)
        if name in consensus:
            scores["consensus_loss"], scores["consensus_error"] = consensus[name]
        by_sample[name] = scores
        row = ModelScores(
            name=name,
            sensitivity_stderr=float(sensitivity_from_rows(model.samples.rows).stderr),
            num_parameters=model.num_parameters,
            seconds=model.seconds,
            note="undecided (untrained?)" if name in undecided else "",
            **{score: float(values.mean()) for score, values in scores.items()},
        )
        rows.append(row)
    return rows, by_sample


def _scores_by_sample(samples: SampleScores) -> dict[str, Tensor]:
    """Compute the scores that need no other model."""
    scores = {"sensitivity": _ratio(squared_deviations(samples.rows), samples.rows[:, 0])}
    if samples.loss is not None and samples.error is not None and samples.num_labels is not None:
        scores["loss"] = _ratio(samples.loss, samples.num_labels)
        scores["error"] = _ratio(samples.error, samples.num_labels)
    return scores


def _is_undecided(log_p: Tensor) -> bool:
    """Check whether predictions are nearly uniform."""
    entropy = torch.special.entr(log_p.exp()).sum(2).mean()
    return float(entropy) > _UNDECIDED * math.log(log_p.shape[2])


def _log_probabilities(clean: Tensor, task: str) -> Tensor:
    """Turn logits into log-probabilities ``(N, decisions, classes, positions)``: one decision, or K yes-no ones."""
    outputs = by_position(clean).to(wide_dtype(clean.device))
    if task == "multiclass":
        return outputs.log_softmax(1)[:, None]
    return torch.stack([logsigmoid(-outputs), logsigmoid(outputs)], 2)


def _ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Return numbers whose mean is Σ sums / Σ counts, and whose spread gives its standard error to first order."""
    ratio = sums.sum() / counts.sum()
    return ratio + (sums - ratio * counts) / counts.mean()


def expected_losses(log_p: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of each sample, the mean over its decisions, if labels have the given probabilities.

    Args:
        log_p: Log-probabilities of a model, ``(N, decisions, classes, ...)``.
        labels: Probabilities of the labels, of the same shape.
    """
    # 0 · log 0 is 0, for a class that neither the model nor the labels expect.
    return -(labels * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(2).mean(1)


def expected_errors(log_p: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of wrong decisions of each sample, if labels have the given probabilities."""
    return 1 - labels.gather(2, log_p.argmax(2, keepdim=True)).squeeze(2).mean(1)
