"""Makes the recorded runs of the study, one file a run and kind of training; resumes where it stopped.

python examples/studies/accuracy/make.py DATA RUNS people 0 30     # a pool, and its seeds
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from people import draw_people, features_of
from record import record
from torch import set_num_threads

sys.path.insert(0, str(Path(__file__).parents[1] / "early_stopping"))
from dataclasses import replace

from finetuning import frozen_body
from pools import DRAWS, num_epochs
from truth import drawn_once


def make(pool: str, seed: int, data: Path, runs: Path) -> None:
    set_num_threads(1)
    features = None
    if pool == "people":
        run, features = draw_people(seed, data), features_of(seed, data)
    else:
        draw = "as built" if pool == "by class" else pool
        drawn = DRAWS[draw](seed, data)
        epochs = num_epochs(draw, drawn)
        if not epochs or (pool == "by class" and drawn.labels != "by class"):
            print(f"{pool} {seed}: passed over", flush=True)  # known before training: it takes too long
            return
        run = replace(drawn_once(draw, seed, data), epochs=epochs)
        if pool == "fine-tuning":
            body = frozen_body(seed, data)
            features = lambda batch: body(batch[0])  # noqa: E731
    folder = runs / f"{pool.replace(' ', '_')}_{seed}"
    record(run, folder / "full.npz", features)
    record(run, folder / "fewer.npz", features, held_out=True)
    print(f"{pool} {seed}: {run.kind}, {run.epochs} epochs", flush=True)


if __name__ == "__main__":
    data, runs, pool, first, last = sys.argv[1:6]
    for seed in range(int(first), int(last)):
        try:
            make(pool, seed, Path(data), Path(runs))
        except Exception:
            print(f"{pool} {seed} failed", flush=True)
            traceback.print_exc()
