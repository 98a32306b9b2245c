"""What pages tell of this study: which epoch to take, and which run, on data of those who may use it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from summaries import Number, Runs, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
CHECK = RUNS.where("not is_design")
NAMES: dict[str, Any] = {
    "all": RUNS,
    "check": CHECK,
    "tables": CHECK.where("pool == 'tables'"),
    "as_they_are": CHECK.where("pool == 'tables' and not is_redrawn"),
    "fifth": CHECK.where("pool == 'tables' and is_redrawn"),
    "few": CHECK.where("pool == 'few'"),
    "few_plain": CHECK.where("pool == 'few' and way == 'plain'"),
    "few_weights": CHECK.where("pool == 'few' and way == 'weights'"),
    "few_sampler": CHECK.where("pool == 'few' and way == 'sampler'"),
    "numbers": CHECK.where("pool == 'numbers'"),
    "numbers200": CHECK.where("pool == 'numbers' and labels_200_loss_lost.notna()"),
    "clear": CHECK.where("pool == 'numbers' and not kind.str.contains('noisy')"),
    "noisy": CHECK.where("pool == 'numbers' and kind.str.contains('noisy')"),
    "photos": CHECK.where("pool == 'photos'"),
    "texts": CHECK.where("pool == 'texts'"),
    "correct": CHECK.where("pool == 'redrawn' and not is_redrawn"),
    "redrawn": CHECK.where("pool == 'redrawn' and is_redrawn"),
    "tuned": CHECK.where("pool == 'tuned' and not given_features"),
    "tuned_features": CHECK.where("pool == 'tuned' and given_features"),
}
POOLS = {
    "tables, labels as they are": "as_they_are",
    "tables, a fifth redrawn": "fifth",
    "few positives": "few",
    "photos by people": "photos",
    "texts by people and rules": "texts",
    "redrawn: none": "correct",
    "redrawn: 20 or 40 %": "redrawn",
    "fine-tuning": "tuned",
    "fine-tuning, `features=`": "tuned_features",
}
COUNTS = (20, 50, 100, 200)
RULES = {
    "never stopping": "never_stop",
    "**criterion**": "criterion",
    "**ranking**": "ranking",
    "training score": "training_score",
    "a tenth, refined score": "tenth",
    "a tenth, its AUC": "tenth_by_auc",
    "**the tenth and the criterion**": "tenth_combined",
    **{f"{count} labels": f"labels_{count}" for count in COUNTS},
    **{f"**{count} labels and the criterion**": f"labels_{count}_combined" for count in COUNTS},
}
OF_NUMBERS = {label: rule for label, rule in RULES.items() if rule not in ("ranking", "tenth_by_auc")}


def cell(pool: str, measure: str) -> str:
    """Say mean, standard error, what nine runs of ten stay below, and the worst run; ROW is the rule."""
    column = f"{pool}.ROW_{measure}_lost"
    return f"{{{column}:.2f}} ± {{{column}.stderr:.2f}} ({{{column}.p90:.1f}}, {{{column}.worst:.1f}})"


def report(pool: str) -> str:
    """Give the table of a pool."""
    measures = {"accuracy": "accuracy", "AUC": "auc", "balanced accuracy": "balanced", "loss, %": "loss"}
    corner = f"{{{pool}.count}} runs"
    return table(corner, RULES, {label: cell(pool, measure) for label, measure in measures.items()})


def difference(first: str, second: str, measure: str = "accuracy") -> str:
    return f"{{ROW.{first}_{measure}_lost.minus[{second}_{measure}_lost].interval:+.2f}}"


def tau(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Kendall's tau."""
    signs = [np.sign(np.subtract.outer(each, each))[np.triu_indices(len(each), 1)] for each in (first, second)]
    return float((signs[0] * signs[1]).sum() / np.sqrt((signs[0] != 0).sum() * (signs[1] != 0).sum()))


def comparison(runs: Runs) -> dict[str, Number]:
    """Say how well the disagreement with the reference ranks runs on the same data."""
    taus, lost, by_chance = [], [], []
    for _, group in runs.frame.groupby("group"):
        disagreement, accuracy = group.criterion_disagreement.to_numpy(), group.criterion_accuracy.to_numpy()
        if len(group) > 1 and len(set(disagreement)) > 1 and len(set(accuracy)) > 1:
            taus.append(tau(disagreement, -accuracy))
        lost.append(accuracy.max() - accuracy[disagreement == disagreement.min()].mean())
        by_chance.append(accuracy.max() - accuracy.mean())
    found = {"tau": np.mean(taus), "stderr": np.std(taus, ddof=1) / len(taus) ** 0.5, "lost": np.mean(lost)}
    found |= {"by_chance": np.mean(by_chance), "groups": len(lost)}
    return {name: Number(value) for name, value in found.items()}


def with_before(runs: Runs) -> Runs:
    """Add what the criterion of before the redesign loses (`before.py`), and leave runs on which it was not run."""
    before = pd.read_csv(Path(__file__).with_name("before.csv"))
    frame = runs.frame.merge(before, on="run")
    frame["before"] = frame.before_features.where(frame.given_features, frame.before)
    return Runs(frame)


