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
NAMES = {"tasks": RUNS, "mnist": RUNS.where("task == 5"), "diamonds": RUNS.where("task == 15")} | {
    name: RUNS.where(f"kind == '{kind}'") for kind, name in KINDS.items()
}
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
}
POINTS = across({"all": "tasks"} | KINDS, "{COLUMN.ROW_lost:.2f}")
BLOCKS = {
    "tuning": table("chosen by", IN_SHORT, POINTS | {"worst task": "{tasks.ROW_lost.worst:.1f}"})
    + """

Points of test accuracy lost against the best of 5 to 7 models, on {tasks.count} random tasks.""",
    "comparing in short": """
- **On {tasks.count} tasks, its first model loses {tasks.compare_lost:.2f} ± {tasks.compare_lost.stderr:.2f} points of
accuracy against the best of 5 to 7**, as much as by 100 noisy labels ({tasks.labels_100_lost:.2f}; paired difference
{tasks.compare_lost.minus[labels_100_lost].interval:+.2f}). It ranks better than they do: τ {tasks.compare_tau:.2f}
for {tasks.labels_100_tau:.2f} ({tasks.compare_tau.minus[labels_100_tau].interval:+.2f}).
- **With 100 noisy labels it loses {tasks.both_100_lost:.2f}**, the labels alone {tasks.labels_100_lost:.2f}
({tasks.both_100_lost.minus[labels_100_lost].interval:+.2f}); with 50
{tasks.both_50_lost.minus[labels_50_lost].interval:+.2f}, with 200
{tasks.both_200_lost.minus[labels_200_lost].interval:+.2f}, which shows nothing.
- The models' own confidence is a trap: {tasks.confidence_lost:.2f}, on photos by people {people.confidence_lost:.2f},
where a model drawn at random loses {people.random_lost:.2f}.
- **Not better** than the refined score on 100 noisy labels ({tasks.refined_100_lost:.2f}; difference
{tasks.compare_lost.minus[refined_100_lost].interval:+.2f}), 200 labels
({tasks.compare_lost.minus[labels_200_lost].interval:+.2f}), or the refined distance from the reference
({tasks.compare_lost.minus[distance_lost].interval:+.2f}).
- The mean of all models' probabilities, in place of a choice, loses {tasks.mean_of_all_lost:.2f}
({tasks.compare_lost.minus[mean_of_all_lost].interval:+.2f}).""",
    "comparing, fails": """
Where a model is better than the reference, the reference prefers one that errs as it does. The worst two: on MNIST
(task 5), a wide network before the best, convolutional one, {mnist.compare_lost.only:.1f} points lost, cured by 100
labels ({mnist.both_100_lost.only:.1f}); on `diamonds` (task 15) {diamonds.compare_lost.only:.1f}, not cured
({diamonds.both_100_lost.only:.1f}; by the labels alone {diamonds.labels_100_lost.only:.1f}).""",
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
}
