"""Two and four gloo processes say what one says; each number of them is started once, and runs every scenario."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks import risk
from tests.callbacks.plain_loop import ACCURACY, AUROC, LOSS, Plain, batches_of
from tests.helpers import Stream, labelled, quick_risk, small_forests

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


def dealt(sizes: list[int], has_labels: bool = False) -> DataLoader:
    """Validation samples of which each process has another number, and so another number of batches."""
    stream = Stream(sum(sizes), has_labels, seed=1)
    rows = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(world_size()))
    rows = rows if world_size() == 1 else rows.split(sizes)[rank()]
    stream.samples = [stream.samples[row] for row in rows.tolist()]  # type: ignore[assignment]
    return DataLoader(stream, 16)


class Moving(Plain):
    """It has no dropout, so that it is trained alike in any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].p = 0.0


class Busy(Moving):
    """Its own collectives come between ours."""

    def on_validation_epoch_end(self) -> None:
        self.log("val_mine", torch.ones(()), sync_dist=True)


def fitted(monitors: Any, model: Any, train: Any, val: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The Trainer, and what monitors have warned of in this process."""
    options = {"kind": distributed, "num_sanity_val_steps": 0, "max_epochs": 2, **kwargs}
    return helpers.fitted_and_said(monitors, model, train, val, **options)


# What one process says


def all_that_is_said(sizes: list[int]) -> Any:
    grouped = quick_risk(groups=groups, prefix="grouped/")
    monitors = [monitor := RiskMonitor(), grouped, SensitivityMonitor(loss_estimate=True)]
    mine = slice(rank(), None, world_size())  # Lightning's sampler would shuffle
    train = batches_of(X[mine], NOISY[mine], batch_size=40 // world_size())
    lines = list[str]()
    with small_forests() as patch:
        patch.setattr(risk, "rank_zero_info", lines.append)
        run, texts = fitted(monitors, Busy(), train, dealt(sizes), use_distributed_sampler=False)
    found = zip(known_of(monitor), known_of(grouped), strict=True)
    return helpers.logged(run, "val/"), *(one + other for one, other in found), lines, texts


def groups(batch: Any) -> list[str]:
    """Names by content, which are others in training, where a batch has labels."""
    x = batch if isinstance(batch, Tensor) else batch[0]
    return [f"{type(batch).__name__} {int(1e4 * number) % 20}" for number in x.sum(1).tolist()]


def known_of(monitor: RiskMonitor) -> tuple[list[Any], list[Any]]:
    """What a monitor remembers: numbers, and words and flags."""
    rows = [*monitor.history, monitor.summary]
    values = [(name, each) for row in rows for name, each in row.items()]
    return [pair for pair in values if type(pair[1]) is float], [pair for pair in values if type(pair[1]) is not float]


SIZES = {2: [50, 75], 4: [50, 0, 20, 55]}  # of validation samples; in one process there is no batch


@pytest.fixture(scope="module")
def alone() -> Any:
    return all_that_is_said([125])


def four(rank: int, folder: Path) -> Any:
    return all_that_is_said(SIZES[4])


def assert_same_as_one(found: list[Any], alone: Any) -> None:
    for each in found[1:]:
        assert each == found[0]
    values, numbers, words, lines, texts = found[0]
    truth, one, one_words, one_line, _ = alone
    assert texts == [] and lines == one_line and words == one_words
    assert len(lines) == 2 and all("the reference (" in line for line in lines)
    assert values.keys() == truth.keys()
    noisy = {name for name in values if "sensitivity" in name or "loss_estimate" in name}  # noise is drawn by rank
    assert {name: values[name] for name in values.keys() - noisy} == pytest.approx(
        {name: truth[name] for name in values.keys() - noisy}, rel=1e-5
    )
    assert values[SENSITIVITY] == pytest.approx(truth[SENSITIVITY], abs=4 * truth[SENSITIVITY + "_stderr"])
    assert numbers == [(name, pytest.approx(number, rel=1e-5)) for name, number in one]
    assert ("is_trusted", True) in words and ("num_training", 96) in words


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_four_processes_one_without_a_batch_say_what_one_says(alone: Any, tmp_path: Path) -> None:
    found = helpers.run_processes(four, tmp_path, 4)
    assert_same_as_one(found, alone)


def test_two_processes_with_unequal_numbers_of_batches_say_what_one_says(both: Any, alone: Any) -> None:
    assert_same_as_one(both["unequal"], alone)


# Scenarios of two processes


def unequal(folder: Path) -> Any:
    return all_that_is_said(SIZES[2])


def identical(folder: Path) -> Any:
    """Training with and without monitors, and a process without a validation batch."""
    model, other = Moving(), Moving()
    monitors = [quick_risk(), SensitivityMonitor(), ModelCheckpoint(folder / "best", monitor=LOSS)]
    train, val = batches_of(X, CORRECT, batch_size=20), dealt([0, 40])
    run, texts = fitted(monitors, model, train, val, enable_checkpointing=True)
    fitted([], other, train, val)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    return run.epochs, texts


class Failing(Moving):
    """In the second epoch, passes on one batch fail in one process."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.trainer.validating and self.current_epoch == 1 and rank() == 1:
            raise ValueError("out of luck")
        return super().forward(x)


def failing(folder: Path) -> Any:
    stopping = EarlyStopping(LOSS, patience=2)
    monitors = [SensitivityMonitor(), quick_risk(), stopping]
    run, texts = fitted(monitors, Failing(), batches_of(X, CORRECT, batch_size=20), dealt([20, 40]), max_epochs=3)
    return run.epochs, texts


class LateMetric(MulticlassAccuracy):
    """It fails in one process, in the second validation; its first value is of a batch."""

    calls = 0

    def compute(self) -> Tensor:
        LateMetric.calls += 1
        if rank() == 1 and LateMetric.calls == 1 + 2:
            raise ValueError("out of metrics")
        return super().compute()


def failing_metric(folder: Path) -> Any:
    monitors = [SensitivityMonitor(), quick_risk(metrics={"accuracy": LateMetric(4)})]
    run, texts = fitted(monitors, Moving(), batches_of(X, CORRECT, batch_size=20), dealt([20, 40]), max_epochs=3)
    return run.epochs, texts


def failing_training(folder: Path) -> Any:
    model, monitor = Moving(), quick_risk()
    model.loss = lambda outputs, y: cross_entropy(outputs, y.clamp(max=3))
    run, texts = fitted([monitor], model, batches(rank()), dealt([20, 40]), use_distributed_sampler=False)
    return run.epochs, texts, known_of(monitor)


def batches(place: int) -> DataLoader:
    """Three training batches; that in the middle has labels of many other classes in the second process."""
    parts = [labelled(size, seed=size + place).tensors for size in (20, 16, 4)]
    parts[1][1][:4] = torch.arange(7, 11) if place == 1 else 0
    return DataLoader(parts, None)


def failing_features(folder: Path) -> Any:
    def features(batch: Any) -> Tensor:
        if rank() == 1 and isinstance(batch, Tensor):
            raise ValueError("no features")
        return batch[0] if isinstance(batch, list) else batch

    monitor = quick_risk(features=features)
    run, texts = fitted([monitor], Moving(), batches_of(X, CORRECT, batch_size=20), dealt([20, 40]))
    return run.epochs, texts, known_of(monitor)


def labels(folder: Path) -> Any:
    """Of which some, all, or those of training are missing in one process."""

    def targets(change: Any, in_training: bool) -> Any:
        is_now = lambda batch: rank() == 1 and (len(batch[1]) == 24) == in_training  # noqa: E731
        return lambda batch: change(batch[1]) if is_now(batch) else batch[1]

    def none(y: Tensor) -> Tensor:
        return y * 0 - 100

    ways = {"part/": (lambda y: y[:2] if len(y) == 8 else y, False), "none/": (none, False), "training/": (none, True)}
    monitors = [
        quick_risk(prefix=prefix, validation_labels=prefix != "training/", targets=targets(*way))
        for prefix, way in ways.items()
    ]
    train, val = batches_of(X, CORRECT, batch_size=24), dealt([20, 40], has_labels=True)
    _, texts = fitted(monitors, Moving(), train, val)
    return texts, [known_of(each) for each in monitors]


def resuming(folder: Path) -> Any:
    options: dict[str, Any] = {"use_distributed_sampler": False}  # which shuffles
    train = batches_of(X[rank() :: 2], CORRECT[rank() :: 2], batch_size=20)
    fitted([whole := quick_risk()], Moving(), train, dealt([20, 40]), max_epochs=3, **options)
    first, _ = fitted([quick_risk()], Moving(), train, dealt([20, 40]), **options)
    first.save_checkpoint(folder / "two.ckpt")
    torch.distributed.barrier()
    options |= {"ckpt_path": folder / "two.ckpt", "max_epochs": 3}
    _, texts = fitted([resumed := quick_risk()], Moving(), train, dealt([20, 40]), **options)
    return known_of(whole), known_of(resumed), texts


def refusing(folder: Path) -> str:
    """What is wrong in one process, in its first training batch."""

    def targets(batch: Any) -> Tensor:
        if rank() == 1:
            raise ValueError("out of labels")
        return batch[1]

    with pytest.raises(MisconfigurationException) as caught:
        fitted([quick_risk(targets=targets)], Moving(), batches_of(X, CORRECT, batch_size=24), dealt([20, 40]))
    return str(caught.value)


class Counting(SensitivityMonitor):
    """It notes how many samples all processes measure."""

    def compute_values(self, trainer: Any, dataloader_idx: int, *rows: Tensor) -> Any:
        self.size = len(rows[0])
        return super().compute_values(trainer, dataloader_idx, *rows)


def half_an_epoch(folder: Path) -> Any:
    """Of as many samples as fit in both processes together."""
    train, counting = batches_of(*labelled(800, seed=5 + rank()).tensors, batch_size=100), Counting(num_samples=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sensitivity.reference.kinds._MOST_ROWS", 700)
        options = {"val_check_interval": 0.5, "max_epochs": 1, "use_distributed_sampler": False}
        _, texts = fitted([monitor := quick_risk(), counting], Moving(), train, dealt([20, 40]), **options)
    steps = [row["step"] for row in monitor.history if "expected_loss" in row]
    return steps, monitor.summary["num_training"], counting.size, texts


class Gaining(Moving):
    """Its loss is lowest after three epochs; each process logs its own."""

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", [5.0, 4, 2, 6, 7, 8][self.current_epoch] + (self.current_epoch - 9) * rank())


def stopping(folder: Path) -> Any:
    """A tuning run, and a final one that stops by it."""
    mine, options = slice(rank(), None, world_size()), {"use_distributed_sampler": False}
    small, large = (batches_of(X[mine], CORRECT[mine], batch_size=size // world_size()) for size in (16, 48))
    val, watch = dealt([20, 40] if world_size() > 1 else [60]), SensitivityMonitor()
    fitted([watch], Gaining(), small, val, max_epochs=6, **options)
    stop = watch.early_stopping()
    run, texts = fitted([watch, stop], Moving(), large, val, max_epochs=20, **options)
    return watch.tuned, [values["val/stop_progress"] for values in run.epochs], texts


SCENARIOS = (
    unequal, identical, failing, failing_metric, failing_training, failing_features, labels, resuming, half_an_epoch,
    refusing, stopping,
)  # fmt: skip


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
    assert {LOSS, ACCURACY, AUROC, SENSITIVITY} <= epochs[0].keys() and epochs[0][LOSS] < 2


def test_a_pass_that_fails_in_one_process_costs_the_value_of_both_and_stops_nobody(both: Any) -> None:
    (epochs, texts), (other_epochs, other_texts) = both["failing"]
    assert epochs == other_epochs and len(epochs) == 3
    assert epochs[0][LOSS] == epochs[1][LOSS] != epochs[2][LOSS]  # the last one again
    assert texts == [] and all("out of luck" in text and "This epoch has no value" in text for text in other_texts)
    assert len(other_texts) == 2


def test_a_final_run_of_two_processes_stops_where_that_of_one_does(both: Any, tmp_path: Path) -> None:
    assert both["stopping"][0] == both["stopping"][1]
    (epochs, sensitivity), progress, texts = both["stopping"][0]
    (one_epochs, one_sensitivity), one_progress, _ = stopping(tmp_path)
    assert texts == [] and epochs == one_epochs == 3
    assert sensitivity == pytest.approx(one_sensitivity, rel=0.3)  # noise is drawn by rank
    assert len(progress) == len(one_progress) < 20 and progress[-1] > 1 >= progress[-2]


def test_what_one_process_refuses_before_the_first_step_all_refuse(both: Any) -> None:
    other, own = both["refusing"]
    assert "Another process has refused this run" in other and "out of labels" in own


def test_a_metric_that_fails_in_one_process_costs_a_value_in_both(both: Any) -> None:
    (epochs, texts), (other_epochs, other_texts) = both["failing_metric"]
    assert epochs == other_epochs and epochs[0][LOSS] == epochs[1][LOSS] != epochs[2][LOSS]
    assert texts == [] and len(other_texts) == 1 and "out of metrics" in other_texts[0]
    assert all(epoch[SENSITIVITY] < 1e38 for epoch in epochs)


def test_a_training_batch_that_fails_in_one_process_is_left_out_and_said_by_it(both: Any) -> None:
    (epochs, texts, known), (other_epochs, other_texts, other_known) = both["failing_training"]
    assert epochs == other_epochs and known == other_known and ("num_training", 40 + 24) in known[1]
    assert texts == [] and len(other_texts) == 1
    assert "could not keep a training batch" in other_texts[0] and "Expected labels from 0 to 3" in other_texts[0]


def test_a_process_whose_validation_samples_have_no_features_costs_no_run(both: Any) -> None:
    (epochs, _, known), (other_epochs, texts, other_known) = both["failing_features"]
    assert epochs == other_epochs and len(epochs) == 2 and known == other_known and epochs[0][LOSS] < 2
    assert any("failed on a tensor" in text and "no features" in text for text in texts)


@pytest.mark.parametrize(("place", "num_labels", "num_training"), [(0, 20 + 32, 96), (1, 20, 96), (2, 0, 48)])
def test_labels_that_are_missing_in_one_process_are_missing_in_all(
    both: Any, place: int, num_labels: int, num_training: int
) -> None:
    (_, known), (_, other_known) = both["labels"]
    assert known[place] == other_known[place]
    assert known[place][1].count(("num_labels", num_labels)) == 3 and ("num_training", num_training) in known[place][1]


def test_all_processes_share_what_is_kept(both: Any) -> None:
    assert both["half_an_epoch"] == [([4, 8], 700, 19, [])] * 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_fit_says_what_one_in_one_part_says_also_in_one_process(both: Any) -> None:
    (whole, resumed, texts), (_, other, other_texts) = both["resuming"]
    assert texts == other_texts == [] and resumed == other
    monitor, options = quick_risk(), {"ckpt_path": both["folder"][0] / "two.ckpt", "max_epochs": 3}
    helpers.fitted(monitor, Moving(), batches_of(X, CORRECT, batch_size=40), dealt([60]), **options)
    alone = known_of(monitor)
    for numbers, words in (resumed, alone):
        assert words == whole[1] and numbers == [(name, pytest.approx(each, rel=1e-4)) for name, each in whole[0]]
