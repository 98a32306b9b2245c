"""Two and four gloo processes say what one says; each number of them is started once, and runs every scenario."""

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks import reference, risk
from tests.callbacks.plain_loop import ACCURACY, AUROC, SCORE, Plain, batches_of
from tests.helpers import Stream, inputs, labelled, quick_risk, small_forests

SENSITIVITY = "val/output_sensitivity"
X, CORRECT = labelled(96).tensors  # a number that two and four divide
NOISY = CORRECT.where(torch.arange(96) % 3 > 0, (CORRECT + 1) % 4)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def distributed(**kwargs: Any) -> Trainer:
    if world_size() == 1:
        return Trainer(**kwargs)
    # A process that waits for the others in vain fails before the test's own limit.
    return Trainer(strategy=DDPStrategy(timeout=timedelta(seconds=120)), devices=world_size(), **kwargs)


def dealt(sizes: list[int]) -> DataLoader:
    """Validation samples of which each process has another number, and so another number of batches."""
    samples = inputs(sum(sizes), seed=1)
    stream = Stream()
    stream.samples = samples if world_size() == 1 else samples.split(sizes)[rank()]
    return DataLoader(stream, 16)


class Still(Plain):
    """Training does not move it, and its own collectives come between ours."""

    lr = 0.0

    def __init__(self) -> None:
        super().__init__()
        for weight in self.parameters():
            weight.data.mul_(3)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mine", torch.ones(()), sync_dist=True)


