"""A loss of the user's own is expected on labels that are drawn, as a plain loop computes it."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gaussian_nll_loss, huber_loss, mse_loss, one_hot, softplus
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import draw_labels
from lightning_sensitivity.reference.observations import projection
from tests.callbacks.plain_loop import CORRECT, HOLDOUT, NOISY, Plain, X, batches_of, fit
from tests.helpers import fitted, fitted_and_said, logged, quick_risk, refused, unlabelled_loader

QUANTILES, TARGETS = torch.tensor([0.1, 0.5, 0.9]), X[:, 0] + X[:, 1].sin()


def pinball(outputs: Tensor, y: Tensor) -> Tensor:
    errors = y[:, None] - outputs
    return torch.maximum(QUANTILES * errors, (QUANTILES - 1) * errors).mean(1)


def nll(outputs: Tensor, y: Tensor) -> Tensor:
    return gaussian_nll_loss(outputs[:, 0], y, softplus(outputs[:, 1]) + 0.01)


CASES: dict[str, tuple[str, Tensor, int, Any]] = {  # the task, labels, the number of outputs, and the loss
    "class weights": ("multiclass", NOISY, 4, nn.CrossEntropyLoss(torch.tensor([1.0, 9.0, 2.0, 3.0]).double())),
    "soft labels": ("multiclass", one_hot(NOISY, 4).double(), 4, cross_entropy),
    "quantiles, of each sample": ("regression", TARGETS, 3, pinball),
    "mean and deviation": ("regression", TARGETS, 2, nll),
    "one that writes to outputs": ("multiclass", NOISY, 4, lambda outputs, y: cross_entropy(outputs.mul_(2), y)),
    "Huber": ("regression", TARGETS[:, None].double(), 1, huber_loss),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_a_plain_loop_over_drawn_labels(name: str) -> None:
    task, y, num_outputs, loss = CASES[name]
    monitor, model = RiskMonitor(task, loss=loss), Plain(num_outputs, lambda *args: loss(*args).mean())
    run = fit(model, monitor, train=batches_of(X, y), val=unlabelled_loader(seed=1))
    x = HOLDOUT[projection({"columns": HOLDOUT}).argsort()]
    reference, outputs = monitor.reference, model.eval()(x).detach()
    q = reference.predict_matrix(x)
    draws = draw_labels(q, task, reference.residuals_)
    draws = one_hot(draws, 4).double() if y.ndim == 2 and task == "multiclass" else draws
    values = [loss(outputs.clone(), each.reshape(len(x), *y.shape[1:]).to(y)).mean() for each in draws]
    assert logged(run, "val/expected_loss")["val/expected_loss"] == pytest.approx(float(sum(values) / 20), rel=1e-5)
    predictions = monitor.predict(model, DataLoader(HOLDOUT, 20))
    with nullcontext() if task == "multiclass" else pytest.raises(ValueError, match="With a `loss=`"):
        assert torch.equal(predictions.mean, (predictions.network + predictions.reference) / 2)


REFUSED: dict[str, tuple[Any, str]] = {
    "a sum": (lambda o, y: cross_entropy(o, y, reduction="sum"), "should be a mean over samples"),
    "a small sum": (lambda o, y: 1e-6 * cross_entropy(o, y, reduction="sum"), "should be a mean over samples"),
    "nan": (lambda o, y: o.sum() * math.nan, "should be finite"),
    "an error": (lambda o, y: cross_entropy(o, y.float()), r"`loss` fails on outputs \(16, 4\) and labels \(16,\)"),
    "a loss and more": (lambda o, y: (cross_entropy(o, y), o.sum()), "a function that returns one tensor, .*, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_first_step(name: str) -> None:
    loss, match = REFUSED[name]
    refused([quick_risk(loss=loss)], Plain(), batches_of(X, CORRECT), unlabelled_loader(), match=match)


def ranking(outputs: Tensor, y: Tensor) -> Tensor:
    outputs, y = outputs.flatten(), y.flatten()
    return (1 - (outputs[:, None] - outputs) * (y[:, None] - y).sign()).relu().mean()


PAIRED: dict[str, tuple[Any, bool]] = {  # losses of outputs (N, 1) and targets (N,); is each compared with its own?
    "of both as they are": (mse_loss, False),
    "of both as they are, small": (lambda outputs, y: 1e-8 * mse_loss(outputs, y), False),
    "of both as they are, a number for each": (lambda outputs, y: (outputs - y).abs(), False),
    "of flattened outputs": (lambda outputs, y: huber_loss(outputs.flatten(), y), True),
    "of targets with a dimension more": (lambda outputs, y: (outputs - y[:, None]).abs(), True),
    "of all pairs of samples": (ranking, True),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", PAIRED)
def test_a_loss_that_torch_broadcasts_is_refused(name: str) -> None:
    loss, is_fine = PAIRED[name]
    monitor, model = RiskMonitor("regression", loss=loss), Plain(1, lambda outputs, y: mse_loss(outputs.flatten(), y))
    train = batches_of(X, TARGETS.double())  # as the outputs, which is what older versions of torch need
    if is_fine:
        fit(model, monitor, train=train)
        assert "expected_loss" in monitor.history[0]
    else:
        refused(monitor, model, train, match=r"\(16, 1\) and labels \(16,\) are broadcast: give both")


class Balanced(nn.Module):
    """Class weights from the labels of the last batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shares", torch.ones(4).double() / 4)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.shares.mul_(0.9).add_(0.1 * torch.bincount(y, minlength=4) / len(y))
        return cross_entropy(outputs, y, 1 / self.shares)


@pytest.mark.parametrize("take", [lambda loss: loss, lambda loss: loss.forward, lambda loss: lambda *args: loss(*args)])
def test_a_loss_that_keeps_something_beside_the_network_is_left_as_it_was(take: Any) -> None:
    found = []
    for has_monitor in (False, True):
        loss = Balanced()
        model = Plain(loss=lambda *args, loss=loss: loss(*args))
        fitted([quick_risk(loss=take(loss))] * has_monitor, model, batches_of(X, NOISY), unlabelled_loader(seed=1))
        found.append([*model.state_dict().values(), loss.shares])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("lowest", [-math.inf, 0])
def test_a_loss_that_does_not_take_all_drawn_targets_gives_no_value(lowest: float) -> None:
    def of_roots(outputs: Tensor, y: Tensor) -> Tensor:
        return (softplus(outputs).sqrt() - y.clamp(min=lowest).sqrt()).square().mean(1)

    model, prices = Plain(1, lambda *args: of_roots(*args).mean()), (2 * X[:, :1]).double().exp()
    monitor = quick_risk("regression", loss=of_roots)
    _, texts = fitted_and_said(monitor, model, batches_of(X, prices), unlabelled_loader(seed=1), max_epochs=2)
    assert ["expected_loss" in row for row in monitor.history] == [lowest == 0] * 2
    assert sum("gets nan from `loss`" in text for text in texts) == (lowest != 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_later_is_said_once_and_ends_no_run(value: float) -> None:
    model = Plain()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs, y) + (value if model.current_epoch > 0 and not model.training else 0.0)

    stopping = EarlyStopping("val/expected_loss", patience=9)
    monitor = quick_risk(loss=loss)
    run, texts = fitted_and_said([monitor, stopping], model, batches_of(X, CORRECT), max_epochs=3)
    assert run.current_epoch == 3 and ["expected_loss" in row for row in monitor.history] == [True, False, False]
    assert len(texts) == 1 and f"gets {value} from `loss`" in texts[0]
