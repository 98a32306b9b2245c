"""What the criterion of before the redesign (commit 5d3ff43) loses on some runs of this study.

    git archive 5d3ff43 lightning_sensitivity | tar -x -C BEFORE
    PYTHONPATH=BEFORE python before.py DATA tuned redrawn photos  # appends to before.csv; hours on a core

Training is that of `record.py`, bit by bit; only rows of the check half are made.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from record import augmented, forward, is_image, loss, order, outputs_of
from runs import Run, draw, size
from torch import Tensor, nn

from lightning_sensitivity import RiskEstimate  # of before
from lightning_sensitivity.functional.features import different_samples, principal_components
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.model.call import ModelCall
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.twins import Twins, copy_weights

RESULTS = Path(__file__).with_name("before.csv")
NUM_KNOWN, NUM_SCORED, BATCH = 1000, 500, 100


class Single(nn.Module):
    """Runs a network as a monitor does, with logits in single precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return forward(self.network, x).float()


def reference(run: Run, x: Tensor, unseen: Tensor) -> Reference:
    rows = torch.linspace(0, len(x) - 1, min(len(x), NUM_KNOWN)).long()
    x, unseen = principal_components(x[rows].float().flatten(1), unseen.float().flatten(1))
    labels = run.y[rows].float() if run.task == "binary" else run.y[rows]
    zeros = torch.zeros(len(rows), run.num_outputs, dtype=torch.float64)
    y = find_task(run.task).target_probabilities(zeros, labels)[0].double()
    kept = different_samples(x, y)
    return fit_reference(x[kept], y[kept], unseen, run.task)


def criteria(run: Run, references: dict[str, Reference]) -> tuple[dict[str, list[float]], np.ndarray]:
    """Train, and return the criterion by each reference in each epoch, and the outputs for test samples."""
    network = run.make_network()
    network = network.to(memory_format=torch.channels_last) if is_image(run.x) else network
    model = Single(network)
    initial = copy_weights(dict(model.named_parameters()))
    num_weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    optimizer = run.make_optimizer([p for p in network.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(run.index)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs) if run.has_schedule else None
    found: dict[str, list[float]] = {name: [] for name in references}
    state: dict[str, tuple] = dict.fromkeys(references, (None, None))
    test = []
    for _ in range(run.epochs):
        network.train()
        for batch in order(run, generator).split(run.batch_size):
            if len(batch) > 1:
                x = augmented(run.x[batch], generator) if run.is_augmented else run.x[batch]
                optimizer.zero_grad()
                loss(run, forward(network, x), run.y[batch]).backward()
                optimizer.step()
        if schedule is not None:
            schedule.step()
        network.eval()
        for name, metric in measured(run, model, initial, num_weights, references, state).items():
            found[name].append(float(metric.compute()["risk_criterion"]))
            state[name] = (metric.calibration, metric.gap_weight)
        test.append(outputs_of(network, run.x_test))
    return found, np.stack(test).astype(np.float32)


def measured(run, model, initial, num_weights, references, state) -> dict[str, RiskEstimate]:
    """Measure an epoch by each reference."""
    weights = dict(model.named_parameters())
    moved = {name: weight for name, weight in initial.items() if not torch.equal(weight, weights[name])}
    calls = [ModelCall(model, x) for x in run.x_unseen.split(BATCH)]
    with isolated(model) as run_isolated:
        twins = Twins(model, moved, TWIN_STRENGTH, (0, 0, 0), run_isolated)
        clean = [run_isolated(call) for call in calls]
        others = [twins.outputs(call, place, len(calls)) for place, call in enumerate(calls)]
        baselines = [twins.baseline_outputs(call) for call in calls]
        known = [run_isolated(ModelCall(model, x)) for x in run.x_kept[:NUM_SCORED].split(BATCH)]
    labels = run.y[:NUM_SCORED]
    metrics = {}
    for name, each in references.items():
        calibration, gap_weight = state[name]
        metric = metrics[name] = RiskEstimate(
            run.task, strength=TWIN_STRENGTH, num_training=len(run.y), num_weights=num_weights, reference=each,
            calibration=calibration, gap_weight=gap_weight,
        )  # fmt: skip
        for outputs, twin, baseline, q in zip(clean, others, baselines, each.predictions.split(BATCH), strict=True):
            metric.update(outputs, twin, baseline_outputs=baseline, reference=q)
        metric.update_training(torch.cat(known), labels.float() if run.task == "binary" else labels)
    return metrics


def main() -> None:
    torch.set_num_threads(1)
    data, *pools = sys.argv[1:]
    with RESULTS.open() as file:
        done = {row["run"] for row in csv.DictReader(file)}
    for pool in pools:
        for index in range(size(pool, Path(data))):
            run = draw(pool, index, Path(data))
            if run.is_design or run.name in done:
                continue
            references = {"before": reference(run, run.x_kept, run.x_unseen)}
            if run.features is not None:
                with torch.no_grad():
                    of_body = [
                        torch.cat([run.features(x) for x in each.split(250)]) for each in (run.x_kept, run.x_unseen)
                    ]
                references["before_features"] = reference(run, *of_body)
            found, outputs = criteria(run, references)
            p = np.concatenate([0 * outputs, outputs], 2) if run.task == "binary" else outputs
            accuracy = 100 * (p.argmax(2) == run.y_test.numpy()).mean(1)
            lost = [accuracy.max() - accuracy[int(np.nanargmin(found[name]))] if name in found else "" for name in HEAD]
            with RESULTS.open("a") as file:
                csv.writer(file, lineterminator="\n").writerow([run.name, *lost])


HEAD = ("before", "before_features")

if __name__ == "__main__":
    main()