def fitted(monitors: Any, model: Any, train: Any, val: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The Trainer, and what monitors have warned of in this process."""
    options = {"kind": distributed, "num_sanity_val_steps": 0, "max_epochs": 2, **kwargs}
    return helpers.fitted_and_said(monitors, model, train, val, **options)


# What one process says


def all_that_is_said(sizes: list[int]) -> Any:
    monitors = [monitor := RiskMonitor(), SensitivityMonitor(loss_estimate=True)]
    train = batches_of(X, NOISY, batch_size=40 // world_size())  # of 20 and 10, and of the rest
    lines = list[str]()
    with small_forests() as patch:
        patch.setattr(risk, "rank_zero_info", lines.append)
        run, texts = fitted(monitors, Still(), train, dealt(sizes))
    return helpers.logged(run, "val/"), *known_of(monitor), lines, texts


def known_of(monitor: RiskMonitor) -> tuple[dict[str, Any], list[str]]:
    """What a monitor remembers: numbers, and words."""
    record: dict[str, Any] = asdict(monitor.record)
    del record["saved_steps"]
    return record, [record["verdict"].pop(name) for name in ("learner", "features")]


SIZES = {2: [50, 75], 4: [50, 0, 20, 55]}  # of validation samples; in one process there is no batch


@pytest.fixture(scope="module")
def alone() -> Any:
    return all_that_is_said([125])


def four(rank: int, folder: Path) -> Any:
    return all_that_is_said(SIZES[4])


def assert_same_as_one(found: list[Any], alone: Any) -> None:
    for each in found[1:]:
        torch.testing.assert_close(each[:2], found[0][:2], rtol=0, atol=0, equal_nan=True)
        assert each[2:] == found[0][2:]
    values, record, words, lines, texts = found[0]
    truth, one, one_words, one_line, _ = alone
    assert texts == [] and lines == one_line and words == one_words
    assert len(lines) == 1 and "The reference (" in lines[0]
    assert values.keys() == truth.keys()
    noisy = {name for name in values if "sensitivity" in name or "loss_estimate" in name}  # noise is drawn by rank
    assert {name: values[name] for name in values.keys() - noisy} == pytest.approx(
        {name: truth[name] for name in values.keys() - noisy}, rel=1e-5
    )
    assert values[SENSITIVITY] == pytest.approx(truth[SENSITIVITY], abs=4 * truth[SENSITIVITY + "_stderr"])
    torch.testing.assert_close(record, one, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert record["verdict"]["is_trusted"] and record["verdict"]["num_samples"] == 96


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_four_processes_one_without_a_batch_say_what_one_says(alone: Any, tmp_path: Path) -> None:
    found = helpers.run_processes(four, tmp_path, 4)
    assert_same_as_one(found, alone)


def test_two_processes_with_unequal_numbers_of_batches_say_what_one_says(both: Any, alone: Any) -> None:
    assert_same_as_one(both["unequal"], alone)


# Scenarios of two processes


def unequal(folder: Path) -> Any:
    return all_that_is_said(SIZES[2])


class Moving(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[2].p = 0.0


def identical(folder: Path) -> Any:
    """Training with and without monitors, and a process without a validation batch."""
    model, other = Moving(), Moving()
    monitors = [quick_risk(), SensitivityMonitor(), ModelCheckpoint(folder / "best", monitor=SCORE)]
    train, val = batches_of(X, CORRECT, batch_size=20), dealt([0, 40])
    run, texts = fitted(monitors, model, train, val, enable_checkpointing=True)
    fitted([], other, train, val)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    return run.epochs, texts


MARK = 0.5  # in a sample of the batch that fails


class Failing(Moving):
    """In the second epoch, passes on one batch fail in one process."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.trainer.validating and self.current_epoch == 1 and rank() == 1:
            raise ValueError("out of luck")
        return super().forward(x)


def failing(folder: Path) -> Any:
    stopping = EarlyStopping(SCORE, patience=1)
    monitors = [SensitivityMonitor(), quick_risk(), stopping]
    run, texts = fitted(monitors, Failing(), batches_of(X, CORRECT, batch_size=20), dealt([20, 40]), max_epochs=3)
    return run.epochs, texts


def failing_training(folder: Path) -> Any:
    model, monitor = Moving(), quick_risk()
    model.loss = lambda outputs, y: cross_entropy(outputs, y.clamp(max=3))
    run, texts = fitted([monitor], model, batches(rank()), dealt([20, 40]), use_distributed_sampler=False)
    return run.epochs, texts, (monitor.record.verdict.num_samples, monitor.record.verdict.score)


def batches(place: int) -> DataLoader:
    """Three training batches; that in the middle has a label above the classes in the second process."""
    parts = [labelled(size, seed=size + place).tensors for size in (20, 16, 4)]
    parts[1][1][3] = 7 if place == 1 else 0
    return DataLoader(parts, None)


def failing_features(folder: Path) -> Any:
    def features(batch: Any) -> Tensor:
        if rank() == 1 and isinstance(batch, Tensor):
            raise ValueError("no features")
        return batch[0] if isinstance(batch, list) else batch

    monitor = quick_risk(features=features)
    run, texts = fitted([monitor], Moving(), batches_of(X, CORRECT, batch_size=20), dealt([20, 40]))
    return run.epochs, texts, (monitor.record.verdict.num_samples, monitor.record.verdict.score)


def resuming(folder: Path) -> Any:
    options: dict[str, Any] = {"use_distributed_sampler": False}  # which shuffles
    train = batches_of(X[rank() :: 2], CORRECT[rank() :: 2], batch_size=20)
    fitted([whole := quick_risk()], Moving(), train, dealt([20, 40]), max_epochs=3, **options)
    first, _ = fitted([quick_risk()], Moving(), train, dealt([20, 40]), **options)
    first.save_checkpoint(folder / "two.ckpt")
    torch.distributed.barrier()
    original, reference.fit_reference = reference.fit_reference, None  # type: ignore[assignment]
    options |= {"ckpt_path": folder / "two.ckpt"}
    _, texts = fitted([resumed := quick_risk()], Moving(), train, dealt([20, 40]), max_epochs=3, **options)
    reference.fit_reference = original
    return known_of(whole)[0], known_of(resumed)[0], texts


def sorted_samples(folder: Path) -> Any:
    """Each process gets its samples in the order of their classes, half of them before the first validation."""
    x, y = labelled(800, seed=5 + rank()).tensors
    order, monitor = y.argsort(stable=True), quick_risk()
    train, options = batches_of(x[order], y[order], batch_size=100), {"val_check_interval": 0.5, "max_epochs": 1}
    _, texts = fitted([monitor], Moving(), train, dealt([20, 40]), use_distributed_sampler=False, **options)
    return monitor.record.num_references, len(monitor.history), texts


SCENARIOS = (unequal, identical, failing, failing_training, failing_features, resuming, sorted_samples)


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for scenario in SCENARIOS:
        results[scenario.__name__] = scenario(folder)
        torch.distributed.barrier()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    first, second = helpers.run_processes(run_all, folder)
    return {"folder": [folder], **{name: [first[name], second[name]] for name in first}}


def test_a_process_without_a_batch_has_the_others_values_and_training_is_bit_identical(both: Any) -> None:
    (epochs, texts), (other_epochs, other_texts) = both["identical"]
    assert epochs == other_epochs and texts == other_texts == []
    assert {SCORE, ACCURACY, AUROC, SENSITIVITY} <= epochs[0].keys() and epochs[0][SCORE] < 2


def test_a_pass_that_fails_in_one_process_costs_the_value_of_both_and_stops_nobody(both: Any) -> None:
    (epochs, texts), (other_epochs, other_texts) = both["failing"]
    assert epochs == other_epochs and len(epochs) == 3
    assert [epoch[SCORE] > 2 for epoch in epochs] == [False, True, False]
    assert texts == [] and all("out of luck" in text and "This epoch has no value" in text for text in other_texts)
    assert len(other_texts) == 2


def test_a_training_batch_that_fails_in_one_process_is_left_out_and_said_by_it(both: Any) -> None:
    (epochs, texts, verdict), (other_epochs, other_texts, other_verdict) = both["failing_training"]
    assert epochs == other_epochs and verdict == other_verdict and verdict[0] == 40 + 24
    assert texts == [] and len(other_texts) == 1
    assert "could not keep a training batch" in other_texts[0] and "Expected labels from 0 to 3" in other_texts[0]


def test_a_process_whose_validation_samples_have_no_features_costs_no_run(both: Any) -> None:
    (epochs, _, verdict), (other_epochs, texts, other_verdict) = both["failing_features"]
    assert epochs == other_epochs and len(epochs) == 2 and verdict == other_verdict
    assert any("failed on a tensor" in text and "no features" in text for text in texts)


def test_there_is_no_early_reference_of_samples_that_each_process_gets_in_the_order_of_classes(both: Any) -> None:
    assert both["sorted_samples"] == [(1, 1, []), (1, 1, [])]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_fit_goes_on_with_the_same_reference_also_in_one_process(both: Any, monkeypatch: Any) -> None:
    (whole, resumed, texts), (_, other, other_texts) = both["resuming"]
    assert texts == other_texts == []
    for one, another in ((resumed, other), (resumed, whole)):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-7, equal_nan=True)
    monkeypatch.setattr(reference, "fit_reference", None)
    monitor, options = quick_risk(), {"ckpt_path": both["folder"][0] / "two.ckpt", "max_epochs": 3}
    helpers.fitted(monitor, Moving(), batches_of(X, CORRECT, batch_size=20), dealt([60]), **options)
    record, _ = known_of(monitor)
    for name in ("verdict", "predictions"):
        torch.testing.assert_close(record[name], whole[name], equal_nan=True)
