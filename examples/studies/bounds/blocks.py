"""What pages tell of two clocks, by which a final run is stopped: chosen on the design half, told of the check half."""

from pathlib import Path
from typing import Any

from summaries import Runs

CHANGES = {
    "samples, seed": "samples, seed",
    "**all labels**": "all labels",
    "twice the samples": "samples x 2",
    "more noise": "more noise",
    "less noise": "less noise",
    "learning rate / 3": "rate div 3",
    "learning rate × 3": "rate x 3",
    "batch size × 4": "batch x 4",
    "width × 2": "width x 2",
}
KINDS = {
    "tables, MLPs": "tables",
    "digits, CNNs": "digits",
    "Fashion-MNIST, CNNs": "fashion",
    "photos, ResNets and CNNs": "photos",
    "photos, augmented": "photos augmented",
    "texts": "texts",
}
REGRESSIONS = {"regressions": "regressions", "regressions, noisy targets": "regressions noisy"}
PLACES = {"single best": "best", "**end of the plateau**": "noise", "twice the noise": "wide"}

PAIRS = Runs.read(Path(__file__).with_name("results.csv.gz"))
DESIGN, CHECK = PAIRS.where("is_design"), PAIRS.where("not is_design")
ARE_NUMBERS = "kind.str.startswith('regressions')"
CLASS, NUMBER = CHECK.where(f"not {ARE_NUMBERS}"), CHECK.where(ARE_NUMBERS)
RULE, EPOCHS = "loss_0_noise_clocks", "loss_0_best_epochs"  # the frozen one, and what people do
RULES = {
    "never": "never",
    "its epochs": EPOCHS,
    "1.5 × its epochs": "loss_0_best_epochs_15",
    "its steps": "loss_0_best_steps",
    "its training loss": "loss_0_best_train_loss",
    "S alone, k = 2": "loss_0_best_bound",
    "**two clocks**": RULE,
    "factor 1.5": "loss_0_noise_clocks_15",
    "in steps": "loss_0_noise_clocks_steps",
    "single best": "loss_0_best_clocks",
    "by accuracy": "accuracy_0_noise_clocks",
    "`RiskMonitor`": "recipe",
    "300 labels": "loss_labels",
}
ENDS = {"whole": 0, "patience 3": 3, "patience 5": 5, "patience 10": 10}


def cell(runs: Runs, rule: str) -> str:
    """Give what a rule loses; with the number of pairs, if some have no value of it."""
    if runs.frame[rule].isna().all():
        return "–"
    found = getattr(runs, rule)
    return f"{found:.2f}" + f" ({found.count})" * (found.count < runs.count)


def middle(runs: Runs, rule: str) -> str:
    """Give the median over data sets of what a rule loses."""
    return f"{getattr(runs, rule).means.median():.1f}" if runs.frame[rule].notna().any() else "–"


def short(runs: Runs, rule: str) -> str:
    return f"{getattr(runs, rule):.1f}" if runs.frame[rule].notna().any() else "–"


def interval(runs: Runs, rule: str) -> str:
    return f"{getattr(runs, rule).interval:.1f}" if runs.frame[rule].notna().any() else "–"


def num_sets(runs: Runs) -> int:
    return int(getattr(runs, RULE).tables)


def against(runs: Runs, rule: str) -> str:
    """Give by how much more the rule loses than another, with an interval over data sets."""
    found = runs.where(f"{rule}.notna()")
    return f"{getattr(found, RULE).minus[rule].interval:+.1f}" if found.count > 1 else "–"


def rows(of: Runs, column: str, labels: dict[str, str]) -> dict[str, Runs]:
    """Give the pairs of each row, and all of them, by label and number of pairs."""
    found = {label: of.where(f"{column} == '{value}'") for label, value in labels.items()} | {"all": of}
    return {f"{label} ({runs.count})": runs for label, runs in found.items() if runs.count}


def table(corner: str, of_rows: dict[str, Runs], rules: dict[str, str], give: Any = cell) -> str:
    cells = [[label, *(give(runs, rule) for rule in rules.values())] for label, runs in of_rows.items()]
    head, *rest = (f"| {' | '.join(each)} |" for each in [[corner, *rules], *cells])
    return "\n".join([head, "|---" * (len(rules) + 1) + "|", *rest])


def of_kind(*kinds: str) -> Runs:
    return CHECK.where(f"kind in {kinds}")


def beside(runs: Runs) -> str:
    """Give what never stopping and the tuned number of epochs lose, each with the difference of the rule from it."""
    told = {"never stopping": "never", "the tuned number of epochs": EPOCHS}
    found = ", ".join(f"{label} {cell(runs, rule)} ({against(runs, rule)})" for label, rule in told.items())
    return found.replace("(", "(difference ", 1)


