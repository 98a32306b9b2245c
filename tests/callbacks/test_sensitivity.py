"""What SensitivityMonitor logs is what a plain loop over the same batches, weights and noise gives."""

from __future__ import annotations

import math
from collections import deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.perturbations import Interpolation, RademacherNoise, UniformNoise, noise_generator
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    History,
    Linear,
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


@torch.no_grad()
def changes(
    run: Callable[[Tensor], Tensor], batches: Any, num_draws: int = 1, seed: int = 0, dataloader_idx: int = 0
) -> Tensor:
    """By a plain loop, over batches by their index: a row of class-averaged changes for each sample."""
    rows = []
    for batch_idx, x in batches.items() if isinstance(batches, dict) else enumerate(batches):
        draws = []
        for draw in range(num_draws):
            noise = torch.randn(x.shape, generator=noise_generator(seed, 0, dataloader_idx, batch_idx, draw))
            clean, noisy = run(x).double(), run(x + 0.1 * noise).double()
            draws.append((noisy - clean).reshape(len(clean), clean.shape[1] if clean.ndim > 1 else 1, -1).mean(1))
        rows.append(torch.cat(draws, 1))
    return torch.cat(rows)


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
    truth = expected(found := changes(model.eval(), inputs(50).split(batch_size), num_draws, seed=3))
    close(values, truth)
    estimate = loss_estimate(truth["val_sensitivity"], inputs(50).double().square().mean(), 0.1, NUM_CLASSES)
    assert values["val_loss_estimate"] == pytest.approx(estimate.item(), rel=1e-6)  # power is summed in 32 bits
    per_sample = (found - found.mean()).square().mean(1)
    torch.testing.assert_close(monitor.metrics[0].per_sample, per_sample, rtol=1e-9, atol=1e-15)


def test_one_standard_deviation_per_channel_is_in_units_of_the_input() -> None:
    model, scale = Linear(), torch.linspace(0.5, 2, NUM_FEATURES)
    plain = validated(SensitivityMonitor(0.2), model, DataLoader(inputs(400), 100))
    assert abs(plain["val_sensitivity"] - model.sensitivity(0.2)) < 4 * plain["val_sensitivity_stderr"]
    with torch.no_grad():
        model.net.weight.mul_(scale)
    monitor = SensitivityMonitor([0.2 / s for s in scale.tolist()])
    close(validated(monitor, model, DataLoader(inputs(400) / scale, 100)), plain, rel=1e-5)


def test_every_epoch_is_logged_and_before_training_by_validate_at_step_0(tmp_path: Any) -> None:
    model, history, logger = Classifier(), History(), CSVLogger(tmp_path)
    run = trainer(callbacks=[SensitivityMonitor(), history], logger=logger, max_epochs=3)
    untrained = expected(changes(model.eval(), inputs(50, seed=1).split(16)))
    run.validate(model.train(), loader(seed=1), verbose=False)
    run.fit(model, loader(), loader(seed=1))
    close(history.epochs[0], untrained)
    close(history.epochs[-1], expected(changes(model.eval(), inputs(50, seed=1).split(16))))
    curve = {int(row["step"]): float(row["val_sensitivity"]) for row in csv_rows(logger.log_dir) if row["val_loss"]}
    assert curve == dict(zip((0, 3, 7, 11), (epoch["val_sensitivity"] for epoch in history.epochs), strict=True))
    assert len(set(curve.values())) == 4


def test_the_noise_is_the_same_every_epoch_and_follows_the_seed() -> None:
    class Still(Linear):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    history, model = History(), Still()
    monitors = [SensitivityMonitor(num_samples=30), SensitivityMonitor(seed=1, prefix="b_", num_samples=30)]
    trainer(callbacks=[*monitors, history], max_epochs=3).fit(model, loader(), unlabelled_loader(200, 10))
    assert [epoch["val_sensitivity"] for epoch in history.epochs] == 3 * [history.epochs[0]["val_sensitivity"]]
    assert history.epochs[0]["val_sensitivity"] != history.epochs[0]["b_sensitivity"]


@pytest.mark.parametrize(("prefix", "test"), [("val_", "test_"), ("val/", "test/"), ("a_", "test_a_")])
def test_names_of_trainer_test(prefix: str, test: str) -> None:
    run = trainer(callbacks=[SensitivityMonitor(prefix=prefix)])
    (values,) = run.test(Classifier(), loader(), verbose=False)
    assert values.keys() == {"test_loss", *(test + name for name in NAMES)}


