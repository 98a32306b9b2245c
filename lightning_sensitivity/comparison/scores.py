"""What a model's outputs say about each sample, and what follows from it about the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchmetrics.utilities import rank_zero_warn

from lightning_sensitivity.functional import sensitivity as F
from lightning_sensitivity.functional.pieces import wide_dtype
from lightning_sensitivity.functional.risk import distances
from lightning_sensitivity.functional.tasks import predictions, target_predictions

Samples = dict[str, Tensor]  # for each name one number a sample, or a row of them

_MIN_VOTERS = 3  # of two, each would be measured by the other alone
_UNDECIDED = 0.95  # share of the highest entropy from which on predictions are nearly uniform


@dataclass(frozen=True)
class ModelScores:
    """The row of one model. A number that has no meaning for it is nan.

    Attributes:
        name: What the user calls it.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: Its standard error, over samples and noise.
        loss_estimate: Equation 9, in nats.
        variance: C · E‖p(x + ε) − p(x)‖², the variance term of the Brier score; in a regression, of the squared error.
        entropy: Mean entropy of the predictions, in nats.
        confidence: Mean probability of the predicted class.
        flips: Share of predictions that the noise changes.
        consensus_loss: Expected loss, if labels were drawn from the mean prediction of the other models; see
            :func:`consensus_scores`.
        consensus_error: Expected share of wrong predictions, in the same way.
        num_parameters: How many parameters it has.
        seconds: Time of the whole pass, with loading.
        loss: The true loss: cross-entropy, in a regression the mean squared error.
        error: The true share of wrong predictions.
        note: That it is untrained, or why it failed.
    """

    name: str
    sensitivity: float = math.nan
    sensitivity_stderr: float = math.nan
    loss_estimate: float = math.nan
    variance: float = math.nan
    entropy: float = math.nan
    confidence: float = math.nan
    flips: float = math.nan
    consensus_loss: float = math.nan
    consensus_error: float = math.nan
    num_parameters: float = math.nan
    seconds: float = math.nan
    loss: float = math.nan
    error: float = math.nan
    note: str = ""


class Scored(NamedTuple):
    """What a pass over all samples gave.

    Attributes:
        samples: What :func:`score_samples` gives, over all batches, with ``power``, the mean square of
            what was perturbed in units of the noise's variance, and ``fingerprint``, which tells samples apart.
        num_parameters: How many parameters the model has.
        seconds: Of the whole pass.
    """

    samples: Samples
    num_parameters: int
    seconds: float


def score_samples(clean: Tensor, noisy: Iterable[Tensor], targets: Tensor | None = None, *, task: str) -> Samples:
    """Score the samples of a batch. What has no meaning in a task is left out.

    Args:
        clean: Outputs f(x), logits unless the task is a regression, ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs for each noise draw; one at a time is in memory.
        targets: Labels that fit the task, or None.
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`.

    Returns:
        ``rows``, as :func:`~lightning_sensitivity.functional.sensitivity.sensitivity_rows` gives them, means over the
        draws; ``distance``, ``flips``, ``entropy`` and ``confidence``, means; ``loss``
        and ``error``, sums over ``num_labels``; and ``log_p``, the log-probabilities
        ``(N, decisions, classes)``, where there is one position.
    """
    outputs = _by_position(clean)
    p = predictions(outputs, task)
    masked, chances = F.has_masked(clean), _in_classes(p, task)
    decides = task in ("binary", "multilabel") or (task == "multiclass" and p.shape[1] > 1)
    by_draw = []
    for draw in noisy:
        found = {"rows": F.sensitivity_rows(clean, draw, masked)}
        other = predictions(_by_position(draw), task)
        found["distance"] = distances(p, other, task).mean(1)
        if decides:
            is_flipped = _in_classes(other, task).argmax(2) != chances.argmax(2)
            found["flips"] = is_flipped.to(p.dtype).mean((1, 2))
        by_draw.append(found)
    scores = _means(by_draw)
    if decides:
        scores["entropy"] = torch.special.entr(chances).sum(2).mean((1, 2))
        scores["confidence"] = chances.amax(2).mean((1, 2))
    if decides and p.shape[2] == 1:
        scores["log_p"] = _log_probabilities(outputs, task)[..., 0].float()
    if targets is not None:
        y, counts = target_predictions(outputs, targets, task)
        y, counts = _by_position(y), counts[:, None].flatten(1)
        scores["num_labels"] = counts.sum(1)
        if decides:
            loss, error = _expected(_log_probabilities(outputs, task), _in_classes(y, task))
            scores |= {"loss": (loss * counts).sum(1), "error": (error * counts).sum(1)}
        else:
            scores["loss"] = (distances(p, y, task) * counts).sum(1)
    return scores


def joined(parts: Iterable[Samples]) -> Samples:
    """Samples of several batches, with what all of them have, on the CPU; of those that have any."""
    parts = [part for part in parts if part]
    names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in names}


def check_samples(name: str, scored: Scored, others: Mapping[str, Scored]) -> None:
    """Require samples of a model that can be compared, and warn of what makes its sensitivity doubtful.

    Raises:
        ValueError: If there are too few, an output is nan or inf, or others saw other samples, or in another order.
    """
    seen = scored.samples.get("fingerprint", torch.zeros(0))
    if len(seen) < 2:
        raise ValueError(f"Expected `dataloader` to give two samples or more, but got {len(seen)}.")
    estimate = F.sensitivity_from_rows(scored.samples["rows"])
    if estimate.num_non_finite:
        raise ValueError(f"Expected finite outputs, but {int(estimate.num_non_finite)} samples gave nan or inf.")
    for doubt in F.doubts(estimate).values():
        rank_zero_warn(f"Model {name!r}: {doubt}")
    for first, other in list(others.items())[:1]:
        expected = other.samples["fingerprint"]
        if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"Other inputs than those of {first!r} ({len(seen)} and {len(expected)} samples): the loader gives"
                " others each time, or the models transform their batches differently."
            )


def score_models(
    scored: Mapping[str, Scored], notes: Mapping[str, str], task: str
) -> tuple[list[ModelScores], dict[str, Samples]]:
    """From samples to models: a row for each, and for each model and score one number a sample, with it as the mean.

    Args:
        scored: What the pass of each model gave, on the same samples.
        notes: What else is known of each model, with those that failed.
        task: What the outputs are for.
    """
    estimates = {name: F.sensitivity_from_rows(each.samples["rows"]) for name, each in scored.items()}
    by_sample = {name: _by_sample(scored[name].samples, each.num_outputs, task) for name, each in estimates.items()}
    notes = {
        name: note or _doubt(scored[name].samples, estimates[name].num_outputs, task) for name, note in notes.items()
    }
    log_p = {name: each.samples["log_p"] for name, each in scored.items() if "log_p" in each.samples}
    voters = [name for name in log_p if not notes[name]]  # what has learned nothing has no say
    for name, (loss, error) in consensus_scores(log_p, voters).items():
        by_sample[name] |= {"consensus_loss": loss, "consensus_error": error}
    models = {name: ModelScores(name, note=note) for name, note in notes.items()}
    for name, (_, num_parameters, seconds) in scored.items():
        means = {score: float(values.mean()) for score, values in by_sample[name].items()}
        means["sensitivity_stderr"] = float(estimates[name].stderr)
        models[name] = ModelScores(name, note=notes[name], num_parameters=num_parameters, seconds=seconds, **means)
    return list(models.values()), by_sample


def consensus_scores(
    log_probabilities: Mapping[str, Tensor], voters: Collection[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Expected loss and error of each model, if labels were drawn from the mean prediction of the others.

    .. math::
        q_i = \operatorname{mean}_{j \ne i} p_j, \qquad
        L_i = -\sum_k q_{ik} \log p_{ik}, \qquad
        E_i = 1 - q_i(\arg\max_k p_{ik})

    Labels that models agree on are right more often than any single model is, if their mistakes are not the same. Where
    one training set or one architecture misleads all of them, the consensus is misled, too. That disagreement between
    networks of one kind follows their error was seen by Jiang et al. (`arXiv:2106.13799`_).

    Args:
        log_probabilities: Those of each model for the same samples, ``(N, decisions, classes)``.
        voters: The models that are asked, by default all; of each of them the others are.

    Returns:
        For each model the loss in nats and the share of wrong predictions, one number a sample; nothing for fewer than
        three voters, or where numbers of classes differ.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.comparison.scores import consensus_scores
        >>> agreeing, other = torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.2, 0.8]]]).log()
        >>> scores = consensus_scores({"first": agreeing, "second": agreeing, "third": other})
        >>> {name: round(float(error), 2) for name, (_, error) in scores.items()}
        {'first': 0.45, 'second': 0.45, 'third': 0.9}

    .. _arXiv:2106.13799: https://arxiv.org/abs/2106.13799
    """
    voters = log_probabilities.keys() if voters is None else voters
    if len(voters) < _MIN_VOTERS or len({values.shape for values in log_probabilities.values()}) > 1:
        return {}
    scores, total = {}, torch.zeros((), dtype=torch.float64)
    for name in voters:
        total = total + log_probabilities[name].double().exp()
    for name, values in log_probabilities.items():
        own = values.double()
        votes = (total - own.exp()).clamp(min=0) / (len(voters) - 1) if name in voters else total / len(voters)
        scores[name] = _expected(own, votes)
    return scores


def _by_sample(samples: Samples, num_outputs: int, task: str) -> Samples:
    rows, power = samples["rows"], samples["power"].mean()
    names = ("entropy", "confidence", "flips")
    scores = {name: samples[name] for name in names if name in samples}
    scores["sensitivity"] = _ratio(F.squared_deviations(rows), rows[:, 0])
    scores["variance"] = samples["distance"] * power
    if task == "multiclass" and num_outputs > 1:
        sensitivity = scores["sensitivity"].mean()
        estimate = F.loss_estimate(sensitivity, power, 1.0, num_outputs)  # the power is in units of the noise already
        # Half the relative spread of S, to first order.
        scores["loss_estimate"] = estimate * (1 + (scores["sensitivity"] / sensitivity).nan_to_num(1.0)) / 2
    scores |= {name: _ratio(samples[name], samples["num_labels"]) for name in ("loss", "error") if name in samples}
    return {name: values for name, values in scores.items() if bool(values.mean().isfinite())}


def _ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Numbers whose mean is Σ sums / Σ counts, and whose spread is that of its error, to first order."""
    ratio = sums.sum() / counts.sum()
    return ratio + (sums - ratio * counts) / counts.mean()


def _doubt(samples: Samples, num_outputs: int, task: str) -> str:
    """What the predictions themselves say of a model that has learned nothing."""
    num_classes = num_outputs if task == "multiclass" else 2  # of each label
    is_undecided = "entropy" in samples and samples["entropy"].mean() > _UNDECIDED * math.log(num_classes)
    return "undecided (untrained?)" if is_undecided else ""


def _expected(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and share of wrong decisions ``(N, ...)``, if labels are drawn from ``(N, decisions, classes, ...)``."""
    # 0 · log 0 is 0: a class that neither the model nor the labels expect.
    loss = -(labels * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(2)
    error = 1 - labels.gather(2, log_p.argmax(2, keepdim=True)).squeeze(2)
    return loss.mean(1), error.mean(1)


def _means(scores: list[Samples]) -> Samples:
    return {name: torch.stack([each[name] for each in scores]).mean(0) for name in scores[0]} if scores else {}


def _by_position(outputs: Tensor) -> Tensor:
    """Outputs ``(N, K, ...)`` or ``(N,)`` as ``(N, K, positions)``, in the widest type."""
    return F.columns(outputs).to(wide_dtype(outputs.device))


def _in_classes(p: Tensor, task: str) -> Tensor:
    """Probabilities as ``(N, decisions, classes, positions)``: one decision, or K between no and yes."""
    return p[:, None] if task == "multiclass" else torch.stack([1 - p, p], 2)


def _log_probabilities(outputs: Tensor, task: str) -> Tensor:
    """The logarithm of :func:`_in_classes`, from logits."""
    if task == "multiclass":
        return outputs.log_softmax(1)[:, None]
    return torch.stack([logsigmoid(-outputs), logsigmoid(outputs)], 2)
