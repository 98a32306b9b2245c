"""What pages tell of this study: which epoch to take, by the kind of label noise."""

from pathlib import Path

from summaries import Runs, across, lines, table

MEASURES = ["epoch", "accuracy_lost", "loss_regret", "calibrated_loss_regret"]
RUNS = Runs.read_long(Path(__file__).with_name("results.csv"), measures=MEASURES)
PEOPLE = RUNS.where("labels == 'people'")
NOISY = RUNS.where("labels != 'correct'")
NAMES: dict[str, object] = {
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
    "with_sensitivity": RUNS.where("sensitivity_lowest_epoch.notna()"),
}

GROUPS = {
    "wrong by people ({people.count} runs)": "people",
    "wrong at random ({at_random.count})": "at_random",
    "wrong by class ({by_class.count})": "by_class",
    "correct ({correct.count})": "correct",
}
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
LOST = "{COLUMN.ROW_accuracy_lost:.1f} / {COLUMN.ROW_loss_regret:.0f}"
LOST_OF_ROW = "{ROW.COLUMN_accuracy_lost:.1f}"
BY_LABELS = (
    "{ROW.noisy_labels_COLUMN_score_accuracy_lost:.1f} / {ROW.noisy_labels_COLUMN_refined_accuracy_lost:.1f}"
    " / {ROW.noisy_labels_COLUMN_error_accuracy_lost:.1f}"
)
BLOCKS = {
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
}
