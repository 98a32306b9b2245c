"""What pages tell of a bound on sensitivity: chosen on the design half, told of the check half."""

from pathlib import Path
from typing import Any

from summaries import Runs

HERE = Path(__file__).parent
PAIRS, RISES = Runs.read(HERE / "results.csv"), Runs.read(HERE / "rises.csv")
DESIGN, CHECK = PAIRS.where("is_design"), PAIRS.where("not is_design")
TIMES = {"1": "100", "1.5": "150", "2": "200", "3": "300", "5": "500", "10": "1000"}  # k
FORMS = {
    "S": "s",
    "S / mean square of the logits": "s_scaled",
    "S / that of the first epoch": "s_grown",
    "single outputs": "single",
    "single outputs / mean square": "single_scaled",
    "single outputs / first epoch": "single_grown",
}
CHANGES = {
    "samples, seed": "samples, seed",
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
RISE = {2: "twofold", 5: "fivefold", 10: "tenfold"}
POINT = 1.0  # of test accuracy


# %% What is chosen.
def mean(rule: str) -> float:
    """Give what a rule loses on the design half."""
    return float(getattr(DESIGN, rule).mean)


def lowest(form: str) -> str:
    """Give the k of a form that loses least on the design half."""
    return min(TIMES, key=lambda times: mean(f"{form}_{TIMES[times]}"))


FORM = min(FORMS.values(), key=lambda form: mean(f"{form}_{TIMES[lowest(form)]}"))
BOUND, OF_S = f"{FORM}_{TIMES[lowest(FORM)]}", f"s_{TIMES[lowest('s')]}"
LABELS = min((f"labels_{by}" for by in ("accuracy", "loss", "refined")), key=mean)

# %% What is told.
RULES = {
    "never": "never",
    "its epoch": "epoch",
    "its steps": "steps",
    f"S, k = {lowest('s')}": OF_S,
    f"**single outputs, k = {lowest(FORM)}**": BOUND,
    "`RiskMonitor`": "recipe",
    "300 labels": LABELS,
}
SHORT = {
    "never stopping": "never",
    "the earlier run's epoch": "epoch",
    f"**the bound, {lowest(FORM)} times**": BOUND,
    "`RiskMonitor`": "recipe",
    "300 labels": LABELS,
}


def cell(runs: Runs, rule: str) -> str:
    """Give what a rule loses; with the number of pairs, if some have no value of it."""
    if runs.frame[rule].isna().all():
        return "–"
    found = getattr(runs, rule)
    return f"{found:.1f}" + f" ({found.count})" * (found.count < runs.count)


def against(runs: Runs, rule: str) -> str:
    """Give by how much more the bound loses than a rule, with an interval."""
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
    cells = {label: [f"{mean(f'{form}_{k}'):.2f}" for k in TIMES.values()] for label, form in FORMS.items()}
    return table(f"design half, {DESIGN.count} pairs: a bound on", [f"k = {times}" for times in TIMES], cells)


def after_rises() -> str:
    """Tell how often test accuracy had fallen, or risen, by a point when sensitivity had risen so many times."""
    told = []
    for times, word in RISE.items():
        falls = RISES.frame[f"fall_{times}"].dropna()
        fallen, risen = 100 * falls.ge(POINT).mean(), 100 * falls.le(-POINT).mean()
        told.append(f"{word}, it had fallen in {fallen:.0f} % of {len(falls)} runs and risen in {risen:.0f} %")
    ends = RISES.frame["fall_end"]
    fallen, risen = 100 * ends.ge(POINT).mean(), 100 * ends.le(-POINT).mean()
    return f"""
Test accuracy is compared with that at the epoch where training accuracy reached 90 % of its end. When S had risen
{"; ".join(told)}; at the end of all {len(ends)} runs, in {fallen:.0f} % and {risen:.0f} %."""


def lost(rule: str) -> str:
    """Give what a rule loses in all pairs of the check half."""
    return f"{getattr(CHECK, rule):.1f}"


def of_change(change: str, other: str) -> str:
    return against(CHECK.where(f"change == '{change}'"), other)


IN_WORDS = f"""
**No**: a bound that an earlier run gives is no better than never stopping. Over {CHECK.count} pairs of runs, which
differ in samples, seed and one thing more, keeping the epoch before sensitivity passed {lowest(FORM)} times its value
at the earlier run's best epoch lost {lost(BOUND)} points of accuracy, never stopping {lost("never")} (the difference
{against(CHECK, "never")}), the earlier run's number of epochs {lost("epoch")}, `RiskMonitor` {lost("recipe")} and 300
labels {lost(LABELS)}. The bound is better than that number of epochs where training is slower, at a third of the
learning rate ({of_change("rate div 3", "epoch")}) and perhaps at four times the batch size
({of_change("batch x 4", "epoch")}), but not better than never stopping there; after the other changes it loses more."""
README = f"""
No. Over {CHECK.count} pairs of runs, the bound, {lowest(FORM)} times the value at the best epoch of an earlier run,
lost {lost(BOUND)} points of accuracy, never stopping {lost("never")}, the earlier run's number of epochs
{lost("epoch")}, and `RiskMonitor` {cell(CHECK, "recipe").replace("(", "(of ")}."""
DIFFERENCES = {f"the bound − {label}": rule for label, rule in RULES.items() if rule != BOUND}
LOST = "points of accuracy lost"
NAMES: dict[str, Any] = {"check": CHECK, "rises": RISES}
BLOCKS = {
    "bounds: in words": IN_WORDS,
    "bounds: README": README,
    "bounds: rises": after_rises(),
    "bounds: chosen": chosen(),
    "bounds: in short": by_rule(LOST, rows(CHECK, "change", CHANGES), RULES),
    "bounds: short": by_rule(f"{LOST}; what differs (pairs)", rows(CHECK, "change", CHANGES), SHORT),
    "bounds: design half": by_rule(f"{LOST}, design half", rows(DESIGN, "change", CHANGES), RULES),
    "bounds: kinds": by_rule(LOST, rows(CHECK, "kind", KINDS), RULES),
    "bounds: differences": by_rule("check half", rows(CHECK, "change", CHANGES), DIFFERENCES, against),
    "bounds: differences, design": by_rule("design half", rows(DESIGN, "change", CHANGES), DIFFERENCES, against),
}
