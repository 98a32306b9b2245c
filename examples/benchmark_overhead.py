# %% [markdown]
# # What does `SensitivityMonitor` cost?
#
# Time and memory of a validation epoch and of a whole fit with and without it, and beside two other ways to judge a
# model without labels: the loop of the paper's authors (two passes, then Python over samples and classes) and
# WeightWatcher's analysis of the weights. The data are random numbers in the shapes of MNIST and CIFAR-10: what is
# timed does not depend on their values.
#
#     pip install -e ".[paper,images]"  # without torchvision and WeightWatcher, what needs them is left out
#     python examples/benchmark_overhead.py          # about 22 minutes on two idle cores; a GPU is used if there is one
#     python examples/benchmark_overhead.py --quick  # tiny: shows that it runs, and times nothing worth reading
#
# Each round runs every case once, in turns forwards and backwards, and gives one ratio a case; the first round is
# thrown away. The table has the median of a case's ratios, the lowest and the highest one, the forward passes over each
# validation sample, and the MiB of the tensors that one validation batch made and had alive at once (weights, which
# were there before, not counted). Rows are written as they come, and a benchmark that was cut off goes on where it
# stopped.

# %%
from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_sensitivity import OutputSensitivity, SensitivityMonitor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COLUMNS = ["model", "samples", "measured", "case", "against", "ratio", "low", "high", "seconds", "against_seconds"]
COLUMNS += ["passes", "peak_mib", "syncs", "threads", "device"]


# %% Models
def fully_connected(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=10)


class Shape(NamedTuple):
    """A model and what it is run on.

    Where it is fewer than 10,000 samples, the monitor's `num_samples` (1,200 as a budget) and `num_training_samples`
    (500) are as much fewer.
    """

    net: Callable[[], nn.Module]
    image: tuple[int, ...]
    samples: int  # of validation
    batch_size: int
    fit: tuple[int, int, int, int]  # samples of training and validation, and their batch sizes
    analyzed: tuple[int, int] = (0, 0)  # samples and budget beside WeightWatcher
    epochs: int = 1
    scale: bool = True


def shapes(quick: bool) -> dict[str, Shape]:
    """A fit has five training samples for one of validation, as in the data sets; on a CPU, networks of images few."""
    mlp, digits = partial(fully_connected, 784, 512, 512, 10), partial(fully_connected, 64, 256, 256, 10)
    many = (10_000, 100, (50_000, 10_000, 100, 100), (10_000, 1200))
    few = many if CUDA else (2000, 20, (250, 50, 50, 2), (2000, 1200))  # 100 batches, too
    if quick:
        many, few = (1000, 40, (500, 100, 50, 4), (1000, 120)), (25, 1, (25, 25, 25, 1), (25, 3))
    return {
        "mlp": Shape(mlp, (1, 28, 28), *many),
        "resnet": Shape(resnet, (3, 32, 32), *few),
        "vit": Shape(vit, (3, 32, 32), *few),
        # README's example, with its logger
        "digits": Shape(digits, (1, 8, 8), 0, 0, (500, 1297, 50, 500), epochs=2 if quick else 20, scale=False),
    }


class Net(LightningModule):
    def __init__(self, net: nn.Module, trains: bool, calls_itself: bool) -> None:
        super().__init__()
        self.net, self.trains, self.calls_itself = net, trains, calls_itself
        self.samples_run = 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples_run += len(x)
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return cross_entropy(self(batch[0]), batch[1]) if self.trains else None

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.calls_itself:
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


# %% What is in the Trainer
class OneForwardMore(Callback):
    """The least that a clean and a noisy pass can cost beside a validation: one forward pass, and maybe its noise."""

    def __init__(self, noise_std: float) -> None:
        self.noise_std = noise_std

    @torch.no_grad()
    def on_validation_batch_end(self, trainer: Trainer, pl_module: Net, outputs: Any, batch: Any, *_: Any) -> None:
        x = batch[0]
        pl_module(x + self.noise_std * torch.randn_like(x) if self.noise_std else x)


# Options of the monitor; task=None leaves the risk estimate out, and `budget` stands for `num_samples`.
PLAIN, FORWARD, NOISY_FORWARD = "without", "one forward more", "one noisy forward more"
CASES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    FORWARD: {},
    NOISY_FORWARD: {},
    "1 draw": {"task": None},
    "4 draws": {"task": None, "num_draws": 4},
    "1 draw, budget": {"task": None, "budget": True},
    "4 draws, budget": {"task": None, "num_draws": 4, "budget": True},
    "gradient": {"task": None, "method": "gradient"},
    "with risk": {},
    "with risk, budget": {"budget": True},
}
FIT_CASES = [case for case in CASES if case not in (FORWARD, NOISY_FORWARD, "gradient")]


