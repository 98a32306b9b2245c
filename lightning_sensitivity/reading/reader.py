"""How to read any batch: the call of the model on it, its labels, and what a reference sees of it."""

import math
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_sensitivity.functional.tasks import TASKS, Task
from lightning_sensitivity.functional.tensors import are_probabilities, evenly_spaced, in_floats
from lightning_sensitivity.messages import Refused, Selector, check_argument, describe, describe_error, refuse_on_error
from lightning_sensitivity.reading.inputs import MAX_ENCODED, encode, find_leaked_label
from lightning_sensitivity.reading.kept import KeptBatch, KeptObservations, num_bytes
from lightning_sensitivity.reference.kinds import Seen, are_finite
from lightning_sensitivity.reference.observations import Observations, group_numbers
from lightning_sensitivity.running.batches import clone_tensors, take
from lightning_sensitivity.running.call import (
    Function,
    ModelCall,
    select_outputs,
    select_seen,
    select_targets,
)
from lightning_sensitivity.running.isolation import isolated
from lightning_sensitivity.running.rules import Layout, Sight, find_labels, find_sight

Shape = tuple[int, ...]


class BatchReader:
    """A reader of batches of any kind, by functions of the user or by what is usual.

    The functions get copies of a batch, and may draw random numbers without a trace.

    Args:
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.running.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.running.select_outputs`.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.running.select_targets`.
        features: What a reference sees, by default the inputs: a function ``batch -> (N, D)``, or a module
            that gets the inputs of the model.
        groups: A function ``batch -> groups``, numbers or strings, one per sample; None without groups.
        task: The task, which labels have to fit.
        call: A function ``(model, batch) -> result`` in place of ``forward``; then ``inputs`` says only what
            a reference sees, and it or ``features`` is needed.

    Attributes:
        task: The task.
        unread: Names of the arguments of which something can't be read, in the batches so far.
        function: The function ``call``, if there is one.
        has_features: Whether the user says what a reference sees.
        has_groups: Whether samples have groups.

    Raises:
        MisconfigurationException: If a selector is no function; in its methods, if a batch can't be read so.
    """

    def __init__(
        self,
        *,
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        targets: Selector | None = None,
        features: Selector | nn.Module | None = None,
        groups: Selector | None = None,
        task: Task = TASKS["multiclass"],
        call: Function | None = None,
    ) -> None:
        selectors = {"inputs": inputs, "outputs": outputs, "targets": targets, "features": features, "groups": groups}
        for name, value in selectors.items():
            kind = "a module, a function" if name == "features" else "a function"
            expected = f"{kind}, such as `lambda x: x[0]`, or None"
            check_argument(name, value, value is None or callable(value), expected)
        check_argument("call", call, call is None or callable(call), "a function (module, batch) -> outputs, or None")
        self.function = call
        self._inputs = inputs
        self._outputs = outputs or (select_outputs if task.is_regression else None)
        self._targets = targets
        self._groups = groups
        self._encoder = features if isinstance(features, nn.Module) else None
        self._features = None if isinstance(features, nn.Module) else features
        if call is not None and (inputs, self._features) == (None, None):
            raise Refused(
                "`call=` needs `inputs=`, which says what the reference sees of a batch, and an encoder gets, such as "
                "`inputs=lambda batch: batch[0]`; or `features=`, a function of the batch."
            )
        self.has_features = features is not None
        self.has_groups = groups is not None
        self.task = task
        self.reset()

    @property
    def sees_all(self) -> bool:
        """Whether nothing of the inputs was left out, as far as is known."""
        return not self.unread and not self.has_features

    def reset(self) -> None:
        """Forget what other batches have shown; the next one says what is seen of those with the same inputs."""
        self.unread: list[str] = []
        self._first_layout: Layout | None = None
        self._first_sight: Sight | None = None

    def check_encoder(self, model: nn.Module) -> None:
        """Refuse an encoder that changes as the model is trained, since features of earlier samples would not hold."""
        if self._encoder is None:
            return
        trained = {weight for weight in model.parameters() if weight.requires_grad}
        shared = {*model.modules()}.intersection(self._encoder.modules())
        has_buffers = any(module.training and [*module.buffers(recurse=False)] for module in shared)
        if has_buffers or not trained.isdisjoint(self._encoder.parameters()):
            raise Refused(
                "`features` is trained with the network, or has buffers that change, such as those of batch norm: pass "
                "a copy, `copy.deepcopy(body)`.",
                "features",
            )

    def call(self, model: nn.Module, batch: object) -> ModelCall:
        """Make the call of a model on a batch."""
        if self._inputs is None:
            call = ModelCall(model, batch, None, self._outputs, self.function)
        else:
            with isolated(model) as run:
                call = run(ModelCall, model, batch, self._inputs, self._outputs, self.function)
        self._first_layout = self._first_layout or call.layout
        if self._first_layout.size == 0 and self._is_like_first(call):
            call.size = 0  # unknown, as of the first batch: here sizes are equal by chance
        return call

    def _is_like_first(self, call: ModelCall) -> bool:
        """Return whether a batch has the same inputs as the first one."""
        return self._first_layout is not None and self._first_layout.inputs.keys() == call.layout.inputs.keys()

    def _sight(self, call: ModelCall, size: int) -> Sight:
        """Find what a reference sees of N samples: of the first batch, and then the same of all that have it."""
        if not self._is_like_first(call):
            return find_sight(call.inputs(), size)
        self._first_sight = self._first_sight or find_sight(call.inputs(), size)
        return self._first_sight

    def labels(self, batch: object, call: ModelCall, output_shape: Shape | None = None) -> Tensor:
        """Copy the labels of a batch to the CPU.

        Args:
            batch: The batch.
            call: The call of the model on it, or on some of its samples.
            output_shape: The shape of the outputs for a sample; None if it is not known yet.

        Raises:
            MisconfigurationException: If it is not clear where they are, or they do not fit the task.
        """
        if self._targets is None:
            selected = select_targets(call.model, batch)
        else:
            with isolated(call.model) as run:
                selected = run(select_targets, call.model, batch, self._targets)
        labels = selected.detach().to("cpu", copy=True)
        if output_shape is None:
            return labels
        try:
            self.task.check(torch.zeros(1).expand(labels.shape[:1] + output_shape), labels)
        except Exception as error:
            raise Refused(f"`targets` should fit the outputs: {describe_error(error)}", "task") from error
        return labels

    def check_samples(self, batch: object, call: ModelCall, labels: Tensor, need_reference: bool = True) -> None:
        """Refuse labels that are hardly those of the task, or that a reference sees, and samples that it can't read.

        What an encoder makes of samples is not looked at.

        Args:
            batch: A training batch.
            call: The call of the model on it.
            labels: Its labels.
            need_reference: Whether nothing can be said if it can read no sample.

        Raises:
            MisconfigurationException: If there are such; the message names the entry that holds labels.
        """
        if doubt := self.task.doubt(labels):
            raise Refused(doubt, entry="task")
        if self._encoder is not None:
            return
        seen = self.see(batch, call, len(labels))
        inputs: Mapping[str, object] = call.inputs() if self._features is None else {"features": seen["columns"]}
        if answer := find_leaked_label(inputs, labels, self.task.has_label(labels)):
            raise Refused(
                f"the labels are among the inputs, in `{answer}`, where the reference would see them: leave them out "
                "of what `inputs=` or `features=` returns."
            )
        if need_reference and not seen:
            raise Refused(f"the reference can read nothing of {call}: set `features=`.", "features")
        if need_reference and len(labels) > 0 and not bool(are_finite(seen).any()):
            raise Refused(
                "all samples have nan or inf in inputs or features, so that the reference can read none: fill missing "
                "values in, with a column that says where, by `inputs=` or `features=`.",
                "nan",
            )

    def kept_labels(self, batch: object, kept: KeptBatch, output_shape: Shape | None = None) -> Tensor | None:
        """Copy the labels of those samples of a batch that are kept; None if it is not clear where they would be.

        Raises:
            MisconfigurationException: As by :meth:`labels`, or if there is not one label for each sample.
        """
        if self._targets is None and find_labels(kept.call.model, batch) is None:
            return None
        labels = self.labels(batch, kept.call, output_shape)
        check_count(labels, kept.whole_size)
        return take(labels, kept.indices)

    def see(self, batch: object, call: ModelCall, size: int, indices: Tensor | None = None) -> Seen:
        """Find what a reference sees of some samples of a batch, on the CPU.

        Args:
            batch: The batch, which only a function ``features`` needs.
            call: The call of the model on it.
            size: N, the number of its samples.
            indices: Which of them are wanted; None for all.

        Returns:
            What it sees by kind, empty if that is nothing; it may share memory with the call.

        Raises:
            MisconfigurationException: If ``features`` fails, or does not return ``(N, D)``.
        """
        if self._encoder is not None:
            return {"columns": encode(self._encoder, call, size, indices)}
        if self._features is None:
            seen, unread = select_seen(call.arguments, size, self._sight(call, size), indices)
            self.unread = [*dict.fromkeys([*self.unread, *call.layout.left_out, *unread])]
            return seen
        with refuse_on_error(f"`features` failed on {describe(batch)}", "features"), isolated(call.model) as run:
            values: object = run(self._features, clone_tensors(batch))
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size:
            expected = f"a module, or a function that returns a tensor ({size}, D)"
            raise Refused(f"`features` should be {expected}, got {describe(values)}.", "features")
        return {"columns": in_floats(take(values, indices).detach()).flatten(1).cpu()}

    def groups(self, model: nn.Module, batch: object, size: int, indices: Tensor | None = None) -> Tensor | None:
        """Find the numbers of the groups of some of N samples of a batch, of all without indices; None without groups.

        Raises:
            MisconfigurationException: If ``groups`` fails, or does not return a number or string for each sample.
        """
        if self._groups is None:
            return None
        with refuse_on_error(f"`groups` failed on {describe(batch)}", "groups"), isolated(model) as run:
            numbers = group_numbers(run(self._groups, clone_tensors(batch)))
        if len(numbers) != size:
            raise Refused(f"`groups` should return a group for each of {size} samples, got {len(numbers)}.", "groups")
        return take(numbers, indices)

    # Validation samples

    def keep(
        self,
        model: nn.Module,
        batch: object,
        index: int,
        max_samples: float = math.inf,
        max_bytes: float = math.inf,
    ) -> KeptBatch:
        """Copy a batch to the CPU, so that it can be run again.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            index: Its index in its loader.
            max_samples: How many samples to keep, evenly spaced, if their number is known.
            max_bytes: How many bytes its arguments may take, but for one sample.

        Raises:
            MisconfigurationException: If it can't be read.
        """
        whole = self.call(model, batch)
        share = min(1.0, max_bytes / max(1, num_bytes(whole.arguments)))
        indices = evenly_spaced(torch.arange(whole.size), min(max_samples, max(1, int(share * whole.size))))
        call = whole if indices is None else whole.take(indices)
        num_kept = call.size
        if num_kept == 0:  # then the outputs tell
            with isolated(model) as run:
                num_kept = len(run(call))
        size = whole.size or num_kept
        seen = None if self._features is None else self.see(batch, whole, size, indices)  # else the call has all
        groups = None if self._groups is None else self.groups(model, batch, size, indices)
        return KeptBatch(index, num_kept, size, call.copy_to_cpu(), seen, groups, indices)

    def join(self, batches: Iterable[KeptBatch]) -> Observations:
        """Return the samples of kept batches as a reference takes them, without labels.

        Raises:
            MisconfigurationException: If ``features`` fails.
            ValueError: As by :func:`~lightning_sensitivity.reference.kinds.join_seen`.
        """
        parts = [(kept.seen or self.see(None, kept.call, kept.size), kept) for kept in batches]
        return Observations.join([Observations(seen, torch.zeros(kept.size, 0), kept.groups) for seen, kept in parts])

    # Training samples

    def make_kept(self, num_columns: int, num_processes: int = 1) -> KeptObservations:
        """Make what keeps training samples for :meth:`keep_observations`; an encoder runs on at most 3,000 of them.

        Args:
            num_columns: How many columns labels have as a matrix.
            num_processes: How many processes share the samples.
        """
        max_read = sys.maxsize if self._encoder is None else MAX_ENCODED
        return KeptObservations(num_columns, num_processes, max_read)

    def keep_observations(
        self, kept: KeptObservations, model: nn.Module, batch: object, output_shape: Shape | None = None
    ) -> None:
        """Keep those samples of a training batch that are wanted and have labels, with these as a matrix.

        Args:
            kept: What is kept.
            model: The model.
            batch: The batch.
            output_shape: As for :meth:`labels`.

        Raises:
            MisconfigurationException: If it can't be read, or there is not one label for each sample.
        """
        if kept.num_to_read == 0:
            return
        call = self.call(model, batch)
        labels = self.labels(batch, call, output_shape)
        size = len(labels)
        check_count(labels, call.size or size)
        labelled = self.task.has_label(labels).nonzero()[:, 0]
        chosen, priorities = kept.choose(len(labelled))
        if len(chosen) > 0:
            indices = labelled[chosen]
            y = in_floats(self.task.label_matrix(labels[indices], kept.num_columns))
            seen = self.see(batch, call, size, indices)
            kept.add(Observations(seen, y, self.groups(model, batch, size, indices)), priorities)


def check_logits(outputs: Tensor, are_of_sigmoid: bool, task: Task) -> None:
    """Refuse outputs ``(N, K)`` or ``(N,)`` that are probabilities."""
    is_by_sigmoid = are_of_sigmoid and task.link == "sigmoid"  # a softmax may follow in the loss
    if is_by_sigmoid or (task.link != "identity" and are_probabilities(outputs)):
        select = "p.logit(1e-6)" if is_by_sigmoid else "p.log()"
        raise Refused(f"outputs are probabilities, and logits are needed: `outputs=lambda p: {select}`.", "outputs")


def check_count(labels: Tensor, size: int) -> None:
    """Refuse labels that are not one for each sample."""
    if len(labels) != size:
        raise Refused(f"`targets` should return a label for each of {size} samples, got {len(labels)}.", "task")
