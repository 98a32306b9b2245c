import copy
import operator
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.readings import RISK
from tests.helpers import (
    Classifier,
    Linear,
    brute_force,
    csv_rows,
    inputs,
    labelled,
    loader,
    trainer,
    unlabelled_loader,
)

NAMES = {"sensitivity", "sensitivity_stderr", "sensitivity_log10", "loss_estimate"}
RISK_NAMES = set(RISK.values())  # in a fit


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    assert float(actual) == pytest.approx(float(expected), rel=rtol)


def validated(monitor: SensitivityMonitor, model: LightningModule, loaders: Any, **kwargs: Any) -> dict[str, float]:
    seed_everything(0, verbose=False)
    (values,) = trainer(callbacks=[monitor], **kwargs).validate(model, loaders, verbose=False)
    return values


class History(Callback):
    """What callback_metrics held at the end of every validation."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# The logged values


@pytest.mark.parametrize("batch_size", [1, 7, 50])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_value_is_that_of_brute_force(batch_size: int, num_draws: int) -> None:
    model = Classifier()
    values = validated(SensitivityMonitor(num_draws=num_draws, seed=3), model, loader(50, batch_size))
    changes = brute_force(model, list(inputs(50).split(batch_size)), num_draws=num_draws, seed=3)
    close(values["val_sensitivity"], changes.var(correction=0))
    close(values["val_sensitivity_log10"], changes.var(correction=0).log10())
    expected = loss_estimate(changes.var(correction=0), inputs(50).double().square().mean(), 0.1, num_outputs=4)
    close(values["val_loss_estimate"], expected, rtol=1e-6)


def test_a_linear_models_value_is_known() -> None:
    model = Linear()
    values = validated(SensitivityMonitor(noise_std=0.2, num_draws=4, num_samples=None), model, loader(2000, 500))
    assert abs(values["val_sensitivity"] - model.sensitivity(0.2)) < 3 * values["val_sensitivity_stderr"]
    assert 0.01 < values["val_sensitivity_stderr"] / values["val_sensitivity"] < 0.03


def test_one_standard_deviation_per_channel_is_in_units_of_the_input() -> None:
    model = Linear()
    scale = torch.linspace(0.5, 2, 12)
    plain = validated(SensitivityMonitor(noise_std=0.1), model, DataLoader(inputs(400), 100))
    with torch.no_grad():
        model.net.weight.mul_(scale)
    monitor = SensitivityMonitor([0.1 / s for s in scale.tolist()])
    normalized = validated(monitor, model, DataLoader(inputs(400) / scale, 100))
    for name in plain:
        close(normalized[name], plain[name], rtol=1e-5)


def test_in_fit_every_epoch_is_logged() -> None:
    history, model = History(), Classifier()
    trainer(callbacks=[SensitivityMonitor(), history], max_epochs=3).fit(model, loader(), loader(seed=1))
    assert len(history.epochs) == 3
    for epoch in history.epochs:
        assert {f"val_{name}" for name in NAMES} | {"val_loss"} <= epoch.keys()
    assert len({epoch["val_sensitivity"] for epoch in history.epochs}) == 3
    changes = brute_force(model, list(inputs(50, seed=1).split(16)))
    close(history.epochs[-1]["val_sensitivity"], changes.var(correction=0))


def test_the_noise_is_the_same_every_epoch_and_follows_the_seed() -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def curve(seed: int) -> list[float]:
        seed_everything(0, verbose=False)
        history, model = History(), Frozen()
        model.net[1] = nn.Identity()  # batch norm would go on learning
        trainer(callbacks=[SensitivityMonitor(seed=seed), history]).fit(model, loader(), loader(seed=1))
        return [epoch["val_sensitivity"] for epoch in history.epochs]

    first, second = curve(0), curve(1)
    assert first[0] == first[1]
    assert first[0] != second[0]
    assert first == curve(0)


def test_prefixes_and_test() -> None:
    model = Classifier()
    run = trainer(callbacks=[SensitivityMonitor(prefix="val/", test_prefix="held_out/")])
    (values,) = run.validate(model, loader(), verbose=False)
    assert {f"val/{name}" for name in NAMES} <= values.keys()
    (values,) = run.test(model, loader(), verbose=False)
    assert values.keys() == {"test_loss", *(f"held_out/{name}" for name in NAMES)}
    close(values["held_out/sensitivity"], brute_force(model, list(inputs(50).split(16))).var(correction=0))


def test_several_loaders(capsys: pytest.CaptureFixture[str]) -> None:
    model = Classifier()
    run = trainer(callbacks=[SensitivityMonitor()])
    first, second = run.validate(model, [loader(50), unlabelled_loader(20, seed=1)])
    for idx, (values, batches) in enumerate(((first, inputs(50).split(16)), (second, inputs(20, seed=1).split(16)))):
        expected = brute_force(model, list(batches), dataloader_idx=idx).var(correction=0)
        close(values[f"val_sensitivity/dataloader_idx_{idx}"], expected)
        assert {f"val_{name}/dataloader_idx_{idx}" for name in NAMES} <= values.keys()
        assert not any(name.endswith(f"_{1 - idx}") for name in values)
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if " val_sensitivity " in f"{line} ")
    close(row[1], first["val_sensitivity/dataloader_idx_0"])
    close(row[2], second["val_sensitivity/dataloader_idx_1"])


def test_early_stopping_and_checkpoints_on_several_loaders(tmp_path: Path) -> None:
    class Curve(Callback):
        values: ClassVar[list[float]] = []

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                self.values.append(trainer.callback_metrics[name].item())

    name = "val_sensitivity/dataloader_idx_1"
    stopping, curve = EarlyStopping(monitor=name, mode="min", patience=1), Curve()
    checkpoint = ModelCheckpoint(tmp_path, monitor=name, mode="min")
    run = trainer(
        callbacks=[SensitivityMonitor(), curve, stopping, checkpoint], enable_checkpointing=True, max_epochs=9
    )
    run.fit(Classifier(), loader(), [loader(), loader(seed=1)])
    lowest = curve.values.index(min(curve.values))
    assert len(curve.values) == lowest + 2 < 9  # it grows
    assert stopping.best_score == checkpoint.best_model_score == min(curve.values)
    assert f"epoch={lowest}-" in checkpoint.best_model_path


def test_per_output() -> None:
    model = Classifier()
    values = validated(SensitivityMonitor(per_output=True), model, loader())
    assert "val_loss_estimate" not in values
    probabilities = SensitivityMonitor(per_output=True, outputs=lambda logits: logits.softmax(1))
    assert 0 < validated(probabilities, model, loader())["val_sensitivity"] < 1


def test_a_model_of_one_output_has_no_loss_estimate() -> None:
    values = validated(SensitivityMonitor(outputs=lambda logits: logits[:, 0]), Classifier(), loader())
    assert values.keys() == {"val_loss", "val_sensitivity", "val_sensitivity_stderr", "val_sensitivity_log10"}


# Labels, and what monitors the values


def test_no_labels_are_needed_and_early_stopping_works() -> None:
    class Stub(Classifier):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert isinstance(batch, Tensor)

    history = History()
    stopping = EarlyStopping(monitor="val_sensitivity", mode="min", patience=2)
    run = trainer(callbacks=[SensitivityMonitor(), stopping, history], max_epochs=30)
    run.fit(Stub(), loader(), unlabelled_loader(seed=1))
    best = int(np.argmin([epoch["val_sensitivity"] for epoch in history.epochs]))
    assert len(history.epochs) == best + 3 < 30  # two epochs of patience after the best one
    assert set(history.epochs[0]) - {"train_loss"} == {f"val_{name}" for name in NAMES | RISK_NAMES}


def test_model_checkpoint_keeps_the_epoch_of_the_best_value(tmp_path: Path) -> None:
    history = History()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss_estimate", mode="max", filename="{epoch}")
    run = trainer(callbacks=[checkpoint, SensitivityMonitor(), history], enable_checkpointing=True, max_epochs=4)
    run.fit(Classifier(), loader(), unlabelled_loader(seed=1))
    values = [epoch["val_loss_estimate"] for epoch in history.epochs]
    close(checkpoint.best_model_score, max(values))
    assert Path(checkpoint.best_model_path).name == f"epoch={int(np.argmax(values))}.ckpt"


# Training is left alone


class Traced(Classifier):
    """Records what training does, and draws from every random stream."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[Any] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.trace += [loss.item(), random.random(), np.random.rand(), torch.rand(1).item()]
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.trace += [random.random(), torch.rand(1).item(), batch[0].sum().item()]

    def on_train_epoch_start(self) -> None:
        self.trace.append([module.training for module in self.modules()])


