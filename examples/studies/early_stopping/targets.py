"""What the study had to reach, by the words of the plan (issue 41): a line each, met or missed."""

from __future__ import annotations

from rules import CRITERION, HELD_BRIER, NEVER, RAW, beside
from tables import HALVES, OURS, Groups, bounds, noise_numbers, of, table

NOISY, CORRECT = "all pools: noisy labels", "all pools: correct labels"
AGREE, DISAGREE = (f"{NOISY}, {HALVES[half]}" for half in ("agree", "disagree"))


class Targets:
    """Checks one target after the other."""

    def __init__(self, found: Groups) -> None:
        self.found = found
        self.lines: list[dict[str, object]] = []

    def check(self, target: str, value: float, bound: float, is_least: bool = False) -> None:
        is_met = value >= bound if is_least else value <= bound
        told = f"{'at least' if is_least else 'at most'} {bound:.2f}"
        self.lines.append({"target": target, "bound": told, "reached": round(value, 3), "met": bool(is_met)})

    def mean(self, group: str, rule: str, yardstick: str = "accuracy") -> float:
        return float(of(self.found[group], rule, yardstick).mean())

    def noisy(self) -> None:
        runs, lost = self.found[NOISY], of(self.found[NOISY], CRITERION)
        self.check("noisy labels: accuracy lost", float(lost.mean()), 1.5)
        for other in (NEVER, HELD_BRIER):
            difference = bounds(lost - of(runs, other))[1]
            self.check(f"noisy labels: more than {other}, upper end", difference, 0)
        self.check("noisy labels: accuracy lost, 90 %", float(lost.quantile(0.9)), 4)

    def correct(self) -> None:
        lost, never = (self.mean(CORRECT, rule) for rule in (CRITERION, NEVER))
        self.check(f"correct labels: accuracy lost, {NEVER} + 0.2", lost, never + 0.2)
        regret, never = (self.mean(CORRECT, rule, "loss") for rule in (CRITERION, NEVER))
        self.check(f"correct labels: loss regret, half of {NEVER}", regret, never / 2)

    def halves(self) -> None:
        if AGREE not in self.found or DISAGREE not in self.found:
            return
        share = 100 * len(self.found[AGREE]) / len(self.found[NOISY])
        self.check("noisy labels: percent of runs where the reference agrees", share, 50, is_least=True)
        agree, disagree = (self.mean(group, CRITERION) for group in (AGREE, DISAGREE))
        self.check("the reference agrees: accuracy lost", agree, 1.2)
        self.check("it disagrees: more than where it agrees", disagree - agree, 1.3, is_least=True)
        what = beside("noisy", 50)
        self.check(f"it disagrees: accuracy lost with {what}", self.mean(DISAGREE, what), 2.0)

    def labels(self) -> None:
        runs = self.found["all pools: all"]
        noisy = runs[runs["share wrong"] >= 0.08]
        correct = runs[~runs["is_noisy"]]
        wrongly = 100 * float((noisy["said of labels"] == "no noise").mean())
        self.check("8 % or more wrong labels: percent told that no noise is found", wrongly, 2)
        called = 100 * float((correct["said of labels"] == "wrong").mean())
        self.check("correct labels: percent told that labels look wrong", called, 10)
        numbers = noise_numbers(runs[runs["label noise"].notna()], "label noise")
        self.check(f"share of wrong labels by {OURS}: mean error, points", numbers["error"], 6)

    def fine_tuning(self) -> None:
        group = "fine-tuning: all"
        if group in self.found:
            runs = self.found[group]
            self.check("fine-tuning: accuracy lost", self.mean(group, CRITERION), 1.0)
            difference = bounds(of(runs, CRITERION) - of(runs, RAW))[1]
            self.check("fine-tuning: with `features=` more than without, upper end", difference, 0)


def targets(found: Groups) -> list[dict[str, object]]:
    """Check what the study had to reach."""
    checked = Targets(found)
    if NOISY in found and CORRECT in found:
        checked.noisy()
        checked.correct()
        checked.halves()
        checked.labels()
    checked.fine_tuning()
    return checked.lines


def targets_table(lines: list[dict[str, object]]) -> str:
    told = [f"{x['target']} | {x['bound']} | {x['reached']} | {'met' if x['met'] else '**missed**'}" for x in lines]
    return table("target | bound | reached | ", told)
