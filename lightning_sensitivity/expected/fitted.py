"""A reference that was fitted to the training samples of a run: whether it may choose, and what it says of others."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_sensitivity.expected.doubts import Warn, say_differences, say_shares, say_unused
from lightning_sensitivity.expected.record import Predictions, Unseen, Verdict
from lightning_sensitivity.functional.expected import draw_labels
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.calibration import reweigh
from lightning_sensitivity.reference.kinds import Seen, are_finite, join_seen
from lightning_sensitivity.reference.observations import Observations, count_groups
from lightning_sensitivity.running.batches import move_batch
from lightning_sensitivity.running.isolation import isolated


class FittedReference:
    """A reference of a run, which the monitor, its ``predict`` and ``compare_models`` ask alike.

    Args:
        reader: What reads the batches of the run.
        training: Training samples, with a matrix of labels.
        estimator: What is fitted; None for the reference's own learners.
        warn: Warns, as for :class:`~lightning_sensitivity.expected.expectation.Expectation`.
        class_shares: The class shares of unseen samples; None for those of training.

    Attributes:
        model: The fitted :class:`~lightning_sensitivity.Reference`.
        verdict: What all processes have to know of it.

    Raises:
        ValueError: If there is nothing to learn from, or ``class_shares`` has a class without a sample.
    """

    def __init__(
        self,
        reader: BatchReader,
        training: Observations,
        estimator: object,
        warn: Warn,
        class_shares: Sequence[float] | None = None,
    ) -> None:
        from lightning_sensitivity.reference.reference import Reference

        self._reader, self._warn, self._class_shares = reader, warn, class_shares  # no samples, which are freed
        self.model = Reference(reader.task.name, estimator).fit(training.seen, training.labels.numpy(), training.groups)
        shares = self.model.shares_
        if class_shares is not None and not shares.all():
            missing = int(shares.argmin())
            raise ValueError(f"`class_shares=` has class {missing}, of which no training sample is kept")
        if reader.task.link == "softmax" and (message := say_unused(list(shares), self.model.num_samples_)):
            warn("outputs", message)
        is_table = "columns" in (self.model.kind_, self.model.features_)
        is_trusted = self.model.may_choose(reader.sees_all)
        self.verdict = Verdict(
            learner=self.model.learner_,
            features="features" if reader.has_features else self.model.features_,
            num_training=self.model.num_samples_,
            skill=self.model.skill_,
            majority=self.model.majority_,
            unexplained=self.model.unexplained_,
            is_trusted=is_trusted,
            is_whole_table=reader.sees_all and is_table,
            inputs_tell_nothing=is_trusted and self.model.inputs_tell_nothing_,
            blind_labels=self.model.blind_labels_.tolist(),
        )

    def predict(self, seen: Seen) -> Tensor:
        """Predict samples, ``(N, C)``, for the class shares that they have, if these are given."""
        q = torch.from_numpy(self.model.predict_matrix(seen))
        if self._class_shares is None:
            return q
        return reweigh(q, torch.from_numpy(self.model.shares_), torch.as_tensor(self._class_shares))

    def expect(self, training: Observations, new: Observations, where: str, has_shares: bool) -> Unseen:
        """Predict new samples, draw labels for them, and say what makes them doubtful.

        Args:
            training: The training samples, as they were fitted.
            new: New samples, of which those with nan or inf are left out.
            where: What they are called, such as ``"dataloader 0"``.
            has_shares: Whether the user could set ``class_shares``, and is told to.
        """
        indices = finite_samples(new, f"samples of {where}", self._warn)
        # Labels are drawn in an order that depends on the samples alone, and not on the number of processes.
        indices = indices[new.projected[indices].argsort()]
        model, new = self.model, new.take(indices)
        q = self.predict(new.seen)
        if has_shares and self._reader.task.has_class_shares and self._class_shares is None:
            say_shares(where, model, q, new.groups, self._warn)
        say_differences(training, new, where, not self._reader.has_features, self._warn)
        draws = draw_labels(q, model.task, model.residuals_)
        q = q.index_fill(1, torch.from_numpy(model.blind_labels_), math.nan)
        groups = None if model.groups_ is None else torch.from_numpy(model.groups_)
        num_calibrating = count_groups(groups, model.num_samples_)
        part = "features" if self._reader.has_features else "part"  # of what a network may know
        sees = "table" if self.verdict.is_whole_table else part
        return Unseen(indices, q, draws, model.score_, num_calibrating, sees)

    def predict_both(self, network: nn.Module, dataloader: Iterable[object], are_alike: bool) -> Predictions:
        """Predict samples by a network and by the reference.

        Args:
            network: The network.
            dataloader: Batches.
            are_alike: Whether outputs of the network may be predictions of labels.

        Raises:
            ValueError: If there is no batch, or the reference can't read them.
        """
        outputs, seen = [], []
        for batch in dataloader:
            moved = move_batch(network, batch)
            call = self._reader.call(network, moved)
            with isolated(network) as run:
                outputs.append(self._reader.task.predictions(run(call).cpu()))
            seen.append(self._reader.see(moved, call, len(outputs[-1])))
        if not outputs:
            raise ValueError("Expected batches in `dataloader`, but got none.")
        of_network = torch.cat(outputs)
        samples = Observations(join_seen(seen), torch.zeros(len(of_network), 0))
        rows = finite_samples(samples, "samples", self._warn)
        of_finite = self.predict(samples.take(rows).seen).to(of_network.dtype)
        of_reference = of_finite.new_full((len(of_network), of_finite.shape[1]), math.nan)
        of_reference[rows] = of_finite
        return Predictions(of_network, of_reference, are_alike)


def finite_samples(samples: Observations, what: str, warn: Warn) -> Tensor:
    """Return the samples without nan and inf, ``(N,)``, and say how many have some.

    Raises:
        ValueError: If all have.
    """
    is_finite = are_finite(samples.seen)
    if not bool(is_finite.any()):
        raise ValueError("No sample has finite inputs and features")
    if not bool(is_finite.all()):
        message = (
            f"leaves out {int((~is_finite).sum())} {what} with nan or inf in inputs or features. If values are "
            "missing, fill them in, with a column that says where."
        )
        warn("nan", message, kind=what)
    return is_finite.nonzero()[:, 0]
