"""What RiskMonitor logs is what a plain loop gives, over batches of unequal sizes, of whatever kind."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as cb
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassF1Score, MulticlassRecall

import tests.helpers as helpers
from lightning_sensitivity import Reference, RiskMonitor
from lightning_sensitivity.functional import expected_metric
from lightning_sensitivity.reference.calibration import reweigh
from lightning_sensitivity.reference.observations import projection
from tests.callbacks.plain_loop import AUROC, CORRECT, HOLDOUT, LOSS, NOISY, Plain, Truth, X, batches_of, fit, names_of
from tests.helpers import Classifier, blind, first_tensor, fitted, fitted_and_said, loader, logged, quick_risk
from tests.helpers import unlabelled_loader as unlabelled

INDEX = torch.arange(90)
SOME = helpers.labelled(50, seed=1).tensors[1].where(torch.arange(50) % 2 > 0, -100)


@pytest.fixture(autouse=True)
def little_skill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 90 samples, also an encoder with random weights is trusted."""
    monkeypatch.setattr("lightning_sensitivity.reference.reference._LEAST_SKILL", 0)


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs).reshape(outputs.shape))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return mse_loss(outputs, targets.to(outputs).reshape(outputs.shape))


def images(x: Tensor) -> Tensor:
    """The first feature is in one corner, and so on."""
    squares = torch.nn.functional.interpolate(x[:, :4].reshape(-1, 1, 2, 2), size=8)
    return squares + 0.1 * x.repeat(1, 6)[:, :64].reshape(-1, 1, 8, 8)


