"""The samples that monitors keep: which ones, for how long, and what is measured of them together."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks import samples as S
from lightning_sensitivity.callbacks import twins as twin_passes
from lightning_sensitivity.callbacks.samples import Group, JointPassError, KeptSamples, check_agreement
from lightning_sensitivity.callbacks.twins import TwinRunner
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.model import ModelCall, isolated, noise_generator
from lightning_sensitivity.model.twins import copy_weights, twin_weights
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    Linear,
    Quiet,
    Stream,
    brute_force,
    fitted,
    inputs,
    loader,
    logged,
    unlabelled_loader,
    validated,
)

MODEL = nn.Linear(NUM_FEATURES, NUM_CLASSES)
SENSITIVITY = "val_output_sensitivity"


def sensitivity(run: Any, batches: Any) -> float:
    """S by a plain loop over batches, in eval mode."""
    run.eval()
    return brute_force(run, batches).var(correction=0).item()


def on_validation_end(function: Callable[[Any, Any], Any]) -> tuple[Callback, list[Any]]:
    """What a function of the Trainer and the module returns at the end of each validation, the sanity check aside."""
    callback, seen = Callback(), list[Any]()

    def note(trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            seen.append(function(trainer, module))

    callback.on_validation_end = note  # type: ignore[method-assign]
    return callback, seen


def note_passes(model: nn.Module) -> list[int]:
    """How many samples each pass of a model gets."""
    sizes = list[int]()
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


# Which ones


def kept(num_batches: float, num_wanted: float, sizes: list[int], max_bytes: float = 2**30) -> KeptSamples:
    """The samples of a loader of batches of these sizes."""
    samples = KeptSamples(0, num_batches, num_wanted, max_bytes)
    for index, size in enumerate(sizes):
        if samples.wants(index):
            samples.add(ModelCall(MODEL, inputs(size, seed=index)), index, size)
    return samples


@pytest.mark.parametrize(("num_batches", "num_wanted", "sizes", "indices"), [
    (10, math.inf, [10] * 10, range(10)),
    (10, 40, [10] * 10, [0, 3, 5, 8]),  # 4 of 10 batches of 10
    (10, 31, [10] * 10, [0, 3, 5, 8]),  # a part of a batch is a batch
    (10, 1, [10] * 10, [0]),
    (10, 0.3, [10] * 10, [0]),  # of many processes
    (10, 1000, [10] * 10, range(10)),
    # the size of the first one decides, until there are enough
    (4, 40, [10, 30, 10, 10], [0, 1]),
    (10, 40, [1] + [15] * 9, [0, 1, 2, 3]),
    (10, 31, [30] + [1] * 9, [0, 5]),
    (4, math.inf, [0, 10, 0, 10], [1, 3]),  # none that are empty
    # of a stream the first ones
    (math.inf, 35, [10] * 10, [0, 1, 2, 3]),
    (math.inf, math.inf, [10] * 10, range(10)),
])  # fmt: skip
def test_whole_batches_are_kept_that_are_evenly_spaced_or_the_first_ones_of_a_stream(
    num_batches: float, num_wanted: float, sizes: list[int], indices: Any
) -> None:
    samples = kept(num_batches, num_wanted, sizes)
    assert samples.batch_indices == [*indices] and samples.size == sum(sizes[index] for index in indices)
    assert not samples.is_truncated


BYTES = 10 * NUM_FEATURES * 4  # of a batch of 10


@pytest.mark.parametrize(("num_batches", "max_bytes", "sizes", "indices"), [
    (10, 2.5 * BYTES, [10] * 10, [0, 5]),  # still evenly spaced
    (math.inf, 2.5 * BYTES, [10] * 10, [0, 1]),
    (10, 0.1 * BYTES, [10] * 10, [0]),  # never none
    (4, 5 * BYTES, [10, 10, 40, 10], [0, 1]),  # none from the first one on for which there is no room
])  # fmt: skip
def test_the_memory_is_bounded_in_bytes(
    num_batches: float, max_bytes: float, sizes: list[int], indices: list[int]
) -> None:
    samples = kept(num_batches, math.inf, sizes, max_bytes)
    assert samples.batch_indices == indices and samples.is_truncated


def test_samples_that_are_left_out_for_lack_of_memory_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S, "MAX_BYTES", 2 * 2.5 * BYTES)  # of two loaders
    monitor, val = SensitivityMonitor(), [unlabelled_loader(100, 10), unlabelled_loader(10, 10)]
    with pytest.warns(UserWarning) as caught:
        fitted(monitor, Linear(), val=val, max_epochs=3)
    (text,) = [str(each.message) for each in caught if "Monitor" in str(each.message)]
    assert text.startswith("`SensitivityMonitor` (val_*) keeps only 20 samples of a loader: ")
    assert [metric.estimate.num_samples for metric in monitor.metrics] == [20, 10]


@pytest.mark.parametrize(("options", "val", "num_samples"), [
    ({"num_samples": None}, unlabelled_loader(1000, 100), 1000),
    ({}, unlabelled_loader(1000, 100), 600),
    ({"num_samples": 40, "num_draws": 2}, unlabelled_loader(300, 5), 40),  # draws are not samples
    ({"num_samples": 40, "inputs": lambda x: x.expand(30, *x.shape), "outputs": lambda y: y[:, 0]},
        DataLoader(inputs(100), 5), 60),
    ({"num_samples": 40}, DataLoader(Stream(300), 5), 40),
    ({"num_samples": 40}, DataLoader([inputs(1), *inputs(300).split(15)], None), 46),
])  # fmt: skip
def test_num_samples_counts_samples(options: Any, val: Any, num_samples: int) -> None:
    monitor = SensitivityMonitor(**options)
    validated(monitor, Linear(), val)
    assert monitor.metrics[0].estimate.num_samples == num_samples


@pytest.mark.parametrize(
    ("num_samples", "chosen"), [(None, range(20)), (50, range(0, 20, 4)), (51, [0, 4, 7, 10, 14, 17])]
)
def test_chosen_batches_have_the_noise_of_their_place_in_the_loader(num_samples: Any, chosen: Any) -> None:
    model = Quiet()
    values = validated(SensitivityMonitor(num_samples=num_samples), model, unlabelled_loader(200, 10))
    batches = {index: x for index, x in enumerate(inputs(200).split(10)) if index in chosen}
    assert values[SENSITIVITY] == pytest.approx(sensitivity(model, batches), rel=1e-5)


# For how long


class Still(Linear):
    """Training does not move it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", self(batch).mean() * (batch_idx == 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Augmented(Dataset):
    """Samples with a random transform."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Tensor:
        return inputs(50)[index] + torch.rand(1)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize("data", [inputs(50), Augmented()])
def test_shuffled_samples_and_random_transforms_do_not_move_the_curve(data: Any) -> None:
    history = helpers.History()
    val = DataLoader(data, 10, shuffle=True)
    fitted([SensitivityMonitor(num_samples=20), history], Still(), val=val, max_epochs=3)
    assert len({epoch[SENSITIVITY] for epoch in history.epochs}) == 1
    assert len({epoch["val_mean"] for epoch in history.epochs}) > 1


def test_later_validations_touch_no_batch() -> None:
    taken, operations = list[int](), list[Any]()

    def first(batch: Any) -> Tensor:
        taken.append(len(batch[0]))
        return batch[0]

    start, stop = Callback(), Callback()
    watch = helpers.Watch(lambda function, *_: operations.append(function))
    start.on_validation_batch_start = lambda *_: watch.__enter__()  # type: ignore[method-assign]
    stop.on_validation_batch_start = lambda *_: watch.__exit__(None, None, None)  # type: ignore[method-assign]
    end, seen = on_validation_end(lambda *_: (len(taken), bool(operations), taken.clear(), operations.clear()))
    monitors = [SensitivityMonitor(num_samples=20, inputs=first), RiskMonitor(num_samples=20, inputs=first)]
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "limit_train_batches": 1}
    fitted([start, *monitors, stop, end], Quiet(), val=loader(100, 10), **options)
    assert seen[0][0] > 0 and seen[0][1]  # 2 batches in the first validation, and the first one of training
    assert [each[:2] for each in seen[1:]] == [(0, False)] * 2


class Writing(Quiet):
    """Its step writes to its batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch.mul_(3)


