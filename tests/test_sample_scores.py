import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lightning_sensitivity.functional import output_sensitivity
from lightning_sensitivity.sample_scores import COLUMNS, SampleScores


def scores(
    clean: Tensor, noisy: list[Tensor], targets: Tensor | None = None, task: str = "multiclass"
) -> dict[str, Tensor]:
    batch = SampleScores(clean, task)
    batch.add_inputs(torch.full((len(clean), 3), 2.0), 0.5)
    for draw in noisy:
        batch.add_noisy(draw)
    if targets is not None:
        batch.add_targets(targets)
    return dict(zip(COLUMNS, batch.table.T, strict=True))


def outputs(*shape: int, draws: int = 2, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(shape, generator=generator)
    return clean, [clean + torch.randn(shape, generator=generator) for _ in range(draws)]


@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(2, 6), num_outputs=st.integers(1, 4), draws=st.integers(1, 3), seed=st.integers(0, 1000))
def test_sensitivity_follows_from_the_sums(num_samples: int, num_outputs: int, draws: int, seed: int) -> None:
    clean, noisy = outputs(num_samples, num_outputs, 2, draws=draws, seed=seed)
    columns = scores(clean, noisy)
    mean = columns["sum"].sum() / columns["changes"].sum()
    variance = columns["squares"].sum() / columns["changes"].sum() - mean.square()
    torch.testing.assert_close(variance, output_sensitivity(clean, noisy))


def test_classes_by_hand() -> None:
    clean = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    noisy = [torch.tensor([[math.log(3), 0.0], [math.log(4), 0.0]]), clean]
    columns = scores(clean, noisy, torch.tensor([1, 1]))
    entropies = [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), -0.2 * math.log(0.2) - 0.8 * math.log(0.8)]
    expected = {
        "changes": [2, 2],
        "sum": [0, 0],
        "power": [8, 8],
        "distance": [(0.5**2 + 0.5**2) / 2, 0],
        "flips": [0.5, 0],
        "entropy": entropies,
        "confidence": [0.75, 0.8],
        "loss": [-math.log(0.75), -math.log(0.2)],
        "error": [0, 1],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            columns[name], torch.tensor(values, dtype=torch.float64), msg=name, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("task", "shape", "targets", "loss"),
    [
        ("multiclass", (5, 3), torch.tensor([0, 2, 1, 1, 0]), cross_entropy),
        ("multiclass", (2, 3, 4), torch.arange(8).reshape(2, 4) % 3, cross_entropy),
        ("multiclass", (3, 2), torch.tensor([[0.5, 0.5], [0.1, 0.9], [1.0, 0.0]]), cross_entropy),
        ("binary", (4,), torch.tensor([0.0, 1.0, 1.0, 0.0]), binary_cross_entropy_with_logits),
        ("binary", (4, 1), torch.tensor([[0.0], [1.0], [1.0], [0.0]]), binary_cross_entropy_with_logits),
        ("multilabel", (2, 3), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), binary_cross_entropy_with_logits),
        ("regression", (4, 2), torch.arange(8.0).reshape(4, 2), mse_loss),
    ],
)
def test_the_loss_is_that_of_torch(task: str, shape: tuple[int, ...], targets: Tensor, loss: object) -> None:
    clean, noisy = outputs(*shape)
    columns = scores(clean, noisy, targets, task)
    torch.testing.assert_close(
        columns["loss"].mean(),
        loss(clean.double(), targets.to(clean.double()) if targets.is_floating_point() else targets),
    )  # type: ignore[operator]
    decided = {"entropy", "confidence", "flips", "error"}
    for name in decided:
        assert bool(columns[name].isfinite().all()) == (task != "regression"), name


def test_decisions_of_several_labels_count_each() -> None:
    clean = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    columns = scores(clean, [torch.tensor([[-1.0, -1.0, 2.0, -2.0]])], torch.tensor([[1, 1, 0, 0]]), "multilabel")
    assert columns["flips"].item() == 0.25
    assert columns["error"].item() == 0.5


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_moved_images_give_the_labels(task: str) -> None:
    clean, moved = outputs(6, 1 if task == "binary" else 3)
    batch = SampleScores(clean, task)
    for draw in moved:
        batch.add_shifted(draw)
    columns = dict(zip(COLUMNS, batch.table.T, strict=True))
    p, labels = (
        clean.double(),
        [draw.double().softmax(1) if task == "multiclass" else draw.double().sigmoid() for draw in moved],
    )
    loss = cross_entropy if task == "multiclass" else binary_cross_entropy_with_logits
    expected = sum(loss(p, q) for q in labels) / 2
    torch.testing.assert_close(columns["shift_loss"].mean(), expected)
    if task == "multiclass":
        errors = [1 - q[torch.arange(6), p.argmax(1)] for q in labels]
    else:
        errors = [((p > 0) * (1 - q) + (p <= 0) * q).mean(1) for q in labels]
    torch.testing.assert_close(columns["shift_error"], (errors[0] + errors[1]) / 2)


def test_maps_and_regressions_do_not_compare_with_moved_ones() -> None:
    for shape, task in (((4, 3, 2), "multiclass"), ((4, 2), "regression")):
        clean, (moved, _) = outputs(*shape)
        batch = SampleScores(clean, task)
        batch.add_shifted(moved)
        assert batch.table[:, COLUMNS.index("shift_loss")].isnan().all()


def test_ignored_labels_do_not_count() -> None:
    clean, noisy = outputs(2, 3, 2)
    targets = torch.tensor([[0, -100], [-100, -100]])
    columns = scores(clean, noisy, targets)
    torch.testing.assert_close(columns["loss"][0], cross_entropy(clean[:1].double(), targets[:1]))
    assert columns["loss"][1].isnan() and columns["error"][1].isnan()


def test_a_single_output_decides_nothing() -> None:
    clean, noisy = outputs(3, 1)
    columns = scores(clean, noisy)
    assert columns["entropy"].isnan().all() and columns["flips"].isnan().all()
    assert columns["squares"].isfinite().all()


def test_huge_logits_lose_nothing() -> None:
    clean = torch.tensor([[1e5, 0.0], [0.0, 1e5]])
    columns = scores(clean, [clean], torch.tensor([1, 1]))
    assert columns["loss"].tolist() == [1e5, 0]
    assert columns["entropy"].tolist() == [0, 0]


def test_log_probabilities_are_those_of_classes_without_positions() -> None:
    clean, _ = outputs(4, 3)
    torch.testing.assert_close(SampleScores(clean, "multiclass").log_probabilities, clean.log_softmax(1))
    assert SampleScores(clean[:, :, None].expand(4, 3, 2), "multiclass").log_probabilities.shape == (4, 0)
    assert SampleScores(clean, "regression").log_probabilities.shape == (4, 0)


def test_16_bit_outputs_are_scored_in_the_widest_type() -> None:
    clean, noisy = outputs(4, 3)
    half, half_noisy = clean.bfloat16(), [draw.bfloat16() for draw in noisy]
    expected = scores(half.double(), [draw.double() for draw in half_noisy])
    for name, column in scores(half, half_noisy).items():
        assert column.dtype == torch.float64
        torch.testing.assert_close(column, expected[name], equal_nan=True, msg=name)
