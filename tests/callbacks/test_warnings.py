"""What many people do, and nothing else would say: it is said, once, or refused, and not where it must not be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Acting, Quiet, fitted_and_said, inputs, labelled, loader, refused

X, Y = labelled(200).tensors
VAL = DataLoader(inputs(90, seed=1), 20)
Change = Callable[[Tensor], Tensor]


def of(*tensors: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), 30)


def said(monitor: Any, model: Any = None, train: Any = None, val: Any = VAL, **kwargs: Any) -> list[str]:
    return fitted_and_said(monitor, model or Quiet(), train or of(X, Y), val, **kwargs)[1]


# Samples that are prepared in another way


def tailed(x: Tensor) -> Tensor:
    income = 100 * x[:, -1:]
    return torch.cat([x[:, :-1], income.where(torch.arange(len(x))[:, None] != 150, 1000)], 1)


PREPARED: dict[str, tuple[Change, Change, bool]] = {  # of training and validation samples; is it said?
    "alike": (lambda x: x, lambda x: x, False),
    "normalized, not in training": (lambda x: x, lambda x: (x - 0.5) / 0.29, True),
    "normalized, in training alone": (lambda x: (x - 0.5) / 0.29, lambda x: x, True),
    "0 to 255": (lambda x: x, lambda x: (255 * x).round(), True),
    "erasing in training": (lambda x: x * (torch.rand(x.shape) > 0.25), lambda x: x, False),
    "mixup in training": (lambda x: torch.lerp(x, x.flip(0), torch.rand(len(x), 1)), lambda x: x, False),
    "heavy tails of a column": (tailed, tailed, False),
}


@pytest.mark.parametrize("name", PREPARED)
def test_samples_that_are_prepared_in_another_way(name: str) -> None:
    of_training, of_validation, is_said = PREPARED[name]
    torch.manual_seed(0)
    texts = said(RiskMonitor(), None, of(of_training(X), Y), DataLoader(of_validation(inputs(90, seed=1)), 20))
    assert ["prepared in another way" in text and text.endswith("#preparation") for text in texts] == [True] * is_said


def test_a_missing_number_costs_the_reference_and_is_said() -> None:
    x = inputs(90, seed=1)
    x[5, 2] = torch.nan
    model = Acting(lambda module, x, epoch: x.nan_to_num_())
    (text,) = said(RiskMonitor(), model, val=DataLoader(x, 20))
    assert "has no reference: Expected `new_inputs` to be finite" in text and "Set `features=`" in text


def test_processes_with_images_of_different_sizes_have_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(trainer: Any, values: Tensor, padding: float = 0.0) -> Tensor:
        return torch.cat([values, values[:, :5]])

    monkeypatch.setattr("lightning_sensitivity.callbacks.reference.gather", gather)
    (text,) = said(RiskMonitor())
    assert "has no reference: RuntimeError: Sizes of tensors must match" in text


# Outputs that are no logits


class Embedding(Quiet):
    """A head in the step makes classes of the outputs."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(12, num_outputs), nn.Linear(num_outputs, 200)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.head(self(batch[0])), batch[1])


@pytest.mark.parametrize(("num_outputs", "labels", "is_said"), [
    (32, Y, True),
    (10, Y, True),
    (6, Y, False),  # two of which have no sample: a rare class, or a label that is not used
    (400, torch.arange(200) % 150, False),  # of few samples
    (300, torch.arange(200), False),
])  # fmt: skip
def test_an_embedding_whose_head_the_step_calls_is_said_also_by_far_fewer_classes_than_outputs(
    num_outputs: int, labels: Tensor, is_said: bool
) -> None:
    texts = said(RiskMonitor(), Embedding(num_outputs), of(X, labels))
    assert sum("the step calls `head`, which `forward` does not call" in text for text in texts) == 1
    found = [f"classes among the labels, but {num_outputs} outputs" in text for text in texts]
    assert sum(found) == is_said and len(texts) == 1 + is_said


