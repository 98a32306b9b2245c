"""What the monitors log is read back from what each logger wrote."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.callbacks.closing import log_summary
from tests.helpers import Classifier, csv_rows, fitted, loader, quick_risk, unlabelled_loader

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


class WithHyperparameters(Classifier):
    """A module that has logged its hyperparameters before a fit begins."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()


class WandbLogger(CSVLogger):
    """What of the logger of this name is used."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.summary: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        return self


def test_every_logger_gets_the_summary_in_the_first_process(tmp_path: Path) -> None:
    loggers: list[Any] = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="events")]
    monitor, val = quick_risk(prefix="b/"), unlabelled_loader(seed=1)
    fitted(monitor, WithHyperparameters(), val=val, logger=loggers, log_every_n_steps=1)
    written = yaml.safe_load(Path(loggers[0].log_dir, "hparams.yaml").read_text())
    assert written.pop("width") == 16 and str(written) == str({f"b/{k}": v for k, v in sorted(monitor.summary.items())})
    loggers[1].finalize("success")
    (event,) = EventAccumulator(loggers[1].log_dir).Reload().Tensors("b/summary/text_summary")
    assert f"| skill | {monitor.summary['skill']} |" in event.tensor_proto.string_val[0].decode()
    wandb = WandbLogger(tmp_path)
    for is_global_zero in (False, True):
        assert wandb.summary == {}
        log_summary(SimpleNamespace(loggers=[wandb], is_global_zero=is_global_zero), "b/", monitor.summary)
    assert wandb.summary["b/epoch"] == monitor.summary["epoch"]
