"""Groups of samples in a fit: they are read of any batch, left out whole, and counted."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, compare_models
from tests.helpers import Quiet, fitted, fitted_and_said, module, quick_risk

NUM_PERSONS = 60


def persons(first: int, is_random: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Four samples of each of 60 persons, who have a label each, which inputs tell, or say nothing of."""
    g = torch.Generator().manual_seed(first)
    centres, which = torch.rand(NUM_PERSONS, 12, generator=g), torch.arange(4 * NUM_PERSONS) // 4
    labels = torch.randint(4, (NUM_PERSONS,), generator=g) if is_random else centres[:, :4].argmax(1)
    return centres[which] + 0.01 * torch.randn(len(which), 12, generator=g), labels[which], first + which


def loader(first: int, is_random: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*persons(first, is_random)), 24)


TRAIN, VAL = loader(0), loader(1000)


def names(batch: Any) -> list[str]:
    return [f"person {each}" for each in batch[2].tolist()]


def second(batch: Any) -> Tensor:
    return batch[1]


def grouped(groups: Any = names, **options: Any) -> RiskMonitor:
    return quick_risk(groups=groups, targets=second, **options)


WAYS: dict[str, Any] = {
    "numbers": lambda batch: batch[2],
    "strings": names,
    "an array": lambda batch: batch[2].numpy().astype(float),
}


def test_with_groups_nothing_is_expected_of_labels_that_tell_nothing_of_others() -> None:
    single, whole = (
        RiskMonitor(prefix=prefix, groups=each, targets=second) for prefix, each in (("a/", None), ("b/", names))
    )
    fitted_and_said([single, whole], Quiet(), loader(0, True), VAL)
    assert single.reference.accuracy_ > 0.8 and whole.reference.accuracy_ < 0.6
    assert single.summary["skill"] > 0.5 and whole.summary["skill"] < 0.1 and len(whole.reference.groups_) == 240


def test_any_names_of_groups_say_the_same() -> None:
    histories = []
    for name, groups in WAYS.items():
        fitted(risk := grouped(groups, prefix=f"{name}/"), Quiet(), TRAIN, VAL)
        histories.append(risk.history)
    assert [row["reference_score"] for row in histories[0]] == [row["reference_score"] for row in histories[2]]
    assert len(histories[0]) == 2 and len({row["reference_score"] for row in histories[1]}) == 1


ONE_KNOWN = DataLoader(
    TensorDataset(*(torch.cat([a[:1], b]) for a, b in zip(persons(0), persons(1000), strict=True))), 24
)


@pytest.mark.parametrize(("val", "number"), [
    (VAL, None), (TRAIN, "240 of 240"), (loader(45), "60 of 240"), (ONE_KNOWN, "1 of 241")
])  # fmt: skip
def test_groups_that_training_has_seen_are_said_once(val: Any, number: str | None) -> None:
    monitor = grouped()
    texts = [text for text in fitted_and_said(monitor, Quiet(), TRAIN, val)[1] if "are of groups" in text]
    assert len(texts) == (number is not None) and all(f"finds that {number} samples" in text for text in texts)


def split_at_random() -> tuple[DataLoader, DataLoader]:
    """Samples of the same persons in both parts."""
    samples, order = persons(0), torch.randperm(240, generator=torch.Generator().manual_seed(0))
    known, new = (DataLoader(TensorDataset(*(each[part] for each in samples)), 24) for part in order.split(120))
    return known, new


def rounded(first: int) -> DataLoader:
    x, *others = persons(first)
    return DataLoader(TensorDataset(x[:, :2].round().repeat(1, 6), *others), 24)


def single(first: int) -> TensorDataset:
    """One sample of each person."""
    parts = zip(*(persons(first + 100 * each) for each in range(4)), strict=True)
    return TensorDataset(*(torch.cat([each[::4] for each in part]) for part in parts))


REPEATING = RandomSampler(single(0), replacement=True, generator=torch.Generator().manual_seed(0))
LIKELY: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {  # training, validation, options, and is it said?
    "persons": (TRAIN, VAL, {}, True),
    "persons, and groups=": (TRAIN, VAL, {"groups": names}, False),
    "persons, of whom both parts know": (*split_at_random(), {}, False),
    "features=": (TRAIN, VAL, {"features": lambda batch: batch[0]}, False),
    "one sample a person": (DataLoader(single(0), 24), DataLoader(single(1000), 24), {}, False),
    "a sampler that repeats": (DataLoader(single(0), 24, sampler=REPEATING), DataLoader(single(1000), 24), {}, False),
    "categories": (rounded(0), rounded(1000), {}, False),
}


@pytest.mark.parametrize("name", LIKELY)
def test_groups_that_are_likely_are_said_once(name: str) -> None:
    train, val, options, is_said = LIKELY[name]
    monitor = quick_risk(**{"targets": second, **options})
    texts = fitted_and_said(monitor, Quiet(), train, val, max_epochs=3)[1]
    assert sum("are farther from training samples" in text and "set `groups=`" in text for text in texts) == is_said


BAD: dict[str, tuple[Any, str]] = {
    "no function": ("patient", "`groups` should be a function"),
    "another number": (lambda batch: batch[2][:5], "`groups` should return a group for each of 24 samples, got 5"),
    "nan": (lambda batch: batch[2] * float("nan"), "`groups` failed on .* some are None or nan"),
    "not there": (lambda batch: batch["patient"], "`groups` failed on "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_are_no_groups_is_refused_before_the_first_step(name: str) -> None:
    groups, match = BAD[name]
    with pytest.raises(MisconfigurationException, match=match):
        fitted(grouped(groups), Quiet(), TRAIN, VAL)


def test_of_a_single_group_there_is_no_reference_which_is_said() -> None:
    monitor = grouped(lambda batch: torch.zeros(len(batch[0])))
    _, texts = fitted_and_said(monitor, Quiet(), TRAIN, VAL)
    assert any("two or more groups, but all are of one" in text for text in texts) and monitor.reference is None


def test_validation_labels_of_one_group_count_as_one() -> None:
    """The mean of what labels and the reference say has a weight of 60 persons, not of 240 samples."""
    monitors = {
        prefix: grouped(groups, prefix=prefix, validation_labels=labelled)
        for prefix, labelled, groups in (("reference/", False, names), ("groups/", True, names))
    }
    fitted([*monitors.values()], model := Quiet(), TRAIN, VAL)
    x, y, _ = persons(1000)
    accuracy = float((model.eval()(x).argmax(1) == y).double().mean())
    of_reference, both = (monitor.history[-1]["expected_accuracy"] for monitor in monitors.values())
    expected = (1000 * of_reference + NUM_PERSONS * accuracy) / (1000 + NUM_PERSONS)
    assert both == pytest.approx(expected, abs=1e-5) and monitors["groups/"].history[-1]["num_labels"] == 240


def test_a_comparison_counts_groups() -> None:
    right, wrong = module(lambda self, x: 9 * x[:, :4] - 3), module(lambda self, x: 9 * x[:, 4:8] - 3)
    models = {"right": right, "wrong": wrong}
    options = {"training": [persons(0)], "targets": second}
    with pytest.warns(UserWarning, match="samples of `dataloader` are farther from training samples"):
        plain = compare_models(models, [persons(1000)], **options)
    grouped = compare_models(models, [persons(1000)], groups=names, **options)
    assert grouped[1].difference_stderr > 1.3 * plain[1].difference_stderr
    x, *others = persons(0)
    with pytest.warns(UserWarning, match="240 of 240 samples of `dataloader` are of groups that training has seen"):
        compare_models(models, [(x + 1e-3, *others)], groups=names, **options)
