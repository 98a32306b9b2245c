"""What RiskMonitor saves and restores: initial weights, sizes, calibration, and what validations have shown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as cb
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional.reference import ReferenceSums
from lightning_sensitivity.model.twins import copy_weights
from tests.callbacks.plain_loop import Plain, fit
from tests.helpers import loader, said

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:.*callbacks used to create")
KEY = "RiskMonitor{'prefix': 'val/'}"


class Still(Plain):
    """Without dropout, so that a resumed fit draws no other numbers; its first layer is frozen."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net[2].p = 0.0
        self.net[0].requires_grad_(False)


class Raw(Still):
    """Optimizers that Lightning does not count: ``global_step`` stays 0."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def assert_initial(monitor: RiskMonitor, weights: dict[str, Tensor]) -> None:
    """The weights from before training, of the layer that is trained, are these."""
    for name in ("net.3.weight", "net.3.bias"):
        assert torch.equal(monitor.record.initial[name], weights[name])


def values(kind: Any, max_epochs: int, *others: Any, **kwargs: Any) -> tuple[list[dict[str, float]], Trainer]:
    """The values of two monitors in each epoch, and the Trainer."""
    monitors = RiskMonitor(), RiskMonitor(prefix="other/", seed=1)
    run = fit(kind(), loader(), *monitors, *others, max_epochs=max_epochs, **kwargs)
    return [{name: value for name, value in each.items() if "risk" in name} for each in run.epochs], run


@pytest.mark.parametrize("kind", [Still, Raw])
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_resumed_fit_has_the_values_of_an_uninterrupted_one(
    kind: Any, num_sanity_val_steps: int, tmp_path: Path
) -> None:
    options = {"num_sanity_val_steps": num_sanity_val_steps}
    whole, _ = values(kind, 4, **options)
    first, run = values(kind, 2, **options)
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    assert first == whole[:2] and first[0]["val/risk_variance"] != first[0]["other/risk_variance"]
    assert values(kind, 4, ckpt_path=path, **options)[0] == [pytest.approx(epoch, rel=1e-5) for epoch in whole[2:]]


def saved_after(num_steps: int, folder: Path, **kwargs: Any) -> Path:
    """A checkpoint that is written in a fit, before any validation after that step."""
    checkpoint = cb.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=num_steps)
    values(Still, 2, checkpoint, enable_checkpointing=True, **kwargs)
    return folder / f"step={num_steps}.ckpt"


def test_a_checkpoint_holds_no_second_copy_of_frozen_weights_and_loads_without_pickle(tmp_path: Path) -> None:
    state = torch.load(saved_after(8, tmp_path), weights_only=True)["callbacks"][KEY]
    assert state["initial_weights"].keys() == {"net.3.weight", "net.3.bias"}
    assert state["num_training"] == 50 and state["num_weights"] == 68
    assert len(state["history"][0]) == 1 and len(state["calibrations"]) == 1


class Unfreezing(Still):
    """Its first layer is trained in the second step alone."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.net[0].requires_grad_(self.trainer.global_step == 1)


class Averaging(Still):
    """Its first layer follows another one, and is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Parameter(torch.zeros_like(self.net[0].weight))

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.net[0].weight.lerp_(self.other, 0.1)


class AveragingData(Averaging):
    """It writes to the data, which no version counts, as a mean teacher does."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.net[0].weight.data.lerp_(self.other, 0.1)


