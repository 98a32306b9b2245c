"""The callback that logs output sensitivity: what to watch."""

from typing import ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.functional.sensitivity import diagnostics
from lightning_sensitivity.functional.tasks import are_log_probabilities, are_probabilities, lie_in_unit_interval
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.model import ModelCall, Noise
from lightning_sensitivity.model.forward import Function, check_argument, check_int
from lightning_sensitivity.model.isolation import Run
from lightning_sensitivity.model.noise import check_noise, noisy_outputs, submodule


class SensitivityMonitor(Monitor):
    r"""Log the output sensitivity of the model on every validation epoch, without labels.

    Sensitivity S is the variance of the class-averaged change of the outputs under input noise (Forouzesh, Salehi and
    Thiran, ICPR 2020, arXiv:2007.15378). It grows with the gap between validation and training loss, and is lowest
    before training: stop by :class:`~lightning_sensitivity.RiskMonitor`.

    **Logged values**, with ``prefix`` before them (in ``Trainer.test`` with "test" for "val"): ``sensitivity``, in
    squared units of the outputs, and its standard error ``sensitivity_stderr``. :attr:`metrics` has the metric of each
    loader.

    It costs 1 + ``num_draws`` forward passes on measured batches.

    Args:
        noise: σ of Gaussian noise in the units that the model receives, one number or one per channel, or a function
            ``(x, generator) -> x'``.
        at: Perturb the output of this submodule instead of the input.
        num_draws: Noise draws per sample.
        num_samples: Samples times draws to measure per loader and epoch, over all processes; None for all. Batches are
            measured whole, evenly spaced and the same in every epoch. 1,200 give a standard error of about 5 %.
        seed: Seed of the noise. A batch gets the same noise in every epoch.
        prefix: Prefix of the logged names; with ``"val/"`` TensorBoard groups them with ``val/loss``.
        inputs: How the model is called, and what is perturbed; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: Which outputs to compare, logits ``(N, K, ...)``; see
            :func:`~lightning_sensitivity.model.select_outputs`.
        per_output: Log the mean squared change of the single outputs instead, which also has a meaning for
            probabilities and heads of two classes.
        every_n_epochs: Measure only every n-th epoch of a fit.

    Raises:
        MisconfigurationException: If an argument is not one of the above; before the first training step, if the
            Trainer or the model can't be measured, or outputs are probabilities.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise=0.1)], logger=False)
    """

    names = ("sensitivity", "sensitivity_stderr")
    wrong_mode = "min"
    advice = "which is lowest before training. Monitor the `risk_estimate` of `RiskMonitor`."
    charts: ClassVar = {"loss": ".*loss", "sensitivity": r"sensitivity(/dataloader_idx_\d+)?$"}

    def __init__(
        self,
        noise: Noise = 0.1,
        at: str | None = None,
        num_draws: int = 1,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Function = None,
        outputs: Function = None,
        per_output: bool = False,
        every_n_epochs: int = 1,
    ) -> None:
        check_argument("at", at, at is None or (isinstance(at, str) and at != ""), "a submodule's name or None")
        check_argument("per_output", per_output, isinstance(per_output, bool), "a bool")
        check_int("num_draws", num_draws, 1)
        self.noise, self.at, self.num_draws, self.per_output = noise, at, num_draws, per_output
        self._noise, self.noisy_input = check_noise(noise), at is None
        super().__init__(num_samples, seed, prefix, inputs, outputs, every_n_epochs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the name of the submodule, too."""
        super().on_fit_start(trainer, pl_module)
        if self.at is not None:
            submodule(pl_module, self.at)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities and log-probabilities, whose class average is another quantity than that of logits."""
        if not self.per_output and (are_probabilities(outputs) or are_log_probabilities(outputs)):
            advice = "select logits with `outputs=`, or use `per_output=True`"
            raise MisconfigurationException(f"`SensitivityMonitor` needs logits, got (log-)probabilities: {advice}.")

    def make_metric(self) -> OutputSensitivity:
        """Make the metric of a loader for a validation."""
        return _LoaderSensitivity(self.per_output)

    def measure(self, trainer: Trainer, run: Run, call: ModelCall, batch_idx: int, dataloader_idx: int) -> int:
        """Run the model on a batch, clean and perturbed."""
        pl_module, clean = trainer.lightning_module, run(call)
        is_first = batch_idx == 0 and not self.per_output and not trainer.sanity_checking
        if is_first and lie_in_unit_interval(clean):
            self.failures.warn("probabilities", "sees only outputs in [0, 1]. If these are not logits, set `outputs=`.")
        key = self.seed, trainer.global_rank, dataloader_idx, batch_idx
        noisy = noisy_outputs(run, call, self._noise, key, self.num_draws, pl_module, self.at)
        self.metric(trainer, dataloader_idx).update(clean, noisy)
        return len(clean)

    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader, and what to warn of."""
        metric = self.metric(trainer, dataloader_idx)
        value, estimate = metric.compute(), metric.estimate
        messages = diagnostics(estimate, self.per_output)
        if estimate.num_changes < 2:
            return {}, messages or {"no value": "There is no value: a variance needs two output changes."}
        return {"sensitivity": value, "sensitivity_stderr": metric.stderr}, messages


class _LoaderSensitivity(OutputSensitivity):
    """Measure one loader, and leave the warnings to the monitor."""

    update_called = True  # a process that got no batch takes part in the others' reduction, without a warning

    _warn = staticmethod(lambda message: None)
