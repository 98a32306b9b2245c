"""A model in which a fault is put at a chosen moment, and runs with and without the monitors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, labelled, quick_risk, said, trainer

MARK = 2.0  # is the last feature of training samples, by which the model tells them from the others
Change = Callable[[Any], Any]


def as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Fault:
    """What breaks at which moment, and what is expected of each monitor.

    Attributes:
        sensitivity: What SensitivityMonitor warns of, a regular expression; None for silence.
        risk: What RiskMonitor warns of.
        error: What is an error instead: in the sanity check, and before the first step if no warning is expected.
        moments: When it breaks: in the ``"sanity"`` check, in the ``"first"`` epoch without one, or ``"later"``.
        validation_input: What becomes of validation samples in the model, in eval mode.
        validation_output: What becomes of its outputs for them.
        validation_batch: What becomes of a validation batch.
        training_batch: What becomes of a training batch, at all moments.
        before_epoch: What is done to the model before the epoch of the fault.
        before_fit: What is done to the model before the fit.
        step: How a step calls the model.
        loss: The loss.
        options: Options of both monitors.
        sensitivity_options: Options of SensitivityMonitor.
        risk_options: Options of RiskMonitor.
    """

    sensitivity: str | None = None
    risk: str | None = None
    error: str | None = None
    moments: tuple[str, ...] = ("later",)
    validation_input: Change = as_it_is
    validation_output: Change = as_it_is
    validation_batch: Change = as_it_is
    training_batch: Change = as_it_is
    before_epoch: Callable[[Any], object] = as_it_is
    before_fit: Callable[[Any], object] = as_it_is
    step: Callable[[Any, Any], Tensor] = lambda model, batch: model(batch[0])
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    options: dict[str, Any] = field(default_factory=dict)
    sensitivity_options: dict[str, Any] = field(default_factory=dict)
    risk_options: dict[str, Any] = field(default_factory=dict)

    def monitors(self) -> list[Any]:
        of_sensitivity = SensitivityMonitor(**self.options, **self.sensitivity_options)
        return [of_sensitivity, quick_risk(**self.options, **self.risk_options)]


def is_of_training(x: Tensor) -> bool:
    return x.numel() > 0 and float(x.flatten(1)[:, -1].float().mean()) > 0.7 * MARK


class Subject(Classifier):
    """A classifier with a fault."""

    def __init__(self, fault: Fault, moment: str) -> None:
        super().__init__()
        self.fault, self.moment, self.losses = fault, moment, []
        fault.before_fit(self)

    @property
    def is_now(self) -> bool:
        if self._trainer is None:
            return False
        now = {0: "first", 1: "later"}.get(self.current_epoch)
        return self.moment == ("sanity" if self.trainer.sanity_checking else now)

    def forward(self, x: Tensor) -> Any:
        if self.training or not self.is_now:
            return self.net(x.float())
        if is_of_training(x):
            return self.net(x.float())
        x = self.fault.validation_input(x)
        return self.fault.validation_output(self.net(x.float()))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            return self.fault.training_batch(batch)
        return self.fault.validation_batch(batch) if self.is_now else batch

    def on_train_epoch_start(self) -> None:
        if self.is_now:
            with torch.random.fork_rng():
                self.fault.before_epoch(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if len(batch) < 2:
            return None
        loss = self.fault.loss(self.fault.step(self, batch), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, list) and len(batch) > 1:
            self.log("val_loss", self.fault.loss(self.fault.step(self, batch), batch[1]).nan_to_num())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@dataclass
class Outcome:
    """How a run ended."""

    error: Exception | None
    messages: list[str]
    state: list[Tensor]
    model: Subject
    trainer: Trainer

    def warnings_of(self, monitor: str) -> list[str]:
        return [message for message in self.messages if message.startswith(f"`{monitor}`")]


def run(fault: Any, moment: str, callbacks: Any = (), make: Any = Subject, data: Any = None, **kwargs: Any) -> Outcome:
    """A fit of three epochs, of batches of 9, 9 and 6 training samples, and of 8, 8 and 4 validation samples."""
    seed_everything(0, verbose=False)
    model, error = make(fault, moment), None
    training, validation = labelled(24), labelled(20, seed=1)
    training.tensors[0][:, -1] = MARK
    options = {"max_epochs": 3, "num_sanity_val_steps": 0 if moment == "first" else 2, **kwargs}
    with said() as messages:
        fit = trainer(callbacks=list(callbacks), **options)
        try:
            fit.fit(model, *(data or [DataLoader(training, 9), DataLoader(validation, 8)]))
        except Exception as raised:
            error = raised
    # Weights, buffers, losses of each step, and where the random stream has come to.
    state = [*copy.deepcopy(model.state_dict()).values(), torch.tensor(model.losses), torch.get_rng_state()]
    return Outcome(error, messages, state, model, fit)


def assert_same_run(monitored: Outcome, bare: Outcome) -> None:
    """The same end, bit by bit."""
    assert (type(monitored.error), str(monitored.error)) == (type(bare.error), str(bare.error))
    pairs = zip(monitored.state, bare.state, strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "training has changed"
    assert not monitored.model._forward_hooks and not monitored.model._forward_pre_hooks
    assert monitored.trainer.global_step == bare.trainer.global_step
