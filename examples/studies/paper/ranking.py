# %% [markdown]
# # How well a score orders networks: Kendall's τ-b with a bootstrap interval over the networks

# %%
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from scipy.stats import kendalltau

RESAMPLES = 2000


class Tau(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def kendall(score: ArrayLike, truth: ArrayLike) -> Tau:
    """τ-b, and the 2.5 and 97.5 % quantiles of it over resamples of the networks (percentile bootstrap, seed 0)."""
    x, y = np.asarray(score, float), np.asarray(truth, float)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    drawn = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES).astype(float)
    agreed, untied_x, untied_y = (np.einsum("ri,ij,rj->r", drawn, pairs, drawn) for pairs in (a * b, a * a, b * b))
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(agreed / np.sqrt(untied_x * untied_y), [0.025, 0.975])
    return Tau(float(kendalltau(x, y).statistic), float(low), float(high))


def rank(table: pd.DataFrame, scores: Iterable[str], truths: Mapping[str, str]) -> pd.DataFrame:
    """τ of every score with every truth, one row a score; `truths` maps a label to a column."""
    rows = []
    for score in scores:
        values: dict[str, object] = {"score": score}
        for label, column in truths.items():
            tau = kendall(table[score], table[column])
            values |= {label: tau.value, f"{label}_low": tau.low, f"{label}_high": tau.high}
        rows.append(values)
    return pd.DataFrame(rows)


def written(ranked: pd.DataFrame, truths: Iterable[str]) -> pd.DataFrame:
    """The same for the eye: "+0.50 [+0.20, +0.80]"."""
    columns = {
        truth: [str(Tau(*values)) for values in ranked[[truth, f"{truth}_low", f"{truth}_high"]].to_numpy()]
        for truth in truths
    }
    return ranked.drop(columns=[column for column in ranked if column.startswith(tuple(truths))]).assign(**columns)


WEIGHTWATCHER = {"alpha": "α of WeightWatcher", "alpha_hat": "α̂ of WeightWatcher"}


def intervals(axes: Axes, ranked: pd.DataFrame, truths: Iterable[str]) -> None:
    """One line a score, with τ and its interval for every truth."""
    truths = list(truths)
    for index, truth in enumerate(truths):
        position = np.arange(len(ranked)) + (index - (len(truths) - 1) / 2) * 0.22
        spans = np.abs(ranked[[f"{truth}_low", f"{truth}_high"]].to_numpy().T - ranked[truth].to_numpy())
        axes.errorbar(ranked[truth], position, xerr=spans, fmt="oD^"[index], ms=4, lw=1, label=f"with the {truth}")
    axes.axvline(0, color="C7", lw=0.8)
    names = [WEIGHTWATCHER.get(score, score.replace("_", " ")) for score in ranked["score"]]
    axes.set(yticks=range(len(ranked)), yticklabels=names, xlabel="Kendall's τ with 95 % interval")
    axes.set(xlim=(-1.05, 1.05), xticks=(-1, -0.5, 0, 0.5, 1))
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
