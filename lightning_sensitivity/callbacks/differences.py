"""How validation samples differ from training samples, or that they don't, which is said."""

from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity.callbacks.run import Run
from lightning_sensitivity.reference.groups import group_means, known_share
from lightning_sensitivity.reference.neighbors import farther_share
from lightning_sensitivity.reference.observations import Observations, largest_difference, projection, repeated_share

_SHARES_DIFFER = 4.0  # standard errors between mean predictions; no false alarm in 79 runs of the design half
_COLUMNS_DIFFER = 8.0  # standard errors between means of a column: at most 3.9 in 222 random splits


class Differences:
    """Compares the validation samples of each loader with training samples, and warns.

    Args:
        known: Training samples.
        are_inputs: Whether columns are those of inputs, and not of ``features=``.
        run: Says it.
    """

    def __init__(self, known: Observations, are_inputs: bool, run: Run) -> None:
        self._known = known
        self._places = projection(known.seen)
        self._has_columns = are_inputs and "columns" in known.seen
        self._run = run

    def say(self, dataloader_idx: int, new: Observations) -> None:
        """Compare samples of a loader with training samples."""
        has_other_columns = self._has_columns and self._say_columns(dataloader_idx, new)
        self._say_repeated(dataloader_idx, new)
        self._say_groups(dataloader_idx, new)
        if self._has_columns and self._known.groups is None and not has_other_columns:
            self._say_likely_groups(dataloader_idx, new)

    def say_shares(self, dataloader_idx: int, fitted: Any, q: Tensor, groups: Tensor | None) -> None:
        """Warn if classes seem to have other shares among validation samples than among training samples.

        Args:
            dataloader_idx: The loader.
            fitted: The reference.
            q: What it predicts for validation samples, ``(N, C)``.
            groups: The group of each validation sample, ``(N,)``; None without groups.
        """
        left_out = torch.from_numpy(fitted.left_out_)
        known_groups = None if groups is None else torch.from_numpy(fitted.groups_)
        gap, size = largest_difference(group_means(left_out, known_groups), group_means(q, groups))
        if size > _SHARES_DIFFER:
            message = (
                f"predicts class {gap} for {left_out[:, gap].mean():.0%} of the training samples and "
                f"{q[:, gap].mean():.0%} of dataloader {dataloader_idx}. If a sampler or undersampling changes the "
                "shares of classes, set `class_shares=`."
            )
            self._run.warn("class-shares", message, kind=str(dataloader_idx))

    def _say_columns(self, dataloader_idx: int, new: Observations) -> bool:
        """Warn if a column has another mean among validation samples, and return whether one has."""
        means = (group_means(each.seen["columns"], each.groups) for each in (self._known, new))
        column, size = largest_difference(*means)
        if size > _COLUMNS_DIFFER:
            message = (
                f"finds that column {column} of the inputs has another mean in dataloader {dataloader_idx} than in "
                f"training, by {size:.0f} standard errors: scale both alike, and leave out what is known only "
                "afterwards."
            )
            self._run.warn("columns", message, kind=str(dataloader_idx))
        return size > _COLUMNS_DIFFER

    def _say_repeated(self, dataloader_idx: int, new: Observations) -> None:
        """Warn if validation samples are training samples, unless different samples are often equal."""
        share = repeated_share(projection(new.seen), self._places)
        if share > 0:
            message = (
                f"finds that {share:.0%} of the samples of dataloader {dataloader_idx} are training samples: a network "
                "knows their labels, and the values say nothing of others. Validate on other samples."
            )
            self._run.warn("repeated", message, kind=str(dataloader_idx))

    def _say_groups(self, dataloader_idx: int, new: Observations) -> None:
        """Warn if validation samples are of groups that training has seen."""
        share = known_share(new.groups, self._known.groups)
        if share > 0:
            message = (
                f"finds that {share:.0%} of the samples of dataloader {dataloader_idx} are of groups that training has "
                "seen: the values hold for these groups alone. Validate on other ones."
            )
            self._run.warn("groups", message, kind=str(dataloader_idx))

    def _say_likely_groups(self, dataloader_idx: int, new: Observations) -> None:
        """Warn if training samples are so near to each other as those of the same persons are."""
        share = farther_share(self._known, new)
        if share > 0:
            message = (
                f"finds that training samples are nearer to each other than those of dataloader {dataloader_idx} are "
                f"to them ({share:.0%} are farther from the nearest one; by chance half are). If several are of one "
                "patient, household or machine, set `groups=`: without it, too much is expected."
            )
            self._run.warn("groups", message, kind=f"likely {dataloader_idx}")