def by_end(place: str, rule: str, monitor: str) -> dict[str, str]:
    return {label: f"{monitor}_{patience}_{place}_{rule}" for label, patience in ENDS.items()}


def ended(corner: str, of: dict[str, Runs]) -> str:
    """Give what the rule loses by how the tuning run ended."""
    told = {"by loss": ("loss", "noise"), "by loss, single best": ("loss", "best")}
    told |= {"by accuracy": ("accuracy", "noise"), "by accuracy, single best": ("accuracy", "best")}
    tables = [
        table(f"{corner}, {label}", of, by_end(place, "clocks", monitor)) for label, (monitor, place) in told.items()
    ]
    return "\n\n".join(tables)


TABLES, PHOTOS, TEXTS = map(of_kind, ("tables", "photos", "texts"))
WORST = NUMBER.frame.loc[NUMBER.frame[RULE].idxmax()]
OTHERS = NUMBER.where(f"{RULE} < {WORST[RULE]}")
README = f"""
On tables, final runs that it stopped lost {interval(TABLES, RULE)} points of accuracy against their best epoch; never
stopped, {short(TABLES, "never")}; after the tuned number of epochs, {short(TABLES, EPOCHS)}. It gains most where
learning rate or batch size change. Regressions lost {middle(NUMBER, RULE)} % of the squared error in the median (never
{middle(NUMBER, "never")}, epochs {middle(NUMBER, EPOCHS)}); one of {NUMBER.count} was stopped far too early. Photos
lose by it, and texts gain nothing: **train these to the end**."""
GUIDE = f"""
**On tables, yes.** On {num_sets(TABLES)} on which nothing was chosen, it lost {cell(TABLES, RULE)} points of accuracy,
{beside(TABLES)}. The final run stops at the first epoch at which (t / t*) (S / S*) > 1.

**On regressions, mostly**: it lost {middle(NUMBER, RULE)} % of the squared error in the median (never
{middle(NUMBER, "never")}, the tuned epochs {middle(NUMBER, EPOCHS)}). **The means say otherwise**: a run whose weights
jumped in its second epoch was stopped there, at {WORST[RULE] / 100:.0f} times the lowest error. In the mean it lost
{cell(NUMBER, RULE)} %, without that run {cell(OTHERS, RULE)} (never {cell(OTHERS, "never")}, epochs
{cell(OTHERS, EPOCHS)}).

**On photos, no**: {interval(PHOTOS, RULE)} points lost, never stopping {interval(PHOTOS, "never")}; by accuracy in
place of the loss {interval(PHOTOS, "accuracy_0_noise_clocks")}; after tuning runs that patience 3 ended
{cell(PHOTOS, "loss_3_noise_clocks")}. Texts: {interval(TEXTS, RULE)}, never {interval(TEXTS, "never")}. `RiskMonitor`
lost {cell(CLASS, "recipe")} over all classifications, this rule {cell(CLASS, RULE)}, never stopping
{cell(CLASS, "never")}, 300 labels {cell(CLASS, "loss_labels")}."""
CHOICE = {
    f"{monitor}, {label}": f"{monitor}_0_{place}_clocks"
    for monitor in ("loss", "accuracy")
    for label, place in PLACES.items()
}
CHOICE |= {"loss, factor 1.5": "loss_0_noise_clocks_15", "loss, steps": "loss_0_noise_clocks_steps"}
DESIGN_ROWS = rows(DESIGN.where(f"not {ARE_NUMBERS}"), "kind", KINDS)
DESIGN_ROWS |= rows(DESIGN.where(ARE_NUMBERS), "kind", REGRESSIONS)
CHECK_CLASSES, CHECK_NUMBERS = rows(CLASS, "kind", KINDS), rows(NUMBER, "kind", REGRESSIONS)
DIFFERENCES = {"− never": "never", "− its epochs": EPOCHS, "− S alone": "loss_0_best_bound",
               "− `RiskMonitor`": "recipe", "− 300 labels": "loss_labels"}  # fmt: skip
LOST, PERCENT = "points of accuracy lost", "percent of squared error"
NAMES: dict[str, Any] = {"check": CHECK}
BLOCKS: dict[str, str] = {
    "bounds: README": README,
    "bounds: guide": GUIDE,
    "bounds: chosen": table("design half", DESIGN_ROWS, CHOICE),
    "bounds: kinds": table(LOST, CHECK_CLASSES, RULES),
    "bounds: changes": table(LOST, rows(CLASS, "change", CHANGES), RULES),
    "bounds: regressions": table(PERCENT, CHECK_NUMBERS, RULES),
    "bounds: medians": table(f"{PERCENT}, median over data sets", CHECK_NUMBERS, RULES, middle),
    "bounds: differences": table("two clocks", CHECK_CLASSES | CHECK_NUMBERS, DIFFERENCES, against),
    "bounds: ends": ended(LOST, CHECK_CLASSES),
}
