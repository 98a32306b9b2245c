"""What makes values doubtful: samples that differ or don't, and outputs that are hardly logits of the classes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_sensitivity.reference.observations import (
    Observations,
    farther_share,
    group_means,
    known_share,
    largest_difference,
    repeated_share,
)

_SHARES_DIFFER = 4.0  # standard errors between mean predictions; no false alarm in 79 runs of the design half
SOME_VALIDATIONS = 3  # after which a network is better than a constant prediction
_FEWEST_OUTPUTS, _LABELS_OF_EACH, _MANY = 4, 5, 100  # from which on it is odd that most classes never occur

CONSTANT = "worse than a constant"  # as a summary has it
REASONS = {
    CONSTANT: f"the network was worse than a constant prediction in {SOME_VALIDATIONS} validations. If your step "
    "scales targets or takes logarithms, do the same in `targets=`.",
}
Warn: TypeAlias = Callable[..., None]  # by an entry of the page on troubleshooting, a message, and what is special


def say_unused(shares: Sequence[float], num_labels: int) -> str:
    """Say that most outputs are the class of no training label, though there are many; nothing if that is not so.

    Args:
        shares: The shares of the classes among training labels.
        num_labels: How many of these there are.
    """
    num_unused = sum(share == 0 for share in shares)
    num_used = len(shares) - num_unused
    are_many = num_labels >= max(_LABELS_OF_EACH * num_used, min(_LABELS_OF_EACH * len(shares), _MANY))
    are_most = len(shares) / 2 < num_unused < len(shares) - 1  # one class alone is said elsewhere
    if len(shares) < _FEWEST_OUTPUTS or not are_many or not are_most:
        return ""
    return (
        f"gets {len(shares)} outputs, of which {num_unused} are the class of none of {num_labels:,} training labels. "
        "If `forward` returns features, say where logits are: `outputs=module.head`, or `call=lambda module, batch: "
        "module.head(module(batch[0]))`."
    )


def say_differences(training: Observations, new: Observations, where: str, are_inputs: bool, warn: Warn) -> None:
    """Warn of samples or groups that training has, too, and of groups without a name.

    Args:
        training: Training samples.
        new: New samples.
        where: What these are called, such as ``"dataloader 0"``.
        are_inputs: Whether columns are those of inputs, and not of ``features=``.
        warn: Warns, by an entry of the page on troubleshooting, a message, and what tells it from others of the entry.
    """
    if share := repeated_share(new.projected, training.projected):
        message = (
            f"finds that {share:.0%} of the samples of {where} are training samples: a network knows their labels, "
            "and the values say nothing of others. Take others."
        )
        warn("repeated", message, where)
    if share := known_share(new.groups, training.groups):
        number = f"{round(share * len(new))} of {len(new)}"
        message = (
            f"finds that {number} samples of {where} are of groups that training has seen: the values hold for "
            "these groups alone. Take other ones."
        )
        warn("groups", message, where)
    if are_inputs and training.groups is None and (share := farther_share(training, new)):
        message = (
            f"finds that samples of {where} are farther from training samples than these are from each other "
            f"({share:.0%} are; by chance it is half). If several are of one patient, household or "
            "machine, set `groups=`: without it, too much is expected."
        )
        warn("groups", message, f"likely {where}")


def say_shares(where: str, fitted: Any, q: Tensor, groups: Tensor | None, warn: Warn) -> None:
    """Warn if classes seem to have other shares among new samples than among training samples.

    Args:
        where: As for :func:`say_differences`.
        fitted: The reference.
        q: What it predicts for new samples, ``(N, C)``.
        groups: The group of each new sample, ``(N,)``; None without groups.
        warn: Warns, by an entry of the page on troubleshooting, a message, and what tells it from others of the entry.
    """
    left_out = torch.from_numpy(fitted.left_out_)
    known_groups = None if groups is None else torch.from_numpy(fitted.groups_)
    label, size = largest_difference(group_means(left_out, known_groups), group_means(q, groups))
    if size > _SHARES_DIFFER:
        message = (
            f"predicts class {label} for {left_out[:, label].mean():.0%} of the training samples and "
            f"{q[:, label].mean():.0%} of {where}. If a sampler or undersampling changes the shares of classes, set "
            "`class_shares=`."
        )
        warn("class-shares", message, where)
