"""A model in which a fault can be put at a chosen moment, and runs with and without the monitors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, labelled, said, trainer

MARK = 50.0  # is added to the first feature of training samples, so that a fault can tell them


@dataclass(frozen=True)
class Fault:
    """What breaks, and what is expected: warnings of each monitor that match, or an error; None for silence."""

    sensitivity: str | None = None
    risk: str | None = None
    error: str | None = None  # in the sanity check; also before the first step, unless a warning is expected there
    moments: tuple[str, ...] = ("later",)
    x: Callable[[Subject, Tensor], Any] = lambda m, x: x  # in eval mode, of validation samples
    y: Callable[[Subject, Tensor, Any], Any] = lambda m, x, y: y  # the same, after the model
    kept: Callable[[Subject, Any], Any] = lambda m, y: y  # in eval mode, after the model, of training samples
    batch: Callable[[Subject, Any], Any] = lambda m, b: b  # what becomes of a validation batch
    train: Callable[[Subject, Any], Any] = lambda m, b: b  # what becomes of a training batch, at all moments
    epoch: Callable[[Subject], Any] = lambda m: None  # before the epoch
    init: Callable[[Subject], Any] = lambda m: None
    step: Callable[[Subject, Any], Tensor] = lambda m, b: m(b[0])  # gives the outputs, in a step
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    options: dict[str, Any] = field(default_factory=dict)  # of both monitors
    s_options: dict[str, Any] = field(default_factory=dict)
    r_options: dict[str, Any] = field(default_factory=dict)

    def monitors(self) -> list[Any]:
        return [SensitivityMonitor(**self.options, **self.s_options), RiskMonitor(**self.options, **self.r_options)]


class Subject(Classifier):
    """A classifier with a fault."""

    def __init__(self, fault: Fault, moment: str) -> None:
        super().__init__()
        self.fault, self.moment, self.losses = fault, moment, []
        type(self).calls = itertools.count()  # of the class, so that our passes count, too
        fault.init(self)

    @property
    def is_now(self) -> bool:
        if self._trainer is None:
            return False
        now = {0: "first", 1: "later"}.get(self.current_epoch)
        return self.moment == ("sanity" if self.trainer.sanity_checking else now)

    def forward(self, x: Tensor) -> Any:
        if self.training or not self.is_now:
            return self.net(x.float())
        if x.numel() and x.flatten(1)[:, 0].float().mean() > MARK / 2:
            return self.fault.kept(self, self.net(x.float()))
        x = self.fault.x(self, x)
        return self.fault.y(self, x, self.net(x.float()))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            return self.fault.train(self, batch)
        return self.fault.batch(self, batch) if self.is_now else batch

    def on_train_epoch_start(self) -> None:
        if self.is_now:
            with torch.random.fork_rng():
                self.fault.epoch(self)

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
    """A fit of three epochs."""
    seed_everything(0, verbose=False)
    model, error = make(fault, moment), None
    training, validation = labelled(24), labelled(20, seed=1)
    training.tensors[0][:, 0] += MARK
    options = {"max_epochs": 3, "num_sanity_val_steps": 0 if moment == "first" else 2, **kwargs}
    with said() as messages:
        fit = trainer(callbacks=list(callbacks), **options)
        try:
            fit.fit(model, *(data or [DataLoader(each, 8) for each in (training, validation)]))
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
