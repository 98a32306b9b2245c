import dataclasses
import math
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sensitivity.models import Options
from lightning_sensitivity.perturbations import GaussianNoise, UniformNoise

BAD: dict[str, list[Any]] = {
    "noise_std": [0, -0.1, math.nan, "0.1", True, []],
    "perturbation": [0.1, "noise", UniformNoise],
    "at": [1, "", [], ["a", 1], ["a", "a"], [""]],
    "num_draws": [0, 1.5, True, "1"],
    "num_samples": [0, -1, 1.5, True],
    "seed": [0.5, None, True],
    "inputs": [1.5, [], [0, 0], ["x", 1.5], {"x"}, True],
    "outputs": [1.5, ["logits"], True],
    "targets": [1.5, ["y"], True],
    "per_output": [1, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_is_wrong_is_said(name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"^`{name}` should be .*, got "):
        Options(**{name: value})


def test_what_is_right_is_taken_once_and_for_all() -> None:
    options = Options(
        at=["a", "b"], inputs=["x", 1], outputs="logits", targets=len, num_samples=5, noise_std=[0.1, 0.2]
    )
    assert options.sites == {"a": "/a", "b": "/b"}
    assert Options(at="a").sites == {"a": ""} and Options().sites == {None: ""}
    assert repr(options.chosen_perturbation()) == repr(GaussianNoise([0.1, 0.2]))
    assert Options(perturbation=max).chosen_perturbation() is max
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1
    with pytest.raises(MisconfigurationException, match="`noise_std` should be left out beside a `perturbation`"):
        Options(noise_std=0.2, perturbation=UniformNoise(0.1))
