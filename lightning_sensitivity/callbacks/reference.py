"""The reference of a run: found in a checkpoint, or made of the training samples of all processes, by one call."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.arguments import describe_error
from lightning_sensitivity.callbacks.record import Predictions, RiskRecord, Verdict, are_known, fingerprints_of
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.functional.features import kind_of
from lightning_sensitivity.functional.reference import Reference, fit_reference, has_few_values, max_samples
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.reader import BatchReader, join_features, join_kept
from lightning_sensitivity.model.samples import KeptRows, KeptSamples

T = TypeVar("T")

FIRST_VALUE = 600  # training samples, in all processes, from which on there is a reference
_SECONDS = 5.0  # after which a line says what is going on
_SORTED = 5.0  # standard errors between the labels of two halves
_REPEATED = 0.1  # share of validation samples that are training samples
_SAME = 1e-10  # tolerance of their fingerprints: among 50,000 samples, others are as near as 1e-6


@dataclass
class _Unseen:
    """What a reference sees of the kept samples of a loader, of all processes, sorted by their fingerprints."""

    features: Tensor
    fingerprints: Tensor
    order: Tensor


class RunReference:
    """Stand in for the labels of the kept samples of a run.

    It is made as soon as 600 training samples have come, and again when an epoch is complete, or no more samples fit.
    The first process fits it, and sends what it predicts.

    Args:
        task: The task.
        reader: Reads batches, and their labels.
        estimator: What is fitted; None for the two learners of :func:`fit_reference`.
        record: Remembers what a resumed fit continues.
        reporter: Says why there is none.

    Attributes:
        fitted: The reference, in the first process; None before, and if it is continued from a checkpoint.
        is_final: Whether it will not change any more.
    """

    def __init__(self, task: Task, reader: BatchReader, estimator: Any, record: RiskRecord, reporter: Reporter) -> None:
        self.fitted: Reference | None = None
        self.is_final = False
        self._task = task
        self._reader = reader
        self._estimator = estimator
        self._record = record
        self._reporter = reporter
        self._rows: KeptRows | None = None  # training samples of this process; None before the first
        self._has_start = False  # whether they began with an epoch
        self._is_made = False  # whether there is one of this fit
        self._empty = torch.zeros(0, 1)  # features of no sample
        self._unseen: dict[int, _Unseen] | None = None  # by loader

    # Training samples

    def add(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int, num_outputs: int) -> None:
        """Keep the labelled samples of a training batch, in the first whole epoch."""
        if batch_idx == 0 and self._rows is not None:
            self._begin_epoch(self._rows)
        if self.is_final or (self._rows is not None and self._rows.is_complete):
            return
        call = self._reader.call(module, batch)
        labels = self._reader.labels(module, batch, () if self._task.has_one_output else (num_outputs,))
        features = self._reader.features(module, batch, call, len(labels))
        if self._rows is None:
            kind = "vectors" if features is None else kind_of(features)
            self._rows = KeptRows(max(1, max_samples(kind, num_outputs) // trainer.world_size))
            self._has_start = batch_idx == 0
        if features is not None:
            self._empty = features[:0].clone()  # a view would keep the batch
        counts = self._task.has_label(labels)
        if not bool(counts.all()):
            features, labels = None if features is None else features[counts], labels[counts]
        self._rows.add(features, labels)

    def _begin_epoch(self, rows: KeptRows) -> None:
        """Want no more rows, since an epoch repeats them; or all, if a resumed fit began within an epoch."""
        if self._has_start:
            rows.complete()
        else:
            self._rows = None

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether a validation can have values; every process must call it."""
        if self.is_final or self._is_made:
            return True
        rows = self._rows
        has_rows = rows is not None and rows.size > 0
        if has_rows and self._record.verdict is None:
            assert rows is not None
            is_enough = rows.num_seen * trainer.world_size >= FIRST_VALUE
            has_rows = self._has_start and (is_enough or self._is_over(trainer, rows) or rows.is_full)
        return bool(trainer.strategy.reduce_boolean_decision(has_rows))

    def _is_over(self, trainer: Trainer, rows: KeptRows) -> bool:
        """Return whether no more training samples will come."""
        return rows.is_complete or bool(trainer.is_last_batch)

    # The reference

    def update(self, trainer: Trainer, kept: Sequence[KeptSamples], num_outputs: int) -> None:
        """Find the reference in a checkpoint, or make it of the samples so far; every process must call it."""
        rows = self._rows
        if self.is_final or rows is None:
            return
        decide = trainer.strategy.reduce_boolean_decision
        is_over, is_full = decide(self._is_over(trainer, rows)), decide(rows.is_full)
        if self._is_made and not (is_over or is_full):
            return
        own = self._join(rows, num_outputs)
        # Of sorted samples, the last ones may be of other classes.
        is_sorted = decide(not is_over and own is not None and _drift(own[1]), all=False)
        if self._is_made and is_sorted:
            return
        if self._unseen is None:
            self._unseen = {samples.dataloader_idx: self._gather_unseen(trainer, samples) for samples in kept}
        known = self._gather_known(trainer, own)
        is_found = not self._is_made and self._find(known, self._unseen)
        if not is_found and not is_sorted and self.is_ready(trainer):
            self._fit(trainer, known, self._unseen)
            self._is_made, self._record.is_final = True, is_over or is_full
        if self._record.is_final:
            self.is_final = True
            rows.clear()
            for each in self._unseen.values():
                each.features = self._empty

    def predictions(self, dataloader_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return what the reference predicts for the kept samples of a loader, of all processes.

        Returns:
            An order of the samples that does not depend on the number of processes, ``(N,)``, and predictions in this
            order, ``(N, K)``; None without a reference.
        """
        saved = self._record.predictions.get(dataloader_idx)
        if self._record.verdict is None or self._unseen is None or saved is None or bool(saved.q.isnan().all()):
            return None
        return self._unseen[dataloader_idx].order, saved.q

    def free(self) -> None:
        """Free the samples at the end of a run."""
        self._rows = self._unseen = None

    def _gather_unseen(self, trainer: Trainer, samples: KeptSamples) -> _Unseen:
        """Gather what the reference sees of the kept samples of a loader; of none if it can't."""
        own = self._attempt(lambda: join_kept(samples)) if samples.size > 0 else self._empty
        if not trainer.strategy.reduce_boolean_decision(own is not None) or own is None:
            own = self._empty
        joined = self._attempt(lambda: gather(trainer, own))
        features = self._empty if joined is None else joined
        fingerprints, order = fingerprints_of(features).sort()
        return _Unseen(features[order], fingerprints, order)

    def _join(self, rows: KeptRows, num_outputs: int) -> tuple[Tensor, Tensor] | None:
        """Join what the reference sees of the training samples of this process, and their labels ``(N, K)``."""
        features, labels = rows.parts()

        def join() -> tuple[Tensor, Tensor]:
            x = join_features(features)
            y = torch.cat([self._task.as_matrix(each, num_outputs).float() for each in labels])
            is_finite = _are_finite(x)
            if bool(is_finite.all()):
                return x, y
            message = f"leaves out {int((~is_finite).sum())} training samples with nan or inf as inputs."
            self._reporter.warn("nan", message, kind="training inputs")
            return x[is_finite], y[is_finite]

        if not rows.has_features:
            self._warn("Inputs are neither dense numbers nor token ids, with a row for each sample.")
        return self._attempt(join) if features else None

    def _gather_known(self, trainer: Trainer, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Gather the same of all processes."""
        if not trainer.strategy.reduce_boolean_decision(own is not None) or own is None:
            return None
        return self._attempt(lambda: (gather(trainer, own[0]), gather(trainer, own[1])))

    def _find(self, known: tuple[Tensor, Tensor] | None, unseen: dict[int, _Unseen]) -> bool:
        """Return whether the record has a reference of the same samples; forget one of others."""
        saved = {index: each.fingerprints for index, each in self._record.predictions.items()}
        is_found = (
            known is not None
            and self._record.is_final
            and bool(are_known(fingerprints_of(*known), self._record.training).all())
            and saved.keys() == unseen.keys()
            and all(len(saved[index]) == len(each.order) for index, each in unseen.items())
            and all(bool(are_known(each.fingerprints, saved[index]).all()) for index, each in unseen.items())
        )
        if not is_found:
            self._record.verdict, self._record.is_final = None, False
        return is_found

    def _fit(self, trainer: Trainer, known: tuple[Tensor, Tensor] | None, unseen: dict[int, _Unseen]) -> None:
        """Fit the reference in the first process, and tell all others what is known of it, and what it predicts."""
        made: tuple[Verdict, dict[int, Tensor]] | None = None
        if known is not None and trainer.is_global_zero:
            with _announced(f"Fitting a reference to {len(known[0]):,} training samples."):
                made = self._attempt(lambda: self._make(*known, unseen))
        verdict, found = trainer.strategy.broadcast(made) or (Verdict(), {})
        self._record.verdict = verdict
        self._record.num_references += 1
        self._record.predictions = {index: Predictions(unseen[index].fingerprints, q) for index, q in found.items()}
        if known is not None:
            self._record.training = fingerprints_of(*known).sort().values
            self._warn_of_repeated(known[0], unseen)

    def _make(self, features: Tensor, labels: Tensor, unseen: dict[int, _Unseen]) -> tuple[Verdict, dict[int, Tensor]]:
        """Fit the reference, and predict the samples of each loader."""
        self.fitted = fit_reference(features, labels, self._task.name, estimator=self._estimator)
        return Verdict.of(self.fitted), {index: self._predict(index, each.features) for index, each in unseen.items()}

    def _predict(self, dataloader_idx: int, features: Tensor) -> Tensor:
        """Predict the samples of a loader; nan if it has another kind of samples, or one has nan or inf."""
        assert self.fitted is not None
        is_finite = _are_finite(features)
        found = torch.full((len(features), self.fitted.labels.shape[1]), torch.nan)
        try:
            found[is_finite] = self.fitted.predictions(features[is_finite]).float()
        except Exception as error:
            self._reporter.warn("features", f"expects nothing of dataloader {dataloader_idx}: {describe_error(error)}")
        if not bool(is_finite.all()):
            number = int((~is_finite).sum())
            message = (
                f"leaves out {number} validation samples of dataloader {dataloader_idx}, with nan or inf as inputs."
            )
            self._reporter.warn("nan", message, kind=f"inputs of {dataloader_idx}")
        return found

    def _warn_of_repeated(self, features: Tensor, unseen: dict[int, _Unseen]) -> None:
        """Warn if validation samples are training samples."""
        if has_few_values(features):  # different samples may be equal
            return
        known = fingerprints_of(features).sort().values
        for index, each in unseen.items():
            is_known = are_known(each.fingerprints, known, _SAME)
            share = float(is_known.double().mean()) if len(each.order) else 0.0
            if share > _REPEATED:
                self._reporter.warn(
                    "repeated",
                    f"finds that {share:.0%} of the samples of dataloader {index} are training samples: a network "
                    "knows their labels, and the values say nothing of others. Validate on other samples.",
                    kind=str(index),
                )

    def _attempt(self, function: Callable[[], T]) -> T | None:
        """Return what a function returns, or None with a warning."""
        try:
            return function()
        except Exception as error:  # an error in one process would leave the others waiting
            self._warn(describe_error(error))
            return None

    def _warn(self, reason: str) -> None:
        self._reporter.warn("features", f"has no reference: {reason} Set `features=` to a function `batch -> (N, D)`.")


def gather(trainer: Trainer, values: Tensor) -> Tensor:
    """Concatenate the rows of all processes; every process must call it.

    Args:
        trainer: The Trainer.
        values: Rows on the CPU, ``(N, ...)``, of any N; token ids are padded to the longest.
    """
    if trainer.world_size == 1:
        return values
    return join_features([part.cpu() for part in gather_all_tensors(values.to(trainer.strategy.root_device))])


def _are_finite(features: Tensor) -> Tensor:
    """Return which samples have finite features, ``(N,)``."""
    return features[:, None].flatten(1).isfinite().all(1)


def _drift(labels: Tensor) -> bool:
    """Return whether labels ``(N, K)`` change from the first half to the second, as those of sorted samples do."""
    y, half = labels.double(), len(labels) // 2
    first, second = y[:half], y[half:]
    variances = y.var(0) * (1 / max(1, half) + 1 / max(1, len(second)))
    return bool(((first.mean(0) - second.mean(0)).square() > _SORTED**2 * variances).any())


@contextmanager
def _announced(message: str) -> Iterator[None]:
    """Say what is going on if it takes more than five seconds."""
    timer = threading.Timer(_SECONDS, rank_zero_info, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
