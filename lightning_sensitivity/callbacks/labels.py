"""The labels of a batch, checked against the outputs of the model."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sensitivity.arguments import Selector, link_to
from lightning_sensitivity.callbacks.checks import Reporter, describe_error
from lightning_sensitivity.functional.tasks import Task, has_ignored_value
from lightning_sensitivity.model import isolated, select_targets


def select_labels(
    module: LightningModule, batch: object, targets: Selector | None, task: Task, output_shape: tuple[int, ...] | None
) -> Tensor:
    """Select the labels of a batch.

    Args:
        module: The module.
        batch: The batch.
        targets: The user's function ``batch -> labels``, or None.
        task: The kind of classification.
        output_shape: The shape of the outputs for a sample; None if it is not known yet.

    Raises:
        MisconfigurationException: If it is not clear where they are, or they do not fit the task.
    """
    if targets is None:
        labels = select_targets(module, batch)
    else:  # a user's function may draw random numbers
        with isolated(module) as run:
            labels = run(select_targets, module, batch, targets)
    labels = labels.detach().to("cpu", copy=True)
    if output_shape is not None:
        try:
            task.check(torch.zeros(labels.shape[:1] + output_shape), labels)
        except ValueError as error:
            raise MisconfigurationException(f"{error}.{link_to('task')}") from error
    return labels


def find_labels(
    module: LightningModule,
    batch: object,
    targets: Selector | None,
    task: Task,
    output_shape: tuple[int, ...] | None,
    reporter: Reporter,
) -> Tensor | None:
    """Select the labels of a validation batch; None if it has none, or if they do not fit, which is said."""
    try:
        labels = select_labels(module, batch, targets, task, output_shape)
    except MisconfigurationException as error:
        if targets is not None or isinstance(error.__cause__, ValueError):
            reporter.warn("labels", f"takes some validation batches as unlabelled: {describe_error(error)}")
        return None
    return None if bool(has_ignored_value(labels).all()) else labels
