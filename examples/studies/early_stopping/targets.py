"""What the study had to reach, by the words of the plan (issue 35): a line each, met or missed."""

from __future__ import annotations

import pandas as pd
from rules import BEFORE, COUNTS, ESTIMATE, HELD_BRIER, NEVER, beside
from tables import POOLS, Groups, bounds, of, table, worth

LARGE = "large (n ≥ 4,000) or augmented"
LOST = {"random": 1.9, "as built": 2.4, "wide": 2.0}
WORTH = {"random": 100, "as built": 100, "tables": 50}


class Targets:
    def __init__(self, found: Groups) -> None:
        self.found, self.lines = found, list[str]()

    def check(self, target: str, value: float, bound: float, is_least: bool = False) -> None:
        is_met = value >= bound if is_least else value <= bound
        told = f"{'at least' if is_least else 'at most'} {bound:.2f}"
        self.lines.append(f"{target} | {told} | {value:.2f} | {'met' if is_met else '**missed**'}")

    def mean(self, group: str, rule: str, yardstick: str = "accuracy") -> float:
        return float(of(self.found[group], rule, yardstick).mean())

    def noisy(self, pool: str) -> None:
        """Check what is asked for on noisy labels."""
        group = f"{pool}: noisy labels"
        if group not in self.found:
            return
        runs, lost = self.found[group], of(self.found[group], ESTIMATE)
        held = 2 * self.mean(group, HELD_BRIER)
        target = f"{group}: accuracy lost" + f", twice that of {HELD_BRIER}" * (pool == "tables")
        self.check(target, float(lost.mean()), LOST.get(pool, held))
        if pool == "as built":
            self.check(f"{group}: more than never stopping, upper end", bounds(lost - of(runs, NEVER))[1], 0)
        if pool in WORTH:
            self.check(f"{group}: worth in noisy labels", worth(runs, ESTIMATE), WORTH[pool], is_least=True)

    def tail_and_size(self) -> None:
        for pool in (*POOLS, "all pools"):
            group = f"{pool}: noisy labels"
            if group in self.found:
                lost = of(self.found[group], ESTIMATE)
                self.check(f"{group}: accuracy lost, 90 %", float(lost.quantile(0.9)), 4)
                self.check(f"{group}: accuracy lost, worst", float(lost.max()), 12)
                share = 100 * self.found[group]["size"].between(0.8, 1.25).mean()
                self.check(f"{group}: percent of sizes within 0.8 to 1.25", share, 85, is_least=True)

    def correct(self) -> None:
        group = "all pools: correct labels"
        if group in self.found:
            for yardstick, what, margin in (("accuracy", "accuracy lost", 0.1), ("loss", "loss regret", 0)):
                bound = self.mean(group, BEFORE, yardstick) + margin
                target = f"{group}: {what}, {BEFORE} + {margin}"
                self.check(target, self.mean(group, ESTIMATE, yardstick), bound)

    def large(self, teachers: pd.DataFrame) -> None:
        for pool in (*POOLS, "all pools"):
            group = f"{pool}: {LARGE}"
            if group in self.found:
                bound = self.mean(group, NEVER) + 0.2
                self.check(f"{group}: accuracy lost, {NEVER} + 0.2", self.mean(group, ESTIMATE), bound)
        for _, run in teachers.iterrows():
            ours, never = (100 + run[f"{rule}: loss"] for rule in (ESTIMATE, NEVER))
            self.check(f"{run['kind']}: loss over never stopping's, percent", 100 * (ours / never - 1), 5)

    def labels(self) -> None:
        for pool in POOLS:
            group = f"{pool}: noisy labels"
            if group in self.found:
                for count in COUNTS:
                    what, bound = beside("noisy", count), self.mean(group, ESTIMATE) + 0.05
                    self.check(f"{group}: {what}: accuracy lost, without them + 0.05", self.mean(group, what), bound)


def targets_table(found: Groups, teachers: pd.DataFrame) -> str:
    """Check what the study had to reach."""
    targets = Targets(found)
    for pool in POOLS:
        targets.noisy(pool)
    targets.tail_and_size()
    targets.correct()
    targets.large(teachers)
    targets.labels()
    return table("target | bound | reached | ", targets.lines)
