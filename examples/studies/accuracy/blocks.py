"""What pages tell of this study: which epoch to take, by the kind of label noise."""

from pathlib import Path
from typing import Any

import numpy as np
from summaries import Number, Runs, across, lines, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
PEOPLE = RUNS.where("labels == 'people'")
NOISY = RUNS.where("labels != 'correct'")
NAMES: dict[str, Any] = {
    "all": RUNS,
    "noisy": NOISY,
    "people": PEOPLE,
    "people_scratch": PEOPLE.where("not is_fine_tuned"),
    "people_tuned": PEOPLE.where("is_fine_tuned"),
    "people_augmented": PEOPLE.where("is_augmented"),
    "people_worse": PEOPLE.where("share_wrong > 0.3"),
    "at_random": RUNS.where("labels == 'random'"),
    "by_class": RUNS.where("labels == 'by class'"),
    "correct": RUNS.where("labels == 'correct'"),
    "better": NOISY.where("criterion_accuracy_lost < never_stop_accuracy_lost"),
    "equal": NOISY.where("criterion_accuracy_lost == never_stop_accuracy_lost"),
    "worse": NOISY.where("criterion_accuracy_lost > never_stop_accuracy_lost"),
    "with_sensitivity": RUNS.where("sensitivity_lowest_epoch.notna()"),
}

GROUPS = {
    "wrong by people ({people.count} runs)": "people",
    "wrong at random ({at_random.count})": "at_random",
    "wrong by class ({by_class.count})": "by_class",
    "correct ({correct.count})": "correct",
}
WRONG = {label: name for label, name in GROUPS.items() if name != "correct"}
PARTS = {
    "from scratch ({people_scratch.count})": "people_scratch",
    "fine-tuned ({people_tuned.count})": "people_tuned",
    "augmented, with a schedule ({people_augmented.count})": "people_augmented",
}
WITHOUT_LABELS = {
    "last epoch": "never_stop",
    "**the criterion**": "criterion",
    "the criterion before (commit 71489a3)": "criterion_before",
    "the estimate": "estimate",
    "the score on training samples": "training_score",
    "the reference by itself": "reference",
    "the criterion with the reference's votes (not adopted)": "criterion_with_votes",
    "the true score (out of reach)": "true_score",
    "the true refined score (out of reach)": "true_refined_score",
}
WITH_A_TENTH = {
    "a tenth held out: last epoch": "held_out_never_stop",
    "its Brier score": "held_out_score",
    "its log-loss": "held_out_loss",
    "its error": "held_out_error",
    "its refined score": "held_out_refined",
    "**the criterion, `validation_labels=True`**": "held_out_criterion",
    "the same before (commit 71489a3; 600 unlabelled samples more)": "held_out_criterion_before",
}
COUNTS = {"20": "20", "50": "50", "100": "100", "200": "200"}
BY_SENSITIVITY = {
    "last epoch": "never_stop",
    "lowest sensitivity": "sensitivity_lowest",
    "lowest Equation 9": "equation_9",
    "knee of log S": "sensitivity_knee",
    "**criterion**": "criterion",
}
DECIDED_BY = {
    "last epoch": "never_stop",
    "**criterion**, unlabelled samples": "criterion",
    "**criterion**, a tenth held out with its labels": "held_out_criterion",
    "that tenth by itself, refined score": "held_out_refined",
}


def worth_in_labels(runs: Runs) -> Number:
    """How many noisy labels choose as well by their refined score: interpolated between those that were tried."""
    tried = [int(count) for count in COUNTS]
    lost = [getattr(runs, f"noisy_labels_{count}_refined_accuracy_lost").mean for count in tried]
    known = np.minimum.accumulate(lost)[::-1]  # more labels are not worse
    return Number(np.exp(np.interp(runs.criterion_accuracy_lost.mean, known, np.log(tried)[::-1])))


NAMES["worth"] = {name: worth_in_labels(NAMES[name]) for name in GROUPS.values()}

