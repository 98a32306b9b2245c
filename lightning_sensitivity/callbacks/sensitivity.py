"""The callback that logs output sensitivity, a curve to watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int
from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.batches import CleanOutputs, Group
from lightning_sensitivity.callbacks.session import Session
from lightning_sensitivity.callbacks.trainer import Chart
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_rows
from lightning_sensitivity.functional.tensors import (
    are_in_unit_interval,
    are_log_probabilities,
    are_probabilities,
    num_outputs,
)
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.model import ModelCall, Noise
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.noise import check_noise, noisy_outputs, submodule


class SensitivityMonitor(Monitor):
    r"""Log the output sensitivity of the model in every validation epoch, without labels.

    Sensitivity is the variance of the class-averaged output change under input noise (Forouzesh, Salehi and
    Thiran, arXiv:2007.15378). It grows with the gap between validation and training loss; it is lowest
    before training. To choose when to stop, use :class:`~lightning_sensitivity.RiskMonitor`.

    **Logged values**, after ``prefix`` (in ``Trainer.test`` with "test" for "val"): ``output_sensitivity``, in squared
    units of the outputs, and its standard error ``output_sensitivity_stderr``. ``metrics`` has each loader's metric.

    A validation costs 1 + ``num_draws`` passes over the measured samples.

    Args:
        noise: σ of Gaussian noise in the units of the model's inputs, one number or one per channel, or a function
            ``(x, generator) -> x'``.
        at: Name of a submodule; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        per_output: Log the mean squared change of single outputs, also for probabilities and two-class heads.
        num_samples: Samples times draws per loader and epoch, over all processes, in whole, evenly spaced
            batches, the same in every epoch; None for all. 1,200 give a standard error of about 5 %.
        seed: Seed of the noise. A batch gets the same noise in every epoch.
        prefix: Prefix of the logged names; with ``"val/"`` TensorBoard groups them with ``val/loss``.
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`,
            which also says what is perturbed.
        outputs: A function ``result -> logits``, ``(N, K, ...)``; by default
            :func:`~lightning_sensitivity.model.select_outputs`.
        every_n_epochs: Measure in epochs 0, n, 2n, ... of a fit.
        prog_bar: Show the sensitivity on the progress bar.

    Raises:
        MisconfigurationException: If an argument is invalid. Before the first training step, if the Trainer or the
            model is not supported, outputs are probabilities, or the names are already logged.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise=0.1)], logger=False)
    """

    names = ("output_sensitivity", "output_sensitivity_stderr")
    charts: ClassVar = (
        Chart(0, "loss", (r".*loss",)),
        Chart(1, "output sensitivity", (r"output_sensitivity(/dataloader_idx_\d+)?$",)),
    )
    misleading_mode = "min"
    misleading_mode_advice = "which is lowest before training. Monitor the `risk_estimate` of `RiskMonitor`."

    def __init__(
        self,
        noise: Noise = 0.1,
        *,
        at: str | None = None,
        num_draws: int = 1,
        per_output: bool = False,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        every_n_epochs: int = 1,
        prog_bar: bool = False,
    ) -> None:
        check_argument("at", at, isinstance(at, str | None), "the name of a submodule, or None")
        check_int("num_draws", num_draws, 1)
        check_bool("per_output", per_output)
        self.noise = noise
        self.at = at
        self.num_draws = num_draws
        self.per_output = per_output
        self._noise = check_noise(noise)
        super().__init__(num_samples, seed, prefix, inputs, outputs, every_n_epochs, prog_bar)

    @property
    def num_draws_per_sample(self) -> int:
        """Number of noisy passes that count against ``num_samples``."""
        return self.num_draws

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the name of the submodule, too."""
        super().on_fit_start(trainer, pl_module)
        if self.at is not None:
            submodule(pl_module, self.at)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities and log-probabilities: their class average does not mean the same as that of logits."""
        if self.per_output:
            return
        if are_probabilities(outputs) or are_log_probabilities(outputs):
            raise MisconfigurationException(
                "`SensitivityMonitor` needs logits, got (log-)probabilities: select logits with `outputs=`, or use "
                "`per_output=True`."
            )
        if num_outputs(outputs) > 2 and are_in_unit_interval(outputs):  # one or two outputs may be there by chance
            self.run_facts.failures.warn(
                "probabilities", "got outputs that all lie in [0, 1]. If they are not logits, set `outputs=`."
            )

    def check_call(self, pl_module: LightningModule, run: RunIsolated, call: ModelCall) -> None:
        """Check that the model can be called with noise."""
        for _ in self.noisy_outputs(pl_module, run, call, [(self.seed, 0, 0, 0)]):
            pass

    def make_session(self, trainer: Trainer, clean: CleanOutputs) -> SensitivitySession:
        """Make the session that measures a validation."""
        return SensitivitySession(self, trainer, clean)

    def noisy_outputs(
        self, pl_module: LightningModule, run: RunIsolated, call: ModelCall, keys: Sequence[tuple[int, ...]]
    ) -> Iterator[Tensor]:
        """Yield the outputs for each noise draw."""
        at = None if self.at is None else submodule(pl_module, self.at)
        return noisy_outputs(run, call, self._noise, keys, self.num_draws, at)


class SensitivitySession(Session):
    """Measure the output sensitivity in a validation."""

    monitor: SensitivityMonitor

    def make_metric(self) -> OutputSensitivity:
        """Make the metric of a loader."""
        return _LoaderSensitivity(self.monitor.per_output)

    def measure(self, run: RunIsolated, group: Group) -> None:
        """Run the model on a group of batches, clean and perturbed."""
        clean = self.clean.get(run, group)
        start = self.monitor.seed, self.trainer.global_rank, group.dataloader_idx
        keys = [(*start, batch.batch_idx) for batch in group.batches]  # each batch has noise of its own
        noisy = self.monitor.noisy_outputs(self.module, run, group.call, keys)
        self.metric(group.dataloader_idx).add_rows(sensitivity_rows(clean, noisy))

    def compute_values(self, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader, and the warnings about them."""
        metric = self.metric(dataloader_idx)
        value, estimate = metric.compute(), metric.estimate
        messages = diagnostics(estimate, self.monitor.per_output)
        is_non_finite = bool(estimate.num_non_finite > 0 and estimate.num_samples == 0)  # then nan is logged
        if estimate.num_changes < 2 and not is_non_finite:
            return {}, messages or {"no value": "There is no value: a variance needs two output changes."}
        return {"output_sensitivity": value, "output_sensitivity_stderr": metric.stderr}, messages


class _LoaderSensitivity(OutputSensitivity):
    """Measure one loader without warnings, which the monitor gives."""

    _warn = staticmethod(lambda message: None)
