# %% [markdown]
# # What do the monitors cost?
#
# Time and memory of `SensitivityMonitor` and `RiskMonitor` with their defaults, beside the least that they could take,
# beside a Trainer without them, and beside the loop of the paper's authors. README.md in this folder has the figures.
#
#     python examples/cost/benchmark.py          # six minutes on one idle core; a GPU is used if there is one
#     python examples/cost/benchmark.py --quick  # half a minute: shows that it runs, and times nothing worth reading
#
# All runs of a comparison take turns, forwards and backwards, in one process on one thread, after a first turn that is
# thrown away. A figure is the median over the turns, with the lowest and the highest one. Data are random numbers.

# %%
from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import OutputSensitivity, RiskMonitor, SensitivityMonitor
from lightning_sensitivity.twins import batch_statistics

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CARD = torch.cuda.get_device_name() if CUDA else "cpu"
COLUMNS = [
    "what",
    "case",
    "figure",
    "wanted",
    "met",
    "median",
    "lowest",
    "highest",
    "seconds",
    "beside",
    "device",
]
Batches = list[list[Tensor]]
Cases = dict[str, Callable[[], list[Any]]]
MONITORS: Cases = {
    "sensitivity": lambda: [SensitivityMonitor()],
    "risk": lambda: [RiskMonitor()],
    "both": lambda: [SensitivityMonitor(), RiskMonitor()],
}


# %% Models and data
def mlp(*extra: nn.Module) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *extra)


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


