"""What the report tells of this study: which epoch to take, which network, and at what level, without labels."""

from stopping.parts import CLASSES, NAMES, counted, difference, lost
from summaries import Number, Runs, Values, table

__all__ = ["BLOCKS", "NAMES"]
COUNTS = (50, 100, 200, 600)
EXPECTED = {
    "never stopping": "never_stop",
    "**expected score**": "expected_score",
    "**expected accuracy**": "expected_accuracy",
    "**expected AUROC**": "expected_auc",
}
LABELS = {f"{count} labels": f"labels_{count}" for count in COUNTS} | {"a tenth": "tenth"}
TENTH = {
    "a tenth of the labels": "tenth",
    "the tenth, unlabelled": "tenth_unlabelled",
    "the tenth, both": "tenth_alone_combined",
}
ROWS = counted(CLASSES)
NEW = counted({label: f"{name}_new" for label, name in CLASSES.items()})
NUMBERS = counted({"as they are": "clear", "with noise": "noisy", "series, weeks apart": "series"})
MANY = counted({"tables": "as_they_are", "a fifth redrawn": "fifth", "large": "large", "few positives": "few"})


# %% What was asked for.
def met(ours: float, limit: float, form: str = ".2f") -> str:
    """Say what came, what was asked for, and whether it is met."""
    return f"{Number(ours):{form}} | {Number(limit):{form}} | {'yes' if ours <= limit else '**no**'}"


def mean(part: str, column: str) -> float:
    value: Values = getattr(NAMES[part], column)
    return float(value.mean)


def asked(part: str, rule: str, measure: str, limit: str, factor: float = 1, plus: float = 0) -> str:
    """Compare the means of two rules."""
    return met(mean(part, f"{rule}_{measure}_lost"), factor * mean(part, f"{limit}_{measure}_lost") + plus)


def own(part: str, rule: str, limit: str, measure: str) -> str:
    """Compare the means of two rules, in the metric by which they choose."""
    return met(mean(part, f"{rule}_{measure}_lost"), mean(part, f"{limit}_{measure}_lost"))


def before(part: str, limit: float) -> str:
    """Compare with what the criterion of version 0.4 lost, on other runs of the pool (commit 3174514)."""
    return met(mean(part, "expected_score_accuracy_lost"), limit)


def worst_with_labels() -> str:
    """Say by how much labels and the reference lose more than the labels alone, in the worst pool."""
    found = []
    for part in filter(lambda name: NAMES[name].count, (f"{name}_new" for name in CLASSES.values())):
        for rule in LABELS.values():
            runs: Runs = NAMES[part]
            if f"{rule}_combined_accuracy_lost" in runs.frame and runs.frame[f"{rule}_accuracy_lost"].notna().any():
                found.append(mean(part, f"{rule}_combined_accuracy_lost") - mean(part, f"{rule}_accuracy_lost"))
    return met(max(found), 0)


ASKED = {
    "tables, as 100 labels": ("tables", lambda: asked("tables", "expected_score", "accuracy", "labels_100")),
    "tables, AUC by its expectation, a quarter of never stopping": (
        "tables", lambda: asked("tables", "expected_auc", "auc", "never_stop", 0.25)),
    "tables, level of the accuracy, within 2 points": ("tables", lambda: met(mean("tables", "level_error"), 2)),
    "tables, balanced accuracy by its expectation, as by that of 600 labels": (
        "tables", lambda: own("tables", "expected_balanced", "labels_600_by_balanced", "balanced")),
    "tables, macro F1 likewise": ("tables", lambda: own("tables", "expected_f1", "labels_600_by_f1", "f1")),
    "large tables, as 600 labels + 0.1": (
        "large", lambda: asked("large", "expected_score", "accuracy", "labels_600", 1, 0.1)),
    "large tables, the worst run, 2 points": (
        "large", lambda: met(NAMES["large"].expected_score_accuracy_lost.worst, 2)),
    "few positives, AUC by its expectation, as a tenth's": (
        "few", lambda: own("few", "expected_auc", "tenth_by_auc", "auc")),
    "regression, as 200 targets, %": ("numbers", lambda: asked("numbers", "expected_score", "loss", "labels_200")),
    "photos, as before": ("photos", lambda: before("photos", 0.77)),
    "texts, human labels, as before": ("texts", lambda: before("texts", 0.44)),
    "fine-tuning, as before": ("tuned", lambda: before("tuned", 1.10)),
    "fine-tuning, `features=`, as before": ("tuned_features", lambda: before("tuned_features", 0.92)),
    "redrawn labels, as before": ("redrawn", lambda: before("redrawn", 0.28)),
    "correct labels, as before": ("correct", lambda: before("correct", 0.38)),
    "labels and the reference − labels alone, the worst pool": ("tables", worst_with_labels),
    "choosing a network on tables, as 100 labels": (
        "alike", lambda: met(mean("alike", "expected_lost"), mean("alike", "labels_100_lost"))),
}  # fmt: skip


