"""Two gloo processes, started once, run every scenario; each test then reads what both of them saw."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.functional.reference import ReferenceSums
from tests.helpers import Linear, Quiet, Stream, brute_force, fitted, inputs, labelled, loader, logged
from tests.helpers import unlabelled_loader as unlabelled


def distributed(**kwargs: Any) -> Trainer:
    # A process that waits for the others in vain fails long before the test's own limit.
    return Trainer(strategy=DDPStrategy(timeout=timedelta(seconds=60)), devices=2, **kwargs)


def on_rank(rank: int | None, seed: int = 0) -> DataLoader:
    """Samples for one rank alone (or for both, with None), without a length."""
    stream, is_here = Stream(), rank in (None, int(os.environ["RANK"]))
    stream.samples = inputs(40 * is_here, seed)
    return DataLoader(stream, 16)


class Still(Linear):
    """Training does not move it, and its own collectives come between ours."""

    lr = 0.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_mine", self(batch[0] if isinstance(batch, list) else batch).mean(), sync_dist=True)


def risk_monitor() -> RiskMonitor:
    """One for which the still model has learned something."""
    return RiskMonitor(initial_weights={name: weight / 2 for name, weight in Still().state_dict().items()})


def ripple(x: Tensor, generator: torch.Generator) -> Tensor:
    """A change that depends on the sample alone, not on its batch or process."""
    return x + 0.1 * torch.sin(37 * x)


def rippled(kind: Any, val: Any, fits: bool = False, sampling: bool = True, **kwargs: Any) -> Any:
    """What is logged under such a change; in 64 bits, because batches of another size are rounded in another way."""
    monitors = [SensitivityMonitor(ripple, **kwargs), risk_monitor()]
    options = {"kind": kind, "max_epochs": 1, "precision": "64-true", "use_distributed_sampler": sampling}
    if not fits:
        return helpers.validated(monitors, Still(), val, **options)
    return logged(fitted(monitors, Still(), loader(48, 8), val, **options), "val")


EVEN: dict[str, dict[str, Any]] = {
    "draws, per output": {"val": loader(48, 8, seed=1), "num_draws": 2, "per_output": True},
    "a fit": {"val": loader(48, 8, seed=1), "fits": True},
    "a fit with several loaders": {"val": [loader(48, 8, seed=1), loader(32, 8, seed=2)], "at": "net", "fits": True},
}


def even(rank: int, folder: Path) -> Any:
    return {name: rippled(distributed, **kwargs) for name, kwargs in EVEN.items()}


def uneven(rank: int, folder: Path) -> Any:
    dropping = DistributedSampler(labelled(49), 2, rank, shuffle=False, drop_last=True)
    own = DataLoader(labelled(49), 8, sampler=range(rank, 49, 2))
    return [
        rippled(distributed, [loader(49, 8), loader(35, 8, seed=1)]),
        rippled(distributed, DataLoader(labelled(49), 8, sampler=dropping)),
        rippled(distributed, own, sampling=False),
    ]


def in_turn(num_samples: int, rank: int) -> DataLoader:
    """Training samples that are dealt out in turn, in all epochs; Lightning shuffles them."""
    return loader(num_samples, 8, sampler=DistributedSampler(range(num_samples), 2, rank, shuffle=False))


def risk(rank: int, folder: Path) -> Any:
    checkpoint = ModelCheckpoint(folder / "risk", monitor="val/risk_estimate/dataloader_idx_0")
    monitor, net, other = RiskMonitor(), Linear(), Linear()
    data = in_turn(47, rank), [unlabelled(48, 8, seed=1), on_rank(1, seed=2)]
    run = fitted([monitor, checkpoint], net, *data, kind=distributed, max_epochs=1, enable_checkpointing=True)
    fitted([], other, *data, kind=distributed, max_epochs=1)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    state = monitor.record
    return logged(run, "val"), net.state_dict(), (state.num_training, state.num_weights, state.calibrations)


class Looking(RiskMonitor):
    """It notes what the labels of its own process look like."""

    local: list[bool]

    def compute_values(self, trainer: Any, dataloader_idx: int) -> Any:
        self.local.append(ReferenceSums.of(self.kept.references[dataloader_idx]).looks_clean)
        return super().compute_values(trainer, dataloader_idx)


def noise_in_one_process(rank: int, folder: Path) -> Any:
    """Two of five labels are wrong in the second process."""
    x, y = labelled(1000, seed=rank).tensors
    y = y.where((torch.arange(1000) % 5 > 1) | (torch.tensor(rank) == 0), (y + 1 + torch.arange(1000) % 3) % 4)
    monitor, train, local = Looking(), DataLoader(TensorDataset(x, y), 100), list[bool]()
    monitor.local = local
    fitted_with_warnings([monitor], Linear(), train, unlabelled(), max_epochs=2)
    return {*local}, monitor.record.gap_weights, [result.gap_weight for result in monitor.record.history[0]]


def stopping(rank: int, folder: Path) -> Any:
    """A fit that is stopped by the estimate, saved, and resumed; every second sample of rank 1 has a label."""
    x, y = labelled(48, seed=1).tensors
    val = DataLoader(TensorDataset(x, y.where((torch.arange(48) % 4 < 2) & (torch.tensor(rank) == 1), -100)), 8)

    def run(max_epochs: int, **kwargs: Any) -> Any:
        monitor, stop = RiskMonitor(validation_labels=True), EarlyStopping("val/risk_estimate", patience=2)
        options = {"kind": distributed, "max_epochs": max_epochs, "num_sanity_val_steps": 0, **kwargs}
        # With batch norm, which DDP broadcasts; without dropout, so that a resumed fit draws no other numbers.
        fit = fitted([monitor, stop], Quiet(dropout=0.0), in_turn(48, rank), val, **options)
        return fit, [{k: v for k, v in epoch.items() if "risk" in k} for epoch in fit.epochs], monitor.record

    whole, epochs, state = run(6)
    first, *_ = run(2)
    first.save_checkpoint(folder / "two.ckpt")
    torch.distributed.barrier()
    _, resumed, _ = run(6, ckpt_path=folder / "two.ckpt")
    return epochs, resumed, whole.current_epoch, state.history[0]


def without_a_batch(rank: int, folder: Path) -> Any:
    loaders = [on_rank(1), on_rank(None, 1), on_rank(0, 2), on_rank(None, 3), on_rank(1, 4)]
    values = helpers.validated(SensitivityMonitor(), Linear(), loaders, kind=distributed)
    combined = CombinedLoader([on_rank(0), on_rank(0, 1)], "max_size_cycle")
    of_combined = helpers.validated(SensitivityMonitor(), Linear(), combined, kind=distributed)
    of_risk = [fitted_with_warnings([risk_monitor()], Linear(), loader(24, 8), on_rank(each)) for each in (0, 1)]
    return values, of_combined, of_risk


def fitted_with_warnings(*args: Any, **kwargs: Any) -> Any:
    """What was logged last, and what monitors have warned of."""
    options = {"kind": distributed, "use_distributed_sampler": False, "num_sanity_val_steps": 0, **kwargs}
    run, texts = helpers.fitted_and_said(*args, **options)
    return logged(run, "val"), texts


MARK = 0.5  # in a sample of the batch that fails
MARKED = [inputs(8), inputs(7).index_fill(0, torch.tensor([3]), MARK), inputs(8, 2)]


class Failing(Still):
    """Passes on one batch fail, in one process, and not in the first epoch."""

    validation_step = Linear.validation_step
    first_epoch = 0

    def forward(self, x: Tensor) -> Tensor:
        is_now = not self.training and self.current_epoch >= self.first_epoch
        if is_now and bool((x == MARK).any()) and int(os.environ["RANK"]) == 1:
            raise ValueError("out of luck")
        return super().forward(x)


def a_pass_that_fails(rank: int, folder: Path) -> Any:
    batches, results = DataLoader(MARKED, batch_size=None), []
    for first_epoch in (0, 1):
        net = Failing()
        net.first_epoch = first_epoch
        callbacks = [SensitivityMonitor(), risk_monitor(), EarlyStopping("val/risk_estimate", patience=9)]
        _, messages = fitted_with_warnings(callbacks, net, loader(48, 8), batches, max_epochs=3)
        results.append((net.trainer.epochs, messages))
    return results


def a_training_batch_that_fails(rank: int, folder: Path) -> Any:
    """In the second process, the first batch has four labels less, and the second one a label above the classes."""
    x, y = labelled(24).tensors
    if rank:
        y[:4], y[8:12] = -100, 4
    net = Linear()
    net.training_step = lambda batch, batch_idx: cross_entropy(net(batch[0]), batch[1].clamp(max=3))
    train, monitor = DataLoader(TensorDataset(x, y), 8), RiskMonitor()
    return *fitted_with_warnings([monitor], net, train, unlabelled(), max_epochs=1), monitor.record.num_training


def no_features_in_one_process(rank: int, folder: Path) -> Any:
    def features(batch: Any) -> Tensor:
        if rank == 1 and isinstance(batch, Tensor):
            raise ValueError("no features")
        return batch[0] if isinstance(batch, list) else batch

    monitor, net = RiskMonitor(features=features), Linear()
    net.training_step = lambda batch, batch_idx: cross_entropy(net(2 * batch[0]), batch[1])
    return fitted_with_warnings([monitor], net, loader(48, 8), unlabelled(48, 8), max_epochs=2)


SCENARIOS = (even, uneven, risk, stopping, without_a_batch, a_pass_that_fails, a_training_batch_that_fails)
SCENARIOS += (no_features_in_one_process, noise_in_one_process)


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for scenario in SCENARIOS:
        results[scenario.__name__] = scenario(rank, folder)
        torch.distributed.barrier()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    first, second = helpers.run_processes(run_all, tmp_path_factory.mktemp("distributed"))
    return {name: [first[name], second[name]] for name in first}


OWN_TO_A_PROCESS = (
    "risk_(variance|estimate|criterion|temperature|reference|label_noise)"  # twins, and the reference's samples
)


@pytest.mark.parametrize("name", EVEN)
def test_on_even_data_all_that_is_logged_is_what_one_process_logs(both: Any, name: str) -> None:
    first, second = (result[name] for result in both["even"])
    truth = rippled(Trainer, **EVEN[name])
    assert first == second and first.keys() == truth.keys()
    assert ("val/risk_claim/dataloader_idx_1" in first) == ("several" in name)
    for each in [each for each in truth if re.search(OWN_TO_A_PROCESS, each)]:
        del truth[each], first[each]
    assert first == pytest.approx(truth, rel=1e-5, abs=0)


def test_on_uneven_data_samples_count_as_often_as_they_are_dealt_out(both: Any) -> None:
    def dealt(num_samples: int, num_repeated: int = 0, seed: int = 0, num_kept: int | None = None) -> DataLoader:
        indices = [*range(num_samples), *range(num_repeated)][:num_kept]
        return DataLoader(Subset(labelled(num_samples, seed), indices), 8)

    first, second = both["uneven"]
    assert first == second
    # Lightning's sampler deals the first ones out again until all have as many, another may drop single samples, and
    # one of one's own measures each once.
    vals = [[dealt(49, 1), dealt(35, 1, seed=1)], dealt(49, num_kept=48), dealt(49)]
    for values, val in zip(first, vals, strict=True):
        truth = rippled(Trainer, val)
        truth |= {name: value for name, value in values.items() if "mine" in name}
        assert values == pytest.approx(truth, rel=1e-5, abs=0)


def test_the_risk_estimate_is_that_of_both_and_n_and_w_are_the_same(both: Any) -> None:
    (first, weights, sizes), other = both["risk"]
    assert (first, sizes) == other[::2] and sizes[:2] == (47, 52)
    assert 0 < first["val/risk_label_noise/dataloader_idx_0"] < 0.5
    net = Linear()
    net.load_state_dict(weights)
    with torch.no_grad():
        claim = 1 - net(inputs(48, seed=1)).double().softmax(1).square().sum(1).mean()
    assert first["val/risk_claim/dataloader_idx_0"] == pytest.approx(float(claim), rel=1e-6)
    assert {f"val/{name}/dataloader_idx_1" for name in RiskMonitor.names} <= first.keys()  # which one process lacked


def test_whether_noise_is_found_is_decided_over_both(both: Any) -> None:
    first, second = both["noise_in_one_process"]
    assert first == ({True}, {0: 1.0}, [1.0, 1.0]) and second == ({False}, *first[1:])


def test_stopping_and_resuming_are_the_same_in_both(both: Any) -> None:
    first, second = both["stopping"]
    assert first == second
    epochs, resumed, _, history = first
    assert resumed == [pytest.approx(epoch, rel=1e-5) for epoch in epochs[2:]]
    assert {epoch["val/risk_num_labels"] for epoch in epochs} == {12.0}
    assert [result.epoch for result in history] == list(range(len(epochs)))


def test_a_process_without_a_batch_has_the_others_value(both: Any) -> None:
    assert both["without_a_batch"][0][:2] == both["without_a_batch"][1][:2]
    values, of_combined, _ = both["without_a_batch"][0]
    for idx, ranks in enumerate([[1], [0, 1], [0], [0, 1], [1]]):
        batches = list(inputs(40, seed=idx).split(16))
        changes = torch.cat([brute_force(Linear(), batches, rank=rank, loader=idx) for rank in ranks])
        expected = changes.var(correction=0).item()
        assert values[f"val/output_sensitivity/dataloader_idx_{idx}"] == pytest.approx(expected, rel=1e-5)
    assert of_combined["val/output_sensitivity"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_a_batch_has_the_others_estimate_and_says_nothing(both: Any, rank: int) -> None:
    (values, messages), (other_values, other_messages) = (each[2][rank] for each in both["without_a_batch"])
    assert values == other_values and {f"val/{name}" for name in RiskMonitor.names} <= values.keys()
    assert values["val/risk_variance"] > 0 and "val/risk_reference" in values
    assert messages == other_messages == []


def test_a_pass_that_fails_in_one_process_costs_the_value_of_both(both: Any) -> None:
    first, second = both["a_pass_that_fails"]
    for (epochs, messages), (other_epochs, other_messages) in zip(first, second, strict=True):
        assert epochs == other_epochs and len(epochs) == 3
        assert not any("out of luck" in message for message in messages)
        failed = [message for message in other_messages if "out of luck" in message]
        assert failed and "This epoch has no value" in failed[0]
    # From the first epoch on, there is the worst score; from the second one on, the last value is left.
    assert [epoch["val/risk_estimate"] for epoch in first[0][0]] == [2.0] * 3
    assert "val/output_sensitivity" not in first[0][0][0]
    values = [epoch["val/risk_estimate"] for epoch in first[1][0]]
    assert values[0] == values[1] == values[2] < 2


def test_a_training_batch_that_fails_in_one_process_is_left_out_and_said_by_it(both: Any) -> None:
    (values, messages, *sizes), (other_values, other_messages, *other_sizes) = both["a_training_batch_that_fails"]
    assert values == other_values and {f"val/{name}" for name in RiskMonitor.names} <= values.keys()
    assert sizes == other_sizes == [22]  # of 24, since 36 of 40 that are kept have a label
    assert messages == [] and len(other_messages) == 1
    assert re.search("could not keep a training batch: .*Expected labels from 0 to 3", other_messages[0])


def test_a_process_without_features_does_without_a_reference_and_training_goes_on(both: Any) -> None:
    (values, messages), (other_values, other_messages) = both["no_features_in_one_process"]
    assert values == other_values and values["val/risk_estimate"] > 0
    assert any("ValueError: no features" in message for message in other_messages)
    assert sum("the step calls the model with other values of `x`" in message for message in messages) == 1
