"""Compare models on the same samples under the same noise, without labels."""

import copy
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, check_argument, check_int, check_selectors
from lightning_sensitivity.comparison import Comparison
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.reporting import warn
from lightning_sensitivity.functional.scores import (
    MeasuredModel,
    ModelScores,
    SampleScores,
    join_samples,
    score_models,
    score_samples,
)
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import are_in_unit_interval, are_probabilities, num_outputs
from lightning_sensitivity.model import ModelCall, Noise, isolated, select_targets
from lightning_sensitivity.model.forward import clone_tensors
from lightning_sensitivity.model.noise import NoiseFunction, check_noise, noisy_outputs, submodule

__all__ = ["Comparison", "ModelScores", "compare_models"]

ModelSource = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class _Settings:
    """Hold the settings that all models share; see :func:`compare_models`."""

    noise: NoiseFunction
    at: str | None
    num_draws: int
    seed: int
    task: str | None
    inputs: Selector | None
    outputs: Selector | None
    targets: Selector | None
    device: torch.device

    def __post_init__(self) -> None:
        check_argument("at", self.at, isinstance(self.at, str | None), "a submodule's name or None")
        tasks = ", ".join(map(repr, TASKS))
        check_argument("task", self.task, self.task in (*TASKS, None), f"one of {tasks} or None")
        check_int("num_draws", self.num_draws, 1)
        check_int("seed", self.seed, 0)
        check_selectors(inputs=self.inputs, outputs=self.outputs, targets=self.targets)


def compare_models(
    models: Mapping[str, ModelSource],
    dataloader: Iterable[Any],
    *,
    noise: Noise = 0.1,
    at: str | None = None,
    num_draws: int = 1,
    seed: int = 0,
    task: str | None = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
    targets: Selector | None = None,
    device: torch.device | str | None = None,
) -> Comparison:
    r"""Compare how well models generalize, without labels, on the same samples.

    All models get the same noise on the same samples, so differences between models are more precise than their
    values. See :class:`~lightning_sensitivity.compare.Comparison` for the result,
    :class:`~lightning_sensitivity.compare.ModelScores` for the scores, and ``examples/studies/comparing`` for what they
    are worth. Labels are not needed; with ``targets`` the table also shows the true loss and error. A model that
    fails gets a row that says why. Output sensitivity is defined as by Forouzesh, Salehi and Thiran (ICPR 2020,
    arXiv:2007.15378).

    Args:
        models: A dict of names and models. Each model is a module, which is copied and not changed, or a function that
            returns one, such as ``lambda: Classifier.load_from_checkpoint(path)``. With functions, only one model is in
            memory at a time.
        dataloader: Batches, with or without labels. All are kept in memory: a few thousand samples are enough.
        noise: σ of Gaussian noise in the units of the models' inputs, one number or one per channel, or a function
            ``(x, generator) -> x'``.
        at: Name of a submodule that all models have; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        seed: Seed of the noise.
        task: The kind of classification: ``"multiclass"``, ``"binary"``, ``"multilabel"``; None for sensitivity only.
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.model.select_outputs`.
        targets: The labels of a batch, for the true loss and error: a function ``batch -> tensor``.
        device: Where the models run; by default the accelerator, if the machine has one, else the CPU.

    Raises:
        MisconfigurationException: If an argument is invalid.
        RuntimeError: If no model could be scored.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import compare_models
        >>> _ = torch.manual_seed(0)
        >>> models = {"wide": torch.nn.Linear(20, 10), "small": torch.nn.Linear(20, 10)}
        >>> _ = torch.nn.init.normal_(models["small"].weight, std=0.01)
        >>> loader = torch.utils.data.DataLoader(torch.rand(500, 20), batch_size=100)
        >>> result = compare_models(models, loader, noise=0.1)
        >>> [model.name for model in result], result.ties()
        (['small', 'wide'], {'small': [], 'wide': []})
    """
    valid = isinstance(models, Mapping) and len(models) > 0 and all(map(callable, models.values()))
    check_argument("models", models, valid, "a dict of names and models, or of functions that make them")
    check_argument("dataloader", dataloader, isinstance(dataloader, Iterable), "an iterable of batches")
    device = _default_device() if device is None else torch.device(device)
    settings = _Settings(check_noise(noise), at, num_draws, seed, task, inputs, outputs, targets, device)
    measured, failures = _measure_models(models, list(dataloader), settings)
    scores, by_sample = score_models(measured)
    failed = [ModelScores(name, note=note) for name, note in failures.items()]
    return Comparison([*scores, *failed], by_sample)


