"""What the monitors cost, counted and never timed; examples/cost has the times."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.base import Monitor
from tests.helpers import NUM_FEATURES, Classifier, Watch, labelled, trainer

NUM_BATCHES, BATCH_SIZE = 60, 100  # 6,000 samples, of which a budget of 1,200 measures every fifth batch
NUM_MEASURED = 12


class Counted(LightningModule):
    """Notes what is logged; its steps do not call it."""

    def __init__(self, num_outputs: int = 4) -> None:
        super().__init__()
        self.net = nn.Linear(NUM_FEATURES, num_outputs)
        self.logged: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append(name)
        super().log(name, *args, **kwargs)

    configure_optimizers = Classifier.configure_optimizers


class Written(Watch):
    """Notes how large the tensors are that operations make."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.cloned, self.wide = 0, 0  # bytes of the largest clone, elements of the largest float64 tensor

    def note(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.wide = max(self.wide, each.numel() * (each.dtype == torch.float64))
                self.cloned = max(self.cloned, each.nbytes * (function is torch.ops.aten.clone.default))


def fit(
    model: LightningModule,
    monitors: list[Monitor],
    around: Callable[[], Any],
    num_batches: int = NUM_BATCHES,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Two epochs, with the second validation inside of what ``around`` gives."""
    run = trainer(max_epochs=2, callbacks=monitors, num_sanity_val_steps=0)
    loop = run.fit_loop.epoch_loop.val_loop
    validate = loop.run

    def second() -> Any:
        if run.current_epoch == 0:
            return validate()
        with around():
            return validate()

    loop.run = second  # type: ignore[method-assign]
    loaders = [DataLoader(labelled(n * batch_size), batch_size) for n in (min(6, num_batches), num_batches)]
    run.fit(model, *loaders)


@pytest.mark.parametrize(
    ("monitor", "passes", "names"),
    [
        (SensitivityMonitor, 2 * NUM_MEASURED, 4),  # clean and noisy
        (RiskMonitor, 2 * NUM_MEASURED + 5, 4),  # clean and a twin, and the first 500 training samples
    ],
)
def test_passes_and_logged_names_of_a_validation(monitor: type[Monitor], passes: int, names: int) -> None:
    model, sizes = Counted(), list[int]()  # not an attribute, which the monitors would put back
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    @contextmanager
    def counted() -> Iterator[None]:
        sizes.clear()
        model.logged.clear()
        yield
        assert sizes == [BATCH_SIZE] * passes
        assert len(model.logged) == len(set(model.logged)) == names
        sizes.clear()

    fit(model, [monitor()], counted)
    assert not sizes


def test_of_a_batch_that_is_not_measured_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = Counted(), list[bool]()
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
    fit(model, [SensitivityMonitor()], counted)
    assert done == [index % 5 == 0 for index in range(NUM_BATCHES)]


def test_of_a_large_buffer_nothing_is_copied_after_the_first_pass() -> None:
    model, written = Counted(), Written()
    model.register_buffer("queue", torch.zeros(128, 2**16))  # 33 MB
    fit(model, [SensitivityMonitor(), RiskMonitor()], lambda: written)
    assert 0 < written.cloned < 2**16


@pytest.mark.parametrize("monitor", [SensitivityMonitor, lambda: RiskMonitor("multiclass")])
def test_no_wide_copy_of_all_outputs(monitor: Callable[[], Monitor]) -> None:
    num_outputs, written = 2**14, Written()
    fit(Counted(num_outputs), [monitor()], lambda: written, num_batches=8, batch_size=64)
    assert 0 < written.wide <= 64 * num_outputs // 4


def test_the_benchmark_compares_and_judges(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples/cost/benchmark.py"
    command = [sys.executable, script, "--quick", "--only", "0", "--out", tmp_path / "rows.csv"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["sensitivity", "risk", "both"]
    for row in rows:
        ratio = float(row["median"])
        assert ratio == pytest.approx(float(row["seconds"]) / float(row["beside"]), rel=0.02)
        assert row["met"] == ("yes" if ratio <= 1.5 else "no")
        assert f"| MLP | {row['case']} |" in result.stdout
