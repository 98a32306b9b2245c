"""The samples that monitors keep: which ones, and for how long."""

import gc
import math
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.reading import kept
from lightning_sensitivity.reading.kept import KeptObservations
from tests.helpers import NUM_FEATURES, Linear, Quiet, fitted, inputs, loader, quick_risk, unlabelled_loader

SENSITIVITY = "val/output_sensitivity"


def sensitivity(run: Any, batches: Any) -> Any:
    """S by a plain loop over batches, in eval mode."""
    run.eval()
    return pytest.approx(helpers.brute_force(run, batches).var(correction=0).item(), rel=1e-5)


# Which ones


def batches_of(sizes: list[int], is_stream: bool) -> tuple[list[Tensor], DataLoader]:
    batches = [inputs(size, seed=index) for index, size in enumerate(sizes)]
    stream = helpers.Stream()
    stream.samples = batches  # type: ignore[assignment]
    return batches, DataLoader(stream if is_stream else batches, None)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("num_samples", "sizes", "chosen"), [
    (None, [10] * 10, range(10)),
    (40, [10] * 10, [0, 2, 5, 7]),
    (31, [30] + [1] * 9, [0, 5]),
    (33, [2, 31], [0, 1]),  # never fewer than are wanted, if there are more
    (None, [0, 10, 0, 10], [1, 3]),  # none that are empty
])  # fmt: skip
def test_whole_batches_are_kept_that_are_evenly_spaced_also_of_a_stream(
    num_samples: int | None, sizes: list[int], is_stream: bool, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "NUM_BATCHES", 1)  # else a share of twenty is kept
    model, (batches, val) = Quiet(), batches_of(sizes, is_stream)
    values = helpers.validated(SensitivityMonitor(num_samples=num_samples), model, val)
    # They have the noise of their place in the loader.
    assert values[SENSITIVITY] == sensitivity(model, {index: batches[index] for index in chosen})


class Recurrent(Quiet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else x.mean(0))


@pytest.mark.parametrize(("num_steps", "num_samples"), [(100, 128), (50, 30), (50, 1)])
def test_steps_of_time_that_come_first_are_refused_or_after_the_first_step_left_out(
    num_steps: int, num_samples: int
) -> None:
    batches = [inputs(num_steps * num_samples, seed).view(num_steps, num_samples, NUM_FEATURES) for seed in range(3)]
    val, match = DataLoader(batches, None), "rows, and there are .* outputs"  # type: ignore[arg-type]
    helpers.refused(SensitivityMonitor(num_samples=25), Recurrent(), None, val, match=match)
    options: dict[str, Any] = {"val": val, "num_sanity_val_steps": 0}
    run, texts = helpers.fitted_and_said(SensitivityMonitor(), Recurrent(), **options)
    assert SENSITIVITY not in helpers.logged(run) and len(texts) == 1 and re.search(match, texts[0])