def test_several_loaders_one_of_them_empty(capsys: pytest.CaptureFixture[str]) -> None:
    model, run = Classifier(), trainer(callbacks=[SensitivityMonitor()])
    with pytest.warns(UserWarning) as caught:
        results = run.validate(model, [loader(50), DataLoader(labelled(0)), unlabelled_loader(20, seed=1)])
    said = ["DataLoader` across ranks is zero", "dataloader 1: A variance needs two output changes or more"]
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert all(text in message for text, message in zip(said, messages, strict=True))
    truths = [expected(changes(model.eval(), inputs(50).split(16)))["val_sensitivity"]]
    truths.append(expected(changes(model, inputs(20, seed=1).split(16), dataloader_idx=2))["val_sensitivity"])
    for idx, values, truth in ((0, results[0], truths[0]), (2, results[-1], truths[1])):
        close(values, {f"val_sensitivity/dataloader_idx_{idx}": truth})
        assert {f"val_{name}/dataloader_idx_{idx}" for name in NAMES} <= values.keys()
    assert not any("idx_1" in name for name in run.callback_metrics)
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if " val_sensitivity " in line)
    assert [float(value) for value in row if value[0].isdigit()] == pytest.approx(truths)


def test_per_output_and_a_single_output() -> None:
    model = Classifier()
    batches = inputs(50).split(16)
    values = validated(SensitivityMonitor(per_output=True, outputs=lambda y: y.softmax(1)), model, loader())
    each = [
        changes(lambda x, k=k: model.eval()(x).softmax(1)[:, k], batches).square().mean() for k in range(NUM_CLASSES)
    ]
    close(values, {"val_sensitivity": sum(each).item() / NUM_CLASSES})
    assert "val_loss_estimate" not in values
    values = validated(SensitivityMonitor(outputs=lambda y: y[:, 0]), model, loader())
    close(values, expected(changes(lambda x: model.eval()(x)[:, 0], batches)))
    assert "val_loss_estimate" not in values


# Which batches are measured, and what it costs


class Counting(Classifier):
    """Counts its passes in eval mode, by batch; its step makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = deque[int]()  # which our passes do not put back, as they do a list

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.passes.append(len(x))
        return super().forward(x)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "sites", "chosen"),
    [
        ({"num_samples": None, "num_draws": 2}, 1, range(20)),
        ({"num_samples": 50}, 1, range(0, 20, 4)),
        ({"num_samples": 50, "num_draws": 2}, 1, [0, 7, 14]),
        ({"num_samples": 51}, 1, [0, 4, 7, 10, 14, 17]),
        ({"num_samples": 40, "at": LAYERS, "num_draws": 2}, 3, [0, 10]),
    ],
)
def test_a_budget_picks_evenly_spaced_whole_batches_and_counts_passes(options: Any, sites: int, chosen: Any) -> None:
    model, draws = Counting(), options.get("num_draws", 1)
    values = validated(SensitivityMonitor(**options), model, unlabelled_loader(200, 10))
    assert len(model.passes) == 1 + len(chosen) * (1 + sites * draws)  # and one that looks at the outputs, once a run
    if sites == 1:
        batches = {idx: x for idx, x in enumerate(inputs(200).split(10)) if idx in chosen}
        close(values, expected(changes(model.eval(), batches, draws)))


@given(
    num_samples=st.integers(1, 5000),
    num_draws=st.integers(1, 5),
    batch_size=st.integers(1, 300),
    num_batches=st.integers(1, 200),
    world_size=st.integers(1, 8),
)
def test_as_many_batches_as_the_budget_needs(
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


class Stream(IterableDataset):
    """100 samples, which it does not say."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(inputs(100))


@pytest.mark.parametrize("limit", [None, 4, 1000])
def test_of_a_loader_without_a_length_all_batches_are_measured(limit: int | None) -> None:
    model = Counting()
    validated(
        SensitivityMonitor(num_samples=10), model, DataLoader(Stream(), batch_size=10), limit_val_batches=limit or 1.0
    )
    assert len(model.passes) == 1 + 2 * min(limit or 10, 10)


def test_a_budget_counts_the_samples_of_the_outputs() -> None:
    class SequenceFirst(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(0))

    monitor = SensitivityMonitor(num_samples=40, inputs=lambda batch: batch.expand(30, 5, NUM_FEATURES))
    validated(monitor, SequenceFirst(), DataLoader(inputs(100), 5))
    assert monitor.metrics[0].num_samples == 40


