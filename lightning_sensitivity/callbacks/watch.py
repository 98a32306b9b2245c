"""Watch the user's step: does it call the model as we do, and train on the outputs that we measure?"""

import inspect
import math
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.compat import is_compiled
from lightning_sensitivity.functional.tasks import IGNORED
from lightning_sensitivity.model import ModelCall, select_outputs
from lightning_sensitivity.model.forward import clone_tensors, parameters_of, tensors_in
from lightning_sensitivity.model.isolation import is_isolated

_LOSS_TOLERANCE = 0.05  # relative, beyond the range of the losses of single samples


class CallWatch:
    """Compare the first call of a module in the user's step with ours.

    Tensors should have the same number of dimensions, and values of similar mean and magnitude. They may differ a
    little, since a step may augment its inputs.

    Args:
        pl_module: The module.
        call: Our call on the batch of the step.
        outputs: How outputs are selected, to keep those of the call; see :func:`select_outputs`.

    Attributes:
        can_watch: Whether we can see the calls of the step; not in compiled code.
        was_called: Whether the step has called the module.
        step_outputs: Detached outputs of the first call in the step, if they could be selected.
    """

    def __init__(self, pl_module: LightningModule, call: ModelCall, outputs: Selector | None = None) -> None:
        self._pl_module = pl_module
        self._select = outputs
        self._differing: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._signature = inspect.Signature(parameters_of(pl_module))  # strategies replace `forward` during a step
        self._ours = self._bind(*clone_tensors((call.args, call.kwargs)))
        self.was_called = False
        self.step_outputs: Tensor | None = None
        # Compiled code would trace the hooks, and be compiled again after they are removed.
        self.can_watch = bool(self._ours) and not is_compiled(pl_module)
        if self.can_watch:
            self._handles.append(pl_module.register_forward_pre_hook(self._compare, with_kwargs=True))
            self._handles.append(pl_module.register_forward_hook(self._keep_outputs))

    def end(self) -> list[str]:
        """Stop watching, and name the arguments that differ."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self._differing

    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.was_called or is_isolated(self._pl_module):
            return
        self.was_called = True
        with suppress(Exception):  # this runs in the user's step, on whatever arguments it passes
            theirs = self._bind(args, kwargs)
            tolerance = 1.0 if module.training else 0.01  # training steps may augment
            are_similar = {name: _are_similar(self._ours.get(name), theirs[name], tolerance) for name in theirs}
            self._differing = [name for name, is_similar in are_similar.items() if not is_similar]

    def _keep_outputs(self, module: nn.Module, args: object, result: object) -> None:
        if self.step_outputs is not None or is_isolated(self._pl_module):
            return
        with suppress(Exception):
            self.step_outputs = select_outputs(result, self._select).detach()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by their names in ``forward``, with defaults; nothing if they do not fit it."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            return {}
        bound.apply_defaults()
        return dict(bound.arguments)


def loss_mismatch(outputs: Tensor, targets: Tensor, loss: Tensor, num_accumulated: int = 1) -> str | None:
    """Explain why a loss cannot be a cross-entropy of some outputs, weighted or not; None if it could be.

    With class weights and label smoothing, a loss stays within the range of the losses of the samples; a plain sum is
    recognized by the number of samples. If outputs are embeddings, or cosines that the loss scales, the loss is often
    outside this range.

    Args:
        outputs: Outputs of the training step, ``(N, K)``.
        targets: Class indices, ``(N,)``; those of -100 are ignored.
        loss: The loss of the step.
        num_accumulated: The number by which Lightning may have divided the loss.
    """
    is_multiclass = outputs.ndim == 2 and outputs.shape[1] > 1 and targets.ndim == 1 and not targets.is_floating_point()
    if not is_multiclass or len(outputs) != len(targets) or loss.numel() != 1:
        return None
    targets = targets.to(outputs.device).long()
    losses = cross_entropy(outputs.float(), targets, reduction="none")[targets != IGNORED]
    value = float(loss)
    if not len(losses) or not math.isfinite(value):
        return None
    if _is_mean_or_sum(value, losses) or _is_mean_or_sum(value * num_accumulated, losses):
        return None
    return (
        f"The loss of the first training step, {value:.3g}, cannot be the cross-entropy of the measured outputs, which "
        f"is {float(losses.mean()):.3g}. If the step scales them or adds a head, select its logits with `outputs=`; "
        "if it adds other losses, ignore this."
    )


def _is_mean_or_sum(value: float, losses: Tensor) -> bool:
    """Return whether a value could be a weighted mean of the losses of samples, or their plain sum."""
    plain = float(losses.mean())
    is_mean = value <= float(losses.max()) * (1 + _LOSS_TOLERANCE) + _LOSS_TOLERANCE
    is_sum = abs(value / len(losses) - plain) <= _LOSS_TOLERANCE * plain
    return is_mean or is_sum


def _are_similar(ours: object, theirs: object, tolerance: float) -> bool:
    our_tensors, their_tensors = tensors_in(ours), tensors_in(theirs)
    if not our_tensors and not their_tensors:
        return _are_same_plain_values(ours, theirs)
    if [x.ndim for x in our_tensors] != [x.ndim for x in their_tensors]:
        return False
    pairs = zip(our_tensors, their_tensors, strict=True)
    return all(_have_similar_statistics(x.detach().float(), y.detach().float(), tolerance) for x, y in pairs)


def _are_same_plain_values(ours: object, theirs: object) -> bool:
    """Compare numbers, strings and None; other objects count as the same."""
    plain = (str, int, float, type(None))
    if not isinstance(ours, plain) and not isinstance(theirs, plain):
        return True
    return bool(ours == theirs)


def _have_similar_statistics(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Compare the mean and the mean magnitude of two tensors; tensors with nan count as similar."""
    sizes = float(x.abs().mean()), float(y.abs().mean())
    shift = abs(float(x.mean() - y.mean()))
    is_scaled = max(sizes) > (1 + tolerance) * min(sizes)
    is_shifted = shift > tolerance / 2 * max(sizes)
    return not is_scaled and not is_shifted
