"""Tasks: which labels fit which outputs, what is said of others, and what both become."""

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional import tasks as T
from lightning_sensitivity.functional import tensors

LOGITS, SINGLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).split(3, dim=1)
CLASSES, BITS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])
SOFT = torch.tensor([[0.2, 0.3, 0.5]] * 5 + [[-100.0] * 3])

REFUSED: dict[str, tuple[str, Tensor, Tensor, str]] = {
    "-100 in 8 bits": ("multiclass", LOGITS, CLASSES.byte().where(CLASSES < 2, 156), "got 0 to 156"),
    "another `ignore_index`": ("multiclass", LOGITS, CLASSES - 1, "-100.* got -1 to 1"),
    "a label for some": ("multiclass", LOGITS, CLASSES[:4], r"class indices \(N,\).*shape \(4,\)"),
    "one output": ("multiclass", SINGLE, BITS.float(), "one output. Set `task='binary'`.*`task='regression'`"),
    "class indices as floats": ("multiclass", LOGITS, CLASSES.float(), "one label per output.*torch.float32"),
    "one-hot integers": ("multiclass", LOGITS, MULTI_HOT, "make one-hot labels floating"),
    "several classes": ("multiclass", LOGITS, MULTI_HOT.float(), r"sum to 1.*set `task='multilabel'`"),
    "bools": ("multiclass", LOGITS, BITS.bool(), "Expected class indices .* torch.bool"),
    "nan for a label": ("binary", SINGLE, CLASSES / CLASSES, "but got nan"),
    "a label above 1": ("binary", SINGLE, CLASSES, "labels from 0 to 1, .* got 0 to 2"),
    "labels -1 and 1": ("binary", SINGLE, 2 * BITS - 1, "got -1 to 1"),
    "nan for a bit": ("binary", SINGLE, BITS * torch.nan, "from 0 to 1"),
    "several outputs": ("binary", LOGITS, BITS, r"Expected one output.*shape \(6, 3\).*leave `task` out"),
    "several labels": ("binary", LOGITS, MULTI_HOT.float(), "Expected one output.*set `task='multilabel'`"),
    "two columns of bits": ("binary", SINGLE, MULTI_HOT[:, :2], "one label per output"),
    "two classes at once": ("binary", SINGLE, MULTI_HOT[:, :2].float(), "sum to 1"),
    "a target for some outputs": ("regression", LOGITS, SINGLE, r"one target per output.*\(6, 3\).*\(6, 1\)"),
    "a number for a label": ("multilabel", LOGITS, 2.0 * MULTI_HOT, "labels from 0 to 1, .* got 0 to 2"),
    "indices for labels": ("multilabel", LOGITS, CLASSES, "one label per output"),
    "an infinite target": ("regression", SINGLE, SINGLE / 0, "finite targets"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_labels_of_another_task_are_refused(what: str) -> None:
    task, outputs, targets, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        T.TASKS[task].check(outputs, targets)


EXPECTED = torch.eye(3)[CLASSES]
COLUMN = BITS[:, None].float()
BOTH = torch.cat([1 - COLUMN, COLUMN], 1)  # probabilities of both classes
YES, NUMBERS = (each.where(MULTI_HOT == 1, torch.nan) for each in (MULTI_HOT.float(), LOGITS))
SEEN = EXPECTED.where(CLASSES[:, None] < 2, torch.nan)
KNOWN, POSITIVE = SOFT.where(SOFT >= 0, torch.nan), BOTH.where(COLUMN == 1, torch.nan)
ACCEPTED: dict[str, tuple[str, Tensor, Tensor, Tensor]] = {  # and the matrix that labels become
    "class indices": ("multiclass", LOGITS, CLASSES, EXPECTED),
    "a column of indices": ("multiclass", LOGITS, CLASSES[:, None], EXPECTED),
    "indices in 8 bits": ("multiclass", LOGITS, CLASSES.to(torch.int8), EXPECTED),
    "some ignored": ("multiclass", LOGITS, CLASSES.where(CLASSES < 2, -100), SEEN),
    "soft labels, one ignored": ("multiclass", LOGITS, SOFT, KNOWN),
    "soft labels in 16 bits": ("multiclass", LOGITS, SOFT.bfloat16(), KNOWN.bfloat16().float()),
    "bools for a vector": ("binary", SINGLE[:, 0], BITS.bool(), BOTH),
    "bits for a column": ("binary", SINGLE, BITS, BOTH),
    "a column of floats, some ignored": ("binary", SINGLE, COLUMN.where(COLUMN == 1, -100.0), POSITIVE),
    "probabilities": ("binary", SINGLE, COLUMN / 3, torch.cat([1 - COLUMN / 3, COLUMN / 3], 1)),
    "probabilities of both classes": ("binary", SINGLE, 0.5 * BOTH + 0.25, 0.5 * BOTH + 0.25),
    "numbers": ("regression", SINGLE, CLASSES, CLASSES[:, None].float()),
    "several numbers": ("regression", LOGITS, -LOGITS, -LOGITS),
    "several numbers, some unknown": ("regression", LOGITS, NUMBERS, NUMBERS),
    "several labels": ("multilabel", LOGITS, MULTI_HOT, MULTI_HOT.float()),
    "several labels, some unknown": ("multilabel", LOGITS, MULTI_HOT.where(MULTI_HOT == 1, -100), YES),
    "several labels, some nan": ("multilabel", LOGITS, YES.half(), YES),
    "one of several labels": ("multilabel", SINGLE, BITS.bool(), COLUMN),
    "-100, which is a number like others": ("regression", SINGLE[:, 0], SINGLE - 100, SINGLE - 100),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_labels_of_the_task_become_a_matrix_like_predictions_and_a_matrix_stays(what: str) -> None:
    name, outputs, targets, expected = ACCEPTED[what]
    task = T.TASKS[name]
    task.check(outputs, targets)
    num_columns = task.num_columns(tuple(outputs.shape[1:]))
    p, y = task.predictions(outputs), task.label_matrix(targets, num_columns)
    assert p.shape == y.shape == (6, num_columns)
    for matrix in (y, task.label_matrix(y)):
        torch.testing.assert_close(matrix.float(), expected, rtol=0, atol=0, equal_nan=True)
    logits = task.output_matrix(outputs)
    assert torch.equal(task.output_matrix(logits), logits) and torch.equal(task.predictions(logits), p)
    assert torch.equal(task.has_label(targets), ~expected.isnan().all(1))
    assert torch.equal(task.known(targets).expand_as(expected), ~expected.isnan())


def test_predictions_choose_classes_and_have_the_score_that_labels_drawn_from_them_would_have() -> None:
    multiclass, binary, regression = (T.TASKS[name] for name in ("multiclass", "binary", "regression"))
    p, q = multiclass.predictions(LOGITS.double()), binary.predictions(SINGLE.double())
    single = SINGLE.double().sigmoid()[:, 0]
    torch.testing.assert_close(q, torch.stack([1 - single, single], 1))
    torch.testing.assert_close(binary.distances(q, BOTH), (single - BITS).square())  # half the sum, as everywhere
    assert torch.equal(multiclass.hard_labels(p), LOGITS.argmax(1))
    assert torch.equal(binary.hard_labels(q), (SINGLE[:, 0] > 0).long())
    assert torch.equal(regression.hard_labels(LOGITS), LOGITS)


def test_an_unknown_task_is_refused_with_those_that_are_known() -> None:
    known = "'multiclass', 'binary', 'multilabel', 'regression'"
    with pytest.raises(ValueError, match=f"`task` to be one of {known}, but got 'multi-label'"):
        T.find_task("multi-label")


def test_soft_labels_are_not_rounded_to_the_16_bits_of_outputs() -> None:
    outputs, q = torch.zeros(2, 3).bfloat16(), torch.tensor([[0.501, 0.3003, 0.7001], [0.1234, 0.9876, 0.5]])
    for task in map(T.find_task, ("multiclass", "multilabel")):
        y = q / q.sum(1, keepdim=True) if task.name == "multiclass" else q
        outputs[:, 0] = 3
        torch.testing.assert_close(task.losses(outputs, y, y), task.losses(outputs.float(), y, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_are_told_from_logits(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(T.TASKS["multiclass"].predictions(logits[..., 0]), wide[..., 0].softmax(1))
    assert all(tensors.are_probabilities(each) for each in (log_p.exp(), p, (0 * logits).softmax(1)))
    assert tensors.are_probabilities(logits.bfloat16().softmax(1).float())  # as autocast widens them after rounding
    for others in (logits, logits[:, :1], logits[:0], -logits.abs(), log_p - 0.5, p):
        assert not tensors.are_probabilities(others.exp())
    for others in (logits, logits[:, :1] * 0 + 1, logits[:0], logits.abs(), logits.sigmoid(), log_p, p[:1, :, 0]):
        assert not tensors.are_probabilities(others)
