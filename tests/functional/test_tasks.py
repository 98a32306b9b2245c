import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional import tasks as T
from lightning_sensitivity.functional import tensors

LOGITS, SINGLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).split(3, dim=1)
CLASSES, BITS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
DENSE = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])


# More, with what a monitor does, are in test_silent.py.
REFUSED: dict[str, tuple[str, Tensor, Tensor, str]] = {
    "-100 in 8 bits": ("multiclass", LOGITS, CLASSES.byte().where(CLASSES < 2, 156), "got 0 to 156"),
    "another `ignore_index`": ("multiclass", LOGITS, CLASSES - 1, "-100.* got -1 to 1.*`targets=`.*`ignore_index`"),
    "a label outside": ("multiclass", LOGITS, CLASSES + 1, "labels from 0 to 2, .* got 1 to 3"),
    "a label for some positions": ("multiclass", DENSE, torch.zeros(2, 7).long(), r"\(N, ...\).*shape \(2, 7\)"),
    "a column of labels": ("multiclass", LOGITS, CLASSES[:, None], r"`targets=lambda batch: batch\[1\].squeeze\(1\)`"),
    "soft labels of another sum": ("multiclass", LOGITS, MULTI_HOT.float(), "sum to 1"),
    "floating class indices": ("multiclass", LOGITS, CLASSES.float(), r"Make class indices integers.*\.long\(\)"),
    "one output for classes": ("multiclass", SINGLE, BITS, "K > 1"),
    "one output for several labels": ("multilabel", SINGLE, BITS[:, None], "K > 1"),
    "several outputs for one label": ("binary", LOGITS, BITS, "one output"),
    "a label above 1": ("binary", SINGLE, CLASSES, "labels from 0 to 1, .* got 0 to 2$"),
    "labels -1 and 1": (
        "binary",
        SINGLE,
        2 * BITS - 1,
        r"-1 to 0: `targets=lambda batch: \(batch\[1\] \+ 1\) / 2`",
    ),
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
    for others in (logits, logits[:, :1] * 0 + 1, logits[:0], logits.abs(), logits.sigmoid(), log_p):
        assert not tensors.are_probabilities(others)


def test_labels_that_name_few_of_many_outputs_are_refused() -> None:
    for num_outputs, num_named, num_labels in ((784, 10, 40), (100, 70, 500)):
        with pytest.raises(ValueError, match="embedding"):
            T.check_classes(num_outputs, torch.arange(num_labels) % num_named)
    for num_outputs, num_named, num_labels in ((100, 81, 500), (11, 8, 20), (10, 2, 500)):
        T.check_classes(num_outputs, torch.arange(num_labels) % num_named)
    T.check_classes(784, torch.full((500,), -100))