def monitor(case: str | dict[str, Any], num_samples: int, num_training_samples: int) -> list[Callback]:
    if case == PLAIN:
        return []
    if case in (FORWARD, NOISY_FORWARD):
        return [OneForwardMore(0.1 * (case == NOISY_FORWARD))]
    options = dict(CASES[case] if isinstance(case, str) else case)
    options["num_samples"] = num_samples if options.pop("budget", False) else None
    return [SensitivityMonitor(**{"task": "multiclass", "num_training_samples": num_training_samples} | options)]


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class SyncedProfiler(SimpleProfiler):
    """Attributes to each hook what it has started on a GPU, too."""

    def stop(self, action_name: str) -> None:
        now()
        super().stop(action_name)


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and alive, without what an operation needs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for storage in self.storages(result) - given:  # neither a view nor in place
            if storage not in self.made:
                self.made.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def storages(self, tree: Any) -> set[Any]:
        return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}

    def add(self, num_bytes: int) -> None:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Gives a list that gets the most MiB that were alive, of tensors that were made inside."""
    peak: list[float] = []
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        with AliveBytes() as counter:
            yield peak
        peak.append(counter.peak / 2**20)


@contextlib.contextmanager
def host_syncs() -> Iterator[list[float]]:
    """Gives a list that gets how often the host waited for the GPU."""
    syncs: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield syncs
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))


class Watch(Callback):
    """Stands first in the Trainer, so that what it sees of a validation holds what the monitor does."""

    def __init__(self, context: Callable[[], Any] = contextlib.nullcontext) -> None:
        self.context, self.seconds = context, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: Net) -> None:
        pl_module.samples_run = 0
        self.stack = contextlib.ExitStack()
        self.seen = self.stack.enter_context(self.context())
        self.start = now()

    def on_validation_end(self, trainer: Trainer, pl_module: Net) -> None:
        self.seconds += now() - self.start
        self.stack.close()


# %% One run
class Timing(NamedTuple):
    epoch: float  # seconds of validation
    fit: float  # of everything
    monitor: float  # in the monitor's own hooks of validation; 0 without `profile=True`
    passes: float  # forward passes of a sample in an epoch, over the samples
    seen: list[float]  # what `context` gave


@cache
def images(shape: tuple[int, ...], num_samples: int) -> TensorDataset:
    return TensorDataset(torch.rand(num_samples, *shape), torch.randint(10, (num_samples,)))


def loader(shape: Shape, num_samples: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(images(shape.image, num_samples), batch_size=batch_size)


def run(
    shape: Shape,
    case: str | dict[str, Any],
    *,
    whole: bool = False,
    samples: int | None = None,
    budget: int | None = None,
    calls_itself: bool = True,
    profile: bool = False,
    context: Callable[[], Any] = contextlib.nullcontext,
    num_batches: int | None = None,
) -> Timing:
    """A fit: whole, or of a model that does not learn, for the sake of the validation at its end."""
    num_training, num_validation, training_batch, batch_size = shape.fit
    if not whole:
        num_validation, batch_size = samples or shape.samples, shape.batch_size
    kept = max(1, num_validation // 20) if shape.scale else 500
    budget = budget or (12 * num_validation // 100 if shape.scale else 1200)
    if not whole:
        num_training, training_batch = kept, min(kept, 100)
    watch = Watch(context)
    profiler = SyncedProfiler() if profile else None
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=shape.epochs,
            accelerator="gpu" if CUDA else "cpu",
            devices=1,
            callbacks=[watch, *monitor(case, budget, kept)],
            logger=TensorBoardLogger(folder) if whole else False,
            profiler=profiler,
            limit_val_batches=num_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        model = Net(shape.net(), whole, calls_itself)
        loaders = loader(shape, num_training, training_batch), loader(shape, num_validation, batch_size)
        start = now()
        trainer.fit(model, *loaders)
        seconds = now() - start
    durations = profiler.recorded_durations.items() if profiler else ()
    own = sum(sum(times) for name, times in durations if "]SensitivityMonitor" in name and ".on_validation" in name)
    return Timing(watch.seconds, seconds, own, model.samples_run / num_validation, watch.seen or [])


# %% Two other ways
@torch.no_grad()
def authors_loop(model: nn.Module, batches: Iterable[Any]) -> float:
    """As in github.com/mahf93/sensitivity, written afresh: a clean and a noisy pass, then sample by sample."""
    model.eval()
    changes = []
    for x, _ in batches:
        x = x.to(DEVICE)
        difference = (model(x + 0.1 * torch.randn_like(x)) - model(x)).cpu().numpy()
        for sample in range(len(difference)):
            total = 0
            for output in range(difference.shape[1]):
                total += difference[sample][output]
            changes.append(total / difference.shape[1])
    return np.var(changes)


@torch.no_grad()
def metric_loop(model: nn.Module, batches: Iterable[Any]) -> float:
    """The same passes, with the package's metric and without a Trainer."""
    model.eval()
    metric = OutputSensitivity().to(DEVICE)
    for x, _ in batches:
        x = x.to(DEVICE)
        metric.update(model(x), model(x + 0.1 * torch.randn_like(x)))
    return float(metric.compute())