def _default_device() -> torch.device:
    """Choose the accelerator that this machine has, else the CPU."""
    if hasattr(torch, "accelerator"):  # since torch 2.6
        # Unless we check that one is available, this is the accelerator that torch was compiled for.
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _measure_models(
    models: Mapping[str, ModelSource], batches: Sequence[Any], settings: _Settings
) -> tuple[dict[str, MeasuredModel], dict[str, str]]:
    """Measure one model after another.

    Returns:
        The measurements of each model; and for each model that failed, a note that says why.
    """
    measured: dict[str, MeasuredModel] = {}
    failures: dict[str, str] = {}
    first_traceback = ""  # as text: a traceback would keep the model in memory
    for place, (name, source) in enumerate(models.items(), 1):
        rank_zero_info(f"Comparing models, {place} of {len(models)}: {name}")
        try:
            measured[name] = _measure_model(source, batches, settings)
        except Exception as failure:
            first_traceback = first_traceback or traceback.format_exc()
            failures[name] = f"failed: {type(failure).__name__}: {failure}"
        gc.collect()  # modules contain reference cycles, and the next model needs their memory
    if not measured:
        raise RuntimeError(f"No model could be scored. The first failed with:\n{first_traceback}")
    for name, model in measured.items():
        for message in diagnostics(sensitivity_from_rows(model.samples.rows)).values():
            warn(f"Model {name!r}: {message}")
    return measured, failures


def _measure_model(source: ModelSource, batches: Sequence[Any], settings: _Settings) -> MeasuredModel:
    """Make or copy a model, and measure all samples, batch by batch."""
    model = copy.deepcopy(source) if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a function that makes a module, but it made {type(model).__name__}.")
    move_batch = _prepare_transfer(model)
    model.to(settings.device)
    parts: list[SampleScores] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for batch_idx, batch in enumerate(batches):
            moved = move_batch(clone_tensors(batch), settings.device)
            parts.append(_measure_batch(model, moved, batch_idx, settings))
    samples = join_samples(parts)
    num_failed = int((~samples.rows.isfinite().all(1)).sum())
    if num_failed:
        raise ValueError(f"Expected finite outputs, but {num_failed} samples gave nan or inf.")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return MeasuredModel(samples, num_parameters, time.perf_counter() - start)


def _prepare_transfer(model: nn.Module) -> Callable[[Any, torch.device], Any]:
    """Return a function that moves a batch to a device; that of a LightningModule may also transform the batch."""
    inner = original_module(model)
    if not isinstance(inner, LightningModule):
        return move_data_to_device
    inner.configure_model()
    return inner._apply_batch_transfer_handler


def _measure_batch(model: nn.Module, batch: Any, batch_idx: int, settings: _Settings) -> SampleScores:
    """Run a model on a batch, clean and with noise, and score each sample."""
    with isolated(model) as run:
        call = ModelCall(model, batch, settings.inputs, settings.outputs)
        clean: Tensor = run(call)
        if batch_idx == 0:
            _check_outputs(clean, settings.task)
        labels = _select_labels(model, batch, clean, settings)
        key = (settings.seed, 0, 0, batch_idx)  # rank and loader are 0
        at = None if settings.at is None else submodule(model, settings.at)
        noisy = noisy_outputs(run, call, settings.noise, [key], settings.num_draws, at)
        return score_samples(clean, noisy, labels, settings.task)


def _check_outputs(clean: Tensor, task: str | None) -> None:
    """Refuse outputs that cannot be logits of the task, and warn about outputs that may not be logits."""
    if task is None:
        return
    if task == "multiclass" and (are_probabilities(clean) or num_outputs(clean) == 1):
        raise ValueError("Expected logits of classes, got probabilities or one output (`task='binary'`).")
    if are_in_unit_interval(clean):
        warn("All outputs of a model lie in [0, 1]. If they are not logits, set `outputs=`.")


def _select_labels(model: nn.Module, batch: Any, clean: Tensor, settings: _Settings) -> Tensor | None:
    """Select the labels of a batch, if the user says where they are."""
    if settings.targets is None:
        return None
    labels = select_targets(model, batch, settings.targets)
    if settings.task is not None:
        TASKS[settings.task].check(clean, labels)
    return labels
