"""What happens around a run: Ctrl-C, what is checked and warned of, who watches, and what Lightning hands in."""

import itertools
import operator
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.trainer import check_run
from tests.helpers import Classifier, Linear, Scheduled, fitted, loader, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]


class Interrupted(Classifier):
    """Ctrl-C in one of the passes in eval mode after the sanity check: of our own, or of `validation_step`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.trainer.sanity_checking and next(self.passes_to_come) == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def snapshot(model: LightningModule) -> Any:
    """Weights, buffers, modes and random state."""
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()


# In this order: a training batch is kept; of all validation batches clean and noisy, at a layer; the training samples
# and a twin of them; twins; the steps.
@pytest.mark.parametrize("num_passes", range(8))
def test_ctrl_c_leaves_everything_as_it_was(num_passes: int) -> None:
    model, first, before = Interrupted(), Callback(), list[Any]()
    model.passes_to_come = itertools.count(num_passes, -1)
    first.on_train_batch_start = lambda run, model, *_: before.append(snapshot(model))
    first.on_validation_batch_start = first.on_train_batch_start
    monitors = [SensitivityMonitor(), SensitivityMonitor(at="net.0", prefix="b_"), RiskMonitor(num_training_samples=8)]
    run = trainer(callbacks=[first, *monitors], precision="bf16-mixed")
    with pytest.raises(SystemExit):  # Lightning's way to end on Ctrl-C
        run.fit(model, loader(64, seed=1), loader())
    assert run.state.status == "interrupted"
    assert snapshot(model) == before[-1]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not torch.nn.modules.module._global_forward_hooks
    assert "log" not in vars(model) and "predict_step" not in vars(model)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


# What is checked before a run


def without(name: str, kind: Any = Classifier, base: Any = LightningModule) -> Any:
    return type("Lacking", (kind,), {name: getattr(base, name)})()


class Drawing(Classifier):
    def validation_step(self, dataloader_iter: Any) -> None: ...


def writing(write: Any = lambda bias: bias.detach().clamp_(max=0.9)) -> Linear:
    def hook(net: Any, args: Any) -> None:
        write(net.bias)

    model = Linear()
    model.net.register_forward_pre_hook(hook)
    return model


class Paired(Linear):
    """Its ``forward`` takes whole batches, as a batch of two samples could seem to be."""

    def forward(self, batch: Any) -> Tensor:
        x, _ = batch
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


class Taught(Linear):
    """Its ``forward`` writes to a teacher that is hidden in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers = [nn.Linear(1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teachers[0].bias.mul_(0.9)
        return self.net(x)


UNSEEN, WRITES = {"num_sanity_val_steps": 0}, "`forward` writes its parameters, here net.bias"
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no forward": (without("forward"), loader(), {}, "needs a `forward` that returns the logits"),
    "no step": (without("validation_step"), loader(), {}, "`def validation_step.*pass` is enough"),
    "no loader": (Classifier(), None, {}, "needs a validation loop: pass `val_dataloaders`"),
    "no batches": (Classifier(), loader(), {"limit_val_batches": 0}, "leave `limit_val_batches` above 0"),
    "an iterator": (Drawing(), loader(), {}, "takes `dataloader_iter`"),
    "writes": (writing(), loader(), {}, WRITES),
    "writes, unseen": (writing(), loader(), UNSEEN, WRITES),
    "writes to a hidden module": (Taught(), loader(), {}, "`forward` writes its parameters, here Linear.*bias"),
    "assigns": (writing(lambda bias: setattr(bias, "data", bias.data + 0.1)), loader(), {}, WRITES),
}


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.filterwarnings("ignore:.*(Skipping val loop|`dataloader_iter` step flavor)")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_run_is_refused_before_the_first_step(name: str, monitor: Any) -> None:
    model, val, options, match = REFUSED[name]
    run = trainer(callbacks=[monitor()], **options)
    with pytest.raises(MisconfigurationException, match=f"`{monitor.__name__}` .*{match}"):
        run.fit(model, loader(), val)
    assert run.global_step == 0


@pytest.mark.parametrize("options", [{}, UNSEEN])
def test_a_forward_of_whole_batches_is_refused_before_the_first_step(options: dict[str, Any]) -> None:
    run = trainer(callbacks=[SensitivityMonitor()], **options)
    with pytest.raises(MisconfigurationException, match="too many values to unpack.*`inputs="):
        run.fit(Paired(), loader(), loader())
    assert run.global_step == 0


def test_strategies_that_can_not_be_measured_under_are_refused() -> None:
    other, model, lacking = pytest.importorskip("pytorch_lightning.strategies"), BoringModel(), BoringModel()
    lacking.allow_zero_length_dataloader_with_multiple_devices = True
    kinds = DeepSpeedStrategy, other.DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    cases = [(kind.__new__(kind), model, "does not support sharded weights") for kind in kinds]
    cases.append((None, lacking, "needs a batch in every process"))
    for strategy, module, match in cases:
        run = SimpleNamespace(strategy=strategy, datamodule=None, world_size=2, enable_validation=True)
        with pytest.raises(MisconfigurationException, match=f"`M` {match}"):
            check_run("M", run, module, "fit")


def test_monitors_that_log_the_same_names_need_two_prefixes() -> None:
    for kind in MONITORS:
        for other in (kind, type("Sub", (kind,), {})):
            with pytest.raises(MisconfigurationException, match="`prefix` should be different in monitors"):
                fitted([kind(), other()], Classifier())
    fitted([kind(prefix=prefix) for prefix in ("val_", "b_") for kind in MONITORS], Classifier(), fast_dev_run=True)


NAME = "val_output_sensitivity"
HOOKS = "on_validation_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("hook", [*HOOKS, "on_train_batch_end"])
def test_a_name_that_another_callback_logs_stays_its_own(hook: str, is_first: bool) -> None:
    def fit(**options: Any) -> Any:
        other, history = Callback(), helpers.History()
        setattr(other, hook, lambda run, model, *_: model.log(NAME, 1.0, on_step=False, on_epoch=True))
        order = [other, SensitivityMonitor()] if is_first else [SensitivityMonitor(), other]
        run = fitted([*order, history], Classifier(), **options)
        return [*history.epochs, helpers.logged(run)]

    if hook != "on_train_batch_end":  # which the sanity check does not see
        with pytest.raises(MisconfigurationException, match=f"`SensitivityMonitor` logs `{NAME}`, .*prefix="):
            fit()
    with pytest.warns(UserWarning, match=f"`SensitivityMonitor` .* logs `{NAME}`, .*prefix="):
        epochs = fit(num_sanity_val_steps=0, max_epochs=3)
    assert epochs[-1][NAME] == 1 and epochs[-1][NAME + "_stderr"] > 0
    assert hook == "on_train_batch_end" or all(epoch[NAME] == 1 for epoch in epochs)


# Who watches our values


def test_who_watches_a_value_the_wrong_way_or_more_often_than_it_comes_is_warned_of(tmp_path: Path) -> None:
    model = type("Plateau", (Scheduled, Classifier), {"waits_for": "val_output_sensitivity/dataloader_idx_0"})()
    ours, risk = "val_output_sensitivity/dataloader_idx_1", "val_risk_estimate/dataloader_idx_0"
    kinds = [(kind, mode) for kind in (EarlyStopping, ModelCheckpoint) for mode in ("min", "max")]
    callbacks = [kind(monitor=name, mode=mode) for kind, mode in kinds for name in (ours, risk)]
    callbacks += [SensitivityMonitor(), RiskMonitor(every_n_epochs=2)]
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 1}
    with pytest.warns(UserWarning) as caught:
        fitted(callbacks, model, val=[loader(), loader(seed=1)], **options)
    warned = [each for each in caught if re.search("imizes|sees a stale", str(each.message))]
    expected = [f"maximizes `{risk}`, ", f"minimizes `{ours}`, ", *2 * [f"sees a stale `{risk}`"]]
    expected = [f"`{kind}` {what}" for kind in ("EarlyStopping", "ModelCheckpoint") for what in expected]
    expected.append("`ReduceLROnPlateau` minimizes `val_output_sensitivity/dataloader_idx_0`, ")
    texts = sorted(str(each.message) for each in warned)
    assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True))
    assert {each.filename for each in warned} == {helpers.__file__}


