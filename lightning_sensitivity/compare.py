"""Compare models on the same samples under the same noise, without labels."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, check_argument, check_int, check_selectors
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import are_in_unit_interval, are_probabilities, by_position, wide_dtype
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.call import ModelCall, select_targets
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.noise import Noise, NoiseFunction, check_noise, noisy_outputs, submodule

ModelSource = nn.Module | Callable[[], nn.Module]


class ModelScores(NamedTuple):
    """Hold the scores of one model; nan where a score is not known.

    Attributes:
        name: The name that the user gave it.
        consensus_error: Expected share of wrong predictions, if labels were drawn from the joint prediction
            of all models; see :func:`~lightning_sensitivity.compare.consensus_errors`.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: Its standard error, over samples and noise.
        loss: The true cross-entropy, with ``targets``.
        error: The true share of wrong predictions, with ``targets``.
        note: Why it failed, or that it is undecided.
    """

    name: str
    consensus_error: float = math.nan
    sensitivity: float = math.nan
    sensitivity_stderr: float = math.nan
    loss: float = math.nan
    error: float = math.nan
    note: str = ""


class Comparison(list[ModelScores]):
    """List the scores of models. ``print`` shows a table; ``pandas.DataFrame`` takes the list as it is."""

    def __repr__(self) -> str:
        """Lay out the table."""
        lines: list[Sequence[str]] = [ModelScores._fields]
        for model in self:
            lines.append([value if isinstance(value, str) else f"{value:.3g}" for value in model])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


Measured = tuple[ModelScores, Tensor]  # with log-probabilities (N, decisions, classes), or none of them


class _Settings(NamedTuple):
    """Hold the settings that all models share; see :func:`compare_models`."""

    noise: NoiseFunction
    at: str | None
    num_draws: int
    seed: int
    task: str | None
    inputs: Selector | None
    outputs: Selector | None
    targets: Selector | None


def compare_models(
    models: Mapping[str, ModelSource],
    dataloader: Iterable[object],
    *,
    noise: Noise = 0.1,
    at: str | None = None,
    num_draws: int = 1,
    seed: int = 0,
    task: str | None = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
    targets: Selector | None = None,
) -> Comparison:
    r"""Compare how well models generalize, without labels, on the same samples.

    All models get the same noise on the same samples. The result is a list of
    :class:`~lightning_sensitivity.ModelScores`, sorted by ``consensus_error``, or by ``sensitivity`` if there
    is none: a consensus needs a ``task``, one prediction per sample, and three models or more that have
    learned something and predict the same classes. Models that fail come last, with a note that says why. See
    ``examples/studies/comparing`` for what the scores are worth. Output sensitivity is defined as by
    Forouzesh, Salehi and Thiran (ICPR 2020, arXiv:2007.15378).

    Args:
        models: A dict of names and models. Each model is a module, which is left as it was, or a function
            that returns one, such as ``lambda: Classifier.load_from_checkpoint(path)``. With functions, only
            one model is in memory at a time. Each model runs on its own device.
        dataloader: Batches, with or without labels, all kept in memory: a few thousand samples are enough.
        noise: σ of Gaussian noise in the units of the models' inputs, one number or one per channel, or a
            function ``(x, generator) -> x'``.
        at: Name of a submodule that all models have; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        seed: Seed of the noise.
        task: The kind of classification: ``"multiclass"``, ``"binary"``, ``"multilabel"``; None for
            sensitivity only.
        inputs: A function ``batch -> arguments``; by default see
            :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default
            :func:`~lightning_sensitivity.model.select_outputs`.
        targets: The labels of a batch, for the true loss and error: a function ``batch -> tensor``.

    Raises:
        MisconfigurationException: If an argument is invalid.
        Exception: If all models fail, what the last one raised.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import compare_models
        >>> _ = torch.manual_seed(0)
        >>> models = {"wide": torch.nn.Linear(20, 10), "small": torch.nn.Linear(20, 10)}
        >>> _ = torch.nn.init.normal_(models["small"].weight, std=0.01)
        >>> loader = torch.utils.data.DataLoader(torch.rand(500, 20), batch_size=100)
        >>> [model.name for model in compare_models(models, loader, noise=0.1)]
        ['small', 'wide']
    """
    is_named = isinstance(models, Mapping) and len(models) > 0 and all(isinstance(name, str) for name in models)
    valid = is_named and all(map(callable, models.values()))
    check_argument("models", models, valid, "a dict of names (str) and models, or functions that make them")
    check_argument("task", task, task in (*TASKS, None), f"one of {', '.join(map(repr, TASKS))}, or None")
    check_argument("at", at, isinstance(at, str | None), "a submodule's name or None")
    check_int("num_draws", num_draws, 1)
    check_int("seed", seed, 0)
    check_selectors(inputs=inputs, outputs=outputs, targets=targets)
    settings = _Settings(check_noise(noise), at, num_draws, seed, task, inputs, outputs, targets)
    batches = list(dataloader)
    check_argument("dataloader", dataloader, len(batches) > 0, "an iterable of batches")
    measured, failed = _measure_models(models, batches, settings)
    return Comparison(_judge(measured) + failed)


def _measure_models(
    models: Mapping[str, ModelSource], batches: Sequence[object], settings: _Settings
) -> tuple[list[Measured], list[ModelScores]]:
    """Measure one model after another; those that fail get a note."""
    measured: list[Measured] = []
    failed: list[ModelScores] = []
    for name, source in models.items():
        try:
            measured.append(_measure_model(name, source, batches, settings))
        except Exception as failure:
            # The user's own filters make an exception of a warning.
            if isinstance(failure, Warning) or len(failed) == len(models) - 1:
                raise
            failed.append(ModelScores(name, note=f"failed: {type(failure).__name__}: {failure}"))
        gc.collect()  # modules contain reference cycles, and the next model needs their memory
    return measured, failed


def _judge(measured: Sequence[Measured]) -> list[ModelScores]:
    """Judge models by the consensus of those that are decided, and sort them."""
    predictions = {scores.name: log_p for scores, log_p in measured if len(log_p)}
    voters = [scores.name for scores, log_p in measured if len(log_p) and not scores.note]
    errors = consensus_errors(predictions, voters)
    judged = [scores._replace(consensus_error=errors.get(scores.name, math.nan)) for scores, _ in measured]
    return sorted(judged, key=lambda scores: (errors.get(scores.name, math.inf), scores.sensitivity))


def _measure_model(name: str, source: ModelSource, batches: Sequence[object], settings: _Settings) -> Measured:
    """Measure a model on all samples, batch by batch."""
    model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a function that makes a module, but it made {type(model).__name__}.")
    parts = [_measure_batch(model, batch, batch_idx, settings) for batch_idx, batch in enumerate(batches)]
    return _score(name, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _score(name: str, rows: Tensor, log_p: Tensor, label_sums: Tensor) -> Measured:
    """Score a model by what its batches gave; see :func:`_measure_batch`."""
    estimate = sensitivity_from_rows(rows)
    if estimate.num_samples < max(2, len(rows)):
        got = f"{int(estimate.num_samples)} of {len(rows)}"
        raise ValueError(f"Expected two samples or more, all finite; got {got}.")
    for message in diagnostics(estimate).values():
        rank_zero_warn(f"Model {name!r}: {message}")
    value, stderr = float(estimate.value), float(estimate.stderr)
    loss, error, _ = (label_sums.sum(0) / label_sums[:, 2].sum()).tolist()  # nan without labels
    entropy = torch.special.entr(log_p.exp()).sum(2).mean()
    note = "undecided (untrained?)" if entropy > 0.95 * math.log(log_p.shape[2]) else ""
    scores = ModelScores(name, sensitivity=value, sensitivity_stderr=stderr, loss=loss, error=error, note=note)
    return scores, log_p if len(log_p) == len(rows) else log_p[:0]


def _measure_batch(model: nn.Module, batch: object, batch_idx: int, settings: _Settings) -> tuple[Tensor, ...]:
    """Run a model on a batch, clean and with noise.

    Returns:
        The rows of sensitivity; the log-probabilities ``(N, decisions, classes)``, empty without a task or
        with several positions in a sample; and the sums over labels, in one row.
    """
    batch = _move_batch(model, clone_tensors(batch))
    with isolated(model) as run:
        call = ModelCall(model, batch, settings.inputs, settings.outputs)
        clean: Tensor = run(call)
        at = None if settings.at is None else submodule(model, settings.at)
        # In the key of the noise, rank and loader are 0.
        noisy = noisy_outputs(run, call, settings.noise, [(settings.seed, 0, 0, batch_idx)], settings.num_draws, at)
        rows = sensitivity_rows(clean, noisy).cpu()
    label_sums = torch.zeros(1, 3, dtype=torch.float64)
    if settings.task is None:
        return rows, torch.zeros(0, 1, 1), label_sums
    log_p = _log_probabilities(clean, settings.task)
    if batch_idx == 0 and are_in_unit_interval(clean):
        rank_zero_warn("All outputs of a model lie in [0, 1]. If they are not logits, set `outputs=`.")
    if settings.targets is not None:
        label_sums = _sum_labels(log_p, clean, select_targets(model, batch, settings.targets), settings.task)
    if log_p.shape[3] > 1:
        log_p = log_p[:0]
    return rows, log_p[..., 0].float().cpu(), label_sums


def _move_batch(model: nn.Module, batch: Any) -> Any:
    """Move a batch to the device of a model; the hooks of a LightningModule may also transform it."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    module = original_module(model)
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, device, 0)
    return module.on_after_batch_transfer(batch, 0)


