"""Simulated twins: the module with other weights in place, as if it had been trained on other samples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_sensitivity.model.isolation import complete


class InitialWeights:
    """Keep the initial weights on the CPU: given, restored from a checkpoint, or copied at step 0.

    Args:
        given: A state dict, where the user says which they are.

    Attributes:
        weights: By name; None where they are not known.
        source: Where they come from.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None) -> None:
        self._given, self.source, self._owner = given, "", 0
        self.weights: dict[str, Tensor] | None = None

    def begin(self, model: nn.Module, step: int) -> None:
        """Find them before the first step of a fit.

        Args:
            model: The module.
            step: How many steps were done before this fit.

        Raises:
            MisconfigurationException: If the given ones are no weights of the module, or none are known.
        """
        if self._given is not None:
            self.weights, self.source = copy_weights(self._given), "those of `initial_weights`"
            if self.weights.keys().isdisjoint(dict(model.named_parameters())):
                expected = "`initial_weights` should name parameters of the module, as a `['state_dict']` does"
                raise MisconfigurationException(f"{expected}, but name none.")
        elif step == 0:
            self.weights, self._owner = copy_weights(dict(model.named_parameters())), id(model)
            self.source = "those at the start of this fit (if they are trained, pass `initial_weights=`)"
        elif self.weights is None or self._owner not in (0, id(model)):
            raise MisconfigurationException("the initial weights are unknown: pass `initial_weights=`")
        else:
            self.source = "those of the fit that goes on"

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Select the initial weights that have changed, of which a checkpoint has no copy; None if none are known."""
        if self.weights is None:
            return None
        initial = self.weights.items()
        return {name: w for name, w in initial if name not in weights or not torch.equal(w, weights[name].cpu())}

    def restore(self, changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Restore the initial weights from the changed ones and the weights of a checkpoint."""
        self.weights, self._owner = copy_weights(weights) | copy_weights(changed), 0  # of whichever module resumes


def copy_weights(weights: Mapping[str, object]) -> dict[str, Tensor]:
    """Copy the floating tensors among some values, such as a state dict, to the CPU."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    return {n: w.detach().to("cpu", copy=True) for n, w in tensors.items() if w.is_floating_point() or w.is_complex()}


def unknown_parameters(model: nn.Module, initial: Mapping[str, Tensor]) -> list[str]:
    """List trainable parameters without initial weights of the same shape."""
    shapes = {name: weight.shape for name, weight in initial.items()}
    return [name for name, p, _ in _parameters(model) if shapes.get(name) != p.shape and p.requires_grad]


@contextmanager
def twin(
    model: nn.Module, initial: Mapping[str, Tensor], generator: torch.Generator, strength: float = 1.0
) -> Iterator[None]:
    r"""Give a module the weights of a twin within the context, and restore its weights on exit.

    What a layer learned, :math:`d = w - w_0`, responds to its inputs :math:`h` by :math:`d\,h`. In the twin it responds
    to inputs with noise as strong as the signal, :math:`d\,(h \odot (1 + \lambda\xi))` with :math:`\lambda = 1` and one
    :math:`\xi \sim \mathcal N(0, 1)` for each input of the layer (an input channel and a tap of a convolution; a token
    of an embedding); its initial weights respond as before. Where a parameter has no inputs (a bias, a norm), each
    element has a factor of its own.

    It is a heuristic: half of the square of what was learned is taken to be due to the training set, and half to the
    task. ``examples/studies/early_stopping/README.md`` says how far it holds.

    Args:
        model: The module. Its parameters are not written to: twins take their place.
        initial: Its parameters before training, by name. A missing one, such as that of a new head, counts as
            learned as a whole.
        generator: Source of the noise, on the module's device.
        strength: λ. Squared differences of outputs grow with λ² where it is small.

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
    swaps = []
    for name, parameter, module in _parameters(model):
        trained, shape, repeats = parameter.data, *_noise_shape(module, parameter)
        before = initial.get(name)
        if before is None or before.shape != trained.shape:
            before = torch.zeros_like(trained) if parameter.requires_grad else trained
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=trained.device)
        factors = noise.mul_(strength).add_(1).to(trained.dtype)
        factors = factors.repeat_interleave(repeats, 0) if repeats > 1 else factors
        swaps.append((parameter, trained, torch.lerp(before.to(trained), trained, factors)))

    def restore() -> None:
        for parameter, trained, _ in swaps:
            parameter.data = trained
        torch.clear_autocast_cache()

    try:
        for parameter, _, perturbed in swaps:
            # A new tensor in the parameter's place, and not new values: a graph that training holds stays valid.
            parameter.data = perturbed
        torch.clear_autocast_cache()  # of 16-bit copies of the weights, which it would keep using
        yield
    finally:
        complete(restore)


def has_batch_norm(model: nn.Module) -> bool:
    """Check whether a module has batch norm with running statistics."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())


def call_by_batch(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Call a model, normalized by the statistics of each batch as in training, in eval mode and without updating any.

    Running statistics belong to the weights that made them. Under a twin's weights they are another network's, and
    its outputs are off by far more than those of a twin.

    Args:
        model: The module.
        call: Calls it on a batch.
    """
    buffers = [(norm._buffers, norm._buffers.copy()) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    try:
        for present, _ in buffers:
            present.update(running_mean=None, running_var=None)
        return call()
    finally:
        for present, originals in buffers:
            present.update(originals)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield name, parameter and the module that has it, as ``named_parameters`` does; a tied one comes once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_number = parameter.is_floating_point() or parameter.is_complex()
            if is_number and parameter not in seen:
                seen.add(parameter)
                yield name, parameter, module


def _noise_shape(module: nn.Module, parameter: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the shape of the noise, and how often to repeat its first dimension."""
    shape = tuple(parameter.shape)
    if parameter.ndim < 2 or isinstance(module, nn.LayerNorm | nn.RMSNorm) or shape[1:].count(1) == parameter.ndim - 1:
        return shape, 1
    if isinstance(module, (_ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)):  # (inputs, outputs, ...)
        return (shape[0], 1, *shape[2:]), 1
    if isinstance(module, _ConvNd) and module.groups > 1:  # (groups × outputs, inputs of the group, ...)
        return (module.groups, *shape[1:]), shape[0] // module.groups
    return (1, *shape[1:]), 1