class NoSync(TorchDispatchMode):
    """Refuses what waits for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_after_the_first_batch_no_batch_waits_for_the_device() -> None:
    hooks = {"called": 0}

    def refusing(monitor: Any) -> Any:
        measured = monitor.on_validation_batch_start, monitor.on_validation_batch_end

        def start(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with NoSync() if batch_idx else torch.no_grad():
                measured[0](trainer, pl_module, batch, batch_idx)
            hooks["called"] += bool(batch_idx)

        def end(
            trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            with NoSync() if batch_idx else torch.no_grad():
                measured[1](trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

        monitor.on_validation_batch_start, monitor.on_validation_batch_end = start, end
        return monitor

    monitors = [SensitivityMonitor(num_draws=2), SensitivityMonitor(at=LAYERS, prefix="b_"), RiskMonitor()]
    run = trainer(callbacks=[refusing(monitor) for monitor in monitors], num_sanity_val_steps=0)
    run.fit(Classifier(), loader(), loader(50, 10))
    assert hooks["called"] == 2 * len(monitors) * 4
    assert "val_risk_estimate" in run.callback_metrics


# Other places, other perturbations, other batches and outputs


def test_a_linear_models_layers_have_the_sensitivities_that_their_weights_give() -> None:
    class Deep(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:  # the names are looked up when it has its layers
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Linear(8, 6), nn.Linear(6, NUM_CLASSES))

    model, names = Deep(), ["net.0", "net.1", "net.2"]
    values = validated(SensitivityMonitor(0.5, at=names, num_samples=None), model, loader(4000, 100))
    first, second = model.net[1].weight, model.net[2].weight
    for name, matrix in zip(names, (second @ first, second, torch.eye(NUM_CLASSES)), strict=True):
        truth = 0.25 * matrix.mean(0).square().sum().item()
        assert values[f"val_sensitivity/{name}"] == pytest.approx(
            truth, abs=4 * values[f"val_sensitivity_stderr/{name}"]
        )
    power = model.net[0](inputs(4000)).square().mean().item()  # C is that of the layer's own outputs
    estimate = (0.5 * 0.75 * values["val_sensitivity/net.0"] * power / 0.25) ** 0.5
    assert values["val_loss_estimate/net.0"] == pytest.approx(estimate)
    one = validated(SensitivityMonitor(0.5, at="net.1", num_samples=None), model, loader(4000, 100))
    assert {name for name in one if "/" in name} == set()
    assert one["val_sensitivity"] == values["val_sensitivity/net.1"]


def test_noise_at_the_identity_is_noise_at_the_input() -> None:
    model = Classifier()
    model.net.insert(0, nn.Identity())
    at, plain = (
        validated(SensitivityMonitor(num_draws=2, **kwargs), model, loader()) for kwargs in ({"at": "net.0"}, {})
    )
    assert at == plain


@pytest.mark.parametrize(
    "perturbation", [UniformNoise(0.1), RademacherNoise(0.1), lambda x, g: x.mul_(1.1), Interpolation(0.2)]
)
def test_perturbations_of_other_kinds(perturbation: Any) -> None:
    class Checking(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert torch.equal(batch[0], inputs(4000)[100 * batch_idx :][:100])  # also of one that writes in place

    model = Checking()
    values = validated(SensitivityMonitor(perturbation=perturbation, num_samples=None), model, loader(4000, 100))
    has_moment = hasattr(perturbation, "second_moment") and perturbation.second_moment(inputs(2)) is not None
    assert ("val_loss_estimate" in values) == has_moment
    if has_moment:
        assert values["val_sensitivity"] == pytest.approx(
            model.sensitivity(0.1), abs=4 * values["val_sensitivity_stderr"]
        )
    elif callable(perturbation) and not isinstance(perturbation, Interpolation):
        moved = (0.1 * inputs(4000) @ model.net.weight.T).double().mean(1)
        assert values["val_sensitivity"] == pytest.approx(moved.var(correction=0).item(), rel=1e-4)
    else:
        assert values["val_sensitivity"] > 0


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


# How a batch is made of an image and a label, what the monitor is told of it, what the model returns for a map of
# logits, and what the monitor is told of that.
FORMS: dict[str, tuple[Any, Any, Any, Any]] = {
    "a tensor; a map": (lambda x, y: x.clone(), None, lambda y: y, None),
    "a list; logits": (lambda x, y: [x, y], None, lambda y: y.mean((2, 3)), None),
    "a named tuple; one number": (Pair, None, lambda y: y.mean((1, 2, 3)), None),
    "its name; one column": (lambda x, y: Pair(y, x), "label", lambda y: y.mean((1, 2, 3))[:, None], None),
    "a dict; a dict": (lambda x, y: {"image": x, "label": y}, None, lambda y: {"features": 0, "logits": y}, None),
    "a dict of a dict; a key": (lambda x, y: {"data": {"image": x}}, "data", lambda y: {"scores": y}, "scores"),
    "a tuple of dicts; an attribute": (lambda x, y: ({"image": x}, y), None, lambda y: SimpleNamespace(s=y), "s"),
    "a dataclass; a tuple": (Sample, None, lambda y: (y.mean((2, 3)), y), None),
    "a second input; a place": (lambda x, y: {"depth": x + 1, "image": x}, "image", lambda y: (None, y), 1),
    "a place; a named tuple": (lambda x, y: (y, x), 1, lambda y: Pair(y, "no"), None),
    "a function; a function": (lambda x, y: Sample(x, y), lambda b: b.image, lambda y: [0, y], lambda r: r[1]),
    "channels last; a sequence": (
        lambda x, y: x.to(memory_format=torch.channels_last), None, lambda y: y.flatten(2), None,
    ),
    "a mask in the batch": (Pair, None, lambda y: y, lambda r, b: r[b.label > 0]),
    "a vector": (lambda x, y: [x, y], None, lambda y: normalize(y.flatten(1), dim=1), None),
    "labels say where classes are": (
        lambda x, y: [x, y[:, None].expand(-1, 30)], None, lambda y: y.flatten(2).mT, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_and_output(form: str) -> None:
    make, chosen, result, outputs = FORMS[form]

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
    labels = [torch.arange(len(x)) % 2 for x in images]
    model = Model()
    val = DataLoader([make(x, y) for x, y in zip(images, labels, strict=True)], batch_size=None)
    values = validated(SensitivityMonitor(inputs=chosen, outputs=outputs), model, val)

    def plain(x: Tensor) -> Tensor:
        """By plain Python, what the table means."""
        y = result(model.eval().conv(x))
        if form == "a mask in the batch":
            return y[torch.arange(len(x)) % 2 > 0]
        if form.endswith(("a function", "a place")):
            return y[1]
        if form.endswith("classes are"):
            return y.mT
        y = y.s if isinstance(y, SimpleNamespace) else y
        return y.get("logits", y.get("scores")) if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y

    close(values, expected(changes(plain, images)), rel=1e-6)


# What it refuses, and what it says


class Probabilities(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class LogProbabilities(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_probabilities_are_refused_before_the_first_step(num_sanity_val_steps: int) -> None:
    run = trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=num_sanity_val_steps)
    with pytest.raises(MisconfigurationException, match="should get logits, got probabilities.*`outputs="):
        run.fit(Probabilities(), loader(), loader())
    assert run.global_step == 0
    assert validated(SensitivityMonitor(per_output=True), Probabilities(), loader())["val_sensitivity"] > 0


def test_what_is_doubtful_is_said_once() -> None:
    run = trainer(callbacks=[SensitivityMonitor()], max_epochs=3)
    with pytest.warns(UserWarning, match=r"`SensitivityMonitor` \(val_\*\) says of .*log-prob") as caught:
        run.fit(LogProbabilities(), loader(), loader())
    assert sum("log-prob" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(("options", "match"), [({}, "two output changes or more"), ({"num_draws": 3}, None)])
def test_one_sample(options: dict[str, Any], match: str | None) -> None:
    if match is None:
        values = validated(SensitivityMonitor(**options), Classifier(), loader(1))
        assert "val_sensitivity" in values and "val_sensitivity_stderr" not in values
    else:
        with pytest.warns(UserWarning, match=match):
            assert validated(SensitivityMonitor(**options), Classifier(), loader(1)).keys() == {"val_loss"}


class Centres(Classifier):
    """Its step calls the model on something else than the batch has."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0] - 0.5)


