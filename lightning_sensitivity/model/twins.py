"""Simulated twins: a module with other weights, as if it had been trained on other samples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_sensitivity.compat import BatchNorm, Convolution, TransposedConvolution
from lightning_sensitivity.model.call import ModelCall, device_of
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.perturbation import noise_generator

NUM_TWINS = 4  # with fewer, the variance would depend too much on the noise of each


def copy_weights(weights: Mapping[str, object]) -> dict[str, Tensor]:
    """Copy the floating and complex tensors of a dict, such as a state dict, to the CPU."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items() if _is_continuous(x)}


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def unknown_parameters(model: nn.Module, initial: Mapping[str, Tensor]) -> list[str]:
    """List trainable parameters without initial weights of the same shape."""
    trainable = [(name, parameter) for name, parameter, _ in _parameters(model) if parameter.requires_grad]
    return [name for name, parameter in trainable if _initial_weight(initial, name, parameter) is None]


def _initial_weight(initial: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """Find the initial weight of a parameter, which pruning may have renamed; None if it does not fit."""
    weight = initial.get(name, initial.get(name.removesuffix("_orig")))
    return weight if weight is not None and weight.shape == parameter.shape else None


@torch.no_grad()
def twin_weights(
    model: nn.Module, initial: Mapping[str, Tensor], generator: torch.Generator, strength: float = 1.0
) -> dict[str, Tensor]:
    r"""Draw the weights of a twin, as if the module had been trained on other samples.

    What a layer learned, :math:`d = w - w_0`, adds :math:`d\,h` to its response to inputs :math:`h`. In the
    twin this part sees noisy inputs, :math:`d\,(h \odot (1 + \lambda\xi))`, with one
    :math:`\xi \sim \mathcal N(0, 1)` for each input of the layer (each input channel and kernel position of a
    convolution; each token of an embedding). With :math:`\lambda = 1` the noise is as strong as the signal.
    The initial weights respond as before. If a parameter has no inputs (a bias, a norm), each element gets a
    factor of its own.

    This is a heuristic: it assumes that half of the square of what was learned is due to the training set,
    and half to the task. ``examples/studies/early_stopping/README.md`` says how well it works.

    Args:
        model: The module, which stays as it is.
        initial: Its parameters before training, by name, on its device. A missing parameter, such as that of
            a new head, counts as entirely learned.
        generator: Source of the noise, on the module's device.
        strength: λ. If it is small, squared differences of outputs grow with λ².

    Returns:
        The weights by name, for :func:`torch.func.functional_call`.

    Example:
        >>> import torch
        >>> from torch.func import functional_call
        >>> from lightning_sensitivity.model.twins import copy_weights, twin_weights
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(1, 2)
        >>> before = copy_weights(model.state_dict())
        >>> _ = torch.nn.init.ones_(model.weight)  # in place of training
        >>> weights = twin_weights(model, before, torch.Generator().manual_seed(0))
        >>> bool(functional_call(model, weights, x) == model(x)), model.weight.tolist()
        (False, [[1.0, 1.0]])
    """
    weights = {}
    for name, parameter, layer in _parameters(model):
        trained = parameter.detach()
        before = _initial_weight(initial, name, parameter)
        if before is None:  # a new layer: all of it counts as learned
            before = torch.zeros_like(trained) if parameter.requires_grad else trained
        factors = _draw_factors(layer, parameter, generator, strength).to(trained.dtype)
        weights[name] = torch.lerp(before.to(trained), trained, factors)
    return weights


def twin_numbers(place: int, num_batches: int) -> list[int]:
    """Return which twins a batch goes through: one, which neighbours share; two, if there are few batches.

    Args:
        place: The place of the batch among those that are measured.
        num_batches: How many are measured.
    """
    return [2 * place, 2 * place + 1] if num_batches < NUM_TWINS else [place * NUM_TWINS // num_batches]


@dataclass(eq=False)
class Twins:
    """Run simulated twins of a model on batches.

    Attributes:
        model: The module.
        initial: Its parameters before training; see :func:`twin_weights`.
        strength: λ.
        key: Seed, rank and loader; see :func:`~lightning_sensitivity.model.noise_generator`.
        run: Calls a function that runs the model; from :func:`~lightning_sensitivity.model.isolated`.
    """

    model: nn.Module
    initial: Mapping[str, Tensor]
    strength: float
    key: tuple[int, int, int]
    run: RunIsolated
    _last: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)  # the weights of one twin

    def outputs(self, call: ModelCall, place: int, num_batches: int) -> list[Tensor]:
        """List the outputs of each twin for a batch; for the last two arguments see :func:`twin_numbers`."""
        numbers = twin_numbers(place, num_batches)
        return [self.run(_call_with_batch_statistics, self.model, call, self._weights(number)) for number in numbers]

    def baseline_outputs(self, call: ModelCall) -> Tensor | None:
        """Return the model's outputs for a batch with its statistics; None without batch norm."""
        return self.run(_call_with_batch_statistics, self.model, call) if has_batch_norm(self.model) else None

    def _weights(self, number: int) -> dict[str, Tensor]:
        if number not in self._last:
            generator = noise_generator(*self.key, 0, number, device=device_of(self.model))
            self._last.clear()
            self._last[number] = twin_weights(self.model, self.initial, generator, self.strength)
        return self._last[number]


def has_batch_norm(model: nn.Module) -> bool:
    """Check whether a module has batch norms that :func:`batch_statistics` changes."""
    return bool(_batch_norms(model))


def _call_with_batch_statistics(
    model: nn.Module, call: ModelCall, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    with nullcontext() if call.size == 1 else batch_statistics(model):  # a single sample has none
        return call(None, weights)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch in eval mode, without updating their own.

    Running statistics belong to the weights that produced them. For the weights of a twin they would be
    wrong, and outputs would change by far more than they do between real twins. A subclass of batch norm with
    a ``forward`` of its own keeps its running statistics, which it may read.

    Args:
        model: The module.
    """
    originals = [(norm, norm.running_mean, norm.running_var) for norm in _batch_norms(model)]
    try:
        for norm, _, _ in originals:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, mean, variance in originals:
            norm.running_mean, norm.running_var = mean, variance


def _batch_norms(model: nn.Module) -> list[BatchNorm]:
    """List the batch norms with running statistics and with a ``forward`` of torch's own."""
    own = (BatchNorm.forward, nn.SyncBatchNorm.forward)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    usual = [norm for norm in norms if type(norm).forward in own and "forward" not in vars(norm)]
    return [norm for norm in usual if norm.running_mean is not None]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield name, parameter and the layer that uses it; tied parameters come only once."""
    for name, parameter in model.named_parameters():
        if _is_continuous(parameter):
            layer = name.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".")
            yield name, parameter, model.get_submodule(layer)


def _draw_factors(layer: nn.Module, parameter: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Draw 1 + λ ξ, of a shape that fits the parameter."""
    shape = _noise_shape(layer, parameter)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=parameter.device)
    factors = noise.mul_(strength).add_(1)
    has_groups = shape[:1] not in ((1,), parameter.shape[:1])
    return factors.repeat_interleave(len(parameter) // len(factors), 0) if has_groups else factors


def _noise_shape(layer: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the noise: one number for each input of the layer, or for each element."""
    shape = tuple(parameter.shape)
    has_no_inputs = parameter.ndim < 2 or isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    if has_no_inputs or shape[1:].count(1) == parameter.ndim - 1:
        return shape
    if _has_inputs_first(layer):  # (inputs, outputs, ...)
        return (shape[0], 1, *shape[2:])
    groups = layer.groups if isinstance(layer, Convolution) else 1
    return (groups, *shape[1:])  # of (groups × outputs, inputs of the group, ...)


def _has_inputs_first(layer: nn.Module) -> bool:
    """Check whether a weight is (inputs, outputs, ...), as in the linear layer of GPT-2 in transformers."""
    is_of_gpt2 = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    return is_of_gpt2 or isinstance(layer, TransposedConvolution | nn.Embedding | nn.EmbeddingBag)
