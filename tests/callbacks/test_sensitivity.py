"""What SensitivityMonitor logs is what a plain loop over the same batches, weights and noise gives."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.functional import loss_estimate
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    History,
    Linear,
    Quiet,
    Scheduled,
    Watch,
    brute_force,
    csv_rows,
    inputs,
    labelled,
    loader,
    trainer,
    unlabelled_loader,
    validated,
)

NAMES = ("sensitivity", "sensitivity_stderr", "sensitivity_log10", "loss_estimate")
LAYERS = ["net.0", "net.2", "net.4"]
Pair = namedtuple("Pair", ["image", "label"])


def expected(changes: Tensor) -> dict[str, float]:
    """S, its error bar clustered by sample, and log10."""
    value, count = changes.var(correction=0), len(changes)
    by_sample = ((changes - changes.mean()).square() - value).sum(1)
    error = (by_sample.square().sum() * count / (count - 1)).sqrt() / changes.numel()
    return {"val_" + name: each.item() for name, each in zip(NAMES, (value, error, value.log10()), strict=False)}


def close(values: dict[str, float], truth: dict[str, float], rel: float = 1e-9) -> None:
    assert {name: values[name] for name in truth} == pytest.approx(truth, rel=rel, abs=0)


@pytest.mark.parametrize(("batch_size", "num_draws"), [(1, 1), (7, 3), (50, 1), (16, 2)])
def test_the_values_are_those_of_a_plain_loop(batch_size: int, num_draws: int) -> None:
    model, monitor = Classifier(), SensitivityMonitor(num_draws=num_draws, seed=3)
    values = validated(monitor, model, loader(50, batch_size))
    truth = expected(found := brute_force(model.eval(), inputs(50).split(batch_size), num_draws, seed=3))
    close(values, truth)
    estimate = loss_estimate(truth["val_sensitivity"], inputs(50).double().square().mean(), 0.1, NUM_CLASSES)
    assert values["val_loss_estimate"] == pytest.approx(estimate.item(), rel=1e-6)  # power is summed in 32 bits
    per_sample = (found - found.mean()).square().mean(1)
    torch.testing.assert_close(monitor.metrics[0].per_sample, per_sample, rtol=1e-9, atol=1e-15)


def test_every_epoch_is_logged_and_before_training_by_validate_at_step_0(tmp_path: Any) -> None:
    model, history, logger = Classifier(), History(), CSVLogger(tmp_path)
    run = trainer(callbacks=[SensitivityMonitor(), history], logger=logger, max_epochs=3)
    untrained = expected(brute_force(model.eval(), inputs(50, seed=1).split(16)))
    run.validate(model.train(), loader(seed=1), verbose=False)
    run.fit(model, loader(), loader(seed=1))
    close(history.epochs[0], untrained)
    close(history.epochs[-1], expected(brute_force(model.eval(), inputs(50, seed=1).split(16))))
    curve = {int(row["step"]): float(row["val_sensitivity"]) for row in csv_rows(logger.log_dir) if row["val_loss"]}
    assert curve == dict(zip((0, 3, 7, 11), (epoch["val_sensitivity"] for epoch in history.epochs), strict=True))
    assert len(set(curve.values())) == 4


@pytest.mark.parametrize(("prefix", "test"), [("val_", "test_"), ("val/", "test/"), ("a_", "test_a_")])
def test_names_of_trainer_test(prefix: str, test: str) -> None:
    run = trainer(callbacks=[SensitivityMonitor(prefix=prefix)])
    (values,) = run.test(Classifier(), loader(), verbose=False)
    assert values.keys() == {"test_loss", *(test + name for name in NAMES)}


def test_several_loaders_one_of_them_empty() -> None:
    model, run = Classifier(), trainer(callbacks=[SensitivityMonitor()])
    loaders = [loader(50), DataLoader(labelled(0)), unlabelled_loader(20, seed=1)]
    with pytest.warns(UserWarning) as caught:
        results = run.validate(model, loaders, verbose=False)
    said = ["DataLoader` across ranks is zero", "dataloader 1: A variance needs two output changes or more"]
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert all(text in message for text, message in zip(said, messages, strict=True))
    truths = [expected(brute_force(model.eval(), inputs(50).split(16)))["val_sensitivity"]]
    truths.append(expected(brute_force(model, inputs(20, seed=1).split(16), loader=2))["val_sensitivity"])
    for idx, values, truth in ((0, results[0], truths[0]), (2, results[-1], truths[1])):
        close(values, {f"val_sensitivity/dataloader_idx_{idx}": truth})
        assert {f"val_{name}/dataloader_idx_{idx}" for name in NAMES} <= values.keys()
    assert not any("idx_1" in name for name in run.callback_metrics)


def test_per_output_is_the_mean_over_the_single_outputs() -> None:
    model, batches = Classifier(), inputs(50).split(16)
    values = validated(SensitivityMonitor(per_output=True, outputs=lambda y: y.softmax(1)), model, loader())
    each = [
        brute_force(lambda x, k=k: model.eval()(x).softmax(1)[:, k], batches).square().mean()
        for k in range(NUM_CLASSES)
    ]
    close(values, {"val_sensitivity": sum(each).item() / NUM_CLASSES})
    assert "val_loss_estimate" not in values


# Which batches are measured, and what it costs


def counted() -> tuple[Quiet, list[int]]:
    """A model, and the size of the batch of each of its passes, which its step makes none of."""
    model, sizes = Quiet(), list[int]()
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return model, sizes


@pytest.mark.parametrize(("options", "sites", "chosen"), [
    ({"num_samples": None, "num_draws": 2}, 1, range(20)),
    ({"num_samples": 50}, 1, range(0, 20, 4)),
    ({"num_samples": 50, "num_draws": 2}, 1, [0, 7, 14]),
    ({"num_samples": 51}, 1, [0, 4, 7, 10, 14, 17]),
    ({"num_samples": 40, "at": LAYERS, "num_draws": 2}, 3, [0, 10]),
])  # fmt: skip
def test_a_budget_picks_evenly_spaced_whole_batches_and_counts_passes(options: Any, sites: int, chosen: Any) -> None:
    (model, sizes), draws = counted(), options.get("num_draws", 1)
    values = validated(SensitivityMonitor(**options), model, unlabelled_loader(200, 10))
    assert len(sizes) == 1 + len(chosen) * (1 + sites * draws)  # and one that looks at the outputs, once a run
    if sites == 1:
        batches = {idx: x for idx, x in enumerate(inputs(200).split(10)) if idx in chosen}
        close(values, expected(brute_force(model.eval(), batches, draws)))


@given(
    num_samples=st.integers(1, 5000),
    num_draws=st.integers(1, 5),
    batch_size=st.integers(1, 300),
    num_batches=st.integers(1, 200),
    world_size=st.integers(1, 8),
)
def test_as_many_batches_as_needed(
    num_samples: int, num_draws: int, batch_size: int, num_batches: int, world_size: int
) -> None:
    monitor = SensitivityMonitor(num_samples=num_samples, num_draws=num_draws)
    monitor._batch_sizes[0], monitor._num_batches = batch_size, [num_batches]
    loop: Any = SimpleNamespace(world_size=world_size)
    chosen = [idx for idx in range(num_batches) if monitor._wants(loop, idx, 0)]
    needed = math.ceil(math.ceil(num_samples / world_size / num_draws) / batch_size)
    assert len(chosen) == min(num_batches, needed) == monitor.num_wanted(loop, 0)
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], num_batches], strict=True)]
    assert chosen[0] == 0 and max(gaps) - min(gaps) <= 1


def test_a_budget_counts_the_samples_of_the_outputs() -> None:
    class SequenceFirst(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(0))

    monitor = SensitivityMonitor(num_samples=40, inputs=lambda batch: batch.expand(30, 5, NUM_FEATURES))
    validated(monitor, SequenceFirst(), DataLoader(inputs(100), 5))
    assert monitor.metrics[0].num_samples == 40


def test_after_the_first_batch_no_batch_waits_for_the_device() -> None:
    num_calls = 0

    def waits(function: Any, *_: Any) -> None:
        assert function is not torch.ops.aten._local_scalar_dense.default

    def refusing(measured: Callable[..., None], place: int) -> Callable[..., None]:
        def hook(*args: Any) -> None:  # the index of the batch is at `place`
            nonlocal num_calls
            with Watch(waits) if args[place] else torch.no_grad():
                measured(*args)
            num_calls += bool(args[place])

        return hook

    monitors = [SensitivityMonitor(num_draws=2), SensitivityMonitor(at=LAYERS, prefix="b_"), RiskMonitor()]
    for each in monitors:
        each.on_validation_batch_start = refusing(each.on_validation_batch_start, 3)
        each.on_validation_batch_end = refusing(each.on_validation_batch_end, 4)
    run = trainer(callbacks=monitors, num_sanity_val_steps=0)
    run.fit(Classifier(), loader(), loader(50, 10))
    assert num_calls == 2 * 2 * len(monitors) * 4
    assert "val_risk_estimate" in run.callback_metrics


@pytest.mark.parametrize("left_out", [lambda x, y: y[(x != 0).any(1)], lambda x, y: y[:, : 3 + (x != 0).any(1).all()]])
def test_a_batch_of_other_outputs_costs_that_batch(left_out: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Changing(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return left_out(x, super().forward(x))

    monitor, model, plain, x = SensitivityMonitor(), Changing(), Linear(), inputs(50)
    plain.load_state_dict(model.state_dict())
    x[25] = 0  # a row of padding, to which the noise gives a value
    with pytest.warns(UserWarning, match="could not measure a batch of dataloader 0"):
        validated(monitor, model, DataLoader(x, 10))
    assert monitor.metrics[0].num_samples == 40
    expected = brute_force(plain.eval(), {index: part for index, part in enumerate(x.split(10)) if index != 2})
    assert monitor.metrics[0].compute().item() == pytest.approx(expected.var(correction=0).item(), rel=1e-6)


# Other places, other perturbations, other batches and outputs


def test_a_linear_models_layers_have_the_sensitivities_that_their_weights_give() -> None:
    class Deep(Linear):
        def configure_model(self) -> None:  # the names are looked up when it has its layers
            self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Linear(8, 6), nn.Linear(6, NUM_CLASSES))

    model, names = Deep(), ["net.0", "net.1", "net.2"]
    values = validated(SensitivityMonitor(0.5, at=names, num_samples=None), model, loader(4000, 100))
    first, second = model.net[1].weight, model.net[2].weight
    for name, matrix in zip(names, (second @ first, second, torch.eye(NUM_CLASSES)), strict=True):
        truth, error = 0.25 * matrix.mean(0).square().sum().item(), values[f"val_sensitivity_stderr/{name}"]
        assert values[f"val_sensitivity/{name}"] == pytest.approx(truth, abs=4 * error)
    power = model.net[0](inputs(4000)).square().mean().item()  # C is that of the layer's own outputs
    estimate = (0.5 * 0.75 * values["val_sensitivity/net.0"] * power / 0.25) ** 0.5
    assert values["val_loss_estimate/net.0"] == pytest.approx(estimate)


def test_a_perturbation_of_the_users_may_write_and_has_no_loss_estimate() -> None:
    class Checking(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert torch.equal(batch[0], inputs(50)[16 * batch_idx :][:16])

    model = Checking()
    values = validated(SensitivityMonitor(perturbation=lambda x, generator: x.mul_(1.1)), model, loader())
    moved = (0.1 * inputs(50) @ model.net.weight.T).double().mean(1).var(correction=0).item()
    assert values["val_sensitivity"] == pytest.approx(moved, rel=1e-4)
    assert "val_loss_estimate" not in values


def test_several_inputs_are_perturbed_with_noise_of_their_own() -> None:
    class Difference(Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a) - self.net(b)

    model, val = Difference(), DataLoader(TensorDataset(inputs(4000), inputs(4000)), 100)
    for chosen, factor in (([0, 1], 2), (1, 1)):  # with the same noise the first would be 0
        values = validated(SensitivityMonitor(inputs=chosen), model, val)
        assert values["val_sensitivity"] == pytest.approx(
            factor * model.sensitivity(0.1), abs=4 * values["val_sensitivity_stderr"]
        )


@dataclass
class Sample:
    image: Tensor
    label: Tensor


def same(y: Tensor) -> Tensor:
    return y


# How a batch is made of an image and a label, what the monitor is told of it, what the model returns for a map of
# logits, what the monitor is told of that, and what are outputs then.
FORMS: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "a tensor; a map": (lambda x, y: x.clone(), None, same, None, same),
    "a list; logits": (lambda x, y: [x, y], None, lambda y: y.mean((2, 3)), None, lambda y: y.mean((2, 3))),
    "a named tuple; one number": (Pair, None, lambda y: y.mean((1, 2, 3)), None, lambda y: y.mean((1, 2, 3))),
    "its name; one column": (lambda x, y: Pair(y, x), "label", lambda y: y[:, :1], None, lambda y: y[:, :1]),
    "dicts": (lambda x, y: {"image": x, "label": y}, None, lambda y: {"features": 0, "logits": y}, None, same),
    "keys": (lambda x, y: {"data": {"image": x}}, "data", lambda y: {"scores": y}, "scores", same),
    "a dataclass; a tuple": (Sample, None, lambda y: (y, 0), None, same),
    "functions": (lambda x, y: Sample(x, y), lambda b: b.image, lambda y: [0, y], lambda r: r[1], same),
    "channels last; a sequence": (lambda x, y: x.to(memory_format=torch.channels_last), None, lambda y: y.flatten(2),
        None, same),
    "a mask in the batch": (Pair, None, same, lambda r, b: r[b.label > 0], lambda y: y[torch.arange(len(y)) % 2 > 0]),
    "labels say where classes are": (lambda x, y: [x, y[:, None].expand(-1, 30)], None, lambda y: y.flatten(2).mT,
        None, same),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_and_output(form: str) -> None:
    make, chosen, result, outputs, plain = FORMS[form]

    class Model(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, NUM_CLASSES, 3, padding=1), nn.Tanh(), nn.Dropout(0.5))

        def forward(self, image: Any) -> Any:
            return result(self.conv(image["image"] if isinstance(image, dict) else image))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if isinstance(batch, Tensor):
                batch.mul_(0)  # too late to matter

    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(size, 3, 6, 5, generator=generator) for size in (7, 5, 2, 6)]
    val = DataLoader([make(x, torch.arange(len(x)) % 2) for x in images], batch_size=None)
    model = Model()
    values = validated(SensitivityMonitor(inputs=chosen, outputs=outputs), model, val)
    close(values, expected(brute_force(lambda x: plain(model.eval().conv(x)), images)), rel=1e-6)


# What it refuses, and what it says


def test_one_sample_of_several_draws_has_a_value_without_an_error_bar() -> None:
    values = validated(SensitivityMonitor(num_draws=3), Classifier(), loader(1))
    assert "val_sensitivity" in values and "val_sensitivity_stderr" not in values


def test_positions_that_may_be_classes_are_said() -> None:
    class Tokens(Linear):
        def forward(self, x: Tensor) -> Tensor:  # (N, T) -> (N, T, K)
            return x[..., None].expand(*x.shape, NUM_CLASSES) * torch.arange(1, 1 + NUM_CLASSES)

    with pytest.warns(
        UserWarning, match=r"takes dimension 1 of the outputs \(16, 12, 4\).*`outputs=lambda y: y.movedim"
    ):
        validated(SensitivityMonitor(), Tokens(), unlabelled_loader())
    validated(SensitivityMonitor(outputs=lambda y: y.movedim(-1, 1)), Tokens(), unlabelled_loader())


def test_who_minimizes_sensitivity_is_warned_of(tmp_path: Any) -> None:
    class Plateau(Scheduled, Linear):
        waits_for = "val_sensitivity_log10/dataloader_idx_0"

    name = "val_sensitivity/dataloader_idx_1"
    waiting = [EarlyStopping(name), ModelCheckpoint(tmp_path, monitor=name)]
    run = trainer(callbacks=[SensitivityMonitor(), *waiting], max_epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="lowest before training") as caught:
        run.fit(Plateau(), loader(), [loader(), loader(seed=1)])
    told = [str(each.message).split("`")[1] for each in caught if "minimizes `val_sensitivity" in str(each.message)]
    assert sorted(told) == ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"]


def test_who_does_not_minimize_it_is_left_alone() -> None:
    stopping = [EarlyStopping("val_sensitivity", mode="max"), EarlyStopping("val_loss_estimate")]
    trainer(callbacks=[SensitivityMonitor(), *stopping], max_epochs=1).fit(Linear(), loader(), loader())


@pytest.mark.parametrize("at", ["net.9", ["net.0", "embeddings"]])
def test_a_name_that_is_none_is_found_before_training(at: Any) -> None:
    run = trainer(callbacks=[SensitivityMonitor(at=at)], num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match="`at` should name a submodule of Classifier, such as 'net"):
        run.fit(Classifier(), loader(), loader())
    assert run.global_step == 0
