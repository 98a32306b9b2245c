"""What the monitors cost, counted and never timed; examples/cost has the times."""

from __future__ import annotations

import csv
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.base import Monitor
from tests.helpers import NUM_FEATURES, Quiet, Watch, labelled, trainer

NUM_BATCHES, BATCH_SIZE = 60, 100  # 6,000 samples, of which a budget of 1,200 measures every fifth batch
NUM_MEASURED = 12
BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "examples/cost/benchmark.py"))


class Overridden(Quiet):
    """Its steps do not call it, and its `log` takes neither our values nor our options."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def log(self, name: str, value: float) -> None:
        raise AssertionError(f"{name} was logged by the user's `log`")


def fit(monitor: Monitor, around: Callable[[], Any], model: LightningModule) -> None:
    """Two epochs, with the second validation inside of what ``around`` gives."""
    run = trainer(max_epochs=2, callbacks=[monitor], num_sanity_val_steps=0)
    loop = run.fit_loop.epoch_loop.val_loop
    validate = loop.run

    def second() -> Any:
        if run.current_epoch == 0:
            return validate()
        with around():
            return validate()

    loop.run = second  # type: ignore[method-assign]
    run.fit(model, *(DataLoader(labelled(n * BATCH_SIZE), BATCH_SIZE) for n in (6, NUM_BATCHES)))


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (SensitivityMonitor, 2 * NUM_MEASURED),  # clean and noisy
        (RiskMonitor, 3 * NUM_MEASURED + 5),  # clean, model and twin by the batch, and the first 500 training samples
    ],
)
def test_passes_and_logged_names_of_a_validation(
    kind: type[Monitor], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, names = Overridden(), list[int](), list[str]()  # no attributes, which the monitors would put back
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    log = LightningModule.log

    def noted(self: LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        names.append(name)
        log(self, name, *args, **kwargs)

    @contextmanager
    def counted() -> Iterator[None]:
        sizes.clear()
        names.clear()
        yield
        assert sizes == [BATCH_SIZE] * passes
        assert names == [f"val_{name}" for name in kind.names]
        sizes.clear()

    monkeypatch.setattr(LightningModule, "log", noted)
    fit(kind(), counted, model)
    assert not sizes


def test_of_a_batch_that_is_not_measured_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[bool]()
    original = Monitor.on_validation_batch_start

    def watched(self: Monitor, *args: Any, **kwargs: Any) -> None:
        operations: list[Any] = []
        with Watch(lambda function, *_: operations.append(function)):
            original(self, *args, **kwargs)
        done.append(bool(operations))

    @contextmanager
    def counted() -> Iterator[None]:
        done.clear()
        yield

    monkeypatch.setattr(Monitor, "on_validation_batch_start", watched)
    fit(SensitivityMonitor(), counted, Quiet())
    assert done == [index % 5 == 0 for index in range(NUM_BATCHES)]


# Of one batch there are 8 twins, one after another.
@pytest.mark.parametrize("case", ["sensitivity", "risk"])
def test_at_the_peak_there_are_two_batches_of_outputs_and_no_wide_copy(case: str) -> None:
    data = [[torch.rand(1024, NUM_FEATURES), torch.randint(2**13, (1024,))]]
    row = BENCHMARK["memory"]("wide", case, nn.Linear(NUM_FEATURES, 2**13), data)[0]
    assert 1.9 < row["median"] < 2.2


def test_the_benchmark_compares_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BENCHMARK["main"](["--quick", "--only", "0", "--out", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["sensitivity", "both"]
    text = capsys.readouterr().out
    for row in rows:
        ratio = float(row["median"])
        assert ratio == pytest.approx(float(row["seconds"]) / float(row["beside"]), rel=0.02)
        assert row["met"] == ("yes" if ratio <= float(row["wanted"].split()[1]) else "no")
        assert f"| MLP | {row['case']} |" in text