BEFORE = with_before(CHECK)
PARTS_BEFORE = {
    "redrawn: none": "pool == 'redrawn' and not is_redrawn",
    "redrawn: 20 or 40 %": "pool == 'redrawn' and is_redrawn",
    "photos by people": "pool == 'photos'",
    "fine-tuning": "pool == 'tuned' and not given_features",
    "fine-tuning, `features=`": "pool == 'tuned' and given_features",
}
NAMES |= {f"before{number}": BEFORE.where(rows) for number, rows in enumerate(PARTS_BEFORE.values())}
NAMES["alike"] = comparison(CHECK.where("pool == 'alike'"))
ROWS = {f"{label} ({{{pool}.count}})": pool for label, pool in POOLS.items()}
ASKED = {
    "tables: at most as 100 labels": "{tables.criterion_accuracy_lost:.2f}, {tables.labels_100_accuracy_lost:.2f}",
    "tables, AUC: at most half of never stopping": (
        "{tables.criterion_auc_lost:.2f} (ranking {tables.ranking_auc_lost:.2f}), {tables.never_stop_auc_lost:.2f}"
    ),
    "few positives, AUC: the ranking at most as a tenth by its AUC": (
        "{few.ranking_auc_lost:.2f}, {few.tenth_by_auc_auc_lost:.2f}"
    ),
    "photos: at most never stopping − 0.3": (
        "{photos.criterion_accuracy_lost:.2f}, {photos.never_stop_accuracy_lost:.2f}"
    ),
    "texts: at most never stopping": "{texts.criterion_accuracy_lost:.2f}, {texts.never_stop_accuracy_lost:.2f}",
    "regression, squared error: at most as 200 targets": (
        "{numbers200.criterion_loss_lost:.1f} %, {numbers200.labels_200_loss_lost:.1f} %"
    ),
    "correct labels: at most never stopping + 0.2": (
        "{correct.criterion_accuracy_lost:.2f}, {correct.never_stop_accuracy_lost:.2f}"
    ),
}
PARTS = ("few_plain", "few_weights", "few_sampler")
BLOCKS = {
    **{f"stopping: {pool}": report(pool) for pool in (*POOLS.values(), *PARTS)},
    **{f"stopping: {pool}": table(f"{{{pool}.count}} runs", OF_NUMBERS, {"squared error, %": cell(pool, "loss")})
       for pool in ("numbers", "clear", "noisy")},
    "stopping: in short": table("points of accuracy lost", ROWS, {
        "never stopping": "{ROW.never_stop_accuracy_lost:.2f}",
        "**criterion**": "{ROW.criterion_accuracy_lost:.2f}",
        "100 labels": "{ROW.labels_100_accuracy_lost:.2f}",
        "**100 labels and the criterion**": "{ROW.labels_100_combined_accuracy_lost:.2f}",
        "AUC: never stopping": "{ROW.never_stop_auc_lost:.2f}",
        "**criterion**, AUC": "{ROW.criterion_auc_lost:.2f}",
        "**ranking**, AUC": "{ROW.ranking_auc_lost:.2f}",
    }),
    "stopping: before": table(
        "points of accuracy lost",
        {f"{label} ({{before{number}.count}})": f"before{number}" for number, label in enumerate(PARTS_BEFORE)},
        {
            "never stopping": "{ROW.never_stop_accuracy_lost:.2f}",
            "criterion of before": "{ROW.before:.2f}",
            "**criterion**": "{ROW.criterion_accuracy_lost:.2f}",
            "difference": "{ROW.criterion_accuracy_lost.minus[before].interval:+.2f}",
        },
    ),
    "stopping: asked for": table("asked for", ASKED, {"came": "ROW"}),
    "stopping: what means do not say": """
- **Against never stopping, not all gains are beyond chance**: in accuracy those on tables as they are
({as_they_are.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}), on photos
({photos.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}) and in fine-tuning without `features=`
({tuned.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}) are not, and of redrawn labels
({correct.count} and {redrawn.count} runs) there are few.
- **Balanced accuracy is no gain**: the criterion loses {as_they_are.criterion_balanced_lost:.1f} on tables as they are,
{few.criterion_balanced_lost:.1f} with few positives and {texts.criterion_balanced_lost:.1f} on texts, never stopping
{as_they_are.never_stop_balanced_lost:.1f}, {few.never_stop_balanced_lost:.1f} and {texts.never_stop_balanced_lost:.1f},
the ranking {as_they_are.ranking_balanced_lost:.1f}, {few.ranking_balanced_lost:.1f} and
{texts.ranking_balanced_lost:.1f}.
- **With class weights** the ranking loses {few_weights.ranking_accuracy_lost:.1f} points of accuracy, in fine-tuning
{tuned.ranking_accuracy_lost:.1f}.
- **Photos**: the training score by itself loses {photos.training_score_accuracy_lost:.1f}, the criterion
{photos.criterion_accuracy_lost:.1f}; {photos.count} runs don't tell them apart.
- **Labels and the criterion lose more than the labels by themselves** in one place: 200 labels where all are correct
({correct.labels_200_combined_accuracy_lost.minus[labels_200_accuracy_lost].interval:+.2f}).
""",
    "stopping: differences": table("points of accuracy lost", ROWS, {
        "criterion − never stopping": difference("criterion", "never_stop"),
        "criterion − 100 labels": difference("criterion", "labels_100"),
        "AUC: criterion − never stopping": difference("criterion", "never_stop", "auc"),
        "AUC: ranking − a tenth by its AUC": difference("ranking", "tenth_by_auc", "auc"),
    }),
    "stopping: with labels": table("with the criterion − by themselves", ROWS, {
        f"{count} labels": difference(f"labels_{count}_combined", f"labels_{count}") for count in COUNTS
    } | {"a tenth": difference("tenth_combined", "tenth")}),
    "stopping: alike": (
        "Of 6 networks on the same table, at the epoch of the criterion, the one that disagrees least with the "
        "reference loses {alike[lost]:.2f} points to the best, one by chance {alike[by_chance]:.2f}; Kendall's τ is "
        "{alike[tau]:.2f} ± {alike[stderr]:.2f} ({alike[groups]:.0f} tables)."
    ),
}  # fmt: skip