# The loops of Lightning


def test_predict_is_left_alone() -> None:
    model = without("forward")
    model.predict_step = lambda batch, batch_idx: batch[0]
    assert len(trainer(callbacks=[SensitivityMonitor(), RiskMonitor()]).predict(model, loader())) == len(loader())


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_the_other_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = nn.Linear(12, 4), 1.0

        forward, configure_optimizers = Linear.forward, Linear.configure_optimizers
        training_step, validation_step = Linear.training_step, Classifier.validation_step

    def fit(make: Any, *monitors: Any) -> Any:
        torch.manual_seed(0)
        logger = other.loggers.TensorBoardLogger(tmp_path, name=None)
        return fitted([*monitors], make(), kind=other.Trainer, logger=logger, max_epochs=1)

    with pytest.raises(MisconfigurationException, match="needs a `validation_step`"):
        fit(lambda: without("validation_step", Model, other.LightningModule), SensitivityMonitor())
    run = fit(Model, SensitivityMonitor(2.0), RiskMonitor())
    assert run.callback_metrics["val_loss"] == fit(Model).callback_metrics["val_loss"]
    assert {"val_output_sensitivity", "val_risk_estimate"} <= run.callback_metrics.keys()
    run.logger.experiment.flush()
    (events,) = Path(run.logger.log_dir).glob("events*")
    assert b"custom_scalars" in events.read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 on jsonargparse 4.5
def test_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    arguments = [
        (
            "SensitivityMonitor",
            {"noise": [0.1] * 12, "num_draws": 2, "inputs": "tests.helpers.first_tensor", "prefix": "b/"},
        ),
        ("SensitivityMonitor", {"at": "net", "outputs": "operator.pos"}),
        ("RiskMonitor", {"task": "multiclass", "num_samples": None}),
    ]
    config = [{"class_path": f"lightning_sensitivity.{name}", "init_args": given} for name, given in arguments]
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, "logger": False}
    cli = LightningCLI(Linear, run=False, args={"trainer": options | {"callbacks": config}}, save_config_callback=None)
    first, second, third = [each for each in cli.trainer.callbacks if isinstance(each, tuple(MONITORS))]
    assert first.inputs is helpers.first_tensor and second.outputs is operator.pos and third.num_samples is None
    cli.trainer.fit(cli.model, loader(), loader())
    assert {
        "b/output_sensitivity",
        "val_output_sensitivity",
        "val_risk_estimate",
    } <= cli.trainer.callback_metrics.keys()
