"""Run the code of a library from docs/guide/libraries.md, and compare what is expected there with what the labels say.

    python tests/clients/check.py chemprop

needs the library and this package. The code runs again with callbacks that do nothing in place of ours: the weights of
both fits have to be equal, bit for bit. With --packages it prints what to install.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits that do not depend on the machine, and no waiting on a busy one
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "libraries.md"
Weights = dict[str, Any]
Row = dict[str, float]


class Case(NamedTuple):
    """What labels say of the fit of a library, and how near to it is near enough.

    Attributes:
        true: Name under which the library, or the module on the page, logs it for all validation samples.
        expected: Our value.
        within: Largest mean difference over the epochs.
        follows: Least correlation over the epochs.
    """

    true: str
    expected: str = "expected_loss"
    within: float = 0.1
    follows: float = 0.9


CASES: Mapping[str, Case] = {
    "chemprop": Case("val_loss", within=0.15),
    "pytorch-tabular": Case("valid_loss", within=0.15, follows=0.7),
    "torchgeo": Case("val_loss"),
    "scvi-tools": Case("validation_accuracy", "expected_accuracy"),
    "pytorch-forecasting": Case("val_loss", within=0.05, follows=0.8),
    "darts": Case("val_loss", within=0.05),
    "lightly": Case("val_loss"),
    "lightning-uq-box": Case("val_loss"),
    "deeptab": Case("val_loss"),
    "Graphs and fingerprints": Case("val_loss", within=0.2, follows=0.8),
    "transformers": Case("val_loss"),
    "timm": Case("val_loss"),
}


def section(name: str) -> str:
    """Return what the page says under the heading of a library."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        sys.exit(f"{PAGE.name} has no section {name!r}.")
    return found[1]


def packages(name: str) -> str:
    """Return what the page installs for a library."""
    return " ".join(re.findall(r"^pip install (.*)$", section(name), re.MULTILINE))


def run(name: str, monitors: Mapping[str, Any]) -> None:
    """Run the code of a library, with these classes in place of the monitors."""
    from lightning.pytorch import seed_everything

    import lightning_sensitivity

    blocks = re.findall(r"^```python\n(.*?)^```", section(name), re.DOTALL | re.MULTILINE)
    for monitor, replacement in monitors.items():
        setattr(lightning_sensitivity, monitor, replacement)
    seed_everything(0, verbose=False)
    exec(compile("\n".join(blocks), f"{PAGE.name}, {name}", "exec"), {"__name__": "page"})


def weights_of(module: Any) -> Weights:
    return {key: value.clone() for key, value in module.state_dict().items() if hasattr(value, "clone")}


def watched(case: Case, rows: list[Row], weights: list[Weights]) -> dict[str, Any]:
    """Make our monitors, which also note the values of each validation, and the weights at the end."""
    from lightning_sensitivity import RiskMonitor, SensitivityMonitor

    class Watched(RiskMonitor):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            value = self.history[-1].get(case.expected) if self.history else None
            if value is not None and not trainer.sanity_checking:
                rows.append({"expected": value, "true": float(trainer.callback_metrics[case.true])})

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            weights.append(weights_of(pl_module))
            super().on_fit_end(trainer, pl_module)

    return {"RiskMonitor": Watched, "SensitivityMonitor": SensitivityMonitor}


def idle(weights: list[Weights]) -> dict[str, Any]:
    """Make callbacks that do nothing but note the weights at the end, for both Lightnings."""
    import lightning.pytorch
    import pytorch_lightning

    class Idle(lightning.pytorch.Callback, pytorch_lightning.Callback):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.summary: dict[str, Any] = {}

        @property
        def state_key(self) -> str:
            return str(id(self))

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            weights.append(weights_of(pl_module))

    return {"RiskMonitor": Idle, "SensitivityMonitor": Idle}


def faults(case: Case, rows: list[Row], with_monitors: Weights, without: Weights) -> list[str]:
    """List what is not as it should be."""
    import numpy
    import torch

    expected, true = (numpy.array([row[key] for row in rows]) for key in ("expected", "true"))
    are_equal = with_monitors.keys() == without.keys() and all(
        torch.equal(value, without[key]) for key, value in with_monitors.items()
    )
    difference = float((expected - true).mean()) if len(rows) else numpy.nan
    correlation = float(numpy.corrcoef(expected, true)[0, 1]) if len(rows) > 2 else numpy.nan
    for row in rows:
        print(f"> expected {row['expected']:.3f}, true {row['true']:.3f}")
    print(f"> mean difference {difference:+.3f}, correlation {correlation:.3f}, weights equal: {are_equal}")
    is_met = {
        "weights differ from those of a fit without callbacks": are_equal,
        f"{case.expected} is off by more than {case.within}": abs(difference) <= case.within,
        f"{case.expected} has a correlation of less than {case.follows}": correlation >= case.follows,
    }
    return [fault for fault, is_solved in is_met.items() if not is_solved]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(CASES))
    parser.add_argument("--packages", action="store_true", help="print what to install")
    arguments = parser.parse_args()
    name, case, start = arguments.name, CASES[arguments.name], time.time()
    if arguments.packages:
        print(packages(name))
        return
    rows: list[Row] = []
    weights: list[Weights] = []
    os.chdir(tempfile.mkdtemp())
    run(name, watched(case, rows, weights))
    run(name, idle(weights))
    found = faults(case, rows, weights[0], weights[-1])
    print(f"{name}: {'; '.join(found) or 'as it should be'} ({time.time() - start:.0f} s)")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