class Queue(nn.Module):
    """33 MB that no pass writes, as MoCo has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.rand(128, 2**16))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Net(LightningModule):
    def __init__(self, net: nn.Module, has_step: bool) -> None:
        super().__init__()
        self.net, self.has_step = net, has_step

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: list[Tensor]) -> Tensor:
        outputs = self(batch[0])
        return cross_entropy(outputs.movedim(-1, 1) if outputs.shape[-1] == 8000 else outputs, batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.has_step:
            self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(count: int, x: tuple[int, ...], y: tuple[int, ...] = (), classes: int = 10) -> Batches:
    """As they come from a loader, of (N, ...) each, on the device."""
    return [[torch.rand(x, device=DEVICE), torch.randint(classes, x[:1] + y, device=DEVICE)] for _ in range(count)]


# %% Taking turns
def now() -> float:
    if not CUDA:
        return time.process_time()  # of this process: others may keep the cores busy
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each run in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            start = now()
            runs[name]()
            seconds[name].append(now() - start)
    return {name: values[1:] for name, values in seconds.items()}


def trainer(callbacks: list[Any], epochs: int = 1) -> Trainer:
    accelerator = "gpu" if CUDA else "cpu"
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    off |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator=accelerator, devices=1, max_epochs=epochs, callbacks=callbacks, **off)


def in_a_fit(
    net: nn.Module,
    training: Batches,
    cases: Cases,
    do: Callable[[Net, Callable[[str, Batches], None]], Any],
    has_step: bool = False,
) -> Any:
    """What `do(module, validate)` gives, in place of the validation of a short fit.

    There, `validate(case, batches)` is a validation epoch with the monitors of the case, or with none.
    """
    monitors = {name: case() for name, case in cases.items()}
    flat = [each for several in monitors.values() for each in several]
    for index, each in enumerate(flat):
        each.prefix = f"val{index}_"
    module, fit, found = Net(net, has_step), trainer(flat), []
    loop, others = fit.fit_loop.epoch_loop.val_loop, [each for each in fit.callbacks if each not in flat]
    run = loop.run

    def validate(case: str, data: Batches) -> None:
        fit.callbacks = others + monitors.get(case, [])
        loop._combined_loader.flattened = [DataLoader(data, batch_size=None)]
        loop._max_batches = [len(data)]
        run()

    def instead() -> list[Any]:
        loop.setup_data()
        found.append(do(module, validate))
        fit.callbacks = others + flat
        return []

    loop.run = instead
    fit.fit(module, *(DataLoader(data, batch_size=None) for data in (training, training[:1])))
    return found[0]


class Recorded(TorchDispatchMode):
    """Inside, the passes of a module and the noise that is drawn are written down; a call does the same again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.steps = module, []

    def __enter__(self) -> Recorded:
        self.hook = self.module.register_forward_pre_hook(self.note)
        return super().__enter__()

    def note(self, module: nn.Module, args: Any) -> None:
        norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
        self.steps.append(partial(self.run, *args, by_batch=any(each.running_mean is None for each in norms)))

    def run(self, *args: Any, by_batch: bool) -> None:
        with batch_statistics(self.module) if by_batch else nullcontext():
            self.module(*args)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.randn.generator:
            self.steps.append(partial(self.noise, args[0]))
        return func(*args, **(kwargs or {}))

    def noise(self, shape: list[int]) -> Tensor:
        noise = torch.randn(shape, device=DEVICE)
        return torch.add(noise, noise, alpha=0.1, out=noise)

    @torch.no_grad()
    def __call__(self) -> None:
        self.module.eval()
        for step in self.steps:
            step()


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and alive, without what an operation needs in itself."""

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


# %% What is compared
Row = dict[str, Any]


def row(what: str, case: str, figure: str, seconds: list[float], beside: list[float], wanted: str = "") -> Row:
    """The ratio of two runs; `wanted` is what issue 15 asks for, such as "≤ 1.5"."""
    ratios = [a / b for a, b in zip(seconds, beside, strict=True)]
    spread = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    times = {"seconds": median(seconds), "beside": median(beside)}
    return judged({"what": what, "case": case, "figure": figure, "wanted": wanted} | spread | times)


def judged(row: Row) -> Row:
    if row["wanted"]:
        sign, limit = row["wanted"].split()
        row["met"] = "yes" if (row["median"] <= float(limit)) == (sign == "≤") else "no"
    return row | {"device": CARD}


def minus(seconds: list[float], none: list[float]) -> list[float]:
    return [a - b for a, b in zip(seconds, none, strict=True)]


def gains(what: str, net: nn.Module, training: Batches, data: Batches, wanted: dict[str, str], turns: int) -> list[Row]:
    """What a validation epoch gains, over a loop that draws the same noise and runs the same passes."""

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        runs = {"none": partial(validate, "none", data)}
        for case in wanted:
            validate(case, data)  # the first one looks at what the step does
            with Recorded(module) as recorded:
                validate(case, data)
            runs |= {case: partial(validate, case, data), f"{case}, bare": recorded}
        seconds = take_turns(runs, turns)
        added = {case: minus(seconds[case], seconds["none"]) for case in wanted}
        return [
            row(what, case, "added to an epoch / bare loop", added[case], seconds[f"{case}, bare"], limit)
            for case, limit in wanted.items()
        ]

    return in_a_fit(net, training, {case: MONITORS[case] for case in wanted}, do)


def epochs(what: str, net: nn.Module, data: Batches, wanted: dict[str, str], turns: int) -> list[Row]:
    """A validation epoch with monitors over one without."""

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        seconds = take_turns({case: partial(validate, case, data) for case in ("none", *wanted)}, turns)
        figure = "epoch / epoch without"
        return [row(what, case, figure, seconds[case], seconds["none"], limit) for case, limit in wanted.items()]

    return in_a_fit(net, data, {case: MONITORS[case] for case in wanted}, do, has_step=True)


def fits(samples: int, wanted: dict[str, str], turns: int) -> list[Row]:
    """A whole fit of the MLP, with an ordinary loader, over one without monitors."""
    sets = [TensorDataset(torch.rand(n, 1, 28, 28), torch.randint(10, (n,))) for n in (samples, samples // 5)]

    def fit(case: str) -> None:
        loaders = [DataLoader(each, batch_size=100) for each in sets]
        trainer(MONITORS.get(case, list)(), epochs=3).fit(Net(mlp(), has_step=True), *loaders)

    seconds = take_turns({case: partial(fit, case) for case in ("none", *wanted)}, turns)
    figure = "fit / fit without"
    return [row("MLP", case, figure, seconds[case], seconds["none"], limit) for case, limit in wanted.items()]


def buffers(turns: int) -> list[Row]:
    """A validation epoch with 33 MB of buffers over one with none."""
    data = batches(10, (100, 1, 28, 28))

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        def inner(module: Net, validate_with: Callable[[str, Batches], None]) -> list[Row]:
            runs = {"none": partial(validate, "both", data), "buffers": partial(validate_with, "both", data)}
            seconds = take_turns(runs, turns)
            what = "33 MB of buffers"
            return [row(what, "both", "epoch / epoch without buffers", seconds["buffers"], seconds["none"], "≤ 1.1")]

        return in_a_fit(mlp(Queue()), data[:5], {"both": MONITORS["both"]}, inner, has_step=True)

    return in_a_fit(mlp(), data[:5], {"both": MONITORS["both"]}, do, has_step=True)


def authors(samples: int, turns: int) -> list[Row]:
    """How many times as long the authors' loop takes, as their estimator is written in vectors."""
    data = batches(samples // 100, (100, 1, 28, 28))

    @torch.no_grad()
    def theirs(module: Net) -> float:
        module.eval()
        changes = [(module(x + 0.1 * torch.randn_like(x)) - module(x)).mean(1) for x, _ in data]
        return float(torch.cat(changes).var(correction=0))

    @torch.no_grad()
    def metric(module: Net) -> float:
        module.eval()
        found = OutputSensitivity().to(DEVICE)
        for x, _ in data:
            found.update(module(x), module(x + 0.1 * torch.randn_like(x)))
        return float(found.compute())

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        cases = {"none": "none", "callback, all samples": "all", "callback, default": "sensitivity"}
        runs = {name: partial(validate, case, data) for name, case in cases.items()}
        seconds = take_turns(runs | {"loop": partial(theirs, module), "metric": partial(metric, module)}, turns)
        mine = {name: minus(seconds[name], seconds["none"]) for name in cases if name != "none"}
        mine = {"metric in a loop": seconds["metric"]} | mine
        wanted = dict(zip(mine, ("≥ 0.9", "≥ 0.9", "≥ 5"), strict=True))
        return [row("MLP", name, "authors' loop / ours", seconds["loop"], mine[name], wanted[name]) for name in mine]

    monitors = {"all": lambda: [SensitivityMonitor(num_samples=None)], "sensitivity": MONITORS["sensitivity"]}
    return in_a_fit(mlp(), data[:5], monitors, do)


def growth(sizes: list[int], turns: int) -> list[Row]:
    """More samples under the same budget, and more draws on the same samples."""
    draws = (1, 2, 4, 8)
    cases: Cases = {
        f"{n} draws": partial(lambda n: [SensitivityMonitor(num_draws=n, num_samples=None)], n) for n in draws
    }

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        batch, rows = batches(10, (100, 1, 28, 28)), []
        data = {size: list(islice(cycle(batch), size // 100)) for size in sizes}
        runs = {(case, size): partial(validate, case, data[size]) for case in ("none", "both") for size in sizes}
        runs |= {(case, 1000): partial(validate, case, batch) for case in ("none", *cases)}
        seconds = take_turns(runs, turns)
        added = {key: minus(seconds[key], seconds["none", key[1]]) for key in runs if key[0] != "none"}
        first = added["both", sizes[0]]
        for size in sizes:
            rows.append(row("MLP", f"both, {size} samples", f"added / at {sizes[0]}", added["both", size], first))
        for case in cases:
            rows.append(row("MLP", case, "added / at 1 draw", added[case, 1000], added["1 draws", 1000]))
        return rows

    return in_a_fit(mlp(), batches(5, (100, 1, 28, 28)), cases | {"both": MONITORS["both"]}, do)


def memory(what: str, net: nn.Module, data: Batches) -> list[Row]:
    """The peak of a batch's tensors beside a pass of the model, in batches of outputs, after an input and the weights.

    "≤ 2" is then one batch of inputs and two of outputs, and for the risk a twin's weights.
    """

    def do(module: Net, validate: Callable[[str, Batches], None]) -> list[Row]:
        def peak(run: Callable[[], Any]) -> float:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                return torch.cuda.max_memory_allocated() - before
            with AliveBytes() as counter, torch.no_grad():
                run()
            return counter.peak

        x = data[0][0]
        outputs, weights = module(x).nbytes, sum(p.nbytes for p in module.parameters())
        inside = peak(lambda: module(x)) - outputs
        rows = []
        for case in ("sensitivity", "risk"):
            validate(case, data)
            beside = x.nbytes if case == "sensitivity" else weights
            value = (peak(partial(validate, case, data)) - inside - beside) / outputs
            found = {"what": what, "case": case, "figure": "batches of outputs at the peak", "median": value}
            rows.append(judged(found | {"wanted": "≤ 2"}))
        return rows

    return in_a_fit(net, data, MONITORS, do)


# %% All of them
def comparisons(quick: bool) -> list[Callable[[], list[Row]]]:
    digits, image = (100, 1, 28, 28), (8 if quick else 32, 3, 32, 32)
    many, some, few = (1, 1, 1) if quick else (40, 10, 8)
    deep = 2 if quick else 8
    thin = batches(5, digits), batches(10, digits)
    images = batches(deep, image), batches(deep, image)
    head, pixels = partial(nn.Linear, 64, 8000), batches(deep, (2 if quick else 8, 3, 128, 128), (128, 128), 21)
    tokens = batches(deep, (2 if quick else 8, 64, 64), (64,), 8000)
    quarter = {"sensitivity": "≤ 1.12", "risk": "", "both": "≤ 1.25"}
    least = dict.fromkeys(MONITORS, "≤ 1.5")
    deep_least = dict.fromkeys(("sensitivity", "risk"), "≤ 1.05")
    return [
        lambda: gains("MLP", mlp(), *thin, least, many),
        lambda: fits(1000 if quick else 5000, quarter, some),
        lambda: gains("ResNet-18", resnet(), *images, deep_least, few),
        lambda: gains("ViT", vit(), *images, deep_least, few),
        lambda: epochs("language model's head", head(), tokens, {"sensitivity": "≤ 3", "both": ""}, some),
        lambda: epochs("segmentation", segmenter(), pixels, {"sensitivity": "≤ 3.5", "both": "≤ 5"}, some),
        lambda: buffers(many),
        lambda: authors(2000 if quick else 10_000, some),
        lambda: growth([2500, 5000] if quick else [2500, 10_000, 40_000], some),
        lambda: memory("language model's head", head(), tokens[:1]),
        lambda: memory("segmentation", segmenter(), pixels[:1]),
    ]


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(COLUMNS[:-1]) + " |", "|---" * (len(COLUMNS) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in COLUMNS[:-1]) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the monitors beside bare loops, and Trainers without them.")
    parser.add_argument("--quick", action="store_true", help="tiny: half a minute")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of comparisons, from 0")
    parser.add_argument("--out", type=Path, help="the CSV file; results.csv in this folder, with --quick runs/cost.csv")
    args = parser.parse_args()
    out = args.out or (Path("runs/cost.csv") if args.quick else Path(__file__).with_name("results.csv"))
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[Row] = []
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for index, compare in enumerate(comparisons(args.quick)):
            if args.only is None or index in args.only:
                for found in compare():
                    shown = {name: found.get(name, "") for name in COLUMNS}
                    rows.append({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in shown.items()})
                    writer.writerow(rows[-1])
                file.flush()
    print(f"On {CARD}, torch {torch.__version__}:\n\n{table(rows)}\n\nThe table is in {out}.")


if __name__ == "__main__":
    main()
