"""What the monitors cost, counted and never timed; examples/studies/cost has the times."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor, compat
from lightning_sensitivity.callbacks.base import Monitor
from tests.helpers import NUM_FEATURES, Quiet, Watch, csv_rows, labelled, trainer

NUM_BATCHES, BATCH_SIZE, NUM_MEASURED = 60, 100, 12  # of 6,000 samples, 1,200 are measured: every fifth batch
BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "examples/studies/cost/benchmark.py"))


class Overridden(Quiet):
    """Its `log` takes neither our values nor our options."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def log(self, name: str, value: float) -> None:
        raise AssertionError(f"{name} was logged by the user's `log`")


SENSITIVITY = [1200] * 2  # clean and noisy
# Of training samples; of validation samples: clean; by parts, normalized by the part: the model and a twin.
RISK = [500, 1200] + [150] * 16


@pytest.mark.parametrize(("kinds", "passes"), [
    ([SensitivityMonitor], SENSITIVITY),
    ([RiskMonitor], RISK),
    ([SensitivityMonitor, RiskMonitor], [1200, *RISK]),  # which share the clean pass
    ([RiskMonitor, SensitivityMonitor], [1200, *RISK]),
])  # fmt: skip
def test_a_validation_makes_joint_passes(kinds: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, names, is_measured = Overridden(), list[int](), list[str](), list[bool]()
    log, start = compat.log_metric, Monitor.on_validation_batch_start

    def noted(module: Any, name: str, *args: Any) -> None:
        names.append(name)
        log(module, name, *args)

    def watched(self: Monitor, *args: Any) -> None:
        operations = list[Any]()
        with Watch(lambda function, *_: operations.append(function)):
            start(self, *args)
        is_measured.append(bool(operations))

    monkeypatch.setattr(compat, "log_metric", noted)
    monkeypatch.setattr(Monitor, "on_validation_batch_start", watched)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    forget = Callback()  # so that in the end there is what has happened since the last validation began
    forget.on_validation_start = lambda *args: [each.clear() for each in (sizes, names, is_measured)]
    run = trainer(callbacks=[forget, *(kind() for kind in kinds)], num_sanity_val_steps=0)
    run.fit(model, *(DataLoader(labelled(n * BATCH_SIZE), BATCH_SIZE) for n in (6, NUM_BATCHES)))
    assert sorted(sizes) == sorted(passes) and names == [f"val_{name}" for kind in kinds for name in kind.names]
    # Every fifth batch is copied, and the last of these is measured with the others.
    assert is_measured[:: len(kinds)] == [index % 5 == 0 for index in range(NUM_BATCHES)]


# Of one batch there are 8 twins, one after another.
@pytest.mark.parametrize("case", ["sensitivity", "risk"])
def test_at_the_peak_there_are_two_batches_of_outputs_and_no_wide_copy(case: str) -> None:
    data = [[torch.rand(1024, NUM_FEATURES), torch.randint(2**13, (1024,))]]
    row = BENCHMARK["memory"]("wide", case, nn.Linear(NUM_FEATURES, 2**13), data)[0]
    assert 1.0 < row["median"] < 2.2


def test_the_benchmark_compares_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BENCHMARK["main"](["--quick", "--only", "0", "--out", str(tmp_path / "metrics.csv")])
    rows = csv_rows(tmp_path)
    assert [row["case"] for row in rows] == ["sensitivity", "both"]
    text = capsys.readouterr().out
    for row in rows:
        ratio = float(row["median"])
        assert ratio == pytest.approx(float(row["seconds"]) / float(row["beside"]), rel=0.02)
        wanted = float(row["wanted"].split()[1])
        assert row["met"] == ("yes" if ratio <= wanted else "no") or ratio == pytest.approx(wanted, rel=0.01)
        assert f"| MLP 784-128-128-10 | {row['case']} |" in text
