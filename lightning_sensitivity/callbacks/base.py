"""What the monitors share: which batches are measured, passes that leave no trace, failures, and logging."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_sensitivity.callbacks import logged
from lightning_sensitivity.callbacks.checks import StepWatch, check_run, classes_are_last, forward, submodules_run
from lightning_sensitivity.models import Options, Passes, Probe, prepare_call
from lightning_sensitivity.models.call import copied
from lightning_sensitivity.models.options import check_argument


class Monitor(Callback):
    """A callback that measures validation batches and logs what it found, and never ends a run.

    Args:
        options: How the model is run.
        prefix: Put before the logged names.
    """

    perturbs_inputs = False
    _num_batches: list[int | float]  # of each loader of the validation that runs

    def __init__(self, options: Options, prefix: str) -> None:
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        self.options, self.prefix = options, prefix
        self._passes: Passes | None = None
        self._watch: StepWatch | None = None
        self._begin_run()
        self._begin_validation()

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """What is logged, behind the prefix."""

    @abstractmethod
    def charts(self) -> dict[str, str]:
        """Titles of charts for TensorBoard's Custom Scalars, with a regular expression for the tags in each."""

    @abstractmethod
    def measure(self, trainer: Trainer, probe: Probe, batch_idx: int, dataloader_idx: int) -> None:
        """Measure a batch with the probe, which runs the model on it."""

    @abstractmethod
    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The values of a loader, over all processes, and what to warn of. All processes call it for all loaders."""

    @abstractmethod
    def forget(self) -> None:
        """Begin a validation with nothing."""

    def end_validation(self) -> None:
        """Free what is needed for a validation alone."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Look at the outputs of a first batch; raise MisconfigurationException if values would be wrong."""

    def should_measure(self, trainer: Trainer) -> bool:
        """Whether to measure the validation that runs. Override it to measure every second one, say."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch."""
        if stage not in ("fit", "validate", "test"):
            return
        check_run(type(self).__name__, trainer, pl_module, stage)
        prefixes = [each.prefix for each in _monitors(trainer) if type(each) is type(self)]
        valid = len(set(prefixes)) == len(prefixes)
        check_argument("prefix", prefixes, valid, f"another one for each `{type(self).__name__}`")
        self._begin_run()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars: the curves of all monitors, related ones in one chart."""
        monitors = _monitors(trainer)
        if self is monitors[0]:  # a second layout would take the place of the first
            logged.lay_out(trainer, [(monitor.prefix, monitor.charts()) for monitor in monitors])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Without a sanity check, look at the first training batch before its step; from then on, only warn."""
        # A lazy module's first pass draws its weights, and must be the training's.
        may_look = not self._classes_last and trainer.global_step == 0 and not any(map(is_lazy, pl_module.parameters()))
        if self.failures.is_strict and may_look:
            what = "can't be run on the first training batch (a sanity check would look at one of validation instead)"
            with self.failures.guarded(what), self.measuring(trainer, pl_module):
                self.check_outputs(self.probe(trainer, pl_module, batch).outputs())
        self.failures.is_strict = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing, and with the buffers that the first step of DDP would broadcast."""
        self._begin_validation()
        self._num_batches = logged.num_batches(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.failures.is_strict = False  # also in a fit that goes on with a validation
        model: Any = trainer.strategy.model
        is_ddp = isinstance(model, DistributedDataParallel)
        if is_ddp and model.will_sync_module_buffers():
            model._sync_buffers()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure a batch, before the step may change it."""
        if not self.should_measure(trainer):
            return
        # A process that had no batch of an earlier loader joins the others, who reduced when that loader was done.
        for earlier in range(dataloader_idx if batch_idx == 0 else 0):
            self._values(trainer, earlier)
        if batch is None or not self._wants(trainer, batch_idx, dataloader_idx):
            return
        with self.failures.guarded(f"could not measure a batch of dataloader {dataloader_idx}"):
            with self.measuring(trainer, pl_module):
                probe = self.probe(trainer, pl_module, batch)
                if dataloader_idx not in self._classes_last:
                    self._look(pl_module, probe, batch, dataloader_idx)
                probe.classes_last = self._classes_last[dataloader_idx]
                self.measure(trainer, probe, batch_idx, dataloader_idx)
            self._has_measured = True
            self.failures.is_strict = self.failures.is_strict and trainer.state.fn == TrainerFn.FITTING

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log a loader's values at its first batch: Lightning reads them when the loader is done."""
        self._end_watch()
        if batch_idx == 0 and not trainer.sanity_checking and self.should_measure(trainer):
            self._log(trainer, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have every process take part in every reduction, and say what was wrong, after a sanity check too."""
        self._end_watch()
        if self.should_measure(trainer):
            for dataloader_idx in range(len(self._num_batches)):
                self._values(trainer, dataloader_idx)
                if not trainer.sanity_checking and dataloader_idx not in self._logged:
                    self._log(trainer, dataloader_idx, at_epoch_end=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Require that the logged names are ours alone, after a sanity check too: Lightning would keep one value."""
        ours = {logged.stage_prefix(self.prefix, trainer) + name for name in self.names}
        if taken := sorted(logged.names_of_others(trainer) & ours - self._withdrawn):
            with self.failures.guarded("logs names that others log, too, and leaves them to those from now on"):
                raise MisconfigurationException(
                    f"`prefix` should give `{type(self).__name__}` names of its own, but"
                    f" {', '.join(map(repr, taken))} is logged by the module or another callback, too. Choose another."
                )
            self._withdrawn.update(taken)
        self.end_validation()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was measured."""
        if not self._has_measured and not self.failures.warned_of:  # else it was said why
            reason = "validation gave it no batch that it could measure."
            self.failures.warn("nothing", f"has measured nothing in this fit: {reason}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on the module."""
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._end_watch()
        self.end_validation()
        self._passes = None
        self._readings.clear()

    @contextmanager
    def measuring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Inside, a probe may run the model."""
        self._passes = self._passes or Passes(pl_module)  # let go in `teardown`
        with self._passes.measuring(), trainer.precision_plugin.val_step_context():
            yield

    def probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Probe:
        """What runs the model on a batch."""
        assert self._passes is not None
        options = self.options
        # Functions of the user's may write into what they get.
        own = copied(batch) if callable(options.inputs) or callable(options.outputs) else batch
        call = prepare_call(pl_module, own, options.inputs, self.perturbs_inputs)
        return Probe(self._passes, forward(trainer, pl_module), call, options.outputs, own)

    def num_wanted(self, trainer: Trainer, dataloader_idx: int) -> float:
        """How many batches of a loader are measured in this process; all, until the first one was."""
        count, options = self._num_batches[dataloader_idx], self.options
        if options.num_samples is None or count == math.inf or dataloader_idx not in self._batch_sizes:
            return count
        num_samples = math.ceil(options.num_samples / (trainer.world_size * options.num_draws))
        return min(count, math.ceil(num_samples / self._batch_sizes[dataloader_idx]))

    def _wants(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether a batch is measured: evenly spaced ones, since loaders are often sorted, and always the same."""
        if batch_idx == 0:
            return True
        count, wanted = self._num_batches[dataloader_idx], self.num_wanted(trainer, dataloader_idx)
        return wanted == count or batch_idx * wanted % count < wanted

    def _begin_run(self) -> None:
        self.failures = logged.Failures(type(self).__name__, self.prefix)
        self._has_measured = False
        self._readings: dict[tuple[int, str], logged.Reading] = {}  # by loader and name
        self._withdrawn: set[str] = set()  # names that somebody else logs, too
        # Of each loader of which a first batch was seen: its size, and whether classes come last in its outputs.
        self._batch_sizes: dict[int, int] = {}
        self._classes_last: dict[int, bool] = {}

    def _begin_validation(self) -> None:
        self._computed: dict[int, dict[str, Tensor]] = {}  # by loader
        self._logged: set[int] = set()
        self.failures.has_failed = False
        self.forget()

    def _look(self, pl_module: LightningModule, probe: Probe, batch: Any, dataloader_idx: int) -> None:
        """Look at the outputs of a loader's first batch, and watch the step that gets it."""
        with submodules_run(pl_module) as submodules:
            outputs: Tensor = probe.outputs()
        is_last, doubt = classes_are_last(pl_module, batch, probe, outputs, self.options)
        if doubt:
            self.failures.warn("positions", doubt)
        self.check_outputs(outputs.movedim(-1, 1) if is_last else outputs)
        self._batch_sizes[dataloader_idx], self._classes_last[dataloader_idx] = max(1, len(outputs)), is_last
        self._watch = StepWatch(pl_module, probe.first_tensors, submodules)

    def _end_watch(self) -> None:
        if self._watch is not None:
            for kind, difference in self._watch.end().items():
                self.failures.warn(f"step {kind}", f"may measure something else than your step does. {difference}")
            self._watch = None

    def _values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        if dataloader_idx not in self._computed:
            self._computed[dataloader_idx] = {}
            loader = f"dataloader {dataloader_idx}"
            with self.failures.guarded(f"could not compute the values of {loader}"):
                values, troubles = self.compute(trainer, dataloader_idx)
                prefix = logged.stage_prefix(self.prefix, trainer)
                kept = {name: value for name, value in values.items() if prefix + name not in self._withdrawn}
                self._computed[dataloader_idx] = {name: value for name, value in kept.items() if value.isfinite()}
                if self.failures.has_failed:
                    troubles.pop("no value", None)  # it was said why
                for kind, trouble in {} if trainer.sanity_checking else troubles.items():
                    self.failures.warn(f"{kind}, {loader}", f"says of {loader}: {trouble}")
        return self._computed[dataloader_idx]

    def _log(self, trainer: Trainer, dataloader_idx: int, at_epoch_end: bool = False) -> None:
        self._logged.add(dataloader_idx)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "add_dataloader_idx": not at_epoch_end}
        for name in self.names:
            full_name = logged.stage_prefix(self.prefix, trainer) + name
            if at_epoch_end:  # in a process without batches of the loader: Lightning puts no index behind the name
                full_name = logged.loader_name(full_name, dataloader_idx, len(self._num_batches))
            # `metric_attribute` is checked only for Metrics that belong to the module; this one must not.
            if (key := (dataloader_idx, name)) not in self._readings:
                self._readings[key] = logged.Reading(partial(self._values, trainer, dataloader_idx), name)
            trainer.lightning_module.log(full_name, self._readings[key], metric_attribute=name, **options)


def _monitors(trainer: Trainer) -> list[Monitor]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, Monitor)]
