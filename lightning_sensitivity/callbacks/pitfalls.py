"""What many people do, and nothing else would say: each is one warning with the numbers that tell it."""

import math

import torch
from torch import Tensor

from lightning_sensitivity.callbacks.record import KeptTraining
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.functional.tasks import Task, has_ignored_value
from lightning_sensitivity.model.reference import compare_moments
from lightning_sensitivity.model.samples import KeptSamples

_MIN_SAMPLES = 50  # on both sides, to compare moments
_MIN_LABELS = 16
_MAX_DISTANCE = 0.6  # augmentation, and half of the classes missing, stay below
_MIN_VARIANCE, _MAX_VARIANCE = 0.4, 2.5


def warn_of_preparation(reporter: Reporter, training: KeptSamples, unseen: KeptSamples) -> None:
    """Warn if validation samples were prepared in another way than training samples, such as not normalized."""
    if min(training.size, unseen.size) < _MIN_SAMPLES:
        return
    moments = compare_moments(training.batches, unseen.batches)
    if moments is None:
        return
    distance, variance = moments
    if distance > _MAX_DISTANCE or not _MIN_VARIANCE <= variance <= _MAX_VARIANCE:
        message = (
            f"sees validation samples that seem to be prepared in another way than training samples: their variance "
            f"is {variance:.2g} times as large, and the squared distance of the means is {distance:.2g} of the "
            "variance. Normalize both in the same way."
        )
        reporter.warn("preparation", message)


def warn_of_few_classes(reporter: Reporter, kept: KeptTraining, task: Task) -> None:
    """Warn if there are far more outputs than classes among the labels, as if outputs were features."""
    labels = [batch.labels for batch in kept.samples.batches if batch.labels is not None]
    num_outputs = math.prod(kept.output_shape or ())
    if not task.sums_to_one or not labels or labels[0].is_floating_point():
        return
    known = torch.cat([each.flatten() for each in labels])
    known = known[~has_ignored_value(known)]
    num_classes = len({*known.tolist()})
    if num_classes < num_outputs * (1 - math.exp(-len(known) / num_outputs)) / 4:
        message = (
            f"finds only {num_classes} classes among the labels, but {num_outputs} outputs. If they are features, and "
            "the step makes logits of them, let `forward` return these."
        )
        reporter.warn("few-classes", message)


def warn_of_known_labels(reporter: Reporter, outputs: Tensor, labels: Tensor, task: Task) -> None:
    """Warn if a network knows the labels of the first batch before the first step."""
    p = task.probabilities(outputs.detach()).cpu()
    y, counts = task.target_probabilities(p, labels)
    has_label = counts.reshape(len(p), -1).amin(1) > 0
    p, y = p[has_label], y[has_label]
    if len(p) < _MIN_LABELS:
        return
    score = float(task.distances(p, y).mean())
    chance = float(task.distances(y.mean(0).expand_as(y).clone(), y).mean())
    if score < chance / 2:
        message = (
            f"finds a score of {score:.2f} on the first training batch before the first step, where chance has "
            f"{chance:.2f}: if the network was trained on these data before, pass its weights from before that as "
            "`initial_weights=`."
        )
        reporter.warn("initial-weights", message, kind="known labels")
