"""Trains networks, and estimates their test loss in three ways without labels: a row an epoch in `results.csv`.

    python losses.py DATA           # some 40 minutes on a core; networks that are in results.csv are left out
    python losses.py DATA --quick   # two small networks on embedded digits, printed

The three: Equation 9 of the paper, from output sensitivity; the mean entropy of the network's own predictions; and the
loss to expect by a reference. They see 600 samples; the true loss is that of 2,000 others, with labels as noisy as
those of training. Images: the paper's networks and setting (`../paper/zoo.py`), for 150 epochs, whatever they reach.
Tables: runs of the check half of `../stopping` with an output for each class.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sensitivity.functional import loss_estimate, output_sensitivity
from lightning_sensitivity.reference.reference import Reference

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("paper", "stopping")]
from encoders import image_features  # noqa: E402
from pools import draw  # noqa: E402
from zoo import Images, Network, Spec  # noqa: E402

NUM_UNSEEN, NUM_TEST = 600, 2000
NOISE, NUM_NOISES = 0.1, 2
EPOCHS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150)  # after which a network is measured
SPECS = [Spec(4, 300), Spec(4, 300, init="normal"), Spec(conv_depth=3), Spec(conv_depth=3, init="normal")]
SPECS += [Spec(1, 300), Spec(4, 100, init="normal"), Spec(conv_depth=3, batch_norm=True), Spec(4, 300, dropout=0.2)]
SEEDS = (0, 1)
NUM_TABLES = 20
SIDE = 96  # pixels that an encoder sees


@dataclass
class Subject:
    """A network, what it learns from, and what is known of the samples that it is measured on."""

    data: str
    network_name: str
    init: str
    seed: int
    make_network: Callable[[], nn.Module]
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    batch_size: int
    num_epochs: int
    training: tuple[Tensor, Tensor]
    unseen: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    references: Callable[[], dict[str, Tensor]]  # their predictions for the unseen samples


# %% What is trained.
@cache
def images(name: str, folder: Path | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return 1,000 training images, 600 unseen ones, and 2,000 for the truth, with their labels."""
    found = Images(name, folder)
    found.setup("fit")
    x, y = found.test_set.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # MNIST's first ones are the easier
    x, y = x[order[: NUM_UNSEEN + NUM_TEST]], y[order[: NUM_UNSEEN + NUM_TEST]]
    return found.train_set.tensors, (x[:NUM_UNSEEN], y[:NUM_UNSEEN]), (x[NUM_UNSEEN:], y[NUM_UNSEEN:])


@cache
def references_of_images(name: str, folder: Path | None) -> dict[str, Tensor]:
    """Return what references say of unseen images: by patches; of photos, also by EfficientNet-Lite0 at 96 pixels."""
    (x, y), (x_unseen, _), _ = images(name, folder)
    found = {"expected": torch.tensor(Reference().fit(x, y).predict_proba(x_unseen))}
    if name == "cifar10" and folder is not None:
        seen, seen_unseen = (image_features(each, 0, SIDE, folder) for each in (x, x_unseen))
        found["encoder"] = torch.tensor(Reference().fit(seen, y).predict_proba(seen_unseen))
    return found