class Centred(Plain):
    """The samples of a batch interact."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs - outputs.mean(0)


class Squeezed(Plain):
    """Its outputs are (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class Overflowing(Plain):
    """Its outputs are nan for a sample that has a label, and one that has none."""

    def forward(self, x: Tensor) -> Tensor:
        is_lost = torch.isin(x[:, 0], HOLDOUT[3:5, 0])
        return super().forward(x).masked_fill(is_lost[:, None] & (not self.training), math.nan)


# By a plain loop


@dataclass(frozen=True)
class Case:
    """The labels, the model, what becomes of the features, labels of validation samples, and options."""

    labels: Tensor = NOISY
    make: Any = Plain
    x: Any = lambda x: x
    holdout_labels: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the monitor
    seen: Any = first_tensor  # by the reference, of a batch
    is_blind: bool = False
    num_said: int = 0


class Encoder(nn.Module):
    """It is in training mode, and calls a function with the number of samples that it runs on."""

    def __init__(self, call: Any = len) -> None:
        super().__init__()
        self.net, self.call = nn.Sequential(nn.Linear(12, 6), nn.Dropout(0.5)), call
        nn.init.eye_(self.net[0].weight)  # of the columns that decide
        nn.init.zeros_(self.net[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        self.call(x)
        return self.net(x)


ENCODER = Encoder()


def encoded(batch: Any) -> Tensor:
    return ENCODER.net[0](first_tensor(batch)).detach()


CASES = {
    "multiclass": Case(),
    "multiclass, samples that interact": Case(make=Centred),
    "multiclass, an encoder": Case(options={"features": ENCODER}, seen=encoded),
    "multiclass, class_shares=": Case(options={"class_shares": torch.tensor([0.1, 0.2, 0.3, 0.4])}),
    "multiclass, blind": Case(options={"features": blind}, seen=blind, is_blind=True),
    "multiclass, images": Case(CORRECT.where(INDEX % 4 > 0, NOISY), lambda: Plain(width=64), images),
    "multiclass, images, labels": Case(CORRECT, lambda: Plain(width=64), images, SOME),
    "multiclass, labels": Case(holdout_labels=SOME),
    "multiclass, labels, blind": Case(
        holdout_labels=SOME, options={"features": blind}, seen=blind, is_blind=True),
    "multiclass, labels, some outputs are nan": Case(make=Overflowing, holdout_labels=SOME, num_said=1),
    "binary": Case((NOISY > 1).float(), lambda: Plain(1, bce)),
    "binary, labels": Case((NOISY > 1).long(), lambda: Squeezed(1, bce), holdout_labels=SOME.clamp(max=1).float()),
    "regression": Case(X[:, :1] + X[:, 1:2].sin(), lambda: Plain(1, mse)),
    "regression, two targets": Case(X[:, :2] + 0.1 * X[:, 2:4], lambda: Plain(2, mse)),
    "regression, labels": Case(X[:, :2].sum(1), lambda: Plain(1, mse), holdout_labels=HOLDOUT[:, :2].sum(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_a_plain_loop(name: str) -> None:
    case, task, has_labels = CASES[name], name.partition(",")[0], CASES[name].holdout_labels is not None
    monitor = RiskMonitor(task, validation_labels=has_labels, **case.options)
    truth = Truth(task, case.seen, has_labels=has_labels, shares=case.options.get("class_shares"))
    val = batches_of(case.x(HOLDOUT), *([case.holdout_labels] if has_labels else []))
    _, texts = fitted_and_said([monitor, truth], case.make(), batches_of(case.x(X), case.labels), val, max_epochs=3)
    assert len(texts) == case.num_said + (case.is_blind and not has_labels)
    assert monitor.summary["is_trusted"] != case.is_blind
    assert sum("expected_loss" in row for row in monitor.history) == (3 if has_labels or not case.is_blind else 0)


def test_the_reference_is_made_once_in_the_first_validation_after_a_whole_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits, fit_it = list[Any](), Reference.fit
    monkeypatch.setattr(Reference, "fit", lambda *args: fits.append(args) or fit_it(*args))
    train, monitor = batches_of(X, NOISY, batch_size=10), quick_risk()
    run = fit(Plain(), monitor, train=train, val_check_interval=3, num_sanity_val_steps=0)
    assert [row["step"] for row in monitor.history] == [3, 6, 9, 12, 15, 18]
    assert [row["reference_score"] for row in monitor.history] == [None] * 2 + [monitor.reference.score_] * 4
    assert [epoch[LOSS] < 1e38 and epoch[AUROC] > -1e38 for epoch in run.epochs] == [False] * 2 + [True] * 4
    assert monitor.summary["num_training"] == 90 and monitor.summary["num_gaps"] == 2 and len(fits) == 1


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("place", [3, 6])  # of seven
def test_a_batch_of_each_epoch_may_be_none(place: int) -> None:
    batches = [*zip(X.split(16), NOISY.split(16), strict=True)]
    train = DataLoader([*batches[:place], None, *batches[place:]], None)  # type: ignore[list-item]
    fitted(monitor := quick_risk(), Plain(), train, unlabelled(seed=1), max_epochs=3)
    assert all("expected_loss" in row for row in monitor.history) and len(monitor.history) == 3
    assert monitor.summary["num_training"] == 90


def test_an_encoder_runs_once_on_kept_samples_and_is_left_alone_and_not_saved(tmp_path: Path) -> None:
    sizes = list[int]()
    encoder = Encoder(lambda x: sizes.append(len(x)))
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    monitor, path = quick_risk(features=encoder, num_samples=20), tmp_path / "last.ckpt"
    fit(Plain(), monitor, max_epochs=3, precision="bf16-mixed", num_sanity_val_steps=0).save_checkpoint(path)
    assert sum(sizes) == 90 + 22 and monitor.summary["num_training"] == 90  # 7 of three batches, 1 of the last
    assert encoder.training and all(weight.requires_grad for weight in encoder.parameters())
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == Plain().state_dict().keys()


@pytest.mark.parametrize("change", ["", "trained", "buffers"])
def test_an_encoder_may_be_a_part_of_the_network_if_nothing_changes_it(change: str) -> None:
    model = Plain()
    body = nn.Sequential(nn.Flatten(), model.net[0].requires_grad_(change == "trained"))
    if change == "buffers":
        body.append(nn.BatchNorm1d(16, affine=False).double())
        model.net.insert(1, body[2])
    match = "is trained with the network, or has buffers that change"
    with pytest.raises(MisconfigurationException, match=match) if change else nullcontext():
        fit(model, quick_risk(features=body))


@pytest.mark.parametrize("batch_size", [16, 90])
def test_a_step_that_writes_to_its_batch_changes_nothing_also_to_all_of_the_data(batch_size: int) -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(), Writer()
    for _ in range(2):  # a second fit has samples and a reference of its own
        fit(model, monitor, Truth(), train=batches_of(X.clone(), NOISY.clone(), batch_size=batch_size))


def test_precisions_give_nearly_the_same() -> None:
    data, precisions = (loader(50), unlabelled(50, seed=1)), ("32-true", "bf16-mixed", "bf16-true", "64-true")
    found, predicted = [], []
    for each in precisions:
        run = fitted(monitor := quick_risk(), model := Classifier(0.0), *data, precision=each)
        found.append(logged(run, LOSS))
        predicted.append(monitor.predict(model, data[1]).mean)
    assert found[1:] == [pytest.approx(found[0], rel=0.05)] * 3
    for each in predicted[1:]:
        torch.testing.assert_close(each, predicted[0], rtol=0, atol=0.02, check_dtype=False)


def test_each_of_several_loaders_has_values_under_lightnings_names() -> None:
    def values(loaders: Any) -> dict[str, float]:
        model = Plain()
        model.net[2].p = 0.0  # each loader draws a random number
        return logged(fit(model, quick_risk(), val=loaders), "val/expected_")

    first, second = unlabelled(50, seed=1), unlabelled(20, seed=2)
    both, alone, other = values([first, second]), values(first), values(second)
    expected = {f"{name}/dataloader_idx_0": value for name, value in alone.items()}
    expected |= {f"{name}/dataloader_idx_1": value for name, value in other.items()}
    assert both == pytest.approx(expected, rel=1e-5) and len(both) == 2 * len(names_of("multiclass"))


# Metrics


def of_functions(monitor: RiskMonitor, model: Any, metrics: dict[str, Any]) -> dict[str, float]:
    order = projection({"columns": HOLDOUT}).argsort()
    with torch.no_grad():
        outputs = model.eval()(HOLDOUT[order])
    q = monitor.reference.predict_proba(HOLDOUT[order])
    return {f"val/expected_{name}": float(expected_metric(each, outputs, q)) for name, each in metrics.items()}


@pytest.mark.parametrize("kind", [dict, MetricCollection])
@pytest.mark.filterwarnings("ignore:All values of")  # with older versions, one class is always chosen
def test_any_metric_of_torchmetrics_has_an_expected_value_in_its_own_direction(kind: Any) -> None:
    metrics = {"f1": MulticlassF1Score(4), "recall": MulticlassRecall(4, average="macro")}
    monitor, stopping = quick_risk(metrics=kind(metrics)), cb.EarlyStopping("val/expected_f1", mode="max", patience=9)
    model = Plain()
    run = fit(model, monitor, stopping)
    expected = of_functions(monitor, model, metrics)
    assert {name: run.callback_metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert logged(run, "val/").keys() == {LOSS, *expected}
    assert float(stopping.best_score) == max(epoch["val/expected_f1"] for epoch in run.epochs)


def test_without_metrics_there_is_the_score_and_metrics_of_a_regression_get_outputs_and_targets() -> None:
    assert logged(fit(Plain(), quick_risk(metrics={})), "val/").keys() == {LOSS}
    metrics = {"mae": MeanAbsoluteError(), "r2": R2Score()}
    train = batches_of(X, X[:, :1] + 0.01 * X[:, 1:2], batch_size=89)  # R² of a batch of one sample is none
    model, val = Plain(1, mse), batches_of(HOLDOUT, HOLDOUT[:, :1])
    run = fit(model, quick_risk("regression", metrics=metrics), train=train, val=val)
    found = logged(run, "val/expected_")
    true = mse_loss(model.eval()(HOLDOUT), HOLDOUT[:, :1].double()).sqrt().item()
    assert found["val/expected_mae"] < 1.1 * true and found["val/expected_r2"] < 1  # it is linear


# Other references and classes


def test_of_a_thousand_classes_there_is_no_auroc() -> None:
    train, model = batches_of(X, 300 * NOISY), Plain(1000)
    run = fit(model, monitor := quick_risk(), train=train)
    names = names_of("multiclass", 1000)
    assert logged(run, "val/").keys() == names and AUROC not in names
    run.validate(model, unlabelled(seed=1), verbose=False)
    assert {f"val/{name}" for name in monitor.names} == names and monitor.names[0] == "expected_accuracy"
    stopping = cb.EarlyStopping(AUROC, mode="max")
    helpers.refused([quick_risk(), stopping], Plain(1000), train, match=f"monitors `{AUROC}`, which is not logged")


ESTIMATORS: dict[str, tuple[str, Any, Tensor, Any]] = {
    "LogisticRegression": ("multiclass", LogisticRegression(), NOISY, Plain),
    # It draws from NumPy's stream of random numbers.
    "RandomForestClassifier": ("binary", RandomForestClassifier(9), (NOISY > 1).float(), lambda: Plain(1, bce)),
    "Ridge": ("regression", Ridge(), X[:, :2] + X[:, 2:4], lambda: Plain(2, mse)),
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_estimator_may_be_the_reference_and_predicts_beside_the_network(name: str) -> None:
    task, estimator, labels, make = ESTIMATORS[name]
    monitor, model, val = RiskMonitor(task, reference=estimator), make(), unlabelled(seed=1)
    with pytest.raises(ValueError, match="Expected a fit that has made a reference"):
        monitor.predict(model, val)
    stream: Any = np.random.get_state()
    _, texts = fitted_and_said(monitor, model, batches_of(X, labels), val)
    assert repr(np.random.get_state()) == repr(stream)
    assert not texts and monitor.summary["learner"] == monitor.reference.learner_ == name
    assert monitor.reference.skill_ > 0.01 and not hasattr(estimator, "n_features_in_")  # a copy was fitted
    before = {key: each.clone() for key, each in model.state_dict().items()}
    both = monitor.predict(model.train(), val)
    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with torch.no_grad():
        z = model.eval()(HOLDOUT)
    p = {"multiclass": z.softmax(1), "binary": torch.cat([-z, z], 1).sigmoid(), "regression": z}[task]
    known = monitor.reference.predict if task == "regression" else monitor.reference.predict_proba
    q = torch.from_numpy(known(HOLDOUT))
    torch.testing.assert_close([both.network, both.reference, both.mean], [p, q, (p + q) / 2], check_dtype=False)


def test_class_shares_hold_for_all_predictions_and_no_other_accuracy_is_compared() -> None:
    monitor, model, val = quick_risk(class_shares=[0.1, 0.2, 0.3, 0.4]), Plain(), unlabelled(seed=1)
    fitted(monitor, model, batches_of(X, CORRECT), val, max_epochs=2)
    q = torch.from_numpy(monitor.reference.predict_proba(HOLDOUT))
    of_training = torch.from_numpy(monitor.reference.shares_)
    expected = reweigh(q, of_training, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(monitor.predict(model, val).reference, expected, check_dtype=False)
    with pytest.raises(ValueError, match="Expected batches in `dataloader`, but got none"):
        monitor.predict(model, [])


def test_a_row_with_nan_keeps_its_place_without_a_prediction_by_the_reference() -> None:
    monitor, model = quick_risk(), Plain()
    fitted(monitor, model, batches_of(X, CORRECT), unlabelled(seed=1), max_epochs=1)
    x = HOLDOUT.clone()
    x[3, 0] = math.nan
    with pytest.warns(UserWarning, match="leaves out 1 samples with nan or inf"):
        found, whole = monitor.predict(model, [x[:20], x[20:]]), monitor.predict(model, [HOLDOUT])
    rows = torch.arange(50) != 3
    torch.testing.assert_close(found.reference[rows], whole.reference[rows])
    assert bool(found.reference[3].isnan().all()) and found.network.shape == found.reference.shape
    with pytest.raises(ValueError, match="No sample has finite inputs"):
        monitor.predict(model, [x[3:4]])


# Where labels are


def test_labels_that_do_not_fit_and_batches_without_any_are_said_and_cost_no_run() -> None:
    for labels, match in (
        (CORRECT[:50] + 7, "could not keep a validation batch: `targets` should fit the outputs"),
        (SOME * 0 - 100, "found no label"),
    ):
        monitor, val = quick_risk(validation_labels=True), batches_of(HOLDOUT, labels)
        run, texts = fitted_and_said(monitor, Plain(), batches_of(X, NOISY), val, num_sanity_val_steps=0)
        assert any(match in text for text in texts)
        assert run.current_epoch == 2 and [row["num_labels"] for row in monitor.history] == [0, 0]


def test_of_samples_that_may_have_labels_more_are_kept() -> None:
    sizes = [(100, 2000), (3000, 3000), (None, None)]
    assert [(each, quick_risk(validation_labels=True, num_samples=each).num_samples) for each, _ in sizes] == sizes


def test_labels_in_a_validation_batch_do_not_count_unless_they_are_wanted() -> None:
    found = [logged(fit(Plain(), quick_risk(), val=batches_of(HOLDOUT, y)), LOSS) for y in (SOME, CORRECT[:50])]
    assert found[0] == found[1]


@pytest.mark.parametrize("sees", [True, False])
def test_labels_of_a_single_class_have_a_score_and_count_in_no_metric_that_needs_two(sees: bool) -> None:
    monitor, alone = (quick_risk(validation_labels=each) for each in (True, False))
    monitor = monitor if sees else RiskMonitor(validation_labels=True, features=blind)
    both, other = (logged(fit(Plain(), each, val=batches_of(HOLDOUT, 0 * SOME))) for each in (monitor, alone))
    assert both.get(AUROC) == (other[AUROC] if sees else None) and both[LOSS] < 2
    assert ("expected_auroc" in monitor.history[-1]) == sees
    assert both["val/expected_accuracy"] != other["val/expected_accuracy"] and both["val/expected_accuracy"] < 1
