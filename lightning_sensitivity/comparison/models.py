"""Compare models on the same samples under the same noise, without labels."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity.comparison.scores import Samples, Scored, check_samples, joined, score_models, score_samples
from lightning_sensitivity.comparison.table import Comparison
from lightning_sensitivity.functional.pieces import wide_dtype
from lightning_sensitivity.functional.tasks import TASKS, check_logits, check_task
from lightning_sensitivity.models import Inputs, Options, Passes, Probe, Selector, prepare_call, select_targets
from lightning_sensitivity.models.call import Call, uncompiled
from lightning_sensitivity.models.options import DEFAULT_NOISE_STD, check_argument
from lightning_sensitivity.perturbations.noise import AnyPerturbation, power

QUIET: dict[str, Any] = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
Model = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]
_MONITORS = ("RiskMonitor", "SensitivityMonitor")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def compare_models(
    models: Mapping[str, Model],
    dataloader: Any,
    noise_std: float | Sequence[float] = DEFAULT_NOISE_STD,
    perturbation: AnyPerturbation | None = None,
    at: str | None = None,
    num_draws: int = 1,
    seed: int = 0,
    model_class: type[LightningModule] | None = None,
    task: str = "multiclass",
    inputs: Inputs = None,
    outputs: Selector = None,
    targets: Selector = None,
    trainer: Trainer | None = None,
) -> Comparison:
    r"""Compare how well models generalize, without labels: trained or not, in one pass over the same samples each.

    All models get the same noise on the same samples, so that differences are sharper than values. S and the loss
    estimate are those of Forouzesh, Salehi and Thiran (ICPR 2020, `arXiv:2007.15378`_, Section 3 and Equation 9);
    :class:`~lightning_sensitivity.comparison.ModelScores` has all scores, ``examples/comparing_models`` their worth.

    Labels are not needed. Where the loader has them, the table shows the true loss and error, too, and how well each
    score orders the models (Kendall's τ). A model that fails becomes a row that says why, and does not lose the others.

    Args:
        models: Names, and for each of them a module (which is copied, and not touched), the path of a Lightning
            checkpoint, or a function that makes the module. Of paths and functions, one model at a time is in memory.
        dataloader: A loader that gives the same samples whenever it is iterated, with or without labels, or a
            LightningDataModule with one such validation loader. One that shuffles is seeded: all models see one order.
        noise_std: σ of the noise in the units that the models receive, one number or one per channel.
        perturbation: What takes the place of the noise, as in :class:`~lightning_sensitivity.SensitivityMonitor`. Loss
            estimate and variance need its second moment.
        at: Name of a submodule, which all models have, whose output is perturbed instead of the input.
        num_draws: Noise draws per sample, with one forward pass each.
        seed: Seed of the noise.
        model_class: The class of the modules in checkpoints. Those of a LightningCLI with several classes know it.
        task: What the outputs are for: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        inputs: What to perturb, as there.
        outputs: Which outputs to compare, as there.
        targets: Where the labels are in a batch. By default where they would be in a training batch; if there is
            nothing, or what does not fit the task, there are no labels. A function may return None for that.
        trainer: One of its own, in a single process, which runs the models. By default it writes nothing.

    Returns:
        The comparison: print it, ``plot()`` it, write it with ``to_csv(path)``, or look into it.

    Raises:
        MisconfigurationException: If an argument is not one of the above.
        RuntimeError: If no model could be scored.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import compare_models
        >>> _ = torch.manual_seed(0)
        >>> models = {"wide": torch.nn.Linear(20, 10), "small": torch.nn.Linear(20, 10)}
        >>> _ = torch.nn.init.normal_(models["small"].weight, std=0.01)
        >>> loader = torch.utils.data.DataLoader(torch.rand(500, 20), batch_size=100)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> result = compare_models(models, loader, noise_std=0.1, trainer=trainer)
        >>> [model.name for model in result], result.ties()
        (['small', 'wide'], {'small': [], 'wide': []})

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    options = Options(noise_std, perturbation, at, num_draws, None, seed, inputs, outputs, targets)
    _check_arguments(models, at, task, trainer)
    trainer = Trainer(**QUIET) if trainer is None else trainer
    scored: dict[str, Scored] = {}
    notes: dict[str, str] = {}
    first_failure = ""
    for place, (name, model) in enumerate(models.items(), 1):
        rank_zero_info(f"Comparing models, {place} of {len(models)}: {name}")
        try:
            with _same_order(dataloader, seed):
                start = time.perf_counter()
                module, note = _built(model, model_class)
                candidate = _Candidate(options, task, module)
                del module
                try:
                    trainer.validate(candidate, dataloader, verbose=False)
                    found = candidate.scored(time.perf_counter() - start)
                finally:
                    candidate.release()
            check_samples(name, found, scored)
            scored[name], notes[name] = found, note
        except Exception as failure:
            first_failure = first_failure or traceback.format_exc()  # as text: it would keep the model in memory
            notes[name] = f"failed: {type(failure).__name__}: {failure}"
        gc.collect()  # modules refer to themselves in circles, and the next one needs their memory
    if not scored:
        raise RuntimeError(f"No model could be scored. The first failed with:\n{first_failure}")
    return Comparison(*score_models(scored, notes, task))


class _Candidate(LightningModule):
    """Runs a model in the Trainer's validation loop, without a step or a label of its own, and scores every sample."""

    def __init__(self, options: Options, task: str, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a function that returns a module, but got {type(model).__name__}.")
        self._options, self._task, self.model = options, task, model
        self._perturbation, self._passes = options.chosen_perturbation(), Passes(model)
        self._batches: list[Samples] = []
        self._has_labels = True
        if isinstance(inner := uncompiled(model), LightningModule):
            for hook in _BATCH_HOOKS:
                setattr(self, hook, getattr(inner, hook))

    def release(self) -> None:
        """Let go of the model: the Trainer keeps its last module, which is not to keep the model in memory."""
        del self.model, self._passes
        self._batches = []
        for hook in _BATCH_HOOKS:
            self.__dict__.pop(hook, None)

    def configure_model(self) -> None:
        if isinstance(inner := uncompiled(self.model), LightningModule):
            inner.configure_model()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if len(self.trainer.num_val_batches) > 1:
            raise MisconfigurationException("`dataloader` should be one loader, got several.")
        call = prepare_call(self.model, batch, self._options.inputs, not self._options.at)
        probe = Probe(self._passes, self.model, call, self._options.outputs, batch)
        powers: list[tuple[Tensor | float, int]] = []  # Σ x² in units of the noise's variance, and number of elements

        def note_power(x: Tensor) -> None:
            squares = power(self._perturbation, x)
            powers.append((math.nan if squares is None else squares, x.numel()))

        at = self._options.at
        noisy_outputs = partial(
            probe.noisy_outputs,
            self._perturbation,
            (self._options.seed, 0, 0, batch_idx),
            at=uncompiled(self.model).get_submodule(str(at)) if at else None,
            note=note_power,
        )
        with self._passes.measuring():
            clean: Tensor = probe.outputs()
            if batch_idx == 0:
                check_logits(clean, self._task)
            noisy = map(noisy_outputs, range(self._options.num_draws))
            samples = score_samples(clean, noisy, self._labels(batch, clean), task=self._task)
        squares, counts = map(sum, zip(*powers, strict=True))  # of several inputs
        mean_power = torch.as_tensor(squares / counts, device=clean.device).expand(len(clean))  # the C of Equation 9
        self._batches.append(samples | {"power": mean_power, "fingerprint": _fingerprints(call, clean)})

    def scored(self, seconds: float) -> Scored:
        """What the pass has given."""
        num_parameters = sum(each.numel() for each in self.model.parameters() if not is_lazy(each))
        return Scored(joined(self._batches), num_parameters, seconds)

    def _labels(self, batch: Any, clean: Tensor) -> Tensor | None:
        """The labels of a batch, if it has any that fit; from the first batch on where they don't, it has none."""
        told = self._options.targets
        if not self._has_labels or (callable(told) and told(batch) is None):
            return None
        try:
            targets = select_targets(self.model, batch, told)
            check_task(clean, targets, self._task)
            return targets
        except (MisconfigurationException, ValueError) as error:
            if told is not None:
                raise
            self._has_labels = False
            if isinstance(error, ValueError):
                rank_zero_warn(
                    f"`compare_models` takes the loader for one without labels: {error} If they are elsewhere, say so"
                    " with `targets=`, or what they are for with `task=`."
                )
            return None


def _built(model: Model, model_class: type[LightningModule] | None) -> tuple[nn.Module, str]:
    """A module of our own, and what is known of its training."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model), ""
    if callable(model):
        return model(), ""
    path = os.fspath(model)
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # mapped: it is read again below
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"Expected a checkpoint of Lightning, but got {path!r}. Give a function instead.")
    if model_class is None and "_class_path" not in checkpoint.get("hyper_parameters", {}):
        raise MisconfigurationException("`model_class` should be the class of the checkpoint, got None.")
    load = (model_class or LightningModule).load_from_checkpoint
    # Older versions have no such argument, and load what the checkpoint has.
    kwargs: dict[str, Any] = {"weights_only": False} if "weights_only" in inspect.signature(load).parameters else {}
    module = load(path, map_location="cpu", **kwargs)
    return module, "untrained (step 0)" if checkpoint.get("global_step") == 0 else ""


@contextmanager
def _same_order(dataloader: Any, seed: int) -> Iterator[None]:
    """Seed what a loader shuffles by, and put it back."""
    own = (getattr(dataloader, "generator", None), getattr(getattr(dataloader, "sampler", None), "generator", None))
    states = [(each, each.get_state()) for each in (torch.default_generator, *own) if isinstance(each, torch.Generator)]
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _fingerprints(call: Call, clean: Tensor) -> Tensor:
    """A number for each sample that tells whether two models were given the same."""
    tensors: list[Tensor] = []
    apply_to_collection(list(call.arguments.values()), Tensor, tensors.append, allow_frozen=True)
    total = clean.new_zeros(len(clean), dtype=wide_dtype(clean.device))
    for tensor in tensors:
        if tensor.layout == torch.strided and not tensor.is_nested and tensor.shape[:1] == clean.shape[:1]:
            values = tensor.to(total).reshape(len(tensor), -1)
            total += values @ torch.arange(values.shape[1]).to(values).cos()
    return total


def _check_arguments(models: object, at: object, task: str, trainer: Trainer | None) -> None:
    valid = isinstance(models, Mapping) and len(models) > 0 and all(isinstance(name, str) for name in models)
    got = models if isinstance(models, Mapping) and not models else type(models).__name__
    check_argument("models", got, valid, "a dict of names and models, with one model or more")
    check_argument("at", at, at is None or isinstance(at, str), "a submodule's name or None")
    check_argument("task", task, task in TASKS, f"one of {', '.join(map(repr, TASKS))}")
    # By name: this floor knows no callback.
    monitors = [each for each in getattr(trainer, "callbacks", []) if type(each).__name__ in _MONITORS]
    check_argument("trainer", monitors, not monitors, "one of its own, without monitors")
    num_processes = 1 if trainer is None else trainer.world_size
    check_argument("trainer", f"{num_processes} processes", num_processes == 1, "one of a single process")
