import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional.consensus import as_good_as_first, jury_classes, sharpened


def rows(*first: float) -> Tensor:
    """Probabilities of two classes, by those of class 0."""
    p = torch.tensor(first)
    return torch.stack([p, 1 - p], -1)


@pytest.mark.parametrize(("of_models", "wanted"), [
    pytest.param([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]], 0.875, id="as many as agree"),
    pytest.param([[0.9, 0.9, 0.1, 0.1]], 0.995, id="never certain"),
    pytest.param([[0.1, 0.1, 0.9, 0.9]], 0.6, id="never below chance"),
])  # fmt: skip
def test_a_reference_is_as_certain_as_models_agree_with_it(of_models: list[list[float]], wanted: float) -> None:
    found = sharpened(rows(0.7, 0.7, 0.3, 0.3), torch.stack([rows(*each) for each in of_models]))
    assert found[:, 0].tolist() == pytest.approx([wanted, wanted, 1 - wanted, 1 - wanted], abs=1e-4)


def test_one_power_is_taken_of_all_samples() -> None:
    reference = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    powers = sharpened(reference, torch.eye(3)[None, [0, 0]]).log().diff(dim=1) / reference.log().diff(dim=1)
    assert torch.allclose(powers, powers[0, 0].expand(2, 2), rtol=1e-5)


@pytest.mark.parametrize(("share_known", "expected"), [
    pytest.param(None, [0, 0, 0, 0], id="of the models alone"),
    pytest.param(1.0, [0, 1, 0, 0], id="with a reference that counts half as much as both models"),
    pytest.param(5.0, [0, 1, 0, 0], id="which knows no more than all training samples"),
    pytest.param(0.3, [0, 0, 0, 0], id="which knows few of them"),
])  # fmt: skip
def test_a_jury_adds_up_raw_probabilities(share_known: float | None, expected: list[int]) -> None:
    # The models agree with the reference on three of four classes: it is sharpened to 0.75, and votes 0.25 and 0.75.
    models = torch.stack([rows(0.9, 0.6, 0.9, 0.9), rows(0.9, 0.6, 0.9, 0.9)])
    reference = None if share_known is None else rows(0.9, 0.1, 0.9, 0.9)
    assert jury_classes(models, reference, share_known or 1.0).tolist() == expected


def test_one_that_is_sure_outvotes_two_that_are_not() -> None:
    assert jury_classes(torch.stack([rows(0.45), rows(0.45), rows(0.95)])).tolist() == [0]


def test_models_are_as_good_as_the_first_if_samples_cannot_tell_them_apart() -> None:
    losses = torch.zeros(4, 100)
    losses[0, :10], losses[1, 5:15], losses[2, :14], losses[3, :30] = 1, 1, 1, 1
    assert as_good_as_first(losses).tolist() == [True, True, False, False]  # the third is never better than the first
    few = losses[:, 9:17]
    assert as_good_as_first(few[[0, 2]]).tolist() == [True, False]