def analyze(net: nn.Module, num_threads: int) -> None:
    from threadpoolctl import threadpool_limits

    with contextlib.redirect_stdout(io.StringIO()), threadpool_limits(num_threads):
        import weightwatcher

        weightwatcher.WeightWatcher(model=net, log_level="ERROR").analyze()


def timed(function: Callable[[], Any]) -> float:
    start = now()
    function()
    return now() - start


# %% Groups of rows
Row = dict[str, Any]


def rounds(runs: dict[str, Callable[[], Any]], repeats: int, label: str) -> dict[str, list[Any]]:
    """What each run gave in each round, but for the first one of several."""
    results: dict[str, list[Any]] = {name: [] for name in runs}
    for index in tqdm(range(repeats + (repeats > 1)), desc=label, leave=False):
        for name in list(runs)[:: -1 if index % 2 else 1]:
            results[name].append(runs[name]())
    return {name: values[-repeats:] for name, values in results.items()}


def row(case: str, seconds: Sequence[float], against: str, others: Sequence[float], **rest: Any) -> Row:
    ratios = [a / b for a, b in zip(seconds, others, strict=True)]
    spread = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    medians = {"seconds": median(seconds), "against_seconds": median(others)}
    return {"case": case, "against": against, **spread, **medians, **rest}


def validation_epoch(shape: Shape, repeats: int, label: str) -> list[Row]:
    timings = rounds({case: partial(run, shape, case) for case in CASES}, repeats, label)
    seconds = {case: [timing.epoch for timing in values] for case, values in timings.items()}
    rows = []
    for case in CASES:
        peak = run(shape, case, num_batches=1, context=peak_memory).seen[0]
        rest: Row = {"passes": timings[case][0].passes, "peak_mib": peak}
        if CUDA:  # of a batch, without what an epoch costs: the difference of two epochs
            few, many = (run(shape, case, num_batches=n, context=host_syncs).seen[0] for n in (4, 8))
            rest["syncs"] = (many - few) / 4
        rows.append(row(case, seconds[case], PLAIN, seconds[PLAIN], **rest))
    least = (FORWARD, NOISY_FORWARD)
    return rows + [row("1 draw", seconds["1 draw"], other, seconds[other]) for other in least]


def whole_fit(shape: Shape, repeats: int, label: str) -> list[Row]:
    timings = rounds({case: partial(run, shape, case, whole=True) for case in FIT_CASES}, repeats, label)
    seconds = {case: [timing.fit for timing in values] for case, values in timings.items()}
    return [row(case, seconds[case], PLAIN, seconds[PLAIN], passes=timings[case][0].passes) for case in FIT_CASES]