class Headless(Classifier):
    """Its step runs a head that forward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(NUM_CLASSES, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.head(self(batch[0]))


class Rounds(Classifier):
    """Its step augments, or rounds: which is no other input."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0].bfloat16().float())


@pytest.mark.parametrize("monitor", [SensitivityMonitor, RiskMonitor])
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Centres, r"calls the model on other inputs .*`inputs=lambda"),
        (Headless, r"also runs 'head'.*`outputs=`"),
        (Rounds, ""),
    ],
)
def test_a_step_that_does_something_else_is_said_with_the_remedy(model: Any, match: str, monitor: Any) -> None:
    val = loader()
    if not match:
        validated(monitor(), model(), val)
        return
    with pytest.warns(UserWarning, match=match) as caught:
        trainer(callbacks=[monitor()], max_epochs=2).fit(model(), loader(), val)
    assert sum("your step does" in str(warning.message) for warning in caught) == 1


def test_positions_that_may_be_classes_are_said() -> None:
    class Tokens(Linear):
        def forward(self, x: Tensor) -> Tensor:  # (N, T) -> (N, T, K)
            return x[..., None].expand(*x.shape, NUM_CLASSES) * torch.arange(1, 1 + NUM_CLASSES)

    with pytest.warns(
        UserWarning, match=r"takes dimension 1 of the outputs \(16, 12, 4\).*`outputs=lambda y: y.movedim"
    ):
        validated(SensitivityMonitor(), Tokens(), unlabelled_loader())
    validated(SensitivityMonitor(outputs=lambda y: y.movedim(-1, 1)), Tokens(), unlabelled_loader())


