"""What the monitor logs is read back from what each logger wrote."""

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.readings import NAMES
from tests.helpers import Classifier, csv_rows, loader, trainer

Curves = dict[str, dict[int, float]]  # by name, and then by step


def read_tensorboard(logger: Logger, folder: Path) -> Curves:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def read_csv(logger: Logger, folder: Path) -> Curves:
    curves: Curves = {}
    for row in csv_rows(folder / "csv"):
        for name, value in row.items():
            if value and name != "step":
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def read_wandb(logger: Logger, folder: Path) -> Curves:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    wandb.teardown()  # waits for the process that writes the file
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    curves: Curves = {}
    for serialized in leveldb_log(path.read_bytes()):
        values = {}
        for item in Record.FromString(serialized).history.item:
            (name,) = item.nested_key or [item.key]  # a path of one element: no name may be taken apart
            values[name] = float(item.value_json)
        for name, value in values.items():
            curves.setdefault(name, {})[int(values["trainer/global_step"])] = value
    return curves


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log, in blocks of 32 KiB, with a header in the first."""
    position, record = 7, b""
    assert content[:position] == b":W&B\xe1\xbe\x00"
    while position < len(content):
        left = -position % 2**15 or 2**15
        if left < 7:  # too short for a record's header: padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # the whole of a record, or the last part of it
            yield record
            record = b""


def read_mlflow(logger: Logger, folder: Path) -> Curves:
    client, run_id = logger.experiment, logger.version
    names = client.get_run(run_id).data.metrics
    return {name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)} for name in names}


class Kind(NamedTuple):
    make: Callable[[Path], Logger]
    read: Callable[[Logger, Path], Curves]


KINDS = {
    "tensorboard": Kind(lambda folder: TensorBoardLogger(folder, "tensorboard", ""), read_tensorboard),
    "csv": Kind(lambda folder: CSVLogger(folder, "csv", ""), read_csv),
    "wandb": Kind(lambda folder: WandbLogger(save_dir=folder, offline=True), read_wandb),
    "mlflow": Kind(lambda folder: MLFlowLogger(tracking_uri=(folder / "mlflow").as_uri()), read_mlflow),
}
each = pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), [*KINDS]], ids=[*KINDS, "all"])


class Loggers:
    """Loggers of some kinds, and what they have written."""

    def __init__(self, kinds: list[str], folder: Path) -> None:
        self.folder = folder
        self.loggers = {kind: KINDS[kind].make(folder) for kind in kinds}

    def read(self) -> dict[str, Curves]:
        return {kind: KINDS[kind].read(logger, self.folder) for kind, logger in self.loggers.items()}


@pytest.fixture
def loggers(kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loggers]:
    """Loggers that ask nobody, and leave nothing outside of ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    if "wandb" in kinds:
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_CONSOLE", "off")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        wandb = pytest.importorskip("wandb")
    if "mlflow" in kinds:
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.13 on; a database needs all of mlflow
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the logger sets it
        mlflow = pytest.importorskip("mlflow")
    yield Loggers(kinds, tmp_path)
    if "wandb" in kinds:
        wandb.finish()
        wandb.teardown()
    if "mlflow" in kinds:
        mlflow.set_tracking_uri("")


class Recorder(Callback):
    """What a callback sees at the end of every validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def stored(kind: str, value: float) -> float:
    return float(np.float32(value)) if kind == "tensorboard" else value


@each
@pytest.mark.parametrize("prefix", ["val_", "val/"])
def test_every_value_of_every_epoch_arrives(loggers: Loggers, prefix: str) -> None:
    seed_everything(0, verbose=False)
    model, loaders = Classifier(), [loader(seed=1), loader(seed=2)]
    untrained = trainer(callbacks=[SensitivityMonitor(prefix=prefix)])
    untrained.validate(copy.deepcopy(model), loaders, verbose=False)

    monitor, recorder = SensitivityMonitor(prefix=prefix, before_training=True), Recorder()
    fit = trainer(callbacks=[monitor, recorder], logger=[*loggers.loggers.values()], log_every_n_steps=1)
    fit.fit(model, loader(), loaders)

    names = [f"{prefix}{name}/dataloader_idx_{idx}" for name in NAMES for idx in range(len(loaders))]
    expected = {name: {3: recorder.seen[0][name], 7: recorder.seen[1][name]} for name in names}
    for name, curve in expected.items():
        if "risk_" not in name:  # of which an untrained network has none
            curve[0] = untrained.callback_metrics[name].item()
    for kind, curves in loggers.read().items():
        losses = [curves.pop(f"val_loss/dataloader_idx_{idx}") for idx in range(len(loaders))]
        assert [list(loss) for loss in losses] == [[3, 7], [3, 7]]  # on the same axis
        assert {name: curve for name, curve in curves.items() if name.startswith(prefix)} == {
            name: {step: stored(kind, value) for step, value in curve.items()} for name, curve in expected.items()
        }


@each
def test_names_of_layers_are_legal(loggers: Loggers) -> None:
    """A layer's name has dots, and may be the beginning of another's."""
    layers = ["net", "net.0", "net.4"]
    monitor, recorder = SensitivityMonitor(at=layers, prefix="val/of/", task=None), Recorder()
    run = trainer(callbacks=[monitor, recorder], logger=[*loggers.loggers.values()], log_every_n_steps=1)
    run.fit(Classifier(), loader(), [loader(), loader(20)])
    names = {f"val/of/sensitivity/{layer}/dataloader_idx_{idx}" for layer in layers for idx in range(2)}
    for kind, curves in loggers.read().items():
        for name in names:
            expected = zip((3, 7), recorder.seen, strict=True)
            assert curves[name] == {step: stored(kind, values[name]) for step, values in expected}