class Intrusive(nn.Module):
    """Draws random numbers in eval mode, too, and writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand()
        return x.mul_(1 + 0.01 * torch.rand(1))


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize("validation_in_training_mode", [False, True])
def test_training_is_bit_identical_with_and_without(tmp_path: Path, validation_in_training_mode: bool) -> None:
    def run(name: str, monitors: list[Callback]) -> tuple[Any, ...]:
        seed_everything(7, verbose=False)
        model = Traced()
        model.net.insert(0, Intrusive())
        if validation_in_training_mode:
            model.on_validation_model_eval = lambda: None
        logger = CSVLogger(tmp_path, name=name, version=0)
        fit = trainer(callbacks=monitors, max_epochs=3, logger=logger, log_every_n_steps=1)
        fit.fit(model, loader(shuffle=True), loader(seed=1, shuffle=True))
        lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
        header = lines[0].split(",")
        kept = [i for i, column in enumerate(header) if not any(name in column for name in NAMES | RISK_NAMES)]
        logged = [[line.split(",")[i] for i in kept] for line in lines if line]
        streams = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return model.trace, model.state_dict(), fit.optimizers[0].state_dict(), logged, streams

    without = run("without", [])
    monitors = [SensitivityMonitor(num_draws=2), SensitivityMonitor(noise_std=1, prefix="b_")]
    trace, weights, optimizer, logged, streams = run("with", monitors)
    assert trace == without[0]
    for name, value in without[1].items():
        assert torch.equal(weights[name], value), name
    torch.testing.assert_close(optimizer, without[2], rtol=0, atol=0)
    assert sorted(map(sorted, logged)) == sorted(map(sorted, without[3]))
    assert streams == without[4]


def test_the_value_is_that_of_eval_mode_even_where_validation_runs_in_training_mode() -> None:
    model = Classifier()
    model.on_validation_model_eval = lambda: model.train()
    values = validated(SensitivityMonitor(), model, DataLoader(inputs(50), 16))
    assert model.training
    close(values["val_sensitivity"], brute_force(model, list(inputs(50).split(16))).var(correction=0))


def test_the_batch_reaches_validation_step_unchanged() -> None:
    class InPlace(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            assert torch.equal(batch[0], inputs(50)[16 * batch_idx :][:16])
            batch[0].zero_()

    model = InPlace()
    values = validated(SensitivityMonitor(), model, loader())
    close(values["val_sensitivity"], brute_force(model, list(inputs(50).split(16))).var(correction=0))


def test_an_exception_in_the_noisy_pass_leaves_everything_as_it_was() -> None:
    class Failing(Classifier):
        fail = True
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            self.calls += 1
            if self.fail and self.calls == 2:
                raise ValueError("inputs out of range")
            return super().forward(x)

    class Before(Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            model.train()  # as a user may want it
            self.state = torch.get_rng_state()

    model, before = Failing(), Before()
    run = trainer(callbacks=[before, SensitivityMonitor()], num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match="on the perturbed input.*ValueError: inputs out of range"):
        run.validate(model, loader(), verbose=False)
    assert torch.equal(torch.get_rng_state(), before.state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.fail = False
    run.fit(model, loader(), loader())
    assert "val_sensitivity" in run.callback_metrics


def test_validate_then_fit_then_validate() -> None:
    model, monitor = Classifier(), SensitivityMonitor()
    run = trainer(callbacks=[monitor])
    for _ in range(2):
        (values,) = run.validate(model, loader(), verbose=False)
        close(values["val_sensitivity"], brute_force(model, list(inputs(50).split(16))).var(correction=0))
        run.fit(model, loader(), loader())


def test_a_checkpoint_gets_the_weights_from_before_training_and_no_metric(tmp_path: Path) -> None:
    model = Classifier()
    initial = copy.deepcopy(dict(model.named_parameters()))
    for task in ("auto", None):
        run = trainer(callbacks=[SensitivityMonitor(task=task), SensitivityMonitor(prefix="b_", task=task)])
        run.fit(model, loader(), loader())
        run.save_checkpoint(tmp_path / "with.ckpt")
        saved = torch.load(tmp_path / "with.ckpt", weights_only=True)
        assert not saved["callbacks"]
        assert not any("metric" in key or "moments" in key for key in saved["state_dict"])
        extra = [key for key in saved if key.startswith("lightning_sensitivity")]
        assert extra == (["lightning_sensitivity.initial_weights"] if task else [])
        if task:
            torch.testing.assert_close(saved[extra[0]], {name: value.detach() for name, value in initial.items()})


class Counter(nn.Module):
    """Changes its buffers in eval mode, too, in place and by putting others there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + x.detach().max()
        return x


