"""What pages tell of these tasks."""

from pathlib import Path

from summaries import Runs, across, table

FIRST_OF_CHECK = 72  # as in `judges.py`
ALL_RUNS = Runs.read(Path(__file__).with_name("results.csv"))
RUNS = ALL_RUNS.where("criterion == 'today'")
NAMES = {
    "tasks": RUNS,
    "estimate": ALL_RUNS.where("criterion == 'estimate'"),
    "large_estimate": ALL_RUNS.where("criterion == 'estimate' and n >= 3000"),
    "first": ALL_RUNS.where("criterion == '71489a3'"),
    "first_check": ALL_RUNS.where(f"criterion == '71489a3' and task >= {FIRST_OF_CHECK}"),
    "large_first": ALL_RUNS.where("criterion == '71489a3' and n >= 3000"),
    "design": RUNS.where(f"task < {FIRST_OF_CHECK}"),
    "check": RUNS.where(f"task >= {FIRST_OF_CHECK}"),
    "small": RUNS.where("n < 3000"),
    "large": RUNS.where("n >= 3000"),
    "several": RUNS.where("families == 'several'"),
    "one": RUNS.where("families == 'one'"),
    "correct": RUNS.where("labels == 'correct'"),
    "noise": RUNS.where("labels == 'random'"),
    "by_class": RUNS.where("labels == 'by class'"),
    "people": RUNS.where("labels == 'people'"),
    "images": RUNS.where("kind in ('small images', 'large images')"),
    "tables": RUNS.where("kind in ('small tables', 'large tables')"),
    "texts": RUNS.where("kind == 'texts'"),
    "fine_tuned": RUNS.where("kind == 'fine-tuned'"),
}
NUMBERS = (20, 50, 100, 200)
RULES = {
    "**the jury with the reference**": "jury",
    "the class of the mean of the models, no reference": "jury_without_reference",
    "agreement with the reference alone": "reference",
    "`consensus_error`, as it was": "consensus_error",
    "lowest `risk_criterion`": "criterion",
    "*the jury, plus twice the criterion*": "jury_and_criterion",
    "mean confidence": "confidence",
    "at random": "random",
}
NOISY = {f"{number} noisy labels": f"labels_{number}_noisy" for number in NUMBERS}
CORRECT = {f"{number} correct labels": f"labels_{number}_correct" for number in NUMBERS}
WITH_LABELS = {f"the jury and {number} noisy labels": f"jury_and_{number}_labels" for number in NUMBERS}
IN_PLACE = {
    "the mean of all models' probabilities, in place of a choice": "mean_of_all",
    "the same with the reference": "mean_with_reference",
}
LABELS = {"correct": "correct", "at random": "noise", "by class": "by_class", "by people": "people"}
KINDS = {"images": "images", "tables": "tables", "texts": "texts", "fine-tuned": "fine_tuned"}
ALL = RULES | NOISY | CORRECT | WITH_LABELS
LOST, AGAINST_100 = (
    "{tasks.ROW_accuracy_lost.interval:.2f}",
    ("{tasks.ROW_accuracy_lost.minus[labels_100_noisy_accuracy_lost].interval:+.2f}"),
)
LARGE, TAU = "{large.ROW_accuracy_lost.interval:.2f}", "{{{}.ROW_tau.interval:.2f}}"

