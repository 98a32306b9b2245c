"""Several labels per sample, some unknown: what is expected, and what is said of labels that can't be told."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import MultilabelAUROC, MultilabelF1Score

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import draw_labels
from tests.callbacks.plain_loop import Plain, batches_of
from tests.helpers import fitted, fitted_and_said, inputs, quick_risk

X, NEW = inputs(240), inputs(80, seed=1)


def labels_of(x: Tensor, seed: int = 0) -> Tensor:
    """Three labels that columns of the inputs tell, and one that is yes three times, by chance."""
    generator = torch.Generator().manual_seed(seed)
    y = (x[:, :4] + 0.2 * torch.randn(len(x), 4, generator=generator) > 0.5).float()
    y[:, 3] = (torch.arange(len(x)) % 100 == 0).float()
    return y


def some_unknown(y: Tensor, mark: float = math.nan) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    y = y.where(torch.rand(y.shape, generator=generator) > 0.3, mark)
    y[::40] = mark  # all of a sample
    return y


def known_loss(outputs: Tensor, y: Tensor) -> Tensor:
    outputs = outputs.reshape(y.shape)
    known = (y >= 0) & ~y.isnan()
    return binary_cross_entropy_with_logits(outputs[known], y[known].double())


Y, Y_NEW = labels_of(X), labels_of(NEW, seed=1)
TOLD = [0, 1, 2]


def network(num_outputs: int = 4) -> Plain:
    return Plain(num_outputs, known_loss)


def by_reference(monitor: RiskMonitor, model: Any) -> tuple[Tensor, Tensor]:
    """The outputs of a network in the end, and the reference's predictions."""
    with torch.no_grad():
        outputs = model.eval()(NEW)
    return outputs, torch.from_numpy(monitor.reference.predict_proba(NEW))


@pytest.mark.parametrize("y", [Y, some_unknown(Y), some_unknown(Y, -100).long()], ids=["all", "nan", "-100"])
def test_values_are_means_over_the_labels_that_the_reference_can_tell(y: Tensor) -> None:
    monitor, model = quick_risk("multilabel"), network()
    fitted(monitor, model, batches_of(X, y), batches_of(NEW), max_epochs=1)
    outputs, q = by_reference(monitor, model)
    found = monitor.history[-1]
    loss = binary_cross_entropy_with_logits(outputs[:, TOLD], q[:, TOLD])
    assert found["expected_loss"] == pytest.approx(float(loss), rel=1e-5)
    right = q.where(outputs > 0, 1 - q)[:, TOLD].mean()
    assert found["expected_accuracy"] == pytest.approx(float(right), abs=0.01)
    both, twice = [0] * 80 + [1] * 80, outputs.repeat(2, 1)
    weights = torch.cat([1 - q, q])
    areas = [roc_auc_score(both, twice[:, each], sample_weight=weights[:, each]) for each in TOLD]
    assert found["expected_auroc"] == pytest.approx(sum(areas) / 3, abs=0.01)
    assert monitor.summary["blind_labels"] == [3]
    assert monitor.predict(model, batches_of(NEW)).mean.shape == (80, 4)


LATE = Y.index_put((torch.arange(16), torch.tensor(2)), torch.tensor(math.nan))  # the first batch knows none of label 2
EDGES: dict[str, tuple[Tensor, dict[str, Any], list[int]]] = {  # labels, options, and the labels that can't be told
    "no positive": (Y.where(torch.arange(4) < 3, 0.0), {}, [3]),
    "never known": (Y.where(torch.arange(4) < 3, math.nan), {}, [3]),
    "one label": (some_unknown(Y[:, :1]), {}, []),
    "one label, flat": (some_unknown(Y)[:, 0], {}, []),
    "soft labels": (0.8 * Y + 0.1, {}, [3]),
    "16 bits": (some_unknown(Y).half(), {}, [3]),
    "the reference's own learners": (some_unknown(Y), {"reference": None}, [3]),
    "F1": (some_unknown(Y), {"metrics": {"auroc": MultilabelF1Score(4)}, "validation_labels": True}, [3]),
    "AUROC of torchmetrics": (LATE, {"metrics": {"auroc": MultilabelAUROC(4)}}, [3]),
    "validation labels, some unknown": (some_unknown(Y), {"validation_labels": True}, [3]),
}


@pytest.mark.parametrize("what", EDGES)
def test_no_run_ends_and_the_last_line_names_labels_that_can_not_be_told(what: str) -> None:
    y, options, blind = EDGES[what]
    monitor, val = quick_risk("multilabel", **options), batches_of(NEW, some_unknown(Y_NEW)[:, : y[0].numel()])
    run, texts = fitted_and_said(monitor, network(y[0].numel()), batches_of(X, y), val)
    assert not texts and all(0 < row["expected_auroc"] < 1 for row in monitor.history)
    assert monitor.summary["blind_labels"] == blind
    assert 0 < float(run.callback_metrics["val/expected_loss"]) < 2


def test_validation_labels_count_by_those_that_are_known() -> None:
    y = some_unknown(Y_NEW)
    with_labels, without = (quick_risk("multilabel", validation_labels=each) for each in (True, False))
    for monitor in (with_labels, without):
        fitted(monitor, model := network(), batches_of(X, Y), batches_of(NEW, y), max_epochs=1)
    outputs, number = by_reference(with_labels, model)[0], with_labels.history[-1]["num_labels"]
    assert number == math.ceil((~y.isnan()).sum() / 4)
    by_labels = float(known_loss(outputs[:, TOLD], y[:, TOLD]))
    expected = (number * by_labels + 1000 * without.history[-1]["expected_loss"]) / (number + 1000)
    assert with_labels.history[-1]["expected_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_the_user_gets_a_number_for_every_label() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    monitor, model = quick_risk("multilabel", loss=loss), network()
    fitted(monitor, model, batches_of(X, some_unknown(Y).double()), batches_of(NEW), max_epochs=1)
    outputs, q = by_reference(monitor, model)
    # Draws depend on the order of samples, whose mean over 20 is close to the probability.
    expected = torch.stack([loss(outputs, each.double()) for each in draw_labels(q, "multilabel")]).mean()
    assert monitor.history[-1]["expected_loss"] == pytest.approx(float(expected), rel=0.02)
