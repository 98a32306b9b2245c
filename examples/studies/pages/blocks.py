"""What README and the guide tell of the studies of stopping and comparing; their own reports tell all of it."""

from pathlib import Path
from typing import Any

from summaries import Runs, across, table

FOUND = Runs.read(Path(__file__).parents[1] / "stopping" / "results.csv").where("not is_design").frame
SHARES = FOUND["kind"].str.extract(r"(\d+) % (?:wrong|redrawn)")[0].astype(float)  # percent of the labels
CHECK = Runs(FOUND.assign(share=SHARES))
PARTS = {
    "tables": "pool == 'tables'",
    "as_they_are": "pool == 'tables' and not is_redrawn",
    "fifth": "pool == 'tables' and is_redrawn",
    "few": "pool == 'few'",
    "few_plain": "pool == 'few' and way == 'plain'",
    "few_weights": "pool == 'few' and way == 'weights'",
    "few_sampler": "pool == 'few' and way == 'sampler'",
    "numbers": "pool == 'numbers'",
    "clear": "pool == 'numbers' and not kind.str.contains('noisy')",
    "noisy": "pool == 'numbers' and kind.str.contains('noisy')",
    "photos": "pool == 'photos'",
    "texts": "pool == 'texts' and kind.str.contains('by people')",
    "rules": "pool == 'texts' and kind.str.contains('by rules')",
    "correct": "pool == 'redrawn' and not is_redrawn",
    "redrawn": "pool == 'redrawn' and is_redrawn",
    "redrawn_20": "pool == 'redrawn' and share == 20",
    "redrawn_40": "pool == 'redrawn' and share == 40",
    "photos_9": "pool == 'photos' and share < 25",
    "photos_40": "pool == 'photos' and share > 25",
    "tuned": "pool == 'tuned' and not given_features",
    "tuned_features": "pool == 'tuned' and given_features",
}
NAMES: dict[str, Any] = {name: CHECK.where(condition) for name, condition in PARTS.items()}
ALL = {
    "tables ({as_they_are.count})": "as_they_are",
    "tables, a fifth of the labels redrawn ({fifth.count})": "fifth",
    "few positives ({few.count})": "few",
    "photos, human labels ({photos.count})": "photos",
    "texts, human labels ({texts.count})": "texts",
    "texts, rule-generated labels ({rules.count})": "rules",
    "fine-tuning with `features=` ({tuned_features.count})": "tuned_features",
    "redrawn labels, 20 or 40 % ({redrawn.count})": "redrawn",
    "the same data, correct labels ({correct.count})": "correct",
}
MAIN = {label: name for label, name in ALL.items() if name not in ("fifth", "rules", "redrawn", "correct")}
RULES = {"last epoch": "never_stop", "**criterion**": "criterion", "a tenth held out": "tenth"}
FEW = {
    "as they come ({few_plain.count})": "few_plain",
    "class weights ({few_weights.count})": "few_weights",
    "weighted sampler ({few_sampler.count})": "few_sampler",
}
RANKED = {
    "last epoch": "never_stop",
    "criterion": "criterion",
    "**ranking**": "ranking",
    "a tenth, its AUC": "tenth_by_auc",
}
TARGETS = {
    "last epoch": "never_stop",
    "**criterion**": "criterion",
    "50 targets held out": "labels_50",
    "**50 and the criterion**": "labels_50_combined",
    "200 targets held out": "labels_200",
    "**200 and the criterion**": "labels_200_combined",
}
LABELS = {f"{count} labels": f"labels_{count}" for count in (20, 50, 100, 200)} | {"a tenth": "tenth"}


def may_be_chance(runs: Runs) -> str:
    """Say whether the criterion may be no better than the last epoch in truth."""
    difference = runs.criterion_accuracy_lost.minus["never_stop_accuracy_lost"]
    return " (may be chance)" if difference.high > 0 else ""


NAMES["compared"] = Runs.read(Path(__file__).parents[1] / "comparing" / "results.csv")
NAMES["chance"] = {name: may_be_chance(NAMES[name]) for name in ("as_they_are", "photos", "texts", "tuned_features")}


def lost(measure: str, form: str = ".1f") -> str:
    return f"{{ROW.COLUMN_{measure}_lost:{form}}}"


