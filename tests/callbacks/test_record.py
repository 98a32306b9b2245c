"""What RiskMonitor saves: a resumed fit goes on with the same reference, unless samples or labels are others."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as cb
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks import reference
from tests.callbacks.plain_loop import CORRECT, HOLDOUT, NOISY, SCORE, Plain, X, batches_of, fit
from tests.helpers import fitted_and_said, inputs, labelled, quick_risk

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
    return [each for each in found if each[SCORE] < 2]


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on, a reference can only be continued."""
    return lambda: monkeypatch.setattr(reference, "fit_reference", None)


@pytest.mark.parametrize(("kind", "num_sanity_val_steps"), [(Still, 2), (Raw, 0)])
def test_a_resumed_fit_goes_on_as_if_there_had_been_no_break(
    kind: Any, num_sanity_val_steps: int, tmp_path: Path, no_fit: Any
) -> None:
    options = {"num_sanity_val_steps": num_sanity_val_steps}
    whole = fit(kind(), monitor := quick_risk(), max_epochs=4, **options)
    run = fit(kind(), quick_risk(), max_epochs=2, **options)
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    no_fit()
    resumed = fit(kind(), continued := quick_risk(), max_epochs=4, ckpt_path=path, **options)
    assert values(run) + values(resumed) == [pytest.approx(epoch, rel=1e-5) for epoch in values(whole)]
    assert continued.history == [pytest.approx(row, rel=1e-5) for row in monitor.history]
    assert str(continued.record.verdict) == str(monitor.record.verdict)
    both = [(each.record.training, asdict(each.record.predictions[0])) for each in (continued, monitor)]
    torch.testing.assert_close(*both)
    assert continued.summary["num_training"] == 90 and continued.reference is None


# Within an epoch

MANY = DataLoader(TensorDataset(*labelled(1300, seed=2).tensors), 100)


def saved_after(num_steps: int, folder: Path, *monitors: Any, train: Any = MANY) -> Path:
    """A checkpoint that is written in a fit, before any validation after that step."""
    saving = cb.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=num_steps)
    options = {"max_epochs": 2, "enable_checkpointing": True, "val_check_interval": 3}
    fit(Still(), *monitors, saving, train=train, **options)
    return folder / f"step={num_steps}.ckpt"