def test_buffers_that_change_in_eval_mode_are_put_back() -> None:
    def counts(callbacks: list[Callback]) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        model = Classifier()
        model.net.insert(0, Counter())
        trainer(callbacks=callbacks).fit(model, loader(), loader())
        return model.state_dict()

    torch.testing.assert_close(counts([SensitivityMonitor()]), counts([]), rtol=0, atol=0)


def test_what_the_model_writes_into_its_other_arguments_does_not_reach_validation_step() -> None:
    class Masked(Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x * mask.mul_(0.5))

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            assert torch.equal(batch["mask"], torch.ones(16, 12))

    batches = [{"x": x, "mask": torch.ones(12)} for x in inputs(32)]
    model = Masked()
    values = validated(SensitivityMonitor(inputs="x"), model, DataLoader(batches, 16))
    assert 0.5 < values["val_sensitivity"] / (0.25 * model.sensitivity(0.1)) < 2  # each pass halves a mask of ones


# Precision


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
        ("32-true", torch.float32),
    ],
)
def test_the_passes_run_under_the_precision_of_validation(precision: str, inside: torch.dtype) -> None:
    seen = set()

    class Recording(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            seen.add(output.dtype)
            return output

    seed_everything(0, verbose=False)
    model = Recording()
    reference = validated(SensitivityMonitor(noise_std=0.5), copy.deepcopy(model), loader(400, 100))
    seen.clear()
    values = validated(SensitivityMonitor(noise_std=0.5), model, loader(400, 100), precision=precision)
    assert seen == {inside}
    difference = abs(values["val_sensitivity"] - reference["val_sensitivity"])
    assert difference < 3 * reference["val_sensitivity_stderr"]


# Cost


def test_the_number_of_forward_passes() -> None:
    class Counting(Classifier):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    for num_draws in (1, 4):
        plain, watched = Counting(), Counting()
        trainer().validate(plain, loader(), verbose=False)
        validated(SensitivityMonitor(num_draws=num_draws), watched, loader())
        assert watched.calls - plain.calls == len(loader()) * (1 + num_draws)


def test_memory_does_not_grow_with_draws_or_batches() -> None:
    alive, most = set(), []

    class Tracking(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            alive.add(key := id(output) + 1j * len(most))
            weakref_finalize(output, alive, key)
            most.append(len(alive))
            return output

    import weakref

    def weakref_finalize(output: Tensor, registry: set[complex], key: complex) -> None:
        weakref.finalize(output, registry.discard, key)

    monitor = SensitivityMonitor(num_draws=10, num_samples=None)
    validated(monitor, Tracking(), unlabelled_loader(160))
    assert len(most) == 110
    assert max(most) <= 3  # clean outputs, one draw, and the next one being made
    assert not monitor._sensitivity._statistics


# Sanity check and the untrained network


def test_the_sanity_check_runs_the_path_and_leaves_nothing(tmp_path: Path) -> None:
    class Sanity(Callback):
        seen = False

        def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seen = True
            assert not any("sensitivity" in name for name in trainer.callback_metrics)
            assert not monitor._sensitivity._statistics

    monitor, sanity, history = SensitivityMonitor(), Sanity(), History()
    run = trainer(callbacks=[monitor, sanity, history], num_sanity_val_steps=2, max_epochs=1)
    model = Classifier()
    run.fit(model, loader(), loader())
    assert sanity.seen
    close(history.epochs[0]["val_sensitivity"], brute_force(model, list(inputs(50).split(16))).var(correction=0))


def test_the_sanity_check_finds_what_is_wrong() -> None:
    class Probabilities(Classifier):
        trained = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

        def on_train_start(self) -> None:
            self.trained = True

    model = Probabilities()
    with pytest.raises(ValueError, match="Pass the logits"):
        trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=1).fit(model, loader(), loader())
    assert not model.trained


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_before_training_logs_the_untrained_network_at_step_0(tmp_path: Path, num_loaders: int) -> None:
    model = Classifier()
    loaders = [loader(seed=1), loader(seed=2)][:num_loaders]
    expected = [
        brute_force(model, list(inputs(50, seed=1 + idx).split(16)), dataloader_idx=idx).var(correction=0)
        for idx in range(num_loaders)
    ]
    logger = CSVLogger(tmp_path)
    monitor = SensitivityMonitor(before_training=True)
    trainer(callbacks=[monitor], logger=logger, num_sanity_val_steps=0).fit(model, loader(), loaders)
    rows = csv_rows(logger.log_dir)
    for idx, value in enumerate(expected):
        name = "val_sensitivity" if num_loaders == 1 else f"val_sensitivity/dataloader_idx_{idx}"
        steps = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert list(steps) == [0, 3, 7]
        close(steps[0], value)


def test_before_training_counts_a_loader_without_a_value(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[SensitivityMonitor(before_training=True)], logger=logger, max_epochs=1)
    with pytest.warns(UserWarning, match="a single output change"):
        run.fit(Linear(), loader(), [unlabelled_loader(), unlabelled_loader(1)])
    rows = csv_rows(logger.log_dir)
    assert [row["step"] for row in rows if row["val_sensitivity/dataloader_idx_0"]] == ["0", "3"]
    assert "val_sensitivity" not in rows[0]


def test_before_training_names_a_combined_loader_as_lightning_does(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    both = CombinedLoader([unlabelled_loader(seed=1), unlabelled_loader(seed=2)], "min_size")
    monitor = SensitivityMonitor(before_training=True)
    trainer(callbacks=[monitor], logger=logger, max_epochs=1).fit(Linear(), loader(), both)
    rows = csv_rows(logger.log_dir)
    assert [row["step"] for row in rows if row["val_sensitivity"]] == ["0", "3"]
    assert not any("dataloader_idx" in name for name in rows[0])


def test_before_training_is_for_untrained_networks_alone(tmp_path: Path) -> None:
    def first_steps(**kwargs: Any) -> list[int]:
        logger = CSVLogger(tmp_path)
        monitors = [
            SensitivityMonitor(before_training=True),
            SensitivityMonitor(0.2, prefix="b_", before_training=True),
        ]
        fit = trainer(callbacks=monitors, logger=logger, max_epochs=kwargs.pop("max_epochs", 1), num_sanity_val_steps=1)
        fit.fit(Classifier(), loader(), loader(), **kwargs)
        assert fit.num_sanity_val_steps == 1
        fit.save_checkpoint(tmp_path / "last.ckpt")
        fit.fit_loop.max_epochs += 1
        fit.fit(fit.lightning_module, loader(), loader())  # goes on: nothing is untrained any more
        return [int(row["step"]) for row in csv_rows(logger.log_dir) if row["val_sensitivity"]]

    assert first_steps() == [0, 3, 7]
    assert first_steps(ckpt_path=tmp_path / "last.ckpt", max_epochs=2) == [7, 11]


def test_before_training_leaves_a_fast_dev_run_fast() -> None:
    class NoSanityCheck(Callback):
        def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pytest.fail("a fast_dev_run has no sanity check")

    callbacks = [SensitivityMonitor(before_training=True), NoSanityCheck()]
    trainer(callbacks=callbacks, fast_dev_run=1).fit(Classifier(), loader(), loader())


# Unusual loaders


def test_one_sample_warns_and_logs_nothing() -> None:
    with pytest.warns(UserWarning, match="single output change: nothing is logged"):
        assert validated(SensitivityMonitor(), Classifier(), loader(1)).keys() == {"val_loss"}


def test_one_sample_of_several_draws_has_a_value_and_no_error_bar() -> None:
    values = validated(SensitivityMonitor(num_draws=3), Classifier(), loader(1))
    assert values["val_sensitivity"] > 0
    assert "val_sensitivity_stderr" not in values


def test_a_short_sanity_check_of_one_sample_is_silent() -> None:
    trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=1).fit(Classifier(), loader(), loader(8, 1))


def test_a_fit_that_never_validates_says_so() -> None:
    with pytest.warns(UserWarning, match="logged nothing in this fit"):
        trainer(callbacks=[SensitivityMonitor()], check_val_every_n_epoch=5).fit(Classifier(), loader(), loader())


def test_predict_is_left_alone() -> None:
    class NoForwardAtAll(Classifier):
        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return batch[0]

    run = trainer(callbacks=[SensitivityMonitor(), SensitivityMonitor()])  # one prefix twice: no matter here
    assert len(run.predict(NoForwardAtAll(), loader())) == len(loader())


def test_a_loader_without_batches_warns_and_logs_nothing() -> None:
    class Nothing(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(())

    with pytest.warns(UserWarning, match="got no batch in this epoch: nothing is logged"):
        assert validated(SensitivityMonitor(), Classifier(), DataLoader(Nothing(), batch_size=4)) == {}


def test_an_empty_loader_among_others_does_not_matter() -> None:
    model = Classifier()
    run = trainer(callbacks=[SensitivityMonitor()])
    with pytest.warns(UserWarning, match="length of `DataLoader` across ranks is zero"):
        results = run.validate(model, [DataLoader(labelled(0)), loader(seed=1)], verbose=False)
    changes = brute_force(model, list(inputs(50, seed=1).split(16)), dataloader_idx=1)
    merged = {name: value for values in results for name, value in values.items()}
    close(merged["val_sensitivity/dataloader_idx_1"], changes.var(correction=0))
    assert not any(np.isnan(value) for value in merged.values())


# What bad input gets


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"noise_std": 0}, "`noise_std`.*positive.*got 0"),
        ({"noise_std": -1.0}, "`noise_std`.*got -1.0"),
        ({"noise_std": float("nan")}, "`noise_std`.*got nan"),
        ({"noise_std": [0.1, 0.0]}, r"`noise_std`.*got \[0.1, 0.0\]"),
        ({"num_draws": 0}, "`num_draws`.*1 or more.*got 0"),
        ({"num_draws": 1.5}, "`num_draws`.*got 1.5"),
        ({"num_draws": True}, "`num_draws`.*got True"),
        ({"seed": "x"}, "`seed`.*int.*got 'x'"),
        ({"prefix": None}, "`prefix`.*str.*got None"),
        ({"test_prefix": 3}, "`test_prefix`.*got 3"),
        ({"inputs": 1.5}, "`inputs`.*key.*index.*callable.*got 1.5"),
        ({"outputs": [1]}, r"`outputs`.*got \[1\]"),
        ({"per_output": 1}, "`per_output`.*bool.*got 1"),
        ({"nan_strategy": "skip"}, "`nan_strategy`.*'error' or 'warn'.*got 'skip'"),
        ({"before_training": 1}, "`before_training`.*bool.*got 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        SensitivityMonitor(**kwargs)


def test_a_model_without_forward() -> None:
    class NoForward(Classifier):
        forward = LightningModule.forward

    with pytest.raises(MisconfigurationException, match="NoForward has no `forward`.*returns the logits"):
        trainer(callbacks=[SensitivityMonitor()]).fit(NoForward(), loader(), loader())


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_no_validation_loop() -> None:
    class NoStep(Classifier):
        validation_step = LightningModule.validation_step

    monitored = {"callbacks": [SensitivityMonitor()]}
    with pytest.raises(MisconfigurationException, match="no `validation_step`.*a stub is enough.*def validation_step"):
        trainer(**monitored).fit(NoStep(), loader(), loader())
    with pytest.raises(MisconfigurationException, match="no validation loader.*`val_dataloaders`.*no labels"):
        trainer(**monitored).fit(Classifier(), loader())
    with pytest.raises(MisconfigurationException, match="`limit_val_batches=0`"):
        trainer(**monitored, limit_val_batches=0).fit(Classifier(), loader(), loader())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_draws_its_batches_itself() -> None:
    class Drawing(Classifier):
        def validation_step(self, dataloader_iter: Iterator[Any]) -> None: ...

    with pytest.raises(MisconfigurationException, match=r"`validation_step\(dataloader_iter\)`"):
        trainer(callbacks=[SensitivityMonitor()]).fit(Drawing(), loader(), loader())


def test_a_model_that_takes_the_whole_batch_is_told_how() -> None:
    class Whole(Linear):
        def forward(self, batch: Any) -> Tensor:
            if isinstance(batch, dict):
                return super().forward(batch["image"])
            x, _ = batch
            return super().forward(x)

    class Attribute(Linear):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch.image)

    with pytest.raises(MisconfigurationException, match="could not run the model.*AttributeError.*'image'"):
        validated(SensitivityMonitor(), Attribute(), loader(20))
    with pytest.raises(MisconfigurationException, match="could not run the model.*shapes cannot be multiplied"):
        validated(SensitivityMonitor(), Linear(), DataLoader(torch.rand(8, 7), batch_size=4))
    images = DataLoader([{"image": x, "id": 0} for x in inputs(20)], batch_size=10)
    for batches in (images, loader(20)):
        with pytest.raises(
            MisconfigurationException, match=r"could not run the model.*Error.*inputs=lambda batch: \(batch,"
        ):
            validated(SensitivityMonitor(), Whole(), batches)
        assert validated(SensitivityMonitor(inputs=lambda batch: (batch,)), Whole(), batches)["val_sensitivity"] > 0


