"""What a reference says of a run, kept in a file beside it: fitted once, and judged again in seconds.

What a learner predicts is kept as it is, before calibration: of training samples without them, of unseen ones and of
the test. From there on all is the package's own, as it is now: calibration, skill, errors, and whether it is trusted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pools import draw
from record import order
from runs import ALIKE, NUM_ALIKE, Run
from torch import Tensor
from torch.nn.functional import one_hot

import lightning_sensitivity
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.reference import learners
from lightning_sensitivity.reference.learners import Learner
from lightning_sensitivity.reference.observations import Observations
from lightning_sensitivity.reference.reference import Reference


def sources() -> str:
    """Return a hash of the package's sources of references and expected values."""
    root = Path(lightning_sensitivity.__file__).parent
    files = sorted(file for part in ("reference", "functional") for file in (root / part).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def training_rows(run: Run) -> tuple[Tensor, Tensor]:
    """Return training samples as a monitor gets them: augmented, or as a sampler draws them in the first epoch."""
    if run.way == "sampler":
        rows = order(run, torch.Generator().manual_seed(run.index))
        return run.x[rows], run.y[rows]
    return run.x_kept, run.y


def seen_by(run: Run) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what each judge sees of inputs."""
    return {"inputs": lambda x: x, **run.judges}


class Kept(Learner):
    """A learner that keeps its left-out predictions as they were before they were calibrated."""

    def __init__(self, name: str, features: Any, model: Any, left_out: Any, known: Observations, task: Any) -> None:
        super().__init__(name, features, model, left_out, known, task)
        self.as_fitted = self._as_matrix(left_out)


def fit(run: Run, x: Tensor, y: Tensor) -> Reference:
    """Fit a reference; of all classes, also of those that no training sample has."""
    learners.Learner = Kept  # type: ignore[misc]
    try:
        return Reference(run.task).fit(x, one_hot(y, run.num_classes).float() if run.task == "multiclass" else y)
    finally:
        learners.Learner = Learner  # type: ignore[misc]


@dataclass
class Said:
    """What is kept of a reference.

    Attributes:
        left_out: What it predicts of training samples without them, before calibration, ``(N, C)``.
        labels: Their labels, ``(N, C)``.
        rows: Which samples they are, ``(N,)``.
        unseen: What it predicts of unseen samples, before calibration, ``(M, C)``.
        test: The same of test samples, ``(T, C)``; none for runs that are compared.
        noisy_test: Labels of the test that are as noisy as those of training, ``(T,)``.
        classes: What columns stand for.
        about: Task, learner, features, kinds and shapes, seconds, and a hash of the sources that fitted it.
    """

    left_out: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    unseen: np.ndarray
    test: np.ndarray
    noisy_test: np.ndarray
    classes: np.ndarray
    about: dict[str, Any]

    @classmethod
    def of(cls, run: Run, see: Callable[[Tensor], Tensor]) -> Said:
        """Fit a reference to a run, by what a judge sees."""
        start = time.process_time()
        x, y = training_rows(run)
        reference = fit(run, see(x), y)
        learner: Any = reference._learner
        about = {"task": run.task, "learner": learner.name, "features": learner.features.name, "way": run.way}
        about |= {"sources": sources(), "is_design": run.is_design}
        about["shapes"] = {kind: list(shape) for kind, shape in learner.features.shapes.items()}
        learner.calibration = lambda p: p
        parts = (run.x_unseen, run.x_test[: 0 if run.pool in ALIKE else None])
        unseen, test = (reference.predict_matrix(see(each)) if len(each) else np.zeros((0, 1)) for each in parts)
        about["seconds"] = time.process_time() - start
        return cls(
            learner.as_fitted.numpy(), learner.labels.numpy(), reference.rows_, unseen, test, run.noisy_test.numpy(),
            np.asarray(reference.classes_), about,
        )  # fmt: skip

    def keep(self, file: Path) -> None:
        part = file.with_suffix(".part.npz")
        np.savez_compressed(part, **{**self.__dict__, "about": np.array(json.dumps(self.about))})
        part.rename(file)

    @classmethod
    def read(cls, file: Path) -> Said:
        with np.load(file) as found:
            return cls(**{**found, "about": json.loads(str(found["about"]))})

    def reference(self) -> Reference:
        """Return the reference, as the package calibrates and describes it now; it predicts no other samples."""
        task = find_task(self.about["task"])
        shapes = {kind: torch.Size(shape) for kind, shape in self.about["shapes"].items()}
        features: Any = SimpleNamespace(name=self.about["features"], shapes=shapes)
        known: Any = SimpleNamespace(labels=torch.from_numpy(self.labels), groups=None)
        learner = Learner(self.about["learner"], features, SimpleNamespace(), self.left_out, known, task)
        reference = Reference(self.about["task"])
        reference.classes_ = self.classes
        reference._describe(learner, torch.from_numpy(self.rows), task)
        return reference

    def predictions(self, reference: Reference) -> list[Tensor]:
        """Return what the reference predicts of unseen samples and of the test, (M, C) and (T, C)."""
        return [reference._learner.calibration(torch.from_numpy(each)) for each in (self.unseen, self.test)]


def file_of(run: Path, judge: str) -> Path:
    """Return where it is kept what a judge says of a recorded run; of runs on the same data, of the first one."""
    pool, index = run.stem.split("-")
    first = int(index) // NUM_ALIKE * NUM_ALIKE if pool in ALIKE else int(index)
    return run.with_name(f"{pool}-{first:03d}.{judge}.npz")


def fit_run(file: Path, data: Path, judges: list[str] | None) -> None:
    """Fit what is not there yet of a recorded run, by all judges or some."""
    pool, index = file_of(file, "").stem.strip(".").split("-")
    run = draw(pool, int(index), data)
    for judge, see in seen_by(run).items():
        kept = file_of(file, judge)
        if not kept.exists() and (not judges or judge in judges):
            said = Said.of(run, see)
            said.keep(kept)
            print(f"{time.strftime('%H:%M:%S')} {run.name} {judge} {said.about['seconds']:.1f} s", flush=True)
