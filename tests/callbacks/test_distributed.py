"""Two gloo processes, started once, run every scenario; each test then reads what both of them saw."""

import os
import re
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Linear, Stream, brute_force, fitted, inputs, labelled, loader, logged
from tests.helpers import unlabelled_loader as unlabelled


def model(kind: Any = Linear) -> Any:
    seed_everything(0, verbose=False)
    return kind()


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

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_mine", self(batch[0] if isinstance(batch, list) else batch).mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def risk_monitor() -> RiskMonitor:
    """One for which the still model has learned something."""
    return RiskMonitor(initial_weights={name: weight / 2 for name, weight in model(Still).state_dict().items()})


class Ripples:
    """A change that depends on the sample alone, not on its batch or process, and is another one in each draw."""

    def __init__(self, num_draws: int = 1) -> None:
        self.num_draws, self.num_seen = num_draws, Counter[bytes]()

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        batch = x.numpy().tobytes()
        self.num_seen[batch] += 1
        return x + 0.1 * torch.sin((37 + self.num_seen[batch] % self.num_draws) * x)


def rippled(kind: Any, val: Any, fits: bool = False, sampling: bool = True, num_draws: int = 1, **kwargs: Any) -> Any:
    """What is logged under such a change; in 64 bits, because batches of another size are rounded in another way."""
    monitors = [SensitivityMonitor(Ripples(num_draws), num_draws=num_draws, **kwargs), risk_monitor()]
    options = {"kind": kind, "max_epochs": 1, "precision": "64-true", "use_distributed_sampler": sampling}
    if not fits:
        return helpers.validated(monitors, model(Still), val, **options)
    return logged(fitted(monitors, model(Still), loader(48, 8), val, **options), "val_")  # all 48 are kept


