"""What a validation is made of: which batches are measured, which of them together, and by how many twins."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lightning_sensitivity.callbacks import batches as S
from lightning_sensitivity.callbacks.batches import Batch, BatchSelection, CleanOutputs, Group, Queue, are_independent
from lightning_sensitivity.callbacks.failures import Failures
from lightning_sensitivity.callbacks.run import RunFacts
from lightning_sensitivity.callbacks.twin_passes import TwinPasses
from lightning_sensitivity.callbacks.watch import loss_mismatch
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.model import GaussianNoise, ModelCall, isolated, noise_generator
from lightning_sensitivity.model.forward import join_calls
from lightning_sensitivity.model.noise import noisy_outputs
from lightning_sensitivity.model.twins import copy_weights, twin
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, inputs

MODEL = nn.Linear(NUM_FEATURES, NUM_CLASSES)


def batch(size: int = 4, index: int = 0, num_elements: float = 100.0, **kwargs: Any) -> Batch:
    call = ModelCall(kwargs.pop("model", MODEL), kwargs.pop("x", inputs(size, seed=index)))
    return Batch(call, index, kwargs.pop("loader", 0), size, num_elements, **kwargs)


# Which batches


def measured(selection: BatchSelection, sizes: list[int]) -> tuple[list[int], int]:
    """The batches that are measured, and after which one the selection is complete."""
    chosen, complete_at = [], len(sizes)
    selection.start(sizes[0])
    for index, size in enumerate(sizes):
        if selection.includes(index):
            selection.count(batch(size, index))
            chosen.append(index)
        if selection.is_complete(index):
            complete_at = min(complete_at, index)
    return chosen, complete_at


@pytest.mark.parametrize(("num_batches", "budget", "chosen", "complete_at"), [
    (10, math.inf, list(range(10)), 9),
    (10, 40, [0, 3, 5, 8], 8),  # 4 of 10 batches of 10, evenly spaced
    (10, 31, [0, 3, 5, 8], 8),  # measured whole: a part of a batch is a batch
    (10, 1, [0], 0),
    (10, 1000, list(range(10)), 9),
    (math.inf, 35, [0, 1, 2, 3], 3),  # of unknown length: the first ones
    (math.inf, math.inf, list(range(10)), 10),
])  # fmt: skip
def test_a_budget_selects_batches_that_are_evenly_spaced(
    num_batches: float, budget: float, chosen: list[int], complete_at: int
) -> None:
    assert measured(BatchSelection(num_batches, budget), [10] * 10) == (chosen, complete_at)


def test_a_budget_that_is_spent_early_ends_the_selection_but_never_before_its_first_batch() -> None:
    assert measured(BatchSelection(4, 40), [10, 30, 10, 10]) == ([0, 1], 1)
    assert measured(BatchSelection(4, 0.3), [10] * 4) == ([0], 0)


# Which of them together


def queue(can_wait: bool = True) -> tuple[Queue, list[list[int]]]:
    groups: list[list[int]] = []
    return Queue(lambda batches: groups.append([each.batch_idx for each in batches]), can_wait), groups


def test_batches_wait_until_the_last_one_has_come() -> None:
    waiting, groups = queue()
    for index in range(3):
        assert groups == []
        waiting.add(batch(4 - index, index), is_last=index == 2)
    assert groups == [[0, 1, 2]]
    waiting.flush()
    assert groups == [[0, 1, 2]]


def test_batches_wait_until_a_joint_pass_would_be_too_large() -> None:
    waiting, groups = queue()
    for index in range(7):
        waiting.add(batch(4, index, S._MAX_ELEMENTS / 3), is_last=False)
    assert groups == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("other", [
    {"x": torch.rand(4, NUM_FEATURES + 1)},
    {"x": torch.rand(4, NUM_FEATURES).double()},
    {"loader": 1},
    {"targets": torch.zeros(4)},
])  # fmt: skip
def test_batches_of_different_layouts_are_not_joined(other: dict[str, Any]) -> None:
    waiting, groups = queue()
    for index, kwargs in enumerate(({}, {}, other, other, {})):
        waiting.add(batch(4, index, **kwargs), is_last=False)
    assert groups == [[0, 1], [2, 3]]


def test_large_batches_and_those_that_cannot_be_joined_do_not_wait() -> None:
    large, nested = {"num_elements": S._MAX_ELEMENTS}, {"x": [[torch.rand(4, NUM_FEATURES)]]}
    for kwargs, can_wait in ((large, True), (nested, True), ({}, False)):
        waiting, groups = queue(can_wait)
        for index in range(2):
            waiting.add(batch(4, index, **kwargs), is_last=False)
        assert groups == [[0], [1]]


def test_a_batch_that_waits_is_a_copy_since_the_step_may_write_to_it() -> None:
    kept: list[Batch] = []
    waiting = Queue(kept.extend)
    tensors = [inputs(4), inputs(4)]
    for index, x in enumerate(tensors):
        waiting.add(batch(4, index, x=x), is_last=index == 1)
    assert kept[0].call.args[0] is not tensors[0] and torch.equal(kept[0].call.args[0], tensors[0])
    assert kept[1].call.args[0] is tensors[1]  # it is measured before the step comes


# Joint passes


@torch.no_grad()
def test_each_batch_of_a_joint_pass_gets_the_noise_that_it_gets_by_itself() -> None:
    group = Group([batch(size, index) for index, size in enumerate((4, 1, 3))])
    assert (group.size, group.key) == (8, (0, 0, 1, 2))
    keys = [(0, 0, 0, index) for index in range(3)]
    for at in (None, MODEL):
        with isolated(MODEL) as run:
            joint = torch.stack(list(noisy_outputs(run, group.call, GaussianNoise(0.1), keys, 2, at)))
            for single, key, part in zip(group.batches, keys, joint.split([4, 1, 3], 1), strict=True):
                expected = torch.stack(list(noisy_outputs(run, single.call, GaussianNoise(0.1), [key], 2, at)))
                torch.testing.assert_close(part, expected)


def test_joint_calls_hold_all_arguments_and_give_back_parts_of_them() -> None:
    model = type("Model", (nn.Module,), {"forward": lambda self, x, scale, mask: scale * x * mask})()
    parts = [{"x": torch.rand(size, 3), "scale": 2.0, "mask": torch.ones(size, 1)} for size in (2, 3)]
    calls = [ModelCall(model, part) for part in parts]
    joint = join_calls(calls)
    assert joint.sizes == [2, 3] and joint.layout() == calls[0].layout()
    assert torch.equal(joint(), torch.cat([call() for call in calls]))
    selected = joint.select(slice(2, 5))
    assert selected.sizes == [3] and torch.equal(selected(), calls[1]())


@torch.no_grad()
def test_a_pass_with_noise_that_cannot_be_split_into_batches_is_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.cat([x, x]))[: len(x)]

    model = Doubled()
    group = Group([batch(4, index, model=model) for index in range(2)])
    with isolated(model) as run, pytest.raises(ValueError, match="Expected 8 samples in dimension 0"):
        list(noisy_outputs(run, group.call, GaussianNoise(0.1), [(0, 0, 0, 0), (0, 0, 0, 1)], 1, model.net))


def test_outputs_that_depend_on_the_other_samples_of_a_batch_are_told() -> None:
    x = torch.randn(8, 3)
    assert are_independent(x[:4] + 1e-6, x[:4], 4)
    assert are_independent(x.bfloat16()[:4] * 1.01, x.bfloat16()[:4], 4)
    for joint, single in ((x[:4] + 0.1, x[:4]), (x[:4], x[:3]), (x[:4], x[:4, :2])):
        assert not are_independent(joint, single, 4)
    assert not are_independent(x, x, 4)  # more outputs than samples
    assert are_independent(x[:4] * math.nan, x[:4] * math.nan, 4)


# Clean outputs


class Counted:
    """Runs a function, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Any, *args: Any) -> Any:
        self.count += 1
        return function(*args)


