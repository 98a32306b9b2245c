"""What the monitors log is read back from what each logger wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, csv_rows, fitted, loader, quick_risk

Curves = dict[str, dict[int, float]]  # by name, and then by step


def read_tensorboard(folder: Path) -> Curves:
    read = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def read_csv(folder: Path) -> Curves:
    curves: Curves = {}
    for row in csv_rows(folder):
        for name, value in row.items():
            if value and name != "step":
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


@pytest.mark.parametrize(("kind", "read"), [(TensorBoardLogger, read_tensorboard), (CSVLogger, read_csv)])
def test_every_value_of_every_epoch_arrives_on_the_axis_of_the_loss(kind: Any, read: Any, tmp_path: Path) -> None:
    monitors = [SensitivityMonitor(loss_estimate=True), SensitivityMonitor(at="net.0", prefix="val/of/"), quick_risk()]
    val, options = [loader(seed=1), loader(20, seed=2)], {"logger": kind(tmp_path, name="", version="")}
    epochs = fitted(monitors, Classifier(), val=val, log_every_n_steps=1, **options).epochs
    names = {name for name in epochs[0] if name.startswith("val")}
    ours = [*monitors[0].names, *monitors[2].names]
    each = {"val_loss", *(f"val/{name}" for name in ours), *(f"val/of/{name}" for name in monitors[1].names)}
    assert names == {f"{name}/dataloader_idx_{index}" for name in each for index in (0, 1)}
    store = np.float32 if kind is TensorBoardLogger else float
    curves = {name: curve for name, curve in read(tmp_path).items() if name.startswith("val")}
    steps = [(step, values) for step, values in zip((3, 7), epochs, strict=True)]
    assert curves == {name: {step: float(store(values[name])) for step, values in steps} for name in names}
