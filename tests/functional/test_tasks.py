import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import tasks as T

LOGITS, SINGLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).split(3, dim=1)
CLASSES, BITS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
ONE_HOT, DENSE = torch.eye(3)[CLASSES], torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])


@pytest.mark.parametrize(("outputs", "targets", "task"), [
    (LOGITS, CLASSES.byte(), "multiclass"),
    (LOGITS, CLASSES.where(BITS == 0, -100), "multiclass"),
    (DENSE, torch.arange(10).reshape(2, 5) % 7, "multiclass"),
    (torch.randn(2, 1000), torch.arange(2), "multiclass"),  # too few to be sure of anything
    (SINGLE, BITS.bool(), "binary"),
    (SINGLE[:, 0], BITS.bool(), "binary"),
    (LOGITS, MULTI_HOT, "multilabel"),
])  # fmt: skip
def test_a_task_without_doubt_is_inferred(outputs: Tensor, targets: Tensor, task: str) -> None:
    assert T.infer_task(outputs, targets) == task
    T.check_task(outputs, targets, task)


@pytest.mark.parametrize(("outputs", "targets", "message"), [
    (SINGLE, BITS.float(), "floating. Say `task='binary'`"),  # labels for BCEWithLogitsLoss, or numbers
    (LOGITS, LOGITS.softmax(1), "floating.*`task='multiclass'`"),
    (SINGLE, BITS, "integers.* Say `task='binary'`"),
    (LOGITS, ONE_HOT.long(), "one-hot. Say `task='multiclass'`"),
    (torch.randn(40, 784), torch.arange(40) % 10, "first 10 of 784 outputs"),  # an embedding, say
])  # fmt: skip
def test_a_task_in_doubt_is_not_chosen(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        T.infer_task(outputs, targets)


@pytest.mark.parametrize(("task", "outputs", "targets", "message"), [
    ("multiclass", LOGITS, CLASSES + 1, "labels from 0 to 2, .* got 1 to 3"),
    ("multiclass", LOGITS, CLASSES.byte().where(CLASSES < 2, 156), "got 0 to 156"),  # which is -100 in 8 bits
    ("multiclass", LOGITS, CLASSES - 1, "-100.* got -1 to 1.*`ignore_index`.*`targets=`"),
    ("multiclass", LOGITS, CLASSES[:, None], r"\(N, ...\).*shape \(6, 1\)"),
    ("multiclass", DENSE, torch.zeros(2, 7).long(), "`outputs=lambda y: y.movedim"),
    ("multiclass", LOGITS, CLASSES.float(), r"integers.*\.long\(\)"),
    ("multiclass", SINGLE, BITS, "K > 1"),
    ("multiclass", LOGITS, MULTI_HOT.float(), "sum to 1"),
    ("binary", LOGITS, BITS, "one output"),
    ("binary", SINGLE, CLASSES, "labels from 0 to 1, .* got 0 to 2"),
    ("binary", BITS, BITS, "floating outputs"),
    ("multilabel", LOGITS, CLASSES, "one label per output"),
    ("multilabel", LOGITS, ONE_HOT / 0, "labels from 0 to 1"),
])  # fmt: skip
def test_labels_of_another_task_are_refused(task: str, outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        T.check_task(outputs, targets, task)


def test_probabilities_are_in_single_precision_or_better() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = DENSE.to(dtype).to(torch.promote_types(dtype, torch.float32))
        for task, expected in zip(T.TASKS, (wide.softmax(1), wide.sigmoid(), wide.sigmoid()), strict=True):
            torch.testing.assert_close(T.probabilities(DENSE.to(dtype), task), expected)
    assert T.probabilities(torch.randn(7), "binary").shape == (7, 1)


def test_labels_line_up_with_probabilities() -> None:
    targets = torch.tensor([[0, 6, -100, 3, 1], [2, 2, 5, 4, -100]])
    y, counts = T.target_probabilities(DENSE, targets, "multiclass")
    assert torch.equal(counts.bool(), targets != -100)
    assert torch.equal(y.movedim(1, -1)[counts.bool()], torch.eye(7)[targets[targets != -100]])
    soft = LOGITS.softmax(1)
    T.check_task(LOGITS, soft, "multiclass")
    for labels, p, task in ((soft, LOGITS, "multiclass"), (BITS.bool(), SINGLE, "binary")):
        y, counts = T.target_probabilities(p, labels, task)
        assert torch.equal(y, labels.float().reshape(p.shape)) and counts.tolist() == [1] * 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 10), (4, 3, 5)])
def test_probabilities_are_told_from_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    assert T.are_log_probabilities(log_p) and T.are_probabilities(p)
    assert T.are_probabilities(logits.bfloat16().softmax(1).float())  # as autocast widens them after rounding
    for others in (logits, logits[:, :1], logits[:0], -logits.abs(), log_p - 0.5, p):
        assert not T.are_log_probabilities(others)
    for others in (logits, logits[:, :1] * 0 + 1, logits[:0], logits.abs(), logits.sigmoid(), log_p):
        assert not T.are_probabilities(others)


@given(size=st.integers(0, 9), width=st.integers(1, 20))
@settings(deadline=None)
def test_chunks_are_small_and_hold_all_samples_in_order(size: int, width: int) -> None:
    x, chunks = torch.rand(size, width), list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "_CHUNK", 12)
        second = T.in_chunks(lambda a, b: chunks.append(a) or b, x, x[:, 0])  # type: ignore[func-returns-value]
    assert torch.equal(torch.cat(chunks), x) and torch.equal(torch.cat(second), x[:, 0])
    assert all(chunk.numel() <= max(12, width) for chunk in chunks)