class Scheduled(Linear):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_sensitivity_log10"}}


@pytest.mark.parametrize("who", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_who_minimizes_sensitivity_is_warned_of(who: str, tmp_path: Any) -> None:
    name = "val_sensitivity/dataloader_idx_1"
    kinds: dict[str, Any] = {
        "EarlyStopping": EarlyStopping(name),
        "ModelCheckpoint": ModelCheckpoint(tmp_path / who, monitor=name),
    }
    callbacks = [kinds[who]] if who in kinds else []
    val = [loader(), loader(seed=1)] if callbacks else loader()
    run = trainer(
        callbacks=[SensitivityMonitor(), *callbacks], max_epochs=1, enable_checkpointing=who == "ModelCheckpoint"
    )
    with pytest.warns(UserWarning, match=f"`{who}` minimizes `val_sensitivity.*lowest before training.*`RiskMonitor`"):
        run.fit(Linear() if callbacks else Scheduled(), loader(), val)
    growing = [EarlyStopping("val_sensitivity", mode="max"), EarlyStopping("val_loss_estimate")]
    trainer(callbacks=[SensitivityMonitor(), *growing], max_epochs=1).fit(
        Linear(), loader(), loader()
    )  # are left alone


@pytest.mark.parametrize("at", ["net.9", ["net.0", "embeddings"]])
def test_a_name_that_is_none_is_found_before_training(at: Any) -> None:
    run = trainer(callbacks=[SensitivityMonitor(at=at)], num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match="`at` should name a submodule of Classifier, such as 'net"):
        run.fit(Classifier(), loader(), loader())
    with pytest.raises(MisconfigurationException, match="`at` should name a submodule that `forward` calls"):
        validated(SensitivityMonitor(at="head"), Headless(), loader())
    assert run.global_step == 0


@pytest.mark.parametrize("prefix", [None, 3])
def test_a_prefix_is_text(prefix: Any) -> None:
    for kind in (SensitivityMonitor, RiskMonitor):
        with pytest.raises(MisconfigurationException, match="`prefix` should be a str, got"):
            kind(prefix=prefix)


@pytest.mark.parametrize(
    ("model", "val", "match"),
    [
        (Linear, DataLoader(torch.rand(8, 7), 4), "shapes cannot be multiplied.*`inputs=lambda batch"),
        (Linear, DataLoader(torch.zeros(4, 12).long()), "floating tensor.*`inputs="),
        (Linear, loader(), "one standard deviation of the noise"),
        (Pairwise := type("Pairwise", (Linear,), {"forward": lambda self, x: {"scores": x}}), loader(), "`outputs="),
    ],
)
def test_a_model_that_can_not_be_run_is_told_how(model: type[LightningModule], val: Any, match: str) -> None:
    options = {"noise_std": [0.1, 0.2]} if "deviation" in match else {}
    with pytest.raises(MisconfigurationException, match=match):
        validated(SensitivityMonitor(**options), model(), val)
