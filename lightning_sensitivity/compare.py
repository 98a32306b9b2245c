"""Compare models on the same samples under the same noise, without labels."""

import copy
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from textwrap import fill
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, check_argument, check_int, check_selectors
from lightning_sensitivity.functional.reporting import warn
from lightning_sensitivity.functional.scores import ModelScores, Samples, score_models, score_samples
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import are_in_unit_interval, are_probabilities, num_outputs
from lightning_sensitivity.model import ModelCall, Noise, isolated, select_targets
from lightning_sensitivity.model.forward import clone_tensors
from lightning_sensitivity.model.noise import check_noise, noisy_outputs, submodule

_ROUNDING = 1e-6  # relative, of scores from float32 outputs
_Z = 1.96  # of a 95 % interval


def compare_models(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]],
    dataloader: Iterable[Any],
    noise: Noise = 0.1,
    at: str | None = None,
    num_draws: int = 1,
    seed: int = 0,
    task: str | None = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
    targets: Selector | None = None,
    device: torch.device | str | None = None,
) -> "Comparison":
    r"""Compare how well models generalize, trained or not, without labels, on the same samples.

    All models get the same noise on the same samples, so that differences are sharper than values; for the scores see
    :class:`~lightning_sensitivity.functional.scores.ModelScores`, for their worth ``examples/studies/comparing``. Labels
    are not needed; if ``targets`` is given, the table shows the true loss and error, too. A model that fails becomes a
    row that says why. Sensitivity is that of Forouzesh, Salehi and Thiran (ICPR 2020, arXiv:2007.15378).

    Args:
        models: Names, and for each of them a module (which is copied, and not touched) or a function that makes one,
            such as ``lambda: Classifier.load_from_checkpoint(path)``. Of functions, one model at a time is in memory.
        dataloader: Batches, with or without labels, which are all kept in memory: some thousand samples are enough.
        noise: σ of Gaussian noise in the units that the models receive, one number or one per channel, or a function
            ``(x, generator) -> x'``.
        at: Name of a submodule, which all models have, whose output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        seed: Seed of the noise.
        task: What the outputs are for: ``"multiclass"``, ``"binary"``, ``"multilabel"``; None for sensitivity alone.
        inputs: How models are called; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: Which outputs to compare; see :func:`~lightning_sensitivity.model.select_outputs`.
        targets: The labels of a batch, for the true loss and error: a function ``batch -> tensor``.
        device: Where the models run; by default the accelerator, if there is one.

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
    valid = isinstance(models, Mapping) and len(models) > 0 and all(map(callable, models.values()))
    check_argument("models", models, valid, "a dict of names and models, or of functions that make them")
    check_argument("dataloader", dataloader, isinstance(dataloader, Iterable), "an iterable of batches")
    check_argument("at", at, at is None or isinstance(at, str), "a submodule's name or None")
    check_argument("task", task, task in (*TASKS, None), f"one of {', '.join(map(repr, TASKS))} or None")
    check_int("num_draws", num_draws, 1)
    check_int("seed", seed, 0)
    check_selectors(inputs=inputs, outputs=outputs, targets=targets)
    if device is None:
        device = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None

    def score_batch(model: nn.Module, batch: Any, batch_idx: int) -> Samples:
        with isolated(model) as run:
            call = ModelCall(model, batch, inputs, outputs)
            clean: Tensor = run(call)
            if batch_idx == 0 and task == "multiclass" and (are_probabilities(clean) or num_outputs(clean) == 1):
                raise ValueError("Expected logits of classes, got probabilities or one output (`task='binary'`).")
            if batch_idx == 0 and task and are_in_unit_interval(clean):
                warn("All outputs of a model lie in [0, 1]. If they are not logits, set `outputs=`.")
            labels = select_targets(model, batch, targets) if targets else None
            if labels is not None and task:
                TASKS[task].check(clean, labels)
            module = None if at is None else submodule(model, at)
            noisy = noisy_outputs(run, call, noise_function, [(seed, 0, 0, batch_idx)], num_draws, module)
            return score_samples(clean, noisy, labels, task)

    batches, samples, notes, first_failure = list(dataloader), dict[str, Samples](), dict.fromkeys(models, ""), ""
    for place, (name, model) in enumerate(models.items(), 1):
        rank_zero_info(f"Comparing models, {place} of {len(models)}: {name}")
        try:
            samples[name] = _score_model(model, batches, torch.device(device or "cpu"), score_batch)
            for message in diagnostics(sensitivity_from_rows(samples[name]["rows"])).values():
                warn(f"Model {name!r}: {message}")
        except Exception as failure:
            first_failure = first_failure or traceback.format_exc()  # as text: it would keep the model in memory
            notes[name] = f"failed: {type(failure).__name__}: {failure}"
        gc.collect()  # modules refer to themselves in circles, and the next one needs their memory
    if not samples:
        raise RuntimeError(f"No model could be scored. The first failed with:\n{first_failure}")
    return Comparison(*score_models(samples, notes))


def _score_model(
    source: Any, batches: list[Any], device: torch.device, score_batch: Callable[[nn.Module, Any, int], Samples]
) -> Samples:
    """Score all samples, batch by batch."""
    model = copy.deepcopy(source) if isinstance(source, nn.Module) else source()
    inner, scored = getattr(model, "_orig_mod", model), list[Samples]()
    move: Any = move_data_to_device
    if isinstance(inner, LightningModule):
        inner.configure_model()
        move = inner._apply_batch_transfer_handler  # whose hooks may transform the batch
    model.to(device)
    start = time.perf_counter()
    with torch.inference_mode():
        for batch_idx, batch in enumerate(batches):
            scored.append(score_batch(model, move(clone_tensors(batch), device), batch_idx))
    names = set(scored[0]).intersection(*scored) if scored else set()
    joined = {name: torch.cat([batch[name].cpu() for batch in scored]) for name in names}
    if len(joined.get("rows", ())) < 2:
        raise ValueError("Expected `dataloader` to give two samples or more.")
    if num_non_finite := int((~joined["rows"].isfinite().all(1)).sum()):
        raise ValueError(f"Expected finite outputs, but {num_non_finite} samples gave nan or inf.")
    seconds, num_parameters = time.perf_counter() - start, sum(map(torch.numel, model.parameters()))
    return joined | {"seconds": torch.tensor(seconds), "num_parameters": torch.tensor(num_parameters)}


class Comparison:
    """Hold the scores of the models that :func:`~lightning_sensitivity.compare_models` compared.

    Iterating gives :class:`ModelScores`, sorted by ``consensus_error`` for three models or more, else by sensitivity,
    with failed models last; index it by place or name. ``print`` shows the main columns, ``pandas.DataFrame`` has all.

    Args:
        models: One row per model, in any order.
        by_sample: For each model and score one number per sample, ``(N,)``, with the score as their mean; the same
            samples for all models.

    Example:
        >>> from lightning_sensitivity.compare import Comparison, ModelScores
        >>> result = Comparison([ModelScores("wide", 0.2, 0.01, loss=0.5), ModelScores("small", 0.1, 0.01)])
        >>> print(result)
        model  sensitivity  loss
        small  0.1 ± 0.01
        wide   0.2 ± 0.01   0.5
        <BLANKLINE>
        Sorted by sensitivity, which is no order of quality.
        >>> result["wide"].loss, result[0].name
        (0.5, 'small')
    """

    def __init__(self, models: Sequence[ModelScores], by_sample: Mapping[str, Samples] | None = None) -> None:
        self._by_sample = by_sample or {}
        has_consensus = any(math.isfinite(model.consensus_error) for model in models)  # of three models or more
        self._order = "consensus_error" if has_consensus else "sensitivity"
        self._models = sorted(models, key=lambda model: math.inf if math.isnan(s := getattr(model, self._order)) else s)

    def __iter__(self) -> Iterator[ModelScores]:
        """Iterate over the models in their order."""
        return iter(self._models)

    def __len__(self) -> int:
        """Count the models, with those that failed."""
        return len(self._models)

    def __getitem__(self, key: int | str) -> ModelScores:
        """Return the scores of one model, by its place or its name."""
        return self._models[key] if isinstance(key, int) else {model.name: model for model in self}[key]

    def difference(self, first: str, second: str, score: str = "sensitivity") -> tuple[float, float]:
        """Compute how much higher one model scores than another, and the standard error of that over samples.

        Args:
            first: Name of a model.
            second: Name of another one.
            score: A field of :class:`ModelScores`.
        """
        value = getattr(self[first], score) - getattr(self[second], score)
        one, other = (self._by_sample.get(name, {}).get(score, torch.full((2,), math.nan)) for name in (first, second))
        return value, float((one - other).std() / math.sqrt(len(one))) if one.shape == other.shape else math.nan

    def ties(self, score: str = "sensitivity") -> dict[str, list[str]]:
        """List for each model those that it ties with: zero lies in the 95 % interval of their difference.

        The intervals are those of single pairs, not corrected for their number. Models whose error is not known are
        left out.

        Args:
            score: A field of :class:`ModelScores`.
        """
        names = [model.name for model in self if math.isfinite(self.difference(model.name, model.name, score)[1])]
        tied: dict[str, list[str]] = {name: [] for name in names}
        for first, second in combinations(names, 2):
            value, stderr = self.difference(first, second, score)
            # Two copies of a model may differ by the rounding of their outputs, more than by its standard error.
            if abs(value) <= max(_Z * stderr, _ROUNDING * abs(getattr(self[first], score))):
                tied[first].append(second)
                tied[second].append(first)
        return tied

    def __str__(self) -> str:
        """Print the main columns, and the notes."""
        tied = self.ties()
        columns = {
            "model": [model.name + " *" * bool(model.note) for model in self],
            "consensus_error": [_number(model.consensus_error) for model in self],
            "consensus_loss": [_number(model.consensus_loss) for model in self],
            "sensitivity": [_number(model.sensitivity, model.sensitivity_stderr) for model in self],
            "ties with": [", ".join(tied.get(model.name, [])) for model in self],
            "loss": [_number(model.loss) for model in self],
            "error": [_number(model.error) for model in self],
        }
        table = [[title, *cells] for title, cells in columns.items() if any(cells)]
        widths = [max(map(len, column)) for column in table]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*table, strict=True)]
        order = "sensitivity, which is no order of quality"
        if self._order == "consensus_error":
            order = "consensus_error: how often the other models disagree. It ranks by the error"
        notes = [fill(f"* {model.name}: {model.note}", 100) for model in self if model.note]
        return "\n".join([*lines, "", f"Sorted by {order}.", *[""] * bool(notes), *notes])

    __repr__ = __str__  # notebooks show the table


def _number(value: float, stderr: float = math.nan) -> str:
    shown = f"{value:.3g}" if math.isfinite(value) else ""
    return shown + f" ± {stderr:.1g}" if math.isfinite(stderr) else shown
