"""Simulated twins: the module with other weights, as if it had been trained on other samples."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sensitivity.compat import BatchNorm, Convolution, TransposedConvolution, clear_autocast_cache
from lightning_sensitivity.model.isolation import restore_despite_interrupt


class InitialWeights:
    """Keep the initial weights on the CPU: given by the user, restored from a checkpoint, or copied at step 0.

    Args:
        given: The initial weights as a state dict, if the user gives them.

    Attributes:
        weights: The initial weights by name; None if they are unknown.
        source: Where they come from.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None) -> None:
        self._given = given
        self._owner: weakref.ref[nn.Module] | None = None  # whose weights they are; None for any module
        self.weights: dict[str, Tensor] | None = None
        self.source = ""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reference to the module, which cannot be pickled."""
        return {**vars(self), "_owner": None}

    def begin(self, model: nn.Module, step: int) -> None:
        """Find the initial weights before the first step of a fit.

        Args:
            model: The module.
            step: The number of training steps before this fit.

        Raises:
            MisconfigurationException: If the given weights are not those of the module, or the weights are unknown.
        """
        if self._given is not None:
            self._begin_with_given(model, self._given)
        elif step == 0:
            self.weights = copy_weights(dict(model.named_parameters()))
            self._owner = weakref.ref(model)
            self.source = "those at the start of this fit (if they are trained, pass `initial_weights=`)"
        elif self.weights is None or (self._owner is not None and self._owner() is not model):
            raise MisconfigurationException("the initial weights are unknown: pass `initial_weights=`")
        else:
            self.source = "those of the fit that is resumed"

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Select the initial weights that have changed, since a checkpoint lacks these; None if they are unknown."""
        if self.weights is None:
            return None
        changed = {}
        for name, initial in self.weights.items():
            if name not in weights or not torch.equal(initial, weights[name].cpu()):
                changed[name] = initial
        return changed

    def restore(self, changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Restore the initial weights from the weights of a checkpoint and those initial weights that have changed."""
        self.weights = copy_weights(weights) | copy_weights(changed)
        self._owner = None

    def forget(self) -> None:
        """Forget the weights, which may belong to another run."""
        self.weights = None

    def _begin_with_given(self, model: nn.Module, given: Mapping[str, Tensor]) -> None:
        self.weights = copy_weights(given)
        self.source = "those of `initial_weights`"
        if self.weights.keys().isdisjoint(dict(model.named_parameters())):
            raise MisconfigurationException(
                "`initial_weights` should name parameters of the module, as a `['state_dict']` does, but names none."
            )


def copy_weights(weights: Mapping[str, object]) -> dict[str, Tensor]:
    """Copy the floating and complex tensors of a dict, such as a state dict, to the CPU."""
    copies = {}
    for name, value in weights.items():
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            copies[name] = value.detach().to("cpu", copy=True)
    return copies


def unknown_parameters(model: nn.Module, initial: Mapping[str, Tensor]) -> list[str]:
    """List trainable parameters without initial weights of the same shape."""
    shapes = {name: weight.shape for name, weight in initial.items()}
    return [name for name, p, _ in _parameters(model) if shapes.get(name) != p.shape and p.requires_grad]


@contextmanager
def twin(
    model: nn.Module, initial: Mapping[str, Tensor], generator: torch.Generator, strength: float = 1.0
) -> Iterator[None]:
    r"""Give a module the weights of a twin within the context, and restore its weights on exit.

    What a layer learned, :math:`d = w - w_0`, adds :math:`d\,h` to its response to inputs :math:`h`. In the twin this
    part sees noisy inputs, :math:`d\,(h \odot (1 + \lambda\xi))`, with one :math:`\xi \sim \mathcal N(0, 1)` for each
    input of the layer (each input channel and kernel position of a convolution; each token of an embedding). With
    :math:`\lambda = 1` the noise is as strong as the signal. The initial weights respond as before. If a parameter has
    no inputs (a bias, a norm), each element gets a factor of its own.

    This is a heuristic: it assumes that half of the square of what was learned is due to the training set, and half to
    the task. ``examples/studies/early_stopping/README.md`` says how well it works.

    Args:
        model: The module. Its parameters are not written to; other tensors temporarily take the place of their data.
        initial: Its parameters before training, by name. A missing parameter, such as that of a new head, counts as
            entirely learned.
        generator: Source of the noise, on the module's device.
        strength: λ. If it is small, squared differences of outputs grow with λ².

    Example:
        >>> import torch
        >>> from lightning_sensitivity.model.twins import copy_weights, twin
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> before = copy_weights(model.state_dict())
        >>> _ = torch.nn.init.ones_(model.weight)  # in place of training
        >>> generator = torch.Generator().manual_seed(0)
        >>> with torch.no_grad(), twin(model, before, generator):
        ...     twin_output = model(x)
        >>> bool(twin_output == model(x)), model.weight.tolist()
        (False, [[1.0, 1.0]])
    """
    swaps = [
        (parameter, parameter.data, _twin_weights(module, parameter, initial.get(name), generator, strength))
        for name, parameter, module in _parameters(model)
    ]

    def restore() -> None:
        for parameter, trained, _ in swaps:
            parameter.data = trained
        clear_autocast_cache()

    try:
        for parameter, _, perturbed in swaps:
            # Swap in a new tensor instead of writing new values, so that a graph held by training stays valid.
            parameter.data = perturbed
        clear_autocast_cache()  # autocast would keep using its 16-bit copies of the old weights
        yield
    finally:
        restore_despite_interrupt(restore)


def _twin_weights(
    module: nn.Module, parameter: Tensor, before: Tensor | None, generator: torch.Generator, strength: float
) -> Tensor:
    """Draw the weights of a twin for one parameter."""
    trained = parameter.data
    if before is None or before.shape != trained.shape:  # a new layer: all of it counts as learned
        before = torch.zeros_like(trained) if parameter.requires_grad else trained
    shape, repeats = _noise_shape(module, parameter)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=trained.device)
    factors = noise.mul_(strength).add_(1).to(trained.dtype)
    if repeats > 1:
        factors = factors.repeat_interleave(repeats, 0)
    return torch.lerp(before.to(trained), trained, factors)


def has_batch_norm(model: nn.Module) -> bool:
    """Check whether a module has batch norm with running statistics."""
    return any(isinstance(module, BatchNorm) and module.running_mean is not None for module in model.modules())


def call_with_batch_statistics(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Call a model in eval mode, but with batch norm using the statistics of the batch, without updating its own.

    Running statistics belong to the weights that produced them. For the weights of a twin they would be wrong, and
    outputs would change by far more than they do between real twins.

    Args:
        model: The module.
        call: Calls the model on a batch.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    buffers = [(norm._buffers, norm._buffers.copy()) for norm in norms]
    try:
        for present, _ in buffers:
            present.update(running_mean=None, running_var=None)
        return call()
    finally:
        for present, originals in buffers:
            present.update(originals)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield name, parameter and the layer that uses it, like ``named_parameters``; tied parameters come only once."""
    seen = set()
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        layer = module
        if isinstance(module, ParametrizationList):  # "layer.parametrizations.weight"
            layer = modules[prefix.rsplit(".", 2)[0] if prefix.count(".") > 1 else ""]
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_number = parameter.is_floating_point() or parameter.is_complex()
            if is_number and parameter not in seen:
                seen.add(parameter)
                yield name, parameter, layer


def _noise_shape(module: nn.Module, parameter: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the shape of the noise, and how many times to repeat its first dimension."""
    shape = tuple(parameter.shape)
    has_no_inputs = parameter.ndim < 2 or isinstance(module, nn.LayerNorm | nn.RMSNorm)
    if has_no_inputs or shape[1:].count(1) == parameter.ndim - 1:
        return shape, 1
    if isinstance(module, (TransposedConvolution, nn.Embedding, nn.EmbeddingBag)) or _is_transposed_linear(module):
        return (shape[0], 1, *shape[2:]), 1  # (inputs, outputs, ...)
    if isinstance(module, Convolution) and module.groups > 1:  # (groups × outputs, inputs of the group, ...)
        return (module.groups, *shape[1:]), shape[0] // module.groups
    return (1, *shape[1:]), 1


def _is_transposed_linear(module: nn.Module) -> bool:
    """Recognize the linear layer of GPT-2 in transformers, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
