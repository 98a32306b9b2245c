"""What RiskMonitor saves: a resumed fit goes on with the same reference, and a checkpoint hardly grows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as cb
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks import reference
from tests.callbacks.plain_loop import HOLDOUT, Plain, fit
from tests.helpers import fitted_and_said, inputs, loader

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
    found = [{name: value for name, value in each.items() if "risk" in name} for each in run.epochs]  # type: ignore[attr-defined]
    return [each for each in found if each["val/risk_criterion"] < 2]


def assert_same_record(first: RiskMonitor, second: RiskMonitor) -> None:
    both = asdict(first.record), asdict(second.record)
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("kind", "num_sanity_val_steps"), [(Still, 2), (Raw, 0)])
def test_a_resumed_fit_goes_on_as_if_there_had_been_no_break(
    kind: Any, num_sanity_val_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_sanity_val_steps": num_sanity_val_steps}
    whole = fit(kind(), monitor := RiskMonitor(), max_epochs=4, **options)
    run = fit(kind(), RiskMonitor(), max_epochs=2, **options)
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    monkeypatch.setattr(reference, "fit_reference", None)  # predictions are found by their fingerprints
    resumed = fit(kind(), continued := RiskMonitor(), max_epochs=4, ckpt_path=path, **options)
    assert values(run) + values(resumed) == [pytest.approx(epoch, rel=1e-5) for epoch in values(whole)]
    assert_same_record(continued, monitor)


def saved_after(num_steps: int, folder: Path, *monitors: Any, **kwargs: Any) -> Path:
    """A checkpoint that is written in a fit, before any validation after that step."""
    saving = cb.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=num_steps)
    fit(Still(), *monitors, saving, max_epochs=2, enable_checkpointing=True, **kwargs)
    return folder / f"step={num_steps}.ckpt"


@pytest.mark.parametrize("num_steps", [4, 9])
def test_a_fit_that_is_resumed_within_an_epoch_measures_as_soon_as_it_has_samples_and_refits_nothing(
    num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_after(num_steps, tmp_path, monitor := RiskMonitor(), val_check_interval=2)
    has_reference = num_steps >= 7  # after the first epoch, of six steps
    if has_reference:
        monkeypatch.setattr(reference, "fit_reference", None)
    options = {"max_epochs": 3, "ckpt_path": path, "val_check_interval": 2}
    run, texts = fitted_and_said(continued := RiskMonitor(), Still(), loader(90), DataLoader(HOLDOUT, 16), **options)
    assert not texts and len(values(run)) >= 3
    if has_reference:
        torch.testing.assert_close(continued.record.loader(0).predictions, monitor.record.loader(0).predictions)
        assert continued.record.verdict == monitor.record.verdict
        assert continued.record.loader(0).history[0] == monitor.record.loader(0).history[0]


def test_other_validation_samples_have_predictions_of_their_own_and_the_verdict_stays(tmp_path: Path) -> None:
    run = fit(Still(), first := RiskMonitor(), max_epochs=1)
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    val = DataLoader(inputs(30, seed=9), 16)
    fit(Still(), second := RiskMonitor(), val=val, max_epochs=2, ckpt_path=path)
    assert second.record.verdict == first.record.verdict
    assert len(second.record.loader(0).predictions) == 30 != len(first.record.loader(0).predictions)
    assert [each.epoch for each in second.record.loader(0).history] == [0, 1]


def test_a_checkpoint_grows_by_a_few_kb_and_loads_without_pickle(tmp_path: Path) -> None:
    val = DataLoader(inputs(600, seed=1), 100)
    sizes = []
    for monitors in ([], [RiskMonitor()]):
        path = tmp_path / f"{len(monitors)}.ckpt"
        fit(Still(), *monitors, val=val, max_epochs=2).save_checkpoint(path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] < 600 * (8 + 4 * 4) + 8_000  # a fingerprint and four probabilities for each sample
    state = torch.load(path, weights_only=True)["callbacks"][KEY]
    assert state["verdict"]["num_samples"] == 90 and len(state["loaders"][0]["history"]) == 2


def test_a_fit_forgets_the_one_before_unless_its_trainer_goes_on() -> None:
    monitor, model = RiskMonitor(), Still()
    run = fit(model, monitor, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())
    assert [each.epoch for each in monitor.record.loader(0).history] == [0, 1]
    fit(Still(), monitor, max_epochs=1)
    assert [each.epoch for each in monitor.record.loader(0).history] == [0]


def test_a_fit_that_was_preempted_in_a_validation_begins_with_it_and_goes_on(tmp_path: Path) -> None:
    class Preempted(Still):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (self.global_step, batch_idx) == (2, 1) and not path.exists():
                self.trainer.save_checkpoint(path)

    path, options = tmp_path / "middle.ckpt", {"val_check_interval": 2, "num_sanity_val_steps": 0, "max_epochs": 2}
    whole = fit(Preempted(), RiskMonitor(), **options)
    stopping = cb.EarlyStopping("val/risk_criterion", patience=3)
    resumed = fit(Preempted(), RiskMonitor(), stopping, ckpt_path=path, **options)
    assert resumed.current_epoch == 2 and not resumed.should_stop
    assert values(resumed)[-1].keys() == values(whole)[-1].keys()


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    fit(Still(), RiskMonitor(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"][KEY]
    old = {"initial_weights": {}, "num_training": 50, "history": {0: []}}
    for malformed in (3, {}, old, {"verdict": None}, state | {"verdict": {"a": 1}}, state | {"loaders": {0: {}}}):
        torch.save(checkpoint | {"callbacks": {KEY: malformed}}, path)
        match = "`RiskMonitor` cannot read its state in the checkpoint, which another version may have saved"
        with pytest.raises(MisconfigurationException, match=match):
            fit(Still(), RiskMonitor(), ckpt_path=path)


def test_a_checkpoint_without_a_state_begins_anew(tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "without.ckpt")
    run = fit(Still(), RiskMonitor(), max_epochs=3, ckpt_path=path)
    assert len(values(run)) == 2
