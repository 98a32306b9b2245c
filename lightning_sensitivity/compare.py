"""Compare models on the same samples under the same noise, without labels."""

import copy
import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sensitivity.comparison import Comparison
from lightning_sensitivity.functional import tasks as T
from lightning_sensitivity.functional.scores import Samples, score_models, score_samples
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows
from lightning_sensitivity.model import Forward, GaussianNoise, Inputs, Noise, Selector, isolated, select_targets
from lightning_sensitivity.model.arguments import check_argument, check_int, check_selector, is_floating, tensors_in
from lightning_sensitivity.model.noise import check_noise, noisy_outputs


def compare_models(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    dataloader: Any,
    noise: Noise = 0.1,
    at: str | None = None,
    num_draws: int = 1,
    seed: int = 0,
    task: str | None = "multiclass",
    inputs: Inputs = None,
    outputs: Selector = None,
    targets: Selector = None,
    device: torch.device | str | None = None,
) -> Comparison:
    r"""Compare how well models generalize, trained or not, without labels, on the same samples.

    All models get the same noise on the same samples, so that differences are sharper than values. Sensitivity is that
    of Forouzesh, Salehi and Thiran (ICPR 2020, arXiv:2007.15378);
    :class:`~lightning_sensitivity.functional.scores.ModelScores` has all scores, ``examples/comparing_models`` their
    worth. Labels are not needed; where the loader has them, the table shows the true loss and error, too. A model that
    fails becomes a row that says why.

    Args:
        models: Names, and for each of them a module (which is copied, and not touched) or a function that makes one,
            such as ``lambda: Classifier.load_from_checkpoint(path)``. Of functions, one model at a time is in memory.
        dataloader: A loader that gives the same samples whenever it is iterated, with or without labels, or a
            LightningDataModule with one such validation loader. Every pass starts with the same random state.
        noise: σ of Gaussian noise in the units that the models receive, one number or one per channel, or a function
            ``(x, generator) -> x'``, for which there is no loss estimate.
        at: Name of a submodule, which all models have, whose output is perturbed instead of the input.
        num_draws: Noise draws per sample, with one forward pass each.
        seed: Seed of the noise.
        task: What the outputs are for: ``"multiclass"``, ``"binary"``, ``"multilabel"``; None for sensitivity alone.
        inputs: How models are called; see :class:`~lightning_sensitivity.SensitivityMonitor`.
        outputs: Which outputs to compare; see there.
        targets: Where the labels are in a batch. By default where they would be in a training batch; if there is
            nothing, or what does not fit the task, there are no labels.
        device: Where the models run; by default the accelerator, if there is one.

    Returns:
        The comparison: print it, or look into it.

    Raises:
        MisconfigurationException: If an argument is not one of the above.
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
    noise_function = check_noise(noise)
    valid = isinstance(models, Mapping) and len(models) > 0 and all(isinstance(name, str) for name in models)
    valid = valid and all(map(callable, models.values()))
    expected = "a dict of names and models, or functions such as `lambda: Classifier.load_from_checkpoint(path)`"
    check_argument("models", models, valid, expected)
    check_argument("at", at, at is None or isinstance(at, str), "a submodule's name or None")
    check_argument("task", task, task in (*T.TASKS, None), f"one of {', '.join(map(repr, T.TASKS))} or None")
    check_int("num_draws", num_draws, 1)
    check_int("seed", seed, 0)
    for name, value in (("inputs", inputs), ("outputs", outputs), ("targets", targets)):
        check_selector(name, value, may_be_list=name == "inputs")
    if isinstance(dataloader, LightningDataModule):
        dataloader.prepare_data()
        dataloader.setup("validate")
        dataloader = dataloader.val_dataloader()
    if isinstance(dataloader, list) and len(dataloader) == 1:
        dataloader = dataloader[0]
    if device is None:
        device = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None

    def score_batch(model: nn.Module, batch: Any, batch_idx: int) -> Samples:
        forward = Forward(model, batch, inputs, outputs, at is None)
        with isolated(model) as run:
            clean: Tensor = run(forward)
            if batch_idx == 0 and task == "multiclass" and (T.are_probabilities(clean) or T.num_outputs(clean) == 1):
                raise ValueError("Expected logits of classes, got probabilities or one output (`task='binary'`).")
            labels = None if task is None else _labels(model, batch, clean, targets, task, batch_idx)
            noisy = noisy_outputs(run, forward, noise_function, (seed, 0, 0, batch_idx), num_draws, model, at)
            scores = score_samples(clean, noisy, labels, task)
        if task == "multiclass" and labels is not None and targets is None and labels.ndim == 1:
            scores["labels"] = labels
        power = _power(forward, noise_function) if at is None else math.nan
        powers = torch.full((len(clean),), power, dtype=torch.float64)
        return scores | {"power": powers, "fingerprint": _fingerprints(forward, clean)}

    samples, notes, first_failure = dict[str, Samples](), dict[str, str](), ""
    rng_states = _collect_rng_states()
    for place, (name, model) in enumerate(models.items(), 1):
        rank_zero_info(f"Comparing models, {place} of {len(models)}: {name}")
        try:
            start = time.perf_counter()
            scored = _score_model(model, dataloader, torch.device(device or "cpu"), rng_states, score_batch)
            _check_samples(name, scored, samples)
            notes[name], samples[name] = "", scored | {"seconds": torch.tensor(time.perf_counter() - start)}
        except Exception as failure:
            first_failure = first_failure or traceback.format_exc()  # as text: it would keep the model in memory
            notes[name] = f"failed: {type(failure).__name__}: {failure}"
        gc.collect()  # modules refer to themselves in circles, and the next one needs their memory
    if not samples:
        raise RuntimeError(f"No model could be scored. The first failed with:\n{first_failure}")
    return Comparison(*score_models(samples, notes, task))


def _score_model(
    source: Any, dataloader: Any, device: torch.device, rng_states: dict[str, Any], score_batch: Callable[..., Samples]
) -> Samples:
    """Score all samples, batch by batch, from the same random state on, and leave the present one."""
    model = copy.deepcopy(source) if isinstance(source, nn.Module) else source()
    inner, batches = getattr(model, "_orig_mod", model), list[Samples]()
    move: Any = move_data_to_device
    if isinstance(inner, LightningModule):
        inner.configure_model()
        move = inner._apply_batch_transfer_handler  # whose hooks may transform the batch
    model.to(device)
    present = _collect_rng_states()
    try:
        _set_rng_states(rng_states)
        with torch.inference_mode():
            for batch_idx, batch in enumerate(dataloader):
                batches.append(score_batch(model, move(batch, device), batch_idx))
    finally:
        _set_rng_states(present)
    batches = [batch for batch in batches if len(batch["rows"])]
    names = [name for name in batches[0] if all(name in batch for batch in batches)] if batches else []
    joined = {name: torch.cat([batch[name].cpu() for batch in batches]) for name in names}
    if any("loss" in batch for batch in batches) and "loss" not in joined:
        T.warn("`compare_models` finds labels in some batches alone, and shows no loss.")
    if "labels" in joined:
        try:
            T.check_classes(int(joined["rows"][0, 4] / joined["rows"][0, 0]), joined.pop("labels"))
        except ValueError:
            T.warn("`compare_models` finds no labels: these name few of many outputs. Say where they are (`targets=`).")
            del joined["loss"], joined["error"]
    return joined | {"num_parameters": torch.tensor(sum(map(torch.numel, model.parameters())))}


def _labels(model: nn.Module, batch: Any, clean: Tensor, targets: Selector, task: str, batch_idx: int) -> Tensor | None:
    """Return the labels of a batch, if it has any that fit."""
    try:
        labels = select_targets(model, batch, targets)
        T.check_task(clean, labels, task)
        return labels
    except (MisconfigurationException, ValueError) as error:
        if targets is not None:
            raise
        if isinstance(error, ValueError) and batch_idx == 0:
            T.warn(f"`compare_models` finds no labels: {error}. Say where they are (`targets=`), what for (`task=`).")
        return None


def _power(forward: Forward, noise: Any) -> float:
    """Compute the mean square of a perturbed input over the noise's variance, the C of Equation 9."""
    if not isinstance(noise, GaussianNoise):
        return math.nan
    tensors = [x for place in forward.perturbed for x in tensors_in(forward.argument(place)) if is_floating(x)]
    squares = sum(float((x.double() / noise.std_for(x)).square().sum()) for x in tensors)
    return squares / sum(x.numel() for x in tensors)