EVEN: dict[str, dict[str, Any]] = {
    "draws": {"val": loader(48, 8, seed=1), "num_draws": 2},
    "per output": {"val": loader(48, 8, seed=1), "per_output": True},
    "a fit": {"val": [loader(48, 8, seed=1), loader(32, 8, seed=2)], "at": "net", "fits": True},
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


def risk(rank: int, folder: Path) -> Any:
    checkpoint = ModelCheckpoint(folder / "risk", monitor="val_risk_estimate/dataloader_idx_0")
    monitor, net, other, counts = RiskMonitor(num_training_samples=16), model(), model(), list[int]()
    net.on_train_end = lambda: counts.append(monitor.num_training)
    data = loader(47, 8), [unlabelled(48, 8, seed=1), on_rank(1, seed=2)]
    run = fitted([monitor, checkpoint], net, *data, kind=distributed, max_epochs=1, enable_checkpointing=True)
    fitted([], other, *data, kind=distributed, max_epochs=1)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    return logged(run, "val_"), net.state_dict(), counts


def without_a_batch(rank: int, folder: Path) -> Any:
    loaders = [on_rank(1), on_rank(None, 1), on_rank(0, 2), on_rank(None, 3), on_rank(1, 4)]
    values = helpers.validated(SensitivityMonitor(), model(), loaders, kind=distributed)
    combined = CombinedLoader([on_rank(0), on_rank(0, 1)], "max_size_cycle")
    return values, helpers.validated(SensitivityMonitor(), model(), combined, kind=distributed)


def fitted_with_warnings(*args: Any, **kwargs: Any) -> Any:
    """What was logged last, and what RiskMonitor has warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fitted(*args, kind=distributed, use_distributed_sampler=False, num_sanity_val_steps=0, **kwargs)
    return logged(run, "val_"), [str(each.message) for each in caught if str(each.message).startswith("`RiskMonitor`")]


MARK = 0.5  # in a sample of the batch that fails
MARKED = [inputs(8), inputs(7).index_fill(0, torch.tensor([3]), MARK), inputs(8, 2)]


class Failing(Still):
    """Passes on one batch fail, in one process."""

    validation_step = Linear.validation_step

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == MARK).any()) and int(os.environ["RANK"]) == 1:
            raise ValueError("out of luck")
        return super().forward(x)


def a_pass_that_fails(rank: int, folder: Path) -> Any:
    batches = DataLoader(MARKED, batch_size=None)
    return fitted_with_warnings([SensitivityMonitor(), risk_monitor()], model(Failing), loader(48, 8), batches)


class Ignoring(Linear):
    """With 255 for "unlabelled", as in many segmentation sets."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], ignore_index=255)


def a_training_batch_that_fails(rank: int, folder: Path) -> Any:
    def fit(index: int, *more: Any) -> Any:
        x, y = labelled(24).tensors
        y[8 * index : 8 * index + 4] += 255 * rank
        train = DataLoader(TensorDataset(x, y.clamp(max=255)), 8)
        return fitted_with_warnings([RiskMonitor(), *more], Ignoring(), train, unlabelled(), max_epochs=1)

    with pytest.raises(MisconfigurationException, match="cannot estimate the risk"):
        fit(0, EarlyStopping("val_risk_estimate"))
    return [fit(0), fit(1)]


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for scenario in (even, uneven, risk, without_a_batch, a_pass_that_fails, a_training_batch_that_fails):
        results[scenario.__name__] = scenario(rank, folder)
        torch.distributed.barrier()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    first, second = helpers.run_processes(run_all, tmp_path_factory.mktemp("distributed"))
    return {name: [first[name], second[name]] for name in first}


@pytest.mark.parametrize("name", EVEN)
def test_on_even_data_all_that_is_logged_is_what_one_process_logs(both: Any, name: str) -> None:
    first, second = (result[name] for result in both["even"])
    truth = rippled(Trainer, **EVEN[name])
    assert first == second and first.keys() == truth.keys()
    assert ("val_risk_claim/dataloader_idx_1" in first) == (name == "a fit")
    for each in [each for each in truth if re.search("risk_(variance|estimate)", each)]:
        del truth[each], first[each]  # of other twins in each process
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


def test_the_risk_estimate_is_that_of_both_and_training_samples_are_counted(both: Any) -> None:
    (first, weights, counts), (second, *_) = both["risk"]
    assert first == second and counts == [47]
    net = model()
    net.load_state_dict(weights)
    with torch.no_grad():
        claim = 1 - net(inputs(48, seed=1)).double().softmax(1).square().sum(1).mean()
    assert first["val_risk_claim/dataloader_idx_0"] == pytest.approx(float(claim), rel=1e-6)
    assert {f"val_{name}/dataloader_idx_1" for name in RiskMonitor.names} <= first.keys()  # which one process lacked


def test_a_process_without_a_batch_has_the_others_value(both: Any) -> None:
    assert both["without_a_batch"][0] == both["without_a_batch"][1]
    values, of_combined = both["without_a_batch"][0]
    for idx, ranks in enumerate([[1], [0, 1], [0], [0, 1], [1]]):
        batches = list(inputs(40, seed=idx).split(16))
        changes = torch.cat([brute_force(model(), batches, rank=rank, loader=idx) for rank in ranks])
        assert values[f"val_output_sensitivity/dataloader_idx_{idx}"] == pytest.approx(changes.var(correction=0).item(), rel=1e-5)
    assert of_combined["val_output_sensitivity"] > 0


def test_a_pass_that_fails_in_one_process_costs_its_batch_in_both(both: Any) -> None:
    (first, messages), (second, other_messages) = both["a_pass_that_fails"]
    assert first == second and {"val_output_sensitivity", "val_risk_estimate"} <= first.keys()
    batches = dict(enumerate(MARKED))
    changes = [brute_force(model(Still), batches, rank=0)]
    changes.append(brute_force(model(Still), {0: batches[0], 2: batches[2]}, rank=1))
    assert first["val_output_sensitivity"] == pytest.approx(torch.cat(changes).var(correction=0).item(), rel=1e-5)
    assert messages == [] and len(other_messages) == 1 and "ValueError: out of luck" in other_messages[0]


def test_a_training_batch_that_fails_in_one_process_is_said_by_it(both: Any) -> None:
    no_estimate = ["cannot estimate the risk: another process cannot", "cannot estimate the risk: Expected labels"]
    left_out = [None, "skipped a training batch: .*Expected labels from 0 to 3"]
    for index, patterns in enumerate((no_estimate, left_out)):  # by the batch that fails
        for results, pattern in zip(both["a_training_batch_that_fails"], patterns, strict=True):
            values, messages = results[index]
            assert len(messages) == (pattern is not None) and all(re.search(pattern, message) for message in messages)
            assert ("val_risk_estimate" in values) == (patterns is left_out)
