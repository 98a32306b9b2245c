"""Predictions of the network and of the reference, side by side."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.inputs import join_seen
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.reader import BatchReader, move_batch
from lightning_sensitivity.reference.features import Seen


class Predictions(NamedTuple):
    """What two models predict for the same samples: probabilities ``(N, C)``, or the numbers of a regression.

    Attributes:
        network: Those of the network.
        reference: Those of the reference.
    """

    network: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of both, which is often better than either."""
        return (self.network + self.reference) / 2


def predict_both(
    model: nn.Module,
    predict: Callable[[Seen], Tensor],
    dataloader: Iterable[object],
    reader: BatchReader,
    task: Task,
) -> Predictions:
    """Predict all samples of a loader, which may have labels or not, by a network, and by how a reference predicts."""
    outputs, seen = [], []
    for batch in dataloader:
        moved = move_batch(model, batch)
        call = reader.call(model, moved)
        with isolated(model) as run:
            outputs.append(task.predictions(run(call).cpu()))
        seen.append(reader.see(model, moved, call, len(outputs[-1])))
    return Predictions(torch.cat(outputs), predict(join_seen(seen)).to(outputs[0].dtype))
