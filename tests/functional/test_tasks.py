import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional import tasks as T
from lightning_sensitivity.functional import tensors

LOGITS, SINGLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).split(3, dim=1)
CLASSES, BITS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
DENSE = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])


# Those of one path are in test_silent.py, with what a monitor does.
REFUSED: dict[str, tuple[str, Tensor, Tensor, str]] = {
    "-100 in 8 bits": ("multiclass", LOGITS, CLASSES.byte().where(CLASSES < 2, 156), "got 0 to 156"),
    "another `ignore_index`": ("multiclass", LOGITS, CLASSES - 1, "-100.* got -1 to 1.*`targets=`.*`ignore_index`"),
    "a label for some positions": ("multiclass", DENSE, torch.zeros(2, 7).long(), r"\(N, ...\).*shape \(2, 7\)"),
    "a column of labels": ("multiclass", LOGITS, CLASSES[:, None], r"`targets=lambda batch: batch\[1\].squeeze\(1\)`"),
    "one output": ("multiclass", SINGLE, BITS.float(), "float32 for one output. Set `task='binary'`"),
    "several classes, floats": ("multiclass", LOGITS, MULTI_HOT.float(), "sum to 1.*`task='multilabel'`"),
    "one output for several labels": ("multilabel", SINGLE, BITS[:, None], "K > 1.*`task='binary'`"),
    "class indices for several labels": ("multilabel", LOGITS, CLASSES, "Leave `task` out if labels are class indices"),
    "a label above 1": ("binary", SINGLE, CLASSES, "labels from 0 to 1, .* got 0 to 2$"),
    "labels -1 and 1": ("binary", SINGLE, 2 * BITS - 1, r"`targets=lambda batch: \(batch\[1\] \+ 1\) / 2`"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_labels_of_another_task_are_refused(what: str) -> None:
    task, outputs, targets, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        T.TASKS[task].check(outputs, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_are_told_from_logits(dtype: torch.dtype) -> None:
    logits = (5 * DENSE).to(dtype)
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(T.TASKS["multiclass"].probabilities(logits), wide.softmax(1))
    assert tensors.are_log_probabilities(log_p) and tensors.are_probabilities(p)
    assert tensors.are_probabilities(logits.bfloat16().softmax(1).float())  # as autocast widens them after rounding
    for others in (logits, logits[:, :1], logits[:0], -logits.abs(), log_p - 0.5, p):
        assert not tensors.are_log_probabilities(others)
    for others in (logits, logits[:, :1] * 0 + 1, logits[:0], logits.abs(), logits.sigmoid(), log_p, p[:1, :, 0]):
        assert not tensors.are_probabilities(others)


ACCEPTED: dict[str, tuple[str, Tensor, Tensor]] = {
    "class indices": ("multiclass", LOGITS, CLASSES),
    "class indices in 8 bits": ("multiclass", LOGITS, CLASSES.to(torch.int8).where(CLASSES < 2, -100)),
    "soft labels, one ignored": ("multiclass", LOGITS, torch.tensor([[0.2, 0.3, 0.5]] * 5 + [[-100.0] * 3])),
    "dense": ("multiclass", DENSE, torch.zeros(2, 5).long()),
    "bools for a vector": ("binary", SINGLE[:, 0], BITS.bool()),
    "a column of floats": ("binary", SINGLE, BITS[:, None].float()),
    "several labels": ("multilabel", LOGITS, MULTI_HOT),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_labels_of_the_task_become_probabilities(what: str) -> None:
    task, outputs, targets = ACCEPTED[what]
    kind = T.TASKS[task]
    kind.check(outputs, targets)
    p = kind.probabilities(outputs)
    y, counts = kind.target_probabilities(p, targets)
    assert y.shape == p.shape and y.min() >= 0 and y.max() <= 1
    has_label = (targets.long() != -100).reshape(len(targets), -1).all(1)
    assert torch.equal(counts.reshape(len(targets), -1).all(1), has_label)
    if targets.shape == outputs.shape[:1] and task == "multiclass":
        assert torch.equal(y.argmax(1)[has_label], targets.long()[has_label])
    if p.ndim == 2 and bool(has_label.all()):
        assert torch.equal(kind.as_matrix(targets).to(y), y)


@pytest.mark.parametrize("task", T.TASKS)
def test_vectors_are_as_far_apart_as_the_brier_score_says(task: str) -> None:
    kind, g = T.TASKS[task], torch.Generator().manual_seed(0)
    p, q = (kind.clip(torch.rand(6, 4, generator=g, dtype=torch.float64)) for _ in range(2))
    distances = (kind.as_vectors(p) - kind.as_vectors(q)).square().sum(1)
    torch.testing.assert_close(distances, kind.distances(p, q))
    clipped = kind.clip(torch.tensor([[-1.0, 0.5, 2.0]]))
    assert clipped.min() >= 0 and clipped.max() <= 1 and (task != "multiclass" or clipped.sum() == 1)