@pytest.mark.parametrize("kind", [Unfreezing, Averaging, AveragingData])
def test_weights_that_have_changed_are_saved_at_any_time_whether_they_are_trained_or_not(
    kind: Any, tmp_path: Path
) -> None:
    class Saving(cb.Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 3:  # within an epoch, and before its validation
                trainer.save_checkpoint(path)

    path, model = tmp_path / "three.ckpt", kind()
    first = model.net[0].weight.detach().clone()
    fit(model, loader(), monitor := RiskMonitor(), Saving(), max_epochs=1)
    state = torch.load(path, weights_only=True)["callbacks"][KEY]
    assert torch.equal(state["initial_weights"]["net.0.weight"], first)
    assert torch.equal(monitor.record.initial_weights(model)["net.0.weight"], first)  # which twins need


def found_clean(monitor: RiskMonitor) -> list[bool]:
    """Whether the training score was the criterion, by validation."""
    return [result.gap_weight == 0 for result in monitor.record.history[0]]


@pytest.mark.parametrize("is_clean", [True, False])
def test_whether_noise_is_found_is_decided_by_the_first_full_set_of_samples_and_saved(
    is_clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(*verdicts: bool) -> None:
        """What labels look like in one validation after the other."""
        each = iter(verdicts)
        monkeypatch.setattr(ReferenceSums, "looks_clean", property(lambda sums: next(each)))

    looks(not is_clean, is_clean)  # the first epoch may have more samples than its first half has shown
    options = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}
    fit(Still(), loader(), monitor := RiskMonitor(), **{**options, "max_epochs": 1})
    assert found_clean(monitor) == [not is_clean, is_clean]
    assert set(monitor.record.gap_weights) == {0} and (monitor.record.gap_weights[0] == 0) == is_clean
    looks(not is_clean, is_clean)
    run = fit(Still(), loader(), monitor := RiskMonitor(), **options)
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    looks()  # it is not asked again
    fit(Still(), loader(50, seed=7), resumed := RiskMonitor(), ckpt_path=path, **{**options, "max_epochs": 3})
    assert set(found_clean(resumed)[1:]) == {is_clean}


def test_n_and_w_are_those_of_the_checkpoint_also_if_data_have_grown(tmp_path: Path) -> None:
    path, monitor, model = saved_after(8, tmp_path), RiskMonitor(), Still()
    model.net[0].requires_grad_(True)
    fit(model, loader(200), monitor, ckpt_path=path, max_epochs=3)
    assert (monitor.record.num_training, monitor.record.num_weights) == (50, 68)


@pytest.mark.parametrize("kind", [Still, Raw])
def test_a_fit_begins_with_the_weights_of_its_start_unless_its_trainer_resumes(kind: Any, tmp_path: Path) -> None:
    monitor, model = RiskMonitor(), kind()

    first = copy_weights(model.state_dict())
    run = fit(model, loader(), monitor, max_epochs=1)
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    run.validate(model, loader(), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())
    assert_initial(monitor, first)
    assert [result.epoch for result in monitor.record.history[0]] == [0, 1]
    for module in (model, kind(seed=1)):  # the next of k folds
        weights = copy_weights(module.state_dict())
        fit(module, loader(), monitor, max_epochs=1)
        assert_initial(monitor, weights)
    fit(kind(seed=2), loader(), monitor, max_epochs=2, ckpt_path=path)
    assert_initial(monitor, first)


def test_given_weights_are_those_from_before_training() -> None:
    given, model = copy_weights(Still().float().state_dict()), Still()  # of another type than those of the model
    model.net[3].weight.data.add_(1)
    run = fit(model, loader(), monitor := RiskMonitor(initial_weights=given), max_epochs=1)
    assert run.callback_metrics["val/risk_variance"] > 0
    assert_initial(monitor, given)


def test_a_checkpoint_without_them_is_an_error_before_the_first_step_unless_they_are_given(tmp_path: Path) -> None:
    fit(Still(), loader(), max_epochs=1).save_checkpoint(path := tmp_path / "without.ckpt")
    with pytest.raises(MisconfigurationException, match="from before training are unknown.*`initial_weights=`"):
        fit(model := Still(), loader(), RiskMonitor(), ckpt_path=path)
    assert model.trainer.global_step == 4
    monitor = RiskMonitor(initial_weights=Still().state_dict())
    assert fit(Still(), loader(), monitor, ckpt_path=path).callback_metrics["val/risk_variance"] > 0


def test_a_malformed_state_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint = torch.load(path := saved_after(4, tmp_path), weights_only=True)
    state = checkpoint["callbacks"][KEY]
    match = "cannot read its state in the checkpoint.*`initial_weights=`"
    changes = {"initial_weights": 3}, {"history": {0: [(1, 0.0)]}}, {"calibrations": {0: (1.0, 2.0, 3.0)}}
    for malformed in (3, {"a": 1}, *(state | change for change in changes)):
        torch.save(checkpoint | {"callbacks": {KEY: malformed}}, path)
        with pytest.raises(MisconfigurationException, match=match):
            fit(Still(), loader(), RiskMonitor(), ckpt_path=path)


def test_a_fit_that_was_preempted_in_a_validation_begins_with_it_and_goes_on(tmp_path: Path) -> None:
    class Preempted(Still):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (self.global_step, batch_idx) == (2, 1) and not path.exists():
                self.trainer.save_checkpoint(path)

    path, options = tmp_path / "middle.ckpt", {"val_check_interval": 2, "num_sanity_val_steps": 0}
    whole, _ = values(Preempted, 2, **options)
    with said() as texts:
        stopping = cb.EarlyStopping("val/risk_estimate", patience=99)
        found, resumed = values(Preempted, 2, stopping, ckpt_path=path, **options)
    assert "no training sample is kept yet" in texts[0]
    assert resumed.current_epoch == 2 and not resumed.should_stop
    assert len(found) == len(whole) and found[-1].keys() == whole[-1].keys()


def test_a_fit_that_is_resumed_within_an_epoch_keeps_the_training_samples_of_the_next(tmp_path: Path) -> None:
    path, sizes, model, monitor = saved_after(3, tmp_path), list[int](), Still(), RiskMonitor()
    model.on_validation_end = lambda: sizes.append(monitor.kept.samples.size)
    fit(model, loader(), monitor, max_epochs=3, ckpt_path=path)
    assert sizes == [16, 50, 50]  # of the rest of an epoch, and of the next
