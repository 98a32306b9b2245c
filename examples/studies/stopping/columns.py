"""How much do columns differ between training and validation by chance? RiskMonitor warns well above that.

python columns.py DATA  # 222 random splits of the 74 tables: the largest difference of means, in standard errors
"""

from __future__ import annotations

import sys
from pathlib import Path

import data
import numpy as np
import torch

from lightning_sensitivity.reference.observations import largest_difference


def main() -> None:
    folder, found = Path(sys.argv[1]), []
    for line in [*data.table_lines()[0], *data.large_table_lines()]:
        x, _ = data.table(line, folder)
        for seed in range(3):
            order = torch.tensor(np.random.RandomState(seed).permutation(len(x)))
            n = min(3000, int(0.6 * len(x)))
            found.append((largest_difference(x[order[:n]], x[order[n : n + 600]])[1], line.split()[1]))
    found.sort(reverse=True)
    print(f"{len(found)} splits; the largest: " + ", ".join(f"{size:.1f} ({name})" for size, name in found[:5]))


if __name__ == "__main__":
    main()