@pytest.mark.parametrize(("num_users", "num_passes"), [(1, 4), (2, 2)])
def test_monitors_that_call_the_model_in_the_same_way_share_its_clean_pass(num_users: int, num_passes: int) -> None:
    clean, run = CleanOutputs(None, None, num_users), Counted()
    for group in (Group([batch(4, 0)]), Group([batch(4, 1)])):
        first, second = clean.get(run, group), clean.get(run, group)
        assert torch.equal(first, MODEL(group.call.args[0])) and torch.equal(first, second)
    assert run.count == num_passes and clean._outputs is None  # nothing stays in memory


def test_a_monitor_that_measures_other_batches_makes_its_own_clean_pass() -> None:
    clean, run = CleanOutputs(None, None, 2), Counted()
    for size, index in ((4, 0), (3, 1), (4, 0)):
        assert len(clean.get(run, Group([batch(size, index)]))) == size
    assert run.count == 3


# Twins


def twin_passes(
    size: int, num_total: int, model: nn.Module, can_join: bool | None = None, x: Any = None
) -> tuple[Any, Any, Any]:
    initial = {name: torch.zeros_like(weight) for name, weight in copy_weights(model.state_dict()).items()}
    facts = RunFacts(Failures("RiskMonitor", "val_"), can_join=can_join)
    has_norm = isinstance(model, Classifier)
    call = ModelCall(model, inputs(size) if x is None else x)
    with isolated(model) as run:
        outputs = run(call)
        found = list(TwinPasses(model, initial, has_norm, facts).passes(run, call, outputs, (0, 0, 0, 0), num_total))
    return found, outputs, initial


