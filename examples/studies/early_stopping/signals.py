"""Windows of sensors and other signals, for convolutional networks over time."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import tasks
import torch
from as_built import NUM_TEST, Task, draw_optimizer, draw_recipe, noise_as_requested, sizes
from networks import CHANNELS, Recipe
from runs import NUM_HOLDOUT, Request, Run
from torch import Tensor, nn

SOURCES = ("sensors", "sensors", "sensors", "power demand", "vowels")
REAL = {"power demand": "ItalyPowerDemand", "vowels": "JapaneseVowels_eq"}  # their names in aeon
LENGTHS = (32, 64, 128)  # of a window of sensors


def draw_signals(seed: int, data: Path | None = None, request: Request | None = None) -> Run:
    """Draw a run on signals: windows of sensors that are generated, or two small data sets of the UCR and UEA archives.

    Args:
        seed: The seed.
        data: A folder where the two data sets are, or are put.
        request: Asks for other sizes or noise.
    """
    r = np.random.RandomState((seed, 16))  # the order of its calls makes the run
    source = str(r.choice(SOURCES))
    n = int(200 * 10 ** r.rand())
    n = n if request is None else request.size(seed, n)
    if source == "sensors":
        num_classes = int(r.choice([2, 3, 5, 8]))
        x, y = sensor_windows(r, n + NUM_HOLDOUT + NUM_TEST, num_classes)
    else:
        x, y = real_signals(source, data)
        order = torch.tensor(r.permutation(len(x)))
        x, y, num_classes = x[order], y[order], int(y.max()) + 1
    task = Task(source, f"{source}, {num_classes} classes", x, y, num_classes)
    n = min(n, max(200, len(x) // 2))
    chosen, holdout, test = torch.arange(len(x)).split(sizes(n, len(x)))[:3]
    labels, noise = str(r.choice(["random", "random", "by class"])), float(r.uniform(0.1, 0.45))
    noise = 0.8 * noise if labels == "by class" else noise
    chances = tasks.transition(labels, noise, num_classes)
    if request is not None:
        labels, noise, chances = noise_as_requested(seed, labels, num_classes, request) or (labels, noise, chances)
    y, y_holdout_noisy, y_test_noisy = (tasks.noisy(r, task.y[part], chances) for part in (chosen, holdout, test))
    recipe = replace(draw_recipe(r, source), body="convolutions over time", depth=int(r.choice([2, 3, 4])))
    batch_size, kernel_size = int(r.choice([32, 64, 128])), int(r.choice([3, 5, 7]))
    make_optimizer, optimizer = draw_optimizer(r, replace(recipe, body="convolutions"))
    schedule = str(r.choice(["", "", "", "cosine", "one-cycle"]))
    num_steps = {64: 1000, 128: 800, 256: 600}[recipe.width]

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        return convolutional_over_time(recipe, x.shape[1:], kernel_size, num_classes)

    noise_name = "correct labels" if labels == "correct" else f"{100 * noise:.0f} % noisy {labels}"
    parts = [task.what, noise_name, f"{n} samples", str(recipe), recipe.norm, optimizer, schedule]
    return Run(
        seed=seed,
        kind=", ".join(filter(None, parts)),
        labels=labels,
        num_classes=num_classes,
        make_network=make_network,
        make_optimizer=make_optimizer,
        x=x[chosen],
        y=y,
        x_holdout=x[holdout],
        y_holdout=task.y[holdout],
        y_holdout_noisy=y_holdout_noisy,
        x_test=x[test],
        y_test=task.y[test],
        y_test_noisy=y_test_noisy,
        batch_size=batch_size,
        epochs=int(np.clip(num_steps // -(-n // batch_size), 12, 50)),
        schedule=schedule,
        has_batch_norm=recipe.norm == "batch norm",
        chances=chances,
        y_correct=task.y[chosen],
    )


def sensor_windows(r: np.random.RandomState, n: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Generate windows of several sensors on some machines (or people), each of which shifts and scales its sensors.

    A sensor shows a wave with two overtones and a trend. A class says how high, how fast and how steep these are, in
    each sensor, and how often a short burst occurs; how far classes are apart is drawn. Phases, times of bursts and the
    speed of a window are random. Training and unseen windows are of the same machines.

    Returns:
        Windows in standard units of each sensor, ``(n, sensors, times)``, and classes.
    """
    num_sensors, length, num_machines = int(r.choice([1, 3, 6])), int(r.choice(LENGTHS)), int(r.choice([4, 10, 30]))
    spread, noise = float(r.choice([0.08, 0.15, 0.25])), float(r.choice([0.3, 0.6, 1.0]))
    speeds = r.uniform(2, 6) * np.exp(spread * r.randn(num_classes))  # waves in a window
    heights = np.exp(spread * r.randn(num_classes, num_sensors, 1))
    overtones = spread * r.randn(num_classes, num_sensors, 2)
    trends = spread * r.randn(num_classes, num_sensors, 1)
    burst_rates = r.rand(num_classes)
    scales = np.exp(0.3 * r.randn(num_machines, num_sensors, 1))
    shifts = 0.5 * r.randn(num_machines, num_sensors, 1)

    label, machine = r.randint(num_classes, size=n), r.randint(num_machines, size=n)
    time = np.linspace(0, 1, length)
    phase = r.rand(n, 1, 1) + 0.25 * np.arange(num_sensors)[:, None]
    turns = (speeds[label] * np.exp(0.05 * r.randn(n)))[:, None, None] * time + phase
    waves = [np.sin(2 * np.pi * k * turns) for k in (1, 2, 3)]
    x = waves[0] + overtones[label][..., :1] * waves[1] + overtones[label][..., 1:] * waves[2]
    x = heights[label] * x + 2 * trends[label] * time
    has_burst = r.rand(n) < burst_rates[label]
    x += (has_burst[:, None] * np.exp(-np.square((time - r.rand(n, 1)) / 0.03)))[:, None]
    x = scales[machine] * (x + noise * r.randn(*x.shape)) + shifts[machine]
    x = (x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True)
    return torch.tensor(x).float(), torch.tensor(label)


