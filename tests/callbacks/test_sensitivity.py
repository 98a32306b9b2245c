"""What SensitivityMonitor logs is what a plain loop over the same batches, weights and noise gives."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.functional import loss_estimate
from tests.helpers import Classifier, Linear, Quiet, brute_force, inputs, loader, unlabelled_loader, validated

OF_MEAN, PER_OUTPUT = "val/output_sensitivity", "val/per_output_sensitivity"


def expected(changes: Tensor) -> dict[str, float]:
    """S, and its error bar clustered by sample."""
    value, count = changes.var(correction=0), len(changes)
    by_sample = ((changes - changes.mean()).square() - value).sum(1)
    error = (by_sample.square().sum() * count / (count - 1)).sqrt() / changes.numel()
    return {"val/output_sensitivity": value.item(), "val/output_sensitivity_stderr": error.item()}


def close(values: dict[str, float], truth: dict[str, float]) -> None:
    assert {name: values[name] for name in truth} == pytest.approx(truth, rel=1e-6, abs=0)


class Centred(Classifier):
    """The samples of a batch interact."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("sizes", [[2] * 25, [3, 20, 1, 26], [50]], ids=["2, 2, ...", "3, 20, 1, 26", "50"])
@pytest.mark.parametrize("kind", [Classifier, Centred])
def test_the_values_are_those_of_a_plain_loop_over_batches_as_they_came(kind: Any, sizes: Any, num_draws: int) -> None:
    model, monitor = kind(), SensitivityMonitor(num_draws=num_draws, seed=3)
    batches = inputs(50).split(sizes)
    values = validated(monitor, model, DataLoader(batches, None))
    changes = brute_force(model.eval(), batches, num_draws, seed=3)
    close(values, expected(changes))


def test_noise_at_a_submodule_is_added_to_its_output() -> None:
    model = Classifier()
    head = model.eval().net[4]
    values = validated(SensitivityMonitor(at="net.3"), model, loader())
    hidden = [model.net[:4](x).detach() for x in inputs(50).split(16)]
    close(values, expected(brute_force(head, hidden)))


def test_of_each_output_the_value_is_the_mean_square_of_its_changes() -> None:
    model, monitor = Linear(), SensitivityMonitor(per_output=True, outputs=lambda y: y[:, 0])
    changes = brute_force(lambda x: model(x)[:, 0], inputs(50).split(16))
    close(validated(monitor, model, loader()), {"val/per_output_sensitivity": changes.square().mean().item()})
    of_probabilities = SensitivityMonitor(per_output=True, outputs=lambda y: y.softmax(1))  # else refused
    assert validated(of_probabilities, model, loader())["val/per_output_sensitivity"] > 0


def test_of_a_linear_model_it_is_the_variance_in_closed_form_and_the_loss_estimate_that_of_the_measured_power() -> None:
    model, monitor = Linear(), SensitivityMonitor(0.5, num_draws=20, num_samples=None, loss_estimate=True)
    values = validated(monitor, model, loader(1000, 70))
    truth = 0.25 * model.net.weight.detach().double().mean(0).square().sum()
    error = values["val/output_sensitivity_stderr"]
    assert abs(values["val/output_sensitivity"] - truth) < 4 * error and error < 0.05 * truth
    power = inputs(1000).double().square().mean()
    expected = loss_estimate(values["val/output_sensitivity"], power, 0.5, 4)
    assert values["val/loss_estimate"] == pytest.approx(float(expected), rel=1e-5)
    assert "val/loss_estimate" not in validated(SensitivityMonitor(), model, loader())


def test_a_missing_number_costs_the_loss_estimate_its_sample_alone() -> None:
    x = inputs(100)
    x[3, 2] = torch.nan
    monitor = SensitivityMonitor(0.5, num_samples=None, loss_estimate=True)
    with pytest.warns(UserWarning, match="1 samples gave nan or inf"):
        values = validated(monitor, Linear(), DataLoader(x, 20))
    power = x[x.isfinite()].double().square().mean()
    estimate = loss_estimate(values["val/output_sensitivity"], power, 0.5, 4)
    assert values["val/loss_estimate"] == pytest.approx(float(estimate), rel=1e-5)


# When


def test_epochs_are_logged_and_before_training_by_validate_at_step_0(tmp_path: Path) -> None:
    model, logger = Classifier(), CSVLogger(tmp_path)
    run = helpers.trainer(SensitivityMonitor(), logger=logger, max_epochs=4)
    untrained = expected(brute_force(model.eval(), inputs(50, seed=1).split(16)))
    run.validate(model.train(), loader(seed=1), verbose=False)
    run.fit(model, loader(), loader(seed=1))
    close(run.epochs[0], untrained)
    rows = helpers.csv_rows(logger.log_dir)
    curve = {int(row["step"]): float(row["val/output_sensitivity"]) for row in rows if row["val/output_sensitivity"]}
    assert [*curve] == [0, 3, 7, 11, 15] and len(set(curve.values())) == len(curve)
    assert [values["val/output_sensitivity"] for values in run.epochs] == [*curve.values()]


def test_nothing_is_measured_in_test_and_predict() -> None:
    class WithoutForward(Classifier):
        forward = LightningModule.forward
        test_step = predict_step = lambda self, batch, batch_idx: self.net(batch[0]).mean()

    model, run = WithoutForward(), helpers.trainer(callbacks=[SensitivityMonitor(), RiskMonitor()])
    assert run.test(model, loader(), verbose=False) == [{}]
    assert len(run.predict(model, loader())) == 4


# Which names


