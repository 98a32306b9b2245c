"""What the monitors cost, counted and never timed; examples/studies/cost has the times."""

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.monitor import Monitor
from tests.helpers import NUM_FEATURES, Quiet, Watch, csv_rows, fitted, labelled

NUM_BATCHES, BATCH_SIZE = 60, 100  # of 6,000 validation samples, 600 are kept: every tenth batch
BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "examples/studies/cost/benchmark.py"))

CHECK = [100]  # a batch by itself, to compare with the joint pass
SENSITIVITY = [600] * 2 + CHECK * 2  # clean and noisy
TWINS = [75] + [75, 75] * 8  # a part by itself; the model with the statistics of each part, and its twin
RISK = [600, *CHECK, *TWINS, 500, *CHECK]  # validation samples, twins, training samples


class Passes(Callback):
    """The sizes of the passes in each validation."""

    def __init__(self, model: LightningModule) -> None:
        self.epochs: list[list[int]] = []
        model.register_forward_pre_hook(
            lambda module, args: self.epochs[-1].append(len(args[0])) if self.epochs else None
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append([])


def fit(model: LightningModule, *callbacks: Any, **kwargs: Any) -> None:
    torch.manual_seed(0)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    train, val = (DataLoader(labelled(n * BATCH_SIZE), BATCH_SIZE) for n in (5, NUM_BATCHES))
    fitted([*callbacks], model, train, val, **{"num_sanity_val_steps": 0, "limit_train_batches": 5, **kwargs})


@pytest.mark.parametrize(("monitors", "expected"), [
    ([SensitivityMonitor()], SENSITIVITY),
    ([SensitivityMonitor(num_draws=3)], SENSITIVITY + 2 * [600, *CHECK]),  # each draw is one pass more
    ([RiskMonitor()], RISK),
    ([SensitivityMonitor(), RiskMonitor()], SENSITIVITY + RISK[1:]),  # which share the clean pass
    ([RiskMonitor(), SensitivityMonitor(), SensitivityMonitor(seed=1, prefix="b_")],
        SENSITIVITY + SENSITIVITY[1:] + RISK[1:]),
    ([SensitivityMonitor(outputs=lambda y: y), RiskMonitor()], SENSITIVITY + RISK),  # which call it in another way
    ([SensitivityMonitor(num_samples=300), RiskMonitor()], [300] * 2 + CHECK * 2 + RISK),
])  # fmt: skip
def test_a_validation_makes_joint_passes(monitors: list[Any], expected: list[int]) -> None:
    model = Quiet()
    fit(model, passes := Passes(model), *monitors, max_epochs=3)
    assert Counter(passes.epochs[-1]) == Counter(expected)


@pytest.mark.parametrize("has_batch_norm", [True, False])
def test_all_validation_samples_at_once_go_through_eight_twins(has_batch_norm: bool) -> None:
    model = Quiet()
    if not has_batch_norm:
        model.net[1] = nn.Identity()
    fit(model, passes := Passes(model), RiskMonitor(num_samples=None), max_epochs=1, limit_val_batches=3)
    assert Counter(passes.epochs[-1])[38] + Counter(passes.epochs[-1])[37] == (17 if has_batch_norm else 9)


class Operations:
    """Counts what the monitors run in a hook, by epoch and batch."""

    def __init__(self, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = Counter[tuple[int, int]]()
        original = getattr(Monitor, hook)
        risk = vars(RiskMonitor).get(hook, original)
        for kind, function in ((Monitor, original), (RiskMonitor, risk)):
            monkeypatch.setattr(kind, hook, self.watched(function))

    def watched(self, function: Any) -> Any:
        def hook(monitor: Any, trainer: Trainer, module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
            operations = list[Any]()
            with Watch(lambda operation, *_: operations.append(operation)):
                function(monitor, trainer, module, batch, batch_idx, *args)
            self.counts[trainer.current_epoch, batch_idx] += len(operations)

        return hook


def test_only_kept_validation_batches_are_copied_and_only_in_the_first_validation(monkeypatch: Any) -> None:
    operations = Operations("on_validation_batch_start", monkeypatch)
    fit(Quiet(), SensitivityMonitor(), RiskMonitor())
    touched = [key for key, count in operations.counts.items() if count]
    assert len(operations.counts) == 2 * NUM_BATCHES
    assert touched == [(0, index) for index in range(0, NUM_BATCHES, 10)]


@pytest.mark.parametrize(("num_samples", "num_touched"), [(1000, 5), (250, 3)])
def test_training_steps_after_the_first_epoch_and_beyond_the_kept_samples_cost_nothing(
    num_samples: int, num_touched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.risk_samples.NUM_TRAINING", num_samples)
    operations = Operations("on_train_batch_start", monkeypatch)
    fit(Quiet(), SensitivityMonitor(), RiskMonitor())
    touched = [key for key, count in operations.counts.items() if count]
    assert len(operations.counts) == 2 * 5 and touched == [(0, index) for index in range(num_touched)]


def test_a_pass_copies_small_buffers_a_validation_large_ones_and_none_parameters() -> None:
    class Wide(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(2**18))
            self.register_buffer("table", torch.zeros(2**14))
            self.weight = nn.Parameter(torch.zeros(2**13))

    model, copies = Wide(), Counter[tuple[int, int]]()
    passes = Passes(model)

    def count(operation: Any, args: Any, kwargs: Any, result: Any) -> None:
        is_copy = any(name in str(operation) for name in ("clone", "copy_", "_to_copy"))
        if is_copy and isinstance(result, torch.Tensor):
            copies[model.current_epoch, result.numel()] += 1

    with Watch(count):
        fit(model, passes, SensitivityMonitor(), RiskMonitor(), max_epochs=3)
    assert copies[2, 2**14] == len(passes.epochs[-1]) and copies[2, 2**13] == 0
    assert copies[2, 2**18] == 2  # one for each monitor


# Of one batch there are 8 twins, one after another. Training samples are scored at once, beside clean outputs.
@pytest.mark.parametrize(("case", "limit"), [("sensitivity", 2.2), ("risk", 6.0)])
def test_at_the_peak_there_are_two_batches_of_outputs_and_six_for_the_risk(case: str, limit: float) -> None:
    data = [[torch.rand(512, NUM_FEATURES), torch.randint(2**11, (512,))]]
    row = BENCHMARK["memory"]("wide", case, nn.Linear(NUM_FEATURES, 2**11), data)[0]
    assert 1.0 < row["median"] < limit


def test_the_benchmark_compares_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BENCHMARK["main"](["--quick", "--only", "0", "--out", str(tmp_path / "metrics.csv")])
    rows = csv_rows(tmp_path)
    assert [row["case"] for row in rows] == ["sensitivity", "both"]
    text = capsys.readouterr().out
    for row in rows:
        ratio, wanted = float(row["median"]), float(row["wanted"].split()[1])
        assert ratio == pytest.approx(float(row["seconds"]) / float(row["beside"]), rel=0.02)
        assert row["met"] == ("yes" if ratio <= wanted else "no") or ratio == pytest.approx(wanted, rel=0.01)
        assert f"| MLP 784-128-128-10 | {row['case']} |" in text
