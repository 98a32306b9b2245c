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
from lightning_sensitivity.reading import kept
from tests.callbacks.plain_loop import CORRECT, HOLDOUT, LOSS, NOISY, Plain, X, batches_of, fit
from tests.helpers import fitted_and_said, inputs, labelled, quick_risk, said

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
@pytest.mark.parametrize(("num_steps", "first"), [(4, 26), (13, 26), (17, 18)])
def test_a_fit_that_is_resumed_within_an_epoch_goes_on_with_its_values_or_waits_for_a_whole_epoch(
    num_steps: int, first: int, tmp_path: Path
) -> None:
    path = saved_after(num_steps, tmp_path, Augmented)
    options = {"max_epochs": 4, "ckpt_path": path, "val_check_interval": 3}
    run, texts = fitted_and_said(monitor := quick_risk(), Augmented(), MANY, DataLoader(HOLDOUT, 16), **options)
    rows = [row for row in monitor.history if row["step"] > num_steps]
    assert not texts and rows and [row["step"] for row in monitor.history][:4] == [3, 6, 9, 12]
    assert all(("expected_loss" in row) == (row["step"] >= first) for row in rows)
    assert monitor.summary["num_training"] == monitor.reference.num_samples_ == 1300 and run.current_epoch == 4


def test_a_resumed_fit_that_ends_before_it_can_make_its_reference_again_has_values(tmp_path: Path) -> None:
    path = saved_after(17, tmp_path, Still)
    options = {"max_steps": 20, "max_epochs": 4, "ckpt_path": path, "val_check_interval": 3}
    _, texts = fitted_and_said(monitor := quick_risk(), Still(), MANY, DataLoader(HOLDOUT, 16), **options)
    assert not texts and monitor.reference is None and "expected_loss" in monitor.history[-1]
    assert monitor.summary["learner"] == "GaussianNB" and monitor.summary["num_gaps"] == 4  # of the first epoch


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_a_resumed_fit_with_nothing_left_to_train_says_what_the_fit_said(num_loaders: int, tmp_path: Path) -> None:
    first, again, val = quick_risk(), quick_risk(), [DataLoader(HOLDOUT, 16)] * num_loaders
    fit(Still(), first, val=val).save_checkpoint(path := tmp_path / "last.ckpt")
    run = fit(Still(), again, val=val, ckpt_path=path)
    assert again.history == first.history and "expected_accuracy" in first.summary and not run.epochs
    assert again.summary == first.summary


# What others have chosen by


