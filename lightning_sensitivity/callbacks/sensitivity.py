"""The callback that logs output sensitivity, a curve to watch."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.checks import callbacks_that_monitor, without_loader
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.expected.record import Values
from lightning_sensitivity.functional.sensitivity import (
    NUM_COLUMNS,
    diagnostics,
    loss_estimate,
    sensitivity_from_sums,
    sensitivity_sums,
)
from lightning_sensitivity.functional.tensors import (
    are_probabilities,
    evenly_spaced,
    num_outputs,
    wide_dtype,
)
from lightning_sensitivity.messages import Refused, Selector, check_argument, check_bool, check_int
from lightning_sensitivity.reading.kept import KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running.isolation import RunIsolated, isolated
from lightning_sensitivity.running.perturbation import GaussianNoise, Noise, check_noise, noisy_outputs, submodule

_OF_MEAN, _PER_OUTPUT, _ESTIMATE = "output_sensitivity", "per_output_sensitivity", "loss_estimate"
_PATIENCE = 1000  # of validations: more than most runs have
_NUM_TRIED = 8  # samples on which noise is tried


class SensitivityMonitor(Monitor):
    r"""A callback that logs the output sensitivity of the model in every validation epoch, without labels.

    Sensitivity is how strongly outputs change under input noise (Forouzesh, Salehi and Thiran,
    arXiv:2007.15378). It is lowest before training, and rises as the gap between validation and training loss
    widens. To stop by it, take a bound from an earlier run: see :doc:`/guide/sensitivity`.

    **Logged values**, after ``prefix``, each with its standard error, ``..._stderr``:

    - ``output_sensitivity``: the variance of the class-averaged change, in squared units of the outputs;
    - with ``per_output=True`` instead ``per_output_sensitivity``: the mean squared change of single outputs;
    - with ``loss_estimate=True`` also ``loss_estimate``, Equation 9 of the paper, without an error.

    Every validation measures the same samples with the same noise, by 1 + ``num_draws`` passes.

    Args:
        noise: σ of Gaussian noise in the units of the model's inputs, or a function ``(x, generator) -> x'``.
        at: Name of a submodule; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        per_output: Measure single outputs: to stop by, for two outputs, and for probabilities.
        loss_estimate: Log :func:`~lightning_sensitivity.functional.loss_estimate`. Only for Gaussian noise at
            the inputs, and two outputs or more.
        num_samples: Samples per loader, over all processes; None for all. 600 give a standard error of 7 %.
        seed: Seed of the noise.
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
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
    ) -> None:
        check_argument("at", at, isinstance(at, str | None), "the name of a submodule, or None")
        check_int("num_draws", num_draws, 1)
        check_bool("per_output", per_output)
        check_bool("loss_estimate", loss_estimate)
        check_int("seed", seed, 0)
        super().__init__(BatchReader(inputs=inputs, outputs=outputs), num_samples, prefix)
        self.noise = noise
        self.at = at
        self.num_draws = num_draws
        self.per_output = per_output
        self.loss_estimate = loss_estimate
        self.seed = seed
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the name of the submodule, and refuse callbacks that monitor the kind that is not logged."""
        if self.at is not None:
            submodule(pl_module, self.at)
        others = {self.prefix + _OF_MEAN, self.prefix + _PER_OUTPUT}.difference(self.names_of_all(trainer))
        for callback, monitored in callbacks_that_monitor(trainer):
            if without_loader(monitored) in others:
                raise Refused(
                    f"`{type(callback).__name__}` monitors `{monitored}`, but `{self.name}` is logged, whose values "
                    f"differ. Monitor that, or set `per_output={not self.per_output}`.",
                    "names",
                )

    def _warn_of_extremes(self, trainer: Trainer) -> None:
        """Warn of callbacks and schedulers that choose by the lowest or the highest value, and not by a bound."""
        num_validations = _most_validations(trainer)
        for callback, monitored in callbacks_that_monitor(trainer):
            name, kind = without_loader(monitored), type(callback).__name__
            has_bound = getattr(callback, "divergence_threshold", None) is not None
            is_patient = getattr(callback, "patience", math.inf) >= num_validations
            is_sensible = has_bound and is_patient and getattr(callback, "mode", "min") == "min"
            if name in {self.name, self.prefix + _ESTIMATE} and not is_sensible:
                message = (
                    f"finds that `{kind}` chooses by `{monitored}`, which is lowest before training, and rises as a "
                    "network learns: its extremes are the first and the last epochs. Stop at a bound: "
                    f"`EarlyStopping(..., divergence_threshold=2 * value, patience={_PATIENCE})`, where an earlier run "
                    "gives `value`."
                )
                self.run.warn("stop-by-sensitivity", message, kind=kind)

    def start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Warn of callbacks that choose by an extreme, and try the noise on the first training batch."""
        self._warn_of_extremes(trainer)
        with trainer.precision_plugin.val_step_context():
            try:
                call = self.reader.call(module, batch)
                rows = evenly_spaced(torch.arange(call.size), _NUM_TRIED)
                call = call if rows is None else call.take(rows)
                with isolated(module) as run:
                    run(call)
            except Exception:  # training batches may be of another kind than validation batches
                return
            with self.run.report_failure("could not add noise to a training batch", ""), isolated(module) as run:
                at = None if self.at is None else submodule(module, self.at)
                noisy_outputs(run, call, self._noise, (self.seed, 0, 0, 0), 1, at)

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

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, Tensor]:
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
            clean = run(call)
            key = self.seed, module.global_rank, samples.dataloader_idx, batch.index
            perturb = noise if self.loss_estimate else self._noise
            noisy = noisy_outputs(run, call, perturb, key, self.num_draws, at)
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
            return dict.fromkeys(self.names, math.nan)  # training has failed, and others may end it
        if estimate.num_samples < 2:
            return {}
        values: Values = {self._kind: estimate.value, f"{self._kind}_stderr": estimate.stderr}
        square, count = power.sum(0)
        if count > 0:
            assert isinstance(self._noise, GaussianNoise)
            power = square / count
            values[_ESTIMATE] = loss_estimate(estimate.value, power, self._noise.std, estimate.num_outputs)
        return values


def _most_validations(trainer: Trainer) -> float:
    """Return how many validations a run may have; 1,000 if it is that many, or nobody knows."""
    num_epochs: float = trainer.max_epochs or math.inf
    in_epoch = trainer.num_training_batches / (trainer.val_check_batch or 1)
    in_epoch = 1.0 if math.isnan(in_epoch) else in_epoch / (trainer.check_val_every_n_epoch or 1)  # of a stream
    return _PATIENCE if num_epochs < 0 else min(_PATIENCE, num_epochs * in_epoch)
