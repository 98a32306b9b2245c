"""What metrics to expect, if labels are drawn from the predictions of a reference, and how sure that is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot
from torchmetrics import MeanSquaredError
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_auroc

from lightning_sensitivity import Reference
from lightning_sensitivity.functional import draw_labels, expected_loss, expected_metric
from lightning_sensitivity.functional.expected import (
    ESTIMATES,
    Estimate,
    combine,
    estimate,
    metric_value,
    weight_beside,
)
from lightning_sensitivity.functional.tasks import TASKS, measure_mean
from tests.helpers import Watch

SIZES = {"multiclass": 4, "binary": 1, "regression": 2}
ERRORS = np.linspace(-1, 2, 20)[:, None] * np.array([1.0, 3.0])  # of two targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(task: str = "multiclass", num_samples: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs of a network, and predictions of a reference, which is another one."""
    outputs, others = 2 * torch.randn(2, num_samples, SIZES[task], generator=generator(seed), dtype=torch.float64)
    others = outputs + others
    return outputs, {"multiclass": others.softmax(1), "binary": others.sigmoid(), "regression": others}[task]


# The labels


@given(seed=st.integers(0, 999), num_classes=st.integers(2, 12), num_samples=st.integers(300, 600))
@example(seed=437, num_classes=9, num_samples=300)  # a mean that is farther off than most
@settings(max_examples=15, deadline=None)
def test_labels_are_drawn_by_their_probabilities(seed: int, num_classes: int, num_samples: int) -> None:
    q = (3 * torch.randn(num_samples, num_classes, generator=generator(seed))).softmax(1).double()
    labels = draw_labels(q)
    assert labels.shape == (20, num_samples) and 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    counts = torch.nn.functional.one_hot(labels, num_classes).sum(0)
    assert ((counts - 20 * q).abs() < 1 + 1e-9).all()  # in each sample, to a label
    # And in all of them: a count is one of two whole numbers, whose standard deviation is a half at most.
    deviation = 0.5 / 20 / math.sqrt(num_samples)
    assert ((counts.double().mean(0) / 20 - q.mean(0)).abs() < 5 * deviation).all()
    assert torch.equal(draw_labels(q), labels)


def test_rare_classes_get_their_share_and_impossible_ones_none() -> None:
    rare = torch.tensor([[0.99, 0.01, 0.0]]).repeat(1000, 1)
    assert torch.bincount(draw_labels(rare).flatten(), minlength=3).tolist() == pytest.approx([19800, 200, 0], abs=2)
    last = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(draw_labels(last), torch.tensor([[2, 0, 1]]).expand(20, 3))
    halves = draw_labels(torch.full((400, 1), 0.25), "binary")
    assert torch.equal(draw_labels(np.full(400, 0.25), "binary"), halves)
    assert halves.shape == (20, 400) and halves.double().mean() == pytest.approx(0.25, abs=0.001)


def test_targets_are_drawn_with_the_errors_of_the_reference() -> None:
    _, q = sample("regression")
    targets = draw_labels(q, "regression", ERRORS)
    assert targets.shape == (20, 60, 2) and torch.equal(draw_labels(q, "regression"), q[None])
    torch.testing.assert_close(targets - q, torch.tensor(ERRORS)[:, None].expand(20, 60, 2))


def test_several_labels_are_drawn_each_by_its_probability_and_independently() -> None:
    q = torch.rand(400, 9, generator=generator(), dtype=torch.float64)
    labels = draw_labels(q, "multilabel")
    assert labels.shape == (20, 400, 9) and ((labels.sum(0) - 20 * q).abs() < 1 + 1e-9).all()
    halves = draw_labels(torch.full((400, 9), 0.5), "multilabel").flatten(0, 1).double()
    assert (halves.T.corrcoef() - torch.eye(9)).abs().max() < 0.3


# The metrics


