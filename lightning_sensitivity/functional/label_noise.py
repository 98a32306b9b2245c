"""Are the labels of a data set noisy? Asked before training, of features and labels alone."""

import torch
from torch import Tensor

from lightning_sensitivity.functional.features import different_samples, principal_components
from lightning_sensitivity.functional.reference import fit_reference
from lightning_sensitivity.functional.tasks import find_task, has_label

_MAX_SAMPLES = 1000  # that a reference is fitted to


def label_noise(features: Tensor, labels: Tensor, task: str = "multiclass") -> float:
    """Estimate how many labels of a data set are wrong: at least this share.

    It fits a reference (:func:`fit_reference`) to at most 1,000 samples, drawn at random but the same in every
    call, and compares their labels with its predictions (:func:`estimate_noise`). Columns are prepared by
    :func:`principal_components`, which looks after those of different units.

    **A low number is no proof of correct labels.** Labels that are redrawn at random are found if the reference
    can learn the task. Where one class is turned into another, it learns that, too, and people are wrong where a
    sample looks like another class: of CIFAR-10's labels by people with 41 % wrong it finds 4 to 8 %.

    Args:
        features: Inputs, such as images or the rows of a table, or what a pretrained network makes of them,
            ``(N, ...)``. Of token ids take :func:`bags_of_words`.
        labels: Their labels. For ``"multiclass"`` class indices ``(N,)``, or one-hot or soft labels ``(N, K)``;
            for ``"binary"`` numbers from 0 to 1. Those of -100 are left out.
        task: ``"multiclass"`` or ``"binary"``.

    Returns:
        The share, from 0 to below 0.86; nan if the reference has learned nothing, so that nobody knows.

    Raises:
        ValueError: If the task is another, shapes do not fit, there is no label, or numbers are not finite.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import label_noise
        >>> x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> correct = (x[:, 0] > 0.5).long()
        >>> noisy = correct.where(torch.arange(1000) % 5 > 0, 1 - correct)  # 20 % are wrong
        >>> [round(label_noise(x, labels), 2) for labels in (correct, noisy)]
        [0.0, 0.18]
    """
    kind = find_task(task)
    if not kind.has_label_noise:
        raise ValueError(f"Expected `task` to be 'multiclass' or 'binary', but got {task!r}.")
    if features.ndim < 2 or labels.ndim < 1 or len(features) != len(labels):
        got = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"Expected `features` (N, ...) and `labels` (N,) or (N, K), but got {got}.")
    rows = has_label(labels).nonzero()[:, 0]
    if len(rows) == 0:
        raise ValueError("Expected `labels` of which some are not ignored, but got none.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = rows[order[:_MAX_SAMPLES].to(rows.device)]
    x, y = features[rows.to(features.device)], labels[rows]
    if y.ndim == 1 and kind.sums_to_one and not y.is_floating_point():
        y = torch.unique(y, return_inverse=True)[1]  # classes that occur
    reduced, none = principal_components(x, x[:0])
    y = kind.as_matrix(y).cpu().double()
    rows = different_samples(reduced, y)
    return fit_reference(reduced[rows], y[rows], none, task).noise
