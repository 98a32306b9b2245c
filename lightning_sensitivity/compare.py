"""Compare models on the same samples under the same noise, without labels."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, check_argument, check_int, check_selectors
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.consensus import consensus_errors, log_probabilities
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import may_be_probabilities
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.call import ModelCall, device_of
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.perturbation import Noise, NoiseFunction, check_noise, noisy_outputs, submodule

ModelSource = nn.Module | Callable[[], nn.Module]


class ModelScores(NamedTuple):
    """Hold the scores of one model; nan where a score is not known.

    Attributes:
        name: The name that the user gave it.
        consensus_error: Expected share of wrong predictions, if labels were drawn from the joint prediction
            of all models; see :func:`~lightning_sensitivity.functional.consensus.consensus_errors`.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: Its standard error, over samples and noise.
        note: Why it failed, that it is undecided, or why there is no consensus.
    """

    name: str
    consensus_error: float = math.nan
    sensitivity: float = math.nan
    sensitivity_stderr: float = math.nan
    note: str = ""


class Comparison(list[ModelScores]):
    """List the scores of models. ``print`` shows a table; ``pandas.DataFrame`` takes the list as it is."""

    def __repr__(self) -> str:
        """Lay out the table."""
        rows = [[x if isinstance(x, str) else f"{x:.3g}" for x in model] for model in self]
        lines = [ModelScores._fields, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


Measured = tuple[ModelScores, Tensor]  # with log-probabilities (N, decisions, classes), or none of them


@dataclass(frozen=True)
class _Measurer:
    """Measure models on the same batches under the same noise; see :func:`compare_models`."""

    batches: Sequence[object]
    noise: NoiseFunction
    at: str | None
    num_draws: int
    seed: int
    task: str | None
    inputs: Selector | None
    outputs: Selector | None

    def measure_all(self, models: Mapping[str, ModelSource]) -> tuple[list[Measured], list[ModelScores]]:
        """Measure one model after another; those that fail get a note."""
        measured: list[Measured] = []
        failed: list[ModelScores] = []
        for name, source in models.items():
            try:
                measured.append(self._measure(name, source))
            except Exception as failure:
                # The user's own filters make an exception of a warning.
                if isinstance(failure, Warning) or len(failed) == len(models) - 1:
                    raise
                failed.append(ModelScores(name, note=f"failed: {type(failure).__name__}: {failure}"))
            gc.collect()  # modules contain reference cycles, and the next model needs their memory
        return measured, failed

    def _measure(self, name: str, source: ModelSource) -> Measured:
        """Measure a model on all samples, batch by batch."""
        model = source if isinstance(source, nn.Module) else source()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a function that makes a module, but it made {type(model).__name__}.")
        parts = [self._measure_batch(model, index, batch) for index, batch in enumerate(self.batches)]
        return _score(name, *map(torch.cat, zip(*parts, strict=True)))

    def _measure_batch(self, model: nn.Module, batch_idx: int, batch: object) -> tuple[Tensor, Tensor]:
        """Run a model on a batch, clean and with noise.

        Returns:
            The rows of sensitivity; and the log-probabilities ``(N, decisions, classes)``, empty without a task
            or with several positions in a sample.
        """
        with isolated(model) as run:
            call = ModelCall(model, _move_batch(model, clone_tensors(batch)), self.inputs, self.outputs)
            clean: Tensor = run(call)
            at = None if self.at is None else submodule(model, self.at)
            key = (self.seed, 0, 0, batch_idx)  # rank and loader are 0
            noisy = noisy_outputs(run, call, self.noise, key, self.num_draws, at)
            rows = sensitivity_rows(clean, noisy).cpu()
        if self.task is None:
            return rows, torch.zeros(0, 1, 1)
        log_p = log_probabilities(clean, self.task)
        if batch_idx == 0 and may_be_probabilities(clean):
            rank_zero_warn("All outputs of a model lie in [0, 1]. If they are not logits, set `outputs=`.")
        num_samples = len(log_p) if log_p.shape[3] == 1 else 0
        return rows, log_p[:num_samples, ..., 0].float().cpu()


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
    is_dict = isinstance(models, Mapping) and len(models) > 0
    valid = is_dict and all(isinstance(name, str) and callable(model) for name, model in models.items())
    check_argument("models", models, valid, "a dict of names (str) and models, or functions that make them")
    check_argument("task", task, task in (*TASKS, None), f"one of {', '.join(map(repr, TASKS))}, or None")
    check_argument("at", at, isinstance(at, str | None), "a submodule's name or None")
    check_int("num_draws", num_draws, 1)
    check_int("seed", seed, 0)
    check_selectors(inputs=inputs, outputs=outputs)
    function, batches = check_noise(noise), list(dataloader)
    check_argument("dataloader", dataloader, len(batches) > 0, "an iterable of batches")
    measurer = _Measurer(batches, function, at, num_draws, seed, task, inputs, outputs)
    measured, failed = measurer.measure_all(models)
    return Comparison(_judge(measured) + failed)


def _judge(measured: Sequence[Measured]) -> list[ModelScores]:
    """Judge models by the consensus of those that are decided, and sort them."""
    predictions = {scores.name: log_p for scores, log_p in measured if len(log_p)}
    voters = [scores.name for scores, log_p in measured if len(log_p) and not scores.note]
    errors = consensus_errors(predictions, voters)
    note = "" if errors or not predictions else "no consensus: it needs three models of the same classes"
    judged = [
        scores._replace(consensus_error=errors.get(scores.name, math.nan), note=scores.note or note)
        for scores, _ in measured
    ]
    return sorted(judged, key=lambda scores: (errors.get(scores.name, math.inf), scores.sensitivity))


def _score(name: str, rows: Tensor, log_p: Tensor) -> Measured:
    """Score a model by what its batches gave; see :meth:`_Measurer._measure_batch`."""
    estimate = sensitivity_from_rows(rows)
    if estimate.num_samples < max(2, len(rows)):
        got = f"{int(estimate.num_samples)} of {len(rows)}"
        raise ValueError(f"Expected two samples or more, all finite; got {got}.")
    for message, _ in diagnostics(estimate).values():
        rank_zero_warn(f"Model {name!r}: {message}")
    entropy = torch.special.entr(log_p.exp()).sum(2).mean()
    note = "undecided (untrained?)" if entropy > 0.95 * math.log(log_p.shape[2]) else ""
    scores = ModelScores(name, math.nan, float(estimate.value), float(estimate.stderr), note)
    return scores, log_p if len(log_p) == len(rows) else log_p[:0]


def _move_batch(model: nn.Module, batch: Any) -> Any:
    """Move a batch to the device of a model; the hooks of a LightningModule may also transform it."""
    device, module = device_of(model), original_module(model)
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, device, 0)
    return module.on_after_batch_transfer(batch, 0)
