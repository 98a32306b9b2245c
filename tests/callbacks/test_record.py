"""What RiskMonitor saves: a resumed fit goes on with its curve, and says what one in one part says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as cb
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from tests.callbacks.plain_loop import CORRECT, HOLDOUT, LOSS, NOISY, Plain, X, batches_of, fit
from tests.helpers import fitted_and_said, labelled, quick_risk, said

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:.*callbacks used to create")
KEY = "RiskMonitor{'prefix': 'val/'}"


class Still(Plain):
    """Without dropout, so that a resumed fit draws no other numbers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net[2].p = 0.0


class Raw(Still):
    """Optimizers that Lightning does not count: ``global_step`` stays 0."""

    automatic_optimization = False

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def values(run: Trainer) -> list[dict[str, float]]:
    """Those that were logged, of each epoch."""
    found = [{name: value for name, value in each.items() if "expected" in name} for each in run.epochs]  # type: ignore[attr-defined]
    return [each for each in found if each[LOSS] < 2]


@pytest.mark.parametrize(("kind", "num_sanity_val_steps"), [(Still, 2), (Raw, 0)])
def test_a_resumed_fit_goes_on_as_if_there_had_been_no_break(
    kind: Any, num_sanity_val_steps: int, tmp_path: Path
) -> None:
    options = {"num_sanity_val_steps": num_sanity_val_steps}
    whole = fit(kind(), monitor := quick_risk(), max_epochs=4, **options)
    run = fit(kind(), quick_risk(), max_epochs=2, **options)
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    resumed = fit(kind(), continued := quick_risk(), max_epochs=4, ckpt_path=path, **options)
    assert values(run) + values(resumed) == [pytest.approx(epoch, rel=1e-5) for epoch in values(whole)]
    assert continued.history == [pytest.approx(row, rel=1e-5) for row in monitor.history]
    numbers = {name: each for name, each in monitor.summary.items() if isinstance(each, float)}
    assert continued.summary == monitor.summary | {name: pytest.approx(each) for name, each in numbers.items()}
    assert (continued.reference.left_out_ == monitor.reference.left_out_).all()


# Within an epoch

MANY = DataLoader(TensorDataset(*labelled(1300, seed=2).tensors), 100)


