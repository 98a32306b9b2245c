import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import (
    TASKS,
    check_logits,
    check_task,
    classes_last,
    infer_task,
    predictions,
    target_predictions,
)

N, K = 6, 3
LOGITS, SINGLE = torch.randn(N, K + 1, generator=torch.Generator().manual_seed(0)).split(K, dim=1)
ONE_HOT = torch.eye(K)[[0, 1, 2, 0, 1, 2]]
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])
BITS = torch.tensor([0, 1, 0, 0, 1, 1])
NUMBERS = torch.tensor([0.3, -1.0, 7.0, 0.0, 1.0, 2.5])


@pytest.mark.parametrize(("outputs", "targets", "task"), [
    (LOGITS, CLASSES, "multiclass"),
    (LOGITS, CLASSES.byte(), "multiclass"),
    (torch.randn(N, K, 2, 2), torch.randint(0, K, (N, 2, 2)), "multiclass"),
    (torch.randn(4, 1000), torch.arange(4), "multiclass"),  # too few to be sure of anything
    (SINGLE, BITS.bool(), "binary"),
    (SINGLE[:, 0], BITS.bool(), "binary"),
    (LOGITS, MULTI_HOT, "multilabel"),
])  # fmt: skip
def test_a_task_without_doubt_is_inferred(outputs: Tensor, targets: Tensor, task: str) -> None:
    assert infer_task(outputs, targets) == task
    check_task(outputs, targets, task)


@pytest.mark.parametrize(("outputs", "targets", "message"), [
    (SINGLE, BITS.float(), "could be targets or classes"),  # labels for BCEWithLogitsLoss, or numbers
    (LOGITS, torch.randn(N, K).softmax(1), "could be targets or classes"),
    (SINGLE, BITS, "classes or counts"),
    (LOGITS, ONE_HOT.long(), "one-hot rows"),
    (torch.randn(40, 784), torch.arange(40) % 10, "more than the first 10 of so many classes"),  # an autoencoder
])  # fmt: skip
def test_a_task_in_doubt_is_not_chosen(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*[:,] got outputs of shape .* and labels of type"):
        infer_task(outputs, targets)


def test_probabilities_are_refused_where_they_can_be_told() -> None:
    check_logits(LOGITS, "multiclass")
    check_logits(LOGITS.softmax(1), "multilabel")
    for probabilities in (LOGITS.softmax(1), LOGITS.softmax(1).bfloat16(), torch.eye(3)):
        with pytest.raises(ValueError, match="got probabilities"):
            check_logits(probabilities, "multiclass")


@pytest.mark.parametrize(("task", "outputs", "targets", "message"), [
    ("multiclass", LOGITS, CLASSES + 1, "labels from 0 to 2, .* got 1 to 3"),
    ("multiclass", LOGITS, CLASSES.byte().where(CLASSES < 2, 156), "got 0 to 156"),  # which is -100 in 8 bits
    ("multiclass", LOGITS, CLASSES[:, None], r"integer labels \(N, ...\), got .* shape \(6, 1\)"),
    ("multiclass", LOGITS, CLASSES.float(), r"integers for classes, .*\.long\(\)"),
    ("multiclass", SINGLE, BITS, "K > 1"),
    ("multiclass", LOGITS, MULTI_HOT.float(), "sum to 1 over the classes"),
    ("binary", LOGITS, BITS, "one output"),
    ("binary", SINGLE, CLASSES, "labels from 0 to 1, got 0 to 2"),
    ("multilabel", LOGITS, CLASSES, "one label per output"),
    ("regression", SINGLE, NUMBERS.repeat(2), r"one label per output, got .*\(6, 1\) and labels .*\(12,\)"),
    ("regression", SINGLE, NUMBERS / 0, "finite labels"),
    ("regression", CLASSES, NUMBERS, "floating outputs"),
])  # fmt: skip
def test_labels_of_another_task_are_refused(task: str, outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(outputs, targets, task)


@pytest.mark.parametrize("targets", [ONE_HOT, LOGITS.softmax(1)])
def test_soft_labels_are_taken_when_the_task_is_told(targets: Tensor) -> None:
    check_task(LOGITS, targets, "multiclass")
    y, counts = target_predictions(LOGITS, targets, "multiclass")
    assert torch.equal(y, targets) and counts.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_predictions_are_probabilities_except_in_a_regression(dtype: torch.dtype) -> None:
    outputs = torch.randn(2, 3, 4, 5).to(dtype)
    wide = outputs.to(torch.promote_types(dtype, torch.float32))
    expected = {"regression": wide, "multiclass": wide.softmax(1)}
    for task in TASKS:
        torch.testing.assert_close(predictions(outputs, task), expected.get(task, wide.sigmoid()))
    assert predictions(torch.randn(7), "binary").shape == (7, 1)


def test_labels_line_up_with_predictions() -> None:
    outputs, targets = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    y, counts = target_predictions(outputs, targets, "multiclass")
    assert torch.equal(y.argmax(1), targets) and torch.equal(y.sum(1), torch.ones(2, 4, 5)) and counts.all()
    numbers, _ = target_predictions(outputs, outputs, "regression")
    assert torch.equal(numbers, outputs)
    y, counts = target_predictions(SINGLE[:, 0], BITS.bool(), "binary")  # the layout of predictions, not of labels
    assert torch.equal(y, BITS[:, None].float()) and counts.shape == (N,)


def test_labels_that_cross_entropy_ignores_do_not_count() -> None:
    targets = torch.tensor([0, -100, 2, 1, -100, 2])
    assert infer_task(LOGITS, targets) == "multiclass"
    _, counts = target_predictions(LOGITS, targets, "multiclass")
    assert counts.tolist() == [1, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match=r"or -100 for what is ignored, got -1 to 2.*`ignore_index`.*`targets=`"):
        check_task(LOGITS, targets.clamp(min=-1), "multiclass")


@pytest.mark.parametrize(("outputs", "targets", "expected"), [
    ((2, 7, 5), (2, 7), True),  # as transformers' token classifiers have it
    ((2, 5, 7), (2, 7), False),
    ((2, 5, 5), (2, 5), False),  # can be both: as torch has it
    ((2, 7, 5), (2, 7, 5), False),
])  # fmt: skip
def test_labels_say_where_the_classes_are(outputs: tuple[int, ...], targets: tuple[int, ...], expected: bool) -> None:
    assert classes_last(torch.zeros(outputs), torch.zeros(targets).long()) == expected
    assert not classes_last(torch.zeros(outputs), torch.zeros(targets))  # numbers