def of_images(name: str, spec: Spec, num_epochs: int, folder: Path | None) -> Subject:
    training, unseen, test = images(name, folder)

    def make_network() -> nn.Module:
        return Network(tuple(spec), tuple(training[0].shape[1:]))

    return Subject(
        name, spec.name, spec.init, spec.seed, make_network, lambda weights: torch.optim.Adam(weights, 1e-3),
        min(128, len(training[0]) // 4), num_epochs, training, unseen, test,
        lambda: references_of_images(name, folder),
    )  # fmt: skip


def of_tables(folder: Path) -> Iterator[Subject]:
    """Give the first runs of the check half of tables, as they are, that have an output for each class."""
    for index in range(0, 120, 2):
        run = draw("tables", index, folder)
        if not run.is_design and run.task == "multiclass":
            yield Subject(
                "tables", run.kind, "default", index, run.make_network, run.make_optimizer, run.batch_size,
                run.epochs, (run.x, run.y), (run.x_unseen, run.y_unseen), (run.x_test, run.noisy_test),
                lambda run=run: {"expected": torch.tensor(Reference().fit(run.x, run.y).predict_proba(run.x_unseen))},
            )  # fmt: skip


def subjects(folder: Path) -> Iterator[Subject]:
    """Give all networks, in an order of which any beginning is of use."""
    for number, subject in enumerate(of_tables(folder)):
        if number < NUM_TABLES:
            yield subject
    for seed in SEEDS:
        for spec in SPECS:
            for name in ("cifar10", "mnist"):
                yield of_images(name, spec._replace(seed=seed), EPOCHS[-1], folder)


# %% What is measured.
def outputs_of(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(500)]).double()


def measure(network: nn.Module, subject: Subject, references: dict[str, Tensor]) -> dict[str, float]:
    """Return the true loss, and the three estimates of it."""
    network.eval()
    (x, y), (x_test, y_test) = subject.unseen, subject.test
    generator = torch.Generator().manual_seed(1)
    noisy = [x + NOISE * torch.randn(x.shape, generator=generator) for _ in range(NUM_NOISES)]
    clean, of_test = outputs_of(network, x), outputs_of(network, x_test)
    sensitivity = output_sensitivity(clean, [outputs_of(network, each) for each in noisy])
    found = {
        "loss": cross_entropy(of_test, y_test),
        "labels": cross_entropy(clean, y),
        "equation9": loss_estimate(sensitivity, x.square().mean(), NOISE, clean.shape[1]),
        "entropy": torch.distributions.Categorical(logits=clean).entropy().mean(),
        "sensitivity": sensitivity,
        "accuracy": (of_test.argmax(1) == y_test).double().mean(),
    }
    for name, q in references.items():
        found[name] = cross_entropy(clean, q.double())
    return {name: float(value) for name, value in found.items()}


def train(subject: Subject) -> list[dict[str, float]]:
    """Train a network, and measure it after some epochs."""
    references = subject.references()
    torch.manual_seed(subject.seed)
    network = subject.make_network()
    optimizer = subject.make_optimizer(list(network.parameters()))
    x, y = subject.training
    rows = []
    for epoch in range(1, subject.num_epochs + 1):
        network.train()
        total = 0.0
        for batch in torch.randperm(len(x)).split(subject.batch_size):
            if len(batch) == 1:  # batch norm needs more
                continue
            loss = cross_entropy(network(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        if epoch in EPOCHS or epoch == subject.num_epochs:
            rows.append({"epoch": epoch, "training_loss": total / len(x)} | measure(network, subject, references))
    return rows


def rows_of(subject: Subject) -> pd.DataFrame:
    """Return what is measured of a network: a row an epoch."""
    found = pd.DataFrame(train(subject))
    about = {"data": subject.data, "network": subject.network_name, "init": subject.init, "seed": subject.seed}
    return found.assign(**about)[[*about, *found]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a folder with cifar10.npz and mnist.npz; see ../stopping")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    arguments = parser.parse_args()
    if arguments.quick:
        small = [of_images("digits", Spec(2, 64, init=init), 20, None) for init in ("default", "normal")]
        print(pd.concat(map(rows_of, small)).to_csv(index=False, float_format="%.4g"))
        return
    torch.set_num_threads(1)
    there = pd.read_csv(arguments.out) if arguments.out.exists() else pd.DataFrame()
    done = set() if there.empty else set(zip(there["data"], there["network"], there["seed"], strict=True))
    for subject in subjects(arguments.data):
        if (subject.data, subject.network_name, subject.seed) in done:
            continue
        start = time.process_time()
        there = pd.concat([there, rows_of(subject)])
        there.to_csv(arguments.out, index=False, float_format="%.5g")
        print(f"{subject.data} {subject.network_name}: {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
