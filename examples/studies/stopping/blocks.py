"""What the report tells of this study: which epoch to take, which network, and at what level, without labels."""

import numpy as np
from stopping.parts import CLASSES, COMPARED, NAMES, counted, difference, lost
from summaries import Number, Runs, Values, table

__all__ = ["BLOCKS", "NAMES"]
COUNTS = (50, 100, 200, 600)
EXPECTED = {
    "never stopping": "never_stop",
    "**expected accuracy**": "expected_accuracy",
    "**the recipe**": "recipe",
    "expected loss": "expected_loss",
}
LABELS = {f"{count} labels": f"labels_{count}" for count in COUNTS} | {"a tenth": "tenth"}
SOME_LABELS = {"100 labels": "labels_100", "600 labels": "labels_600"}
TENTH = {
    "a tenth of the labels": "tenth",
    "the tenth, unlabelled": "tenth_unlabelled",
    "the tenth, both": "tenth_alone_combined",
}
HELD_OUT = {
    "by its loss": "held_out_by_loss",
    "by its accuracy": "held_out_by_accuracy",
    "by its refined score": "held_out_by_score",
    "by nothing": "held_out_by_nothing",
    "then trained again on all": "retrained",
}
ROWS = counted(CLASSES)
ANEW = counted(CLASSES, "loss_error")  # the others were judged before losses were expected
BEFORE = {label: name for label, name in ROWS.items() if name not in ANEW.values()}
NUMBERS = {"as they are": "clear", "with noise": "noisy", "series, weeks apart": "series"}
BUT_ONE = counted({"large tables, but that one": "large_but_one"}, "loss_error")
WITH_LOSS = ANEW | counted({f"regression, {label}": name for label, name in NUMBERS.items()}, "loss_error")
NUMBERS = counted(NUMBERS, "expected_loss_loss_lost")
MANY = counted({"tables": "as_they_are", "a fifth redrawn": "fifth", "large": "large", "few positives": "few"})
HELD = counted({label: f"{name}_held" for label, name in CLASSES.items()})
NUMBERS_HELD = counted({"as they are": "clear_held", "with noise": "noisy_held"}, "expected_loss_loss_lost")
SHIFTED = counted({
    f"{label}, {shares}": f"few_{way}{end}"
    for label, way in (("weighted sampler", "sampler"), ("undersampled", "undersampled"))
    for shares, end in (("as they seem", ""), ("known", "_known"), ("estimated", "_estimated"))
})  # fmt: skip


# %% What was asked for.
def met(ours: float, limit: float, form: str = ".2f") -> str:
    """Say what came, what was asked for, and whether it is met."""
    return f"{Number(ours):{form}} | {Number(limit):{form}} | {'yes' if ours <= limit else '**no**'}"


def mean(part: str, column: str) -> float:
    value: Values = getattr(NAMES[part], column)
    return float(value.mean)


def level(part: str, limit: float) -> str:
    return met(mean(part, "level_error"), limit)


def at_most(part: str, limit: float, rule: str = "expected_accuracy", measure: str = "accuracy") -> str:
    return met(mean(part, f"{rule}_{measure}_lost"), limit)


def than(part: str, other: str, plus: float, rule: str = "expected_accuracy", measure: str = "accuracy") -> str:
    """Compare a rule with another one in the same runs."""
    return at_most(part, mean(part, f"{other}_{measure}_lost") + plus, rule, measure)


def loss_of(part: str) -> str:
    """Compare how far the expected loss is off with that of 600 labels."""
    return met(mean(part, "loss_error"), mean(part, "labels_loss_error") + 4, ".1f")


def against_the_score() -> str:
    """Say how much more is lost by expected accuracy than by the score that chose before, in the mean over pools."""
    found = [NAMES[name].expected_accuracy_accuracy_lost for name in CLASSES.values() if NAMES[name].count]
    return met(sum(float(each.minus["former_score_accuracy_lost"].mean) for each in found) / len(found), 0.1)


