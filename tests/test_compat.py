"""Each test says what would break without a function or name of ``compat``: where to look when an upgrade fails."""

import random
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskEstimate, compat
from lightning_sensitivity.callbacks.lazy import LazyValue

from .helpers import Classifier, Quiet, Stream, fitted, loader, trainer

# torch


def test_without_batch_norm_twins_would_keep_the_running_statistics_of_another_network() -> None:
    norms = nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)
    assert all(isinstance(norm, compat.BatchNorm) for norm in norms)
    assert not isinstance(nn.GroupNorm(1, 2), compat.BatchNorm)


def test_without_convolutions_a_twin_would_draw_its_noise_along_the_outputs() -> None:
    plain, transposed = nn.Conv1d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)
    assert isinstance(plain, compat.Convolution) and isinstance(transposed, compat.TransposedConvolution)
    assert not isinstance(plain, compat.TransposedConvolution)


def test_without_random_states_a_pass_would_move_the_random_streams_of_training() -> None:
    states = compat.collect_rng_states(include_cuda=False)
    drawn = []
    for _ in range(2):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        compat.set_rng_states(states)
    assert drawn[0] == drawn[1]


def test_without_sync_buffers_processes_would_measure_different_buffers(monkeypatch: Any) -> None:
    class Parallel(DistributedDataParallel):
        def __init__(self, broadcasts: bool) -> None:
            nn.Module.__init__(self)
            self.require_forward_param_sync, self.broadcast_buffers = True, broadcasts
            self.modules_buffers = [torch.zeros(1)]

    synced: list[nn.Module] = []
    monkeypatch.setattr(DistributedDataParallel, "_sync_buffers", lambda self: synced.append(self))
    models = [Parallel(broadcasts=True), Parallel(broadcasts=False), nn.BatchNorm1d(2)]
    for model in models:
        compat.sync_buffers(model)
    assert synced == models[:1]


def test_without_is_compiled_hooks_of_ours_would_make_compiled_code_compile_again() -> None:
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(module, backend="eager"))
    assert compat.is_compiled(from_compiled(torch.compile(LightningModule(), backend="eager")))
    module.compile(backend="eager")
    assert compat.is_compiled(module)


def test_without_original_module_a_compiled_forward_would_have_no_named_arguments() -> None:
    module = nn.Linear(2, 2)
    assert compat.original_module(module) is compat.original_module(torch.compile(module, backend="eager")) is module


@torch.no_grad()
def test_without_clear_autocast_cache_a_twin_would_give_the_outputs_of_the_model_in_16_bits() -> None:
    module, x = nn.Linear(2, 1), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        module.weight.data = module.weight.data + 1
        compat.clear_autocast_cache()
        assert not torch.equal(module(x), before)


# torchmetrics


def test_without_forget_computed_a_merged_metric_would_give_its_old_value() -> None:
    metric = RiskEstimate()
    metric.update(torch.zeros(2, 3), torch.zeros(2, 3))
    before = metric.compute()["risk_claim"]
    metric.holdout_sums = 2 * metric.holdout_sums.clone().index_fill(0, torch.tensor([0]), 0.5)
    assert metric.compute()["risk_claim"] == before
    compat.forget_computed(metric)
    assert metric.compute()["risk_claim"] != before


def test_without_mark_updated_a_process_without_a_batch_would_warn() -> None:
    metric = RiskEstimate()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
    compat.mark_updated(metric)
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


def probed(read: Any, loaders: Any, **kwargs: Any) -> list[Any]:
    probe = Probe(read)
    trainer(callbacks=[probe], **kwargs).validate(Quiet(), loaders, verbose=False)
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
def test_without_num_batches_measured_batches_would_not_be_spread_over_a_loader(loaders: Any, expected: Any) -> None:
    assert probed(compat.num_batches, loaders)[0] == expected


def test_without_is_last_batch_batches_that_wait_would_never_be_measured() -> None:
    assert probed(compat.is_last_batch, loader(48)) == [False, False, True]


def test_without_training_loaders_samples_that_repeat_would_be_counted_again() -> None:
    probe = Probe(compat.training_loaders)
    fitted([probe], Quiet(), LOADERS[0], max_epochs=1, num_sanity_val_steps=0)
    (loaders, mode) = probe.seen[0]
    assert (loaders, mode) == (LOADERS[:1], "max_size_cycle")


def test_without_validation_loaders_bad_input_would_be_found_after_training_only() -> None:
    probe = Probe(compat.validation_loaders)
    probe.on_train_start = lambda trainer, module: probe.seen.append(compat.validation_loaders(trainer))
    fitted([probe], Quiet(), loader(16), LOADERS, max_epochs=1)
    assert all(loaders == LOADERS for loaders in probe.seen)
    assert compat.validation_loaders(trainer()) == []


class Logs(Callback):
    """Logs a value of ours under the name that the test gives, and keeps the names of others."""

    def __init__(self) -> None:
        self.others: set[str] = set()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        compat.log_metric(pl_module, "val_ours", LazyValue(lambda: torch.tensor(0.5)), prog_bar=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log("val_of_a_callback", 1.0)
        self.others = set(compat.names_logged_by_others(trainer))


def test_without_log_metric_a_value_could_not_be_read_at_the_same_time_in_all_processes() -> None:
    run = fitted([Logs()], Classifier(), max_epochs=1)
    assert run.callback_metrics["val_ours"] == run.progress_bar_metrics["val_ours"] == 0.5


def test_without_names_logged_by_others_a_metric_of_the_user_would_be_overwritten() -> None:
    logs = Logs()
    fitted([logs], Classifier(), max_epochs=1)
    assert logs.others == {"train_loss", "val_loss", "val_of_a_callback"}