@pytest.mark.parametrize(("max_batches", "sizes"), [
    (2.5, [10] * 10),
    (0.5, [10] * 10),  # a batch does not fit
    (5, [10, 10, 40, 10]),
    (1, [2, 2, 2, 2, 40]),  # a large one comes late
])  # fmt: skip
def test_the_memory_is_bounded_in_bytes(max_batches: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    max_bytes = 2 * max_batches * 10 * NUM_FEATURES * 4  # for two loaders
    monkeypatch.setattr("lightning_sensitivity.callbacks.monitor.MAX_BYTES", max_bytes)
    model, (batches, val) = Linear(), batches_of(sizes, is_stream=False)
    monitor, noting, chosen = SensitivityMonitor(num_samples=None), Callback(), dict[int, Tensor | None]()
    noting.on_validation_end = lambda *_: chosen.update(  # type: ignore[method-assign]
        {batch.index: batch.indices for batch in monitor.run.samples[0].batches}
    )
    vals = [val, unlabelled_loader(2, 2)]
    run, texts = helpers.fitted_and_said([monitor, noting], model, val=vals, max_epochs=3, num_sanity_val_steps=0)
    known = {index: batches[index] if rows is None else batches[index][rows] for index, rows in chosen.items()}
    number = sum(map(len, known.values()))
    assert len(texts) == 1 and f"keeps only {number} samples of a loader: " in texts[0]
    assert 0.4 * 10 * max_batches <= number <= 10 * max_batches
    found = helpers.logged(run)[f"{SENSITIVITY}/dataloader_idx_0"]
    assert found == sensitivity(model, known)


# For how long


class Still(Linear):
    """Training does not move it."""

    lr = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", self(batch).mean() * (batch_idx == 0))


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize(("shuffles", "transform"), [
    (True, torch.stack), (False, lambda batch: torch.stack(batch) + torch.rand(len(batch), 1))
])  # fmt: skip
def test_shuffled_samples_and_random_transforms_do_not_move_the_curve(shuffles: bool, transform: Any) -> None:
    val = DataLoader(inputs(50), 10, shuffle=shuffles, collate_fn=transform)
    run = fitted(SensitivityMonitor(num_samples=20), Still(), val=val, max_epochs=3)
    assert len({epoch[SENSITIVITY] for epoch in run.epochs}) == 1
    assert len({epoch["val_mean"] for epoch in run.epochs}) > 1


def test_a_step_that_writes_to_its_batch_does_not_change_what_is_kept() -> None:
    for batch_size in (16, 50):
        model, val, batches = Quiet(), unlabelled_loader(50, batch_size, seed=1), inputs(50, seed=1).split(batch_size)
        model.validation_step = lambda batch, batch_idx: batch.mul_(3).sum()
        run = fitted([SensitivityMonitor(), quick_risk()], model, val=val)
        assert helpers.logged(run)[SENSITIVITY] == sensitivity(model, batches)


def num_kept() -> int:
    """How many batches of 17 samples there are in memory."""
    gc.collect()
    return sum(type(each) is Tensor and each.shape == (17, NUM_FEATURES) for each in gc.get_objects())


@pytest.mark.parametrize("raises", [False, True])
def test_samples_are_freed_at_the_end_of_a_run_and_after_an_error(raises: bool) -> None:
    class Failing(Quiet):
        def on_train_epoch_end(self) -> None:
            seen.append(num_kept())
            assert not any(
                type(each) is KeptObservations for each in gc.get_objects()
            )  # the reference was made of them
            if raises and self.current_epoch == 1:
                raise RuntimeError("an error of the user")

    gc.freeze()  # what was there before is not looked at, which would take seconds
    monitors, seen = [SensitivityMonitor(), RiskMonitor()], list[int]()
    try:
        options = {"limit_train_batches": 1, "limit_val_batches": 1}
        fitted(monitors, Failing(), loader(50, 17), unlabelled_loader(50, 17, seed=1), **options)
    except RuntimeError:
        assert raises
    assert min(seen) >= 2 and num_kept() == 0


TWO, ONE = [20, 20], [20]


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`", "ignore:.*(no value|no first value)")
@pytest.mark.parametrize("sizes", [(TWO, ONE, ONE), (ONE, TWO, TWO), (3 * ONE, ONE, TWO), ([20, 0], TWO, TWO)])
def test_loaders_that_come_and_go_never_end_training(sizes: tuple[list[int], ...]) -> None:
    class Reloaded(Quiet):
        def val_dataloader(self) -> Any:
            return [loader(size, seed=1 + place) for place, size in enumerate(sizes[self.current_epoch])]

    run = helpers.trainer([SensitivityMonitor(), quick_risk()], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(Reloaded(), loader())
    suffixes = [f"/dataloader_idx_{index}" for index in range(len(sizes[0]))] if len(sizes[0]) > 1 else [""]
    for epoch in run.epochs:
        found = {name for name in epoch if SENSITIVITY in name or "expected_loss" in name}
        assert found >= {f"{name}{suffix}" for suffix in suffixes for name in (SENSITIVITY, "val/expected_loss")}
        assert epoch[SENSITIVITY + suffixes[0]] > 0 and all(map(math.isfinite, epoch.values()))


# Training samples


@pytest.mark.parametrize(("limit", "step"), [(700, 8), (50_000, 16)])  # in the first validation, if no more fit
def test_the_reference_is_made_of_a_whole_epoch_or_of_as_many_samples_as_fit(
    limit: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sensitivity.reference.kinds._MOST_ROWS", limit)
    options = {"max_epochs": 2, "val_check_interval": 0.5}
    train = DataLoader(helpers.labelled(1600), 100)
    fitted(monitor := quick_risk(), Quiet(), train, unlabelled_loader(seed=1), **options)
    assert [row["step"] for row in monitor.history if "expected_loss" in row] == [*range(step, 33, 8)]
    assert monitor.summary["num_training"] == min(limit, 1600)


def test_training_batches_may_be_of_two_views_and_validation_batches_of_one() -> None:
    class TwoViews(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(torch.nn.functional.cross_entropy(self(view), batch[1]) for view in batch[0])

    x, y = helpers.labelled(50).tensors
    views = DataLoader([[[one, two], label] for one, two, label in zip(x, x.flip(1), y, strict=True)], 16)
    for num_sanity_val_steps in (0, 2):
        monitors: list[Any] = [
            SensitivityMonitor(),
            quick_risk(inputs=helpers.first_tensor, targets=lambda batch: batch[1]),
        ]
        options = {"num_sanity_val_steps": num_sanity_val_steps}
        run, texts = helpers.fitted_and_said(monitors, TwoViews(), views, unlabelled_loader(seed=1), **options)
        assert not texts and run.callback_metrics[SENSITIVITY] > 0 and run.callback_metrics["val/expected_loss"] < 2
