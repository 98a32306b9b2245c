"""The callback that logs output sensitivity, a curve to watch."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int
from lightning_sensitivity.callbacks.checks import callbacks_that_monitor, check_logits
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.model import Noise
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.perturbation import check_noise, noisy_outputs, submodule
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples


class SensitivityMonitor(Monitor):
    r"""Log the output sensitivity of the model in every validation epoch, without labels.

    Sensitivity is the variance of the class-averaged output change under input noise (Forouzesh, Salehi and
    Thiran, arXiv:2007.15378). It grows with the gap between validation and training loss; it is lowest
    before training. To choose when to stop, use :class:`~lightning_sensitivity.RiskMonitor`.

    **Logged values**, after ``prefix``: ``output_sensitivity``, in squared units of the outputs, and its
    standard error ``output_sensitivity_stderr``. ``metrics`` has the metric of each loader.

    The first validation keeps samples on the CPU, at most 512 MiB of them in each process. Every validation
    measures these samples, by 1 + ``num_draws`` passes.

    Args:
        noise: σ of Gaussian noise in the units of the model's inputs, one number or one per channel, or a
            function ``(x, generator) -> x'``.
        at: Name of a submodule; its output is perturbed instead of the input.
        num_draws: Noise draws per sample.
        per_output: Log the mean squared change of single outputs, also for probabilities and two-class heads.
        num_samples: Samples per loader, over all processes, in whole, evenly spaced batches; None for all.
            600 give a standard error of about 7 %.
        seed: Seed of the noise. A sample gets the same noise in every epoch.
        prefix: Prefix of the logged names; TensorBoard groups those with ``"val/"`` with ``val/loss``.
        inputs: A function ``batch -> arguments``; by default see
            :class:`~lightning_sensitivity.model.ModelCall`, which also says what is perturbed.
        outputs: A function ``result -> logits``, ``(N, K, ...)``; by default
            :func:`~lightning_sensitivity.model.select_outputs`.
        prog_bar: Show the sensitivity on the progress bar.

    Raises:
        MisconfigurationException: If an argument is invalid. Before the first training step, if the Trainer
            or the model is not supported, or outputs are probabilities.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise=0.1)], logger=False)
    """

    names = ("output_sensitivity", "output_sensitivity_stderr")

    def __init__(
        self,
        noise: Noise = 0.1,
        *,
        at: str | None = None,
        num_draws: int = 1,
        per_output: bool = False,
        num_samples: int | None = 600,
        seed: int = 0,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("at", at, isinstance(at, str | None), "the name of a submodule, or None")
        check_int("num_draws", num_draws, 1)
        check_bool("per_output", per_output)
        super().__init__(BatchReader(inputs=inputs, outputs=outputs), num_samples, seed, prefix, prog_bar)
        self.noise = noise
        self.at = at
        self.num_draws = num_draws
        self.per_output = per_output
        self._noise = check_noise(noise)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and warn of callbacks that would choose an epoch by the sensitivity."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for callback, _ in callbacks_that_monitor(trainer, [self.prefix + self.names[0]]):
            chosen = "one of the first epochs: sensitivity is lowest before training, and rises as a network learns"
            if getattr(callback, "mode", "min") == "max":
                chosen = "the most sensitive epoch"
            message = f"is monitored by `{type(callback).__name__}`, which will choose {chosen}. Use `RiskMonitor`."
            self.reporter.warn("stop-by-sensitivity", message, kind=type(callback).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the name of the submodule."""
        if self.at is not None:
            submodule(pl_module, self.at)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities, whose sensitivity means something else."""
        if not self.per_output:
            check_logits(outputs)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> OutputSensitivity:
        """Run the model on the kept samples of a loader, clean and with noise."""
        with module.device:  # it determines the floating type of the metric
            metric = OutputSensitivity(self.per_output)
        metric.is_quiet = True  # the reporter warns
        at = None if self.at is None else submodule(module, self.at)
        for batch in samples.batches:
            call = batch.call.to(module.device)
            clean = run(call)
            if not self.per_output:
                self.reporter.note_outputs(clean)
            key = self.seed, module.global_rank, samples.dataloader_idx, batch.index
            metric.update(clean, noisy_outputs(run, call, self._noise, key, self.num_draws, at))
        return metric

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the sensitivity of a loader over all processes."""
        metric: OutputSensitivity = self.metrics[dataloader_idx]
        estimate = metric.estimate
        self.reporter.warn_of(metric.messages, dataloader_idx)
        if estimate.num_samples < 2:
            if not metric.messages:
                self.reporter.warn("failed", f"has no value on dataloader {dataloader_idx}: it needs two samples.")
            return {}
        return {"output_sensitivity": estimate.value, "output_sensitivity_stderr": estimate.stderr}
