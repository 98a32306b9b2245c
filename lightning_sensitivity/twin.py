"""A stand-in for a twin: the network that another training set would have given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["initial_weights", "learned_weights", "twin"]


def initial_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, by name.

    Args:
        model: The module, before training.

    Returns:
        What :func:`twin` needs of it later.
    """
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in _floating_parameters(model)}


def learned_weights(model: nn.Module, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far training has moved each parameter, on the parameter's device.

    Args:
        model: The module.
        initial: Its parameters before training.

    Returns:
        Differences, by name.
    """
    return {name: _moved(parameter.detach(), initial.get(name)) for name, parameter in _floating_parameters(model)}


@contextmanager
def twin(model: nn.Module, learned: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[None]:
    r"""Give the module the weights of a twin inside, and its own back on exit.

    What a layer learned, :math:`d = w - w_0`, answers to its inputs :math:`h` by :math:`d\,h`. In the twin it answers
    to inputs with noise as strong as the signal, :math:`d\,(h \odot (1 + \xi))` with one
    :math:`\xi \sim \mathcal N(0, 1)` for each input of the layer; what it was initialized with answers as before.

    Args:
        model: The module.
        learned: What :func:`learned_weights` gave for it.
        generator: Source of the noise, on the module's device.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.twin import initial_weights, learned_weights, twin
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> before = initial_weights(model)
        >>> _ = torch.nn.init.ones_(model.weight)  # in place of training
        >>> generator = torch.Generator().manual_seed(0)
        >>> with torch.no_grad(), twin(model, learned_weights(model, before), generator):
        ...     twin_output = model(x)
        >>> bool(twin_output == model(x)), model.weight.tolist()
        (False, [[1.0, 1.0]])
    """
    own = {name: parameter.detach().clone() for name, parameter in _floating_parameters(model)}
    try:
        with torch.no_grad():
            for name, parameter in _floating_parameters(model):
                difference = learned[name]
                # One factor for each input of a layer, whose weights are (outputs, inputs, ...); a bias has an own one.
                shape = (1, *difference.shape[1:]) if difference.ndim > 1 else difference.shape
                noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=difference.device)
                parameter.add_((noise * difference).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in _floating_parameters(model):
                parameter.copy_(own[name])


def _floating_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point())


def _moved(weights: Tensor, before: Tensor | None) -> Tensor:
    # What was not there before training, a head that was exchanged meanwhile, say, has been learned as a whole.
    return weights.clone() if before is None or before.shape != weights.shape else weights - before.to(weights)
