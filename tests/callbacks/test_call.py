"""A function of the module and a batch stands in for ``forward``."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_sensitivity import compare_models
from tests.helpers import Quiet, fitted, labelled, loader, quick_estimator, quick_risk, unlabelled_loader


class Headless(Quiet):
    """It has no ``forward`` of its own."""

    forward = LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


def first(batch: Any) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def classify(module: Any, batch: Any) -> Tensor:
    return module.net(first(batch))


def test_a_module_without_forward_has_the_curve_that_it_has_with_one() -> None:
    histories, means = [], []
    for kind, options in ((Headless, {"call": classify, "inputs": first}), (Quiet, {})):
        risk, model = quick_risk(**options), kind()
        fitted([risk], model, loader(), unlabelled_loader(seed=1))
        histories.append(risk.history)
        means.append(risk.predict(model, [labelled(20).tensors]).mean)
    assert histories[0] == histories[1] and "expected_loss" in histories[0][-1]
    assert torch.equal(*means)


def test_models_are_compared_by_a_function() -> None:
    options: Any = {"training": loader(150), "reference": quick_estimator()}
    new = [labelled(40, seed=1).tensors[0]]
    by_function = compare_models({"a": Headless(), "b": Headless(seed=1)}, new, call=classify, inputs=first, **options)
    assert by_function == compare_models({"a": Quiet(), "b": Quiet(seed=1)}, new, **options)
