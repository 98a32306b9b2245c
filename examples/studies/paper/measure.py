# %% [markdown]
# # What is measured on each network of the zoo, once
#
# Every network sees the test images twice, as they are and under noise. `PASS_SCORES` are functions of those outputs
# alone, `TRUTHS` of those outputs and the labels. Both are computed on all test images, and again (columns that end in
# `_calibrated`) on the second half of them with logits / T, where the temperature T is fitted to the labels of the
# first half. A script adds scores of its own as functions of a `Subject`, with `measure(..., scores={"name":
# function})`: they get the network, what it was before training, its images and its outputs, and their CPU time is
# kept.
#
# Outputs are kept beside the checkpoints as `NAME.npz`, and what was computed from them as `NAME.json`; a column that
# is there is not computed again, unless the checkpoint is newer.

# %%
from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm
from zoo import Images, Network, Spec, checkpoints, train_all

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import loss_estimate, output_sensitivity
from lightning_sensitivity.running import GaussianNoise, noise_generator

NOISE_STD = 0.1
KINDS = (
    "fully connected",
    "fully connected, N(0, 1)",
    "convolutional",
    "convolutional, N(0, 1)",
    "dropout",
    "max-pooling",
    "batch norm",
    "tanh, GELU, SiLU",
)


def kind(spec: Spec) -> str:
    """The first that applies, from the last of `KINDS`."""
    if spec.activation != "relu":
        return "tanh, GELU, SiLU"
    for applies, name in ((spec.batch_norm, "batch norm"), (spec.pool, "max-pooling"), (spec.dropout, "dropout")):
        if applies:
            return name
    return ("convolutional" if spec.conv_depth else "fully connected") + ", N(0, 1)" * (spec.init == "normal")


