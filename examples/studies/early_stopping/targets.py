"""What the study had to reach, by the words of the plan: a line each, met or missed."""

from __future__ import annotations

from rules import COUNTS, ESTIMATE, NEVER, STOPPING, named
from tables import Groups, bounds, of, table

MORE = {10: 20, 20: 50, 50: 100}  # labels that should not be better than m labels beside the estimate: 2 m or more
LARGE = "large (n ≥ 4,000) or augmented"


class Targets:
    def __init__(self, found: Groups) -> None:
        self.found, self.lines = found, list[str]()

    def check(self, target: str, value: float, bound: float, is_least: bool = False) -> None:
        is_met = value >= bound if is_least else value <= bound
        told = f"{'at least' if is_least else 'at most'} {bound:.2f}"
        self.lines.append(f"{target} | {told} | {value:.2f} | {'met' if is_met else '**missed**'}")

    def mean(self, group: str, rule: str, yardstick: str = "accuracy") -> float:
        return float(of(self.found[group], rule, yardstick).mean())

    def without_labels(self) -> None:
        group = "random: all"
        if group in self.found:
            self.check(
                f"{group}: accuracy lost, that of 50 correct labels",
                self.mean(group, ESTIMATE),
                self.mean(group, named("correct", 50, "log-loss")),
            )
            lost = float(of(self.found[group], ESTIMATE).quantile(0.9))
            self.check(f"{group}: accuracy lost, 90 %", lost, 4)
        group = "random: correct labels"
        if group in self.found:
            bound = self.mean(group, named("correct", 20, "log-loss"), "loss")
            self.check(f"{group}: loss regret, that of 20 labels", self.mean(group, ESTIMATE, "loss"), bound)
        group = "as built: noisy labels"
        if group in self.found:
            self.check(f"{group}: accuracy lost", self.mean(group, ESTIMATE), 2.5)
        group = "as built: correct labels"
        if group in self.found:
            bound = self.mean(group, NEVER) + 0.5
            self.check(f"{group}: accuracy lost, never stopping + 0.5", self.mean(group, ESTIMATE), bound)

    def large(self, pool: str) -> None:
        group = f"{pool}: {LARGE}"
        if group in self.found:
            for yardstick, what, margin in (("accuracy", "accuracy lost", 0.5), ("loss", "loss regret", 2)):
                bound = self.mean(group, NEVER, yardstick) + margin
                target = f"{group}: {what}, never stopping + {margin}"
                self.check(target, self.mean(group, ESTIMATE, yardstick), bound)

    def size(self, pool: str) -> None:
        for name, runs in self.found.items():
            if name.startswith(pool) and runs["is_noisy"].all() and len(runs) >= 10:
                share = 100 * runs["size"].between(0.8, 1.25).mean()
                bound = 90 if name.endswith(": noisy labels") else 80
                self.check(f"{name}: percent of sizes within 0.8 to 1.25", share, bound, is_least=True)

    def labels(self, pool: str, kind: str) -> None:
        group = f"{pool}: {'noisy labels' if kind == 'noisy' else 'all'}"
        if group not in self.found:
            return
        for count in COUNTS:
            ours, target = named(kind, count, "with the estimate"), f"{group}: {count} {kind} labels and the estimate"
            more = MORE.get(count, count) if pool == "random" or kind == "correct" else count
            lost, loss = self.mean(group, ours), self.mean(group, ours, "loss")
            bound = min(self.mean(group, named(kind, more, way)) for way in ("log-loss", "Brier score"))
            self.check(f"{target}: accuracy lost, that of {more} such labels without it", lost, bound)
            of_theirs = self.mean(group, named(kind, count, "log-loss"), "loss")
            if kind == "noisy":
                self.check(
                    f"{target}: accuracy lost, that of the estimate without labels", lost, self.mean(group, ESTIMATE)
                )
                self.check(f"{target}: loss regret, half of theirs without it", loss, of_theirs / 2)
            else:
                for way in ("log-loss", "Brier score"):
                    low, _ = bounds(of(self.found[group], ours) - of(self.found[group], named(kind, count, way)))
                    what = f"{target}: accuracy lost more than without it ({way}), lower end of the interval"
                    self.check(what, low, 0)
                if count <= 50:
                    self.check(f"{target}: loss regret, theirs without it", loss, of_theirs)

    def stopping(self) -> None:
        for name in self.found:
            bound = self.mean(name, ESTIMATE) + 0.5
            if name.endswith((": all", " labels", LARGE)):
                self.check(f"{name}: accuracy lost, {STOPPING}, its minimum + 0.5", self.mean(name, STOPPING), bound)


def targets_table(found: Groups) -> str:
    """Check what the study had to reach."""
    targets = Targets(found)
    targets.without_labels()
    for pool in ("random", "as built"):
        targets.large(pool)
        targets.size(pool)
        for kind in ("noisy", "correct"):
            targets.labels(pool, kind)
    targets.stopping()
    return table("target | bound | reached | ", targets.lines)
