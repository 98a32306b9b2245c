"""Each test says what would break without a function or name of ``compat``: where to look when an upgrade fails."""

import random
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskEstimate, compat
from lightning_sensitivity.model import ModelCall, isolated

from .helpers import Quiet, Stream, fitted, loader, trainer

# torch


def test_without_the_base_classes_of_layers_twins_would_draw_wrong_noise_and_keep_statistics() -> None:
    for name in ("1d", "2d", "3d"):
        assert issubclass(getattr(nn, f"BatchNorm{name}"), compat.BatchNorm)
        assert issubclass(getattr(nn, f"Conv{name}"), compat.Convolution)
        assert issubclass(getattr(nn, f"ConvTranspose{name}"), compat.TransposedConvolution)
    assert issubclass(nn.SyncBatchNorm, compat.BatchNorm) and not issubclass(nn.GroupNorm, compat.BatchNorm)


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_without_random_states_a_pass_would_move_the_random_streams_of_training() -> None:
    module = nn.Linear(2, 2)
    states = compat.collect_rng_states(include_cuda=False)
    with isolated(module) as run:
        drawn = run(draw)
        run(draw)
    assert draw() == drawn
    compat.set_rng_states(states)
    assert draw() == drawn


@pytest.mark.parametrize("draw", [random.random, np.random.rand, torch.rand])
def test_without_random_streams_an_augmented_input_would_be_taken_for_a_wrong_one(draw: Any) -> None:
    before = compat.random_streams()
    assert compat.random_streams() == before
    draw(*([1] if draw is torch.rand else []))
    assert compat.random_streams() != before


def test_without_is_tracing_the_example_of_a_trace_would_be_taken_for_the_input_of_a_step() -> None:
    seen = list[bool]()
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: seen.append(compat.is_tracing()))
    torch.jit.trace(module, torch.ones(1, 2))
    module(torch.ones(1, 2))
    assert seen[0] and not seen[-1]


def test_without_is_compiled_hooks_of_ours_would_make_compiled_code_compile_again() -> None:
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(module, backend="eager"))
    assert compat.is_compiled(from_compiled(torch.compile(LightningModule(), backend="eager")))
    module.compile(backend="eager")
    assert compat.is_compiled(module)
    module = nn.Linear(2, 2)
    module.forward = torch.compile(module.forward, backend="eager")
    assert compat.is_compiled(module)


def test_without_original_module_a_compiled_forward_would_have_no_named_arguments() -> None:
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    assert compat.original_module(module) is compat.original_module(compiled) is module
    assert list(ModelCall(compiled, {"input": torch.ones(1, 2), "id": 3}).kwargs) == ["input"]


# torchmetrics


def test_without_forget_computed_a_metric_would_give_its_old_value() -> None:
    metric = RiskEstimate()
    metric.update(torch.zeros(2, 3), torch.eye(3)[:2])
    assert metric.compute()["risk_estimate"].isnan()
    metric.update_training(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert metric.compute()["risk_estimate"].isfinite()


def test_without_mark_updated_a_process_without_a_batch_would_warn() -> None:
    metric = RiskEstimate()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
    metric.update_training(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    metric.compute()


def test_without_axes_and_plot_types_plots_could_not_be_typed() -> None:
    module = import_module("torchmetrics.utilities.plot")
    assert hasattr(module, "_AX_TYPE") and hasattr(module, "_PLOT_OUT_TYPE")


# Lightning


class Probe(Callback):
    """Keeps what a function of a Trainer returns on each validation batch."""

    def __init__(self, read: Any) -> None:
        self.read, self.seen = read, []

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append(self.read(trainer))


def probed(read: Any, loaders: Any) -> list[Any]:
    probe = Probe(read)
    trainer(callbacks=[probe]).validate(Quiet(), loaders, verbose=False)
    return probe.seen


LOADERS = [loader(48), loader(16)]


@pytest.mark.parametrize(("loaders", "expected"), [
    (loader(48), [3]),
    (LOADERS, [3, 1]),
    ([loader(48), DataLoader(Stream(), 16)], [3, float("inf")]),
    (CombinedLoader(LOADERS, "sequential"), [3, 1]),
    (CombinedLoader(LOADERS, "max_size"), [3]),
    (CombinedLoader(LOADERS, "min_size"), [1]),
])  # fmt: skip
def test_without_num_batches_kept_batches_would_not_be_spread_over_a_loader(loaders: Any, expected: Any) -> None:
    assert probed(compat.num_batches, loaders)[0] == expected


def test_without_is_last_batch_averaged_weights_would_be_gone_when_samples_are_measured() -> None:
    assert probed(compat.is_last_batch, loader(48)) == [False, False, True]


def test_without_is_redirected_a_step_under_ddp_would_be_taken_for_forward() -> None:
    module, seen = nn.Linear(2, 2), list[bool]()
    module.register_forward_pre_hook(lambda *_: seen.append(compat.is_redirected(module)))
    module.training_step = module.__call__
    _ForwardRedirection()(module, module, "training_step", torch.ones(1, 2))
    assert seen == [True, False]


def test_without_training_loaders_different_samples_could_not_be_counted() -> None:
    probe = Probe(compat.training_loaders)
    fitted([probe], Quiet(), LOADERS[0], max_epochs=1, num_sanity_val_steps=0)
    assert probe.seen[0] == LOADERS[:1]


def test_each_name_has_a_test() -> None:
    names = {name for name, value in vars(compat).items() if getattr(value, "__module__", "") == compat.__name__}
    tests = " ".join(name for name in globals() if name.startswith("test_without"))
    named = {name for name in names if name in tests}
    assert names - named == {"collect_rng_states", "set_rng_states"}  # "random states"
