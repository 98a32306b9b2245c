"""The callback that logs output sensitivity, a curve to watch."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sensitivity.callbacks.checks import callbacks_that_monitor, without_loader
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.run import is_fitting
from lightning_sensitivity.expected.record import Values
from lightning_sensitivity.functional.sensitivity import (
    NUM_COLUMNS,
    diagnostics,
    end_of_plateau,
    loss_estimate,
    sensitivity_from_sums,
    sensitivity_sums,
)
from lightning_sensitivity.functional.tensors import are_probabilities, num_outputs, wide_dtype
from lightning_sensitivity.messages import Refused, Selector, check_argument, check_bool, check_int
from lightning_sensitivity.reading.kept import KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running.isolation import RunIsolated
from lightning_sensitivity.running.perturbation import GaussianNoise, Noise, check_noise, noisy_outputs, submodule

_OF_MEAN, _PER_OUTPUT, _ESTIMATE = "output_sensitivity", "per_output_sensitivity", "loss_estimate"
_PROGRESS = "stop_progress"
_EPOCHS = "epochs"  # in a row of a validation, beside what was logged
_PATIENCE = 1000  # of validations: more than most runs have
_FEWEST = 4  # validations whose noise can be told


class SensitivityMonitor(Monitor):
    r"""A callback that logs the output sensitivity of the model in every validation epoch, without labels.

    Sensitivity is how strongly outputs change under input noise (Forouzesh, Salehi and Thiran,
    arXiv:2007.15378). It is lowest before training, and rises as the gap between validation and training loss
    widens. A tuning run with labels tells how far it was when it stopped gaining; :meth:`early_stopping` stops a
    final run there, which needs none: see :doc:`/guide/sensitivity`.

    **Logged values**, after ``prefix``, each with its standard error, ``..._stderr``:

    - ``output_sensitivity``: the variance of the class-averaged change, in squared units of the outputs;
    - with ``per_output=True`` instead ``per_output_sensitivity``: the mean squared change of single outputs;
    - with ``loss_estimate=True`` also ``loss_estimate``, Equation 9 of the paper, without an error;
    - in a final run ``stop_progress``, √((t/t*)·(S/S*)), of the first loader: t is the number of epochs, S the
      sensitivity of single outputs, and t*, S* are what they were when the tuning run stopped gaining.

    Every validation measures the same samples with the same noise, by 1 + ``num_draws`` passes.

    Args:
        noise: σ of Gaussian noise in the units of the model's inputs, or a function ``(x, generator) -> x'``.
        at: Name of a submodule; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        per_output: Log the sensitivity of single outputs: for two outputs, and for probabilities.
        loss_estimate: Log :func:`~lightning_sensitivity.functional.loss_estimate`. Only for Gaussian noise at
            the inputs, and two outputs or more.
        num_samples: Samples per loader, over all processes; None for all. 600 give a standard error of 7 %.
        seed: Seed of the noise.
        tuned: t* and S*, which the last line of the tuning run says, for a final run in another script.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.running.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K, ...)``; see
            :func:`~lightning_sensitivity.running.select_outputs`.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first training step, if the Trainer or
            the model is not supported, or outputs are probabilities.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise=0.1)], logger=False)
    """

    def __init__(
        self,
        noise: Noise = 0.1,
        *,
        at: str | None = None,
        num_draws: int = 1,
        per_output: bool = False,
        loss_estimate: bool = False,
        num_samples: int | None = 600,
        seed: int = 0,
        tuned: tuple[float, float] | None = None,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
    ) -> None:
        check_argument("at", at, isinstance(at, str | None), "the name of a submodule, or None")
        check_int("num_draws", num_draws, 1)
        check_bool("per_output", per_output)
        check_bool("loss_estimate", loss_estimate)
        check_int("seed", seed, 0)
        pair = tuned if isinstance(tuned, list | tuple) else ()
        is_pair = len(pair) == 2 and all(isinstance(each, int | float) and 0 < each < math.inf for each in pair)
        expected = "two positive numbers, of epochs and a sensitivity, or None"
        check_argument("tuned", tuned, tuned is None or is_pair, expected)
        super().__init__(BatchReader(inputs=inputs, outputs=outputs), num_samples, prefix)
        self.noise = noise
        self.at = at
        self.num_draws = num_draws
        self.per_output = per_output
        self.loss_estimate = loss_estimate
        self.seed = seed
        self.tuned = tuned
        self._validations: list[dict[str, float]] = []  # of the last fit
        self._noise = check_noise(noise)
        is_possible = not loss_estimate or (isinstance(self._noise, GaussianNoise) and at is None and not per_output)
        expected = "False, unless `noise` is one number, `at` is None and `per_output` is False"
        check_argument("loss_estimate", loss_estimate, is_possible, expected)

    @property
    def name(self) -> str:
        """The name by which the sensitivity is logged, for other callbacks to monitor."""
        return self.prefix + self._kind

    @property
    def _kind(self) -> str:
        return _PER_OUTPUT if self.per_output else _OF_MEAN

    @property
    def directions(self) -> dict[str, bool]:
        """The names of all values, without the prefix; none is best where it is highest."""
        names = [self._kind, f"{self._kind}_stderr", *[_ESTIMATE] * self.loss_estimate]
        return dict.fromkeys(names, False)

    def early_stopping(self, monitor: str = "val/loss", mode: str | None = None) -> EarlyStopping:
        """Make the callback that stops a final run, by the tuning run that this monitor has watched.

        The tuning run stopped gaining at the last validation whose value is within the curve's own noise of the
        best. From now on ``stop_progress`` is logged, and the final run ends where it passes 1; never, with a
        warning, if the tuning run gained till its end. After ``tuned=``, no tuning run is needed.

        Args:
            monitor: Name by which the tuning run logged the loss, or a metric, on labelled validation samples.
            mode: ``"min"`` if it is best where it is lowest, ``"max"`` where it is highest; None for
                ``"val/loss"`` alone, whose lowest is best.

        Returns:
            The callback for the final run's Trainer, beside this monitor.

        Raises:
            ValueError: If the tuning run has logged no such value.
            MisconfigurationException: If ``mode`` is something else, or missing.

        Example:
            >>> from lightning_sensitivity import SensitivityMonitor
            >>> watch = SensitivityMonitor(tuned=(12, 0.031))
            >>> callbacks = [watch, watch.early_stopping()]  # of the final run's Trainer
        """
        mode = "min" if mode is None and monitor == "val/loss" else mode
        check_argument("mode", mode, mode in ("min", "max"), f"'min' or 'max' for {monitor!r}")
        if any(monitor in row for row in self._validations):
            self.tuned, text = self._find_tuned(monitor, mode)
            if self.tuned is None:
                rank_zero_warn(f"`SensitivityMonitor`: {text}")
        elif self.tuned is None:
            names = sorted({name for row in self._validations for name in row} - {_EPOCHS, _PER_OUTPUT})
            raise ValueError(
                f"Expected `monitor` to be a value that a fit with this monitor has logged in its validations, got "
                f"{monitor!r}. Logged were {names}."
            )
        options: dict[str, Any] = {"mode": "max", "stopping_threshold": 1.0, "patience": _PATIENCE}
        return EarlyStopping(self.prefix + _PROGRESS, **options, strict=self.tuned is not None)

    def _find_tuned(self, monitor: str, mode: str | None) -> tuple[tuple[float, float] | None, str]:
        """Find epochs and sensitivity where the last fit stopped gaining, if it did, and say so."""
        rows = [row for row in self._validations if row[_EPOCHS] > 0 and 0 < row[_PER_OUTPUT] < math.inf]
        rows = [row for row in rows if math.isfinite(row.get(monitor, math.nan))]
        if len(rows) < _FEWEST:
            return None, f"`{monitor}` has under {_FEWEST} validations, so a final run is not stopped."
        values = torch.tensor([row[monitor] for row in rows], dtype=torch.float64)
        end = end_of_plateau(values if mode == "min" else -values)
        if end == len(rows) - 1:
            return None, f"`{monitor}` had not got worse by the tuning run's end, so a final run is not stopped."
        epochs, sensitivity = (f"{rows[end][name]:.4g}" for name in (_EPOCHS, _PER_OUTPUT))
        text = (
            f"`{monitor}` stopped gaining after {epochs} epochs, at a per-output sensitivity of {sensitivity}. For a "
            f"final run in another script: `SensitivityMonitor(tuned=({epochs}, {sensitivity}))`."
        )
        return (float(epochs), float(sensitivity)), text

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._validations = []

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint, which a monitor of other noise does not read."""
        return self._generate_state_key(name=self.name, noise=getattr(self._noise, "std", None), at=self.at)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what the validations of a tuning run gave, with which a resumed one goes on."""
        checkpoint["callbacks"][self.state_key] = {"validations": self._validations}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything, in a fit."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._validations = [*checkpoint["callbacks"].get(self.state_key, {}).get("validations", [])]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the name of the submodule."""
        if self.at is not None:
            submodule(pl_module, self.at)

    def start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Warn of callbacks and schedulers that choose by an extreme, and refuse those that stop too early."""
        for callback, monitored in callbacks_that_monitor(trainer):
            name, kind = without_loader(monitored), type(callback).__name__
            has_bound = getattr(callback, "divergence_threshold", None) is not None
            if name in {self.name, self.prefix + _ESTIMATE} and not has_bound:
                message = (
                    f"finds that `{kind}` chooses by `{monitored}`, which is lowest before training, and rises as a "
                    "network learns: its extremes are the first and the last epochs. To stop a final run, use the "
                    "monitor's `early_stopping`."
                )
                self.run.warn("stop-by-sensitivity", message, kind=kind)
            if name == self.prefix + _PROGRESS and isinstance(callback, EarlyStopping):
                is_patient = callback.mode == "max" and callback.patience >= _PATIENCE
                if not (is_patient and callback.stopping_threshold):
                    raise Refused(
                        f"`EarlyStopping` of `{monitored}` needs `mode='max', stopping_threshold=1, "
                        f"patience={_PATIENCE}`; the monitor's `early_stopping()` makes it.",
                        "stop-by-sensitivity",
                    )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where a tuning run stopped gaining, or how far a final run is."""
        super().on_train_end(trainer, pl_module)
        monitor, rows = f"{self.prefix}loss", self._validations
        if self.tuned is not None and rows:
            epochs, sensitivity = rows[-1][_EPOCHS], rows[-1][_PER_OUTPUT]
            progress = self._progress(epochs, sensitivity)
            ending = "was stopped" if trainer.should_stop and progress > 1 else "ended"
            rank_zero_info(
                f"`SensitivityMonitor`: the final run {ending} after {epochs:.4g} epochs, at "
                f"`{self.prefix}{_PROGRESS}` {progress:.3g}: {epochs / self.tuned[0]:.3g} times the epochs, and "
                f"{sensitivity / self.tuned[1]:.3g} times the sensitivity, at which the tuning run stopped gaining."
            )
        elif sum(monitor in row for row in rows) >= _FEWEST:
            rank_zero_info(f"`SensitivityMonitor`: {self._find_tuned(monitor, 'min')[1]}")

    # A validation

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Note the sensitivity of single outputs of the first loader, and log how far a final run is."""
        if dataloader_idx > 0:
            return
        row = {_EPOCHS: _epochs(trainer), _PER_OUTPUT: float(values.get(_PER_OUTPUT, math.nan))}
        self._validations.append(row)
        if self.tuned is None:
            return
        name = self.prefix + _PROGRESS
        if not row[_EPOCHS] > 0:
            message = f"does not log `{name}` within an epoch of a training loader without a length."
            self.run.warn("stop-by-sensitivity", message, kind=name)
        progress = self._progress(**row) if _PER_OUTPUT in values and row[_EPOCHS] > 0 else None
        self.log_value(trainer, name, (_PROGRESS, 0), progress, is_highest=True)

    def _progress(self, epochs: float, per_output_sensitivity: float) -> float:
        """Return how far a final run is: 1 where it is as far as the tuning run was when it stopped gaining."""
        assert self.tuned is not None
        return math.sqrt(epochs / self.tuned[0] * per_output_sensitivity / self.tuned[1])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was logged beside the sensitivity; all processes note what the first one does."""
        super().on_validation_end(trainer, pl_module)
        if is_fitting(trainer):
            logged = {
                name.removesuffix("/dataloader_idx_0"): float(value) for name, value in trainer.callback_metrics.items()
            }
            self._validations[-1] |= trainer.strategy.broadcast(logged)

    def check_outputs(self, outputs: Tensor, are_of_sigmoid: bool) -> None:
        """Refuse masked classes, probabilities, whose sensitivity is something else, and one output for Equation 9."""
        if self.loss_estimate:
            check_argument("loss_estimate", True, num_outputs(outputs) > 1, "False for a single output")
        if bool(outputs.isneginf().any()):
            raise Refused(
                "outputs of masked classes are -inf, which change by nothing that is a number: "
                "`outputs=lambda logits: logits.masked_fill(logits.isneginf(), 0)`.",
                entry="nan",
            )
        if not self.per_output and (are_probabilities(outputs) or are_probabilities(outputs.exp())):
            raise Refused(
                "logits are needed, got (log-)probabilities: select logits with `outputs=`, or use `per_output=True`."
            )

    def measure(
        self, module: LightningModule, run_isolated: RunIsolated, samples: KeptSamples
    ) -> tuple[Tensor, Tensor]:
        """Run the model on the kept samples of a loader, clean and with noise.

        Returns:
            A row for each sample, by ``sensitivity_sums``; the sum of squares of the perturbed elements, and their
            number, ``(1, 2)``, which is 0 if nobody needs it.
        """
        rows = [torch.zeros(0, NUM_COLUMNS, dtype=wide_dtype(module.device))]
        power = torch.zeros(1, 2)
        at = None if self.at is None else submodule(module, self.at)

        def noise(x: Tensor, generator: torch.Generator) -> Tensor:
            finite = x[x.isfinite()].float()  # a sample with nan is left out of the sensitivity, too
            power.add_(torch.tensor([[float(finite.square().sum()), finite.numel()]]))
            return self._noise(x, generator)

        for batch in samples.batches:
            call = batch.call.to(module.device)
            clean = run_isolated(call)
            key = self.seed, module.global_rank, samples.dataloader_idx, batch.index
            perturb = noise if self.loss_estimate else self._noise
            noisy = noisy_outputs(run_isolated, call, perturb, key, self.num_draws, at)
            rows.append(sensitivity_sums(clean, noisy).cpu())
        return torch.cat(rows), power

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute the sensitivity of a loader over all processes."""
        device = trainer.strategy.root_device  # a process group may take logged values of no other
        of_samples, power = (each.to(device) for each in rows)
        estimate = sensitivity_from_sums(of_samples, self.per_output)
        messages = diagnostics(estimate, self.per_output)
        if estimate.num_samples < 2 and not messages:
            messages = {"failed": "there is no value, which needs at least two samples."}
        for entry, message in messages.items():
            self.run.warn(entry, f"on dataloader {dataloader_idx}: {message}", kind=str(dataloader_idx))
        if estimate.num_samples == 0 and estimate.num_non_finite > 0:
            return dict.fromkeys([*self.names, _PER_OUTPUT], math.nan)  # training has failed, and others may end it
        if estimate.num_samples < 2:
            return {}
        values: Values = {_PER_OUTPUT: sensitivity_from_sums(of_samples, per_output=True).value}  # for `remember`
        values |= {self._kind: estimate.value, f"{self._kind}_stderr": estimate.stderr}
        square, count = power.sum(0)
        if count > 0:
            assert isinstance(self._noise, GaussianNoise)
            power = square / count
            values[_ESTIMATE] = loss_estimate(estimate.value, power, self._noise.std, estimate.num_outputs)
        return values


def _epochs(trainer: Trainer) -> float:
    """Return how many epochs were trained, with parts of them; nan within one of unknown length."""
    progress, num_batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    in_epoch = progress.current.ready / num_batches if num_batches < math.inf else float(progress.is_last_batch)
    return trainer.current_epoch + in_epoch if in_epoch > 0 else math.nan
