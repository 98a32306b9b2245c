"""What is refused before the first training step, and what is said after it: a monitor never ends a run."""

import gc
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Linear, fitted, labelled, loader, refused, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]
BEFORE = [{}, {"num_sanity_val_steps": 0}]  # in the sanity check, and in the first training batch without one
SENSITIVITY = "val_output_sensitivity"


def said(monitors: Any, model: Any, **options: Any) -> list[str]:
    """What monitors say in a fit."""
    with helpers.said() as texts:
        fitted(monitors, model, **options)
    return texts


class Acting(Linear):
    """Its forward calls a function of the module, the inputs and the epoch in eval mode, where only our passes are."""

    def __init__(self, act: Callable[[Any, Tensor, int], Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.act(self, x, -1 if self.trainer.sanity_checking else self.current_epoch)
        return self.net(x)


def failing(error: Exception, when: Callable[[Tensor, int], bool] = lambda x, epoch: True) -> Acting:
    def act(model: Any, x: Tensor, epoch: int) -> None:
        if when(x, epoch):
            raise error

    return Acting(act)


# Failures


@pytest.mark.parametrize("options", BEFORE)
@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize(("error", "match"), [
    (TypeError("of the user"), "TypeError: of the user. If `forward` takes other arguments, set `inputs="),
    (ValueError("of the user"), "of the user.( If| See https:)"),
    (NotImplementedError(), "NotImplementedError: a method that the model needs, .* is missing"),
    (MisconfigurationException("Do this."), "Do this. See https:"),
])  # fmt: skip
def test_a_failure_before_the_first_step_is_an_error_that_says_what_to_do(
    options: Any, kind: Any, error: Exception, match: str
) -> None:
    text = refused(kind(), failing(error), **options)
    what = "cannot estimate the risk" if "RiskMonitor" in text and options else "could not measure .*"
    assert re.match(rf"`{kind.__name__}` {what}: {match}", text)


def test_running_out_of_memory_before_the_first_step_stays_the_error_that_it_is() -> None:
    run = trainer(callbacks=[SensitivityMonitor()])
    with pytest.raises(torch.cuda.OutOfMemoryError):  # which the batch-size finder looks for
        run.fit(failing(torch.cuda.OutOfMemoryError("CUDA out of memory.")), loader(), loader())


def test_failures_are_said_at_1_2_4_and_8_of_them_and_leave_gaps_in_the_curve(tmp_path: Path) -> None:
    model = failing(KeyError("an error of the user"), lambda x, epoch: epoch in range(1, 10))
    logger, history = CSVLogger(tmp_path, name=None), helpers.History()
    stopping = EarlyStopping(SENSITIVITY, patience=20, mode="max")
    callbacks = [SensitivityMonitor(), RiskMonitor(), history, stopping]
    texts = said(callbacks, model, logger=logger, log_every_n_steps=1, max_epochs=12)
    for name in ("SensitivityMonitor", "RiskMonitor"):
        mine = [text for text in texts if text.startswith(f"`{name}` (val_*)")]
        assert len(mine) == 4 and all("KeyError: 'an error of the user'. This epoch has" in each for each in mine)
    rows = helpers.csv_rows(logger.log_dir)
    for name in (SENSITIVITY, f"{SENSITIVITY}_stderr", "val_risk_estimate", "val_risk_variance"):
        assert [int(row["epoch"]) for row in rows if row[name]] == [0, 10, 11]  # nothing old as if it were new
    assert stopping.stopped_epoch == 0 and len(history.epochs) == 12
    curve = [epoch[SENSITIVITY] for epoch in history.epochs]
    assert len({*curve[:10]}) == 1 and len({*curve[9:]}) == 3


def warning(model: Any, x: Tensor, epoch: int) -> None:
    if epoch > 0:
        warnings.warn("a warning of the user", stacklevel=1)


def warning_batch(batch: Any) -> Any:
    warnings.warn("a warning of the user", stacklevel=1)
    return batch[0]


@pytest.mark.parametrize("monitor", [
    SensitivityMonitor(), RiskMonitor(), SensitivityMonitor(inputs=warning_batch), RiskMonitor(features=warning_batch)
])  # fmt: skip
def test_warnings_that_are_errors_pass_through(monitor: Any) -> None:
    with pytest.raises(UserWarning, match="a warning of the user"):
        fitted([monitor], Acting(warning))


# State that is not put back


class Helper:
    """An object that is no module."""

    def __init__(self) -> None:
        self.count = 0


def with_state(act: Callable[[Any, Tensor, int], Any]) -> Acting:
    model = Acting(act)
    model.helper, model.teachers, model.nested = Helper(), [nn.Linear(1, 1)], {"a": {"b": [1]}}
    model.items, model.count = [1], 0
    model.register_buffer("memory", torch.zeros(2))
    return model


def add(owner: Any, name: str) -> None:
    setattr(owner, name, getattr(owner, name) + 1)


def write(parameter: nn.Parameter) -> None:
    parameter.detach().mul_(0.9)


WRITES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a parameter": (lambda m: write(m.net.bias), "net.bias"),
    "its data": (lambda m: setattr(m.net.bias, "data", m.net.bias.data + 0.1), "net.bias"),
    "a hidden module": (lambda m: write(m.teachers[0].bias), r"teachers\[0\].bias"),
    "a counter of an object": (lambda m: add(m.helper, "count"), "helper.count"),
    "a nested container": (lambda m: m.nested["a"]["b"].append(2), r"nested\['a'\]\['b'\]"),
}


@pytest.mark.parametrize("options", BEFORE)
@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize("name", WRITES)
def test_a_forward_that_writes_in_eval_mode_is_refused_by_name(name: str, kind: Any, options: Any) -> None:
    act, what = WRITES[name]
    text = refused(kind(), with_state(lambda m, x, epoch: act(m)), **options)
    assert re.match(rf"`{kind.__name__}` would change the model: its `forward` writes to {what}.* in eval mode", text)
    assert "only `if self.training`" in text


@pytest.mark.parametrize("name", ["a parameter", "its data", "a hidden module"])
def test_parameters_that_are_written_from_some_epoch_on_are_said_once(name: str) -> None:
    act, what = WRITES[name]
    texts = said([SensitivityMonitor()], with_state(lambda m, x, epoch: act(m) if epoch > 0 else None), max_epochs=4)
    assert len(texts) == 1 and re.search(rf"its `forward` writes to {what} in eval mode", texts[0])


@pytest.mark.parametrize("options", BEFORE)
def test_state_that_is_put_back_may_be_written(options: Any) -> None:
    def act(m: Any, x: Tensor, epoch: int) -> None:
        add(m, "count"), m.memory.add_(1), m.items.append(2), m.nested.update(c=3)
        m.register_buffer("late", torch.ones(1))

    model = with_state(act)
    assert said([SensitivityMonitor(), RiskMonitor()], model, max_epochs=1, **options) == []
    assert (model.count, model.items, model.nested) == (0, [1], {"a": {"b": [1]}})
    assert not model.memory.any() and not hasattr(model, "late")


# What belongs to the user


class Resource:
    """It counts copies of itself, and deletes its folder when it goes."""

    num_copies = num_deleted = 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.lock = folder, threading.Lock()
        folder.mkdir()

    def __del__(self) -> None:
        Resource.num_deleted += 1
        shutil.rmtree(self.folder, ignore_errors=True)

    def copied(self, *args: Any) -> Any:
        Resource.num_copies += 1
        return object(), ()

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = copied


class Data(Resource, LightningDataModule): ...


def test_objects_of_the_user_are_neither_copied_nor_freed(tmp_path: Path) -> None:
    Resource.num_copies = Resource.num_deleted = 0
    np.save(tmp_path / "map.npy", np.zeros(10))
    own: dict[str, Any] = {
        "cache": Resource(tmp_path / "cache"),
        "data": Data(tmp_path / "data"),
        "collected": [Resource(tmp_path / "listed"), torch.rand(9)],  # such as outputs of a validation
        "sets": (labelled(10), Resource(tmp_path / "paired")),
        "vocabulary": {str(index): index for index in range(60_000)},
        "memory_map": np.load(tmp_path / "map.npy", mmap_mode="r"),
    }

    def ids(owner: Any) -> tuple[int, ...]:
        return tuple(map(id, [*(value for name, value in owner.items() if name != "collected"), *owner["collected"]]))

    seen = set[tuple[int, ...]]()
    model = Acting(lambda m, x, epoch: seen.add(ids({name: getattr(m, name) for name in own})))
    for name, value in own.items():
        setattr(model, name, value)
    assert said([SensitivityMonitor(), RiskMonitor()], model) == []
    gc.collect()
    assert (Resource.num_copies, Resource.num_deleted) == (0, 0) and own["cache"].folder.exists()
    assert seen == {ids(own)} and all(getattr(model, name) is value for name, value in own.items())
