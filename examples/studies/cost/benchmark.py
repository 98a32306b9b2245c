"""What do the monitors cost, and the fit of their reference?

    python examples/studies/cost/benchmark.py          # five minutes on one core; needs torchvision
    python examples/studies/cost/benchmark.py --quick  # shows that it runs; ignore its times

A validation: samples that it runs, and seconds beside those of an epoch of training. A fit: seconds, and how far memory
rises. A validation is measured in CPU time on one thread, a fit on two threads; data are random.
"""

import argparse
import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_sensitivity import Reference, RiskMonitor, SensitivityMonitor

MONITORS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "sensitivity": lambda: [SensitivityMonitor()],
    "risk": lambda: [RiskMonitor()],
    "both": lambda: [SensitivityMonitor(), RiskMonitor()],
}
RUN: list[int] = []  # samples of each pass; not in the module, where monitors would put it back
NUM_UNSEEN = 1200  # validation samples, of which a monitor keeps 600
Row = dict[str, object]
FITS = {
    "table, 1,000 rows": (1000, 20),
    "table, 20,000 rows": (20_000, 20),
    "1,500 features of an encoder, 1,280 each": (1500, 1280),
    "3,000 images": (3000, 3, 32, 32),
    "10,000 images": (10_000, 3, 32, 32),
}
FIT_THREADS = 2
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


# %% A validation
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 10))


def resnet() -> nn.Module:
    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # images are small: no stride here
    return net


class Net(LightningModule):
    """Notes how many samples it runs; its own validation runs none."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        RUN.append(len(x))
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Times(Callback):
    """CPU seconds of the batches of each epoch, of each validation, and the samples that it runs."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.validations: list[float] = []
        self.passes: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.process_time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.process_time() - self.start)
        RUN.clear()
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # after the validation
        self.validations.append(time.process_time() - self.start)
        self.passes.append(sum(RUN))


def validation(what: str, net: nn.Module, shape: tuple[int, ...], num_training: int, num_epochs: int) -> list[Row]:
    """Measure each case in turn; the first epoch, which also makes the reference, is left out."""
    torch.set_num_threads(1)
    sets = [TensorDataset(torch.randn(n, *shape), torch.randint(10, (n,))) for n in (num_training, NUM_UNSEEN)]
    loaders = [DataLoader(each, batch_size=50) for each in sets]
    rows, base, epoch = [], 0.0, 0.0
    for case, monitors in MONITORS.items():
        times = Times()  # its hooks run before those of the monitors
        options = {**QUIET, "max_epochs": num_epochs, "num_sanity_val_steps": 0, "accelerator": "cpu"}
        Trainer(callbacks=[times, *monitors()], **options).fit(Net(net), *loaders)
        if case == "none":
            base, epoch = median(times.validations[1:]), median(times.epochs[1:])
            continue
        row = {"what": what, "case": case, "passes": times.passes[-1], "seconds": median(times.validations[1:]) - base}
        rows.append({**row, "epoch_samples": num_training, "epoch_seconds": epoch})
    return rows


# %% A fit, in a process of its own, whose memory nothing else has raised
def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fit(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Return seconds on two threads, CPU seconds, and megabytes."""
    torch.set_num_threads(FIT_THREADS)
    x, new_x = torch.rand(*shape), torch.rand(600, *shape[1:])
    y = (x.flatten(1)[:, :10] + 0.5 * torch.rand(len(x), 10)).argmax(1)
    # what is done once in a process
    Reference("multiclass").fit(torch.rand(100, 5), y[:100]).predict_proba(torch.rand(10, 5))
    before, start, cpu = megabytes(), time.perf_counter(), time.process_time()
    Reference("multiclass").fit(x, y).predict_proba(new_x)
    return time.perf_counter() - start, time.process_time() - cpu, megabytes() - before


def fits(quick: bool) -> list[Row]:
    rows = []
    for case, shape in FITS.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append((case, *pool.submit(fit, (200, *shape[1:]) if quick else shape).result()))
    frame = pd.DataFrame(rows, columns=["case", "seconds", "cpu_seconds", "megabytes"])
    return frame.assign(what="a fit").to_dict("records")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time validations with monitors, and fits of the reference.")
    parser.add_argument("--quick", action="store_true", help="tiny")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes = [(700, 2)] * 2 if args.quick else [(2000, 6), (500, 2)]
    rows = validation("MLP on a table", mlp(), (20,), *sizes[0]) + validation(
        "small CNN", cnn(), (1, 28, 28), *sizes[0]
    )
    rows += fits(args.quick) + ([] if args.quick else validation("ResNet-18", resnet(), (3, 32, 32), *sizes[1]))
    out = Path("runs/cost.csv") if args.quick else Path(__file__).with_name("results.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = pd.DataFrame(rows).astype({"passes": "Int64", "epoch_samples": "Int64"})
    results.to_csv(out, index=False, float_format="%.3g")
    print(results.to_string())