RESUMED: dict[str, tuple[int, Any, Any, list[int]]] = {  # a step, training data then, validation data, steps of values
    "in the second epoch": (17, MANY, HOLDOUT, [19, 22, 25]),
    "in the first one, before a value": (4, MANY, HOLDOUT, [19, 22, 25]),
    "in the first one, after a value": (8, MANY, HOLDOUT, [19, 22, 25]),
    "with other validation samples": (17, MANY, inputs(50, seed=9), [32, 35, 38, 42]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_fit_that_is_resumed_within_an_epoch_has_no_reference_of_a_part_of_it(name: str, tmp_path: Path) -> None:
    num_steps, train, val, steps = RESUMED[name]
    path = saved_after(num_steps, tmp_path, quick_risk())
    options = {"max_epochs": 4, "ckpt_path": path, "val_check_interval": 3}
    run, texts = fitted_and_said(monitor := quick_risk(), Still(), train, DataLoader(val, 16), **options)
    found = [row["step"] for row in monitor.history if row["step"] > num_steps]
    assert not texts and found[: len(steps)] == steps
    assert monitor.summary["num_training"] == 1300 and run.current_epoch == 4


def test_a_resumed_fit_that_ends_before_it_has_a_reference_says_so_and_chooses_nothing(tmp_path: Path) -> None:
    path, val = saved_after(17, tmp_path, quick_risk()), DataLoader(inputs(50, seed=9), 16)
    options = {"max_steps": 20, "max_epochs": 4, "ckpt_path": path, "val_check_interval": 3}
    _, texts = fitted_and_said(monitor := quick_risk(), Still(), MANY, val, **options)
    assert "logged nothing: the run ended before" in texts[-1] and monitor.summary == {}


# With others


def test_a_fit_that_is_resumed_on_corrected_labels_has_a_reference_of_these(tmp_path: Path) -> None:
    fit(Still(), first := quick_risk(), max_epochs=2).save_checkpoint(path := tmp_path / "two.ckpt")
    options = {"max_epochs": 3, "ckpt_path": path}
    fit(Still(), second := quick_risk(), train=batches_of(X, CORRECT), **options)
    fit(Still(), alone := quick_risk(), train=batches_of(X, CORRECT), max_epochs=1)
    assert second.summary["skill"] == alone.summary["skill"] > first.summary["skill"] + 0.05
    assert [row["epoch"] for row in second.history] == [0, 1, 2]
    assert second.summary["epoch"] == 2  # values by the old labels do not compare


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_with_a_shuffled_validation_loader_the_reference_is_fitted_anew_to_a_whole_epoch(tmp_path: Path) -> None:
    def val() -> DataLoader:
        return DataLoader(inputs(300, seed=1), 16, shuffle=True)

    fit(Still(), quick_risk(num_samples=50), val=val(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    model = Still()
    torch.manual_seed(5)  # as in another process
    fit(model, monitor := quick_risk(num_samples=50), val=val(), max_epochs=2, ckpt_path=path)
    assert monitor.reference.num_samples == monitor.summary["num_training"] == 90
    assert [row["reference"] for row in monitor.history] == [1, 2]


def test_a_fit_forgets_the_one_before_unless_its_trainer_goes_on() -> None:
    monitor, model = quick_risk(), Still()
    run = fit(model, monitor, max_epochs=1)
    first = monitor.summary
    run.fit_loop.max_epochs = 2
    run.fit(model, batches_of(X, NOISY), DataLoader(HOLDOUT, 16))
    assert [row["epoch"] for row in monitor.history] == [0, 1]
    assert monitor.summary["num_validations"] == 2 == first["num_validations"] + 1
    fit(Still(), monitor, train=batches_of(X, CORRECT), max_epochs=1)  # also one Trainer on other data
    assert [row["epoch"] for row in monitor.history] == [0] and monitor.summary["skill"] > first["skill"]


# The checkpoint


def test_a_checkpoint_grows_by_a_few_kb_and_loads_without_pickle(tmp_path: Path) -> None:
    val = DataLoader(inputs(600, seed=1), 100)
    sizes = []
    for monitors in ([], [quick_risk()]):
        path = tmp_path / f"{len(monitors)}.ckpt"
        fit(Still(), *monitors, val=val, max_epochs=2).save_checkpoint(path)
        sizes.append(path.stat().st_size)
    # A fingerprint and four probabilities for each unseen sample, and a fingerprint for each training sample.
    assert sizes[1] - sizes[0] < 600 * (8 + 4 * 8) + 90 * 8 + 8_000
    state = torch.load(path, weights_only=True)["callbacks"][KEY]
    assert state["verdict"]["num_samples"] == 90 and len(state["history"]) == 2


def test_a_fit_that_was_preempted_in_a_validation_begins_with_it_and_goes_on(tmp_path: Path) -> None:
    class Preempted(Still):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (self.global_step, batch_idx) == (2, 1) and not path.exists():
                self.trainer.save_checkpoint(path)

    path, options = tmp_path / "middle.ckpt", {"val_check_interval": 2, "num_sanity_val_steps": 0, "max_epochs": 2}
    whole = fit(Preempted(), quick_risk(), **options)
    stopping = cb.EarlyStopping(SCORE, patience=3)
    resumed = fit(Preempted(), quick_risk(), stopping, ckpt_path=path, **options)
    assert resumed.current_epoch == 2 and not resumed.should_stop
    assert values(resumed)[-1].keys() == values(whole)[-1].keys()


OLD = {"initial_weights": {}, "num_training": 50, "history": {0: []}}


@pytest.mark.parametrize("state", [3, {}, OLD, {"verdict": None}, {"verdict": {"a": 1}, "predictions": {}}])
def test_a_state_of_another_version_is_left_alone_with_a_warning(state: Any, tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"callbacks": {KEY: state}}, path)
    options = {"max_epochs": 2, "ckpt_path": path}
    data = batches_of(X, NOISY), DataLoader(HOLDOUT, 16)
    run, texts = fitted_and_said(monitor := quick_risk(), Still(), *data, **options)
    assert len(texts) == 1 and "leaves its state in the checkpoint alone, which another version has saved" in texts[0]
    assert len(values(run)) == len(monitor.history) == 1 and monitor.summary["num_validations"] == 1


def test_a_checkpoint_without_a_state_begins_anew(tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "without.ckpt")
    assert len(values(fit(Still(), quick_risk(), max_epochs=3, ckpt_path=path))) == 2


def test_two_monitors_of_different_prefixes_save_two_states(tmp_path: Path) -> None:
    def monitors() -> list[RiskMonitor]:
        return [quick_risk(), quick_risk(prefix="b/", num_samples=20)]

    fit(Still(), *monitors(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    fit(Still(), *(both := monitors()), max_epochs=2, ckpt_path=path)
    assert [len(each.history) for each in both] == [2, 2]
    assert both[0].history[0]["expected_score"] != both[1].history[0]["expected_score"]
