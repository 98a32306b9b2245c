"""What README and the guide tell of the study of stopping; its own report tells all of it."""

from stopping.parts import CLASSES, NAMES, counted, difference, lost, sizes, told
from summaries import across, table

__all__ = ["BLOCKS", "NAMES"]
MAIN = {label: name for label, name in CLASSES.items() if name not in ("fifth", "rules", "redrawn", "correct")}
TUNED = ("pretrained", "tuned", "minilm")  # are told in the guide to encoders, and in the report
ACCURACY = {"last epoch": "never_stop", "**expected accuracy**": "expected_accuracy", "a tenth held out": "tenth"}
AUC = {
    "last epoch": "never_stop",
    "expected accuracy": "expected_accuracy",
    "**expected AUROC**": "expected_auc",
    "a tenth, its AUROC": "tenth_by_auc",
}
FEW = {"as they come": "few_plain", "class weights": "few_weights", "weighted sampler": "few_sampler"}
FEW |= {"undersampled": "few_undersampled", "undersampled, `class_shares=`": "few_undersampled_known"}
HELD_OUT = {"tables": "tables", "large tables": "large", "few positives": "few", "photos": "photos", "texts": "texts"}
HELD_OUT = {label: f"{name}_held" for label, name in HELD_OUT.items() if NAMES[f"{name}_held"].count}
NUMBERS = {"targets as they are": "clear", "with noise": "noisy", "series": "series"}
TARGETS = {
    "last epoch": "never_stop",
    "**expected loss**": "expected_loss",
    "50 targets held out": "labels_50",
    "200 targets held out": "labels_200",
    "**200 and the reference**": "labels_200_combined",
}
LABELS = {f"{count} labels": f"labels_{count}" for count in (50, 100, 200, 600)} | {"a tenth": "tenth"}
LEVELS = {"tables": "tables", "large tables": "large", "few positives": "few"}
LEVELS |= {"texts": "texts", "signals": "signals", "photos, by patches": "photos"}
LEVELS |= {
    "photos, by a pretrained network": "photos_lite0",
    "a pretrained network, by a larger one": "pretrained_lite2",
}
NETWORKS = {
    "**`compare_models`**": "expected",
    "100 labels": "labels_100",
    "**100 labels and the reference**": "labels_100_combined",
    "600 labels": "labels_600",
    "the networks' own confidence": "confidence",
    "a network drawn at random": "random",
}


COMBINED = "labels_50_combined_accuracy_lost"
WITH_LABELS = {"tables": "tables", "photos, an encoder": "photos_lite0", "texts": "texts"}
WITH_LABELS = {label: name for label, name in WITH_LABELS.items() if NAMES[name].frame[COMBINED].notna().any()}
WITH_LOSS = LEVELS | {"large tables": "large_but_one"}  # of the other, a network knows all
WITH_LOSS = counted(WITH_LOSS | {"regression": "numbers", "series": "series"}, "loss_error")


def judged() -> str:
    """Say what fine-tuned networks lost, judged by their own body and by encoders, in the same runs."""
    judges = {
        "_body": "its own body",
        "_lite0": "EfficientNet-Lite0 at 96 pixels",
        "_lite2": "EfficientNet-Lite2 at 128",
    }
    networks = {"tuned": "a small ResNet", "pretrained": "EfficientNet-Lite0", "minilm": "MiniLM"}
    networks = {name: label for name, label in networks.items() if NAMES[f"{name}_body"].count}

    def loses(runs: str, rule: str) -> str:
        return f"{{{runs}.{rule}_accuracy_lost:.1f}}" if NAMES[runs].count else "–"

    rows = {label: [loses(f"{name}{end}", "expected_accuracy") for name in networks] for end, label in judges.items()}
    rows["none: the last epoch"] = [loses(f"{name}_body", "never_stop") for name in networks]
    head = ["encoder", *(f"{label} ({{{name}_body.count}}): lost" for name, label in networks.items())]
    lines = [head, ["---"] * len(head), *([judge, *cells] for judge, cells in rows.items() if set(cells) != {"–"})]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def in_limits(form: str) -> str:
    """Say a number of the losses of each kind of data that there is."""
    kinds = {"tables": "tables", "photos": "photos_lite0", "texts": "texts", "signals": "signals"}
    found = [
        f"{{{runs}.expected_accuracy_accuracy_lost.{form}}} on {label}"
        for label, runs in kinds.items()
        if NAMES[runs].count
    ]
    return ", ".join(found)