def test_several_loaders_one_of_them_empty() -> None:
    model, run = Classifier(), helpers.trainer(callbacks=[SensitivityMonitor()])
    with pytest.warns(UserWarning) as caught:
        results = run.validate(model, [loader(50), loader(0), unlabelled_loader(20, seed=1)], verbose=False)
    texts = "DataLoader` across ranks is zero", "`SensitivityMonitor` (val/*) on dataloader 1: there is no value"
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert all(text in message for text, message in zip(texts, messages, strict=True))
    for idx, values, x in ((0, results[0], inputs(50)), (2, results[-1], inputs(20, seed=1))):
        truth = expected(brute_force(model.eval(), x.split(16), loader=idx))
        close(values, {f"{name}/dataloader_idx_{idx}": value for name, value in truth.items()})
    assert not any("sensitivity" in name and name.endswith("1") for name in run.callback_metrics)


def test_the_prefix_begins_every_name() -> None:
    run = helpers.trainer(callbacks=[SensitivityMonitor(prefix="a/b_"), RiskMonitor(prefix="a/b_")])
    run.validate(Classifier(), loader(), verbose=False)
    assert helpers.logged(run, "a/").keys() == {"a/b_output_sensitivity", "a/b_output_sensitivity_stderr"}


# One name for one quantity


def test_single_outputs_have_a_name_of_their_own_and_both_may_be_logged() -> None:
    both = [SensitivityMonitor(), SensitivityMonitor(per_output=True)]
    values = validated(both, Classifier(), loader())
    assert {OF_MEAN, PER_OUTPUT, f"{PER_OUTPUT}_stderr"} < values.keys() and values[OF_MEAN] < values[PER_OUTPUT]
    helpers.fitted([*both, EarlyStopping(OF_MEAN, divergence_threshold=9.0)], Linear(), max_epochs=1)


# What is refused


@pytest.mark.parametrize(("options", "match"), [
    ({"noise": 0.0}, "`noise` should be a positive number"),
    ({"noise": [0.1, 0.2]}, "`noise` should be a positive number"),
    ({"at": 3}, "`at` should be the name of a submodule"),
    ({"num_draws": True}, "`num_draws` should be an int of 1 or more"),
    ({"per_output": 1}, "`per_output` should be a bool"),
    ({"seed": -1}, "`seed` should be an int of 0 or more"),
    *(({"tuned": each}, "`tuned` should be two positive") for each in ((12,), (0, 1.0), (1, math.nan), 12, "12")),
    ({"prefix": None}, "`prefix` should be a str"),
    ({"inputs": "x"}, "`inputs` should be a function"),
    *(({name: 1.5}, f"`{name}` should be .*, got 1.5") for name in (
        "task", "loss", "targets", "features", "validation_labels", "num_samples")),
    *(({"loss_estimate": True, **each}, "`loss_estimate` should be False, unless") for each in (
        {"at": "net"}, {"per_output": True}, {"noise": lambda x, generator: x})),
])  # fmt: skip
def test_arguments_are_checked_at_once(options: dict[str, Any], match: str) -> None:
    kind = RiskMonitor if 1.5 in options.values() else SensitivityMonitor
    with pytest.raises(MisconfigurationException, match=match):
        kind(**options)


@pytest.mark.parametrize(("options", "match"), [
    ({"noise": lambda x, generator: x[:1]}, "rows, and there are 1 outputs"),
    ({"at": "nett"}, "`at` should be the name of a submodule"),
])  # fmt: skip
def test_noise_is_tried_in_the_sanity_check(options: Any, match: str) -> None:
    helpers.refused(SensitivityMonitor(**options), Linear(), match=match)


def test_a_class_that_is_masked_is_refused_unless_its_outputs_are_finite() -> None:
    class Masked(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor([2]), -math.inf)

    helpers.refused(SensitivityMonitor(), Masked(), match=r"are -inf.*`outputs=lambda logits: logits.masked_fill\(")
    monitor = SensitivityMonitor(outputs=lambda logits: logits.masked_fill(logits.isneginf(), 0))
    assert helpers.fitted_and_said(monitor, Masked())[1] == []


# What is doubtful


def test_doubtful_values_are_said_once_for_each_loader() -> None:
    def break_some(m: Any, x: Tensor, epoch: int) -> None:
        x[: max(epoch, 0) * m.trainer.validating].fill_(torch.nan)

    broken = helpers.Acting(break_some)
    _, texts = helpers.fitted_and_said(SensitivityMonitor(), broken, val=loader(16), max_epochs=5)
    assert len(texts) == 1 and "on dataloader 0: 1 samples gave nan or inf" in texts[0]
    with helpers.said() as texts:
        validated(SensitivityMonitor(noise=lambda x, generator: x), Linear(), [loader(), loader(seed=1)])
    assert [text.partition(": No output changed")[0][-12:] for text in texts] == ["dataloader 0", "dataloader 1"]


@pytest.mark.parametrize("kind", [SensitivityMonitor, helpers.quick_risk])
@pytest.mark.parametrize(("num_samples", "options", "said"), [
    (600, {}, ["has only 49 samples of dataloader 0"]), (20, {}, []), (600, {"fast_dev_run": True}, []),
])  # fmt: skip
def test_a_loader_of_few_samples_is_said_once(
    kind: Any, num_samples: int, options: Any, said: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.monitor._FEW_SAMPLES", 50)
    val = [unlabelled_loader(size, seed=1) for size in (49, 60)]
    _, texts = helpers.fitted_and_said(kind(num_samples=num_samples), Quiet(), val=val, **options)
    assert len(texts) == len(said) and all(each in text for each, text in zip(said, texts, strict=True))