def test_two_monitors_need_two_prefixes() -> None:
    model = Classifier()
    same = [SensitivityMonitor(), SensitivityMonitor(noise_std=0.2)]
    with pytest.raises(MisconfigurationException, match="`prefix` of its own, got .'val_', 'val_'."):
        trainer(callbacks=same).fit(model, loader(), loader())
    run = trainer(callbacks=[SensitivityMonitor(), SensitivityMonitor(0.2, prefix="val_wide_")])
    (values,) = run.validate(model, loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match="`test_prefix` of its own"):
        run.test(model, loader(), verbose=False)
    ratio = values["val_wide_sensitivity"] / values["val_sensitivity"]
    assert 2 < ratio < 8  # near 4, as far as the model is linear


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (torch.zeros(4, 12, dtype=torch.long), "floating tensor, got torch.int64.*inputs="),
        ([{"image": torch.zeros(3, dtype=torch.uint8)}], "exactly one floating tensor.*inputs="),
    ],
)
def test_batches_without_a_floating_tensor(batches: list[Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        validated(SensitivityMonitor(), Linear(), DataLoader(batches))


@pytest.mark.parametrize(
    ("outputs", "error", "match"),
    [
        (lambda logits: {"scores": logits}, MisconfigurationException, "should be a tensor.*'scores'.*outputs="),
        (lambda logits: logits.argmax(1), TypeError, "`clean`.*floating.*int64"),
        (lambda logits: logits.softmax(1), ValueError, "Pass the logits"),
        (lambda logits: logits.sum(), ValueError, "got a scalar"),
    ],
)
def test_outputs_that_can_not_be_compared(outputs: Any, error: type[Exception], match: str) -> None:
    class Wrapped(Linear):
        def forward(self, x: Tensor) -> Any:
            return outputs(super().forward(x))

    with pytest.raises(error, match=match):
        validated(SensitivityMonitor(), Wrapped(), loader())


def test_outputs_that_differ_in_shape() -> None:
    class Growing(Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)[:, : 5 - self.calls]

    with pytest.raises(ValueError, match=r"\(16, 3\) for noisy and \(16, 4\) for clean"):
        validated(SensitivityMonitor(), Growing(), loader())


class Diverging(Linear):
    """Gives nan for the batch and the pass that it is told."""

    def __init__(self, batch: int, noisy: bool) -> None:
        super().__init__()
        self.bad_call, self.calls = 2 * batch + noisy, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += not self.training
        return super().forward(x) * (torch.nan if self.calls - 1 == self.bad_call else 1)


@pytest.mark.parametrize("noisy", [False, True])
def test_non_finite_outputs_are_named(noisy: bool) -> None:
    which = "noisy" if noisy else "clean"
    with pytest.raises(
        ValueError, match=f"`SensitivityMonitor`, dataloader 0: .*{which} outputs of batch 2 .*nan_strat"
    ):
        validated(SensitivityMonitor(), Diverging(2, noisy), unlabelled_loader())
    batches_of_the_first = len(unlabelled_loader())
    with pytest.raises(ValueError, match=f"dataloader 1: .*{which} outputs of batch 1 "):
        loaders = [unlabelled_loader(), unlabelled_loader()]
        trainer(callbacks=[SensitivityMonitor()]).validate(Diverging(batches_of_the_first + 1, noisy), loaders)


def test_non_finite_outputs_can_let_training_go_on() -> None:
    history = History()
    model = Diverging(1, noisy=True)
    run = trainer(callbacks=[SensitivityMonitor(nan_strategy="warn", task=None), history], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="noisy outputs of batch 1"):
        run.fit(model, loader(), unlabelled_loader())
    assert len(history.epochs) == 2
    assert "val_sensitivity" in history.epochs[1]


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"per channel.*got 3 for an input of shape \(16, 12\)"):
        validated(SensitivityMonitor([0.1, 0.2, 0.3]), Linear(), loader())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:The rows of the outputs all sum to the same value")
def test_a_class_mean_that_training_shrinks_to_nothing_does_not_end_the_run(optimizer: Any) -> None:
    # Cross-entropy has no gradient along the class-mean of the logits: from a zero head on, it stays there.
    class ZeroHead(Classifier):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters(), lr=0.1, weight_decay=5e-3)

    history = History()
    trainer(callbacks=[SensitivityMonitor(), history], precision="bf16-mixed").fit(ZeroHead(), loader(), loader(seed=1))
    assert len(history.epochs) == 2


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_the_other_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")
    net = nn.Linear(12, 4)

    class NoStep(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        training_step = Linear.training_step
        configure_optimizers = Linear.configure_optimizers

    class Model(NoStep):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def fit(model: Any) -> Any:
        logger = other.loggers.TensorBoardLogger(tmp_path, name=None)
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1, "accelerator": "cpu"}
        run = other.Trainer(callbacks=[SensitivityMonitor()], logger=logger, **quiet)
        run.fit(model, loader(), loader())
        return run

    with pytest.raises(MisconfigurationException, match="no `validation_step`"):
        fit(NoStep())
    run = fit(Model())
    close(run.callback_metrics["val_sensitivity"], brute_force(run.model, list(inputs(50).split(16))).var(correction=0))
    run.logger.experiment.flush()
    (events,) = Path(run.logger.log_dir).glob("events*")
    assert b"custom_scalars" in events.read_bytes()


