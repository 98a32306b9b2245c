"""The risk estimate by a plain loop: what RiskMonitor has to log."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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
from lightning_sensitivity.functional import (
    fit_reference,
    principal_components,
    reference_weight,
    risk_estimate,
    variance_factor,
)
from lightning_sensitivity.functional.risk import TWIN_STRENGTH as STRENGTH
from lightning_sensitivity.model import noise_generator
from lightning_sensitivity.model.twins import batch_statistics, copy_weights, has_batch_norm, twin_weights
from tests.helpers import Classifier, History, fitted, inputs

HOLDOUT = inputs(50, seed=1)  # in four batches, measured together: four twins for each half
NAMES = ["val_" + name for name in RiskMonitor.names]
REFERENCE_NAMES = ["val_risk_reference", "val_risk_reference_weight"]


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs).reshape(outputs.shape))


class Plain(Classifier):
    """Without batch norm; in 64 bits, in which sums in another order are the same to nine digits."""

    def __init__(self, num_outputs: int = 4, loss: Any = cross_entropy) -> None:
        super().__init__()
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
        batch_size: Of batches that are measured by themselves; None for joint passes, with other twins for each half.
    """

    def __init__(
        self,
        task: str = "multiclass",
        holdout: Tensor = HOLDOUT,
        features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = standardized,
        max_batches: int = 4,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.task, self.holdout, self.features, self.max_batches = task, holdout, features, max_batches
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
        model, (x, y) = copy.deepcopy(pl_module), (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        if self.sizes is None:
            labels = trainer.train_dataloader.dataset.tensors[-1]
            num_labelled = int((labels.reshape(len(labels), -1) != -100).any(1).sum())
            self.sizes = num_labelled, sum(p.numel() for p in model.parameters() if p.requires_grad)
        clean, compared, twins = self.passes(model)
        training = self.outputs(model, x)
        options = {"task": self.task, "strength": STRENGTH, "factor": variance_factor(*self.sizes)}
        # With batch norm, what is compared with twins is normalized by the batch, as they are.
        terms = risk_estimate(clean, twins, training, y, **options)._asdict()
        terms["variance"] = risk_estimate(compared, twins, training, y, **options).variance
        terms["estimate"] = sum(term for name, term in terms.items() if name != "estimate")
        found = {f"val_risk_{name}": float(term) for name, term in terms.items()}
        self.terms.append(found if self.features is None else self.with_reference(model, x, y, found))

    def outputs(self, model: Any, x: Tensor) -> Tensor:
        return torch.cat([model(part) for part in x.split(self.batch_size or len(x))])

    def passes(self, model: Any) -> list[Tensor]:
        """Outputs for each pass of a twin: clean, those that it is compared with, and its own."""
        parts = self.holdout.split(self.batch_size or -(-len(self.holdout) // 2))
        passes, num_draws = [], math.ceil(8 / len(parts))
        for place, part in enumerate(parts):
            for draw in range(num_draws):
                key = (0, num_draws * place + draw) if self.batch_size is None else (place, draw)
                weights = twin_weights(model, self.initial, noise_generator(0, 0, 0, *key), STRENGTH)
                clean = model(part)
                with batch_statistics(model) if has_batch_norm(model) else nullcontext():
                    passes.append((clean, model(part), functional_call(model, weights, (part,))))
        return [torch.cat(each) for each in zip(*passes, strict=True)]

    def with_reference(self, model: Any, x: Tensor, y: Tensor, found: dict[str, float]) -> dict[str, float]:
        """Add the score by the agreement with the reference."""
        outputs, num_training = self.outputs(model, x), self.sizes[0]
        has_label = (y.reshape(len(y), -1) != -100).all(1)
        is_index = self.task == "multiclass" and not y.is_floating_point()
        y = one_hot(y.long().clamp(0), outputs.shape[1]) if is_index else y.reshape(len(y), -1)
        y = y.double()
        features, new_features = self.features(x, self.holdout)
        reference = fit_reference(features[has_label], y[has_label], new_features, self.task)
        p, y = self.vectors(self.probabilities(outputs)[has_label]), self.vectors(y[has_label])
        new_p, q = (
            self.vectors(self.probabilities(self.outputs(model, self.holdout))),
            self.vectors(reference.predictions),
        )
        s = y.mean(0)
        agreement, training_agreement = ((a * (b - s)).sum(1).mean() for a, b in ((new_p, q), (p, y)))
        self.largest = max(self.largest, float(agreement))
        if agreement > max(0.15 * self.largest, 0):
            self.ratios.append(float(training_agreement / agreement))
        factor = min(max(min(self.ratios, default=math.inf), 1.0), 3.0)
        powers = y.square().sum(1).mean() + new_p.square().sum(1).mean()
        score = float(powers - 2 * ((new_p @ s).mean() + factor * agreement))
        known = reference.score, reference.chance, reference.claim, reference.num_samples
        weight = reference_weight(*known, num_training)
        estimate = (found["val_risk_estimate"] + weight * score) / (1 + weight)
        return {**found, "val_risk_estimate": estimate, **dict(zip(REFERENCE_NAMES, (score, weight), strict=True))}

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1) if self.task == "multiclass" else outputs.reshape(len(outputs), -1).sigmoid()

    def vectors(self, p: Tensor) -> Tensor:
        """Vectors whose squared distance is the Brier score."""
        return p if self.task == "multiclass" else torch.cat([p, 1 - p], 1) / math.sqrt(2 * p.shape[1])

    def check(self, must_move: bool = True) -> None:
        """Compare what was logged to the plain loop, and check that epochs differ."""
        assert self.epochs and len(self.epochs) == len(self.terms)
        for values, terms in zip(self.epochs, self.terms, strict=True):
            ours = {name: value for name, value in values.items() if name.startswith("val_risk_")}
            assert ours == pytest.approx(terms, rel=1e-5, abs=1e-12)
        estimates = [terms["val_risk_estimate"] for terms in self.terms]
        assert not must_move or len(set(estimates)) == len(estimates)


def fit(model: Any, train: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    return fitted([*callbacks], model, train, DataLoader(HOLDOUT, 16), **{"max_epochs": 3, **kwargs})
