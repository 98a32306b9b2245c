"""What a network and its reference predict for new samples."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.kinds import join_seen
from lightning_sensitivity.running.batches import move_batch
from lightning_sensitivity.running.isolation import isolated


class Predictions(NamedTuple):
    """What two models predict for the same samples: probabilities ``(N, C)``, or the numbers of a regression.

    Attributes:
        network: Those of the network.
        reference: Those of the reference.
        are_alike: Whether both are predictions of labels, and not one of them, say, quantiles or logarithms of rates.
    """

    network: Tensor
    reference: Tensor
    are_alike: bool = True

    @property
    def mean(self) -> Tensor:
        """The mean of both, which is often better than either.

        Raises:
            ValueError: If outputs of the network are no predictions of labels.
        """
        if not self.are_alike:
            raise ValueError(
                "Expected outputs that predict targets, but those of the network are something else, such as quantiles "
                "or logarithms of rates: turn them into targets, then take the mean with `reference`."
            )
        return (self.network + self.reference) / 2


def predict_both(
    reader: BatchReader, model: nn.Module, reference: Any, dataloader: Iterable[object], are_alike: bool
) -> Predictions:
    """Predict samples by a network and by a reference.

    Args:
        reader: Reads batches.
        model: The network.
        reference: What predicts what it sees of samples.
        dataloader: Batches.
        are_alike: Whether outputs of the network may be predictions of labels.

    Raises:
        ValueError: If there is no batch, or the reference can't read them.
    """
    outputs, seen = [], []
    for batch in dataloader:
        moved = move_batch(model, batch)
        call = reader.call(model, moved)
        with isolated(model) as run:
            outputs.append(reader.task.predictions(run(call).cpu()))
        seen.append(reader.see(model, moved, call, len(outputs[-1])))
    if not outputs:
        raise ValueError("Expected batches in `dataloader`, but got none.")
    of_network, of_reference = torch.cat(outputs), reference.predict(join_seen(seen)).to(outputs[0].dtype)
    return Predictions(of_network, of_reference, are_alike and of_network.shape == of_reference.shape)