def test_a_step_that_writes_to_its_batch_does_not_change_what_is_kept() -> None:
    for batch_size in (16, 50):
        model, val, batches = Writing(), unlabelled_loader(50, batch_size), inputs(50).split(batch_size)
        run = fitted([SensitivityMonitor(), RiskMonitor()], model, val=val)
        assert logged(run)[SENSITIVITY] == pytest.approx(sensitivity(model, batches), rel=1e-5)


PASSES = {"sensitivity": [SensitivityMonitor()], "risk": [RiskMonitor()],
    "both": [SensitivityMonitor(), RiskMonitor()], "risk first": [RiskMonitor(), SensitivityMonitor()],
    "two draws": [SensitivityMonitor(num_draws=2), SensitivityMonitor(seed=1, prefix="b_"), RiskMonitor()],
    "other samples": [SensitivityMonitor(num_samples=50), RiskMonitor()],
    "other outputs": [SensitivityMonitor(outputs=lambda y: y), RiskMonitor()]}  # fmt: skip
NUM_JOINT = {
    "sensitivity": 2,
    "risk": 1,
    "both": 2,
    "risk first": 2,
    "two draws": 4,
    "other samples": 3,
    "other outputs": 3,
}


@pytest.mark.parametrize("name", PASSES)
def test_monitors_that_call_the_model_alike_share_samples_and_one_clean_pass(name: str) -> None:
    model = Linear()
    sizes = note_passes(model)
    end, seen = on_validation_end(
        lambda run, _: (sizes.count(50), [each.samples for each in PASSES[name]], sizes.clear())
    )
    fitted([*PASSES[name], end], model, loader(20), unlabelled_loader(50), max_epochs=3)
    for num_joint, samples, _ in seen:
        assert num_joint == NUM_JOINT[name]
        assert all(each is samples[0] for each in samples) == (not name.startswith("other"))