def growth(shape: Shape, repeats: int, label: str) -> list[Row]:
    """In the monitor's own hooks: more draws on the same samples, and more samples under the same budget."""
    draws = {f"{n} draws": partial(run, shape, {"task": None, "num_draws": n}, profile=True) for n in (1, 2, 4, 8)}
    sizes = [shape.samples // 4 * factor for factor in (1, 2, 4, 8, 16)]
    budget = {"task": None, "budget": True}
    same = partial(run, shape, budget, profile=True, budget=12 * shape.samples // 100)
    samples = {f"budget, {size} samples": partial(same, samples=size) for size in sizes}
    rows = []
    for runs in (draws, samples):
        timings = rounds(runs, repeats, label)
        first, *_ = runs
        for case, values in timings.items():
            seconds = [[timing.monitor for timing in timings[name]] for name in (case, first)]
            rows.append(row(case, seconds[0], first, seconds[1], passes=values[0].passes))
    return rows


def ours(shape: Shape, budget: bool, samples: int | None = None, num_samples: int | None = None) -> dict[str, Any]:
    """An epoch in which the monitor makes all passes, and what its hooks add to one whose outputs it reuses."""
    common = partial(run, shape, {"task": None, "budget": budget}, samples=samples, budget=num_samples)
    name = "1 draw, budget" if budget else "1 draw"
    return {
        f"{name}, alone": lambda: common(calls_itself=False).epoch,
        f"{name}, reuse": lambda: common(profile=True).monitor,
    }


def authors(shape: Shape, repeats: int, label: str) -> list[Row]:
    """How many times as long the authors' loop takes."""
    model, batches = shape.net().to(DEVICE), loader(shape, shape.samples, shape.batch_size)
    runs: dict[str, Callable[[], float]] = {
        label: lambda: timed(lambda: authors_loop(model, batches)),
        "the metric in a loop": lambda: timed(lambda: metric_loop(model, batches)),
    }
    runs |= ours(shape, False) | ours(shape, True)
    seconds = rounds(runs, repeats, label)
    with peak_memory() as peak:
        authors_loop(model, [next(iter(batches))])
    theirs = seconds.pop(label)
    return [row("authors' loop", theirs, case, mine, passes=2, peak_mib=peak[0]) for case, mine in seconds.items()]


def weightwatcher(shape: Shape, repeats: int, label: str) -> list[Row]:
    """How many times as long WeightWatcher takes, on as many threads: OpenBLAS's own choice can be far slower."""
    net, threads = shape.net(), torch.get_num_threads()
    analyze(nn.Sequential(nn.Linear(64, 64)), threads)  # the first one loads what it needs
    runs = {label: lambda: timed(lambda: analyze(net, threads))} | ours(shape, True, *shape.analyzed)
    seconds = rounds(runs, repeats, label)
    tracemalloc.start()  # sees NumPy's arrays, and slows everything
    analyze(net, threads)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    theirs = seconds.pop(label)
    return [row("WeightWatcher", theirs, case, mine, passes=0, peak_mib=peak) for case, mine in seconds.items()]


GROUPS: dict[str, tuple[Callable[[Shape, int, str], list[Row]], list[str]]] = {
    "validation epoch": (validation_epoch, ["mlp", "resnet", "vit"]),
    "whole fit": (whole_fit, ["mlp", "resnet", "vit", "digits"]),
    "growth": (growth, ["mlp"]),
    "authors' loop": (authors, ["mlp"]),
    "WeightWatcher": (weightwatcher, ["mlp", "resnet", "vit"]),
}


# %% Files and the table
def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(
            {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def table(rows: list[dict[str, str]]) -> str:
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    names = list(shapes(quick=True))
    parser = argparse.ArgumentParser(description="Time SensitivityMonitor against a Trainer without it, and others.")
    parser.add_argument("--quick", action="store_true", help="few samples: under a minute")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which models")
    parser.add_argument(
        "--repeats", type=int, help="rounds; 5, for a whole fit 3, for image networks on a CPU 2; --quick: 1"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1, so that figures are stable")
    parser.add_argument("--out", type=Path, help="the CSV file; runs/benchmark_overhead[_quick].csv")
    args = parser.parse_args()
    out = args.out or Path(f"runs/benchmark_overhead{'_quick' if args.quick else ''}.csv")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings(
        "ignore", ".*(many workers|logging interval|returned `None`|LeafSpec|a single output change).*"
    )
    for package in ("lightning.pytorch", "weightwatcher"):
        logging.getLogger(package).setLevel(logging.ERROR)

    device = torch.cuda.get_device_name() if CUDA else "cpu"
    for measured, (group, models) in GROUPS.items():
        for model in (name for name in models if name in args.only):
            shape, label = shapes(args.quick)[model], f"{model}, {measured}"
            needs = {"torchvision"} if model in ("resnet", "vit") else set()
            needs |= {"weightwatcher"} if measured == "WeightWatcher" else set()
            missing = sorted(name for name in needs if find_spec(name) is None)
            key = {
                "model": model,
                "samples": str(shape.samples or shape.fit[1]),
                "measured": measured,
                "device": device,
                "threads": str(args.threads),
            }
            if missing:
                print(f"{label}: left out, {' and '.join(missing)} not installed", flush=True)
            elif any(key.items() <= done.items() for done in read(out)):
                print(f"{label}: already in {out}", flush=True)
            else:
                is_slow = model in ("resnet", "vit") and not CUDA
                repeats = args.repeats or (1 if args.quick else 2 if is_slow else 3 if measured == "whole fit" else 5)
                started = time.perf_counter()
                append(out, [key | row for row in group(shape, repeats, label)])
                print(f"{label}: {time.perf_counter() - started:.0f} seconds", flush=True)
    print(f"\n{table(read(out))}\n\nThe table is in {out}.")


if __name__ == "__main__":
    main()
