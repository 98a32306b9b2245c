"""How the monitors deal with a Trainer: checks of a run, names of values, charts."""

import inspect
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_sensitivity import compat

_LIGHTNING_MODULES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class Consumer(NamedTuple):
    """Describe a callback or schedule that acts on one of our values.

    Attributes:
        owner: Name of its class.
        name: The logged name that it monitors.
        mode: ``"min"`` or ``"max"``.
    """

    owner: str
    name: str
    mode: str


class Chart(NamedTuple):
    """Describe a chart of TensorBoard's Custom Scalars.

    Attributes:
        place: Its place on the page. If charts of a prefix have the same place, only the one with most tags is drawn.
        title: Its title.
        tags: Regular expressions for the names of its curves, without the prefix.
    """

    place: int
    title: str
    tags: tuple[str, ...]


def check_run(monitor: str, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Check that the module and the Trainer have what a monitor needs.

    Args:
        monitor: Name of the monitor's class.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If something is missing; the message says what to change.
    """
    problem = _problem_of_steps(trainer, pl_module, stage) or _problem_of_strategy(trainer, pl_module)
    if problem is not None:
        raise MisconfigurationException(f"`{monitor}` {problem}.")


def _problem_of_steps(trainer: Trainer, pl_module: LightningModule, stage: str) -> str | None:
    """Explain what the module lacks, or how its step hides batches; None if nothing is wrong."""
    if not _is_overridden("forward", pl_module):
        return "needs a `forward` that returns the logits, and your module has none"
    if stage == "fit" and not _is_overridden("validation_step", pl_module):
        return "needs a `validation_step`: `def validation_step(self, batch, batch_idx): pass` is enough"
    if stage == "fit" and not trainer.enable_validation:
        return "needs a validation loop: pass `val_dataloaders`, and leave `limit_val_batches` above 0"
    step = pl_module.test_step if stage == "test" else pl_module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        return "needs to see each batch before the step, but the step takes `dataloader_iter`"
    return None


def _problem_of_strategy(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Explain what the strategy makes impossible; None if nothing is wrong."""
    names = {base.__name__ for base in type(trainer.strategy).__mro__}  # `pytorch_lightning` has its own classes
    if not names.isdisjoint(_SHARDED):
        return "does not support sharded weights (FSDP, DeepSpeed, ModelParallelStrategy); use DDP"
    flag = "allow_zero_length_dataloader_with_multiple_devices"
    sources: tuple[object, ...] = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
    if trainer.world_size > 1 and any(getattr(source, flag, False) for source in sources):
        return f"needs a batch in every process, not `{flag}=True`"
    return None


def taken_names(trainer: Trainer, names: Collection[str]) -> set[str]:
    """Select those of our names that the user's module or callbacks also log."""
    logged = {name.split("/dataloader_idx_")[0] for name in compat.names_logged_by_others(trainer)}
    return logged.intersection(names)


def explain_taken(name: str, prefix: str) -> str:
    """Explain that a name is taken, and what to do."""
    return (
        f"logs `{name}`, and so does your module or another callback. Set another prefix, such as "
        f"`prefix='{prefix}monitor_'`."
    )


def logged_name(name: str, is_test: bool) -> str:
    """Return the logged name of a value. In ``Trainer.test``, "test" replaces the first "val" that is a whole word."""
    if not is_test:
        return name
    replaced, count = re.subn(r"(?<![A-Za-z])val(?![A-Za-z])", "test", name, count=1)
    return replaced if count else f"test_{name}"


def with_loader_index(name: str, dataloader_idx: int, num_loaders: int) -> str:
    """Add the index of the loader to a name if there are several, as Lightning does."""
    return name if num_loaders == 1 else f"{name}/dataloader_idx_{dataloader_idx}"


def consumers(trainer: Trainer, names: Collection[str]) -> list[Consumer]:
    """List the callbacks and schedules that monitor one of our values, such as early stopping and checkpoints.

    Args:
        trainer: The Trainer.
        names: The names that we log, without the index of a loader.
    """
    found = []
    for each in [*trainer.callbacks, *trainer.lr_scheduler_configs]:  # type: ignore[attr-defined]
        name = getattr(each, "monitor", None)
        if isinstance(name, str) and name.split("/dataloader_idx_")[0] in names:
            owner = getattr(each, "scheduler", each)
            found.append(Consumer(type(owner).__name__, name, getattr(owner, "mode", "min")))
    return found


def lay_out_charts(trainer: Trainer, charts: Iterable[tuple[str, Iterable[Chart]]]) -> None:
    """Lay out TensorBoard's Custom Scalars, in an order that does not depend on the order of the callbacks.

    Args:
        trainer: The Trainer, whose TensorBoard loggers get the layout.
        charts: The prefix of each monitor, and its charts.
    """
    layout = {}
    for prefix, group in _charts_by_prefix(charts).items():
        layout[f"Generalization ({prefix}*)"] = {
            chart.title: ["Multiline", [f"^{re.escape(prefix)}{tag}" for tag in chart.tags]] for chart in group
        }
    for logger in trainer.loggers:
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):  # of either package
            logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]


def _charts_by_prefix(charts: Iterable[tuple[str, Iterable[Chart]]]) -> dict[str, list[Chart]]:
    """Choose the charts of each prefix, one for each place, in the order of the places."""
    groups: dict[str, dict[int, Chart]] = {}
    for prefix, monitor_charts in charts:
        group = groups.setdefault(prefix, {})
        for chart in monitor_charts:
            present = group.get(chart.place)
            if present is None or len(chart.tags) > len(present.tags):
                group[chart.place] = chart
    return {prefix: [group[place] for place in sorted(group)] for prefix, group in groups.items()}


def make_validation_batch(trainer: Trainer) -> Any:
    """Make a batch of the first validation loader without touching its sampler, workers or random stream.

    The batch has the loader's batch size, since a batch of two samples could be mistaken for a pair of inputs and
    labels.

    Args:
        trainer: The Trainer, before the first validation of a fit.

    Returns:
        The batch, on the device of the module; None if the samples of the loader cannot be indexed.
    """
    loader = next(iter(compat.validation_loaders(trainer)), None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if not hasattr(loader.dataset, "__getitem__"):
        return None
    if loader.batch_sampler is None:  # each item is a batch
        batch = loader.collate_fn(loader.dataset[0])
    else:
        size = min(loader.batch_size or 3, len(loader.dataset))  # type: ignore[arg-type]
        batch = loader.collate_fn([loader.dataset[index] for index in range(size)])
    batch = trainer.precision_plugin.convert_input(batch)
    trainer.validating = True  # the user's transfer hooks may read it
    try:
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True


def num_trained_weights(module: torch.nn.Module) -> int:
    """Count the weights that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Lightning's own check fails if the module comes from the other package (`lightning` or `pytorch_lightning`).
    return getattr(getattr(pl_module, name), "__module__", "") not in _LIGHTNING_MODULES
