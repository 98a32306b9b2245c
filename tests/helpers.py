"""Models and data that the tests share."""

import csv
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from sklearn.linear_model import LinearRegression
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks import monitor as monitor_module
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference import learners
from lightning_sensitivity.running import noise_generator

monitor_module._FEW_SAMPLES = 0  # tests validate on few
NUM_FEATURES, NUM_CLASSES = 12, 4


def inputs(num_samples: int, seed: int = 0) -> Tensor:
    return torch.rand(num_samples, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))


def see(reader: BatchReader, model: nn.Module, batch: Any, rows: Any = None, size: int = 0) -> dict[str, Tensor]:
    """What a reference sees of a batch."""
    call = reader.call(model, batch)
    return reader.see(batch, call, size or call.size or len(call()), rows)


def module(forward: Any) -> Any:
    """A module with this forward, of a class of its own."""
    return type("Model", (nn.Module,), {"forward": forward})()


def labels(reader: BatchReader, model: nn.Module, batch: Any, output_shape: Any = None) -> Tensor:
    """The labels of a batch."""
    return reader.labels(batch, reader.call(model, batch), output_shape)


def labelled(num_samples: int, seed: int = 0) -> TensorDataset:
    x = inputs(num_samples, seed)
    return TensorDataset(x, x[:, :NUM_CLASSES].argmax(1))


def loader(num_samples: int = 50, batch_size: int = 16, seed: int = 0, **kwargs: Any) -> DataLoader:
    return DataLoader(labelled(num_samples, seed), batch_size, **kwargs)


def unlabelled_loader(num_samples: int = 50, batch_size: int = 16, seed: int = 0) -> DataLoader:
    return DataLoader(inputs(num_samples, seed), batch_size)


def first_tensor(batch: Any) -> Tensor:
    """The first one in tuples, lists and dicts."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def blind(batch: Any) -> Tensor:
    """Features that say nothing."""
    return torch.ones(len(first_tensor(batch)), 1)


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, num_samples: int = 50, has_labels: bool = False, seed: int = 0) -> None:
        self.samples = labelled(num_samples, seed) if has_labels else inputs(num_samples, seed)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Classifier(LightningModule):
    """A small network with dropout and batch norm, which eval mode and random streams matter to; they begin here."""

    lr = 1e-2

    def __init__(self, dropout: float = 0.2, seed: int = 0) -> None:
        seed_everything(seed, verbose=False)
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, NUM_CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not isinstance(batch, Tensor):
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Quiet(Classifier):
    """Its validation step makes no pass, whatever the batch is."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


class Filling(Quiet):
    """It fills in what is nan."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class Linear(Quiet):
    """A linear model: its sensitivity follows from its weights."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net, self.scale = nn.Linear(NUM_FEATURES, NUM_CLASSES), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x)


class Plateau(Linear):
    """Its rate falls by a schedule that monitors a value."""

    def __init__(self, monitor: str, mode: str, **options: Any) -> None:
        super().__init__()
        self.mode, self.options = mode, {"monitor": monitor, **options}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, self.mode, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **self.options}}


