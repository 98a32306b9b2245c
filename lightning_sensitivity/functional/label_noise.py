"""How many labels of a data set can't be explained? Asked before training, of inputs and labels alone."""

import torch

from lightning_sensitivity.functional.reference import fit_reference
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import as_tensor


def label_noise(inputs: object, labels: object, task: str = "multiclass") -> float:
    """Estimate the share of labels that can't be explained: wrong, or not to be known from the inputs.

    It fits a reference (:func:`fit_reference`), and compares labels with its left-out predictions
    (:func:`unexplained_share`).

    **A low number is no proof of correct labels, and a high one no proof of wrong ones.** Labels that are redrawn
    at random are found if the reference can learn the task. Where one class is turned into another, it learns that,
    too, and people are wrong where a sample looks like another class. On the other hand, inputs may not tell what
    the label is: of correct labels of two classes that overlap (AUC 0.68) it can't explain 7 to 28 %.

    Args:
        inputs: Inputs, such as images or the rows of a table, or what a pretrained network makes of them, as tensor,
            array, table or list, ``(N, ...)``; see :func:`fit_reference`.
        labels: Their labels. For ``"multiclass"`` class indices ``(N,)``, or one-hot or soft labels ``(N, K)``;
            for ``"binary"`` numbers from 0 to 1. Those of -100 are left out.
        task: ``"multiclass"`` or ``"binary"``.

    Returns:
        The share, up to 0.85; nan if it can't be estimated, since the reference has learned nothing.

    Raises:
        ValueError: If the task is another, shapes do not fit, there is no label, or numbers are not finite.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import label_noise
        >>> x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> correct = (x[:, 0] > 0.5).long()
        >>> noisy = correct.where(torch.arange(1000) % 5 > 0, 1 - correct)  # 20 % are wrong
        >>> [round(label_noise(x, labels), 1) for labels in (correct, noisy)]
        [0.0, 0.2]
    """
    if not find_task(task).has_classes:
        raise ValueError(f"Expected `task` to be 'multiclass' or 'binary', but got {task!r}.")
    x, y = as_tensor("inputs", inputs), as_tensor("labels", labels)
    if y.ndim == 1 and not y.is_floating_point() and task == "multiclass":
        y, is_class = y.long(), y >= 0
        y = y.masked_scatter(is_class, torch.unique(y[is_class], return_inverse=True)[1])  # classes that occur
    return fit_reference(x, y, task).unexplained