ENCODED = {"Lite0 at 96": "_lite0", "Lite2 at 128": "_lite2"}
ASKED = {
    "expected loss, % off: tables; 600 labels + 4": ("tables", lambda: loss_of("tables")),
    "few positives": ("few", lambda: loss_of("few")),
    "texts, human labels": ("texts", lambda: loss_of("texts")),
    **{f"photos, by {label}": (f"photos{end}", lambda end=end: met(mean(f"photos{end}", "loss_error"), 8, ".1f"))
       for label, end in ENCODED.items()},
    "loss of its epoch above the lowest, %: tables": (
        "tables", lambda: met(mean("tables", "expected_loss_noisy_loss_lost"), 3, ".1f")),
    "accuracy lost by expected accuracy − by the score before it, mean of all rows": ("tables", against_the_score),
    "accuracy, points off: tables": ("tables", lambda: level("tables", 2)),
    "photos, by patches": ("photos", lambda: level("photos", 4)),
    **{f"photos, accuracy, by {label}": (f"photos{end}", lambda end=end: level(f"photos{end}", 2))
       for label, end in ENCODED.items()},
    **{f"Lite0 fine-tuned, by {label}": (f"pretrained{end}", lambda end=end: level(f"pretrained{end}", 3))
       for label, end in ENCODED.items()},
    **{f"accuracy lost: photos, by {label}; 600 labels + 0.1": (
        f"photos{end}", lambda end=end: than(f"photos{end}", "labels_600", 0.1)) for label, end in ENCODED.items()},
    **{f"Lite0 fine-tuned, by {label}; 400 labels + 0.3": (
        f"pretrained{end}", lambda end=end: than(f"pretrained{end}", "labels_600", 0.3))
       for label, end in ENCODED.items()},
    "tables": ("tables", lambda: at_most("tables", 0.85)),
    "tables, AUROC by its expectation": ("tables", lambda: at_most("tables", 0.6, "expected_auc", "auc")),
    "texts, rule-generated labels; never stopping + 0.3": ("rules", lambda: than("rules", "never_stop", 0.3)),
    "squared error, %: as they are; 200 targets": (
        "clear", lambda: than("clear", "labels_200", 0, "expected_loss", "loss")),
    "with noise; 200 targets": ("noisy", lambda: than("noisy", "labels_200", 0, "expected_loss", "loss")),
    "tables that a network made: loss, %; never stopping + 5": (
        "made", lambda: than("made", "never_stop", 5, "expected_loss", "loss")),
    "1 − τ of models of photos, by patches": (
        "photos_alike", lambda: met(1 - mean("photos_alike", "expected_tau"), 0.15)),
    "by Lite0 at 96: better than by patches": (
        "photos_alike_lite0",
        lambda: met(1 - mean("photos_alike_lite0", "expected_tau"), 1 - mean("photos_alike", "expected_tau"))),
}  # fmt: skip


def asked_for() -> str:
    head = "| asked for: at most | came | limit | met |\n|---|---|---|---|\n"
    rows = []
    for label, (part, cells) in ASKED.items():
        if NAMES[part].count:
            try:
                rows.append(f"| {label} | {cells()} |")
            except ValueError:  # no run has a value
                rows.append(f"| {label} | not measured | | |")
    return head + "\n".join(rows)


def recorded() -> str:
    """Say how many runs of the check half were judged, and how many were trained again without a tenth."""
    runs, told = NAMES["check"].frame, []
    for pool, part in runs.groupby("pool", sort=False):
        tenths = part["gained"].notna().sum()
        told.append(f"{pool} {len(part)}" + f" ({tenths} without a tenth)" * bool(tenths))
    alike = COMPARED.query("judge == 'inputs'").groupby("pool")["num_models"].agg(["count", "sum"])
    return "; ".join([*told, *(f"{pool} {row['sum']}" for pool, row in alike.iterrows())]) + "."


# %% How many labels an estimate is worth.
def labels_worth(name: str) -> str:
    """Say how many labels would be as far off in the mean as the estimate, on the same test labels.

    The mean absolute error of n labels, on m test labels of variance v, is √(2 / π · v (1/n + 1/m)).
    """
    frame = NAMES[name].frame.dropna(subset=["test_level_error"])
    variance, of_test = frame["variance_of_a_hit"].mean(), (1 / frame["num_test"]).mean()
    rest = np.pi / 2 * (frame["test_level_error"].mean() / 100) ** 2 / variance - of_test
    return f"{float(f'{1 / rest:.2g}'):.0f}" if rest > 0 else "more than can be told"