def _fingerprints(forward: Forward, clean: Tensor) -> Tensor:
    """Compute a number for each sample that tells whether two models were given the same."""
    total = clean.new_zeros(len(clean), dtype=T.wide_dtype(clean.device))
    for tensor in tensors_in([forward.args, forward.kwargs]):
        if tensor.layout == torch.strided and not tensor.is_nested and tensor.shape[:1] == clean.shape[:1]:
            values = tensor.to(total).reshape(len(tensor), -1)
            total += values @ torch.arange(values.shape[1]).to(values).cos()
    return total


def _check_samples(name: str, samples: Samples, others: Mapping[str, Samples]) -> None:
    """Require samples that can be compared, and warn if a sensitivity is doubtful."""
    seen = samples.get("fingerprint", torch.zeros(0))
    if len(seen) < 2:
        raise ValueError(f"Expected `dataloader` to give two samples or more, but got {len(seen)}.")
    estimate = sensitivity_from_rows(samples["rows"])
    if estimate.num_non_finite:
        raise ValueError(f"Expected finite outputs, but {int(estimate.num_non_finite)} samples gave nan or inf.")
    for message in diagnostics(estimate).values():
        T.warn(f"Model {name!r}: {message}")
    for first, expected in [(first, other["fingerprint"]) for first, other in others.items()][:1]:
        if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(f"Expected the samples that {first!r} got: the loader or the model's hooks give others.")
