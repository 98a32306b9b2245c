"""Draws a recorded run: what is expected without labels, and what comes.

python plot.py RUNS texts_more-038 worst_texts.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from rules import Recorded, expected_curves, gain_curve
from said import Said, file_of


def main() -> None:
    runs, name, picture = sys.argv[1:]
    file = Path(runs) / f"{name}.npz"
    recorded, said = Recorded.read(file), Said.read(file_of(file, "inputs"))
    reference = said.reference()
    curves = expected_curves(recorded, reference, said.predictions(reference)[0], ["accuracy"])
    noisy, unseen = said.noisy_test, recorded.found["y_unseen"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    left.plot(curves["loss"], color="tab:orange", label="expected, without labels")
    left.plot(recorded.losses_of("unseen", unseen), "--", color="tab:gray", label=f"{len(unseen)} labels")
    left.plot(recorded.losses_of("test", noisy), color="tab:blue", label=f"{len(noisy)} labels")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(100 * curves["accuracy"], color="tab:orange")
    right.plot(100 * gain_curve("accuracy", recorded.predictions("unseen"), unseen), "--", color="tab:gray")
    right.plot(100 * gain_curve("accuracy", recorded.predictions("test"), noisy), color="tab:blue")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    figure.suptitle(str(recorded.found["kind"]))
    figure.tight_layout()
    figure.savefig(picture, dpi=64)


if __name__ == "__main__":
    main()
