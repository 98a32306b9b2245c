"""What pages tell of a bound on sensitivity: chosen on the design half, told of the check half."""

from pathlib import Path
from typing import Any

from summaries import Runs

TIMES = {"1": "100", "1.25": "125", "1.5": "150", "2": "200", "3": "300"}  # k
FORMS = {
    "single outputs, the epoch that passes it": "single",
    "single outputs, the epoch before": "before",
    "the mean of the outputs, the epoch that passes it": "mean",
}
CALM = 0.05  # if the earlier validation loss rises by less till its end, there is nothing to stop for
CHANGES = {
    "samples, seed": "samples, seed",
    "**all labels**": "all labels",
    "twice the samples": "samples x 2",
    "more label noise": "more noise",
    "less label noise": "less noise",
    "learning rate / 3": "rate div 3",
    "learning rate × 3": "rate x 3",
    "batch size × 4": "batch x 4",
    "width × 2": "width x 2",
}
KINDS = {
    "tables, MLPs": "tables",
    "digits, CNNs": "digits",
    "Fashion-MNIST, CNNs": "fashion",
    "photos, ResNets": "photos",
    "photos, augmented": "photos augmented",
}


def read() -> Runs:
    """Read the pairs. Rules that an earlier run gives are there twice, also as ``calm_``, with the condition."""
    frame = Runs.read(Path(__file__).with_name("results.csv")).frame
    for rule in ["epoch", "steps", "train_loss", *(f"{form}_{k}" for form in FORMS.values() for k in TIMES.values())]:
        frame[f"calm_{rule}"] = frame[rule].where(frame["rise"] >= CALM, frame["never"])
    return Runs(frame)


PAIRS = read()
DESIGN, CHECK = PAIRS.where("is_design"), PAIRS.where("not is_design")


# %% What is chosen on the design half alone: what is bounded, k, the epoch that is kept, and the condition
def mean(rule: str) -> float:
    """Give what a rule loses on the design half."""
    return float(getattr(DESIGN, rule).mean)


CHOSEN = min(
    (mean(f"{calm}{form}_{TIMES[k]}"), calm, form, k)
    for calm in ("", "calm_")
    for form in FORMS.values()
    for k in TIMES
)
_, IS_CALM, FORM, K = CHOSEN
BOUND = f"{IS_CALM}{FORM}_{TIMES[K]}"

# %% What is told. Where the condition holds, no rule of an earlier run stops.
RULES = {
    "never": "never",
    "its epoch": f"{IS_CALM}epoch",
    "its steps": f"{IS_CALM}steps",
    "its training loss": f"{IS_CALM}train_loss",
    f"**single outputs, k = {K}**": BOUND,
    "`RiskMonitor`": "recipe",
    "300 labels": "labels",
}


def cell(runs: Runs, rule: str) -> str:
    """Give what a rule loses; with the number of pairs, if some have no value of it."""
    if runs.frame[rule].isna().all():
        return "–"
    found = getattr(runs, rule)
    return f"{found:.1f}" + f" ({found.count})" * (found.count < runs.count)


def against(runs: Runs, rule: str) -> str:
    """Give by how much more the bound loses than a rule, with an interval over data sets."""
    found = runs.where(f"{rule}.notna()")
    return f"{getattr(found, BOUND).minus[rule].interval:+.1f}" if found.count > 1 else "–"


def rows(of: Runs, column: str, labels: dict[str, str]) -> dict[str, Runs]:
    """Give the pairs of each row, and all of them, by label and number of pairs."""
    found = {label: of.where(f"{column} == '{value}'") for label, value in labels.items()} | {"all": of}
    return {f"{label} ({runs.count})": runs for label, runs in found.items() if runs.count}