@pytest.mark.parametrize("seed", range(3))
def test_the_accuracy_is_the_mean_probability_of_the_class_that_the_network_chooses(seed: int) -> None:
    logits, q = sample("multiclass", 600, seed)
    expected = q[torch.arange(600), logits.argmax(1)].mean()
    metric = MulticlassAccuracy(4, average="micro")
    assert expected_metric(metric, logits, q) == pytest.approx(float(expected), abs=0.001)
    logits, q = sample("binary", 600, seed)
    expected = q.where(logits > 0, 1 - q).mean()
    for outputs in (logits, logits[:, 0]):
        assert expected_metric(BinaryAccuracy(), outputs, q, "binary") == pytest.approx(float(expected), abs=0.002)


def test_the_area_under_the_curve_is_that_of_pairs_by_their_probabilities() -> None:
    logits, q = sample("binary", 600)
    weights = np.concatenate([1 - q[:, 0], q[:, 0]])  # each sample as both classes
    both, scores = np.repeat([0, 1], 600), np.tile(logits[:, 0], 2)
    expected = roc_auc_score(both, scores, sample_weight=weights)
    assert expected_metric(BinaryAUROC(), logits, q, "binary") == pytest.approx(expected, abs=0.002)
    logits, q = sample("multiclass", 600)
    areas = [
        roc_auc_score(both, np.tile(logits.softmax(1)[:, each], 2), sample_weight=torch.cat([1 - q, q])[:, each])
        for each in range(4)
    ]
    assert expected_metric(MulticlassAUROC(4), logits, q) == pytest.approx(np.mean(areas), abs=0.002)


def test_a_metric_gets_probabilities_and_in_a_regression_outputs() -> None:
    logits, _ = sample("multiclass", 600)
    calibrated = expected_metric(MulticlassCalibrationError(4), logits, logits.softmax(1))
    assert calibrated < 0.01 < expected_metric(MulticlassCalibrationError(4), 3 * logits, logits.softmax(1))
    outputs, q = sample("regression", 60)
    found = expected_metric(MeanSquaredError(), outputs, q, "regression", np.zeros((20, 2)))
    assert found == pytest.approx(float((outputs - q).square().mean()), rel=1e-5)
    loss = expected_loss(outputs, q, "regression", ERRORS)
    assert expected_metric(MeanSquaredError(), outputs, q, "regression", ERRORS) == pytest.approx(float(loss), rel=1e-5)
    single = expected_metric(MeanSquaredError(), outputs[:, 0], q[:, :1], "regression", np.zeros((20, 1)))
    assert single == pytest.approx(float((outputs - q)[:, 0].square().mean()), rel=1e-5)


def test_the_area_of_several_labels_is_torchmetrics_also_of_equal_predictions_and_costs_one_sort() -> None:
    sorts, random = list[int](), generator()
    logits = torch.randn(80, 5, generator=random).round(decimals=1)
    q = torch.rand(80, 5, generator=random)
    q[:, 4] = 0.0  # which is never yes
    metric, draws = TASKS["multilabel"].default_metrics(5)["auroc"], draw_labels(q, "multilabel")
    with Watch(lambda function, args, *_: sorts.append(args[0].numel()) if "sort" in str(function) else None):
        found = expected_metric(metric, logits, q, "multilabel")
    areas = [binary_auroc(logits[:, i].repeat(20), draws[:, :, i].flatten().long()) for i in range(4)]
    assert found == pytest.approx(float(sum(areas) / 4), rel=1e-5) and sorts == [80 * 5]
    assert draws.element_size() == 1  # of which there are 20 for each label