BLOCKS = {
    "your case in README": """
| you have | do this | what it was worth |
|---|---|---|
| a table, such as customers | [`RiskMonitor()`](docs/guide/data.md#tables) |
  {as_they_are.criterion_accuracy_lost:.1f} points lost instead of
  {as_they_are.never_stop_accuracy_lost:.1f}{chance[as_they_are]};
  with a fifth of the labels wrong {fifth.criterion_accuracy_lost:.1f} instead of {fifth.never_stop_accuracy_lost:.1f} |
| few positives, class weights, AUC | [stop by `val/risk_ranking`](docs/guide/few_positives.md) |
  AUC: {few.ranking_auc_lost:.1f} instead of {few.never_stop_auc_lost:.1f} |
| targets that are numbers | [`RiskMonitor("regression")`](docs/guide/regression.md) |
  squared error: {numbers.criterion_loss_lost:.0f} % above the lowest instead of {numbers.never_stop_loss_lost:.0f} % |
| photos with human labels | [`RiskMonitor()`](docs/guide/data.md#images) |
  {photos.criterion_accuracy_lost:.1f} instead of {photos.never_stop_accuracy_lost:.1f}{chance[photos]} |
| texts with human labels | [`RiskMonitor()`](docs/guide/data.md#texts) |
  {texts.criterion_accuracy_lost:.1f} instead of {texts.never_stop_accuracy_lost:.1f}{chance[texts]} |
| a pretrained network | [set `features=`](docs/guide/finetuning.md) |
  {tuned_features.criterion_accuracy_lost:.1f} instead of
  {tuned_features.never_stop_accuracy_lost:.1f}{chance[tuned_features]} |
| 100 or more labels to spare | [`validation_labels=True`](docs/guide/labels.md) |
  tables: {tables.labels_100_combined_accuracy_lost:.1f} instead of {tables.labels_100_accuracy_lost:.1f}
  by labels alone |
| more than 20,000 samples | [hold some out, use `RefinedScore`](docs/guide/hold_out.md) | not measured |
| two annotators | [-100 where they disagree](docs/guide/annotators.md) | not measured |
| several models, no labels | [`compare_models`](docs/guide/comparing.md) |
  {compared.compare_lost:.1f} points lost instead of {compared.random_lost:.1f} at random |
| labels that you don't trust | [`label_noise(x, y)`](docs/guide/labels.md#how-noisy-are-my-labels) |
  how many can't be explained |
| rule-generated labels | **No**: it can't see their errors.
  [Label some by hand](docs/guide/labels.md#rule-generated-labels) |
  too few runs to tell |
| augmentation and a schedule that ends at zero | **No**: [train to the end](docs/guide/stopping.md#schedules) | |
| segmentation, token labels | **No**: [`SensitivityMonitor`](docs/guide/sensitivity.md) alone | |
""".replace("\n  ", " "),
    "worth": table(
        "accuracy lost, points",
        ALL,
        across(RULES, lost("accuracy"))
        | {"difference [95 %]": "{ROW.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}"},
    ),
    "worth, AUC": table("AUC lost, points", MAIN, across(RANKED, lost("auc"))),
    "worth, loss": table("log-loss above the lowest, %", MAIN, across(RULES, lost("loss", ".0f"))),
    "limits": """
- **One run in ten** loses {tables.criterion_accuracy_lost.p90:.1f} points or more on tables,
{photos.criterion_accuracy_lost.p90:.1f} on photos and {texts.criterion_accuracy_lost.p90:.1f} on texts. The worst run
loses {tables.criterion_accuracy_lost.worst:.0f}, {photos.criterion_accuracy_lost.worst:.0f} and
{texts.criterion_accuracy_lost.worst:.0f}.
- **Balanced accuracy** does not gain by the criterion: on tables it loses {tables.criterion_balanced_lost:.1f} points,
the last epoch {tables.never_stop_balanced_lost:.1f}, the ranking {tables.ranking_balanced_lost:.1f}.
- **The ranking is not for accuracy**: with class weights, it loses {few_weights.ranking_accuracy_lost:.0f} points.""",
    "few positives": table("AUC lost, points", FEW, across(RANKED, lost("auc"))),
    "few positives, balanced": """
Of balanced accuracy, the ranking loses {few.ranking_balanced_lost:.1f} points, the last epoch
{few.never_stop_balanced_lost:.1f}, the criterion {few.criterion_balanced_lost:.1f}, and a tenth by its AUC
{few.tenth_by_auc_balanced_lost:.1f}.""",
    "regression": table(
        "squared error above the lowest, %",
        {label: rule for label, rule in TARGETS.items()},
        {
            "targets as they are ({clear.count})": "{clear.ROW_loss_lost:.1f}",
            "with noise ({noisy.count})": "{noisy.ROW_loss_lost:.1f}",
        },
    ),
    "photos": """
On photos with human labels ({photos.count} runs), the criterion lost {photos.criterion_accuracy_lost:.1f} points of
accuracy, the last epoch {photos.never_stop_accuracy_lost:.1f}.""",
    "texts": """
On texts with human labels ({texts.count} runs), the criterion lost {texts.criterion_accuracy_lost:.1f} points of
accuracy, the last epoch {texts.never_stop_accuracy_lost:.1f}.""",
    "unexplained": """
In the study, {redrawn_40.unexplained.percent:.0f} % of the labels could not be explained where 40 % had been redrawn at
random, {redrawn_20.unexplained.percent:.0f} % where 20 % had been, and {correct.unexplained.percent:.0f} % where none
had. Of human labels of photos, it was {photos_40.unexplained.percent:.0f} % where {photos_40.share:.0f} % were wrong,
and {photos_9.unexplained.percent:.0f} % where {photos_9.share:.0f} % were; of real tables,
{as_they_are.unexplained.percent:.0f} %.""",
    "finetuning": table(
        "accuracy lost, points",
        {
            "without `features=` ({tuned.count})": "tuned",
            "with `features=` ({tuned_features.count})": "tuned_features",
        },
        across(RULES, lost("accuracy")),
    ),
    "labels": table(
        "accuracy lost, points",
        LABELS,
        {
            name: f"{{{name}.ROW_accuracy_lost:.1f}} → {{{name}.ROW_combined_accuracy_lost:.1f}}"
            for name in ("tables", "photos", "texts")
        },
    )
    + """

Before the arrow stand labels alone, behind it the same labels with the criterion. Without labels, the criterion loses
{tables.criterion_accuracy_lost:.1f} on tables,
{photos.criterion_accuracy_lost:.1f} on photos and {texts.criterion_accuracy_lost:.1f} on texts.""",
}
