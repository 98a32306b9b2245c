# %% [markdown]
# # What do the monitors cost?
#
# The time of `SensitivityMonitor` and `RiskMonitor` with their defaults, beside the bare passes of the model
# in a plain loop, and beside a Trainer without them. README.md in this folder says what came out.
#
#     python examples/studies/cost/benchmark.py          # ten minutes on one core; needs torchvision
#     python examples/studies/cost/benchmark.py --quick  # a minute: shows that it runs; ignore its times
#
# All runs of a comparison take turns, forwards and backwards, in one process on one thread, after a first turn that is
# thrown away. A figure is the median over the turns, with the lowest and the highest one. Seconds are CPU time of the
# process: others may keep the cores busy. Data are random numbers.

# %%
from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.functional import fit_reference
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.twins import batch_statistics, has_batch_norm

COLUMNS = ["what", "case", "figure", "wanted", "met", "median", "lowest", "highest", "seconds", "beside"]
Batches = list[list[Tensor]]
Row = dict[str, Any]
RunOfCase = Callable[[str], float]  # seconds of a run with the monitors of a case


# %% Models and data
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 49, 10))


class Buffered(nn.Linear):
    """A layer with 32 MB of buffers."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.register_buffer("memory", torch.zeros(2**23))


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=10)


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 21, 3, padding=1))


class ClassesFirst(nn.Linear):
    """The head of a language model, (N, T, 64) -> (N, K, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(-1, 1)


class Net(LightningModule):
    def __init__(self, net: nn.Module, has_step: bool) -> None:
        super().__init__()
        self.net, self.has_step = net, has_step

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.has_step:
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(count: int, x: tuple[int, ...], y: tuple[int, ...] = (), num_classes: int = 10) -> Batches:
    """Batches of (N, ...), with labels (N, ...)."""
    return [[torch.rand(x), torch.randint(num_classes, x[:1] + y)] for _ in range(count)]


# %% Running and measuring
def trainer(case: str, max_epochs: int) -> Trainer:
    kinds: dict[str, list[Any]] = {"none": [], "sensitivity": [SensitivityMonitor], "risk": [RiskMonitor]}
    kinds["both"] = kinds["sensitivity"] + kinds["risk"]
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    off |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", max_epochs=max_epochs, callbacks=[kind() for kind in kinds[case]], **off)


class Seconds:
    """Measures the CPU time inside."""

    def __enter__(self) -> Seconds:
        self.value = -time.process_time()
        return self

    def __exit__(self, *args: object) -> None:
        self.value += time.process_time()


def seconds_of_epoch(case: str, model: Net, training: Batches, data: Batches) -> float:
    """The second validation of a fit of two epochs; in the first one, monitors keep their samples."""
    run, seconds = trainer(case, max_epochs=2), Seconds()
    loop = run.fit_loop.epoch_loop.val_loop
    validate = loop.run

    def validate_inside() -> Any:
        with seconds if run.current_epoch else nullcontext():
            return validate()

    loop.run = validate_inside  # type: ignore[method-assign]
    run.fit(model, *(DataLoader(part, batch_size=None) for part in (training, data)))  # type: ignore[arg-type]
    return seconds.value


def seconds_of_fit(
    case: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    batch_size: int = 100,
    has_step: bool = True,
    num_epochs: int = 20,
) -> float:
    """A fit of 20 epochs, over which the one solve of the reference is spread."""
    sets = [TensorDataset(torch.rand(size, *shape), torch.randint(10, (size,))) for size in sizes]
    model, run = Net(make(), has_step), trainer(case, max_epochs=num_epochs)
    with Seconds() as seconds:
        run.fit(model, *(DataLoader(data, batch_size=batch_size) for data in sets))
    return seconds.value


def seconds_of_passes(case: str, net: nn.Module, training: Batches, data: Batches) -> float:
    """The passes of the monitors of a case on four batches or more, and the noise that they draw, in a plain loop."""
    net.eval()
    num_passes = 1 + has_batch_norm(net)  # False inside `batch_statistics`
    with torch.no_grad(), Seconds() as seconds:
        if case in ("sensitivity", "both"):
            for x, _ in data:
                net(x)
                net(x + 0.1 * torch.randn_like(x))
        if case in ("risk", "both"):
            for x, _ in training:
                net(x)
            for x, _ in data:
                net(x)
                with batch_statistics(net):
                    for _ in range(num_passes):
                        net(x)
    return seconds.value


# %% What is compared
def row(what: str, case: str, figure: str, wanted: float, numbers: dict[str, Any]) -> Row:
    met = "" if not wanted else "yes" if numbers["median"] <= wanted else "no"
    return {
        "what": what,
        "case": case,
        "figure": figure,
        "wanted": f"≤ {wanted}" if wanted else "",
        "met": met,
    } | numbers


def compare(
    what: str, figure: str, wanted: dict[str, float], run: RunOfCase, turns: int, beside: RunOfCase | None = None
) -> list[Row]:
    """Each case over none; or what it adds to none, over what stands beside."""
    runs = {case: partial(run, case) for case in ("none", *wanted)}
    runs |= {f"beside {case}": partial(beside, case) for case in wanted} if beside else {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(runs[name]())
    times, rows = {name: torch.tensor(values[1:]) for name, values in seconds.items()}, []
    for case, limit in wanted.items():
        ours, other = times[case], times["none"]
        if beside:
            ours, other = ours - other, times[f"beside {case}"]
        ratio = ours / other
        numbers = {"median": ratio.quantile(0.5), "lowest": ratio.min(), "highest": ratio.max()}
        numbers |= {"seconds": ours.quantile(0.5), "beside": other.quantile(0.5)}
        rows.append(row(what, case, figure, limit, {name: float(value) for name, value in numbers.items()}))
    return rows


def added(
    what: str, net: nn.Module, training: Batches, data: Batches, wanted: dict[str, float], turns: int
) -> list[Row]:
    """What a validation gains, over the bare passes of its monitors."""

    def epoch(case: str) -> float:
        return seconds_of_epoch(case, Net(net, has_step=False), training, data)

    def passes(case: str) -> float:
        return seconds_of_passes(case, net, training, data)

    return compare(what, "added to a validation / bare passes", wanted, epoch, turns, passes)


def shares(what: str, net: nn.Module, training: Batches, data: Batches, turns: int) -> list[Row]:
    """What a validation gains, over an epoch of training, which is timed on these batches and scaled."""
    size = sum(len(x) for x, _ in training)

    def epoch(case: str) -> float:
        return seconds_of_epoch(case, Net(net, has_step=False), training[: 500 // len(training[0][0])], data)

    def training_epoch(case: str) -> float:
        loader: Any = DataLoader(training, batch_size=None)  # type: ignore[arg-type]
        with Seconds() as seconds:
            trainer("none", max_epochs=1).fit(Net(net, has_step=False), loader)
        return seconds.value

    found = compare(what, "", {"sensitivity": 0.0, "risk": 0.0}, epoch, turns, training_epoch)
    rows = []
    for samples in (2000, 10_000, 50_000):
        for each in found:
            numbers = {name: each[name] * size / samples for name in ("median", "lowest", "highest")}
            numbers |= {"seconds": each["seconds"], "beside": each["beside"] * samples / size}
            figure = f"added to an epoch of training on {samples:,} samples, as a share"
            rows.append(row(what, each["case"], figure, 0.0, numbers))
    return rows


def once(what: str, figure: str, wanted: float, run: Callable[[], float], turns: int) -> list[Row]:
    """A figure by itself."""
    values = torch.tensor([run() for _ in range(turns + 1)][1:])
    numbers = {"median": values.quantile(0.5), "lowest": values.min(), "highest": values.max()}
    return [row(what, "", figure, wanted, {name: float(value) for name, value in numbers.items()})]


def seconds_of_solve() -> float:
    """Seconds, not of CPU time: two threads take part."""
    features, labels = torch.randn(1600, 50), nn.functional.one_hot(torch.randint(10, (1000,))).double()
    torch.set_num_threads(2)
    start = time.perf_counter()
    fit_reference(features[:1000], labels, features[1000:])
    seconds = time.perf_counter() - start
    torch.set_num_threads(1)
    return seconds


def microseconds_of_isolation() -> float:
    with isolated(mlp()) as run, Seconds() as seconds:
        for _ in range(1000):
            run(int)  # which does nothing
    return 1000 * seconds.value


# %% All of them
def comparisons(quick: bool) -> list[Callable[[], list[Row]]]:
    many, few, count = (1, 1, 4) if quick else (7, 3, 8)
    gray, image, size = (1, 28, 28), (8 if quick else 32, 3, 32, 32), 2 if quick else 8
    images, pixels = batches(count, image), batches(count, (size, 3, 128, 128), (128, 128), 21)
    tokens = batches(count, (size, 64, 64), (64,), 8000)
    deep = {"sensitivity": 1.05, "both": 1.1}

    def small(what: str, net: nn.Module, limit: float, shape: tuple[int, ...]) -> list[Row]:
        return added(what, net, batches(500 // shape[0], shape), batches(600 // shape[0], shape), both(limit), many)

    def both(limit: float) -> dict[str, float]:
        return {"sensitivity": limit, "both": limit}

    def fits(what: str, *args: Any, **kwargs: Any) -> list[Row]:
        more = {"num_epochs": 2 if quick else 20, **kwargs}
        return compare(what, "fit / fit without", both(0.0), lambda case: seconds_of_fit(case, *args, **more), few)

    def by_size(what: str, net: nn.Module, shape: tuple[int, ...], num_timed: int, turns: int) -> list[Row]:
        num_training, num_unseen = (128, 64) if quick else (num_timed, 600)
        training, data = (batches(number // shape[0], shape) for number in (num_training, num_unseen))
        return shares(what, net, training, data, turns)

    return [
        lambda: small("MLP 784-128-128-10", mlp(), 2.0, (100, *gray)),
        lambda: small("MLP 64-64-10", tiny(), 3.0, (32, 64)),
        lambda: small("small CNN", cnn(), 1.2, (50, *gray)),
        lambda: added("ResNet-18", resnet(), images[:2], images, deep, few),
        lambda: added("ViT", vit(), images[:2], images, deep, few),
        lambda: added("language model's head", ClassesFirst(64, 8000), tokens[:1], tokens, {"sensitivity": 1.3}, few),
        lambda: added("segmentation", segmenter(), pixels[:1], pixels, {"sensitivity": 0.0}, few),
        lambda: added("32 MB of buffers", Buffered(), *(batches(4 * count, (32, 64)),) * 2, {"sensitivity": 0.0}, few),
        lambda: once("a solve of the reference", "seconds, 2 threads", 0.4, seconds_of_solve, many),
        lambda: once("isolation", "microseconds a run", 60, microseconds_of_isolation, many),
        lambda: fits("MLP 784-128-128-10", mlp, gray, (5000, 1000)),
        lambda: fits("MLP 64-64-10", tiny, (64,), (1000, 1000), batch_size=32),
        lambda: by_size("small CNN", cnn(), (50, *gray), 2000, few),
        lambda: by_size("ResNet-18", resnet(), image, 512, 1),
    ]


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the monitors beside bare passes, and Trainers without them.")
    parser.add_argument("--quick", action="store_true", help="tiny: under a minute")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of comparisons, from 0")
    parser.add_argument("--out", type=Path, help="the CSV file; results.csv in this folder, with --quick runs/cost.csv")
    args = parser.parse_args(arguments)
    out = args.out or (Path("runs/cost.csv") if args.quick else Path(__file__).with_name("results.csv"))
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows: list[Row] = []
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for index, comparison in enumerate(comparisons(args.quick)):
            for found in comparison() if args.only is None or index in args.only else []:
                shown = {name: found.get(name, "") for name in COLUMNS}
                rows.append({name: f"{v:.3g}" if isinstance(v, float) else v for name, v in shown.items()})
                writer.writerow(rows[-1])
            file.flush()
    print(f"On a CPU, torch {torch.__version__}:\n\n{table(rows)}\n\nThe table is in {out}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