def worth() -> str:
    """Say of each kind of data how many labels an estimate is worth."""
    rows = []
    for label, name in CLASSES.items():
        frame = NAMES[name].frame.dropna(subset=["test_level_error"])
        if frame.empty:
            continue
        off, of_labels = frame["test_level_error"].mean(), frame["labels_level_error"].mean()
        rows.append(f"| {label} ({len(frame)}) | {off:.1f} | {of_labels:.1f} | {labels_worth(name)} |")
    head = "| points of accuracy, all epochs | expected accuracy: off | 600 labels: off | it is worth, in labels |\n"
    return head + "|---|---|---|---|\n" + "\n".join(rows)


# %% Two annotators: three ways to use the same two labels.
def ways() -> str:
    """Compare the ways by the same sentences and networks."""
    frame = NAMES["check"].frame.query("pool == 'annotators'").copy()
    if frame.empty:
        return "Not measured yet."
    frame["way"] = frame["kind"].str.extract(r"by (\w+),")[0]
    rows = []
    epochs = {"chosen": "the epoch by the recipe", "best": "the best epoch", "last": "the last"}
    for column, label in epochs.items():
        if frame[f"{column}_accuracy"].isna().all():
            continue
        wide = Runs(frame.pivot(index="group", columns="way", values=f"{column}_accuracy").reset_index())
        others = [getattr(wide, way).minus["first"].interval for way in ("agree", "both")]
        rows.append(f"| {label} | {wide.first:.1f} | {others[0]:+.1f} | {others[1]:+.1f} |")
    count = frame["group"].nunique()
    head = f"| accuracy, {count} sets of sentences | the first label | those that agree − the first |"
    return head + " both as two samples − the first |\n|---|---|---|---|\n" + "\n".join(rows)


