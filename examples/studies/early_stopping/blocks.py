"""What pages tell of this study: groups of its runs, and the tables and sentences about them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from summaries import Number, Runs, across, lines, table

# %% Groups of runs.
RUNS = Runs.read(Path(__file__).with_name("results.csv"))
ALL = RUNS.where("pool != 'larger'")
NOISY, CORRECT = ALL.where("is_noisy"), ALL.where("not is_noisy")
TUNED = ALL.where("pool == 'fine-tuning'")
NAMES: dict[str, object] = {
    "all": ALL,
    "noisy": NOISY,
    "correct": CORRECT,
    "larger": RUNS.where("pool == 'larger'"),
    "random": NOISY.where("pool == 'random'"),
    "as_built": NOISY.where("pool == 'as built'"),
    "tables": NOISY.where("pool == 'tables'"),
    "tuned": TUNED,
    "tuned_noisy": TUNED.where("is_noisy"),
    "tuned_correct": TUNED.where("not is_noisy"),
    "tuned_whole": TUNED.where("not has_frozen_body"),
    "tuned_head": TUNED.where("has_frozen_body"),
    "small": NOISY.where("n < 400"),
    "at_random": NOISY.where("labels == 'random'"),
    "by_class": NOISY.where("labels == 'by class'"),
    "by_people": NOISY.where("labels == 'people'"),
    "people_worse": RUNS.where("labels == 'people' and share_wrong > 0.3"),
    "agrees": NOISY.where("reference_says == 'agree'"),
    "disagrees": NOISY.where("reference_says == 'disagree'"),
    "no_reference": NOISY.where("reference_says == 'no reference'"),
    "noisy_said_wrong": NOISY.where("said_of_labels == 'wrong'"),
    "noisy_said_clean": NOISY.where("said_of_labels == 'no noise'"),
    "noisy_said_nothing": NOISY.where("said_of_labels == 'nothing'"),
    "correct_said_wrong": CORRECT.where("said_of_labels == 'wrong'"),
    "correct_said_clean": CORRECT.where("said_of_labels == 'no noise'"),
    "correct_said_nothing": CORRECT.where("said_of_labels == 'nothing'"),
}


# %% Numbers that need more than a mean.
def worth_in_labels(runs: Runs, rule: str) -> Number:
    """How many noisy labels choose as well by their Brier score: interpolated between those that were tried."""
    tried = (10, 20, 50, 100, 200, 400)
    lost = [getattr(runs, f"noisy_labels_{count}_accuracy_lost").mean for count in tried]
    known = np.minimum.accumulate(lost)[::-1]  # more labels are not worse
    mean = getattr(runs, f"{rule}_accuracy_lost").mean
    return Number(np.exp(np.interp(mean, known, np.log(tried)[::-1])))


def found_noise(runs: Runs, column: str) -> dict[str, Number | int]:
    """How well a share of noisy labels is found, in points: AUC for noisy against correct runs, and mean errors."""
    frame = runs.frame[runs.frame[column].notna()]
    noisy, correct = frame[frame["is_noisy"]], frame[~frame["is_noisy"]]
    above = noisy[column].to_numpy()[:, None] - correct[column].to_numpy()
    errors = 100 * (frame[column] - frame["share_wrong"]).abs()
    return {
        "runs": len(frame),
        "auc": Number((above > 0).mean() + 0.5 * (above == 0).mean()),
        "error": Number(errors.mean()),
        "error_noisy": Number(errors[frame["is_noisy"]].mean()),
        "found_in_correct": Number(100 * correct[column].mean()),
    }


FOUND_BY = {
    "**the monitor**": "label_noise",
    "cleanlab, on the reference's predictions": "cleanlab_off_diagonal_reference",
    "the same, calibrated": "cleanlab_calibrated_reference",
    "the labels that it lists": "cleanlab_issues_reference",
    "the leave-one-out error": "noise_by_leave_one_out",
    "**the monitor**, on fewer runs": "label_noise_of_fewer",
    "cleanlab, five networks, best epoch": "cleanlab_off_diagonal_best_epoch",
    "the same, labels that it lists": "cleanlab_issues_best_epoch",
    "cleanlab, five networks, last epoch": "cleanlab_off_diagonal_last_epoch",
}
FEWER = ALL.where("cleanlab_issues_last_epoch.notna()")  # for these, five networks were trained
NAMES["worth"] = {"criterion": worth_in_labels(NOISY, "criterion")}
NAMES["found"] = {column: found_noise(ALL, column) for column in FOUND_BY.values() if column in ALL.frame}
NAMES["found"] |= {"label_noise_of_fewer": found_noise(FEWER, "label_noise")}


# %% What was asked for before the runs were made (issue 41).
class Target(NamedTuple):
    what: str
    bound: float
    reached: float
    is_least: bool = False  # at least the bound, and not at most

    @property
    def is_met(self) -> bool:
        return self.reached >= self.bound if self.is_least else self.reached <= self.bound


def targets() -> list[Target]:
    lost, by_correct = NOISY.criterion_accuracy_lost, CORRECT.criterion_accuracy_lost
    agrees, disagrees = NOISY.where("reference_says == 'agree'"), NOISY.where("reference_says == 'disagree'")
    loss_agreed, loss_disagreed = (float(runs.criterion_accuracy_lost.mean) for runs in (agrees, disagrees))
    wrong = NOISY.where("share_wrong >= 0.08").frame["said_of_labels"]
    tuned, without = TUNED.criterion_accuracy_lost, "criterion_without_features_accuracy_lost"
    never = CORRECT.never_stop_accuracy_lost.mean
    return [
        Target("noisy labels: accuracy lost", 1.5, lost.mean),
        Target("compared with never stopping, upper end", 0, lost.minus["never_stop_accuracy_lost"].high),
        Target("compared with 10 % held out, upper end", 0, lost.minus["held_out_brier_accuracy_lost"].high),
        Target("exceeded by one run in ten", 4, lost.p90),
        Target("correct labels: accuracy lost (0.2 more than never stopping)", never + 0.2, by_correct.mean),
        Target(
            "loss regret (half of never stopping's)",
            CORRECT.never_stop_loss_regret.mean / 2,
            CORRECT.criterion_loss_regret.mean,
        ),
        Target("the reference agrees in noisy runs, %", 50, 100 * agrees.count / NOISY.count, is_least=True),
        Target("accuracy lost there", 1.2, loss_agreed),
        Target("more lost where it disagrees", 1.3, loss_disagreed - loss_agreed, is_least=True),
        Target("lost there with 50 noisy labels", 2, disagrees.criterion_noisy_labels_50_accuracy_lost.mean),
        Target("no noise found, of runs with 8 % noisy labels or more, %", 2, 100 * (wrong == "no noise").mean()),
        Target(
            "labels look wrong, of runs with correct ones, %",
            10,
            100 * (CORRECT.frame["said_of_labels"] == "wrong").mean(),
        ),
        Target("share of noisy labels: error, points", 6, found_noise(ALL, "label_noise")["error"]),
        Target("fine-tuning: accuracy lost", 1, tuned.mean),
        Target("compared with no `features=`, upper end", 0, tuned.minus[without].high),
    ]


def lines_of_targets() -> str:
    told = []
    for target in targets():
        bound = f"{'at least' if target.is_least else 'at most'} {Number(target.bound):.1f}"
        told.append(
            f"| {target.what} | {bound} | {Number(target.reached):.2f} | {'met' if target.is_met else '**missed**'} |"
        )
    return "\n".join(told)


NAMES["targets"] = {"met": sum(target.is_met for target in targets()), "set": len(targets())}


# %% Rows and columns: what a page calls a rule or a group, and its name.
RULES = {
    "never stopping": "never_stop",
    "**the criterion**": "criterion",
    "the estimate": "estimate",
    "the estimate without the reference": "estimate_without_reference",
    "the reference by itself": "reference",
    "10 % held out, by its Brier score": "held_out_brier",
    "10 % held out, by its loss": "held_out_loss",
    "10 % held out, with `validation_labels=True`": "held_out_criterion",
    "20 noisy labels": "noisy_labels_20",
    "50 noisy labels": "noisy_labels_50",
    "100 noisy labels": "noisy_labels_100",
    "gradient disparity": "gradient_disparity",
    "Label Wave": "label_wave",
    "the true score (out of reach)": "true_score",
}
REGRETS = {
    "loss regret: never stopping": "never_stop",
    "loss regret: **the criterion**": "criterion",
    "loss regret: the estimate": "estimate",
    "loss regret: 10 % held out, by its Brier score": "held_out_brier",
}
RULES_OF_TUNING = {
    "never stopping": "never_stop",
    "**the criterion**": "criterion",
    "the criterion, without `features=`": "criterion_without_features",
    "the estimate": "estimate",
    "the estimate without the reference": "estimate_without_reference",
    "10 % held out, by its Brier score": "held_out_brier",
    "10 % held out, with `validation_labels=True`": "held_out_criterion",
    "50 noisy labels": "noisy_labels_50",
    "the true score (out of reach)": "true_score",
}
POOLS = {
    "random ({random.count})": "random",
    "as built ({as_built.count})": "as_built",
    "tables ({tables.count})": "tables",
    "fine-tuning ({tuned_noisy.count})": "tuned_noisy",
}
GROUPS = {
    **POOLS,
    "**all noisy** ({noisy.count})": "noisy",
    "**correct** ({correct.count})": "correct",
    "larger ({larger.count})": "larger",
}
PARTS_OF_TUNING = {
    "all ({tuned.count})": "tuned",
    "noisy ({tuned_noisy.count})": "tuned_noisy",
    "correct ({tuned_correct.count})": "tuned_correct",
    "all weights ({tuned_whole.count})": "tuned_whole",
    "head ({tuned_head.count})": "tuned_head",
}
SAID = {"labels look wrong": "said_wrong", "no noise found": "said_clean", "can't tell": "said_nothing"}
COUNTS = {"20": "20", "50": "50", "100": "100"}

# %% Cells. In `LOST` and `REGRET` a row is a rule and a column a group; in the others it is the other way round.
LOST = "{COLUMN.ROW_accuracy_lost:.1f} ({COLUMN.ROW_accuracy_lost.median:.1f})"
REGRET = "{COLUMN.ROW_loss_regret:.1f}"
LOST_OF_ROW = "{ROW.COLUMN_accuracy_lost:.1f}"
WITH_MEDIAN = "{ROW.COLUMN_accuracy_lost:.1f} ({ROW.COLUMN_accuracy_lost.median:.1f})"
NO_LABELS = {"none": "{ROW.criterion_accuracy_lost:.1f}"}
NOISY_LABELS = "{ROW.noisy_labels_COLUMN_accuracy_lost:.1f} / {ROW.criterion_noisy_labels_COLUMN_accuracy_lost:.1f}"
CORRECT_LABELS = NOISY_LABELS.replace("noisy", "correct")
BY_NOISY_LABELS = NO_LABELS | across(COUNTS, NOISY_LABELS)
BY_CORRECT_LABELS = NO_LABELS | across(COUNTS, CORRECT_LABELS)


# %% What pages have.
BLOCKS = {
    # The report of the study.
    "in short": """
