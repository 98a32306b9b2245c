"""Windows of vibration signals of machines, whose condition is to be told; from a random generator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RATE, LENGTH, NUM_CHANNELS = 1000.0, 256, 2  # samples a second, of a window, and sensors
CONDITIONS = ("healthy", "imbalance", "misalignment", "looseness", "outer race", "inner race", "gear", "tooth")
CONDITIONS += ("bursts",)
OUTER, INNER = 3.58, 5.42  # how often a ball passes a fault of a bearing's race in a turn of the shaft


def windows(r: np.random.RandomState, machine: int, conditions: np.ndarray) -> Tensor:
    """Draw a window of a machine in each of these conditions, (N, channels, length)."""
    m = np.random.RandomState((machine, 12))  # what the machine is
    turns, resonance, damping = m.uniform(18, 32), m.uniform(120, 380), m.uniform(0.03, 0.1)
    teeth, offset, gains = m.randint(5, 10), m.uniform(0.5, 1, 3), m.uniform(0.3, 1, (3, NUM_CHANNELS))
    n, time = len(conditions), np.arange(-LENGTH, LENGTH) / RATE  # the first half lets the resonance swing in
    phase = turns * r.uniform(0.9, 1.1, (n, 1)) * time + r.rand(n, 1)  # in turns of the shaft
    severity = 0.5 * np.exp(r.randn(n, 1) * 0.4)

    def is_(*names: str) -> np.ndarray:
        return np.isin(conditions, [CONDITIONS.index(name) for name in names])[:, None]

    def wave(order: float) -> np.ndarray:
        return np.sin(2 * np.pi * (order * phase + r.rand(n, 1)))

    def impulses(order: float) -> np.ndarray:
        return np.diff(np.floor(order * phase), axis=1, prepend=0) * (np.arange(2 * LENGTH) > 0)

    slow = offset[0] * wave(1) + 0.4 * offset[1] * wave(2) + severity * is_("imbalance") * wave(1)
    slow += severity * is_("misalignment") * (wave(2) + 0.5 * wave(3))
    slow += 0.6 * severity * is_("looseness") * (wave(0.5) + wave(1.5) + wave(2.5))
    mesh = wave(teeth) * (0.3 * offset[2] + severity * is_("gear") * (0.5 + 0.5 * wave(1)))
    struck = is_("outer race") * impulses(OUTER) + is_("inner race") * impulses(INNER) * (1 + wave(1))
    struck = severity * (struck + 2 * is_("tooth") * impulses(1))
    struck += severity * is_("bursts") * r.randn(n, 2 * LENGTH) * (wave(0.7) > 0.6)
    ring = np.exp(-damping * 2 * np.pi * resonance * time[LENGTH:]) * np.sin(2 * np.pi * resonance * time[LENGTH:])
    ringing = np.fft.irfft(np.fft.rfft(struck, 4 * LENGTH) * np.fft.rfft(ring, 4 * LENGTH))[:, : 2 * LENGTH]
    parts = np.stack([slow, mesh, ringing], 1)[..., LENGTH:]
    x = np.einsum("npt,pc->nct", parts, gains) + 0.4 * r.randn(n, NUM_CHANNELS, LENGTH)
    return torch.tensor(x).float()
