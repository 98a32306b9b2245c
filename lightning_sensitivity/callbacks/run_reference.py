"""The reference of a run: training samples are kept in the first whole epoch, of which it is made once."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.run import Run, agree, gather_objects, gather_tensors
from lightning_sensitivity.expected.fitted import FittedReference, finite_samples
from lightning_sensitivity.expected.record import Predicted, Unseen
from lightning_sensitivity.reading.kept import KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.observations import Observations
from lightning_sensitivity.running.isolation import same_streams


@dataclass
class _Part:
    """What a process has kept.

    Attributes:
        training: Training samples; None if there are none.
        unseen: Validation samples, by loader; None where they can't be read.
        fingerprints: Those of validation samples, by loader; none where there are none to be had.
    """

    training: Observations | None
    unseen: dict[int, Observations | None]
    fingerprints: dict[int, Tensor]


class Stage(Enum):
    """Where a reference is on its way."""

    WAITING = auto()  # no training sample is kept: none has come, or none of those that came had a label
    KEEPING_REST = auto()  # of an epoch, in a resumed fit
    KEEPING_EPOCH = auto()  # from its first batch on
    KEPT = auto()  # that epoch is over, and no more samples are wanted
    OVER = auto()  # it was made, or will not be tried again


@dataclass(eq=False)
class RunReference:
    """The reference of a run, which stands in for the labels of the kept samples.

    Training samples are kept in the first whole epoch, and in what a resumed fit has left of one before. The
    reference is made once: when that epoch is over, or enough samples have come; if no sample has a label, after
    a later epoch. It depends on the samples alone. The first process fits it, and sends what it predicts.

    A resumed fit goes on with the predictions of the checkpoint while the kept validation samples are the
    same; its reference is made again beside these.

    Attributes:
        reader: Reads batches, and their labels.
        run: Keeps the training samples of this process, and says what is doubtful.
        estimator: What is fitted; None for the reference's own learners.
        class_shares: The class shares of unseen samples, ``"estimate"``, or None for those of training.
        output_shape: The shape of the network's outputs for a sample, or of its label where outputs have another.
        is_local: Whether errors of a regression are drawn near each prediction.
        stage: Where it is on its way.
        was_tried: Whether it was tried to make one.
        fitted: The reference, in the first process; None before.
        is_compared: Whether what a checkpoint holds was compared with the kept samples.
    """

    reader: BatchReader
    run: Run
    estimator: object
    class_shares: Sequence[float] | str | None
    output_shape: tuple[int, ...]
    is_local: bool
    stage: Stage = Stage.WAITING
    was_tried: bool = False
    fitted: FittedReference | None = None
    is_compared: bool = False

    @property
    def num_columns(self) -> int:
        """C of its predictions and of label matrices."""
        return self.reader.task.num_columns(self.output_shape)

    @property
    def _settings(self) -> str:
        """What it was told, but for addresses of objects."""
        reader = self.reader
        told = reader.task.name, self.estimator, self.class_shares, reader.has_groups, reader.has_features
        return re.sub(" at 0x[0-9a-f]+", "", str(told))

    # Keep training samples

    def add(self, trainer: Trainer, module: LightningModule, batch: object, begins_epoch: bool) -> None:
        """Keep the labelled samples of a training batch, until the first whole epoch is over, or it is made."""
        is_next_epoch = self.stage is Stage.KEEPING_EPOCH and begins_epoch
        if is_next_epoch and self.run.training is not None and self.run.training.num_seen > 0:
            self.stage = Stage.KEPT
        if self.stage in (Stage.KEPT, Stage.OVER):
            return
        if self.run.training is None or begins_epoch:
            self.stage, num_batches = Stage.KEEPING_REST, 0.0
            if begins_epoch:
                self.stage = Stage.KEEPING_EPOCH
                # Where no validation comes earlier, samples are spread over a whole epoch.
                is_whole = (trainer.val_check_batch or math.inf) >= trainer.num_training_batches
                num_batches = trainer.num_training_batches if is_whole else 0
            self.run.training = self.reader.make_kept(self.num_columns, trainer.world_size, num_batches)
        self.reader.keep_observations(self.run.training, module, batch, self.output_shape)

    # Until there are enough

    def can_be_made(self, trainer: Trainer) -> bool:
        """Return whether every process has kept what a reference needs; every process must call it."""
        if self.stage is Stage.OVER:
            return False
        is_whole = self.stage is Stage.KEPT or (self.stage is Stage.KEEPING_EPOCH and bool(trainer.is_last_batch))
        return agree(trainer, is_whole or (self.run.training is not None and self.run.training.are_enough()))

    def prepare(self, trainer: Trainer, kept: Sequence[KeptSamples], predicted: Predicted | None) -> Predicted | None:
        """Make the reference, once that is possible, and predict the kept samples; every process must call it.

        Args:
            trainer: The Trainer.
            kept: The validation samples of this process, by loader.
            predicted: What is predicted by now, also by an earlier part of this fit; None if there is none.

        Returns:
            What is predicted of these samples by now.
        """
        if predicted is not None and not self.is_compared:
            predicted = self._matched(trainer, kept, predicted)
        self.is_compared = True
        return self._make(trainer, kept, predicted) if self.can_be_made(trainer) else predicted

    def _matched(self, trainer: Trainer, kept: Sequence[KeptSamples], saved: Predicted) -> Predicted | None:
        """Return the predictions of a checkpoint, if the kept samples are the same."""
        of_process = _fingerprints(kept)
        fingerprints: dict[int, Tensor] = {}
        if agree(trainer, of_process.keys() == saved.fingerprints.keys()):
            fingerprints = {index: gather_tensors(trainer, of_process[index]) for index in sorted(of_process)}
        matched = None
        with suppress(Exception):  # of a damaged checkpoint, which no run should end by
            matched = saved.matched(fingerprints, self.num_columns, self._settings)
        if matched is None and saved.fingerprints:  # without these nobody can tell
            message = (
                "keeps other validation samples than the checkpoint knows, or has other settings, such as "
                "`class_shares=`, and so makes a new reference after a whole epoch. Until then, callbacks that monitor "
                "its values get the last ones again, and count them against their patience. Validate on the same "
                "samples, as many as before: `num_samples=`, which with `validation_labels=True` is at least 2,000."
            )
            self.run.warn("checkpoint", message, kind="samples")
        return matched

    # Join what all processes have kept, fit the reference, predict, and send the predictions

    def _make(self, trainer: Trainer, kept: Sequence[KeptSamples], predicted: Predicted | None) -> Predicted | None:
        """Make the reference; without any label, try again after a later epoch."""
        self.was_tried = True
        failure = "has no reference", "If it can't read inputs, set `features=`; if it finds no labels, set `targets=`."
        of_process: _Part | None = None
        with self.run.report_failure(*failure), trainer.precision_plugin.val_step_context():  # for an encoder
            of_process = self._join(kept)
        parts = gather_objects(trainer, of_process)
        is_over = None in parts or any(part.training is not None for part in parts)
        if trainer.is_global_zero and None not in parts:
            # An estimator may draw from the global streams of random numbers, also before it fails.
            with same_streams(), self.run.report_failure(*failure):
                training = self._fit([part.training for part in parts if part.training is not None])
                new = self._predict_all(parts, training)
                if predicted is not None and predicted.differs(new, self.reader.task):
                    message = (
                        "goes on with what the reference of an earlier part of this fit predicts, but a new one has "
                        "learned other labels, or sees other inputs. To be judged by that, begin a new fit."
                    )
                    self.run.warn("checkpoint", message, kind="reference")
                predicted = predicted or new
        is_over, predicted = trainer.strategy.broadcast((is_over, predicted))
        self.stage = Stage.OVER if is_over else Stage.WAITING
        self.run.training = None
        return predicted

    def _join(self, kept: Sequence[KeptSamples]) -> _Part:
        """Join the samples that this process has kept."""
        training = None if self.run.training is None or self.run.training.size == 0 else self.run.training.joined()
        unseen: dict[int, Observations | None] = {}
        for samples in kept:
            if samples.size > 0:
                index = samples.dataloader_idx
                unseen[index] = None
                with self.run.report_failure(f"can't estimate anything for dataloader {index}", "Set `features=`."):
                    unseen[index] = self.reader.join(samples.batches)
        return _Part(training, unseen, _fingerprints(kept))

    def _fit(self, parts: Sequence[Observations]) -> Observations:
        """Fit the reference to the training samples of all processes, and return these."""
        if not parts:
            raise ValueError("No training sample has a label")
        training = Observations.join(parts)
        finite = finite_samples(training, "training samples", self.run.warn)
        training = training if len(finite) == len(training) else training.take(finite)  # no copy
        self.fitted = FittedReference(self.reader, training, self.estimator, self.run.warn, self.class_shares)
        if self.reader.unread:
            names = ", ".join(f"`{name}`" for name in self.reader.unread)
            message = f"can't show the reference all of {names}. Set `features=` if it matters."
            self.run.warn("features", message, kind="unread")
        return training

    def _predict_all(self, parts: Sequence[_Part], training: Observations) -> Predicted:
        """Predict the kept samples of each loader, if it may choose; it leaves out those that can't be read."""
        assert self.fitted is not None
        verdict = self.fitted.verdict
        unseen: dict[int, Unseen] = {}
        for index in sorted({*chain(*(part.unseen for part in parts))}) if verdict.is_trusted else ():
            of_loader = [part.unseen[index] for part in parts if index in part.unseen]
            can_read = [each for each in of_loader if each is not None]
            if len(can_read) == len(of_loader):  # else it has been said where it happened
                with self.run.report_failure(f"can't estimate anything for dataloader {index}", "Set `features=`."):
                    unseen[index] = self._predict(index, training, Observations.join(can_read))
        indices = parts[0].fingerprints if all(part.fingerprints for part in parts) else ()
        fingerprints = {index: torch.cat([part.fingerprints[index] for part in parts]) for index in indices}
        return Predicted(verdict, unseen, fingerprints, self._settings)

    def _predict(self, dataloader_idx: int, training: Observations, unseen: Observations) -> Unseen:
        """Predict the kept samples of a loader, in an order that does not depend on the number of processes."""
        assert self.fitted is not None
        where = f"dataloader {dataloader_idx}"
        indices = finite_samples(unseen, f"validation samples of {where}", self.run.warn)
        indices = indices[unseen.projected[indices].argsort()]
        predicted = self.fitted.expect(training, unseen, indices, where, self.is_local, has_shares=True)
        return replace(predicted, q=predicted.q.float())  # as a checkpoint holds it


def _fingerprints(kept: Sequence[KeptSamples]) -> dict[int, Tensor]:
    """Return those of the kept samples of this process, by loader; none at all if some have none."""
    with suppress(Exception):  # then a resumed fit makes its reference anew
        return {samples.dataloader_idx: samples.fingerprints() for samples in kept}
    return {}