RANKINGS = {
    "**expected accuracy**": "expected",
    "disagreement with the same reference": "disagreement",
    "the networks' own confidence": "confidence",
    "at random": "random",
    **{f"{count} labels" + text: f"labels_{count}{rule}"
       for count in COUNTS for text, rule in (("", ""), (" and the reference", "_combined"))},
}  # fmt: skip
GROUPS = {"alike": "tables", "photos_alike": "photos", "photos_alike_lite0": "photos, by Lite0 at 96"}
GROUPS = {name: label for name, label in GROUPS.items() if NAMES[name].count}
RANKED = {f"{label} ({{{name}.count}})": f"{{{name}.ROW_lost:.2f}}" for name, label in GROUPS.items()}
RANKED |= {f"τ, {label}": f"{{{name}.ROW_tau:.2f}}" for name, label in GROUPS.items()}
RANKED["expected accuracy − this, tables"] = "{alike.expected_lost.minus[ROW_lost].interval:+.2f}"
LEADS = counted(
    {label: name for label, name in CLASSES.items() if name not in ("rules", "correct")}, "off_where_it_leads"
)
BLOCKS = {
    "stopping: asked for": asked_for(),
    "stopping: recorded": recorded(),
    "stopping: in short": table("points of accuracy lost", ANEW, {
        label: lost(rule, "accuracy", ".2f") for label, rule in (EXPECTED | SOME_LABELS).items()
    }),
    "stopping: before losses": table("points of accuracy", BEFORE, {
        "never stopping": lost("never_stop", "accuracy", ".2f"),
        "**expected accuracy**": lost("expected_accuracy", "accuracy", ".2f"),
        "100 labels": lost("labels_100", "accuracy", ".2f"), "600 labels": lost("labels_600", "accuracy", ".2f"),
        "expected accuracy: off": "{ROW.level_error:.1f}", "bias": "{ROW.level_bias:+.1f}",
    }),
    "stopping: expected loss": table("all epochs, %", WITH_LOSS | BUT_ONE, {
        "expected loss: off": "{ROW.loss_error:.1f}", "median": "{ROW.loss_error.median:.1f}",
        "bias": "{ROW.loss_bias:+.1f}",
        "600 labels: off": "{ROW.labels_loss_error:.1f}", "their median": "{ROW.labels_loss_error.median:.1f}",
        "ρ": "{ROW.spearman_loss:.2f}",
        "above the lowest loss: its epoch": lost("expected_loss", "noisy_loss"),
        "that of 600 labels": lost("labels_600_by_loss", "noisy_loss"), "the last": lost("never_stop", "noisy_loss"),
    }),
    "stopping: no loss": """
One large table makes the mean of its row: there the network is right in {no_loss.best_accuracy:.1f} % of the test
samples, at a loss of {no_loss.best_loss:.4f}, and the reference in {no_loss.reference_accuracy:.1f} %. What is
expected is then far above the loss in percent, and hardly in nats.""",
    "stopping: the score": table("points of accuracy lost", ROWS, {
        "by the score before it": lost("former_score", "accuracy", ".2f"),
        "expected accuracy − this": difference("expected_accuracy", "former_score", "accuracy", "+.2f"),
    }),
    "stopping: the recipe": table("points of accuracy lost", ANEW, {
        "the recipe": lost("recipe", "accuracy", ".2f"),
        "the recipe − never stopping": difference("recipe", "never_stop", "accuracy", "+.2f"),
        "− expected accuracy, all epochs": difference("recipe", "expected_accuracy", "accuracy", "+.2f"),
    }),
    "stopping: worth": worth(),
    "stopping: rivals": table("points of accuracy", LEADS, {
        "epochs in which the network is better": "{ROW.network_leads.percent:.0f} %",
        "by": "{ROW.leads_by:.1f}", "**there expected accuracy is off by**": "{ROW.off_where_it_leads:+.1f}",
        "elsewhere by": "{ROW.off_elsewhere:+.1f}",
    }),
    "stopping: AUC": table("points of AUC lost", ROWS, {
        "never stopping": lost("never_stop", "auc", ".2f"),
        "expected accuracy": lost("expected_accuracy", "auc", ".2f"),
        "**expected AUROC**": lost("expected_auc", "auc", ".2f"),
        "600 labels": lost("labels_600", "auc", ".2f"),
        "AUC of 600 labels": lost("labels_600_by_auc", "auc", ".2f"),
        "AUC of a tenth": lost("tenth_by_auc", "auc", ".2f"),
    }),
    "stopping: own metric": table("points lost", MANY, {
        f"{of}: {label}": lost(rule.replace("OWN", gain), gain, ".2f")
        for of, gain in (("balanced accuracy", "balanced"), ("macro F1", "f1"))
        for label, rule in (("never stopping", "never_stop"), ("expected accuracy", "expected_accuracy"),
                            ("**its expectation**", "expected_OWN"), ("that of 600 labels", "labels_600_by_OWN"))
    }),
    "stopping: differences": table("points of accuracy lost", ROWS, {
        "expected accuracy − never stopping": difference("expected_accuracy", "never_stop", "accuracy", "+.2f"),
        "− 100 labels": difference("expected_accuracy", "labels_100", "accuracy", "+.2f"),
        "AUC: expected AUROC − never stopping": difference("expected_auc", "never_stop", "auc", "+.2f"),
        "AUC: − AUC of a tenth": difference("expected_auc", "tenth_by_auc", "auc", "+.2f"),
    }),
    "stopping: with labels": table("points of accuracy lost", ANEW, {
        label: f"{{ROW.{rule}_accuracy_lost:.2f}} → {{ROW.{rule}_combined_accuracy_lost:.2f}}"
        for label, rule in LABELS.items()
    }),
    "stopping: held out": table("accuracy lost against the best epoch of training on all", HELD, {
        "**expected accuracy**": lost("expected_accuracy", "accuracy", ".2f"),
        **{label: lost(rule, "accuracy", ".2f") for label, rule in HELD_OUT.items()},
        "by its loss − expected accuracy [95 %]": "{ROW.gained.interval:+.2f}",
        "better, worse": "{ROW.gained.above:.0f}, {ROW.gained.below:.0f}",
    }),
    "stopping: held out, regression": table("squared error above the lowest of training on all, %", NUMBERS_HELD, {
        "**expected loss**": lost("expected_loss", "loss"),
        "by its loss": lost("held_out_by_loss", "loss"),
        "then trained again on all": lost("retrained", "loss"),
        "by its loss − expected loss [95 %]": "{ROW.gained.interval:+.1f}",
    }),
    "stopping: before": table("as built → calibrated", ANEW, {
        "accuracy, points off": "{ROW.before_level_error:.1f} → {ROW.level_error:.1f}",
        "loss, % off": "{ROW.before_loss_error:.1f} → {ROW.loss_error:.1f}",
        "accuracy lost": "{ROW.before_expected_accuracy_accuracy_lost:.2f} → {ROW.expected_accuracy_accuracy_lost:.2f}",
        "difference [95 %]":
            "{ROW.expected_accuracy_accuracy_lost.minus[before_expected_accuracy_accuracy_lost].interval:+.2f}",
        "AUC lost, by expected AUROC": "{ROW.before_expected_auc_auc_lost:.2f} → {ROW.expected_auc_auc_lost:.2f}",
        "temperature": "{ROW.its_temperature.median:.2f}",
    }),
    "stopping: shares": table("few positives, class shares", SHIFTED, {
        "accuracy, points off": "{ROW.level_error:.1f}",
        "loss, % off": "{ROW.loss_error:.1f}",
        "accuracy lost": lost("expected_accuracy", "accuracy", ".2f"),
        "macro F1 by its expectation": lost("expected_f1", "f1", ".2f"),
        "AUC by its expectation": lost("expected_auc", "auc", ".2f"),
        "never stopping": lost("never_stop", "accuracy", ".2f"),
    }),
    "stopping: alarms": """
The two-sample test of mean predictions (z above 4) says so in {few_sampler.alarm.percent:.0f} % of the runs with a
sampler and {few_undersampled.alarm.percent:.0f} % of those undersampled, and in {same_shares.alarm.percent:.1f} % of
{same_shares.count} runs whose shares are the same.""",
    "stopping: tenth": table("points of accuracy lost", ANEW, {
        label: lost(rule, "accuracy", ".2f")
        for label, rule in ({"600 unlabelled": "expected_accuracy"} | TENTH).items()
    }),
    "stopping: spread": table("accuracy: nine runs of ten stay below; the worst", ANEW, {
        label: f"{{ROW.{rule}_accuracy_lost.p90:.1f}}; {{ROW.{rule}_accuracy_lost.worst:.1f}}"
        for label, rule in (EXPECTED | SOME_LABELS).items()
    }),
    "stopping: regression": table("squared error above the lowest, %", NUMBERS, {
        label: lost(rule, "loss") for label, rule in ({
            "never stopping": "never_stop", "**expected loss**": "expected_loss", "a tenth": "tenth",
            **{f"{count} targets": f"labels_{count}" for count in COUNTS},
            "200 and the reference": "labels_200_combined"}).items()
    }),
    "stopping: level": table("all epochs; points of accuracy", ROWS, {
        "off": "{ROW.level_error:.1f}", "bias": "{ROW.level_bias:+.1f}",
        "CBPE: off": "{ROW.cbpe_level_error:.1f}", "bias of CBPE": "{ROW.cbpe_level_bias:+.1f}",
        "ρ of the expected accuracy": "{ROW.spearman_expected:.2f}",
        "ρ of 600 labels": "{ROW.spearman_labels:.2f}", "ρ of CBPE": "{ROW.spearman_cbpe:.2f}",
        "CBPE's epoch loses": lost("cbpe", "accuracy", ".2f"),
    }),
    "stopping: rival": table("accuracy", ANEW, {
        "the best epoch": "{ROW.best_accuracy:.1f}", "the last": "{ROW.last_accuracy:.1f}",
        "that of the recipe": "{ROW.chosen_accuracy:.1f}", "**the reference**": "{ROW.reference_accuracy:.1f}",
        "**mean of both**": "{ROW.mean_accuracy:.1f}",
        "mean of both − the recipe": "{ROW.mean_accuracy.minus[chosen_accuracy].interval:+.1f}",
    }),
    "stopping: reference": table("the reference", ROWS, {
        "skill": "{ROW.its_skill:.2f}", "accuracy, left out": "{ROW.its_accuracy.percent:.0f} %",
        "majority": "{ROW.its_majority.percent:.0f} %", "unexplained": "{ROW.its_unexplained.percent:.0f} %",
    }),
    "stopping: annotators": ways(),
    "worth: annotators": ways(),
    "stopping: compare": table("chosen by", RANKINGS, RANKED),
}  # fmt: skip