@pytest.mark.parametrize("raises", [False, True])
def test_samples_are_freed_at_the_end_of_a_run_and_after_an_error(raises: bool) -> None:
    class Failing(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if raises and self.current_epoch == 1:
                raise RuntimeError("an error of the user")
            return super().training_step(batch, batch_idx)

    monitors = [SensitivityMonitor(), RiskMonitor()]
    kept = lambda *_: weakref.ref(monitors[0].samples[0].groups[0].call.args[0])  # noqa: E731
    end, seen = on_validation_end(kept)
    try:
        fitted([*monitors, end], Failing())
    except RuntimeError:
        assert raises
    gc.collect()
    assert len(seen) == 2 - raises and all(reference() is None for reference in seen)
    assert all(monitor.samples == [] for monitor in monitors)


@pytest.mark.parametrize("numbers", [(2, 1, 1), (1, 2, 2), (3, 1, 2), (2, 2, 1)])
def test_loaders_that_come_and_go_never_end_training(numbers: tuple[int, ...]) -> None:
    class Reloaded(Classifier):
        def val_dataloader(self) -> Any:
            return [loader(20, seed=seed) for seed in range(numbers[self.current_epoch])]

    end, seen = on_validation_end(lambda run, _: logged(run, SENSITIVITY).keys())
    callbacks = [SensitivityMonitor(), RiskMonitor(), end]
    run = helpers.trainer(callbacks=callbacks, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(Reloaded(), loader())
    assert run.current_epoch == 3 and len(seen) == 3
    suffixes = [f"/dataloader_idx_{index}" for index in range(numbers[0])] if numbers[0] > 1 else [""]
    names = {f"{SENSITIVITY}{error}{suffix}" for suffix in suffixes for error in ("", "_stderr")}
    assert all(each == names for each in seen)  # of the loaders whose samples are kept


# What is measured together


@pytest.mark.parametrize(("max_samples", "joint"), [(1000, [50]), (30, [30, 20]), (29, [20, 20, 10]), (1, [10] * 5)])
def test_batches_are_joined_up_to_a_number_of_elements(
    max_samples: int, joint: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Quiet()  # its largest tensors have 16 elements for a sample
    monkeypatch.setattr(S, "MAX_ELEMENTS", 16 * max_samples)
    sizes = note_passes(model)
    values = validated(SensitivityMonitor(), model, unlabelled_loader(50, 10))
    one, alone = [10], [10, 10] * sum(size // 10 for size in joint if size > 10)  # a look at tensors; comparisons
    assert sorted(sizes) == sorted([*one, *joint, *joint, *alone])
    assert values[SENSITIVITY] == pytest.approx(sensitivity(model, inputs(50).split(10)), rel=1e-5)


def test_batches_of_different_layouts_are_not_joined() -> None:
    samples = KeptSamples(0, math.inf, math.inf, math.inf)
    model = type("Mean", (nn.Module,), {"forward": lambda self, x, mask=None: x.double().flatten(1)[:, :2]})()
    x = torch.rand(4, 3)
    for index, batch in enumerate([x, x, x.double(), torch.rand(4, 3, 3), x[:2], x, [[x, x]]]):
        call = ModelCall(model, batch, inputs=lambda b: b)
        samples.add(call, index, call.size)
    with isolated(model) as run:
        samples.complete(model, run, torch.device("cpu"))
    assert [group.batch_indices for group in samples.groups] == [[0, 1], [2], [3], [4, 5], [6]]
    assert [group.sizes for group in samples.groups][3] == [2, 4]


class Gated(Linear):
    """Its samples begin to interact in epoch 1, when a gate opens that is 0 before."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net(x)
        return hidden - self.gate * hidden.mean(0, keepdim=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.gate - 1).square()

    def on_train_epoch_start(self) -> None:
        self.gate.requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2)


class Capacity(Linear):
    """A mixture of two experts, each of which takes no more samples than a batch has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(NUM_FEATURES, 2)
        self.experts = nn.ModuleList(nn.Linear(NUM_FEATURES, NUM_CLASSES) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, outputs = self.router(x).argmax(1), torch.zeros(len(x), NUM_CLASSES)
        for place, expert in enumerate(self.experts):
            indices = (chosen == place).nonzero()[: math.ceil(0.6 * len(x)), 0]
            outputs = outputs.index_add(0, indices, expert(x[indices]))
        return outputs


class Compared(Linear):
    """Its outputs compare the samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs * (3 * outputs).softmax(0)


class Threshold(Linear):
    """Its outputs are larger in a pass that is larger than those of the sanity check."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 if len(x) <= 4 else 2)


class Small(Linear):
    """It takes no more samples than a batch has."""

    num_refused = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2 and not self.training:
            self.num_refused += 1  # which a pass of ours puts back
            raise ValueError("too many samples")
        return self.net(x)


@pytest.mark.parametrize("kind", [Gated, Capacity, Compared, Threshold, Small])
@pytest.mark.parametrize("with_risk", [False, True])
def test_samples_that_influence_each_other_are_measured_batch_by_batch_from_then_on(kind: Any, with_risk: bool) -> None:
    model, monitor = kind(), SensitivityMonitor()
    batches = inputs(40, seed=1).split(2)
    end, seen = on_validation_end(
        lambda run, module: (
            [len(group.sizes) for samples in monitor.samples for group in samples.groups],
            logged(run)[SENSITIVITY],
            sensitivity(copy.deepcopy(module), batches),
        )
    )
    monitors = [monitor, *[RiskMonitor()] * with_risk]
    fitted([*monitors, end], model, loader(20, 2), unlabelled_loader(40, 2, seed=1), max_epochs=3)
    for epoch, (sizes, value, truth) in enumerate(seen):
        assert value == pytest.approx(truth, rel=1e-5)
        assert sizes == ([20] if kind is Gated and epoch == 0 else [1] * 20)


@pytest.mark.parametrize("place", range(6))
def test_a_single_batch_whose_samples_influence_each_other_is_found_in_the_first_validation(place: int) -> None:
    class Rare(Linear):
        """Samples with a first feature above 1 get their mean, which is 0 in most batches."""

        def forward(self, x: Tensor) -> Tensor:
            is_rare = x[:, :1] > 1.5
            outputs = self.net(x)
            return outputs + is_rare * (is_rare * outputs).mean(0)

    x, model = inputs(60).clone(), Rare()
    x[10 * place : 10 * place + 5, 0] += 3
    values = validated(SensitivityMonitor(), model, DataLoader(x, 10))
    assert values[SENSITIVITY] == pytest.approx(sensitivity(model, x.split(10)), rel=1e-5)


def test_a_joint_pass_that_fails_is_not_tried_again() -> None:
    model = Small()
    sizes = note_passes(model)
    end, seen = on_validation_end(lambda *_: (max(sizes), sizes.clear()))
    fitted([SensitivityMonitor(), RiskMonitor(), end], model, loader(20, 2), unlabelled_loader(40, 2), max_epochs=4)
    assert [largest for largest, _ in seen] == [40, 20, 2, 2]  # in the second validation of 20 training samples


PAIRS = torch.tensor([[0, 1], [1, 0]])


class Pairs(Quiet):
    """Two samples are neighbours, as two rows of pairs say, which look like samples themselves."""

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs.index_add(0, pairs[1], outputs[pairs[0]])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch, PAIRS).square().mean()


def test_graphs_that_look_like_samples_are_measured_one_by_one() -> None:
    model, loaders = Pairs(), [unlabelled_loader(size, 2) for size in (4, 20)]
    run = fitted(SensitivityMonitor(inputs=lambda x: (x, PAIRS)), model, *loaders)
    changes = brute_force(lambda x: model.eval()(x, PAIRS), inputs(20).split(2))
    assert logged(run)[SENSITIVITY] == pytest.approx(changes.var(correction=0).item(), rel=1e-5)


def test_all_batches_are_compared_in_the_first_validation_and_then_another_one_in_each() -> None:
    samples = kept(math.inf, math.inf, [2] * 5)
    with isolated(MODEL) as run:
        samples.complete(MODEL, run, torch.device("cpu"))
    assert samples.checks() == {0: [0, 1, 2, 3, 4]}
    assert sorted(samples.checks()[0][0] for _ in range(5)) == [0, 1, 2, 3, 4]
    samples.separate()
    assert samples.checks() == {}


def test_outputs_that_differ_by_more_than_rounding_are_told() -> None:
    x = torch.randn(8, 3)
    for joint, alone in ((x + 1e-6, x), (x.bfloat16() * 1.01, x.bfloat16()), (x * math.nan, x * math.nan)):
        check_agreement(joint, alone, alone.dtype)
    for joint, alone in ((x + 0.1, x), (x, x[:4]), (x, x[:, :2]), (x.double() + 1e-4, x.double())):
        with pytest.raises(JointPassError):
            check_agreement(joint, alone, alone.dtype)


# Twins


def run_twins(size: int, num_samples: int, model: nn.Module, can_split: bool = True, x: Any = None) -> Any:
    """Outputs of twins, what they are compared with, outputs of the model, and the weights before training: zeros."""
    initial = {name: torch.zeros_like(weight) for name, weight in copy_weights(model.state_dict()).items()}
    call = ModelCall(model, inputs(size) if x is None else x)
    groups = [Group(call, [3], [size]), Group(call, [4], [num_samples - size])]
    samples = KeptSamples(0, math.inf, math.inf, math.inf)
    samples.groups, samples.can_regroup = groups, can_split
    with isolated(model) as run:
        outputs = run(call)
        parts = list(TwinRunner(model, initial, run, samples, (0, 0, 0)).run(groups[0], call, outputs))
    assert [index for part in parts for index in range(size)[part.rows]] == [*range(len(outputs))]
    twins = [torch.cat(draw) for draw in zip(*(part.twins for part in parts), strict=True)]
    return twins, torch.cat([part.compared_with for part in parts]), outputs, initial


@pytest.mark.parametrize(("size", "num_samples", "can_split", "num_parts", "num_rounds"), [
    (16, 16, True, 1, 8),  # too few samples for parts
    (256, 256, True, 8, 1),
    (200, 800, True, 2, 1),  # eighths of all samples
    (64, 128, True, 2, 2),
    (256, 256, False, 1, 8),  # outputs for a sample depend on the others
])  # fmt: skip
@pytest.mark.parametrize("max_joined", [0, 2**16])  # part by part, or at once
def test_equal_parts_of_the_samples_go_through_twins_of_their_own(
    size: int,
    num_samples: int,
    can_split: bool,
    num_parts: int,
    num_rounds: int,
    max_joined: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(twin_passes, "_MAX_JOINED", max_joined)
    sizes = note_passes(model := copy.deepcopy(MODEL))
    twins, compared_with, outputs, initial = run_twins(size, num_samples, model, can_split)
    compared = num_parts > 1  # one part is compared with the joint pass
    assert sorted(sizes[1:]) == [size // num_parts] * (num_parts * num_rounds + compared)
    assert torch.equal(compared_with, outputs) and len(twins) == num_rounds
    for place, rows in enumerate(torch.arange(size).chunk(num_parts)):
        for draw, twin in enumerate(twins):
            generator = noise_generator(0, 0, 0, 3, place * num_rounds + draw)
            weights = twin_weights(model, initial, generator, TWIN_STRENGTH)
            expected = torch.func.functional_call(model, weights, inputs(size)[rows]).detach()
            torch.testing.assert_close(twin[rows], expected)


def test_a_batch_that_is_a_graph_is_not_split() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return adjacency[: len(x), : len(x)] @ self.net(x)

    graph = (inputs(128), torch.ones(130, 130))
    twins, _, outputs, _ = run_twins(128, 128, Graph(), x=graph)
    assert [len(twin) for twin in twins] == [len(outputs)] * 8


def test_parts_that_influence_each_other_are_told() -> None:
    with pytest.raises(JointPassError):
        run_twins(128, 128, Compared())


def test_with_batch_norm_a_twin_is_compared_with_the_model_under_the_statistics_of_the_same_part() -> None:
    model = Classifier(dropout=0.0)
    twins, compared_with, *_ = run_twins(128, 128, model)
    assert len(twins) == 2  # for each of four parts
    expected = torch.cat([copy.deepcopy(model).train()(part) for part in inputs(128).chunk(4)])
    torch.testing.assert_close(compared_with, expected)


def test_one_sample_has_no_statistics_of_its_own() -> None:
    model = Classifier(dropout=0.0)
    _, compared_with, outputs, _ = run_twins(1, 1, model)
    assert torch.equal(compared_with, outputs)
