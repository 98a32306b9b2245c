"""The callback that logs output sensitivity."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.logged import waiting_for
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.functional.pieces import Together, wide_dtype
from lightning_sensitivity.functional.sensitivity import SAME_K, has_masked, num_outputs
from lightning_sensitivity.functional.tasks import are_log_probabilities, are_probabilities
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.models import Inputs, Options, Probe, Selector
from lightning_sensitivity.models.options import DEFAULT_NOISE_STD
from lightning_sensitivity.perturbations.noise import AnyPerturbation, power

_NAMES = ("sensitivity", "sensitivity_stderr", "sensitivity_log10", "loss_estimate")


class SensitivityMonitor(Monitor):
    r"""Log the output sensitivity of the model on every validation epoch, without labels.

    Sensitivity S is the variance of the class-averaged change of the outputs under input noise (Forouzesh, Salehi and
    Thiran, ICPR 2020, `arXiv:2007.15378`_). It grows with the gap between validation and training loss, and is smallest
    before training: to stop early, use :class:`~lightning_sensitivity.RiskMonitor` instead.

    **Logged values**, with ``prefix`` before them (in ``Trainer.test`` with "test" for "val"):

    - ``sensitivity``: S, in squared units of the outputs
    - ``sensitivity_stderr``: its standard error; epochs share their noise, so they compare more sharply than that
    - ``sensitivity_log10``: log10 of S, which spans decades during training
    - ``loss_estimate``: the paper's Equation 9; see :func:`~lightning_sensitivity.functional.loss_estimate`

    It costs 1 + ``num_draws`` passes on measured batches and does not change training. After its first step, what
    fails gives one warning.

    :attr:`metrics` has the metric of each loader: ``metrics[0].per_sample`` tells the most sensitive samples.

    Args:
        noise_std: σ of Gaussian noise in the units that the model receives, one number or one per channel.
        perturbation: Used instead of Gaussian noise: one of :mod:`~lightning_sensitivity.perturbations`, or a function
            ``(x, generator) -> x'``.
        at: Perturb the output of this submodule instead of the input, as token ids need; several names give a profile,
            ``sensitivity/<name>``.
        num_draws: Noise draws per sample.
        num_samples: How many samples times draws are measured per loader and epoch, over all processes, in whole
            batches, evenly spaced and always the same. 1,200 give a standard error of about 5 %. All, if None.
        seed: Seed of the noise. A batch gets the same noise in every epoch.
        prefix: Put before the names; ``"val/"`` joins TensorBoard's group of ``val/loss``.
        inputs: What to perturb: a key or an index of the batch, a list of them, or a function ``batch -> arguments of
            the model``. Default: see :func:`~lightning_sensitivity.models.prepare_call`.
        outputs: Which outputs to compare, logits ``(N, K, ...)``: a key, an index, or a function ``result -> tensor``
            or ``(result, batch) -> tensor``. Default: see :func:`~lightning_sensitivity.models.select_outputs`.
        per_output: Log the mean squared change of the single outputs instead, which also means something for
            probabilities. It gives no loss estimate.

    Raises:
        MisconfigurationException: If an argument is not one of the above; before the first training step, if
            the Trainer or the model can't be measured, outputs are probabilities, or others log one of the names.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise_std=0.1)], logger=False)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378

    """

    def __init__(
        self,
        noise_std: float | Sequence[float] = DEFAULT_NOISE_STD,
        perturbation: AnyPerturbation | None = None,
        at: Sequence[str] | str | None = None,
        num_draws: int = 1,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Inputs = None,
        outputs: Selector = None,
        per_output: bool = False,
    ) -> None:
        options = Options(noise_std, perturbation, at, num_draws, num_samples, seed, inputs, outputs, None, per_output)
        self.perturbation = options.chosen_perturbation()
        self.perturbs_inputs = None in options.sites
        self._has_masked = self._has_log_probabilities = False
        super().__init__(options, prefix)

    @property
    def names(self) -> list[str]:
        """What is logged, behind the prefix."""
        return [name + suffix for suffix in self.options.sites.values() for name in _NAMES]

    @property
    def metrics(self) -> dict[int, OutputSensitivity]:
        """The metric of each loader, as of the last validation; of the first of several submodules (``at``)."""
        return {dataloader_idx: sites[0] for dataloader_idx, sites in self._metrics.items()}

    def charts(self) -> dict[str, str]:
        """Titles of charts for TensorBoard's Custom Scalars, with a regular expression for the tags in each."""
        tag, site = re.escape(self.prefix), r"(/.+)?$"  # a submodule, a loader or both
        # Whatever the user's loss is called, it has "loss" in its name; the estimate has, too.
        return {"loss and loss estimate": f"^{tag}.*loss", "sensitivity, log10": f"^{tag}{_NAMES[2]}{site}"}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of submodules, look for who minimizes sensitivity, lay out TensorBoard's Custom Scalars."""
        super().on_fit_start(trainer, pl_module)
        ours = {self.prefix + name for name in self.names if name.startswith("sensitivity")}
        for who, logged, mode in waiting_for(trainer, ours):
            if mode == "min":
                rank_zero_warn(
                    f"`{who}` minimizes `{logged}`, which is lowest before training: it will choose an untrained"
                    f' network. Use `monitor="{self.prefix}risk_estimate"`, which `RiskMonitor` logs.'
                )
        for name in self.options.sites:
            if name is not None:
                _submodule(pl_module, name)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities, whose class average can't change.

        Args:
            outputs: Those of a first batch.

        Raises:
            MisconfigurationException: If they are.
        """
        # Looked for here alone: later, nothing waits for the device.
        self._has_masked |= has_masked(outputs)
        self._has_log_probabilities = are_log_probabilities(outputs)
        if not self.options.per_output and are_probabilities(outputs):
            raise MisconfigurationException(
                "`SensitivityMonitor` should get logits, got probabilities: their rows sum to 1, so that their class"
                " average can't change. Return or choose (`outputs=`) the logits, or use `per_output=True`."
            )

    def forget(self) -> None:
        """Begin a validation with nothing."""
        self._metrics: dict[int, list[_LoaderSensitivity]] = {}
        self._num_outputs: dict[int, int] = {}  # by loader

    def measure(self, trainer: Trainer, probe: Probe, batch_idx: int, dataloader_idx: int) -> None:
        """Run the model on a batch, clean and perturbed."""
        clean: Tensor = probe.outputs()
        if self._num_outputs.setdefault(dataloader_idx, num_outputs(clean)) != num_outputs(clean):
            raise ValueError(SAME_K.format(self._num_outputs[dataloader_idx], num_outputs(clean)))
        key = (self.options.seed, trainer.global_rank, dataloader_idx, batch_idx)
        for name, metric in zip(self.options.sites, self._of_loader(trainer, dataloader_idx), strict=True):
            module = None if name is None else _submodule(trainer.lightning_module, name)
            note = partial(metric.add_inputs, self.perturbation)
            noisy = partial(probe.noisy_outputs, self.perturbation, key, at=module, note=note)
            if self.options.num_draws > 1:
                metric.update(clean, map(noisy, range(self.options.num_draws)))
            else:
                noisy(0, then=partial(metric.together.add, clean))

    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The values of a loader, and what to warn of."""
        values: dict[str, Tensor] = {}
        troubles: dict[str, str] = {}
        metrics = self._of_loader(trainer, dataloader_idx)
        for suffix, metric in zip(self.options.sites.values(), metrics, strict=True):
            with self.failures.guarded(f"could not measure some batches of dataloader {dataloader_idx}"):
                metric.together.flush()
            sensitivity, stderr = metric.compute(), metric.stderr
            troubles |= {kind + suffix: doubt for kind, doubt in metric.doubts.items()}
            if metric.num_changes >= 2:
                found = (sensitivity, stderr, sensitivity.log10(), metric.loss_estimate())
                values |= {name + suffix: value for name, value in zip(_NAMES, found, strict=True) if value is not None}
            elif not troubles:
                troubles["no value"] = "A variance needs two output changes or more; there is no value."
        if self._has_log_probabilities and not self.options.per_output:
            troubles["log-probabilities"] = (
                "The outputs are log-probabilities, whose class average also changes by what the softmax has"
                " subtracted: this is not the sensitivity of the logits. Return or choose (`outputs=`) the logits."
            )
        return values, troubles

    def _of_loader(self, trainer: Trainer, dataloader_idx: int) -> list[_LoaderSensitivity]:
        if dataloader_idx not in self._metrics:
            device, per_output = trainer.lightning_module.device, self.options.per_output
            metrics = [_LoaderSensitivity(per_output, self._has_masked, device) for _ in self.options.sites]
            self._metrics[dataloader_idx] = metrics
        return self._metrics[dataloader_idx]