class Augmented(Still):
    """In training, samples are others in each epoch."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.01 * torch.randn_like(batch[0]), batch[1]] if self.trainer.training else batch


def saved_after(num_steps: int, folder: Path, kind: Any) -> Path:
    """A checkpoint that is written in a fit of 13 steps an epoch, and a validation after every third."""
    saving = cb.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=num_steps)
    options = {"max_epochs": 2, "enable_checkpointing": True, "val_check_interval": 3}
    fit(kind(), quick_risk(), saving, train=MANY, **options)
    return folder / f"step={num_steps}.ckpt"


# Before the first value, at the end of an epoch, which begins anew, and after the first value.
@pytest.mark.parametrize(("num_steps", "first"), [(4, 26), (13, 26), (17, 39)])
def test_a_fit_that_is_resumed_within_an_epoch_waits_for_a_whole_epoch(
    num_steps: int, first: int, tmp_path: Path
) -> None:
    path = saved_after(num_steps, tmp_path, Augmented)
    options = {"max_epochs": 4, "ckpt_path": path, "val_check_interval": 3}
    run, texts = fitted_and_said(monitor := quick_risk(), Augmented(), MANY, DataLoader(HOLDOUT, 16), **options)
    rows = [row for row in monitor.history if row["step"] > num_steps]
    assert all("goes on with another reference" in text for text in texts) and len(texts) == (num_steps == 17)
    assert rows and [row["step"] for row in monitor.history][:4] == [3, 6, 9, 12]
    assert all(("expected_loss" in row) == (row["step"] >= first) for row in rows)
    assert monitor.summary["num_training"] == monitor.reference.num_samples_ == 1300 and run.current_epoch == 4


# What others have chosen by


def test_a_fit_that_is_resumed_at_an_end_of_an_epoch_uses_up_no_patience(tmp_path: Path) -> None:
    def part(max_epochs: int, **options: Any) -> Trainer:
        stopping = cb.EarlyStopping(LOSS, patience=3)
        return fit(Still(), quick_risk(), stopping, max_epochs=max_epochs, val_check_interval=2, **options)

    part(2, num_sanity_val_steps=0).save_checkpoint(path := tmp_path / "two.ckpt")
    assert part(4, ckpt_path=path).current_epoch == 4


def test_a_fit_that_broke_before_its_first_value_uses_up_no_patience(tmp_path: Path) -> None:
    def part(*saving: cb.Callback, **options: Any) -> Trainer:
        stopping = cb.EarlyStopping(LOSS, patience=4, check_on_train_epoch_end=False)
        return fit(Still(), quick_risk(), stopping, *saving, train=MANY, val_check_interval=1, **options)

    saving = cb.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=8)
    part(saving, max_epochs=1, enable_checkpointing=True)
    assert part(max_epochs=2, ckpt_path=tmp_path / "step=8.ckpt").global_step == 2 * 13


# Another reference

OTHERS: dict[str, tuple[Tensor, dict[str, Any]]] = {  # training labels, and options of the monitor
    "corrected labels": (CORRECT, {}),
    "another estimator": (NOISY, {"reference": LogisticRegression()}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_fit_that_is_resumed_with_another_reference_says_so_and_chooses_by_it(name: str, tmp_path: Path) -> None:
    labels, options = OTHERS[name]
    fit(Still(), first := quick_risk(), max_epochs=2).save_checkpoint(path := tmp_path / "two.ckpt")
    again = quick_risk(**options)
    data = batches_of(X, labels), DataLoader(HOLDOUT, 16)
    _, texts = fitted_and_said(again, Still(), *data, max_epochs=5, ckpt_path=path)
    assert sum("goes on with another reference" in text for text in texts) == len(texts) == 1
    scores = [row["reference_score"] for row in again.history]
    assert scores == [first.reference.score_] * 2 + [again.reference.score_] * 3 and len({*scores}) == 2
    assert again.summary["epoch"] >= 2 and again.summary["skill"] == again.reference.skill_


def test_a_history_is_the_same_in_another_run_and_json_takes_it() -> None:
    histories = []
    for _ in range(2):
        val = DataLoader(labelled(50, seed=1), 16)
        fit(Still(), monitor := quick_risk(validation_labels=True), val=val, max_epochs=1)
        histories.append(json.dumps(monitor.history))
    assert histories[0] == histories[1]


# With others


@pytest.mark.parametrize("kind", [Still, Raw])
def test_a_fit_forgets_the_one_before_unless_its_trainer_goes_on(kind: Any, tmp_path: Path) -> None:
    monitor, model = quick_risk(), kind()
    run = fit(model, monitor, max_epochs=1)
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    first = monitor.summary
    run.fit_loop.max_epochs = 2
    run.fit(model, batches_of(X, NOISY), DataLoader(HOLDOUT, 16))
    assert [row["epoch"] for row in monitor.history] == [0, 1]
    assert monitor.summary["num_validations"] == 2 == first["num_validations"] + 1
    run.validate(model, DataLoader(HOLDOUT, 16), ckpt_path=path, verbose=False)
    assert [row["epoch"] for row in monitor.history] == [0, 1]
    fit(kind(), monitor, train=batches_of(X, CORRECT), max_epochs=1)  # also one Trainer on other data
    assert [row["epoch"] for row in monitor.history] == [0] and monitor.summary["skill"] > first["skill"]


def test_a_fit_that_goes_back_to_a_checkpoint_without_a_state_begins_anew(tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    run = fit(model := Still(), monitor := quick_risk(), max_epochs=3)
    run.fit_loop.max_epochs = 2
    run.fit(model, batches_of(X, NOISY), DataLoader(HOLDOUT, 16), ckpt_path=path)
    assert [row["epoch"] for row in monitor.history] == [1]


@pytest.mark.parametrize("num_skipped", [0, 1])
def test_a_fit_may_go_on_with_fewer_validation_loaders(num_skipped: int) -> None:
    loader = DataLoader(HOLDOUT, 16)
    run = fit(model := Still(), monitor := quick_risk(), val=[loader, loader], max_epochs=1)
    monitor.is_ready = lambda trainer: trainer.current_epoch > num_skipped  # type: ignore[method-assign]
    run.fit_loop.max_epochs = 2 + num_skipped
    with said() as texts:
        run.fit(model, batches_of(X, NOISY), loader)
    assert not texts
    later = [(epoch, 0) for epoch in range(1, 2 + num_skipped)]
    assert [(row["epoch"], row["dataloader_idx"]) for row in monitor.history] == [(0, 0), (0, 1), *later]
    assert monitor.history[-1]["expected_loss"] == pytest.approx(float(run.callback_metrics[LOSS]))


# The checkpoint


def test_a_checkpoint_grows_by_little_and_loads_without_pickle(tmp_path: Path) -> None:
    sizes = []
    for monitors in ([], [monitor := quick_risk(), cb.EarlyStopping(LOSS, patience=1)]):
        fit(Still(), *monitors, max_epochs=2).save_checkpoint(path := tmp_path / f"{len(monitors)}.ckpt")
        sizes.append(path.stat().st_size)
    states = torch.load(path, weights_only=True)["callbacks"]
    assert states[KEY]["history"] == monitor.history and sizes[1] - sizes[0] < 4000
    (other,) = (state for key, state in states.items() if "EarlyStopping" in key)
    assert other["wait_count"] == monitors[1].wait_count >= 0  # nobody touches it


def test_a_fit_that_was_preempted_in_a_validation_begins_with_it_and_goes_on(tmp_path: Path) -> None:
    class Preempted(Still):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (self.global_step, batch_idx) == (2, 1) and not path.exists():
                self.trainer.save_checkpoint(path)

    path, options = tmp_path / "middle.ckpt", {"val_check_interval": 2, "num_sanity_val_steps": 0, "max_epochs": 2}
    whole = fit(Preempted(), quick_risk(), **options)
    stopping = cb.EarlyStopping(LOSS, patience=3)
    resumed = fit(Preempted(), quick_risk(), stopping, ckpt_path=path, **options)
    assert resumed.current_epoch == 2 and not resumed.should_stop
    assert values(resumed)[-1].keys() == values(whole)[-1].keys()


def test_what_another_version_has_saved_is_left_alone(tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    for state in ({}, {"history": [{"epoch": 0, "score": 1.0}]}):
        torch.save(torch.load(path, weights_only=True) | {"callbacks": {KEY: state}}, path)
        run = fit(Still(), monitor := quick_risk(), max_epochs=2, ckpt_path=path)
        assert len(values(run)) == len(monitor.history) == 1 and monitor.summary["num_validations"] == 1


def test_two_monitors_of_different_prefixes_save_two_states(tmp_path: Path) -> None:
    def monitors() -> list[RiskMonitor]:
        return [quick_risk(), quick_risk(prefix="b/", num_samples=20)]

    fit(Still(), *monitors(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    fit(Still(), *(both := monitors()), max_epochs=2, ckpt_path=path)
    assert [len(each.history) for each in both] == [2, 2]
    assert both[0].history[0]["expected_loss"] != both[1].history[0]["expected_loss"]