def _log_probabilities(clean: Tensor, task: str) -> Tensor:
    """Turn logits into log-probabilities ``(N, decisions, classes, positions)``: one decision or K."""
    if task == "multiclass" and (are_probabilities(clean) or by_position(clean).shape[1] == 1):
        raise ValueError("Expected logits of classes, got probabilities or one output (`task='binary'`).")
    logits = by_position(clean).to(wide_dtype(clean.device))
    if task == "multiclass":
        return logits.log_softmax(1)[:, None]
    return torch.stack([torch.zeros_like(logits), logits], 2).log_softmax(2)


def _sum_labels(log_p: Tensor, clean: Tensor, targets: Tensor, task: str) -> Tensor:
    """Sum up the losses and wrong predictions of a batch, and count its labels: ``(1, 3)``."""
    kind = TASKS[task]
    kind.check(clean, targets)
    y, counts = kind.target_probabilities(kind.probabilities(clean), targets)
    y = by_position(y).to(log_p)
    labels = y[:, None] if task == "multiclass" else torch.stack([1 - y, y], 2)
    losses = -(labels * log_p).sum(2).mean(1)
    errors = _expected_errors(log_p, labels)
    of_each = torch.stack([losses, errors, torch.ones_like(losses)]) * counts.reshape(losses.shape)
    return of_each.sum((1, 2)).cpu().double()[None]