def shuffled(seed: int) -> DataLoader:
    return DataLoader(TensorDataset(X, NOISY), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_that_keeps_other_training_samples_goes_on_with_the_curve_that_others_chose_by(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(kept, "max_samples", lambda *_: 40)  # of 90
    runs = []
    for folder, ends in (("whole", [8]), ("parts", [3, 8])):
        path = None
        for part, end in enumerate(ends):
            checkpoint = cb.ModelCheckpoint(tmp_path / folder, "{epoch}", LOSS, save_last=True)
            monitor, stopping = quick_risk(), cb.EarlyStopping(LOSS, patience=2)
            options = {"max_epochs": end, "ckpt_path": path, "enable_checkpointing": True, "num_sanity_val_steps": 0}
            model = Still()
            model.lr = 0.1
            run = fit(model, monitor, checkpoint, stopping, train=shuffled(part), **options)
            path = checkpoint.last_model_path
        losses = [row["expected_loss"] for row in monitor.history]
        runs.append((run, monitor, checkpoint, stopping, losses.index(min(losses))))
    for run, monitor, checkpoint, stopping, best in runs:
        assert monitor.summary["epoch"] == best and monitor.summary["checkpoint"].endswith(f"epoch={best}.ckpt")
        assert checkpoint.best_model_path == monitor.summary["checkpoint"]
        assert len({row["reference"] for row in monitor.history}) == 1
        assert stopping.stopped_epoch == 0 or run.current_epoch - 1 == stopping.stopped_epoch == best + 2
    assert runs[0][1].reference.score_ != runs[1][1].reference.score_  # made again, of other samples


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


def test_other_validation_samples_are_said_and_others_get_the_last_value_until_there_is_a_new_reference(
    tmp_path: Path,
) -> None:
    first = fit(Still(), quick_risk(), max_epochs=2)
    first.save_checkpoint(path := tmp_path / "two.ckpt")
    options = {"max_epochs": 3, "ckpt_path": path, "val_check_interval": 3}
    data = batches_of(X, NOISY), DataLoader(HOLDOUT[:40], 16)
    run, texts = fitted_and_said(monitor := quick_risk(), Still(), *data, **options)
    assert len(texts) == 1 and "keeps other validation samples than the checkpoint knows" in texts[0]
    assert "as many as before: `num_samples=`" in texts[0]
    assert run.epochs[0][LOSS] == pytest.approx(first.epochs[-1][LOSS]) and "expected_loss" not in monitor.history[2]
    assert run.epochs[1][LOSS] != run.epochs[0][LOSS] and "expected_loss" in monitor.history[3]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    data = batches_of(X, NOISY), DataLoader(HOLDOUT[order], 16)
    _, texts = fitted_and_said(monitor := quick_risk(), Still(), *data, **options)
    assert not texts and all("expected_loss" in row for row in monitor.history)  # the same ones in another order


def tenfold(outputs: Tensor, y: Tensor) -> Tensor:
    return 10 * cross_entropy(outputs, y, label_smoothing=0.1)


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {  # validation samples, and options of the monitor
    "other samples": (inputs(50, seed=7), {}),
    "another loss": (HOLDOUT, {"loss": tenfold}),
    "other class shares": (HOLDOUT, {"class_shares": [0.1, 0.2, 0.3, 0.4]}),
    "another estimator": (HOLDOUT, {"reference": LogisticRegression()}),
    "features": (HOLDOUT, {"features": lambda batch: (batch[0] if isinstance(batch, list) else batch)[:, :6]}),
    "other labels": (TensorDataset(HOLDOUT, torch.arange(50) % 4), {"validation_labels": True}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_resumed_fit_begins_a_curve_with(name: str, tmp_path: Path) -> None:
    """The best epoch is one of the last curve, and labels are weighed anew."""
    samples, options = OTHERS[name]
    again = quick_risk(**options)
    fit(Still(), quick_risk(), max_epochs=2).save_checkpoint(path := tmp_path / "two.ckpt")
    with said() as texts:
        fit(Still(), again, val=DataLoader(samples, 16), max_epochs=5, ckpt_path=path)
    assert any(word in text for text in texts for word in ("begins a new curve", "keeps other validation samples"))
    rows = [row for row in again.history if "expected_loss" in row]
    curves = [row["curve"] for row in rows]
    assert len({*curves}) == 2 and curves[0] == curves[1] != curves[2] == curves[-1]
    assert again.summary["epoch"] in [row["epoch"] for row in rows[2:]]


def test_it_is_said_also_after_a_validation_without_a_value(tmp_path: Path) -> None:
    run = fit(Still(), first := quick_risk(), max_epochs=2)
    first.history[-1] = {name: value for name, value in first.history[-1].items() if "expected" not in name}
    first.history[-1] |= {"reference": None, "curve": None}
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    with said() as texts:
        fit(Still(), quick_risk(loss=tenfold), max_epochs=3, ckpt_path=path)
    assert sum("begins a new curve" in text for text in texts) == 1


def test_it_is_not_said_of_a_fit_whose_first_validations_have_no_value() -> None:
    nothing = {"features": lambda batch: torch.zeros(len(batch[0]), 1)}
    monitor, val = quick_risk(validation_labels=True, **nothing), DataLoader(labelled(50, seed=1), 16)
    _, texts = fitted_and_said(monitor, Still(), batches_of(X, NOISY), val, max_epochs=2, val_check_interval=3)
    assert ["expected_loss" in row for row in monitor.history] == [False] + [True] * 3
    assert not any("begins a new curve" in text for text in texts)


def test_a_curve_is_the_same_in_another_run_and_json_takes_it() -> None:
    histories = []
    for _ in range(2):
        fit(
            Still(),
            monitor := quick_risk(validation_labels=True),
            val=DataLoader(labelled(50, seed=1), 16),
            max_epochs=1,
        )
        histories.append(json.dumps(monitor.history))
    assert histories[0] == histories[1]


# With others


def test_a_fit_that_is_resumed_on_corrected_labels_goes_on_with_its_curve_and_has_a_reference_of_these(
    tmp_path: Path,
) -> None:
    fit(Still(), first := quick_risk(), max_epochs=2).save_checkpoint(path := tmp_path / "two.ckpt")
    fit(Still(), second := quick_risk(), train=batches_of(X, CORRECT), max_epochs=3, ckpt_path=path)
    assert second.reference.skill_ > first.reference.skill_ + 0.05
    assert second.summary["skill"] == first.summary["skill"]  # it judged all three epochs
    assert [row["epoch"] for row in second.history] == [0, 1, 2]
    for labels, is_said in ((NOISY, False), ((CORRECT + 1) % 4, True)):
        with said() as texts:
            fit(Still(), quick_risk(), train=batches_of(X, labels), max_epochs=3, ckpt_path=path)
        assert sum("a new one has learned other labels" in text for text in texts) == len(texts) == is_said


@pytest.mark.parametrize("kind", [Still, Raw])
def test_a_fit_forgets_the_one_before_unless_its_trainer_goes_on_with_its_model(kind: Any, tmp_path: Path) -> None:
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
    run.fit_loop.max_epochs = 3
    run.fit(kind(), batches_of(X, NOISY), DataLoader(HOLDOUT, 16))  # another model, in the same Trainer
    assert [row["epoch"] for row in monitor.history] == [2]
    fit(kind(), monitor, train=batches_of(X, CORRECT), max_epochs=1)  # also one Trainer on other data
    assert [row["epoch"] for row in monitor.history] == [0] and monitor.summary["skill"] > first["skill"]


def test_a_fit_that_goes_back_to_a_checkpoint_without_a_state_begins_anew(tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    run = fit(model := Still(), monitor := quick_risk(), max_epochs=3)
    run.fit_loop.max_epochs = 2
    run.fit(model, batches_of(X, NOISY), DataLoader(HOLDOUT, 16), ckpt_path=path)
    assert [row["epoch"] for row in monitor.history] == [1]


def test_a_fit_goes_on_by_a_new_reference_where_samples_can_not_be_known_again(monkeypatch: Any) -> None:
    def none(samples: Any) -> Any:
        raise ValueError("No input has a row for each sample")  # as of graphs

    monkeypatch.setattr(kept.KeptSamples, "fingerprints", none)
    run = fit(model := Still(), monitor := quick_risk(), max_epochs=1)
    run.fit_loop.max_epochs = 2
    with said() as texts:
        run.fit(model, batches_of(X, NOISY), DataLoader(HOLDOUT, 16))
    assert texts == [] and ["expected_loss" in row for row in monitor.history] == [True, True]


@pytest.mark.parametrize("num_skipped", [0, 1])
def test_a_fit_may_go_on_with_fewer_validation_loaders(num_skipped: int) -> None:
    loader = DataLoader(HOLDOUT, 16)
    run = fit(model := Still(), monitor := quick_risk(), val=[loader, loader], max_epochs=1)
    monitor.should_measure = lambda trainer: trainer.current_epoch > num_skipped  # type: ignore[method-assign]
    run.fit_loop.max_epochs = 2 + num_skipped
    with said() as texts:
        run.fit(model, batches_of(X, NOISY), loader)
    assert len(texts) == 1 and "keeps other validation samples" in texts[0]
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
    assert states[KEY]["history"] == monitor.history and sizes[1] - sizes[0] < 4000 + 50 * 100  # samples times bytes
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


ROW = {"epoch": 0, "step": 6, "dataloader_idx": 0, "reference": 0.5, "num_labels": 0, "curve": 1}
VERDICT = {"learner": 3, "features": "columns", "num_training": 9, "skill": "x", "majority": 1.0, "unexplained": 0.0}
STATES: list[Any] = [
    {"verdict": {"a": 1}}, {"history": [{"epoch": 0, "reference": 1}]}, {"history": None}, None, [1],
    {"history": [{**ROW, "expected_loss": "low"}]}, {"history": [ROW], "predicted": {"unseen": 3}},
    {"history": [ROW], "predicted": {"unseen": {}, "fingerprints": {}, "verdict": {**VERDICT, "is_trusted": True}}},
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_another_version_is_left_alone_with_a_warning(state: Any, tmp_path: Path) -> None:
    fit(Still(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"callbacks": {KEY: state}}, path)
    options = {"max_epochs": 2, "ckpt_path": path}
    data = batches_of(X, NOISY), DataLoader(HOLDOUT, 16)
    run, texts = fitted_and_said(monitor := quick_risk(), Still(), *data, **options)
    assert len(texts) == 1 and "leaves its state in the checkpoint alone: another version may have saved it" in texts[0]
    assert len(values(run)) == len(monitor.history) == 1 and monitor.summary["num_validations"] == 1


def test_predictions_of_samples_that_there_are_not_are_made_again(tmp_path: Path) -> None:
    fit(Still(), quick_risk(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][KEY]["predicted"]["unseen"][0]["indices"] += 10**6
    torch.save(checkpoint, path)
    with said():
        run = fit(Still(), quick_risk(), max_epochs=3, ckpt_path=path, num_sanity_val_steps=0)
    assert run.current_epoch == 3 and LOSS in values(run)[-1]


def test_two_monitors_of_different_prefixes_save_two_states(tmp_path: Path) -> None:
    def monitors() -> list[RiskMonitor]:
        return [quick_risk(), quick_risk(prefix="b/", num_samples=20)]

    fit(Still(), *monitors(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    fit(Still(), *(both := monitors()), max_epochs=2, ckpt_path=path)
    assert [len(each.history) for each in both] == [2, 2]
    assert both[0].history[0]["expected_loss"] != both[1].history[0]["expected_loss"]