def asked_for() -> str:
    head = "| asked for: at most | came | limit | met |\n|---|---|---|---|\n"
    rows = [(label, cells()) for label, (part, cells) in ASKED.items() if NAMES[part].count]
    return head + "\n".join(f"| {label} | {cells} |" for label, cells in rows)


# %% Two annotators: three ways to use the same two labels.
def ways() -> str:
    """Compare the ways by the same sentences and networks."""
    frame = NAMES["check"].frame.query("pool == 'annotators'").copy()
    if frame.empty:
        return "Not measured yet."
    frame["way"] = frame["kind"].str.extract(r"by (\w+),")[0]
    rows = []
    epochs = {"chosen": "the epoch by the expected score", "best": "the best epoch", "last": "the last"}
    for column, label in epochs.items():
        wide = Runs(frame.pivot(index="group", columns="way", values=f"{column}_accuracy").reset_index())
        others = [getattr(wide, way).minus["first"].interval for way in ("agree", "both")]
        rows.append(f"| {label} | {wide.first:.1f} | {others[0]:+.1f} | {others[1]:+.1f} |")
    count = frame["group"].nunique()
    head = f"| accuracy, {count} sets of sentences | the first label | those that agree − the first |"
    return head + " both as two samples − the first |\n|---|---|---|---|\n" + "\n".join(rows)