# LightningCLI


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 on jsonargparse 4.5
def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    config = f"""
        seed_everything: 1
        trainer:
          accelerator: cpu
          max_epochs: 1
          default_root_dir: {tmp_path}
          enable_checkpointing: false
          enable_progress_bar: false
          logger: false
          callbacks:
            - class_path: lightning_sensitivity.SensitivityMonitor
              init_args:
                noise_std: [{", ".join(["0.1"] * 12)}]
                num_draws: 2
                inputs: 0
                prefix: "val/"
            - class_path: lightning_sensitivity.SensitivityMonitor
              init_args: {{noise_std: 0.3, outputs: operator.pos}}
        """

    def monitors(text: str) -> tuple[LightningCLI, list[SensitivityMonitor]]:
        (tmp_path / "config.yaml").write_text(text)
        arguments = ["--config", str(tmp_path / "config.yaml")]
        cli = LightningCLI(Linear, run=False, args=arguments, save_config_callback=None)
        return cli, [callback for callback in cli.trainer.callbacks if isinstance(callback, SensitivityMonitor)]

    cli, (first, second) = monitors(config)
    assert first._sensitivity._inputs == 0
    assert first._sensitivity._outputs is None
    assert second._sensitivity._outputs is operator.pos
    cli.trainer.fit(cli.model, loader(), loader())
    for prefix in ("val/", "val_"):
        assert {f"{prefix}{name}" for name in NAMES} <= cli.trainer.callback_metrics.keys()

    _, (first, _) = monitors(config.replace("inputs: 0", "inputs: image"))
    assert first._sensitivity._inputs == "image"


