"""A stand-in for a twin: the network that another training set would have given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy


def initial_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, by name.

    Args:
        model: The module, before training.

    Returns:
        What :func:`twin` needs of it later.
    """
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter, _ in _parameters(model)}


@contextmanager
def twin(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    generator: torch.Generator,
    strength: float = 1.0,
    buffers: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    r"""Give the module the weights of a twin inside, and its own back on exit.

    What a layer learned, :math:`d = w - w_0`, answers to its inputs :math:`h` by :math:`d\,h`. In the twin it answers
    to inputs with noise as strong as the signal, :math:`d\,(h \odot (1 + \lambda\xi))` with :math:`\lambda = 1` and one
    :math:`\xi \sim \mathcal N(0, 1)` for each input of the layer (an input channel and a tap of a convolution; a token
    of an embedding); what it was initialized with answers as before. Where a parameter has no inputs (a bias, a norm),
    each element has a factor of its own.

    It is a heuristic: half of the square of what was learned is taken to be due to the training set, and half to the
    task. README says how far it holds.

    Args:
        model: The module. Its parameters are not written to; they lend their place.
        initial: Its parameters before training, as :func:`initial_weights` gives them. What is not there, a head that
            was exchanged meanwhile, say, has been learned as a whole.
        generator: Source of the noise, on the module's device.
        strength: λ. Squared differences of outputs grow with λ² where it is small.
        buffers: Where the weights of one twin after another are written; a dict that is empty at first.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.twins import initial_weights, twin
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> before = initial_weights(model)
        >>> _ = torch.nn.init.ones_(model.weight)  # in place of training
        >>> generator = torch.Generator().manual_seed(0)
        >>> with torch.no_grad(), twin(model, before, generator):
        ...     twin_output = model(x)
        >>> bool(twin_output == model(x)), model.weight.tolist()
        (False, [[1.0, 1.0]])
    """
    swaps, buffers = [], {} if buffers is None else buffers
    for name, parameter, module in _parameters(model):
        own, shape, repeats = parameter.data, *_noise_shape(module, parameter)
        before = initial.get(name)
        if before is None or before.shape != own.shape:
            before = torch.zeros_like(own)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=own.device)
        factors = noise.mul_(strength).add_(1).to(own.dtype)
        factors = factors.repeat_interleave(repeats, 0) if repeats > 1 else factors
        buffers[name] = torch.lerp(before.to(own), own, factors, out=buffers.get(name))
        swaps.append((parameter, own, buffers[name]))
    try:
        for parameter, _, perturbed in swaps:
            # A new tensor in the parameter's place, and not new values: a graph that training holds stays valid.
            parameter.data = perturbed
        torch.clear_autocast_cache()  # of 16-bit copies of the weights, which it would keep using
        yield
    finally:
        _give_back(swaps)


def normalizes_by_batch(model: nn.Module) -> bool:
    """Whether a module has batch norm with running statistics."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the statistics of each batch inside, as training does, in eval mode and without updating any.

    Running statistics belong to the weights that made them. Under a twin's weights they are another network's, and
    its outputs are off by far more than those of a twin.

    Args:
        model: The module.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    own = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update(running_mean=None, running_var=None)
        yield
    finally:
        for norm, mean, var in own:
            norm._buffers.update(running_mean=mean, running_var=var)


def _give_back(swaps: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
    try:
        for parameter, own, _ in swaps:
            parameter.data = own
        torch.clear_autocast_cache()
    except KeyboardInterrupt:  # has to wait: the weights are the user's
        _give_back(swaps)
        raise


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name, parameter and the module that has it, as ``named_parameters`` gives them: one that is tied comes once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_number = parameter.is_floating_point() or parameter.is_complex()
            if is_number and not is_lazy(parameter) and parameter not in seen:
                seen.add(parameter)
                yield name, parameter, module


def _noise_shape(module: nn.Module, parameter: Tensor) -> tuple[tuple[int, ...], int]:
    """A shape that broadcasts over the outputs of a layer, after its first dimension is repeated so many times."""
    shape = tuple(parameter.shape)
    if parameter.ndim < 2 or isinstance(module, nn.LayerNorm) or shape[1:].count(1) == parameter.ndim - 1:
        return shape, 1
    if isinstance(module, (_ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)):  # (inputs, outputs, ...)
        return (shape[0], 1, *shape[2:]), 1
    if isinstance(module, _ConvNd) and module.groups > 1:  # (groups × outputs, inputs of the group, ...)
        return (module.groups, *shape[1:]), shape[0] // module.groups
    return (1, *shape[1:]), 1
