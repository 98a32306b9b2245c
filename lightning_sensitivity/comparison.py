"""Compare models on the same samples under the same noise, without labels."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning_sensitivity.arguments import check_argument, check_int, check_selector, gaussian_noise
from lightning_sensitivity.callback import monitors
from lightning_sensitivity.isolation import preserved_rng
from lightning_sensitivity.model_scores import check_same_samples, compare_scored
from lightning_sensitivity.ranking import Comparison
from lightning_sensitivity.scored_model import ComparisonProgressBar, Scored, ScoredModel, Settings
from lightning_sensitivity.tasks import TASKS

__all__ = ["compare_models"]

# Options of a Trainer that leaves nothing behind.
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

Model = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]


def compare_models(
    models: Mapping[str, Model],
    dataloader: Any,
    noise_std: float | Sequence[float] = 0.1,
    num_draws: int = 1,
    seed: int = 0,
    shifts: Sequence[int] = (),
    model_class: type[LightningModule] | None = None,
    task: str = "multiclass",
    inputs: Callable[[Any], Any] | int | str | None = None,
    outputs: Callable[[Any], Any] | int | str | None = None,
    targets: Callable[[Any], Any] | int | str | None = None,
    trainer: Trainer | None = None,
) -> Comparison:
    r"""Compare how well models generalize, without labels: trained or not, in one pass over the same samples each.

    All models get the same noise on the same samples, so that their differences are sharper than their values: ``ties``
    in the table are pairs whose difference in sensitivity could be 0. Sensitivity S and the loss estimate are those of
    Forouzesh, Salehi and Thiran (ICPR 2020, `arXiv:2007.15378`_, Section 3 and Equation 9). The other scores come from
    the same passes; :class:`~lightning_sensitivity.scores.ModelScores` says what they are, README how far each of
    them can be believed.

    Labels are not needed. Where the loader has them, the table shows the true loss and error, too, and how well each
    score orders the models (Kendall's τ).

    A model that fails becomes a row that says why, and does not lose the others.

    Args:
        models: Names, and for each of them the model: a module (which is copied, and not touched); the path of a
            Lightning checkpoint; or a function without arguments that makes the module. Of those that are given as
            paths or functions, one at a time is in memory.
        dataloader: Gives the same samples whenever it is iterated, with or without labels: what
            :meth:`lightning.pytorch.Trainer.validate` takes as a single loader, or a LightningDataModule with one
            validation loader. One that shuffles is seeded, so that all models see one order.
        noise_std: σ of the noise in the units that the models receive, one number or one per channel.
        num_draws: Noise draws per sample; a model makes 1 + ``num_draws`` forward passes.
        seed: Seed of the noise.
        shifts: By how many pixels images are also moved, in each of four directions: four more forward passes for each
            number. For classifiers of images ``(N, C, H, W)``; gives ``shift_loss`` and ``shift_error``.
        model_class: The class of the modules in checkpoints. Those that LightningCLI wrote for one of several model
            classes know it themselves.
        task: What the outputs are for: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``. Loss,
            error, entropy and the like depend on it, sensitivity does not.
        inputs: What to perturb, as in :class:`~lightning_sensitivity.SensitivityMonitor`.
        outputs: Which of the models' outputs to compare, as there: ``(N, K, ...)`` or ``(N,)``.
        targets: Where the labels are in a batch, as there. By default where they would be in a training batch; if there
            is nothing, or what does not fit the task, there are no labels. A function may return None for that.
        trainer: The Trainer that runs the models, in its precision, on its devices and with its callbacks; one of its
            own, which no training needs any more. By default one that writes nothing, on one device.

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
    _check_arguments(models, dataloader, num_draws, seed, shifts, model_class, task, trainer)
    for name, selector in (("inputs", inputs), ("outputs", outputs), ("targets", targets)):
        check_selector(name, selector)
    settings = Settings(gaussian_noise(noise_std), num_draws, seed, tuple(shifts), task, inputs, outputs, targets)
    if trainer is None:
        trainer = Trainer(devices=1, callbacks=[ComparisonProgressBar()], **QUIET)

    # Of a loader that shuffles by a generator of its own.
    sources = (getattr(dataloader, "generator", None), getattr(getattr(dataloader, "sampler", None), "generator", None))
    generators = [(source, source.get_state()) for source in sources if isinstance(source, torch.Generator)]
    scored: dict[str, Scored] = {}
    notes: dict[str, str] = {}
    first_failure = ""
    for place, (name, model) in enumerate(models.items(), 1):
        for generator, state in generators:
            generator.set_state(state)
        if isinstance(bar := trainer.progress_bar_callback, ComparisonProgressBar):
            bar.model_name = f"{name} ({place}/{len(models)})"
        module = None
        try:
            module, notes[name] = _build(model, model_class)
            found = _run(module, dataloader, settings, trainer)
            check_same_samples(found, scored)
            scored[name] = found
        except Exception as failure:
            # As text: the traceback itself would keep the model in memory.
            first_failure = first_failure or traceback.format_exc()
            # Of a process that Lightning spawned, the last line is the error itself.
            is_remote = isinstance(failure, ProcessRaisedException)
            text = str(failure).strip().splitlines()[-1] if is_remote else f"{type(failure).__name__}: {failure}"
            notes[name] = f"failed: {text}"
        finally:
            del module
            gc.collect()  # modules refer to themselves in circles, and the next one needs their memory
    if not scored:
        raise RuntimeError(f"No model could be scored. The first failed with:\n{first_failure}")
    return compare_scored(scored, notes)


def _check_arguments(
    models: object,
    dataloader: object,
    num_draws: object,
    seed: object,
    shifts: object,
    model_class: object,
    task: object,
    trainer: Trainer | None,
) -> None:
    valid = isinstance(models, Mapping) and len(models) > 0
    check_argument("models", models, valid, "a dict of names and models, with one model or more")
    assert isinstance(models, Mapping)
    for name, model in models.items():
        valid = isinstance(name, str) and name.isprintable()
        check_argument("models", name, valid, "a dict whose keys are the models' names, each of one line")
        valid = isinstance(model, str | os.PathLike) or callable(model)
        check_argument(f"models[{name!r}]", model, valid, "a module, the path of a checkpoint, or a function")
    if isinstance(dataloader, list | tuple | Mapping | Iterator):
        raise MisconfigurationException(
            "`dataloader` should be one loader that can be iterated once for each model, or a LightningDataModule, got"
            f" {type(dataloader).__name__}."
        )
    check_int("num_draws", num_draws, minimum=1)
    check_int("seed", seed)
    check_argument("shifts", shifts, isinstance(shifts, Sequence), "a list of pixels")
    assert isinstance(shifts, Sequence)
    for pixels in shifts:
        check_int("shifts", pixels, minimum=1)
    valid = model_class is None or (isinstance(model_class, type) and issubclass(model_class, LightningModule))
    check_argument("model_class", model_class, valid, "a class of LightningModule, or None")
    check_argument("task", task, task in TASKS, f"one of {', '.join(map(repr, TASKS))}")
    if trainer is not None and monitors(trainer):
        raise MisconfigurationException(
            "`trainer` should be a Trainer of its own, got one with a `SensitivityMonitor`."
        )


def _build(model: Model, model_class: type[LightningModule] | None) -> tuple[nn.Module, str]:
    """A module of our own, and what is known of its training."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model), ""
    if callable(model):
        module = model()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Expected the function to return a module, but got {type(module).__name__}.")
        return module, ""
    # Mapped and not read: the module reads it again.
    checkpoint = torch.load(os.fspath(model), map_location="cpu", mmap=True, weights_only=False)
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"Expected a checkpoint of Lightning, but got {os.fspath(model)!r}. Give a function instead.")
    knows_its_class = "_class_path" in checkpoint.get("hyper_parameters", {})
    if model_class is None and not knows_its_class:
        raise MisconfigurationException("`model_class` should be the class of the checkpoint, got None.")
    load = (model_class or LightningModule).load_from_checkpoint
    # Older versions have no such argument, and load what the checkpoint has.
    kwargs: dict[str, Any] = {"weights_only": False} if "weights_only" in inspect.signature(load).parameters else {}
    module = load(os.fspath(model), map_location="cpu", **kwargs)
    return module, "untrained (step 0)" if checkpoint.get("global_step") == 0 else ""


def _run(module: nn.Module, dataloader: Any, settings: Settings, trainer: Trainer) -> Scored:
    with tempfile.TemporaryDirectory() as folder:
        scored_model = ScoredModel(module, settings, file := Path(folder, "scored.pt"))
        try:
            with preserved_rng([]):
                # The order of a loader that shuffles. Not that of CUDA, which would not be put back.
                torch.default_generator.manual_seed(settings.seed)
                if isinstance(dataloader, LightningDataModule):
                    trainer.validate(scored_model, datamodule=dataloader, verbose=False)
                else:
                    trainer.validate(scored_model, dataloader, verbose=False)
            return scored_model.result()
        except ProcessExitedException:
            # Threads of gloo now and then abort a process that Lightning spawned, as it ends, with its work done.
            if not file.exists():
                raise
            return scored_model.result()
        finally:
            # The Trainer keeps its last module, which is not to keep the model in memory.
            scored_model.release()