BLOCKS = {
    "worth: accuracy": table(
        "accuracy lost, points",
        counted({label: name for label, name in CLASSES.items() if not name.startswith(TUNED)}),
        across(ACCURACY, lost("COLUMN", "accuracy"))
        | {"difference [95 %]": difference("expected_accuracy", "never_stop", "accuracy")},
    ),
    "worth: loss": table(
        "the loss, all epochs, %",
        WITH_LOSS,
        {
            "expected loss: off": "{ROW.loss_error:.1f}",
            "600 labels: off": "{ROW.labels_loss_error:.1f}",
            "its epoch is above the lowest by": lost("expected_loss", "noisy_loss"),
            "that of 600 labels by": lost("labels_600_by_loss", "noisy_loss"),
            "the last by": lost("never_stop", "noisy_loss"),
        },
    ),
    "worth: better than the reference": table(
        "points of accuracy",
        counted(LEVELS, "off_where_it_leads"),
        {
            "epochs in which the network is better": "{ROW.network_leads.percent:.0f} %",
            "by": "{ROW.leads_by:.1f}",
            "**expected accuracy is there off by**": "{ROW.off_where_it_leads:+.1f}",
            "elsewhere by": "{ROW.off_elsewhere:+.1f}",
        },
    ),
    "worth: level": table(
        "expected accuracy, points",
        counted(LEVELS),
        {
            "off": "{ROW.level_error:.1f}",
            "too high (+) or low (−)": "{ROW.level_bias:+.1f}",
            "the network's own probabilities: off": "{ROW.cbpe_level_error:.1f}",
            "follows the truth within a run, ρ": "{ROW.spearman_expected:.2f}",
            "600 labels, ρ": "{ROW.spearman_labels:.2f}",
        },
    ),
    "worth: the reference itself": table(
        "accuracy, %",
        counted(
            {label: name for label, name in MAIN.items() if not name.endswith(("_body", "_lite2", "minilm"))},
            "chosen_accuracy",
        ),
        {
            "last epoch": "{ROW.last_accuracy:.1f}",
            "chosen epoch": "{ROW.chosen_accuracy:.1f}",
            "the reference": "{ROW.reference_accuracy:.1f}",
            "is better in": "{ROW.reference_leads.percent:.0f} %",
            "**mean of both**": "{ROW.mean_accuracy:.1f}",
            "mean − chosen [95 %]": "{ROW.mean_accuracy.minus[chosen_accuracy].interval:+.1f}",
        },
    ),
    "worth: tenth": table(
        "accuracy lost, points",
        counted(HELD_OUT),
        {
            "trained on all, **expected accuracy**": lost("expected_accuracy", "accuracy"),
            "trained on 90 %, the loss on 10 %": lost("held_out_by_loss", "accuracy"),
            "the same, then trained again on all": lost("retrained", "accuracy"),
            "the second − the first [95 %]": "{ROW.gained.interval:+.1f}",
        },
    ),
    "worth: limits": f"""
- **One run in ten** loses these points or more: {in_limits("p90:.1f")}. The worst run loses
{in_limits("worst:.0f")}.
"""
    + """- **Choose by what counts.** On tables, the epoch of the highest expected accuracy loses
{tables.expected_accuracy_balanced_lost:.1f} points of balanced accuracy, that of its own expectation
{tables.expected_balanced_balanced_lost:.1f}.
- **Sizes.** """
    + sizes(),
    "worth: few positives": table("AUROC lost, points", counted(FEW), across(AUC, lost("COLUMN", "auc"))),
    "worth: balanced": """
Of balanced accuracy, its own expectation loses {few.expected_balanced_balanced_lost:.1f} points, the last epoch
{few.never_stop_balanced_lost:.1f}, expected accuracy {few.expected_accuracy_balanced_lost:.1f}, and balanced accuracy
on a tenth {few.tenth_by_balanced_balanced_lost:.1f}; of macro F1 {few.expected_f1_f1_lost:.1f},
{few.never_stop_f1_lost:.1f}, {few.expected_accuracy_f1_lost:.1f} and {few.tenth_by_f1_f1_lost:.1f}.""",
    "worth: regression": table(
        "squared error above the lowest, %",
        counted(NUMBERS, "expected_loss_loss_lost"),
        across(TARGETS, lost("COLUMN", "loss")),
    ),
    "worth: unexplained": """
In the study, {fifth.its_unexplained.percent:.0f} % of the labels of tables could not be explained where a fifth had
been redrawn at random, and {as_they_are.its_unexplained.percent:.0f} % where none had."""
    + told(
        "photos_40",
        """ Of human labels of photos, it was {photos_40.its_unexplained.percent:.0f} % where
{photos_40.share:.0f} % were wrong, and {photos_9.its_unexplained.percent:.0f} % where {photos_9.share:.0f} % were.""",
    ),
    "worth: own body": judged(),
    "worth: words": told(
        "texts_minilm",
        """
Networks that learn texts from scratch are judged better by words, without an encoder: in {texts_words.count} runs their
epoch loses {texts_words.expected_accuracy_accuracy_lost:.1f} points, that by MiniLM
{texts_minilm.expected_accuracy_accuracy_lost:.1f}, the last {texts_words.never_stop_accuracy_lost:.1f}.""",
    ),
    "worth: labels": table(
        "accuracy lost, points",
        LABELS,
        {
            f"{label}: {by}": f"{{{name}.ROW{end}_accuracy_lost:.1f}}"
            for label, name in WITH_LABELS.items()
            for by, end in (("labels alone", ""), ("**and the reference**", "_combined"))
        },
    )
    + """

Without labels, the highest expected accuracy loses """
    + ", ".join(f"{{{name}.expected_accuracy_accuracy_lost:.1f}} on {label}" for label, name in WITH_LABELS.items())
    + ".",
    "worth: compare": table(
        "chosen by",
        NETWORKS,
        {"points lost": "{alike.ROW_lost:.2f}", "worst": "{alike.ROW_lost.worst:.1f}", "τ": "{alike.ROW_tau:.2f}"},
    )
    + """

Points of test accuracy lost against the best of 6 networks, each at its chosen epoch, on {alike.count} tables"""
    + (
        "; on {photos_alike.count} sets of photos {photos_alike.expected_lost:.1f}, with an encoder "
        "{photos_alike_lite0.expected_lost:.1f}, at random {photos_alike.random_lost:.1f}"
    )
    * bool(NAMES["photos_alike"].count)
    + ".",
}