class Sigmoid(Quiet):
    """The usual way of a beginner."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return binary_cross_entropy(self(batch[0])[:, 0], batch[1])


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("kind", [SensitivityMonitor, lambda: RiskMonitor("binary")])
def test_a_sigmoid_in_forward_is_said_for_classes_of_any_share(kind: Any, share: float) -> None:
    y = (X[:, 0] < share).float()
    texts = said(kind(), Sigmoid(), of(X, y))
    assert len(texts) == 1 and "got outputs that all lie in [0, 1]. If they are not logits, set `outputs=`" in texts[0]
    assert said(kind(), Sigmoid(), of(X, y), max_epochs=0) == []


def test_targets_from_0_to_1_in_a_regression_are_no_probabilities() -> None:
    model = Sigmoid()
    model.training_step = lambda batch, batch_idx: mse_loss(model(batch[0])[:, 0], batch[1])
    assert said(RiskMonitor("regression"), model, of(X, X[:, 0])) == []


# Labels of the wrong kind


class Output(Quiet):
    """It has one output; its loss takes any labels."""

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__()
        self.net = nn.Linear(12, num_outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1].float().reshape(len(batch[1]), -1)[:, :1].expand(-1, 4))


IMAGES = DataLoader(torch.rand(30, 1, 8, 8), 10)
LABELS: dict[str, tuple[str, int, Tensor, str]] = {  # the task, the number of outputs, labels, and what is said
    "0.0 and 1.0": ("multiclass", 1, (Y > 1).float(), "Set `task='binary'` if they are from 0 to 1"),
    "measurements": ("multiclass", 4, X[:, 0], "Make class indices integers: `targets="),
    "a column": ("multiclass", 4, Y[:, None], r"Remove the extra dimension: `targets=lambda batch: batch\[1\].squeeze"),
    "-1 and 1": ("binary", 1, (Y > 1).float() * 2 - 1, r"Map -1 to 0: `targets="),
    "two outputs": ("binary", 2, (Y > 1).float(), "Expected one output, .* leave `task` out"),
    "a constant": ("regression", 1, 0 * X[:, 0], "all targets of a training batch are 0: there is nothing to learn"),
    "integers": ("regression", 1, Y, "leave `task='regression'` out if they are classes, make them floating if not"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_the_wrong_kind_name_what_to_do(name: str) -> None:
    task, num_outputs, labels, match = LABELS[name]
    refused(RiskMonitor(task), Output(num_outputs), of(X, labels), VAL, match=match)


def test_a_regression_of_images_needs_features() -> None:
    class Flat(Output):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.flatten(1)[:, :12])

    x, y = torch.rand(50, 1, 8, 8), torch.rand(50, 1)
    refused(RiskMonitor("regression"), Flat(), of(x, y), IMAGES, match="a regression is measured for vectors alone")
    features = {"features": lambda batch: (batch if isinstance(batch, Tensor) else batch[0]).mean(3)}
    assert said(RiskMonitor("regression", **features), Flat(), of(x, y), IMAGES) == []


def test_mixup_for_some_batches_and_class_indices_for_others_make_one_reference() -> None:
    class Mixed(Quiet):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            is_mixed = isinstance(batch, list) and float(batch[0][0, 0]) > 0.5
            return [batch[0], one_hot(batch[1], 4).float()] if is_mixed else batch

    monitor = RiskMonitor()
    assert said(monitor, Mixed()) == [] and monitor.record.verdict.num_samples == 200


def test_random_layers_in_eval_mode_keep_the_reference() -> None:
    class Dropping(Quiet):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.nn.functional.dropout(x, 0.2, training=True))

    monitor = RiskMonitor()
    assert said([monitor, SensitivityMonitor()], Dropping()) == []
    assert monitor.record.verdict.has_reference and len(monitor.record.loader(0).predictions) == 90


# Callbacks that choose by sensitivity

SENSITIVITY = "val/output_sensitivity"
WATCHING: dict[str, tuple[Any, bool]] = {
    "EarlyStopping": (lambda path: cb.EarlyStopping(SENSITIVITY, patience=9), True),
    "EarlyStopping at a bound": (lambda path: cb.EarlyStopping(SENSITIVITY, divergence_threshold=9.0), False),
    "ModelCheckpoint": (lambda path: cb.ModelCheckpoint(path, monitor=SENSITIVITY), True),
    "another value": (lambda path: cb.ModelCheckpoint(path, monitor="train_loss"), False),
}


@pytest.mark.parametrize("name", WATCHING)
def test_a_callback_that_chooses_by_sensitivity_is_told_of_the_bound_that_is_sensible(name: str, tmp_path: Any) -> None:
    make, is_said = WATCHING[name]
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 1}
    texts = said([SensitivityMonitor(), make(tmp_path)], **options)
    assert len(texts) == is_said
    for text in texts:
        assert f"finds that `{name}` monitors `{SENSITIVITY}`" in text and text.endswith("#stop-by-sensitivity")
        assert "`EarlyStopping(..., divergence_threshold=)`" in text


def test_a_bound_of_sensitivity_ends_a_fit() -> None:
    stopping = cb.EarlyStopping(SENSITIVITY, patience=99, divergence_threshold=1e-9)
    run, texts = fitted_and_said([SensitivityMonitor(), stopping], Quiet(), loader(), VAL, max_epochs=4)
    assert run.current_epoch == 1 and not texts
