from collections import OrderedDict, UserDict, namedtuple
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.functional.tasks import are_log_probabilities, are_probabilities
from lightning_sensitivity.models import select_outputs, select_targets
from lightning_sensitivity.models.outputs import perturbed_result

X, LABELS = torch.zeros(3, 2), torch.tensor([0, 1, 2])
Pair = namedtuple("Pair", ["x", "y"])


class ModelOutput(OrderedDict):
    """As of transformers: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Model(nn.Module):
    """It gives, and takes, several."""

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Any: ...


@pytest.mark.parametrize(("result", "outputs"), [
    *((result, None) for result in (X, (X, "attention"), [X], Pair(X, 0), {"loss": LABELS, "logits": X})),
    *((result, None) for result in (UserDict(logits=X), ModelOutput(logits=X), SimpleNamespace(logits=X))),
    (Pair("no", X), "y"),
    *((result, "scores") for result in ({"scores": X}, SimpleNamespace(scores=X))),
    ((LABELS, X), 1),
    ({"nested": [X]}, lambda result: result["nested"][0]),
    ({"logits": X}, itemgetter("logits")),  # built in, without a signature
    (X, lambda result, scale=2: result),
])  # fmt: skip
def test_outputs(result: Any, outputs: Any) -> None:
    assert select_outputs(result, outputs) is X


@pytest.mark.parametrize(("result", "outputs", "match"), [
    (None, None, r"should be a floating tensor \(N, K, ...\).*got NoneType.*`outputs=`"),
    ({"scores": X}, None, "got dict of 'scores': a tensor"),
    (LABELS, None, "got a tensor of torch.int64"),
    ((X.sum(), X), None, r"got a tensor of torch.float32 and shape \(\) in tuple of 2"),  # a loss that comes first
    ({"a": X}, lambda result: None, "got NoneType in dict of 'a'"),
    ({"scores": X}, "logits", "`outputs='logits'` should name a part.*got dict of 'scores'"),
    (X, 0, r"`outputs=0` should name a part of what the model returns, got a tensor"),  # not of the first sample
])  # fmt: skip
def test_outputs_that_can_not_be_told_are_refused(result: Any, outputs: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select_outputs(result, outputs)


def test_a_function_may_ask_for_the_batch_and_its_errors_are_not_hidden() -> None:
    batch = {"mask": torch.tensor([True, False, True])}
    assert len(select_outputs({"y": X}, lambda result, batch: result["y"][batch["mask"]], batch)) == 2
    with pytest.raises(KeyError, match="mine"):
        select_outputs({"a": X}, lambda result: result["mine"])


def test_a_scalar_is_the_output_of_one_sample() -> None:
    assert select_outputs(X.sum(), None, num_samples=1).shape == (1,)
    with pytest.raises(MisconfigurationException, match=r"shape \(\)"):
        select_outputs(X.sum(), None, num_samples=2)


@pytest.mark.parametrize(("batch", "targets"), [
    *((batch, None) for batch in ((X, X, LABELS), {"x": X, "labels": LABELS}, Pair(X, LABELS)._asdict())),
    *((batch, None) for batch in (SimpleNamespace(x=X, y=LABELS), UserDict(target=LABELS, label=None))),
    ((LABELS, X), 0),
    (Pair(X, LABELS), "y"),
    ([{"id": LABELS}], lambda batch: batch[0]["id"]),
])  # fmt: skip
def test_labels(batch: Any, targets: Any) -> None:
    assert select_targets(Model(), batch, targets) is LABELS


@pytest.mark.parametrize(("batch", "targets", "match"), [
    *(((X,) * n, None, "the model's inputs and one more element, the labels, got tuple") for n in (1, 2, 4)),
    *((batch, None, "one entry of the batch called 'label', ") for batch in (X, {"x": X}, {"y": X, "label": X})),
    ((X, X, [1, 2]), None, "labels to be a tensor, got list"),
    ((X, X), 2, "`targets=2` should name a part of the batch"),
])  # fmt: skip
def test_labels_that_can_not_be_told_are_refused(batch: Any, targets: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select_targets(Model(), batch, targets)


@pytest.mark.parametrize(("result", "expected"), [
    (X, X + 1),
    ((X, (X, X)), (X + 1, (X, X))),  # an LSTM's
    ([LABELS, X, X], [LABELS, X + 1, X]),
    (Pair(LABELS, X), Pair(LABELS, X + 1)),
    (ModelOutput(ids=LABELS, hidden=X, pooled=X), ModelOutput(ids=LABELS, hidden=X + 1, pooled=X)),
])  # fmt: skip
def test_the_first_floating_tensor_that_a_submodule_returns_is_perturbed(result: Any, expected: Any) -> None:
    new = perturbed_result(result, lambda tensor: tensor + 1)
    assert type(new) is type(expected)
    torch.testing.assert_close(new, expected)
    assert not X.any()


@pytest.mark.parametrize("result", [LABELS, {"ids": LABELS}, None, X.to_sparse(), [X.to_sparse()]])
def test_what_holds_none_is_refused(result: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"What the submodule \(`at=`\) .* a dense floating tensor, got"
    ):
        perturbed_result(result, torch.exp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 10), (4, 3, 5)])
def test_probabilities_are_told_from_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert are_log_probabilities(logits.log_softmax(1)) and are_probabilities(logits.softmax(1))
    for others in (logits, -logits.abs(), logits.log_softmax(1) - 0.5, logits.softmax(1), logits[:, :1], logits[:0]):
        assert not are_log_probabilities(others)
    for others in (logits, logits.abs(), logits.sigmoid(), logits.log_softmax(1), logits[:, :1] * 0 + 1, logits[:0]):
        assert not are_probabilities(others)
    with torch.autocast("cpu", torch.bfloat16):  # widened after they were rounded
        assert are_probabilities(logits.bfloat16().softmax(1).float())
