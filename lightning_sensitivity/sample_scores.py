"""What a model's outputs say about each sample, so that models can be compared sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_sensitivity.dtypes import accumulation_dtype
from lightning_sensitivity.tasks import output_rows, predictions, target_rows

# The columns of a table of samples.
COLUMNS = (
    "changes",
    "sum",
    "squares",
    "power",
    "fingerprint",
    "distance",
    "flips",
    "entropy",
    "confidence",
    "shift_loss",
    "shift_error",
    "num_labels",
    "loss",
    "error",
)
CHANGES, SUM, SQUARES, POWER, FINGERPRINT, DISTANCE, FLIPS, ENTROPY, CONFIDENCE = range(9)
SHIFT_LOSS, SHIFT_ERROR, NUM_LABELS, LOSS, ERROR = range(9, len(COLUMNS))


class SampleScores:
    """The scores of the samples of one batch, to which noise draws and labels are added.

    Args:
        clean: Outputs f(x), logits unless the task is a regression, ``(N, K, ...)`` or ``(N,)``.
        task: One of :data:`~lightning_sensitivity.tasks.TASKS`.

    Attributes:
        table: Shape ``(N, 14)``, by :data:`COLUMNS`: number, sum and sum of squares of the class-averaged changes, and
            means over elements, draws and positions of the rest; nan where the task gives a score no meaning, or where
            nothing was added.
        log_probabilities: ``(N, K)``; ``(N, 0)`` where there are no classes, or several positions a sample.
    """

    def __init__(self, clean: Tensor, task: str) -> None:
        self._clean, self._task = clean, task
        self._wide = output_rows(clean.to(accumulation_dtype(clean.device)))
        self._predictions = self._by_sample(predictions(clean, task))
        self._decides = task in ("binary", "multilabel") or (task == "multiclass" and self._wide.shape[1] > 1)
        self._num_draws = self._num_shifts = 0
        self.table = self._predictions.new_full((len(clean), len(COLUMNS)), torch.nan)
        self.log_probabilities = self.table[:, :0].float()
        self.table[:, [CHANGES, SUM, SQUARES]] = 0.0
        if self._decides:
            p = self._predictions
            both = p if task == "multiclass" else torch.stack([p, 1 - p], 3)
            self.table[:, ENTROPY] = self._mean(torch.special.entr(both).sum(-1))
            self.table[:, CONFIDENCE] = self._mean(both.amax(-1))
        # Once, for the consensus, for labels and for each of the moved images.
        self._log_p = self._wide.log_softmax(1) if task == "multiclass" else None
        if self._decides and self._log_p is not None and len(self._wide) == len(clean):
            self.log_probabilities = self._log_p.float()

    def add_inputs(self, x: Tensor, second_moment: Tensor | float) -> None:
        """Add the power of the clean inputs, for the C of Equation 9, and a number that tells samples apart.

        Args:
            x: Clean inputs, ``(N, ...)``.
            second_moment: That of the perturbation, the unit of the power.

        Raises:
            ValueError: If there is not one output for each sample.
        """
        if len(x) != len(self._clean):
            raise ValueError(
                f"Expected one output per sample, but got {len(self._clean)} outputs for {len(x)} samples."
            )
        wide = x.to(self.table.dtype)
        self.table[:, POWER] = (wide.square() / second_moment).reshape(len(x), -1).mean(1)
        elements = wide.reshape(len(x), -1)
        self.table[:, FINGERPRINT] = elements @ torch.arange(elements.shape[1], device=x.device).to(wide).cos()

    def add_noisy(self, noisy: Tensor) -> None:
        """Add the outputs of a noise draw.

        Args:
            noisy: f(x + ε), of the shape of the clean outputs.
        """
        change = self._by_sample(output_rows(noisy.to(self._wide.dtype)) - self._wide).mean(2)
        p = self._by_sample(predictions(noisy, self._task))
        self.table[:, CHANGES] += change.shape[1]
        self.table[:, SUM] += change.sum(1)
        self.table[:, SQUARES] += change.square().sum(1)
        distance = (p - self._predictions).square()
        self._average(DISTANCE, distance.sum(2) if self._task == "multiclass" else distance, self._num_draws)
        if self._decides:
            self._average(FLIPS, self._decisions(p) != self._decisions(self._predictions), self._num_draws)
        self._num_draws += 1

    def add_shifted(self, moved: Tensor) -> None:
        """Add the outputs for moved images: expected loss and error, if labels were drawn from the predictions there.

        Args:
            moved: Outputs of the shape of the clean ones. Those with several positions, which move with the image,
                and those of a regression add nothing.
        """
        if not self._decides or self._predictions.shape[1] != 1:
            return
        labels = self._by_sample(predictions(moved, self._task))
        self._average(SHIFT_LOSS, self._losses(labels), self._num_shifts)
        decisions = self._decisions(self._predictions)
        if self._task == "multiclass":
            wrong = 1 - labels.gather(2, decisions[..., None])
        else:
            wrong = torch.where(decisions, 1 - labels, labels)
        self._average(SHIFT_ERROR, wrong, self._num_shifts)
        self._num_shifts += 1

    def add_targets(self, targets: Tensor) -> None:
        """Add what labels say: each sample's loss, and the share of its decisions that are wrong.

        The loss is the cross-entropy, in a regression the squared error.

        Args:
            targets: Labels that fit the task; those of -100 do not count.
        """
        y, counts = (self._by_sample(part) for part in target_rows(self._clean, targets, self._task))
        self.table[:, NUM_LABELS] = counts.sum(1).to(self.table.dtype)
        self.table[:, LOSS] = self._mean(self._losses(y), counts)
        if self._decides:
            self.table[:, ERROR] = self._mean(self._decisions(self._predictions) != self._decisions(y), counts)

    def _losses(self, labels: Tensor) -> Tensor:
        """Losses under soft labels: cross-entropies, in a regression squared errors."""
        if self._task == "regression":
            return (self._predictions - labels).square()
        if self._log_p is not None:
            return -(labels * self._by_sample(self._log_p)).sum(2)
        return binary_cross_entropy_with_logits(self._by_sample(self._wide), labels, reduction="none")

    def _average(self, column: int, values: Tensor, num_before: int) -> None:
        before = self.table[:, column] if num_before else 0.0
        self.table[:, column] = before + (self._mean(values) - before) / (num_before + 1)

    def _by_sample(self, rows: Tensor) -> Tensor:
        """One row per sample and position to ``(N, positions, ...)``."""
        num_samples = len(self._clean)
        return rows.reshape(num_samples, len(rows) // max(1, num_samples), *rows.shape[1:])

    def _decisions(self, p: Tensor) -> Tensor:
        return p.argmax(2) if self._task == "multiclass" else p > 0.5

    def _mean(self, values: Tensor, counts: Tensor | None = None) -> Tensor:
        """Mean of ``(N, positions, ...)`` for each sample, over the positions that count."""
        values = values.to(self._wide.dtype).flatten(2).mean(2) if values.ndim > 2 else values.to(self._wide.dtype)
        return values.mean(1) if counts is None else (values * counts).sum(1) / counts.sum(1)
