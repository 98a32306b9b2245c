"""What a monitor learns about a run: its loaders, whether batches can be joined, what has failed."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lightning_sensitivity.callbacks.failures import Failures
from lightning_sensitivity.callbacks.lazy import LazyValue
from lightning_sensitivity.callbacks.watch import CallWatch
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.forward import tensors_in
from lightning_sensitivity.model.isolation import RunIsolated, written_parameters


@dataclass(frozen=True)
class LoaderFacts:
    """Hold what the first batch of a loader showed.

    Attributes:
        batch_size: Number of samples.
        elements_per_sample: Elements of the largest tensor that a pass makes, per sample.
    """

    batch_size: int
    elements_per_sample: float


@dataclass
class RunFacts:
    """Hold what a monitor keeps for the duration of one run: a fit, or a call of ``validate`` or ``test``.

    Attributes:
        failures: What has failed.
        is_disabled: Whether nothing may be measured.
        loaders: What the first batches of the validation loaders showed.
        can_join: Whether batches can be measured together; None before the first try.
        num_joined: The number of samples in the largest try.
        lazy_values: The values that Lightning reads, by loader and name.
        taken: Names that the module or another callback logs.
        watch: Watches the running step.
    """

    failures: Failures
    is_disabled: bool = False
    loaders: dict[int, LoaderFacts] = field(default_factory=dict)
    can_join: bool | None = None
    num_joined: int = 0
    lazy_values: dict[tuple[int, str], LazyValue] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    watch: CallWatch | None = None


class FirstPass(NamedTuple):
    """Hold what the first pass on a batch showed.

    Attributes:
        outputs: The outputs.
        written: Parameters that ``forward`` writes.
        facts: The sizes of the batch and of its tensors.
    """

    outputs: Tensor
    written: list[str]
    facts: LoaderFacts


def first_pass(model: nn.Module, run: RunIsolated, call: ModelCall) -> FirstPass:
    """Run a model on a batch for the first time, and record what the pass does.

    Args:
        model: The module.
        run: Runs the model and leaves no trace.
        call: Calls the model on the batch.
    """
    num_elements = _largest_size([call.args, call.kwargs])

    def note_elements(module: nn.Module, args: object, result: object) -> None:
        nonlocal num_elements
        num_elements = max(num_elements, _largest_size(result))

    with ExitStack() as hooks:
        for module in model.modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(note_elements))
        outputs, written = written_parameters(model, lambda: run(call))
    size = max(1, call.sizes[0] or len(outputs))
    facts = LoaderFacts(size, max(num_elements, outputs.numel()) / size)
    return FirstPass(outputs, written, facts)


def _largest_size(value: object) -> int:
    """Count the elements of the largest tensor in a value, except nested ones."""
    return max((tensor.numel() for tensor in tensors_in(value) if not tensor.is_nested), default=0)
