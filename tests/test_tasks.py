import pytest
import torch
from torch import Tensor

from lightning_sensitivity.tasks import TASKS, check_logits, check_task, infer_task, predictions, target_rows

N, K = 6, 3
LOGITS, SINGLE = torch.randn(N, K), torch.randn(N, 1)
ONE_HOT = torch.eye(K)[[0, 1, 2, 0, 1, 2]]
MULTI_HOT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])
BITS = torch.tensor([0, 1, 0, 0, 1, 1])
NUMBERS = torch.tensor([0.3, -1.0, 7.0, 0.0, 1.0, 2.5])


@pytest.mark.parametrize(
    ("outputs", "targets", "task"),
    [
        (LOGITS, CLASSES, "multiclass"),
        (LOGITS, CLASSES.int(), "multiclass"),
        (LOGITS, CLASSES.byte(), "multiclass"),
        (LOGITS[:, :2], BITS, "multiclass"),
        (torch.randn(N, K, 2, 2), torch.randint(0, K, (N, 2, 2)), "multiclass"),
        (torch.randn(40, 1000), torch.arange(500, 540), "multiclass"),
        (torch.randn(4, 1000), torch.arange(4), "multiclass"),  # too few to be sure of anything
        (SINGLE, BITS.bool(), "binary"),
        (SINGLE, BITS[:, None].bool(), "binary"),
        (SINGLE[:, 0], BITS.bool(), "binary"),
        (torch.randn(N, 1, 4, 4), torch.randint(0, 2, (N, 4, 4)).bool(), "binary"),
        (LOGITS, MULTI_HOT, "multilabel"),
        (LOGITS, MULTI_HOT.bool(), "multilabel"),
    ],
)
def test_a_task_without_doubt_is_inferred(outputs: Tensor, targets: Tensor, task: str) -> None:
    assert infer_task(outputs, targets) == task
    check_task(outputs, targets, task)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (SINGLE, BITS.float(), "what floating labels are"),  # labels for BCEWithLogitsLoss, or numbers
        (SINGLE, NUMBERS, "what floating labels are"),
        (LOGITS, 2.0 * MULTI_HOT - 1, "what floating labels are"),
        (LOGITS, torch.randn(N, K).softmax(1), "what floating labels are"),
        (SINGLE, BITS, "classes or counts"),
        (SINGLE[:, 0], CLASSES, "classes or counts"),
        (LOGITS, ONE_HOT.long(), "one-hot rows are classes or several labels"),
        (torch.randn(40, 784), torch.arange(40) % 10, "more than the first 10 of so many classes"),  # an autoencoder
    ],
)
def test_a_task_in_doubt_is_not_chosen(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*, got outputs of shape .* and labels of type"):
        infer_task(outputs, targets)


@pytest.mark.parametrize(
    ("outputs", "targets"), [(LOGITS, CLASSES + 1), (LOGITS, CLASSES[:3]), (LOGITS, 3 * MULTI_HOT), (LOGITS[0], LOGITS)]
)
def test_where_none_fits_it_says_so(outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected"):
        infer_task(outputs, targets)


def test_probabilities_are_refused_where_they_can_be_told() -> None:
    check_logits(LOGITS, "multiclass")
    check_logits(LOGITS.softmax(1), "multilabel")
    for probabilities in (LOGITS.softmax(1), LOGITS.softmax(1).bfloat16(), torch.eye(3)):
        with pytest.raises(ValueError, match="got probabilities"):
            check_logits(probabilities, "multiclass")


def test_labels_of_8_bits_do_not_wrap_around() -> None:
    with pytest.raises(ValueError, match="labels from 0 to 2, got 0 to 156"):
        check_task(LOGITS, torch.tensor([0, 1, 156, 0, 1, 2], dtype=torch.uint8), "multiclass")
    check_task(torch.randn(2, 1000), torch.tensor([1, 200], dtype=torch.uint8), "multiclass")


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "message"),
    [
        ("multiclass", LOGITS, CLASSES + 1, "labels from 0 to 2, got 1 to 3"),
        ("multiclass", LOGITS, CLASSES - 1, "labels from 0 to 2, got -1 to 1"),
        ("multiclass", LOGITS, CLASSES[:, None], r"integer labels \(N, ...\), got .* shape \(6, 1\)"),
        ("multiclass", LOGITS, BITS.bool(), "integer labels"),
        ("multiclass", SINGLE, BITS, "K > 1"),
        ("multiclass", LOGITS, MULTI_HOT.float(), "sum to 1 over the classes"),
        ("binary", LOGITS, BITS, "one output"),
        ("binary", SINGLE, CLASSES, "labels from 0 to 1, got 0 to 2"),
        ("multilabel", LOGITS, CLASSES, "one label per output"),
        ("multilabel", SINGLE, BITS, "K > 1"),
        ("multilabel", LOGITS, 2 * MULTI_HOT, "labels from 0 to 1, got 0 to 2"),
        ("regression", SINGLE, NUMBERS.repeat(2), r"one label per output, got .*\(6, 1\) and labels .*\(12,\)"),
        ("regression", SINGLE, NUMBERS / 0, "finite labels"),
        ("regression", CLASSES, NUMBERS, "floating outputs"),
    ],
)
def test_labels_of_another_task_are_refused(task: str, outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(outputs, targets, task)


def test_soft_labels_are_taken_when_the_task_is_told() -> None:
    for targets in (ONE_HOT, torch.randn(N, K).softmax(1)):
        check_task(LOGITS, targets, "multiclass")
        rows, counts = target_rows(LOGITS, targets, "multiclass")
        assert torch.equal(rows.float(), targets) and counts.all()
    check_task(SINGLE, NUMBERS.sigmoid(), "binary")


def test_predictions_are_probabilities_except_in_a_regression() -> None:
    outputs = torch.randn(2, 3, 4, 5)
    scored = {task: predictions(outputs, task) for task in TASKS}
    assert {rows.shape for rows in scored.values()} == {(40, 3)}
    assert {rows.dtype for rows in scored.values()} == {torch.float64}
    flat = outputs.movedim(1, -1).reshape(40, 3).double()
    assert torch.equal(scored["regression"], flat)
    torch.testing.assert_close(scored["multiclass"], flat.softmax(1))
    torch.testing.assert_close(scored["multilabel"], flat.sigmoid())
    assert predictions(torch.randn(7), "binary").shape == (7, 1)


def test_labels_line_up_with_predictions() -> None:
    outputs, targets = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    rows, counts = target_rows(outputs, targets, "multiclass")
    assert torch.equal(rows.argmax(1), targets.flatten()) and torch.equal(rows.sum(1), torch.ones(40).double())
    assert counts.all()
    # The largest output of a perfect model lies where the label is.
    perfect = torch.nn.functional.one_hot(targets, 3).movedim(-1, 1).float()
    assert torch.equal(predictions(perfect, "multiclass").argmax(1), rows.argmax(1))
    numbers, _ = target_rows(outputs, outputs, "regression")
    assert torch.equal(numbers, predictions(outputs, "regression"))


def test_labels_that_cross_entropy_ignores_do_not_count() -> None:
    targets = torch.tensor([0, -100, 2, 1, -100, 2])
    assert infer_task(LOGITS, targets) == "multiclass"
    _, counts = target_rows(LOGITS, targets, "multiclass")
    assert counts.tolist() == [True, False, True, True, False, True]