@cache
def real_signals(name: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """Load a data set that comes with the package aeon, in standard units of each channel; it is kept in the folder."""
    file = None if data is None else data / f"{REAL[name]}.npz"
    if file is None or not file.exists():
        parts = [_read_ts(REAL[name], part) for part in ("TRAIN", "TEST")]
        x, said = (np.concatenate(each) for each in zip(*parts, strict=True))
        y = np.unique(said, return_inverse=True)[1]
        x = (x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True)
        if file is None:
            return torch.tensor(x).float(), torch.tensor(y)
        np.savez(file, x=x, y=y)
    with np.load(file) as kept:
        return torch.tensor(kept["x"]).float(), torch.tensor(kept["y"])


def _read_ts(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read signals ``(n, channels, times)`` and classes from a file of aeon, which is not imported."""
    spec = importlib.util.find_spec("aeon")
    assert spec is not None and spec.origin is not None, f"{name} comes with the package aeon: pip install aeon"
    folder = Path(spec.origin).parent / "datasets" / "data" / name.removesuffix("_eq")
    text = (folder / f"{name}_{part}.ts").read_text()
    lines = [line.split(":") for line in text.lower().partition("@data")[2].strip().splitlines()]
    signals = [[[float(value) for value in channel.split(",")] for channel in line[:-1]] for line in lines]
    return np.array(signals), np.array([line[-1] for line in lines])


def convolutional_over_time(recipe: Recipe, shape: torch.Size, kernel_size: int, num_outputs: int) -> nn.Module:
    """Build a network whose last layer, `head`, is linear."""
    inputs, length = shape
    layers: list[nn.Module] = []
    for i in range(recipe.depth):
        outputs = 2 * CHANNELS[recipe.width] * min(2**i, 4)
        stride = 2 if length > 8 and recipe.down == "stride" else 1
        layers += [nn.Conv1d(inputs, outputs, kernel_size, stride, kernel_size // 2)]
        norms = {"batch norm": [nn.BatchNorm1d(outputs)], "group norm": [nn.GroupNorm(4, outputs)]}
        layers += norms.get(recipe.norm, [])
        layers += [recipe.activation()]
        if length > 8:
            pool = nn.MaxPool1d if recipe.down == "max-pooling" else nn.AvgPool1d
            layers += [pool(2, ceil_mode=True)] if stride == 1 else []
            length = -(-length // 2)
        inputs = outputs
    layers += [nn.AdaptiveAvgPool1d(1)] if recipe.head != "flatten" else []
    layers += [nn.Flatten(), *([nn.Dropout(recipe.dropout)] if recipe.dropout else [])]
    size = inputs * (length if recipe.head == "flatten" else 1)
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), head=nn.Linear(size, num_outputs)))
