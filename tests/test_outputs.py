from collections import UserDict, namedtuple
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sensitivity.outputs import are_log_probabilities, select_outputs

X, LABELS = torch.zeros(3, 2), torch.tensor([0, 1, 2])

Batch = namedtuple("Batch", ["x", "y"])


@pytest.mark.parametrize(
    ("result", "outputs"),
    [
        (X, None),
        ((X, "attention"), None),
        ([X], None),
        ({"loss": LABELS, "logits": X}, None),
        (UserDict(logits=X), None),
        (SimpleNamespace(logits=X), None),
        (Batch("no", X), "y"),
        ({"scores": X}, "scores"),
        (SimpleNamespace(scores=X), "scores"),
        ((LABELS, X), 1),
        ({"nested": [X]}, lambda result: result["nested"][0]),
    ],
)
def test_outputs(result: Any, outputs: Any) -> None:
    assert select_outputs(result, outputs) is X


@pytest.mark.parametrize(
    ("result", "outputs", "match"),
    [
        (None, None, "should be a tensor.*got NoneType.*outputs="),
        ({"scores": X}, None, "got dict with the keys 'scores'.*outputs="),
        ((), None, "got tuple of nothing"),
        ("text", None, "got str"),
        ({"scores": X}, "logits", "`outputs='logits'` should name a part.*got dict with the keys 'scores'"),
        (SimpleNamespace(scores=X), "logits", "`outputs='logits'`.*SimpleNamespace"),
        ((X,), 1, "`outputs=1`.*tuple of Tensor"),
        ({"a": X}, lambda result: None, "should be a tensor"),
    ],
)
def test_outputs_that_can_not_be_told_are_refused(result: Any, outputs: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select_outputs(result, outputs)


def test_errors_of_the_users_own_callable_are_not_hidden() -> None:
    with pytest.raises(KeyError, match="mine"):
        select_outputs({"a": X}, lambda result: result["mine"])


def test_a_callable_may_ask_for_the_batch() -> None:
    mask = torch.tensor([True, False, True])
    selected = select_outputs({"logits": X}, lambda result, batch: result["logits"][batch["mask"]], {"mask": mask})
    assert selected.shape == (2, 2)
    assert select_outputs({"a": X}, itemgetter("a"), {}) is X  # built in, without a signature
    assert select_outputs(X, lambda result, scale=2: result * scale, {}).shape == X.shape


def test_a_loss_that_comes_first_is_refused() -> None:
    with pytest.raises(ValueError, match="got a scalar, a loss perhaps.*outputs="):
        select_outputs((X.sum(), X), None)


def test_a_scalar_is_the_output_of_one_sample() -> None:
    assert select_outputs(X.sum(), None, num_samples=1).shape == (1,)
    with pytest.raises(ValueError, match="got a scalar"):
        select_outputs(X.sum(), None, num_samples=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 10), (4, 3, 5)])
def test_log_probabilities_are_told_from_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert are_log_probabilities(logits.log_softmax(1))
    for others in (logits, -logits.abs(), logits.log_softmax(1) - 0.5, logits.softmax(1), logits[:, :1], logits[:0]):
        assert not are_log_probabilities(others)
    assert not are_log_probabilities(torch.zeros(5, dtype=dtype))