def test_of_several_labels_those_that_are_unknown_are_left_out_and_those_of_one_class_have_no_area() -> None:
    logits, y = torch.randn(90, 4, generator=generator()), torch.randint(2, (90, 4), generator=generator(1))
    y[:, 2], y[:, 3], y[:30, 0] = 1, -100, -100
    metrics, task = TASKS["multilabel"].default_metrics(4), TASKS["multilabel"]
    found = {name: float(metric_value(each, logits.sigmoid(), y[None], task)) for name, each in metrics.items()}
    areas = [roc_auc_score(y[y[:, each] >= 0, each], logits[y[:, each] >= 0, each]) for each in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(areas), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(((logits > 0) == y)[y >= 0].double().mean()), rel=1e-5)
    own = MultilabelF1Score(4)
    expected = MultilabelF1Score(4, ignore_index=-100)(logits.sigmoid(), y)
    assert metric_value(own, logits.sigmoid(), y[None], task) == expected and own.ignore_index is None
    loss = expected_loss(logits, y.double().where(y >= 0, torch.nan), "multilabel")
    known = binary_cross_entropy_with_logits(logits[y >= 0], y[y >= 0].float())
    assert float(loss) == pytest.approx(float(known), rel=1e-5)


def test_a_metric_stays_as_it_is() -> None:
    logits, q = sample()
    metric = MulticlassAccuracy(4, average="micro")
    metric.update(logits, torch.zeros(60).long())
    before = metric.compute()
    fresh = expected_metric(MulticlassAccuracy(4, average="micro"), logits, q)
    assert expected_metric(metric, logits, q) == fresh and metric.compute() == before


@pytest.mark.parametrize(("task", "num_columns", "names"), [
    ("multiclass", 100, ["accuracy", "auroc"]),
    ("multiclass", 101, ["accuracy"]),
    ("binary", 2, ["accuracy", "auroc"]),
    ("multilabel", 200, ["accuracy", "auroc"]),
    ("multilabel", 201, ["accuracy"]),
    ("regression", 2, []),
])  # fmt: skip
def test_metrics_by_default(task: str, num_columns: int, names: list[str]) -> None:
    metrics = TASKS[task].default_metrics(num_columns)
    assert [*metrics] == names and all(each.higher_is_better for each in metrics.values())


def test_other_samples_or_classes_are_refused() -> None:
    logits, q = sample()
    with pytest.raises(ValueError, match="of the same samples, but got 60 and 59"):
        expected_metric(MulticlassAccuracy(4), logits, q[:59])
    with pytest.raises(ValueError, match="of the same samples, but got 60 and 59"):
        expected_loss(logits, q[:59])
    for function in (expected_loss, lambda *args: expected_metric(MeanSquaredError(), *args)):
        with pytest.raises(ValueError, match="Expected `residuals` in a regression"):
            function(*sample("regression"), "regression")
    with pytest.raises(ValueError, match="as many columns, but got 3 and 4"):
        expected_metric(MulticlassAccuracy(4), logits[:, :3], q)
    for outputs, others in ((logits[:, 0], q), (logits[:, :1], q), (logits, q[:, :1])):  # a task was forgotten
        with pytest.raises(ValueError, match="as many columns"):
            expected_loss(outputs, others)
    for function in (draw_labels, lambda p: expected_loss(logits[:, 0], p)):
        with pytest.raises(ValueError, match=r"probabilities \(N, C\), but got the shape \(60,\)"):
            function(q[:, 0])


# The loss


@pytest.mark.parametrize("task", SIZES)
def test_the_expected_loss_is_the_mean_of_torchs_over_all_labels_with_their_chances(task: str) -> None:
    outputs, q = sample(task)
    if task == "multiclass":
        by_class = [cross_entropy(outputs, torch.full((60,), k), reduction="none") for k in range(4)]
        wanted = (torch.stack(by_class, 1) * q).sum(1).mean()
    elif task == "binary":
        wanted = binary_cross_entropy_with_logits(outputs, q)
    else:
        wanted = mse_loss(outputs, q) + 0.25
    residuals = torch.tensor([[0.5], [-0.5]]).expand(2, 2) if task == "regression" else None
    assert expected_loss(outputs, q, task, residuals) == pytest.approx(float(wanted), rel=1e-6)


