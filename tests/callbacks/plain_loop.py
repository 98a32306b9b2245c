"""The risk estimate by a plain loop over batches as they came: what RiskMonitor has to log."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.utils.data import DataLoader

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import fit_reference, principal_components, reference_weight, variance_factor
from lightning_sensitivity.functional.risk import TWIN_STRENGTH as STRENGTH
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.model import noise_generator
from lightning_sensitivity.model.twins import NUM_TWINS, batch_statistics, copy_weights, has_batch_norm, twin_weights
from tests.helpers import Classifier, History, fitted, inputs, risk_estimate

HOLDOUT = inputs(50, seed=1)  # in four batches, of 16, 16, 16 and 2
NAMES = ["val/" + name for name in RiskMonitor.names]
REFERENCE_NAMES = ["val/risk_reference", "val/risk_reference_weight"]


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs).reshape(outputs.shape))


class Plain(Classifier):
    """Without batch norm; in 64 bits, in which sums in another order are the same to nine digits."""

    def __init__(self, num_outputs: int = 4, loss: Any = cross_entropy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs))
        self.loss = loss
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1).double())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[-1])


def standardized(x: Tensor, new_x: Tensor) -> tuple[Tensor, Tensor]:
    """The features that the reference makes of numbers."""
    return principal_components(x.flatten(1).float(), new_x.flatten(1).float())


class Truth(History):
    """What a plain loop gives at each validation, by twins of the weights from before the first step.

    Args:
        task: The kind of classification.
        holdout: The validation samples, in one loader.
        features: Turns training and validation samples into features of the reference; None for no reference.
        max_batches: How many batches of a fit are kept.
        batch_size: Of the validation loader.
        scored: The indices of the kept batches that are run; None for all.
    """

    def __init__(
        self,
        task: str = "multiclass",
        holdout: Tensor = HOLDOUT,
        features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = standardized,
        max_batches: int = 4,
        batch_size: int = 16,
        scored: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self.task, self.features, self.max_batches = TASKS[task], features, max_batches
        self.parts, self.scored = holdout.split(batch_size), scored
        self.initial: dict[str, Tensor] = {}
        self.batches: list[list[Tensor]] = []
        self.sizes: tuple[int, int] | None = None  # n and w
        self.ratios: list[float] = []
        self.largest = 0.0
        self.terms: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.initial = self.initial or copy_weights(dict(pl_module.named_parameters()))
        if len(self.batches) < self.max_batches:
            self.batches.append([part.clone() for part in batch])

    @torch.no_grad()
    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.sanity_checking or batch_idx:
            return
        model = copy.deepcopy(pl_module)
        if self.sizes is None:
            labels = trainer.train_dataloader.dataset.tensors[-1]
            num_labelled = int((labels.reshape(len(labels), -1) != -100).any(1).sum())
            self.sizes = num_labelled, sum(p.numel() for p in model.parameters() if p.requires_grad)
        x, y = [batch[0] for batch in self.batches], torch.cat([batch[1] for batch in self.batches])
        training = torch.cat([model(part) for part in x])
        is_scored = torch.cat([torch.full((len(part),), self.scores(place)) for place, part in enumerate(x)])
        clean, baseline, twins = self.passes(model)
        options = {"task": self.task.name, "strength": STRENGTH, "factor": variance_factor(*self.sizes)}
        terms = risk_estimate(clean, twins, training[is_scored], y[is_scored], baseline=baseline, **options)
        found = {f"val/risk_{name}": float(term) for name, term in terms._asdict().items()}
        if self.features is not None:
            new_outputs = torch.cat([model(part) for part in self.parts])
            found |= self.with_reference(torch.cat(x), y, is_scored, training, new_outputs, found["val/risk_estimate"])
        self.terms.append(found)

    def scores(self, place: int) -> bool:
        return self.scored is None or place in self.scored

    def passes(self, model: Any) -> list[Tensor]:
        """Outputs for each batch and twin: clean ones, those that the twin is compared with, and its own."""
        passes, count = [], len(self.parts)
        for place, part in enumerate(self.parts):
            # Of few batches each has two twins of its own; else all twins are dealt out in the order.
            for number in (2 * place, 2 * place + 1) if count < NUM_TWINS else (place * NUM_TWINS // count,):
                weights = twin_weights(model, self.initial, noise_generator(0, 0, 0, 0, number), STRENGTH)
                clean = model(part)
                with batch_statistics(model) if has_batch_norm(model) else nullcontext():
                    passes.append((clean, model(part), functional_call(model, weights, (part,))))
        return [torch.cat(each) for each in zip(*passes, strict=True)]

    def with_reference(
        self, x: Tensor, y: Tensor, is_scored: Tensor, outputs: Tensor, new_outputs: Tensor, estimate: float
    ) -> dict[str, float]:
        """The score by the agreement with the reference, its weight, and the estimate with it."""
        has_label = (y.reshape(len(y), -1) != -100).all(1)
        is_index = self.task.name == "multiclass" and not y.is_floating_point()
        y = (one_hot(y.long().clamp(0), outputs.shape[1]) if is_index else y.reshape(len(y), -1)).double()[has_label]
        features, new_features = self.features(x, torch.cat(self.parts))
        reference = fit_reference(features[has_label], y, new_features, self.task.name)
        p, new_p, y, q = (
            self.task.as_vectors(each.reshape(len(each), -1))
            for each in (
                self.task.probabilities(outputs)[has_label],
                self.task.probabilities(new_outputs),
                y,
                reference.predictions,
            )
        )
        s = y.mean(0)
        p, y = p[is_scored[has_label]], y[is_scored[has_label]]
        agreement, training_agreement = ((a * (b - s)).sum(1).mean() for a, b in ((new_p, q), (p, y)))
        self.largest = max(self.largest, float(agreement))
        if agreement > max(0.15 * self.largest, 1e-4):
            self.ratios.append(float(training_agreement / agreement))
        factor = min(max(min(self.ratios, default=math.inf), 1.0), 3.0)
        powers = y.square().sum(1).mean() + new_p.square().sum(1).mean()
        score = float(powers - 2 * ((new_p @ s).mean() + factor * agreement))
        known = reference.score, reference.chance, reference.claim, reference.num_samples
        weight = reference_weight(*known, self.sizes[0])
        combined = (estimate + weight * score) / (1 + weight)
        return {"val/risk_estimate": combined, **dict(zip(REFERENCE_NAMES, (score, weight), strict=True))}

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare what was logged to the plain loop, and check that epochs differ."""
        assert self.epochs and len(self.epochs) == len(self.terms)
        for values, terms in zip(self.epochs, self.terms, strict=True):
            assert {name: values[name] for name in terms} == pytest.approx(terms, rel=1e-5, abs=1e-12)
        estimates = [terms["val/risk_estimate"] for terms in self.terms]
        assert len(set(estimates)) == len(estimates)


def fit(model: Any, train: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    return fitted([*callbacks], model, train, DataLoader(HOLDOUT, 16), **{"max_epochs": 3, **kwargs})