BLOCKS = {
    "tuning": table(
        "chosen by",
        {
            "`compare_models` with `training=`": "jury",
            "without": "jury_without_reference",
            "lowest estimate": "criterion",
            "the sum of both, chosen on part of these tasks": "jury_and_criterion",
            "mean confidence": "confidence",
            "50 noisy labels": "labels_50_noisy",
            "200 noisy labels": "labels_200_noisy",
            "*the mean of all models*": "mean_of_all",
        },
        across({"all tasks": "estimate", "3,000 samples or more": "large_estimate"}, "{COLUMN.ROW_accuracy_lost:.1f}")
        | {"worst task": "{estimate.ROW_accuracy_lost.worst:.0f}"},
    )
    + """

Points of test accuracy lost against the best of 6 to 8 models, {tasks.count} random tasks.""",
    "tuning, optuna": """
Let a trial return its lowest `val/risk_estimate` and keep that checkpoint, and compare the ten best in the end. Don't
return `val/risk_criterion`: it is for the epochs of one run, and across runs the lowest one loses
{tasks.criterion_accuracy_lost:.1f} points, the lowest estimate {estimate.criterion_accuracy_lost:.1f}, and the sum
{estimate.jury_and_criterion_accuracy_lost:.1f}.""",
    "comparing, missed": """
- At {large.count} tasks with 3,000 samples or more, the jury loses {large.jury_accuracy_lost.interval:.1f} points, and
the lowest criterion {large.criterion_accuracy_lost.interval:.1f}: a difference of
{large.jury_accuracy_lost.minus[criterion_accuracy_lost].interval:+.1f}, and an interval below 0 was promised.
- Over all {tasks.count} tasks the jury loses {tasks.jury_accuracy_lost.interval:.2f} points, and at most 1.5 were
promised (with the criterion of 71489a3 it was {first.jury_accuracy_lost:.2f}); the lowest criterion loses
{tasks.criterion_accuracy_lost.interval:.2f}.
- Against mean confidence it is {large.jury_accuracy_lost.minus[confidence_accuracy_lost].interval:+.1f} at 3,000
samples or more ({large_first.jury_accuracy_lost.minus[confidence_accuracy_lost].interval:+.1f} with the criterion
of 71489a3); an interval below 0 was promised.
- Its τ is {several.jury_tau.interval:.2f} where candidates are of several families, and 0.75 were promised. Labels
reach {several.labels_100_noisy_tau:.2f} (100 noisy ones) and {several.labels_200_correct_tau:.2f} (200
correct ones) on these tasks.""",
    "comparing, kept": """
- Against 100 noisy labels it is {tasks.jury_accuracy_lost.minus[labels_100_noisy_accuracy_lost].interval:+.2f}
points, where 0 or less was promised; below 3,000 samples
{small.jury_accuracy_lost.minus[labels_100_noisy_accuracy_lost].interval:+.2f}, and
{small.jury_accuracy_lost.minus[criterion_accuracy_lost].interval:+.2f} against the lowest criterion.
- What was there before, `consensus_error`, loses {tasks.consensus_error_accuracy_lost:.1f}: the jury
{tasks.jury_accuracy_lost.minus[consensus_error_accuracy_lost].interval:+.1f}.
- The mean of all models and the reference is
{tasks.mean_with_reference_accuracy_lost.interval:.1f} points from the best model (below 0: better).""",
    "comparing, check": """
On the {check.count} tasks of the check the sum loses {check.jury_and_criterion_accuracy_lost.interval:.2f} points, the
jury {check.jury_accuracy_lost.interval:.2f}, the lowest criterion {check.criterion_accuracy_lost.interval:.2f}, and 100
noisy labels {check.labels_100_noisy_accuracy_lost.interval:.2f}: the sum minus the jury is
{check.jury_and_criterion_accuracy_lost.minus[jury_accuracy_lost].interval:+.2f}, minus the criterion
{check.jury_and_criterion_accuracy_lost.minus[criterion_accuracy_lost].interval:+.2f}. With the criterion of 71489a3,
for which it was chosen, these are
{first_check.jury_and_criterion_accuracy_lost.minus[jury_accuracy_lost].interval:+.2f} and
{first_check.jury_and_criterion_accuracy_lost.minus[criterion_accuracy_lost].interval:+.2f}. So the check does not show
that it helps. On all tasks, those of the design among them, it is
{tasks.jury_and_criterion_accuracy_lost.minus[jury_accuracy_lost].interval:+.2f} and
{tasks.jury_and_criterion_accuracy_lost.minus[criterion_accuracy_lost].interval:+.2f}, and the worst task loses
{tasks.jury_and_criterion_accuracy_lost.worst:.0f} points, for {tasks.jury_accuracy_lost.worst:.0f} by the jury and
{tasks.criterion_accuracy_lost.worst:.0f} by the criterion.""",
    "comparing, scores": table(
        "chosen by",
        {
            "the jury with the reference": "jury",
            "the lowest score": "criterion",
            "the jury, plus twice the score": "jury_and_criterion",
        },
        {
            "`risk_criterion` of today": "{tasks.ROW_accuracy_lost.interval:.2f}",
            "that of 71489a3": "{first.ROW_accuracy_lost.interval:.2f}",
            "`risk_estimate`": "{estimate.ROW_accuracy_lost.interval:.2f}",
            "today's, n ≥ 3,000": "{large.ROW_accuracy_lost:.2f}",
            "71489a3, n ≥ 3,000": "{large_first.ROW_accuracy_lost:.2f}",
            "estimate, n ≥ 3,000": "{large_estimate.ROW_accuracy_lost:.2f}",
        },
    ),
    "comparing": table(
        "chosen by", ALL | IN_PLACE, {"points lost": LOST, "minus 100 noisy labels": AGAINST_100, "n ≥ 3,000": LARGE}
    ),
    "comparing by labels": table(
        "chosen by", ALL | IN_PLACE, across(LABELS | {"n < 3,000": "small"}, "{COLUMN.ROW_accuracy_lost:.2f}")
    ),
    "comparing by kind": table("chosen by", RULES | NOISY | IN_PLACE, across(KINDS, "{COLUMN.ROW_accuracy_lost:.2f}")),
    "comparing, tau": table(
        "ranked by", ALL, {"several families": TAU.format("several"), "one family": TAU.format("one")}
    ),
}
