"""What the report tells of this study: which epoch to take, which network, and at what level, without labels."""

from typing import NamedTuple

import numpy as np
from stopping.parts import CLASSES, NAMES, changed, counted, dagger, difference, lost, sizes, told
from summaries import Values, table

__all__ = ["BLOCKS", "NAMES"]
COUNTS = (50, 100, 200, 600)
EXPECTED = {
    "never stopping": "never_stop",
    "**expected accuracy**": "expected_accuracy",
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
NUMBERS = {
    "as they are": "clear",
    "with noise": "noisy",
    "5,000 to 20,000 rows, as they are": "clear_large",
    "5,000 to 20,000 rows, with noise": "noisy_large",
    "series, weeks apart": "series",
}
BUT_ONE = counted({"large tables, but that one": "large_but_one"}, "loss_error")
WITH_LOSS = ROWS | counted({f"regression, {label}": name for label, name in NUMBERS.items()}, "loss_error")
NUMBERS = counted(NUMBERS, "expected_loss_loss_lost")
MANY = counted({"tables": "as_they_are", "a fifth redrawn": "fifth", "large": "large", "few positives": "few"})
HELD = counted({label: f"{name}_held" for label, name in CLASSES.items()})
NUMBERS_HELD = counted({"as they are": "clear_held", "with noise": "noisy_held"}, "expected_loss_loss_lost")
SHIFTED = counted({
    f"{label}, {shares}": f"few_{way}{end}"
    for label, way in (("weighted sampler", "sampler"), ("undersampled", "undersampled"))
    for shares, end in (("as they seem", ""), ("known", "_known"))
})  # fmt: skip


# %% In short.
class Kind(NamedTuple):
    """A row: where its runs are, and by which measure one stops, keeps and judges."""

    label: str
    runs: str
    measure: str = "accuracy"

    def lost(self, rule: str) -> str:
        return f"{rule}_{self.measure}_lost"

    @property
    def kept(self) -> str:
        return self.lost(f"expected_{self.measure}")

    @property
    def epochs(self) -> str:
        return f"{{{self.runs}.stopped_{self.measure}_epochs:.0f}} %"

    @property
    def gain(self) -> Values:
        """By how much less than the last epoch the kept one loses."""
        found: Values = getattr(NAMES[self.runs], self.lost("never_stop")).minus[self.kept]
        return found

    def cell(self, column: str) -> str:
        return f"{{{self.runs}.{column}:.1f}}" + " %" * (self.measure == "loss")

    def difference(self, first: str, second: str) -> str:
        return f"{{{self.runs}.{first}.minus[{second}].interval:+.1f}}"

    def row(self, *cells: str) -> str:
        return f"| {self.label}{dagger(NAMES[self.runs])} ({{{self.runs}.{self.kept}.count}}) | {' | '.join(cells)} |"

    def line(self) -> str:
        """Say how far the estimate is off, and what the kept epoch, the last one and some labels lose."""
        off = "loss_error:.0f} %" if self.measure == "loss" else "level_error:.1f}"
        last, by = self.lost("never_stop"), "" if self.measure in ("accuracy", "loss") else f"_by_{self.measure}"
        kept = [self.cell(self.kept), self.cell(last), self.difference(self.kept, last)]
        labels = [self.cell(self.lost(f"{name}{by}")) for name in ("tenth", "labels_600")]
        return self.row(f"{{{self.runs}.{off}", *kept, *labels)

    def price(self) -> str:
        """Say what it saves and costs to stop, by the same value."""
        stopped = self.lost(f"stopped_{self.measure}")
        return self.row(self.epochs, self.cell(stopped), self.cell(self.kept), self.difference(stopped, self.kept))


KINDS = [
    Kind("tables", "as_they_are"),
    Kind("tables, a fifth of the labels redrawn", "fifth"),
    Kind("tables of 5,000 to 20,000 rows in training", "large"),
    Kind("few positives, AUROC", "few", "auc"),
    Kind("few positives, 5,000 to 20,000 rows, AUROC", "few_large", "auc"),
    Kind("a number, squared error", "numbers", "loss"),
    Kind("a number, 5,000 to 20,000 rows, squared error", "numbers_large", "loss"),
    Kind("FT-Transformer on tables", "transformer"),
    Kind("texts, by words", "texts"),
    Kind("texts, by MiniLM", "texts_minilm"),
    Kind("signals", "signals"),
    Kind("photos, by patches", "photos"),
    Kind("photos, by Lite0 at 96 pixels", "photos_lite0"),
    Kind("ResNet-18 on photos, by patches", "resnet18"),
    Kind("ResNet-18 on photos, by Lite0 at 96", "resnet18_lite0"),
    Kind("small ResNet fine-tuned, by Lite0 at 96", "tuned_lite0"),
    Kind("EfficientNet-Lite0 fine-tuned, by Lite0 at 96", "pretrained_lite0"),
    Kind("MiniLM fine-tuned, by words", "minilm"),
    Kind("MiniLM fine-tuned, by its own body", "minilm_body"),
]


def gains() -> str:
    """Say for which data a gain on the last epoch is shown."""
    found: dict[str, list[str]] = {"is shown": [], "is not shown": [], "is negative": []}
    for kind in KINDS:
        if NAMES[kind.runs].count > 1:
            low, high = kind.gain.low, kind.gain.high
            found["is shown" if low > 0 else "is negative" if high < 0 else "is not shown"].append(
                kind.label + dagger(NAMES[kind.runs])
            )
    return "\n".join(f"- **A gain {what}**: {'; '.join(labels)}." for what, labels in found.items() if labels)


def in_short(kinds: list[Kind]) -> str:
    """Say of each kind of data how far the estimate is off, and what its epoch loses, and others do."""
    head = "| data (runs) | off | kept | last | kept − last [95 %] | a tenth | 600 labels |"
    return "\n".join([head, "|---" * 7 + "|", *(kind.line() for kind in kinds if NAMES[kind.runs].count > 1)])


def stops() -> str:
    """Say of each kind of data what it saves and costs to stop, in the runs in which that was judged."""
    head = "| data (runs) | epochs that run | with a stop | without | difference [95 %] |"
    kinds = [kind._replace(runs=f"{kind.runs}_stopped") for kind in KINDS]
    return "\n".join([head, "|---" * 5 + "|", *(kind.price() for kind in kinds if NAMES[kind.runs].count > 1)])


def of_texts() -> str:
    """Say why the lowest expected loss is not the epoch to take of texts."""
    blind = """
In {texts_blind.count} of {texts.count} runs the reference sees too little, so that nothing is logged, and the last
epoch is kept: there the loss is {texts_blind.expected_loss_noisy_loss_lost:.0f} % above the lowest, though the
expectation that was not logged is but {texts_blind.loss_error:.1f} % off."""
    return (
        (blind if NAMES["texts_blind"].count else "")
        + """
Where it is logged ({texts_seen.count} runs), the loss of its lowest epoch is
{texts_seen.expected_loss_noisy_loss_lost:.1f} % above the lowest, that of 600 labels
{texts_seen.labels_600_by_loss_noisy_loss_lost:.1f} %. But that epoch loses
{texts.expected_loss_accuracy_lost:.1f} points of accuracy, and the lowest loss of 600 labels
{texts.labels_600_by_loss_accuracy_lost:.1f}: texts gain accuracy long after the loss has begun to rise. So keep the
epoch of the highest expected accuracy, which loses {texts.expected_accuracy_accuracy_lost:.1f}."""
    )


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
        rows.append(
            f"| {label}{dagger(NAMES[name])} ({len(frame)}) | {off:.1f} | {of_labels:.1f} | {labels_worth(name)} |"
        )
    head = "| points of accuracy, all epochs | expected accuracy: off | 600 labels: off | it is worth, in labels |\n"
    return head + "|---|---|---|---|\n" + "\n".join(rows)


RANKINGS = {
    "**expected accuracy**": "expected",
    "disagreement with the same reference": "disagreement",
    "the networks' own confidence": "confidence",
    "at random": "random",
    **{f"{count} labels" + text: f"labels_{count}{rule}"
       for count in COUNTS for text, rule in (("", ""), (" and the reference", "_combined"))},
}  # fmt: skip
GROUPS = {"alike": "tables", "photos_alike": "photos", "photos_alike_lite0": "photos, by Lite0 at 96"}
GROUPS = {name: f"{label}{dagger(NAMES[name])}" for name, label in GROUPS.items() if NAMES[name].count}
RANKED = {f"{label} ({{{name}.count}})": f"{{{name}.ROW_lost:.2f}}" for name, label in GROUPS.items()}
RANKED |= {f"τ, {label}": f"{{{name}.ROW_tau:.2f}}" for name, label in GROUPS.items()}
RANKED["expected accuracy − this, tables"] = "{alike.expected_lost.minus[ROW_lost].interval:+.2f}"
LEADS = counted(
    {label: name for label, name in CLASSES.items() if name not in ("rules", "correct")}, "off_where_it_leads"
)
BLOCKS = {
    "stopping: in short": in_short(KINDS),
    "stopping: gains": gains(),
    "stopping: sizes": sizes(),
    "stopping: versions": changed(),
    "stopping: texts": of_texts(),
    "stopping: which epoch": table("points of accuracy lost", ROWS, {
        label: lost(rule, "accuracy", ".2f") for label, rule in (EXPECTED | SOME_LABELS).items()
    }),
    "stopping: expected loss": table("all epochs, %", WITH_LOSS | BUT_ONE, {
        "expected loss: off": "{ROW.loss_error:.1f}", "median": "{ROW.loss_error.median:.1f}",
        "bias": "{ROW.loss_bias:+.1f}",
        "600 labels: off": "{ROW.labels_loss_error:.1f}", "their median": "{ROW.labels_loss_error.median:.1f}",
        "ρ": "{ROW.spearman_loss:.2f}",
        "above the lowest loss: its epoch": lost("expected_loss", "noisy_loss"),
        "that of 600 labels": lost("labels_600_by_loss", "noisy_loss"), "the last": lost("never_stop", "noisy_loss"),
    }),
    "stopping: no loss": told("no_loss", """
One large table makes the mean of its row: there the network is right in {no_loss.best_accuracy:.1f} % of the test
samples, at a loss of {no_loss.best_loss:.4f}, and the reference in {no_loss.reference_accuracy:.1f} %. What is
expected is then far above the loss in percent, and hardly in nats."""),
    "stopping: stops": stops(),
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
    "stopping: with labels": table("points of accuracy lost", ROWS, {
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
    "stopping: tenth": table("points of accuracy lost", ROWS, {
        label: lost(rule, "accuracy", ".2f")
        for label, rule in ({"600 unlabelled": "expected_accuracy"} | TENTH).items()
    }),
    "stopping: spread": table("accuracy: nine runs of ten stay below; the worst", ROWS, {
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
    "stopping: rival": table("accuracy", ROWS, {
        "the best epoch": "{ROW.best_accuracy:.1f}", "the last": "{ROW.last_accuracy:.1f}",
        "the kept one": "{ROW.chosen_accuracy:.1f}", "**the reference**": "{ROW.reference_accuracy:.1f}",
        "**mean of both**": "{ROW.mean_accuracy:.1f}",
        "mean of both − the kept epoch": "{ROW.mean_accuracy.minus[chosen_accuracy].interval:+.1f}",
    }),
    "stopping: reference": table("the reference", ROWS, {
        "skill": "{ROW.its_skill:.2f}", "accuracy, left out": "{ROW.its_accuracy.percent:.0f} %",
        "majority": "{ROW.its_majority.percent:.0f} %", "unexplained": "{ROW.its_unexplained.percent:.0f} %",
    }),
    "stopping: compare": table("chosen by", RANKINGS, RANKED),
}  # fmt: skip