def test_the_callback_can_be_copied() -> None:
    monitor = copy.deepcopy(SensitivityMonitor(noise_std=[0.1, 0.2]))
    assert monitor.perturbation.std == [0.1, 0.2]


class Recall(Classifier):
    """Logs names that are ours."""

    def __init__(self, name: str, in_step: bool = True) -> None:
        super().__init__()
        self.name, self.in_step = name, in_step

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.in_step:
            self.log(self.name, self(batch[0]).mean())

    def on_validation_epoch_end(self) -> None:
        if not self.in_step:
            self.log(self.name, 1.0)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("name", ["val_sensitivity", "val_loss_estimate", "val_risk_training"])
@pytest.mark.parametrize("num_sanity_val_steps", [2, 0])
def test_a_name_that_somebody_else_logs_is_refused(name: str, in_step: bool, num_sanity_val_steps: int) -> None:
    run = trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=num_sanity_val_steps)
    with pytest.raises(MisconfigurationException, match=f"`prefix`.*names of its own, but '{name}' is"):
        run.fit(Recall(name, in_step), loader(), loader())
    assert (run.global_step == 0) == (num_sanity_val_steps > 0)  # before training, if there is a sanity check
    trainer(callbacks=[SensitivityMonitor(prefix="mine/")]).fit(Recall(name, in_step), loader(), loader())
    if "risk" in name:
        trainer(callbacks=[SensitivityMonitor(task=None)]).fit(Recall(name, in_step), loader(), loader())
    else:
        with pytest.raises(MisconfigurationException, match="`prefix`.*names of its own"):
            run.validate(Recall(name, in_step), loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match="`test_prefix`.*names of its own"):
        run.test(Recall("test_sensitivity", in_step), loader(), verbose=False)


