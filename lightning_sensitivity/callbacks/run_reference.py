"""The reference of a run: training samples are kept in the first whole epoch, of which it is made once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain

from lightning.pytorch import LightningModule, Trainer

from lightning_sensitivity.callbacks.run import Run, agree, gather_objects
from lightning_sensitivity.expected.fitted import FittedReference, finite_samples
from lightning_sensitivity.expected.record import Unseen, Verdict
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
    """

    training: Observations | None
    unseen: dict[int, Observations | None]


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

    Attributes:
        reader: Reads batches, and their labels.
        run: Keeps the training samples of this process, and says what is doubtful.
        estimator: What is fitted; None for the reference's own learners.
        class_shares: The class shares of unseen samples; None for those of training.
        output_shape: The shape of the network's outputs for a sample, or of its label where outputs have another.
        stage: Where it is on its way.
        was_tried: Whether it was tried to make one.
        fitted: The reference, in the first process; None before.
        verdict: What is known of it; None before.
        unseen: What it predicts for the kept samples, by loader; empty before, and if it may not choose.
    """

    reader: BatchReader
    run: Run
    estimator: object
    class_shares: Sequence[float] | None
    output_shape: tuple[int, ...]
    stage: Stage = Stage.WAITING
    was_tried: bool = False
    fitted: FittedReference | None = None
    verdict: Verdict | None = None
    unseen: dict[int, Unseen] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        """C of its predictions and of label matrices."""
        return self.reader.task.num_columns(self.output_shape)

    # Keep training samples

    def add(self, trainer: Trainer, module: LightningModule, batch: object, begins_epoch: bool) -> None:
        """Keep the labelled samples of a training batch, until the first whole epoch is over, or it is made."""
        is_next_epoch = self.stage is Stage.KEEPING_EPOCH and begins_epoch
        if is_next_epoch and self.run.training is not None and self.run.training.num_seen > 0:
            self.stage = Stage.KEPT
        if self.stage in (Stage.KEPT, Stage.OVER):
            return
        if self.run.training is None or begins_epoch:
            self.stage = Stage.KEEPING_EPOCH if begins_epoch else Stage.KEEPING_REST
            self.run.training = self.reader.make_kept(self.num_columns, trainer.world_size)
        self.reader.keep_observations(self.run.training, module, batch, self.output_shape)

    # Until there are enough

    def can_be_made(self, trainer: Trainer) -> bool:
        """Return whether every process has kept what a reference needs; every process must call it."""
        if self.stage is Stage.OVER:
            return False
        is_whole = self.stage is Stage.KEPT or (self.stage is Stage.KEEPING_EPOCH and bool(trainer.is_last_batch))
        return agree(trainer, is_whole or (self.run.training is not None and self.run.training.is_full))

    # Join what all processes have kept, fit the reference, predict, and send the predictions

    def prepare(self, trainer: Trainer, kept: Sequence[KeptSamples]) -> None:
        """Make the reference, once that is possible, and predict the kept samples; every process must call it.

        Without any label, it is tried again after a later epoch.
        """
        if not self.can_be_made(trainer):
            return
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
                self._predict_all(parts, training)
        is_over, self.verdict, self.unseen = trainer.strategy.broadcast((is_over, self.verdict, self.unseen))
        self.stage = Stage.OVER if is_over else Stage.WAITING
        self.run.training = None

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
        return _Part(training, unseen)

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

    def _predict_all(self, parts: Sequence[_Part], training: Observations) -> None:
        """Predict the kept samples of each loader, if it may choose; it leaves out those that can't be read."""
        assert self.fitted is not None
        self.verdict = self.fitted.verdict
        for index in sorted({*chain(*(part.unseen for part in parts))}) if self.verdict.is_trusted else ():
            of_loader = [part.unseen[index] for part in parts if index in part.unseen]
            can_read = [each for each in of_loader if each is not None]
            if len(can_read) == len(of_loader):  # else it has been said where it happened
                with self.run.report_failure(f"can't estimate anything for dataloader {index}", "Set `features=`."):
                    new = Observations.join(can_read)
                    self.unseen[index] = self.fitted.expect(training, new, f"dataloader {index}", has_shares=True)
