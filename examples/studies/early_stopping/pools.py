"""The pools of the report: how the run of a seed is drawn, and for how many epochs it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from as_built import draw_as_built
from draw_table import draw_table
from finetuning import draw_finetuning
from runs import Request, Run, draw, draw_large_teacher
from signals import draw_signals
from torch.utils.flop_counter import FlopCounterMode

FEWEST_SAMPLES, FEWEST_EPOCHS = 4000, 10  # of larger runs; of those that take too long
MOST_SECONDS = 20.0  # of a training, by what it computes; twice that of larger runs
SECONDS_A_STEP, SECONDS_A_LAYER, SECONDS_A_GIGAFLOP = 1e-3, 3e-4, 0.05  # about what one core of a server takes
Draw = Callable[[int, Path | None], Run]
FIRST_SEED_AS_BUILT = 8600  # of larger runs; those before are random
NUMBERS = {  # of runs of the report: the first ones from a seed on that are not passed over
    "random": [(7300, 70)],
    "as built": [(8300, 70)],
    "tables": [(9300, 50)],
    "fine-tuning": [(9700, 50)],
    "larger": [(7600, 12), (FIRST_SEED_AS_BUILT, 12)],
}


def _small(seed: int) -> Request:
    return Request(200, 2000, is_noisy=seed % 3 > 0)


def _large(seed: int) -> Request:
    return Request(FEWEST_SAMPLES, 20000, is_noisy=seed % 3 > 0)


def draw_table_or_signals(seed: int, data: Path | None = None) -> Run:
    """Draw a table or sentences, or, in a third of the runs, signals."""
    drawn = draw_signals if np.random.RandomState((seed, 14)).rand() < 1 / 3 else draw_table
    return drawn(seed, data, _small(seed))


def draw_larger(seed: int, data: Path | None = None) -> Run:
    """Draw a large run: a random one, or, from a seed on, one as built."""
    if seed >= FIRST_SEED_AS_BUILT:
        return draw_as_built(seed, data, _large(seed))
    return draw(seed, data, request=_large(seed))


DRAWS: dict[str, Draw] = {
    "random": lambda seed, data: draw(seed, data, request=_small(seed)),
    "as built": lambda seed, data: draw_as_built(seed, data, _small(seed)),
    "tables": draw_table_or_signals,
    "fine-tuning": draw_finetuning,
    "larger": draw_larger,
    "large teachers": draw_large_teacher,
}


def num_epochs(pool: str, run: Run) -> int:
    """Give the number of epochs that a run is trained for: fewer than drawn, if these take too long.

    Fine-tuning has as many as drawn, which do not take longer. It is 0 for runs that are passed over: those whose first
    ten epochs take longer, and those of the larger ones that are small, since their task has too few samples. This is
    known before training.
    """
    if pool == "larger" and len(run.x) < FEWEST_SAMPLES:
        return 0
    if pool == "fine-tuning":
        return run.epochs
    network, size = run.make_network(), min(run.batch_size, len(run.x))
    with FlopCounterMode(display=False) as counter:
        network(run.x[:size])
    num_layers = sum(1 for module in network.modules() if not list(module.children()))
    gigaflops = 3 * counter.get_total_flops() / 1e9  # of the forward and the backward pass
    seconds = SECONDS_A_STEP + SECONDS_A_LAYER * num_layers + SECONDS_A_GIGAFLOP * gigaflops
    most_seconds = MOST_SECONDS * (1 + (pool == "larger"))
    affordable = int(most_seconds / (seconds * -(-len(run.x) // size)))
    return min(run.epochs, affordable) if affordable >= FEWEST_EPOCHS else 0


def plan(pool: str, data: Path | None) -> list[tuple[int, int]]:
    """Give the seeds and numbers of epochs of a pool's runs in the report; 0 for those that are passed over."""
    found = []
    for seed, number in NUMBERS[pool]:
        while number:
            found.append((seed, num_epochs(pool, DRAWS[pool](seed, data))))
            number -= found[-1][1] > 0
            seed += 1
    return found
