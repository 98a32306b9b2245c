"""What pages tell of these tasks."""

from pathlib import Path

from summaries import Runs, across, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
KINDS = {
    "tables": "tables",
    "tables, redrawn": "tables_redrawn",
    "photos by people": "people",
    "images": "images",
}
NAMES = {"tasks": RUNS} | {name: RUNS.where(f"kind == '{kind}'") for kind, name in KINDS.items()}
RULES = {
    "**`compare_models`**": "compare",
    "the refined distance from the reference": "distance",
    "the models' own confidence": "confidence",
    "a model drawn at random": "random",
    "50 noisy labels": "labels_50",
    "100 noisy labels": "labels_100",
    "200 noisy labels": "labels_200",
    "100 noisy labels, refined score": "refined_100",
    "`compare_models` with 50 noisy labels": "both_50",
    "`compare_models` with 100 noisy labels": "both_100",
    "`compare_models` with 200 noisy labels": "both_200",
}
IN_SHORT = {
    "`compare_models`": "compare",
    "`compare_models` with 100 noisy labels": "both_100",
    "50 noisy labels": "labels_50",
    "100 noisy labels": "labels_100",
    "200 noisy labels": "labels_200",
    "the models' own confidence": "confidence",
    "a model drawn at random": "random",
    "*the mean of all models, in place of a choice*": "mean_of_all",
}
POINTS = across({"all": "tasks"} | KINDS, "{COLUMN.ROW_lost:.2f}")
BLOCKS = {
    "tuning": table("chosen by", IN_SHORT, POINTS | {"worst task": "{tasks.ROW_lost.worst:.1f}"})
    + """

Points of test accuracy lost against the best of 5 to 7 models, on {tasks.count} random tasks.""",
    "comparing": table(
        "chosen by",
        RULES,
        {
            "points lost": "{tasks.ROW_lost:.2f} ± {tasks.ROW_lost.stderr:.2f}",
            "worst": "{tasks.ROW_lost.worst:.1f}",
            "`compare_models` minus this": "{tasks.compare_lost.minus[ROW_lost].interval:+.2f}",
            "τ": "{tasks.ROW_tau:.2f} ± {tasks.ROW_tau.stderr:.2f}",
            "`compare_models` minus this, τ": "{tasks.compare_tau.minus[ROW_tau].interval:+.2f}",
        },
    ),
    "comparing by kind": table(
        "points lost", RULES, across(KINDS, "{COLUMN.ROW_lost:.2f} ± {COLUMN.ROW_lost.stderr:.2f}")
    ),
    "comparing, tau": table("τ", RULES, across(KINDS, "{COLUMN.ROW_tau:.2f} ± {COLUMN.ROW_tau.stderr:.2f}")),
    "comparing, may be best": """
`may_be_best` left {tasks.may_be_best:.1f} of {tasks.num_models:.1f} models, and the best one of the test was among
them in {tasks.has_best.percent:.0f} % of the tasks; the best of those left lost {tasks.left_lost:.2f} points, never
more than {tasks.left_lost.worst:.1f}.""",
    "comparing, with labels": """
With labels, beside the same labels by themselves: {tasks.both_50_lost.minus[labels_50_lost].interval:+.2f} points lost
with 50 labels, {tasks.both_100_lost.minus[labels_100_lost].interval:+.2f} with 100,
{tasks.both_200_lost.minus[labels_200_lost].interval:+.2f} with 200.""",
}
