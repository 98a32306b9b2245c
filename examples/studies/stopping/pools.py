"""The pools that runs are drawn from, by index; the order of `POOLS` is part of the seeds: new ones come at its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from more import (
    few_large,
    few_texts,
    minilm_more,
    numbers_large,
    photos_more,
    resnet18,
    signals_more,
    texts_more,
    transformer,
    waves,
)
from runs import (
    WAYS,
    Run,
    alike,
    annotators,
    few,
    few_positives,
    large,
    made,
    numbers,
    photos,
    photos_alike,
    redrawn_labels,
    series,
    signals,
    table,
    texts,
)
from tuned import minilm, pretrained, tuned

POOLS = {
    "tables": (table, 240),
    "few": (few, 0),
    "numbers": (numbers, 40),
    "photos": (photos, 36),
    "texts": (texts, 36),
    "redrawn": (redrawn_labels, 45),
    "tuned": (tuned, 24),
    "alike": (alike, 240),
    "large": (large, 28),
    "pretrained": (pretrained, 24),
    "signals": (signals, 18),
    "series": (series, 12),
    "annotators": (annotators, 24),
    "photos_alike": (photos_alike, 24),
    "minilm": (minilm, 24),
    "made": (made, 8),
    "photos_more": (photos_more, 40),
    "texts_more": (texts_more, 40),
    "signals_more": (signals_more, 36),
    "few_large": (few_large, 28),
    "numbers_large": (numbers_large, 20),
    "minilm_more": (minilm_more, 15),
    "resnet18": (resnet18, 15),
    "transformer": (transformer, 24),
    "few_texts": (few_texts, 24),
    "waves": (waves, 24),
}


def draw(pool: str, index: int, folder: Path) -> Run:
    """Draw a run; the same pool and index give the same run."""
    r = np.random.RandomState((list(POOLS).index(pool), index, 53))
    return POOLS[pool][0](r, index, folder)


def size(pool: str, folder: Path) -> int:
    """Return the number of runs of a pool."""
    return len(WAYS) * len(few_positives(folder)) if pool == "few" else POOLS[pool][1]