# %% Cells: in `LOST`, a row is a rule and a column a group; in the others it is the other way round.
LOST = "{COLUMN.ROW_accuracy_lost:.1f} / {COLUMN.ROW_loss_regret:.0f}"
LOST_OF_ROW = "{ROW.COLUMN_accuracy_lost:.1f}"
BY_LABELS = (
    "{ROW.noisy_labels_COLUMN_score_accuracy_lost:.1f} / {ROW.noisy_labels_COLUMN_refined_accuracy_lost:.1f}"
    " / {ROW.noisy_labels_COLUMN_error_accuracy_lost:.1f}"
)
DIFFERENCE = "{ROW.COLUMN.interval:+.1f}"
BLOCKS = {
    # The report of the study.
    "accuracy in short": """
**Missed**: with a tenth held out, runs with labels wrong at random lose
{at_random.held_out_criterion_accuracy_lost:.1f} points (2.0 asked for), by class
{by_class.held_out_criterion_accuracy_lost:.1f} (2.2), and with correct labels
{correct.held_out_criterion_accuracy_lost:.1f} (0.2 more than never stopping: {correct.never_stop_accuracy_lost:.1f}):
a tenth less to train on costs {correct.held_out_never_stop_accuracy_lost.minus[never_stop_accuracy_lost]:.1f} there.

**Met**, of {all.count} runs:

- **labels by people** ({people.count}): the criterion loses {people.criterion_accuracy_lost:.1f} points,
never stopping {people.never_stop_accuracy_lost:.1f}; a tenth with the monitor
{people.held_out_criterion_accuracy_lost:.1f}, by its own refined score {people.held_out_refined_accuracy_lost:.1f}.
The test loss is {people.criterion_loss_regret:.0f} % above
its lowest, after division by the temperature {people.criterion_calibrated_loss_regret:.0f} %, never stopping
{people.never_stop_loss_regret:.0f} %;
- **wrong at random** ({at_random.count}) {at_random.criterion_accuracy_lost:.1f} (1.7 asked for), **by class**
({by_class.count}) {by_class.criterion_accuracy_lost:.1f} (2.5), **correct** ({correct.count})
{correct.criterion_accuracy_lost:.1f} (never stopping {correct.never_stop_accuracy_lost:.1f}).

In noisy labels, chosen by their refined score, the criterion is worth {worth[people]:.0f} (by people),
{worth[at_random]:.0f} (at random), {worth[by_class]:.0f} (by class).""",
    "accuracy by noise": "\n".join(
        [
            table("accuracy lost / loss regret", WITHOUT_LABELS, across(GROUPS, LOST)),
            lines(WITH_A_TENTH, across(GROUPS, LOST)),
        ]
    ),
    "accuracy on labels by people": table(
        "accuracy lost / loss regret", WITHOUT_LABELS | WITH_A_TENTH, across(PARTS, LOST)
    ),
    "labels by themselves": table("Brier score / refined / error", GROUPS, across(COUNTS, BY_LABELS)),
    "differences": table(
        "points of accuracy lost",
        GROUPS,
        {
            "criterion − never stopping": DIFFERENCE.replace(
                "COLUMN", "criterion_accuracy_lost.minus[never_stop_accuracy_lost]"
            ),
            "criterion − that before": DIFFERENCE.replace(
                "COLUMN", "criterion_accuracy_lost.minus[criterion_before_accuracy_lost]"
            ),
            "a tenth with the monitor − its refined score": DIFFERENCE.replace(
                "COLUMN", "held_out_criterion_accuracy_lost.minus[held_out_refined_accuracy_lost]"
            ),
            "a tenth: refined − Brier score": DIFFERENCE.replace(
                "COLUMN", "held_out_refined_accuracy_lost.minus[held_out_score_accuracy_lost]"
            ),
        },
    ),
    # Other pages.
    "worth in README": table("training labels", GROUPS, across(DECIDED_BY, LOST_OF_ROW))
    + """

The two right columns train on nine tenths of the samples. At the last epoch, that alone costs
{noisy.held_out_never_stop_accuracy_lost.minus[never_stop_accuracy_lost]:.1f} points with wrong labels and
{correct.held_out_never_stop_accuracy_lost.minus[never_stop_accuracy_lost]:.1f} with correct ones; unlabelled samples
cost nothing. With wrong labels, the criterion (unlabelled) is better than the last epoch in {better.count} runs, equal
in {equal.count}, worse in {worse.count}. One run in ten loses {noisy.criterion_accuracy_lost.p90:.1f} points or
more.""",
    "worth": table(
        "accuracy lost / loss regret",
        {
            "last epoch": "never_stop",
            "**criterion**, unlabelled samples": "criterion",
            "**criterion**, a tenth held out, `validation_labels=True`": "held_out_criterion",
            "a tenth held out, by its refined score": "held_out_refined",
            "a tenth held out, by its Brier score": "held_out_score",
            "the estimate": "estimate",
            "second opinion by itself": "reference",
        },
        across(GROUPS, LOST),
    )
    + """

With wrong labels ({noisy.count} runs), the criterion on unlabelled samples is better than the last epoch in
{better.count} runs, equal in {equal.count}, worse in {worse.count}. It loses {noisy.criterion_accuracy_lost:.1f}
points (median {noisy.criterion_accuracy_lost.median:.1f}); compared with the last epoch, that is
{noisy.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}. On labels by people it is
{people.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}, and with a tenth held out
{people.held_out_criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}. With correct labels, it is
{correct.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}. It is worth
{worth[at_random]:.0f} noisy labels where labels are wrong at random, {worth[by_class]:.0f} by class,
{worth[people]:.0f} by people.""",
    "calibrated": table(
        "loss regret, logits divided by the temperature",
        {
            "last epoch": "never_stop",
            "**criterion**, unlabelled samples": "criterion",
            "**criterion**, a tenth held out, `validation_labels=True`": "held_out_criterion",
        },
        across(WRONG, "{COLUMN.ROW_calibrated_loss_regret:.0f}"),
    )
    + """

With correct labels and unlabelled samples, dividing made it worse ({correct.criterion_loss_regret:.0f} to
{correct.criterion_calibrated_loss_regret:.0f} %). So the temperature is now 1, unless noise is found or validation
labels are given.""",
    "limits": """
- **One run in ten** with noisy labels loses {noisy.criterion_accuracy_lost.p90:.1f} or more points of accuracy; the
worst loses {noisy.criterion_accuracy_lost.worst:.0f}.
- **A tenth held out** costs training samples: at the last epoch
{noisy.held_out_never_stop_accuracy_lost.minus[never_stop_accuracy_lost]:.1f} points with noisy labels,
{correct.held_out_never_stop_accuracy_lost.minus[never_stop_accuracy_lost]:.1f} with correct ones. Unlabelled samples
cost nothing.""",
    "tenth in labels": """
A tenth with the monitor loses no more accuracy than its refined score by itself: with labels by people
{people.held_out_criterion_accuracy_lost:.1f} and {people.held_out_refined_accuracy_lost:.1f} points, wrong at random
{at_random.held_out_criterion_accuracy_lost:.1f} and {at_random.held_out_refined_accuracy_lost:.1f}, by class
{by_class.held_out_criterion_accuracy_lost:.1f} and {by_class.held_out_refined_accuracy_lost:.1f}, correct
{correct.held_out_criterion_accuracy_lost:.1f} and {correct.held_out_refined_accuracy_lost:.1f}.""",
    "labels in labels": """
200 extra noisy labels lose, by their refined score, {people.noisy_labels_200_refined_accuracy_lost:.1f} points (by
people), {at_random.noisy_labels_200_refined_accuracy_lost:.1f} (at random) and
{by_class.noisy_labels_200_refined_accuracy_lost:.1f} (by class).""",
    "augmented in stopping": """
On {people_augmented.count} such runs with labels by people (at most 10,000 images), the last epoch lost
{people_augmented.never_stop_accuracy_lost:.1f} points, and the criterion
{people_augmented.criterion_accuracy_lost:.1f}.""",
    "features in finetuning": table(
        "accuracy lost, points",
        {"labels by people, a pretrained body with `features=` ({people_tuned.count} runs)": "people_tuned"},
        across(DECIDED_BY, LOST_OF_ROW),
    ),
    "stop by sensitivity": table(
        "accuracy lost / loss regret, {with_sensitivity.count} runs",
        BY_SENSITIVITY,
        {
            "mean": "{with_sensitivity.ROW_accuracy_lost:.1f} / {with_sensitivity.ROW_loss_regret:.0f}",
            "median": "{with_sensitivity.ROW_accuracy_lost.median:.1f} / {with_sensitivity.ROW_loss_regret.median:.0f}",
        },
    ),
    "sensitivity in README": """
The epoch of the lowest sensitivity lost {with_sensitivity.sensitivity_lowest_accuracy_lost:.0f} points of accuracy,
the last epoch {with_sensitivity.never_stop_accuracy_lost:.1f}.""",
}
