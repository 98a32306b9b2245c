"""A model in which a fault can be put at a chosen moment, and runs with and without the monitors."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, labelled, trainer

TAG = 50.0  # is added to the first feature of training samples, so that a fault can tell them

Hook = Callable[["Subject", Any], Any]


@dataclass(frozen=True)
class Fault:
    """What breaks, and what is expected: a warning of each monitor that matches, or an error; None for silence."""

    name: str
    sensitivity: str | None = None
    risk: str | None = None
    error: str | None = None  # in the sanity check, and before the first step; else a warning as at other moments
    moments: tuple[str, ...] = ("later",)
    x: Callable[[Subject, Tensor], Any] | None = None  # in eval mode, of validation samples
    y: Callable[[Subject, Tensor, Any], Any] | None = None  # the same, after the model
    kept: Callable[[Subject, Tensor, Any], Any] | None = None  # in eval mode, of training samples
    batch: Hook | None = None  # what becomes of a validation batch
    train: Hook | None = None  # what becomes of a training batch, at all moments
    epoch: Callable[[Subject], Any] | None = None  # before the epoch
    init: Callable[[Subject], Any] | None = None
    step: Callable[[Subject, Any], Tensor] | None = None  # gives the outputs, in a step
    options: dict[str, Any] = field(default_factory=dict)  # of both monitors
    s_options: dict[str, Any] = field(default_factory=dict)
    r_options: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)  # options of the Trainer
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    wrap: Callable[[Any], Any] = lambda loader: loader


class Subject(Classifier):
    """A classifier with a fault."""

    def __init__(self, fault: Fault, moment: str) -> None:
        super().__init__()
        self.fault, self.moment, self.losses = fault, moment, []
        self.calls = itertools.count()
        if fault.init:
            fault.init(self)

    @property
    def now(self) -> bool:
        if self._trainer is None:
            return False
        if self.trainer.sanity_checking or self.moment == "sanity":
            return self.trainer.sanity_checking and self.moment == "sanity"
        return self.current_epoch == ("first", "later").index(self.moment)

    def forward(self, x: Any) -> Any:
        fault = self.fault
        is_eval = self.now and not self.training
        is_tagged = (
            isinstance(x, Tensor) and x.ndim > 1 and len(x) > 0 and bool(x.flatten(1)[:, 0].float().mean() > TAG / 2)
        )
        if is_eval and not is_tagged and fault.x:
            x = fault.x(self, x)
        y = self.net(x)
        if is_eval and not is_tagged and fault.y:
            y = fault.y(self, x, y)
        return fault.kept(self, x, y) if is_eval and is_tagged and fault.kept else y

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        is_training = self.trainer.training
        if is_training and self.fault.train:
            return self.fault.train(self, batch)
        return self.fault.batch(self, batch) if not is_training and self.now and self.fault.batch else batch

    def on_train_epoch_start(self) -> None:
        if self.now and self.fault.epoch:
            with torch.random.fork_rng():
                self.fault.epoch(self)

    def outputs(self, batch: Any) -> Tensor:
        return self.fault.step(self, batch) if self.fault.step else self(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if len(batch) < 2:
            return None
        loss = self.fault.loss(self.outputs(batch), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, list) and len(batch) > 1:
            self.log("val_loss", torch.nan_to_num(self.fault.loss(self.outputs(batch), batch[1])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@dataclass
class Outcome:
    """How a run ended."""

    error: Exception | None
    warned: list[str]
    state: list[Tensor]
    model: Subject
    trainer: Trainer

    def of(self, name: str) -> list[str]:
        """What a monitor has warned of."""
        return [each for each in self.warned if each.startswith(f"`{name}`")]


def loaders() -> list[DataLoader[Any]]:
    training, validation = labelled(24), labelled(20, seed=1)
    training.tensors[0][:, 0] += TAG
    return [DataLoader(training, 8), DataLoader(validation, 8)]


def monitors(fault: Fault) -> list[Any]:
    return [SensitivityMonitor(**fault.options, **fault.s_options), RiskMonitor(**fault.options, **fault.r_options)]


def run(fault: Fault, moment: str, callbacks: Any = (), make: Any = Subject, **kwargs: Any) -> Outcome:
    """A fit of three epochs."""
    seed_everything(0, verbose=False)
    model = make(fault, moment)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0 if moment == "first" else 2, **fault.run, **kwargs}
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = trainer(callbacks=list(callbacks), **options)
        try:
            fit.fit(model, *map(fault.wrap, loaders()))
        except Exception as raised:
            error = raised
    # Weights, buffers, losses of each step, and where the random stream has come to.
    state = [*copy.deepcopy(model.state_dict()).values(), torch.tensor(model.losses), torch.get_rng_state()]
    return Outcome(error, [str(each.message) for each in caught], state, model, fit)


def assert_alike(own: Outcome, bare: Outcome) -> None:
    """The same end, bit by bit."""
    ends = [(type(each.error), str(each.error)) for each in (own, bare)]
    assert ends[0] == ends[1], ends
    assert len(own.state) == len(bare.state)
    pairs = zip(own.state, bare.state, strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "training has changed"
    assert not own.model._forward_hooks and not own.model._forward_pre_hooks
    assert own.trainer.global_step == bare.trainer.global_step
