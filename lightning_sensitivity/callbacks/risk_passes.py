"""The passes that the risk estimate of a loader needs in one validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sensitivity.arguments import see
from lightning_sensitivity.callbacks.companions import Companions
from lightning_sensitivity.callbacks.samples import Group, KeptSamples, check_agreement
from lightning_sensitivity.callbacks.twins import TwinRunner
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import are_probabilities, num_outputs
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.isolation import RunIsolated

_MIN_NUMBERS = 10  # fewer outputs may look like probabilities by chance


class RiskPasses:
    """Run a model on kept samples, and update the metric of a loader.

    Args:
        module: The module.
        run: Runs the module and leaves no trace.
        metric: The metric, which knows the reference of the loader.
    """

    def __init__(self, module: LightningModule, run: RunIsolated, metric: RiskEstimate) -> None:
        self._module = module
        self._run = run
        self._metric = metric

    def run_validation(
        self, samples: KeptSamples, companions: Companions, initial: Mapping[str, Tensor], seed: int
    ) -> None:
        """Run the model and its twins on the validation samples.

        Args:
            samples: The samples.
            companions: What is kept beside them.
            initial: The parameters before training, on any device.
            seed: Seed of the twins.

        Raises:
            JointPassError: If samples influence each other.
        """
        on_device = {name: weight.to(self._module.device) for name, weight in initial.items()}
        key = seed, self._module.global_rank, samples.dataloader_idx
        twins = TwinRunner(self._module, on_device, self._run, samples, key)
        start = 0
        for group, call, outputs in self._passes(samples):
            for part in twins.run(group, call, outputs):
                predictions = companions.predictions(start, part.rows)
                self._metric.update(
                    outputs[part.rows], part.twins, compared_with=part.compared_with, reference=predictions
                )
            for batch_idx, rows in group.rows().items():
                if batch_idx in companions.labels:
                    self._metric.update_labels(outputs[rows], companions.labels[batch_idx])
            start += group.size

    def run_labelled(self, companions: Companions) -> None:
        """Score the batches that are kept for their labels only."""
        companions.labelled.complete(self._module, self._run, self._module.device)
        for group, _, outputs in self._passes(companions.labelled):
            self._metric.update_labels(outputs, companions.labels_of(group))

    def run_training(self, training: KeptSamples, kept: Companions) -> None:
        """Score the kept training samples, which several loaders share."""
        if training.is_full:
            training.complete(self._module, self._run, self._module.device)
        for group, _, outputs in self._passes(training):
            self._metric.update_training(outputs, kept.labels_of(group))

    def _passes(self, samples: KeptSamples) -> Iterator[tuple[Group, ModelCall, Tensor]]:
        """Yield each group of some samples with its call and its outputs, which are checked."""
        device, checks = self._module.device, samples.checks()
        for place, group in enumerate(samples.groups):
            call = group.call.to(device)
            outputs = samples.clean_outputs(self._run, place, call)
            check_outputs(outputs, self._metric.task)
            for batch_idx in checks.get(place, []):
                alone = self._run(group.batch(batch_idx).call.to(device))
                check_agreement(outputs[group.rows()[batch_idx]], alone, outputs.dtype)
            yield group, call, outputs


def check_outputs(outputs: Tensor, task: Task) -> None:
    """Refuse outputs that have no estimate.

    Raises:
        MisconfigurationException: If they are dense, probabilities, or a single one for several classes.
    """
    if task.name == "multiclass" and num_outputs(outputs) == 1:
        raise MisconfigurationException(
            f"outputs of shape {tuple(outputs.shape)} are one for each sample: set `task='binary'` if labels are 0 and "
            f"1. A regression has no estimate.{see('task')}"
        )
    if outputs.ndim > 2 and math.prod(outputs.shape[2:]) > 1:
        raise MisconfigurationException(
            f"outputs are dense, {tuple(outputs.shape)}: there is no estimate for pixels and tokens. Remove "
            f"`RiskMonitor`; `SensitivityMonitor` works.{see('no-estimate')}"
        )
    if outputs.numel() >= _MIN_NUMBERS and are_probabilities(outputs):
        raise MisconfigurationException(
            f"outputs are probabilities, and logits are needed: select them with `outputs=`.{see('no-estimate')}"
        )
