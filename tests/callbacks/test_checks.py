"""What is refused before the first training step, and what is said after it: a monitor never ends a run."""

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Acting, Linear, failing, fitted, loader, logged, refused, trainer

MONITORS = [SensitivityMonitor, RiskMonitor]
BEFORE = [{}, {"num_sanity_val_steps": 0}]  # in the sanity check, and in the first training batch without one
SENSITIVITY = "val/output_sensitivity"


def said(*args: Any, **options: Any) -> list[str]:
    """What monitors say in a fit."""
    return helpers.fitted_and_said(*args, **options)[1]


# Failures


@pytest.mark.parametrize("options", BEFORE)
@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize(("error", "match"), [
    (TypeError("of the user"), "TypeError: of the user. If `forward` takes other arguments, set `inputs="),
    (TypeError("perturb a label"), "TypeError: perturb a label. If .* See docs/troubleshooting.md#arguments"),
    (ValueError("of the user"), "of the user.( If| See docs)"),
    (MisconfigurationException("Do this."), "Do this. See docs"),
])  # fmt: skip
def test_a_failure_before_the_first_step_is_an_error_that_says_what_to_do(
    options: Any, kind: Any, error: Exception, match: str
) -> None:
    if kind is SensitivityMonitor and options:
        return  # without a sanity check it has no pass before the first step
    text = refused(kind(), failing(error), **options)
    what = "cannot measure the risk" if "RiskMonitor" in text and options else "could not .*"
    assert re.match(rf"`{kind.__name__}` {what}: {match}", text)


def test_lazy_weights_are_refused_by_name_without_a_sanity_check() -> None:
    model = Linear()
    model.net = nn.LazyLinear(4)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    assert "some are lazy: run it once" in refused(RiskMonitor(), model, num_sanity_val_steps=0)


def test_running_out_of_memory_before_the_first_step_stays_the_error_that_it_is() -> None:
    run = trainer(callbacks=[SensitivityMonitor()])
    with pytest.raises(torch.cuda.OutOfMemoryError):  # which the batch-size finder looks for
        run.fit(failing(torch.cuda.OutOfMemoryError("CUDA out of memory.")), loader(), loader())


def test_failures_are_said_at_1_2_4_and_8_of_them_and_leave_gaps_in_the_curve(tmp_path: Path) -> None:
    model = failing(KeyError("an error of the user"), lambda x, epoch: epoch in range(1, 10))
    logger = CSVLogger(tmp_path, name=None)
    stopping = EarlyStopping(SENSITIVITY, patience=20, mode="max")
    monitors, options = [SensitivityMonitor(), RiskMonitor()], {"logger": logger, "log_every_n_steps": 1}
    texts = said([*monitors, stopping], model, max_epochs=12, **options)
    for name in ("SensitivityMonitor", "RiskMonitor"):
        mine = [text for text in texts if text.startswith(f"`{name}` (val/*) could")]
        counts = [re.findall("It has failed (.) times", text) for text in mine]
        assert counts == [[], ["2"], ["4"], ["8"]]  # in the text, since Python drops warnings of equal text
        assert all("KeyError: 'an error of the user'. This epoch has" in text for text in mine)
    rows = helpers.csv_rows(logger.log_dir)
    for name in (SENSITIVITY, f"{SENSITIVITY}_stderr", "val/risk_criterion", "val/risk_ranking"):
        assert [int(row["epoch"]) for row in rows if row[name]] == [0, 10, 11]  # nothing old as if it were new
    curve = [epoch[SENSITIVITY] for epoch in model.trainer.epochs]
    assert stopping.stopped_epoch == 0 and len(curve) == 12
    assert curve[:10] == pytest.approx(curve[:1] * 10) and len({*curve[9:]}) == 3


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


def count(helper: Any) -> int:
    helper.count += 1
    return helper.count


NOT_RESTORED: dict[str, Callable[[Any], float]] = {
    "a nested container": lambda m: len(m.nested["a"]["b"].append(2) or m.nested["a"]["b"]),
    "a helper object": lambda m: count(m.helper),
    "numbers of NumPy": lambda m: np.random.rand(),
    "numbers of Python": lambda m: random.random(),
}


@pytest.mark.parametrize("options", BEFORE)
@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize("name", NOT_RESTORED)
def test_a_forward_whose_outputs_depend_on_what_is_not_put_back_is_refused(name: str, kind: Any, options: Any) -> None:
    if kind is SensitivityMonitor and options:
        return
    model = Acting(lambda m, x, epoch: x.mul_(NOT_RESTORED[name](m)))
    model.helper, model.nested = SimpleNamespace(count=0), {"a": {"b": [1]}}
    text = refused(kind(), model, **options)
    assert "`forward` gives other outputs when it is called again on the same batch" in text
    assert "only `if self.training`" in text and text.endswith("#state")


@pytest.mark.parametrize("options", BEFORE)
def test_a_forward_that_writes_to_a_parameter_is_refused_at_first_and_later_costs_values(options: Any) -> None:
    def write(model: Any, x: Tensor, epoch: int) -> None:
        if epoch >= model.first_epoch:
            model.net.bias.detach().mul_(0.9)

    problem = "`forward` writes to net.bias in eval mode, which is not restored: do so only `if self.training`"
    for kind in MONITORS:
        model = Acting(write)
        model.first_epoch = -1
        if kind is RiskMonitor or not options:
            assert problem in refused(kind(), model, **options)
        model.first_epoch = 1
        texts = said([kind()], model, max_epochs=3, **options)
        assert len(texts) == 2 and all(problem in text for text in texts)


# What is logged


class OwnLog(Linear):
    """Its `log` takes no other arguments than a name and a value."""

    def log(self, name: str, value: Any) -> None:
        LightningModule.log(self, name, value)


class SameNames(Callback):
    """It logs the names of the monitors with other options."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name in (SENSITIVITY, "val/risk_criterion"):
            LightningModule.log(pl_module, name, 1.0, prog_bar=True, on_step=False, on_epoch=True, batch_size=1)


@pytest.mark.parametrize(("kind", "others", "error"), [(OwnLog, [], "TypeError"), (Linear, [SameNames()], "")])
def test_a_log_of_fewer_arguments_or_a_callback_with_the_same_names_costs_values_and_no_run(
    kind: Any, others: list[Callback], error: str
) -> None:
    texts = said([*others, SensitivityMonitor(), RiskMonitor()], model := kind())
    assert model.trainer.current_epoch == 2 and logged(model.trainer).get(SENSITIVITY, 1) == 1
    assert all("could not log `val/" in text and error in text for text in texts)
    for name in (SENSITIVITY, "val/risk_criterion"):
        assert any(f"could not log `{name}`" in text for text in texts)