class _LoaderSensitivity(OutputSensitivity):
    """Output sensitivity over one loader in one epoch, and the power of the inputs, for Equation 9."""

    update_called = True  # a process that got no batch takes part in the others' reduction, without a warning
    power: Tensor

    def __init__(self, per_output: bool, has_masked: bool, device: torch.device) -> None:
        super().__init__(per_output)
        self.has_masked, self.doubts = has_masked, dict[str, str]()
        # Σ x² in units of the noise's variance, and the number of elements.
        self.add_state("power", default=torch.zeros(2, dtype=wide_dtype(device)), dist_reduce_fx="sum")
        self.to(device)
        self.together = Together(self.update)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what waits: after a validation, that is nothing."""
        return {name: value for name, value in super().__getstate__().items() if name != "together"}

    def add_inputs(self, perturbation: AnyPerturbation, x: Tensor) -> None:
        """Add the power of clean inputs; nothing where the noise has no second moment that Equation 9 could use."""
        if (squares := power(perturbation, x)) is not None:
            self.power = self.power + torch.stack([squares, torch.full_like(squares, x.numel())])

    def compute(self) -> Tensor:
        """Keep what the loss estimate needs over all processes."""
        value = super().compute()
        self._all_power = self.power.tolist()
        return value

    @property
    def num_changes(self) -> float:
        """How many changes there were."""
        self.compute()
        return float(self._all_rows[self._all_rows.isfinite().all(1), 0].sum())

    def loss_estimate(self) -> Tensor | None:
        """Equation 9, where it means something."""
        num_outputs, (power, count) = self.estimate.num_outputs, self._all_power
        if self.per_output or num_outputs < 2 or not count:
            return None
        return loss_estimate(self.compute(), power / count, 1.0, num_outputs)

    def _report(self, kind: str, doubt: str) -> None:
        self.doubts[kind] = doubt


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        names = [each for each, _ in model.named_modules() if each]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        raise MisconfigurationException(
            f"`at` should name a submodule of {type(model).__name__}, such as {', '.join(map(repr, close))}, got"
            f" {name!r}."
        ) from None
    if isinstance(module, torch.jit.ScriptModule):
        raise MisconfigurationException(f"`at` should name a submodule that takes hooks, got {name!r}, a scripted one.")
    return module