def table(corner: str, columns: list[str], of_rows: dict[str, list[str]]) -> str:
    lines = [[corner, *columns], *([label, *cells] for label, cells in of_rows.items())]
    head, *rest = (f"| {' | '.join(each)} |" for each in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def by_rule(corner: str, of_rows: dict[str, Runs], rules: dict[str, str], give: Any = cell) -> str:
    cells = {label: [give(runs, rule) for rule in rules.values()] for label, runs in of_rows.items()}
    return table(corner, list(rules), cells)


def chosen() -> str:
    """Give what each bound loses on the design half, without the condition and with it."""
    cells = {
        label + with_it: [f"{mean(f'{calm}{form}_{k}'):.2f}" for k in TIMES.values()]
        for calm, with_it in (("", ""), ("calm_", "; the condition"))
        for label, form in FORMS.items()
    }
    return table(f"design half, {DESIGN.count} pairs: a bound on", [f"k = {times}" for times in TIMES], cells)


LOST = "points of accuracy lost"
DIFFERENCES = {f"the bound − {label}": rule for label, rule in RULES.items() if rule != BOUND}
EPOCH, ALL = f"{IS_CALM}epoch", CHECK.where("change == 'all labels'")


def beside(runs: Runs) -> str:
    """Give what the rivals of the bound lose, each with the difference of the bound from it."""
    told = {"never stopping": "never", "its number of epochs": EPOCH, "its training loss": f"{IS_CALM}train_loss"}
    found = ", ".join(f"{label} {cell(runs, rule)} ({against(runs, rule)})" for label, rule in told.items())
    return found.replace("(", "(difference ", 1)


def of_change(change: str, other: str) -> str:
    return against(CHECK.where(f"change == '{change}'"), other)


PHOTOS, AUGMENTED = CHECK.where("kind == 'photos'"), CHECK.where("kind == 'photos augmented'")
IN_WORDS = f"""
**Yes, but it saves little**: where the validation loss of a tuning run rose by 5 % or more after its lowest value, stop
when sensitivity passes {K} times its value there. After a final training on all labels, those of the tuning run's
training and validation set together, that lost {cell(ALL, BOUND)} points of accuracy, {beside(ALL)}, and `RiskMonitor`
{cell(ALL, "recipe")}. Over all {CHECK.count} pairs of runs, on {getattr(CHECK, BOUND).tables} data sets on which
nothing was chosen, it lost {cell(CHECK, BOUND)}, {beside(CHECK)}, `RiskMonitor` {cell(CHECK, "recipe")}, and 300 more
labels {cell(CHECK, "labels")}.

It is better than the number of epochs where the learning rate is a third ({of_change("rate div 3", EPOCH)}) or the
batch size fourfold ({of_change("batch x 4", EPOCH)}), worse where only samples and seed differ
({of_change("samples, seed", EPOCH)}) or more labels are wrong ({of_change("more noise", EPOCH)}), and about as good as
the training loss, which knows nothing of unseen data. **Don't stop ResNets of photos by it**: there it lost
{cell(PHOTOS, BOUND)}, never stopping {cell(PHOTOS, "never")}; with augmentation, {cell(AUGMENTED, BOUND)} and
{cell(AUGMENTED, "never")}. If it may stop whether or not the loss had risen, it
loses {cell(CHECK, BOUND.removeprefix("calm_"))}."""
README = f"""
It helps a little: by this rule, final runs on all labels lost {cell(ALL, BOUND)} points of accuracy, never stopping
{cell(ALL, "never")}, the tuning run's number of epochs {cell(ALL, EPOCH)}. **Not for ResNets of photos**: over all
changes, it lost {cell(PHOTOS, BOUND)}, never stopping {cell(PHOTOS, "never")}."""
NAMES: dict[str, Any] = {"check": CHECK}
BLOCKS: dict[str, str] = {
    "bounds: in words": IN_WORDS,
    "bounds: README": README,
    "bounds: chosen": chosen(),
    "bounds: in short": by_rule(LOST, rows(CHECK, "change", CHANGES), RULES),
    "bounds: design half": by_rule(f"{LOST}, design half", rows(DESIGN, "change", CHANGES), RULES),
    "bounds: kinds": by_rule(LOST, rows(CHECK, "kind", KINDS), RULES),
    "bounds: differences": by_rule("check half", rows(CHECK, "change", CHANGES), DIFFERENCES, against),
}
