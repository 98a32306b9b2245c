"""What the monitors log is read back from what each logger wrote."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, History, csv_rows, fitted, loader

Curves = dict[str, dict[int, float]]  # by name, and then by step


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def read_tensorboard(logger: Logger, folder: Path) -> Curves:
    read = events(folder / "tensorboard")
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def read_csv(logger: Logger, folder: Path) -> Curves:
    curves: Curves = {}
    for row in csv_rows(folder / "csv"):
        for name, value in row.items():
            if value and name != "step":
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def read_mlflow(logger: Logger, folder: Path) -> Curves:
    client, run_id = logger.experiment, logger.version
    names = client.get_run(run_id).data.metrics
    return {name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)} for name in names}


# Of each kind of logger, how it is made and how it is read.
KINDS: dict[str, tuple[Callable[[Path], Logger], Callable[[Logger, Path], Curves]]] = {
    "tensorboard": (lambda folder: TensorBoardLogger(folder, "tensorboard", ""), read_tensorboard),
    "csv": (lambda folder: CSVLogger(folder, "csv", ""), read_csv),
    "mlflow": (lambda folder: MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()), read_mlflow),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_epoch_arrives_on_the_axis_of_the_loss(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "mlflow":  # which asks nobody, and leaves nothing outside of `tmp_path`
        pytest.importorskip("mlflow")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.13 on; a database needs all of mlflow
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the logger sets it
    make, read = KINDS[kind]
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="val/of/"), RiskMonitor()]
    callbacks, logger, val = [*monitors, history := History()], make(tmp_path), [loader(seed=1), loader(20, seed=2)]
    fitted(callbacks, Classifier(), val=val, logger=logger, log_every_n_steps=1)
    names = {name for name in history.epochs[0] if name.startswith("val")}
    assert len(names) == 2 * (1 + 2 + 2 + len(RiskMonitor.names))
    assert {"val/of/output_sensitivity/dataloader_idx_1", "val_risk_estimate/dataloader_idx_0"} <= names
    store = np.float32 if kind == "tensorboard" else float
    curves = {name: curve for name, curve in read(logger, tmp_path).items() if name.startswith("val")}
    steps = [(step, values) for step, values in zip((3, 7), history.epochs, strict=True)]
    assert curves == {name: {step: float(store(values[name])) for step, values in steps} for name in names}