- **With noisy labels** ({noisy.count} runs) the criterion loses {noisy.criterion_accuracy_lost:.1f} points of accuracy
(median {noisy.criterion_accuracy_lost.median:.1f}), never stopping {noisy.never_stop_accuracy_lost:.1f}
({noisy.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f} for the criterion), a hold-out of 10 %
{noisy.held_out_brier_accuracy_lost:.1f}
({noisy.criterion_accuracy_lost.minus[held_out_brier_accuracy_lost].interval:+.1f}), the reference by itself
{noisy.reference_accuracy_lost:.1f}. It is worth {worth[criterion]:.0f} labels as noisy as training's. Without the
reference it loses {noisy.estimate_without_reference_accuracy_lost:.1f}. The test loss is
{noisy.criterion_loss_regret:.1f} % above the lowest, never stopping {noisy.never_stop_loss_regret:.1f} %.
- **With correct labels** ({correct.count}) nothing is gained in accuracy: {correct.criterion_accuracy_lost:.1f}, never
stopping {correct.never_stop_accuracy_lost:.1f}
({correct.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}); the test loss is
{correct.criterion_loss_regret:.1f} % above the lowest, never stopping {correct.never_stop_loss_regret:.1f} %.
- **The last line**: "no noise was found" is said of {noisy_said_clean.count} runs with noisy labels, and of
{correct_said_clean.count} of {correct.count} with correct ones. Where the reference agrees, noisy runs lose
{agrees.criterion_accuracy_lost:.1f} points, where it disagrees {disagrees.criterion_accuracy_lost:.1f}.
- **50 noisy labels** and the criterion lose {noisy.criterion_noisy_labels_50_accuracy_lost:.1f}, by themselves
{noisy.noisy_labels_50_accuracy_lost:.1f}.
- **Fine-tuning**: {tuned.criterion_accuracy_lost:.1f}, never stopping {tuned.never_stop_accuracy_lost:.1f}, and
{tuned.criterion_without_features_accuracy_lost:.1f} without `features=`.""",
    "without labels": "\n".join(
        [
            table("accuracy lost, mean (median)", RULES, across(GROUPS, LOST)),
            lines(REGRETS, across(GROUPS, REGRET)),
        ]
    ),
    "by agreement": table(
        "noisy labels",
        {"the reference agrees": "agrees", "it disagrees": "disagrees", "no reference": "no_reference"},
        {
            "runs": "{ROW.count}",
            **across({"the criterion": "criterion"}, WITH_MEDIAN),
            "90 %": "{ROW.criterion_accuracy_lost.p90:.1f}",
            **across({"never stopping": "never_stop", "10 % held out": "held_out_brier"}, WITH_MEDIAN),
            **across({"criterion and 50 labels": "criterion_noisy_labels_50"}, LOST_OF_ROW),
            **across({"true score": "true_score"}, WITH_MEDIAN),
        },
    ),
    "of agreement": """