def shrunk(specs: Iterable[Spec], quick: bool) -> list[Spec]:
    """The networks themselves, or small ones for the --quick form."""
    small = [spec._replace(fc_width=spec.fc_width // 5, conv_width=max(4, spec.conv_width // 4)) for spec in specs]
    return small if quick else list(specs)


# %% What a network says
class Outputs(NamedTuple):
    """Logits of the same images without and with noise, in float64, and C = E[x²] / σ²."""

    clean: Tensor
    noisy: Tensor
    factor: float

    @property
    def change(self) -> Tensor:
        return self.noisy - self.clean

    @property
    def probabilities(self) -> Tensor:
        return self.clean.softmax(1)

    @property
    def probability_change(self) -> Tensor:
        return self.noisy.softmax(1) - self.clean.softmax(1)

    def calibrated(self, temperature: float) -> Outputs:
        half = len(self.clean) // 2
        return Outputs(self.clean[half:] / temperature, self.noisy[half:] / temperature, self.factor)


class Subject:
    """A network of the zoo with what belongs to it, loaded when it is asked for."""

    def __init__(self, spec: Spec, data: str, folder: Path | None, out: Path) -> None:
        self.spec, self.data, self.folder = spec, data, folder
        self.paths = checkpoints(spec, data, out)

    @cached_property
    def images(self) -> Images:
        images = Images(self.data, self.folder, self.spec.fold)
        images.setup("validate")
        return images

    @cached_property
    def model(self) -> Network:
        return Network.load_from_checkpoint(self.paths.trained, map_location="cpu").eval()

    @cached_property
    def untrained(self) -> Network:
        return Network.load_from_checkpoint(self.paths.untrained, map_location="cpu").eval()

    @cached_property
    def labels(self) -> Tensor:
        return self.images.test_set.tensors[1]

    @cached_property
    def outputs(self) -> Outputs:
        return self._outputs(self.paths.trained, lambda: self.model)

    @cached_property
    def untrained_outputs(self) -> Outputs:
        return self._outputs(self.paths.untrained, lambda: self.untrained)

    def _outputs(self, checkpoint: Path, model: Callable[[], Network]) -> Outputs:
        cache = checkpoint.with_suffix(".npz")
        if not is_fresh(cache, checkpoint):
            noise, generator, network = GaussianNoise(NOISE_STD), noise_generator(0), model()
            with torch.no_grad():
                batches = [(network(x), network(noise(x, generator))) for x, _ in self.images.val_dataloader()]
            clean, noisy = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
            power = self.images.test_set.tensors[0].square().mean()
            partial = cache.with_suffix(f".{os.getpid()}.npz")
            np.savez(partial, clean=clean, noisy=noisy, factor=power / NOISE_STD**2)
            partial.rename(cache)
        arrays = np.load(cache)
        clean, noisy = (torch.tensor(arrays[part], dtype=torch.float64) for part in ("clean", "noisy"))
        return Outputs(clean, noisy, float(arrays["factor"]))


def is_fresh(cache: Path, checkpoint: Path) -> bool:
    return cache.exists() and cache.stat().st_mtime >= checkpoint.stat().st_mtime


# %% Scores of the outputs alone, without labels
def sensitivity(outputs: Outputs) -> Tensor:
    return output_sensitivity(outputs.clean, outputs.noisy)


def equation9(outputs: Outputs) -> Tensor:
    return loss_estimate(sensitivity(outputs), outputs.factor, 1.0, outputs.clean.shape[1])


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def sensitivity_centred(outputs: Outputs) -> Tensor:
    """Mean over the outputs of Var(Δf_k), of logits less their class-mean, which cross-entropy does not act on."""
    return output_sensitivity(centred(outputs.clean), centred(outputs.noisy), per_output=True)


def sensitivity_relative(outputs: Outputs) -> Tensor:
    """The same over the variance of those logits themselves: no scale of the logits changes it."""
    return sensitivity_centred(outputs) / centred(outputs.clean).var(0, correction=0).mean()


def variance(outputs: Outputs) -> Tensor:
    """C · E‖Δp‖², the variance term of the Brier score."""
    return outputs.factor * outputs.probability_change.square().sum(1).mean()


def flips(outputs: Outputs) -> Tensor:
    return (outputs.clean.argmax(1) != outputs.noisy.argmax(1)).double().mean()


def entropy(outputs: Outputs) -> Tensor:
    return torch.distributions.Categorical(logits=outputs.clean).entropy().mean()


def confidence(outputs: Outputs) -> Tensor:
    return outputs.probabilities.amax(1).mean()


PASS_SCORES: dict[str, Callable[[Outputs], Tensor]] = {
    "sensitivity": sensitivity,
    "equation9": equation9,
    "sensitivity_centred": sensitivity_centred,
    "sensitivity_relative": sensitivity_relative,
    "variance": variance,
    "flips": flips,
    "entropy": entropy,
    "confidence": confidence,
}


# %% What needs labels
def loss(outputs: Outputs, labels: Tensor) -> Tensor:
    return cross_entropy(outputs.clean, labels)


def error(outputs: Outputs, labels: Tensor) -> Tensor:
    return (outputs.clean.argmax(1) != labels).double().mean()


def brier(outputs: Outputs, labels: Tensor) -> Tensor:
    """Squared error of the probabilities, summed over the classes."""
    return (outputs.probabilities - one_hot(labels, 10)).square().sum(1).mean()


def mse_logits(outputs: Outputs, labels: Tensor) -> Tensor:
    """Squared error of the logits against one-hot labels, averaged over the classes."""
    return (outputs.clean - one_hot(labels, 10)).square().mean()


def mse_average(outputs: Outputs, labels: Tensor) -> Tensor:
    """Squared error of the class-average of the logits, whose target is 1 / K."""
    return (outputs.clean.mean(1) - 0.1).square().mean()


TRUTHS: dict[str, Callable[[Outputs, Tensor], Tensor]] = {
    "loss": loss,
    "error": error,
    "brier": brier,
    "mse_logits": mse_logits,
    "mse_average": mse_average,
}


def fit_temperature(outputs: Outputs, labels: Tensor) -> float:
    """The T for which logits / T have the lowest cross-entropy on the first half of the images."""
    half = len(labels) // 2
    logits, labels = outputs.clean[:half], labels[:half]
    scale = float(logits.std()) + 1e-12
    result = minimize_scalar(
        lambda log_t: float(cross_entropy(logits / (scale * np.exp(log_t)), labels)), bounds=(-8, 8), method="bounded"
    )
    return scale * float(np.exp(result.x))


# %% One row a network
def known(subject: Subject) -> dict[str, float]:
    cache = subject.paths.trained.with_suffix(".json")
    return json.loads(cache.read_text()) if is_fresh(cache, subject.paths.trained) else {}


def missing(values: Mapping[str, float], scores: Iterable[str]) -> set[str]:
    return {*PASS_SCORES, *TRUTHS, "training_error", *scores} - set(values)


def complete(subject: Subject, scores: Mapping[str, Callable[[Subject], float]]) -> None:
    """Compute what is missing of a network's row, and keep it."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    values = known(subject)
    if missing(values, ()):
        values |= _of_outputs(subject)
    for name in missing(values, scores):
        start = time.process_time()
        values[name] = float(scores[name](subject))
        values[f"{name}_seconds"] = time.process_time() - start
    cache = subject.paths.trained.with_suffix(".json")
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(values))
    partial.rename(cache)


def _of_outputs(subject: Subject) -> dict[str, float]:
    outputs, labels = subject.outputs, subject.labels
    temperature = fit_temperature(outputs, labels)
    calibrated, held_out = outputs.calibrated(temperature), labels[len(labels) // 2 :]
    values = {"temperature": temperature, "factor": outputs.factor}
    values["epochs"] = torch.load(subject.paths.trained, weights_only=True)["epoch"]
    for name, score in PASS_SCORES.items():
        values |= {name: float(score(outputs)), f"{name}_calibrated": float(score(calibrated))}
    for name, truth in TRUTHS.items():
        values |= {name: float(truth(outputs, labels)), f"{name}_calibrated": float(truth(calibrated, held_out))}
    x, y = subject.images.train_set.tensors
    with torch.no_grad():
        training = Outputs(subject.model(x), torch.empty(0), outputs.factor)
    values |= {"training_loss": float(loss(training, y)), "training_error": float(error(training, y))}
    metric = OutputSensitivity()
    metric.update(outputs.clean, outputs.noisy)
    values["sensitivity_stderr"] = float(metric.stderr)
    values["sensitivity_untrained"] = float(sensitivity(subject.untrained_outputs))
    values["parameters"] = sum(p.numel() for p in subject.model.parameters())
    return values


def measure(
    specs: Iterable[Spec],
    data: str,
    args: Namespace,
    scores: Mapping[str, Callable[[Subject], float]] | None = None,
) -> pd.DataFrame:
    """Train what is missing, and give one row a network."""
    specs = list(dict.fromkeys(specs))
    train_all(specs, data, args.data, args.out, args.max_epochs, args.processes)
    subjects = [Subject(spec, data, args.data, args.out) for spec in specs]
    scores = scores or {}
    if incomplete := [subject for subject in subjects if missing(known(subject), scores)]:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(complete, subject, scores) for subject in incomplete]
            for job in tqdm(as_completed(jobs), f"measured, {data}", len(jobs)):
                job.result()
    rows = [known(subject) for subject in subjects]
    table = pd.DataFrame([spec._asdict() | values for spec, values in zip(specs, rows, strict=True)])
    table.insert(0, "network", [spec.name for spec in specs])
    table.insert(0, "data", data)
    table["kind"] = [kind(spec) for spec in specs]
    table["converged"] = table["epochs"] < args.max_epochs
    return table
