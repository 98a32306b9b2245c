"""Every kind of batch with every kind of output: what is logged is what a plain loop over the same noise gives."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import GaussianNoise, noise_generator
from tests.helpers import Classifier, trainer

CHANNELS, HEIGHT, WIDTH, CLASSES = 3, 6, 5, 4
SIZES = (7, 5, 1, 6)  # of the batches

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Sample:
    image: Tensor
    label: Tensor


class Encoding(UserDict):
    """As of a tokenizer: attributes are keys."""

    def __getattr__(self, name: str) -> Any:
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(name)

    def to(self, device: Any) -> Encoding:
        return Encoding({name: value.to(device) for name, value in self.data.items()})


class Output(OrderedDict):
    """As of transformers: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Batches(NamedTuple):
    """How a batch is made of an image and a label, and what the monitor is told of it."""

    make: Callable[[Tensor, Tensor], Any]
    inputs: Any = None


BATCHES = {
    "a tensor": Batches(lambda x, y: x),
    "a list": Batches(lambda x, y: [x, y]),
    "a tuple": Batches(lambda x, y: (x, y)),
    "a named tuple": Batches(Pair),
    "a named tuple, by name": Batches(lambda x, y: Pair(y, x), "label"),
    "a dict": Batches(lambda x, y: {"image": x, "label": y}),
    "a dict of a dict": Batches(lambda x, y: {"data": {"image": x}, "label": y}, "data"),
    "a tuple of dicts": Batches(lambda x, y: ({"image": x, "id": y}, {"label": y})),
    "a dataclass": Batches(Sample),
    "a dataclass in a list": Batches(lambda x, y: [Sample(x, y), y]),
    "an encoding": Batches(lambda x, y: Encoding(image=x, label=y)),
    "two views": Batches(lambda x, y: [[x, x.flip(3)], y]),
    "a second input, by key": Batches(lambda x, y: {"depth": x + 1, "image": x}, "image"),
    "by place": Batches(lambda x, y: (y, x), 1),
    "by a function": Batches(lambda x, y: SimpleNamespace(image=x), lambda batch: batch.image),
    "channels last": Batches(lambda x, y: x.to(memory_format=torch.channels_last)),
}

Outputs = Callable[[Tensor], Any]

OUTPUTS: dict[str, tuple[Outputs, Any]] = {
    "logits": (lambda y: y.mean((2, 3)), None),
    "one number": (lambda y: y.mean((1, 2, 3)), None),
    "one column": (lambda y: y.mean((1, 2, 3))[:, None], None),
    "a map": (lambda y: y, None),
    "a sequence": (lambda y: y.flatten(2), None),
    "tokens, classes last": (lambda y: y.flatten(2).mT, lambda result: result.movedim(-1, 1)),
    "an embedding": (lambda y: nn.functional.normalize(y.flatten(1), dim=1), None),
    "a dict": (lambda y: {"features": y, "logits": y.mean((2, 3))}, None),
    "a dict, by key": (lambda y: {"scores": y.mean((2, 3))}, "scores"),
    "a model output": (lambda y: Output(loss=None, logits=y.mean((2, 3))), None),
    "an object, by attribute": (lambda y: SimpleNamespace(scores=y), "scores"),
    "a tuple": (lambda y: (y.mean((2, 3)), y), None),
    "a tuple, by place": (lambda y: (None, y.mean((2, 3))), 1),
    "a named tuple": (lambda y: Pair(y, "no"), None),
}


class Model(Classifier):
    def __init__(self, result: Outputs) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(CHANNELS, CLASSES, 3, padding=1), nn.Tanh(), nn.Dropout(0.5))
        self.result = result

    def forward(self, image: Any) -> Any:
        image = image.get("image") if isinstance(image, dict) else image
        return self.result(self.conv(image))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Tensor):
            batch.mul_(0)  # too late to matter


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, CHANNELS, HEIGHT, WIDTH) for size in SIZES]
    return [(torch.rand(shape, generator=generator), torch.arange(shape[0]) % CLASSES) for shape in shapes]


@torch.no_grad()
def expected(model: Model, outputs: Any) -> float:
    changes = []
    for index, (x, _) in enumerate(data()):
        noisy = GaussianNoise(0.1)(x, noise_generator(0, batch_idx=index))
        clean, other = (select(model.eval()(image), outputs).double() for image in (x, noisy))
        changes.append((other - clean).reshape(len(x), clean.shape[1] if clean.ndim > 1 else 1, -1).mean(1))
    return torch.cat([change.flatten() for change in changes]).var(correction=0).item()


def select(result: Any, outputs: Any) -> Tensor:
    """By plain Python, what the table of outputs means."""
    if callable(outputs):
        return outputs(result)
    if isinstance(outputs, str):
        return result[outputs] if isinstance(result, dict) else getattr(result, outputs)
    if outputs is not None:
        return result[outputs]
    if isinstance(result, dict):
        return result["logits"]
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_value_is_that_of_a_plain_loop(batch: str, output: str) -> None:
    torch.manual_seed(0)
    result, outputs = OUTPUTS[output]
    make, inputs = BATCHES[batch]
    model = Model(result)
    loader = DataLoader([make(x, y) for x, y in data()], batch_size=None)
    monitor = SensitivityMonitor(inputs=inputs, outputs=outputs)
    run = trainer(callbacks=[monitor], accelerator="cpu")
    run.validate(model, loader, verbose=False)
    assert run.callback_metrics["val_sensitivity"].item() == pytest.approx(expected(model, outputs), rel=1e-4)