def _expected_errors(log_p: Tensor, labels: Tensor) -> Tensor:
    """Compute the share of wrong decisions of each sample, if labels have the given probabilities."""
    return 1 - labels.gather(2, log_p.argmax(2, keepdim=True)).squeeze(2).mean(1)


def consensus_errors(log_probabilities: Mapping[str, Tensor], voters: Iterable[str]) -> dict[str, float]:
    r"""Compute the expected error of each model if labels were drawn from the joint prediction of all models.

    The joint prediction is the product of the votes (see :func:`~lightning_sensitivity.compare.calibrated_votes`):

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
        >>> from lightning_sensitivity.compare import consensus_errors
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
        votes.append(_with_confidence(log_p, confidence).clamp(min=math.log(1e-12)))  # no vote rules out a class
    return votes


def _with_confidence(log_p: Tensor, confidence: float) -> Tensor:
    """Sharpen or flatten predictions, by bisection, until their mean largest probability is as given."""
    low, high = 0.05, 20.0
    for _ in range(20):
        scale = math.sqrt(low * high)
        is_unsure = float((scale * log_p).softmax(2).amax(2).mean()) < confidence
        low, high = (scale, high) if is_unsure else (low, scale)
    return (math.sqrt(low * high) * log_p).log_softmax(2)
