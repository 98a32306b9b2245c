"""What README and the guide tell of the study of stopping; its own report tells all of it."""

from stopping.parts import NAMES, counted, dagger, lost, told
from summaries import across, table

__all__ = ["BLOCKS", "NAMES"]
AUC = {
    "last epoch": "never_stop",
    "expected accuracy": "expected_accuracy",
    "**expected AUROC**": "expected_auc",
    "a tenth, its AUROC": "tenth_by_auc",
}
FEW = {"as they come": "few_plain", "class weights": "few_weights", "weighted sampler": "few_sampler"}
FEW |= {"undersampled": "few_undersampled", "undersampled, `class_shares=`": "few_undersampled_known"}
LABELS = {f"{count} labels": f"labels_{count}" for count in (50, 200, 600)} | {"a tenth": "tenth"}
BY_LABELS = "labels_50_by_accuracy_accuracy_lost"
WITH_LABELS = {"tables": "tables", "photos, an encoder": "photos_lite0", "texts": "texts"}
WITH_LABELS = {label: name for label, name in WITH_LABELS.items() if NAMES[name].frame[BY_LABELS].notna().any()}


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
    head = [
        "encoder",
        *(f"{label}{dagger(NAMES[f'{name}_body'])} ({{{name}_body.count}}): lost" for name, label in networks.items()),
    ]
    lines = [head, ["---"] * len(head), *([judge, *cells] for judge, cells in rows.items() if set(cells) != {"–"})]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def in_limits(form: str) -> str:
    """Say a number of the losses of each kind of data that there is."""
    kinds = {"tables": "tables", "photos": "photos_lite0", "texts": "texts", "signals": "signals"}
    found = [
        f"{{{runs}.expected_accuracy_accuracy_lost.{form}}} on {label}{dagger(NAMES[runs])}"
        for label, runs in kinds.items()
        if NAMES[runs].count
    ]
    return ", ".join(found)


def of_both() -> str:
    """Say what the mean of network and reference gains over the kept epoch."""
    kinds = {
        "tables": "as_they_are",
        "few positives": "few",
        "texts": "texts",
        "photos, by an encoder": "photos_lite0",
        "fine-tuned networks, by a larger encoder": "tuned_lite0",
    }
    gain = "{RUNS.mean_accuracy.minus[chosen_accuracy].interval:.1f} points ({RUNS.reference_leads.percent:.0f} %)"
    found = [
        f"on {label}{dagger(NAMES[runs])} by {gain.replace('RUNS', runs)}"
        for label, runs in kinds.items()
        if NAMES[runs].frame["chosen_accuracy"].notna().any()
    ]
    return f"""
The mean of both is better than the kept epoch (in brackets: runs in which the reference is better than the network):
{", ".join(found)}.""" * bool(found)


def of_tenth() -> str:
    """Say what it costs to hold out a tenth, and to choose by its loss, of each kind of data that there is."""
    kinds = {"tables": "tables", "large tables": "large", "few positives": "few", "photos": "photos", "texts": "texts"}
    found = [
        f"on {label}{dagger(NAMES[name])} {{{name}_held.gained.interval:.1f}} ({{{name}_held.gained.count}} runs)"
        for label, name in kinds.items()
        if NAMES[f"{name}_held"].count > 1
    ]
    return f"That cost more points than `RiskMonitor`, trained on all: {', '.join(found)}." if found else ""


def without_labels() -> str:
    """Say what is lost where no label chooses."""
    loses = (
        f"{{{name}.expected_accuracy_accuracy_lost:.1f}} on {label}{dagger(NAMES[name])}"
        for label, name in WITH_LABELS.items()
    )
    return f"\n\nWithout labels, the highest expected accuracy loses {', '.join(loses)}." if WITH_LABELS else ""


BLOCKS = {
    "worth: the reference itself": of_both(),
    "worth: tenth": of_tenth(),
    "worth: limits": f"""
- **One run in ten** loses these points or more: {in_limits("p90:.1f")}. The worst loses {in_limits("worst:.0f")}."""
    if in_limits("worst:.0f")
    else "",
    "worth: few positives": table("AUROC lost, points", counted(FEW), across(AUC, lost("COLUMN", "auc"))),
    "worth: balanced": """
Of balanced accuracy, its own expectation loses {few.expected_balanced_balanced_lost:.1f} points, the last epoch
{few.never_stop_balanced_lost:.1f}, expected accuracy {few.expected_accuracy_balanced_lost:.1f}, and balanced accuracy
on a tenth {few.tenth_by_balanced_balanced_lost:.1f}; of macro F1 {few.expected_f1_f1_lost:.1f},
{few.never_stop_f1_lost:.1f}, {few.expected_accuracy_f1_lost:.1f} and {few.tenth_by_f1_f1_lost:.1f}.""",
    "worth: regression": """
On {numbers.expected_loss_loss_lost.count} runs of real tables, half of them with noise added to the targets, the
squared error of the kept epoch was {numbers.expected_loss_loss_lost:.1f} % above the lowest of its run, of the last
{numbers.never_stop_loss_lost:.1f}, of one that 50 targets chose {numbers.labels_50_loss_lost:.1f}, and 200
{numbers.labels_200_loss_lost:.1f}.""",
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
            for by, end in {
                "their accuracy": "_by_accuracy",
                "**and the reference**": "_combined",
            }.items()
        },
    )
    + without_labels(),
    "worth: compare": """
Of 6 networks, each at its kept epoch, on {alike.expected_lost.tables} tables, it took one that loses
{alike.expected_lost:.2f} points against the best, 100 labels {alike.labels_100_lost:.2f}, both together
{alike.labels_100_combined_lost:.2f}, 600 labels
{alike.labels_600_lost:.2f}, the networks' own confidence {alike.confidence_lost:.2f}, chance
{alike.random_lost:.2f}."""
    + told(
        "photos_alike",
        """ On {photos_alike.count} sets of photos it lost {photos_alike.expected_lost:.1f}, chance
{photos_alike.random_lost:.1f}.""",
    ),
}
