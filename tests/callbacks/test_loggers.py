"""What the monitors log is read back from what each logger wrote."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
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


def records(data: bytes) -> Iterator[bytes]:
    """Read a file of W&B: LevelDB's log format after a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        rest = 2**15 - position % 2**15  # of the block; no header is split
        if rest < 7:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # full, or last; and written to its end
            yield record
            record = b""


def read_wandb(logger: Logger, folder: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    logger.experiment.finish()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found, deadline = list[Record](), time.monotonic() + 30
    while not any(record.HasField("exit") for record in found):  # another process of W&B writes after `finish`
        assert time.monotonic() < deadline
        time.sleep(0.02)
        found = [Record.FromString(data) for data in records(path.read_bytes())]
    curves: Curves = {}
    for record in found:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            curves.setdefault(name, {})[row["trainer/global_step"]] = value
    return curves


# Of each kind of logger, how it is made and how it is read.
KINDS: dict[str, tuple[Callable[[Path], Logger], Callable[[Logger, Path], Curves]]] = {
    "tensorboard": (lambda folder: TensorBoardLogger(folder, "tensorboard", ""), read_tensorboard),
    "csv": (lambda folder: CSVLogger(folder, "csv", ""), read_csv),
    "mlflow": (lambda folder: MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()), read_mlflow),
    "wandb": (lambda folder: WandbLogger(save_dir=folder, offline=True), read_wandb),
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
    if kind == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("CACHE", "CONFIG", "DATA"):
            monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path))
    make, read = KINDS[kind]
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="val/of/"), RiskMonitor()]
    callbacks, logger, val = [*monitors, history := History()], make(tmp_path), [loader(seed=1), loader(20, seed=2)]
    fitted(callbacks, Classifier(), val=val, logger=logger, log_every_n_steps=1)
    names = {name for name in history.epochs[0] if name.startswith("val")}
    ours = [*SensitivityMonitor.names, *RiskMonitor.names, "risk_reference", "risk_reference_weight"]
    each = {"val_loss", *(f"val_{name}" for name in ours), *(f"val/of/{name}" for name in SensitivityMonitor.names)}
    assert names == {f"{name}/dataloader_idx_{index}" for name in each for index in (0, 1)}
    store = np.float32 if kind == "tensorboard" else float
    curves = {name: curve for name, curve in read(logger, tmp_path).items() if name.startswith("val")}
    steps = [(step, values) for step, values in zip((3, 7), history.epochs, strict=True)]
    assert curves == {name: {step: float(store(values[name])) for step, values in steps} for name in names}
