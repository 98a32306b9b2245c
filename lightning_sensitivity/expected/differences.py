"""How validation samples differ from training samples, or that they don't, which is said."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity.reference.observations import (
    Observations,
    farther_share,
    group_means,
    known_share,
    largest_difference,
    projection,
    repeated_share,
)

_SHARES_DIFFER = 4.0  # standard errors between mean predictions; no false alarm in 79 runs of the design half
_COLUMNS_DIFFER = 8.0  # standard errors between means of a column: at most 3.9 in 222 random splits


class Differences:
    """Compares validation samples with training samples, and warns.

    Args:
        known: Training samples.
        are_inputs: Whether columns are those of inputs, and not of ``features=``.
        warn: Warns, by an entry of the page on troubleshooting, a message, and what tells it from others of the entry.
    """

    def __init__(self, known: Observations, are_inputs: bool, warn: Callable[[str, str, str], None]) -> None:
        self._known = known
        self._places = projection(known.seen)
        self._has_columns = are_inputs and "columns" in known.seen
        self.warn = warn

    def say(self, where: str, new: Observations) -> None:
        """Warn of columns with another mean, of samples or groups that training has, and of groups without a name.

        Args:
            where: What new samples are called, such as ``"dataloader 0"``.
            new: New samples.
        """
        has_other_columns = False
        if self._has_columns:
            column, size = largest_difference(
                *(group_means(each.seen["columns"], each.groups) for each in (self._known, new))
            )
            has_other_columns = size > _COLUMNS_DIFFER
            if has_other_columns:
                message = (
                    f"finds that column {column} of the inputs has another mean in {where} than in training, by "
                    f"{size:.0f} standard errors: scale both alike, and leave out what is known only afterwards."
                )
                self.warn("columns", message, where)
        if share := repeated_share(projection(new.seen), self._places):
            message = (
                f"finds that {share:.0%} of the samples of {where} are training samples: a network knows their labels, "
                "and the values say nothing of others. Take others."
            )
            self.warn("repeated", message, where)
        if share := known_share(new.groups, self._known.groups):
            number = f"{round(share * len(new))} of {len(new)}"
            message = (
                f"finds that {number} samples of {where} are of groups that training has seen: the values hold for "
                "these groups alone. Take other ones."
            )
            self.warn("groups", message, where)
        may_have_groups = self._has_columns and self._known.groups is None and not has_other_columns
        if may_have_groups and (share := farther_share(self._known, new)):
            message = (
                f"finds that training samples are nearer to each other than those of {where} are to them ({share:.0%} "
                "are farther from the nearest one; by chance half are). If several are of one patient, household or "
                "machine, set `groups=`: without it, too much is expected."
            )
            self.warn("groups", message, f"likely {where}")

    def say_shares(self, where: str, fitted: Any, q: Tensor, groups: Tensor | None) -> None:
        """Warn if classes seem to have other shares among new samples than among training samples.

        Args:
            where: As for :meth:`say`.
            fitted: The reference.
            q: What it predicts for new samples, ``(N, C)``.
            groups: The group of each new sample, ``(N,)``; None without groups.
        """
        left_out = torch.from_numpy(fitted.left_out_)
        known_groups = None if groups is None else torch.from_numpy(fitted.groups_)
        gap, size = largest_difference(group_means(left_out, known_groups), group_means(q, groups))
        if size > _SHARES_DIFFER:
            message = (
                f"predicts class {gap} for {left_out[:, gap].mean():.0%} of the training samples and "
                f"{q[:, gap].mean():.0%} of {where}. If a sampler or undersampling changes the shares of classes, set "
                "`class_shares=`."
            )
            self.warn("class-shares", message, where)
