"""The reference of a run: training samples are kept in the first whole epoch, of which it is made once."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.run import Run, agree, gather_objects, gather_tensors
from lightning_sensitivity.expected.differences import Differences
from lightning_sensitivity.expected.record import Predicted, Unseen, Verdict
from lightning_sensitivity.functional.expected import SURE_AS, SURE_OF_PART, draw_labels
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reading.kept import KeptObservations, KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.calibration import estimate_class_shares, reweigh
from lightning_sensitivity.reference.kinds import Seen, are_finite, rows_of
from lightning_sensitivity.reference.observations import Observations, count_groups, projection
from lightning_sensitivity.running.isolation import same_streams

_SORTED = 5.0  # standard errors between the labels of two halves


@dataclass
class _Part:
    """What a process has kept.

    Attributes:
        known: Training samples; None if there are none.
        unseen: Validation samples, by loader; None where they can't be read.
        fingerprints: Those of validation samples, by loader; none where there are none to be had.
    """

    known: Observations | None
    unseen: dict[int, Observations | None]
    fingerprints: dict[int, Tensor]


class Stage(Enum):
    """Where a reference is on its way."""

    WAITING = auto()  # no training sample is kept: none has come, or none of those that came had a label
    KEEPING_REST = auto()  # of an epoch, in a resumed fit
    KEEPING_EPOCH = auto()  # from its first batch on
    KEPT = auto()  # that epoch is over, and no more samples are wanted
    OVER = auto()  # it was made, or will not be tried again


class RunReference:
    """Stand in for the labels of the kept samples of a run.

    Training samples are kept in the first whole epoch, and in what a resumed fit has left of one before. The
    reference is made once: when that epoch is over, or no more samples fit; if no sample has a label, after
    a later epoch. It depends on the samples alone. The first process fits it, and sends what it predicts.

    A resumed fit goes on with the predictions of the checkpoint while the kept validation samples are the
    same; its reference is made again beside these.

    Args:
        task: The task.
        reader: Reads batches, and their labels.
        estimator: What is fitted; None for the reference's own learners.
        class_shares: The class shares of unseen samples, ``"estimate"``, or None for those of training.
        run: Says what is doubtful.
        output_shape: The shape of the network's outputs for a sample, or of its label where outputs have another.
        is_local: Whether errors of a regression are drawn near each prediction.
        saved: What an earlier part of this fit has predicted; None without one.

    Attributes:
        output_shape: The same.
        stage: Where it is on its way.
        was_tried: Whether it was tried to make one.
        fitted: The reference, in the first process; None before.
        predicted: What is known of it, and what it predicts; None without one.
    """

    def __init__(
        self,
        task: Task,
        reader: BatchReader,
        estimator: Any,
        class_shares: Any,
        run: Run,
        output_shape: tuple[int, ...],
        is_local: bool,
        saved: Predicted | None,
    ) -> None:
        self.stage = Stage.WAITING
        self.was_tried = False
        self.fitted: Any = None
        self.predicted: Predicted | None = None
        self._task = task
        self._reader = reader
        self._estimator = estimator
        self._class_shares = class_shares
        self._run = run
        self.output_shape = output_shape
        self._is_local = is_local
        self._saved = saved  # until it is compared with the kept samples
        self._kept: KeptObservations | None = None  # training samples of this process

    @property
    def verdict(self) -> Verdict | None:
        """What is known of it; None without one."""
        return None if self.predicted is None else self.predicted.verdict

    @property
    def unseen(self) -> dict[int, Unseen]:
        """What it predicts, by loader; empty without a reference that may choose."""
        return {} if self.predicted is None else self.predicted.unseen

    @property
    def known(self) -> Predicted | None:
        """What is known by now, also by an earlier part of this fit."""
        return self.predicted or self._saved

    # Training samples

    def add(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the labelled samples of a training batch, until the first whole epoch is over, or it is made."""
        if self.stage is Stage.KEEPING_EPOCH and batch_idx == 0 and self._kept is not None:  # the next epoch
            self.stage = Stage.KEPT if self._kept.num_seen > 0 else Stage.WAITING
        if self.stage in (Stage.KEPT, Stage.OVER):
            return
        if self._kept is None or batch_idx == 0:  # a resumed loader may begin anew within an epoch
            self.stage = Stage.KEEPING_EPOCH if batch_idx == 0 else Stage.KEEPING_REST
            # Where no validation comes earlier, samples are spread over a whole epoch.
            is_whole = (trainer.val_check_batch or math.inf) >= trainer.num_training_batches and batch_idx == 0
            num_batches = trainer.num_training_batches if is_whole else 0
            num_columns = self._task.num_columns(self.output_shape)
            self._kept = self._reader.make_kept(num_columns, trainer.world_size, num_batches)
        self._reader.keep_observations(self._kept, module, batch, self.output_shape)

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether there is, or can be made, what a validation needs; every process must call it."""
        return self._can_be_made(trainer) or self.stage is Stage.OVER or self.known is not None

    def _can_be_made(self, trainer: Trainer) -> bool:
        """Return whether every process has kept what a reference needs; every process must call it."""
        if self.stage is Stage.OVER:
            return False
        is_whole = self.stage is Stage.KEPT or (self.stage is Stage.KEEPING_EPOCH and bool(trainer.is_last_batch))
        return agree(trainer, is_whole or (self._kept is not None and _are_enough(self._kept)))

    # The reference

    def prepare(self, trainer: Trainer, kept: Sequence[KeptSamples]) -> None:
        """Go on with what is saved, and make the reference once that is possible; every process must call it."""
        if self._saved is not None:
            self._go_on(trainer, kept, self._saved)
        if self._can_be_made(trainer):
            self._make(trainer, kept)

    def _go_on(self, trainer: Trainer, kept: Sequence[KeptSamples], saved: Predicted) -> None:
        """Go on with the predictions of a checkpoint, if the kept samples are the same."""
        own = self._fingerprints(kept)
        found: dict[int, Tensor] = {}
        if agree(trainer, own.keys() == saved.fingerprints.keys()):
            found = {index: gather_tensors(trainer, own[index]) for index in sorted(own)}
        self.predicted = saved.matched(found, self._task.num_columns(self.output_shape))
        self._saved = None
        if self.predicted is None:
            message = (
                "keeps other validation samples than the checkpoint knows, and so makes a new reference after a whole "
                "epoch. Until then, callbacks that monitor its values get the last ones again, and count them against "
                "their patience. Validate on the same samples."
            )
            self._run.warn("checkpoint", message, kind="samples")

    def _make(self, trainer: Trainer, kept: Sequence[KeptSamples]) -> None:
        """Make the reference; without any label, try again after a later epoch."""
        self.was_tried = True
        failure = "has no reference", "If it can't read inputs, set `features=`; if it finds no labels, set `targets=`."
        own: _Part | None = None
        with self._run.report_failure(*failure), trainer.precision_plugin.val_step_context():  # for an encoder
            known = None if self._kept is None or self._kept.size == 0 else self._kept.joined()
            unseen: dict[int, Observations | None] = {}
            for samples in kept:
                if samples.size > 0:
                    unseen[samples.dataloader_idx] = None
                    what = f"expects nothing of dataloader {samples.dataloader_idx}"
                    with self._run.report_failure(what, "Set `features=`."):
                        unseen[samples.dataloader_idx] = self._reader.join(trainer.lightning_module, samples.batches)
            own = _Part(known, unseen, self._fingerprints(kept))
        parts = gather_objects(trainer, own)
        is_over = None in parts or any(part.known is not None for part in parts)
        if trainer.is_global_zero and None not in parts:
            # An estimator may draw from the global streams of random numbers, also before it fails.
            with same_streams(), self._run.report_failure(*failure):
                self._fit(parts)
        is_over, self.predicted = trainer.strategy.broadcast((is_over, self.predicted))
        self.stage = Stage.OVER if is_over else Stage.WAITING
        self._kept = None

    def free(self) -> None:
        """Free the samples at the end of a run."""
        self._kept = None

    def _fingerprints(self, kept: Sequence[KeptSamples]) -> dict[int, Tensor]:
        """Return those of the kept samples of this process, by loader; none at all if some have none."""
        with suppress(Exception):  # then a resumed fit makes its reference anew
            return {samples.dataloader_idx: samples.fingerprints() for samples in kept}
        return {}

    def _fit(self, parts: Sequence[_Part]) -> None:
        """Fit the reference to the training samples of all processes, and predict the kept samples."""
        from lightning_sensitivity.reference import Reference

        found = [part.known for part in parts if part.known is not None]
        if not found:
            raise ValueError("No training sample has a label")
        known = Observations.join(found)
        finite = self._finite_samples(known.seen, "training samples")
        known = known if len(finite) == len(known) else known.take(finite)  # no copy
        fitted = Reference(self._task.name, self._estimator).fit(known.seen, known.labels.numpy(), known.groups)
        has_shares = self._class_shares is not None and not isinstance(self._class_shares, str)
        if has_shares and not fitted.shares_.all():
            missing = int(fitted.shares_.argmin())
            raise ValueError(f"`class_shares=` has class {missing}, of which no training sample is kept")
        self.fitted = fitted
        if self._reader.unread:
            names = ", ".join(f"`{name}`" for name in self._reader.unread)
            message = f"can't show the reference all of {names}. Set `features=` if it matters."
            self._run.warn("features", message, kind="unread")
        if self.predicted is not None:  # by an earlier part of this fit
            return
        verdict = Verdict.of(fitted, self._reader.sees_all, self._reader.has_features)
        unseen = self._predict_all(parts, known) if verdict.is_trusted else {}
        fingerprints: dict[int, Tensor] = {}
        if all(part.fingerprints for part in parts):
            indices = parts[0].fingerprints
            fingerprints = {index: torch.cat([part.fingerprints[index] for part in parts]) for index in indices}
        self.predicted = Predicted(verdict, unseen, fingerprints)

    def _predict_all(self, parts: Sequence[_Part], known: Observations) -> dict[int, Unseen]:
        """Predict the kept samples of each loader; of those that can't be read, nothing is expected."""
        found: dict[int, Unseen] = {}
        differences = Differences(known, not self._reader.has_features, self._run.warn)
        for index in sorted({index for part in parts for index in part.unseen}):
            unseen = [part.unseen[index] for part in parts if index in part.unseen]
            if None in unseen:  # which has been said where it happened
                continue
            with self._run.report_failure(f"expects nothing of dataloader {index}", "Set `features=`."):
                joined = Observations.join([each for each in unseen if each is not None])
                found[index] = self._predict(index, differences, joined)
        return found

    def _finite_samples(self, seen: Seen, what: str) -> Tensor:
        """Return the samples without nan and inf, ``(N,)``."""
        is_finite = are_finite(seen)
        if not bool(is_finite.all()):
            number = int((~is_finite).sum())
            message = (
                f"leaves out {number} {what} with nan or inf in inputs or features. If values are missing, fill them "
                "in, with a column that says where."
            )
            self._run.warn("nan", message, kind=what)
        return is_finite.nonzero()[:, 0]

    def _predict(self, dataloader_idx: int, differences: Differences, unseen: Observations) -> Unseen:
        """Predict the kept samples of a loader, and draw labels for them."""
        indices = self._finite_samples(unseen.seen, f"validation samples of dataloader {dataloader_idx}")
        if len(indices) == 0:
            raise ValueError("No sample has finite inputs and features")
        indices = indices[projection(rows_of(unseen.seen, indices)).argsort()]
        new = unseen.take(indices)
        q = self.predict(new.seen)
        if self._task.has_class_shares and self._class_shares is None:
            differences.say_shares(f"dataloader {dataloader_idx}", self.fitted, q, new.groups)
        differences.say(f"dataloader {dataloader_idx}", new)
        errors = self.fitted.residuals_near(q) if self._is_local else self.fitted.residuals_
        draws = draw_labels(q, self._task.name, errors)
        q = q.float().index_fill(1, torch.from_numpy(self.fitted.blind_labels_), math.nan)
        groups = self.fitted.groups_
        num_training = count_groups(None if groups is None else torch.from_numpy(groups), self.fitted.num_samples_)
        sees_part = not self._reader.has_features and "columns" not in (self.fitted.kind_, self.fitted.features_)
        sure_as = SURE_OF_PART if sees_part else SURE_AS
        return Unseen(indices, q, draws, self.fitted.score_, num_training, sure_as)

    def predict(self, seen: Seen) -> Tensor:
        """Predict samples, ``(N, C)``, for the class shares that they have, if known or estimated."""
        q = torch.from_numpy(self.fitted.predict_matrix(seen))
        if self._class_shares is None:
            return q
        of_training = torch.from_numpy(self.fitted.shares_)
        if isinstance(self._class_shares, str):
            return reweigh(q, of_training, estimate_class_shares(q, of_training))
        return reweigh(q, of_training, torch.as_tensor(self._class_shares))


def _are_enough(kept: KeptObservations) -> bool:
    """Return whether no more samples fit, and labels are alike in both halves, as those to come will be."""
    if kept.size == 0 or not kept.is_full:
        return False
    y = kept.labels.double()
    first, second = y.tensor_split(2)
    sizes = [(~half.isnan()).sum(0).clamp(min=1) for half in (first, second)]
    variances = (y - y.nanmean(0)).square().nanmean(0) * (1 / sizes[0] + 1 / sizes[1])
    return not bool(((first.nanmean(0) - second.nanmean(0)).square() > _SORTED**2 * variances).any())