@pytest.mark.parametrize(("size", "num_total", "can_join", "num_parts", "num_twins"), [
    (16, 16, None, 1, 8),  # too few samples for parts
    (256, 256, None, 8, 1),
    (200, 800, None, 2, 1),  # eighths of all samples
    (64, 128, None, 2, 2),
    (256, 256, False, 1, 8),  # outputs for a sample depend on the others
])  # fmt: skip
def test_parts_of_a_batch_share_eight_twins_or_more(
    size: int, num_total: int, can_join: bool | None, num_parts: int, num_twins: int
) -> None:
    passes, outputs, initial = twin_passes(size, num_total, MODEL, can_join)
    assert len(passes) == num_parts * num_twins
    weights = torch.zeros(size)
    for index, each in enumerate(passes):
        weights[each.samples] += each.weight
        assert torch.equal(each.reference, outputs[each.samples])
        generator = noise_generator(0, 0, 0, 0, -index - 1)
        with torch.no_grad(), twin(MODEL, initial, generator, TWIN_STRENGTH):  # each by a twin of its own
            torch.testing.assert_close(each.outputs, MODEL(inputs(size))[each.samples])
    torch.testing.assert_close(weights, torch.ones(size))


def test_a_batch_that_is_a_graph_is_not_split() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return adjacency @ self.net(x)

    passes, outputs, _ = twin_passes(128, 128, Graph(), x=(inputs(128), torch.ones(128, 128)))
    assert [len(each.outputs) for each in passes] == [len(outputs)] * 8


def test_with_batch_norm_a_twin_is_compared_with_the_model_under_the_statistics_of_the_same_part() -> None:
    model = Classifier(dropout=0.0)
    passes, *_ = twin_passes(128, 128, model)
    assert len(passes) == 8  # two twins for each of four parts
    for each in passes:
        expected = copy.deepcopy(model).train()(inputs(128)[each.samples])
        torch.testing.assert_close(each.reference, expected)


def test_batch_norm_on_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="use a validation batch size of 2 or more"):
        twin_passes(1, 10, Classifier())
    assert len(twin_passes(2, 2, Classifier())[0]) == 8


# What the training step minimizes

LOGITS = 3 * torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
TARGETS = LOGITS.roll(1, 0).argmax(1)
COSINES = normalize(LOGITS)
SILENT: dict[str, tuple[Any, ...]] = {
    "plain cross-entropy": (cross_entropy(LOGITS, TARGETS),),
    "class weights": (cross_entropy(LOGITS, TARGETS, torch.arange(1.0, 11)),),
    "label smoothing": (cross_entropy(LOGITS, TARGETS, label_smoothing=0.2),),
    "a sum over the batch": (cross_entropy(LOGITS, TARGETS, reduction="sum"),),
    "accumulated": (cross_entropy(LOGITS, TARGETS) / 4, 4),
    "a sum that is accumulated": (cross_entropy(LOGITS, TARGETS, reduction="sum") / 4, 4),
    "not finite": (torch.tensor(math.nan),),
    "no scalar": (cross_entropy(LOGITS, TARGETS, reduction="none"),),
}


@pytest.mark.parametrize("loss", SILENT)
def test_a_loss_that_can_be_the_cross_entropy_of_the_outputs_is_not_doubted(loss: str) -> None:
    assert loss_mismatch(LOGITS, TARGETS, *SILENT[loss]) is None


def test_labels_that_are_ignored_or_of_another_task_are_not_compared() -> None:
    large = torch.tensor(1e6)
    assert loss_mismatch(LOGITS, torch.full((32,), -100), large) is None
    assert loss_mismatch(LOGITS[:, 0], TARGETS.float(), large) is None
    assert loss_mismatch(LOGITS, TARGETS[:16], large) is None
    half = TARGETS.where(torch.arange(32) < 16, -100)
    assert loss_mismatch(LOGITS, half, cross_entropy(LOGITS, half)) is None


@pytest.mark.parametrize("num_accumulated", [1, 4])
def test_a_loss_of_cosines_that_the_step_scales_is_explained(num_accumulated: int) -> None:
    loss = cross_entropy(64 * COSINES, TARGETS) / num_accumulated
    message = loss_mismatch(COSINES, TARGETS, loss, num_accumulated)
    assert message is not None
    assert f"{float(loss):.3g}, cannot be the cross-entropy of the measured outputs" in message
    assert "select its logits with `outputs=`" in message