COMPARED = {
    "**expected accuracy**": "expected",
    "disagreement with the same reference": "disagreement",
    "the networks' own confidence": "confidence",
    "at random": "random",
    **{f"{count} labels" + text: f"labels_{count}{rule}"
       for count in COUNTS for text, rule in (("", ""), (" and the reference", "_combined"))},
}  # fmt: skip
GROUPS = {name: label for name, label in {"alike": "tables", "photos_alike": "photos"}.items() if NAMES[name].count}
RANKED = {f"{label} ({{{name}.count}})": f"{{{name}.ROW_lost:.2f}}" for name, label in GROUPS.items()}
RANKED |= {f"τ, {label}": f"{{{name}.ROW_tau:.2f}}" for name, label in GROUPS.items()}
RANKED["expected accuracy − this, tables"] = "{alike.expected_lost.minus[ROW_lost].interval:+.2f}"
BLOCKS = {
    "stopping: asked for": asked_for(),
    "stopping: in short": table("points of accuracy lost", ROWS, {
        label: lost(rule, "accuracy", ".2f")
        for label, rule in (EXPECTED | {"100 labels": "labels_100", "600 labels": "labels_600"}).items()
        if rule != "expected_auc"
    }),
    "stopping: AUC": table("points of AUC lost", ROWS, {
        "never stopping": lost("never_stop", "auc", ".2f"),
        "expected score": lost("expected_score", "auc", ".2f"),
        "**expected AUROC**": lost("expected_auc", "auc", ".2f"),
        "600 labels": lost("labels_600", "auc", ".2f"),
        "AUC of 600 labels": lost("labels_600_by_auc", "auc", ".2f"),
        "AUC of a tenth": lost("tenth_by_auc", "auc", ".2f"),
    }),
    "stopping: own metric": table("points lost", MANY, {
        f"{of}: {label}": lost(rule.replace("OWN", gain), gain, ".2f")
        for of, gain in (("balanced accuracy", "balanced"), ("macro F1", "f1"))
        for label, rule in (("never stopping", "never_stop"), ("expected score", "expected_score"),
                            ("**its expectation**", "expected_OWN"), ("that of 600 labels", "labels_600_by_OWN"))
    }),
    "stopping: differences": table("points of accuracy lost", ROWS, {
        "expected score − never stopping": difference("expected_score", "never_stop", "accuracy", "+.2f"),
        "− 100 labels": difference("expected_score", "labels_100", "accuracy", "+.2f"),
        "AUC: expected AUROC − never stopping": difference("expected_auc", "never_stop", "auc", "+.2f"),
        "AUC: − AUC of a tenth": difference("expected_auc", "tenth_by_auc", "auc", "+.2f"),
    }),
    "stopping: with labels": table("points of accuracy lost", NEW, {
        label: f"{{ROW.{rule}_accuracy_lost:.2f}} → {{ROW.{rule}_combined_accuracy_lost:.2f}}"
        for label, rule in LABELS.items()
    }),
    "stopping: tenth": table("points of accuracy lost", ROWS, {
        label: lost(rule, "accuracy", ".2f") for label, rule in ({"600 unlabelled": "expected_score"} | TENTH).items()
    }),
    "stopping: spread": table("accuracy: nine runs of ten stay below; the worst", ROWS, {
        label: f"{{ROW.{rule}_accuracy_lost.p90:.1f}}; {{ROW.{rule}_accuracy_lost.worst:.1f}}"
        for label, rule in (EXPECTED | {"100 labels": "labels_100", "600 labels": "labels_600"}).items()
    }),
    "stopping: loss": table("log-loss above the lowest, %", ROWS, {
        label: lost(rule, "loss", ".0f")
        for label, rule in (EXPECTED | {"100 labels": "labels_100", "600 labels": "labels_600"}).items()
    }),
    "stopping: regression": table("squared error above the lowest, %", NUMBERS, {
        label: lost(rule, "loss") for label, rule in ({
            "never stopping": "never_stop", "**expected score**": "expected_score", "a tenth": "tenth",
            **{f"{count} targets": f"labels_{count}" for count in COUNTS},
            "200 and the reference": "labels_200_combined"}).items()
    }),
    "stopping: level": table("all epochs; points of accuracy", ROWS, {
        "off": "{ROW.level_error:.1f}", "bias": "{ROW.level_bias:+.1f}",
        "CBPE: off": "{ROW.cbpe_level_error:.1f}", "bias of CBPE": "{ROW.cbpe_level_bias:+.1f}",
        "ρ of the expected accuracy": "{ROW.spearman_expected:.2f}", "ρ of −expected score": "{ROW.spearman_score:.2f}",
        "ρ of 600 labels": "{ROW.spearman_labels:.2f}", "ρ of CBPE": "{ROW.spearman_cbpe:.2f}",
        "CBPE's epoch loses": lost("cbpe", "accuracy", ".2f"),
    }),
    "stopping: rival": table("accuracy", ROWS, {
        "the best epoch": "{ROW.best_accuracy:.1f}", "the last": "{ROW.last_accuracy:.1f}",
        "the chosen one": "{ROW.chosen_accuracy:.1f}", "**the reference**": "{ROW.reference_accuracy:.1f}",
        "**mean of both**": "{ROW.mean_accuracy:.1f}",
        "mean of both − chosen": "{ROW.mean_accuracy.minus[chosen_accuracy].interval:+.1f}",
    }),
    "stopping: reference": table("the reference", ROWS, {
        "skill": "{ROW.its_skill:.2f}", "accuracy, left out": "{ROW.its_accuracy.percent:.0f} %",
        "majority": "{ROW.its_majority.percent:.0f} %", "unexplained": "{ROW.its_unexplained.percent:.0f} %",
    }),
    "stopping: annotators": ways(),
    "worth: annotators": ways(),
    "stopping: compare": table("chosen by", COMPARED, RANKED),
}  # fmt: skip