The reference agrees if it would choose an epoch at most a twentieth of all validations away. Where "no noise was
found", the criterion is the training score, and the run's end is as good: {correct_said_clean.count} runs with correct
labels lose {correct_said_clean.criterion_accuracy_lost:.1f}, never stopping
{correct_said_clean.never_stop_accuracy_lost:.1f}; the other ones lose more than at the end (can't tell:
{correct_said_nothing.criterion_accuracy_lost:.1f} and {correct_said_nothing.never_stop_accuracy_lost:.1f}).""",
    "with labels": table(
        "labels",
        {
            **POOLS,
            "all noisy ({noisy.count})": "noisy",
            "noisy, the reference agrees ({agrees.count})": "agrees",
            "noisy, it disagrees ({disagrees.count})": "disagrees",
        },
        BY_NOISY_LABELS,
    )
    + "\n"
    + lines({"correct ({correct.count})": "correct"}, BY_CORRECT_LABELS),
    "fine-tuning": table("accuracy lost, mean (median)", RULES_OF_TUNING, across(PARTS_OF_TUNING, LOST)),
    "of fine-tuning": """
The features of the frozen backbone help:
{tuned.criterion_accuracy_lost.minus[criterion_without_features_accuracy_lost].interval:+.1f} against raw inputs. All
weights gain over never stopping ({tuned_whole.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}),
a new head does not ({tuned_head.criterion_accuracy_lost.minus[never_stop_accuracy_lost].interval:+.1f}).""",
    "what is said of labels": table(
        "the last line",
        SAID,
        across({"runs with noisy labels": "noisy", "with correct ones": "correct"}, "{COLUMN_ROW.count}"),
    ),
    "share of noisy labels": table(
        "share of noisy labels, by",
        FOUND_BY,
        {
            "runs": "{found[ROW][runs]}",
            "AUC": "{found[ROW][auc]:.2f}",
            "error, points": "{found[ROW][error]:.1f}",
            "of noisy runs": "{found[ROW][error_noisy]:.1f}",
            "found in correct labels": "{found[ROW][found_in_correct]:.1f}",
        },
    ),
    "targets": f"""
{{targets[met]}} of {{targets[set]}} are met:

| target | asked for | reached | |
|---|---|---|---|
{lines_of_targets()}

Seen afterwards, so no test: {{small.count}} noisy runs have under 400 samples (they lose
{{small.criterion_accuracy_lost:.1f}}), in {{by_class.count}} one class is turned into another
({{by_class.criterion_accuracy_lost:.1f}}). A new head on a frozen backbone gains nothing; why was not examined.""",
    # Other pages.
    "correct labels in labels": table(
        "{noisy.count} noisy runs: accuracy lost",
        {"correct labels by themselves": "correct_labels", "with the criterion": "criterion_correct_labels"},
        across(COUNTS, "{noisy.ROW_COLUMN_accuracy_lost:.1f}"),
    ),
    "share in labels": """
On {found[label_noise][runs]} runs, it was off by {found[label_noise][error]:.1f} points, so
below about 10 % it can't tell. Of labels by people, where
{people_worse.share_wrong.percent:.0f} % were wrong, it found {people_worse.label_noise.percent:.0f} %
({people_worse.count} runs). Where all labels are correct, it found {correct.label_noise.percent:.0f} %.""",
}