@pytest.mark.parametrize("bad", [None, [], [torch.arange(3)]])
def test_a_later_batch_that_can_not_be_measured_is_left_out(bad: Any) -> None:
    class Skipping(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch and batch[0].is_floating_point():
                self(batch[0])

    batches = [[x] for x in inputs(48).split(16)]
    model = Skipping()
    for at in (1, 3):
        val = DataLoader([*batches[:at], bad, *batches[at:]], batch_size=None, collate_fn=lambda batch: batch)
        with pytest.warns(UserWarning, match="leaves a batch of dataloader 0 out: "):
            values = validated(SensitivityMonitor(), model, val)
        expected = [
            changes
            for batch_idx, batch in enumerate([*batches[:at], None, *batches[at:]])
            if batch is not None
            for changes in brute_force(model, [torch.zeros(0, 12)] * batch_idx + batch)
        ]
        close(values["val_sensitivity"], torch.stack(expected).var(correction=0))
    first = DataLoader([bad, *batches], batch_size=None, collate_fn=lambda batch: batch)
    with pytest.raises(MisconfigurationException, match="floating tensor|Expected a batch, got None"):
        validated(SensitivityMonitor(), model, first)


@pytest.mark.parametrize(
    "monitor", [{}, {"at": "net.0"}, {"inputs": lambda batch: batch[0]}, {"per_output": True}, {"num_samples": 32}]
)
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_no_batch_in_a_later_validation_even_the_first(monitor: dict[str, Any], num_sanity_val_steps: int) -> None:
    class Skipping(Classifier):
        def val_dataloader(self) -> Any:
            batches = [[x] for x in inputs(64).split(16)]
            batches = [None, *batches[1:]] if self.trainer.current_epoch == 1 else batches
            return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch is not None:
                self.log("val_mean", self(batch[0]).mean())

    run = trainer(
        callbacks=[SensitivityMonitor(task=None, **monitor)],
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=num_sanity_val_steps,
    )
    with pytest.warns(UserWarning, match="leaves a batch of dataloader 0 out: Expected a batch, got None"):
        run.fit(Skipping(), loader())
    assert run.callback_metrics["val_sensitivity"] > 0


def test_before_training_gives_the_sanity_check_back_after_an_error() -> None:
    class Failing(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("mine")

    run = trainer(callbacks=[SensitivityMonitor(before_training=True)], num_sanity_val_steps=2)
    with pytest.raises(RuntimeError, match="mine"):
        run.fit(Failing(), loader(), loader())
    assert run.num_sanity_val_steps == 2


@pytest.mark.parametrize("method", ["noise", "gradient"])
def test_log_probabilities_are_warned_of_once(method: str) -> None:
    class Ending(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(1)

    monitor = SensitivityMonitor(method=method)
    with pytest.warns(UserWarning, match="`val_sensitivity`: the outputs are log-probabilities") as caught:
        trainer(callbacks=[monitor], max_epochs=3).fit(Ending(), loader(), loader())
    assert sum("log-probabilities" in str(warning.message) for warning in caught) == 1
    if method == "noise":
        validated(SensitivityMonitor(per_output=True), Ending(), loader())  # without a warning


def test_names_that_are_logged_in_training_or_with_a_loader_are_found() -> None:
    class InTraining(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("val_sensitivity", 7.0)
            return super().training_step(batch, batch_idx)

    class ByHand(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log(f"val_sensitivity/dataloader_idx_{dataloader_idx}", 7.0, add_dataloader_idx=False)

    for model, val in ((InTraining(), loader()), (ByHand(), [loader(), loader()])):
        with pytest.raises(MisconfigurationException, match="names of its own, but 'val_sensitivity' is"):
            trainer(callbacks=[SensitivityMonitor()]).fit(model, loader(), val)


@pytest.mark.filterwarnings("ignore:There will be no risk estimate")
def test_a_name_is_free_where_there_is_no_such_value() -> None:
    labels = [[x, torch.rand(16, 1)] for x in inputs(32).split(16)]

    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

        def on_validation_epoch_end(self) -> None:
            self.log("val_risk_estimate", 7.0)

    run = trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=0)
    run.fit(Own(), DataLoader(labels, batch_size=None), unlabelled_loader())
    assert run.callback_metrics["val_risk_estimate"] == 7