class Acting(Linear):
    """Its forward calls a function of the module, the inputs and the epoch in eval mode, where only our passes are."""

    def __init__(self, act: Callable[[Any, Tensor, int], Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.act(self, x, -1 if self.trainer.sanity_checking else self.current_epoch)
        return self.net(x)


def failing(error: Exception, when: Callable[[Tensor, int], bool] = lambda x, epoch: True) -> Acting:
    def act(model: Any, x: Tensor, epoch: int) -> None:
        if when(x, epoch):
            raise error

    return Acting(act)


@contextmanager
def small_forests() -> Iterator[pytest.MonkeyPatch]:
    """Learners that are fitted in a tenth of a second, inside."""
    sizes = {"_TREES": 20, "_MIN_TREES": 20, "_TREES_OF_PART": 5, "_OTHER_LEAVES": (), "_WIDTHS": (0.4,)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(learners, name, value)
        yield patch


def quick_estimator(task: str = "multiclass") -> Any:
    """A reference that is fitted in no time."""
    return {"regression": LinearRegression(), "multilabel": None}.get(task, GaussianNB())


def quick_risk(task: str = "multiclass", **options: Any) -> RiskMonitor:
    """A RiskMonitor with such a reference."""
    return RiskMonitor(task, **{"reference": quick_estimator(task), **options})


def trainer(callbacks: Any = (), kind: Any = Trainer, **kwargs: Any) -> Any:
    """A Trainer that is quiet and writes nothing, unless it is told to; its ``epochs`` are those of a history."""
    extras = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, **dict.fromkeys(extras, False)}
    others, history = [callbacks] if isinstance(callbacks, Callback) else callbacks, History()
    run = kind(callbacks=[*others, history], **{**defaults, **kwargs})
    run.epochs = history.epochs
    return run


def logged(run: Trainer, start: str = "") -> dict[str, float]:
    """What was logged last, of the names that start so."""
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith(start)}


def validated(callbacks: Any, model: LightningModule, loaders: Any, **kwargs: Any) -> dict[str, float]:
    """What one or several callbacks have logged in ``Trainer.validate``, and the module, too."""
    run = trainer(callbacks, **kwargs)
    run.validate(model, loaders, verbose=False)
    return logged(run)


def fitted(callbacks: Any, model: Any, train: Any = None, val: Any = None, **kwargs: Any) -> Trainer:
    """A Trainer after a fit, of ``loader()`` and other samples to validate on, if nothing else is said."""
    ckpt_path, run = kwargs.pop("ckpt_path", None), trainer(callbacks, **kwargs)
    train, val = loader() if train is None else train, loader(seed=1) if val is None else val
    run.fit(model, train, val, ckpt_path=ckpt_path)
    return run


def refused(callbacks: Any, model: Any, train: Any = None, *val: Any, match: str = "Monitor`", **kwargs: Any) -> str:
    """The error before the first step, of a fit of ``loader()`` if nothing else is said."""
    run = trainer(callbacks, **kwargs)
    with pytest.raises(MisconfigurationException, match=match) as caught:
        run.fit(model, train or loader(), *(val or [loader()]))
    assert run.global_step == 0
    return str(caught.value)


@contextmanager
def said() -> Iterator[list[str]]:
    """What monitors warn of inside; to be read after it."""
    texts = list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(each.message) for each in caught if "Monitor`" in str(each.message)]


def fitted_and_said(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """A Trainer after a fit, and what monitors warned of."""
    with said() as texts:
        run = fitted(*args, **kwargs)
    return run, texts


class Watch(TorchDispatchMode):
    """Calls ``seen(function, args, kwargs, result)`` for every operation of torch that is run inside."""

    def __init__(self, seen: Callable[[Any, Any, Any, Any], object]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen(function, args, kwargs or {}, result)
        return result


class History(Callback):
    """What ``callback_metrics`` held at the end of every validation, the sanity check aside."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.epochs.append(logged(trainer))


def csv_rows(log_dir: str | Path) -> list[dict[str, str]]:
    """What a CSVLogger wrote, a dict a row; a name that was not logged in a row is empty."""
    return list(csv.DictReader(Path(log_dir, "metrics.csv").read_text().splitlines()))


@torch.no_grad()
def brute_force(run: Any, batches: Any, num_draws: int = 1, seed: int = 0, rank: int = 0, loader: int = 0) -> Tensor:
    """By a plain loop, over batches by their index: a row of class-averaged changes for each sample, in eval mode."""
    rows = []
    for batch_idx, x in batches.items() if isinstance(batches, dict) else enumerate(batches):
        draws = []
        for draw in range(num_draws):
            generator = noise_generator(seed, rank, loader, batch_idx, draw)
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
            clean, noisy = run(x).double(), run((x + 0.1 * noise).to(x.dtype)).double()
            draws.append((noisy - clean).reshape(len(clean), clean.shape[1] if clean.ndim > 1 else 1, -1).mean(1))
        rows.append(torch.cat(draws, 1))
    return torch.cat(rows)


def run_processes(function: Callable[[int, Path], Any], folder: Path, count: int = 2) -> list[Any]:
    """Run ``function(rank, folder)`` in processes that Lightning takes as they are; what each left in a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Packages are imported once, by a process from which those that run are forked.
    multiprocessing.get_context("forkserver").set_forkserver_preload([function.__module__])
    options = {"nprocs": count, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(_run_process, args=(function, folder, port, count), **options)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(count)]


def _run_process(rank: int, function: Callable[[int, Path], Any], folder: Path, port: int, count: int) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(place) for name, place in places.items()}, NODE_RANK="0", GROUP_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests")
    torch.save(function(rank, folder), folder / f"rank_{rank}.pt")
    os._exit(0)  # at an ordinary end, gloo's threads now and then abort a process, or wait for another for ever