# Which version the estimates are


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        ("columns", "multiclass", (0.4692979, 1.265943)),
        ("images", "multiclass", (0.6625203, 0.9909917)),
        ("tokens", "multiclass", (0.4517249, 1.276099)),
        ("columns", "regression", (0.3422509, 147.1033)),
    ],
)
def test_estimates_are_of_the_version_that_they_say(kind: str, task: str, expected: tuple[float, float]) -> None:
    """If it fails by intent, raise `ESTIMATES`, and judge the runs of `examples/studies/stopping` again."""
    digits, digit = (torch.tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(400, generator=generator())
    some = digits[:, 20:36]
    x = {"columns": some, "images": digits.reshape(-1, 1, 8, 8), "tokens": (some / 4).long()}[kind][order]
    y = digit[order] % 5 if task == "multiclass" else digits[order, 36]
    y = y.where(torch.arange(400) % 5 > 0, y.roll(1))  # a fifth of them is wrong
    found = Reference(task).fit(x[:300], y[:300])
    outputs = 2.0 * one_hot(y[300:], 5) if task == "multiclass" else torch.zeros(100)
    q = torch.from_numpy(found.predict_matrix(x[300:]))
    loss = expected_loss(outputs, q, task, found.residuals_ if task == "regression" else None)
    assert (ESTIMATES, found.skill_, float(loss)) == (2, *(pytest.approx(each, rel=1e-5) for each in expected))


# Standard errors in closed form


def labelled_sample(task: str, seed: int, size: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of a network, chances of labels that it does not know well, and one label of each sample."""
    z, noise = 1.5 * torch.randn(2, size, 3 if task == "multilabel" else COLUMNS[task], generator=generator(seed))
    if task == "multilabel":
        p, q = z.sigmoid(), (z + noise - 1).sigmoid()
        return p, q, (torch.rand(q.shape, generator=generator(seed + 1000)) < q)[None].to(torch.int8)
    p, q = z.softmax(1), (z + noise).softmax(1)
    return p, q, torch.multinomial(q, 1, generator=generator(seed + 1000)).T


COLUMNS = {"multiclass": 4, "binary": 2}
CLOSED = [(task, name) for task in ("multiclass", "binary", "multilabel") for name in ("accuracy", "auroc")]


@pytest.mark.parametrize(("task", "name"), CLOSED)
def test_a_closed_form_is_what_many_samples_show(task: str, name: str) -> None:
    metric, values = TASKS[task].default_metrics(4)[name], []
    by_labels, by_draws = list[float](), list[float]()
    for seed in range(80):
        p, q, y = labelled_sample(task, seed)
        found = estimate(metric.measure(p, y), 200, None)
        values.append(found.value)
        by_labels.append(found.variance)
        by_draws.append(estimate(metric.measure(p, draw_labels(q, task)), 200, None).variance)
    truth = float(torch.tensor(values).var())
    means = [sum(each) / len(each) for each in (by_labels, by_draws)]
    assert means == pytest.approx([truth, truth], rel=0.35)  # 80 values tell it to a sixth


@given(seed=st.integers(0, 999), size=st.integers(2, 40), num_values=st.integers(2, 50))
@settings(max_examples=25, deadline=None)
def test_the_area_and_its_variance_are_those_of_all_pairs(seed: int, size: int, num_values: int) -> None:
    p = torch.randint(num_values, (size,), generator=generator(seed)) / num_values  # some are equal
    y = torch.randint(2, (size,), generator=generator(seed + 1))
    y[:2] = torch.tensor([0, 1])
    yes, no = p[y == 1], p[y == 0]
    wins = (yes[:, None] > no).double() + (yes[:, None] == no).double() / 2
    measured = TASKS["binary"].default_metrics(2)["auroc"].measure(torch.stack([1 - p, p], 1), y[None])
    assert measured.value == pytest.approx(float(wins.mean()))
    spread = (wins.mean(1) - wins.mean()).square().sum() / len(yes) ** 2
    spread = spread + (wins.mean(0) - wins.mean()).square().sum() / len(no) ** 2
    assert float(measured.influences.square().sum()) == pytest.approx(float(spread), abs=1e-12)


@pytest.mark.parametrize(("task", "name"), CLOSED)
def test_copies_of_samples_that_are_one_group_add_nothing(task: str, name: str) -> None:
    p, q, _ = labelled_sample(task, 0)
    metric, draws, rows = TASKS[task].default_metrics(4)[name], draw_labels(q, task), torch.arange(200).repeat(3)
    once, copies = metric.measure(p, draws), metric.measure(p[rows], draws[:, rows])
    assert estimate(copies, 200, rows) == pytest.approx(estimate(once, 200, None))
    assert estimate(copies, 600, None).variance == pytest.approx(estimate(once, 200, None).variance / 3, rel=0.02)


@pytest.mark.parametrize("sizes", [[20] * 12, [20] * 5, [200] + [20] * 30], ids=["12", "5", "one large"])
def test_of_few_groups_the_interval_holds_by_students_t(sizes: list[int]) -> None:
    held, groups, random = 0, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), generator()
    for _ in range(400):
        values = torch.randn(len(sizes), generator=random, dtype=torch.float64)[groups]
        found = combine(None, estimate(measure_mean(values[None, :, None]), len(sizes), groups))
        held += abs(found.value) <= 1.645 * found.stderr
    assert held >= 0.87 * 400  # 90 % are meant; by the normal distribution it were 81 to 83


@pytest.mark.parametrize(("task", "name"), CLOSED)
@pytest.mark.parametrize(("size", "of_group"), [(3, 1), (40, 1), (10, 100)])
def test_where_all_labels_are_right_the_interval_is_the_binomials_of_samples_or_groups(
    task: str, name: str, size: int, of_group: int
) -> None:
    y, groups = torch.arange(size * of_group) % 2, torch.arange(size).repeat_interleave(of_group)
    p = one_hot(y, 2).double()
    measured = TASKS[task].default_metrics(2)[name].measure(p, (p if task == "multilabel" else y)[None])
    found = estimate(measured, size, groups if of_group > 1 else None)
    answers = 4 + (size if name == "accuracy" else size // 2)  # of the area: the rarer class
    assert found.value == 1 and found.variance == pytest.approx(2 * (answers - 2) / answers**3)


@pytest.mark.parametrize(("positives", "least"), [(2, 0.74), (5, 0.74), (10, 0.8), (20, 0.85)])
def test_of_few_positives_the_interval_of_the_area_holds(positives: int, least: float) -> None:
    """By the normal distribution, and mean squares, it were 49, 69, 79 and 86 %."""
    metric, random, truth = TASKS["binary"].default_metrics(2)["auroc"], generator(), 0.8556  # Φ(1.5 / √2)
    y, held = (torch.arange(300) < positives).long(), 0
    for _ in range(400):
        p = (torch.randn(300, generator=random) + 1.5 * y).sigmoid()
        found = combine(None, estimate(metric.measure(torch.stack([1 - p, p], 1), y[None]), 300, None))
        held += abs(found.value - truth) <= 1.645 * found.stderr
    assert held >= least * 400


def test_a_single_positive_sample_or_group_says_nothing_of_the_spread() -> None:
    p, y = torch.linspace(0, 1, 9), (torch.arange(9) == 5).long()
    area = TASKS["binary"].default_metrics(2)["auroc"].measure(torch.stack([1 - p, p], 1), y[None])
    assert math.isnan(estimate(area, 9, None).variance)
    assert math.isnan(estimate(measure_mean(torch.ones(1, 1, 1)), 1, None).variance)
    assert math.isnan(estimate(measure_mean(torch.rand(1, 30, 1)), 1, torch.zeros(30)).variance)


def test_two_groups_that_differ_little_in_size_are_as_sure_as_two_of_one_size() -> None:
    values, stderrs = torch.rand(1, 400, 1, generator=generator()).round(), []
    for size in (200, 201, 210):
        groups = (torch.arange(400) >= size).long()
        stderrs.append(combine(None, estimate(measure_mean(values), 2, groups)).stderr)
    assert stderrs[1:] == pytest.approx([stderrs[0]] * 2, rel=0.6) and all(stderr > 0 for stderr in stderrs)


# Both together


def of_size(value: float, size: int, p: float = 0.7) -> Estimate:
    return Estimate(value, p * (1 - p) / size, size)


def test_the_error_of_an_expected_value_is_that_of_unseen_samples_of_left_out_labels_and_of_a_thousand() -> None:
    found = combine(of_size(0.7, 600), None, num_calibrating=300)
    assert found == (0.7, pytest.approx(math.sqrt(0.21 * (1 / 600 + 1 / 300 + 1 / 1000))), 1000)
    assert combine(None, of_size(0.7, 50)) == (0.7, pytest.approx(math.sqrt(0.21 / 50)), 1000)


def test_labels_that_agree_count_as_many_as_they_are() -> None:
    found = combine(of_size(0.72, 600), of_size(0.7, 200), num_calibrating=300)
    own, reference = 0.21 / 200, 0.21 * (1 / 600 + 1 / 300 + 1 / 1000)
    stderr = math.sqrt(200**2 * own + 1000**2 * reference) / 1200
    assert found == (pytest.approx((200 * 0.7 + 1000 * 0.72) / 1200), pytest.approx(stderr), 1000)


@pytest.mark.parametrize("sign", [1, -1])
def test_labels_that_contradict_leave_the_reference_what_their_difference_allows(sign: int) -> None:
    known, far = of_size(0.7, 100), math.sqrt(0.21 / 100)
    assert weight_beside(of_size(0.7 + sign * 1.99 * far, 600), known) == 1000
    assert weight_beside(of_size(0.7 + sign * 2.01 * far, 600), known) == pytest.approx(100 / (2.01**2 - 1))
    found = combine(of_size(0.7 + sign * 5 * far, 600), known, num_calibrating=300)
    assert abs(found.value - 0.7) < 0.25 * far


def test_the_reference_counts_as_the_median_of_three_validations_says() -> None:
    far, known = of_size(0.99, 600), of_size(0.7, 100)
    few = combine(far, known, 300).equivalent_labels
    assert few < 20

    def weighed(expected: Estimate, *earlier: float) -> float:
        value = combine(expected, known, 300, earlier=earlier).value
        return 100 * (value - 0.7) / (expected.value - value)

    assert weighed(far) == pytest.approx(few) and weighed(far, 1000.0) == pytest.approx(1000)
    assert weighed(far, 1000.0, 1000.0) == pytest.approx(1000) and weighed(far, 1000.0, few) == pytest.approx(few)


@pytest.mark.parametrize("variance", [0.0, math.nan])
def test_few_labels_that_are_all_right_do_not_contradict_and_have_the_variance_of_the_reference(
    variance: float,
) -> None:
    assert weight_beside(of_size(0.7, 600), Estimate(1.0, variance, 5)) == 1000
    expected = Estimate(0.9, 0.09 / 600, 600)
    both = combine(expected, Estimate(0.9, variance, 2), 500)
    alone = combine(expected, None, 500)
    assert both.value == pytest.approx(0.9) and both.stderr == pytest.approx(alone.stderr, rel=0.1)


@pytest.mark.parametrize("size", [2, 20, 300])
def test_labels_that_are_all_wrong_where_all_should_be_right_contradict(size: int) -> None:
    both = combine(Estimate(1.0, 0.0, 600), Estimate(0.0, 0.0, size), 500)
    assert both.equivalent_labels == 1 and both.value == pytest.approx(1 / (size + 1))
    assert math.isnan(both.stderr)  # samples that are all alike say nothing of it
