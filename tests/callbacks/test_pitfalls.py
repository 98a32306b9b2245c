"""What many people do, and nothing else would say: it is said, once, and not where it must not be."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Acting, Classifier, Quiet, fitted, fitted_and_said, inputs, labelled, loader

X, Y = labelled(200).tensors
Change = Callable[[Tensor], Tensor]


def said(monitor: Any, model: Any = None, train: Any = None, val: Any = None, **kwargs: Any) -> list[str]:
    train = loader(200, 20) if train is None else train
    val = DataLoader(inputs(100, seed=1), 20) if val is None else val
    return fitted_and_said(monitor, Quiet() if model is None else model, train, val, **kwargs)[1]


# Samples that are prepared in another way


def jitter(x: Tensor) -> Tensor:
    return x * (0.8 + 0.4 * torch.rand(len(x), 1)) + 0.1 * torch.rand(len(x), 1)


def erased(x: Tensor) -> Tensor:
    return x * (torch.rand(x.shape) > 0.25)


def mixed(x: Tensor) -> Tensor:
    return torch.lerp(x, x.flip(0), torch.rand(len(x), 1))


def tailed(x: Tensor) -> Tensor:
    income = 100 * x[:, -1:]
    return torch.cat([x[:, :-1], income.where(torch.arange(len(x))[:, None] != 150, 1000)], 1)


PREPARED: dict[str, tuple[Change, Change, bool]] = {  # of training and validation samples; is it said?
    "alike": (lambda x: x, lambda x: x, False),
    "normalized, not in training": (lambda x: x, lambda x: (x - 0.5) / 0.29, True),
    "normalized, in training alone": (lambda x: (x - 0.5) / 0.29, lambda x: x, True),
    "normalized by half": (lambda x: x - 0.5, lambda x: x, True),
    "0 to 255": (lambda x: x, lambda x: (255 * x).round(), True),
    "inverted": (lambda x: x**3, lambda x: 1 - x**3, True),
    "jitter in training": (jitter, lambda x: x, False),
    "erasing in training": (erased, lambda x: x, False),
    "mixup in training": (mixed, lambda x: x, False),
    "heavy tails of a column": (tailed, tailed, False),
    "of integers": (lambda x: (9 * x).long(), lambda x: (200 * x).long(), False),  # as token ids are
}


class Taking(Quiet):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


@pytest.mark.parametrize("is_of_features", [True, False])
@pytest.mark.parametrize("name", PREPARED)
def test_samples_that_are_prepared_in_another_way(name: str, is_of_features: bool) -> None:
    of_training, of_validation, is_said = PREPARED[name]
    torch.manual_seed(0)
    train, x = TensorDataset(of_training(X), Y), of_validation(inputs(100, seed=1))
    options = {"features": lambda batch: batch[0] if isinstance(batch, list) else batch} if is_of_features else {}
    if is_of_features and not x.is_floating_point():
        return  # which are always taken as numbers
    texts = said(RiskMonitor(**options), Taking(), DataLoader(train, 20, shuffle=True), DataLoader(x, 20))
    assert len(texts) == is_said
    for text in texts:
        assert "prepared in another way" in text and text.endswith("#preparation")
        assert "times as large" in text and "squared distance of the means is" in text


def test_a_missing_number_is_no_other_preparation() -> None:
    x = inputs(100, seed=1)
    x[5, 2] = torch.nan
    model = Acting(lambda module, x, epoch: x.nan_to_num_())
    assert ["has no reference" in text for text in said(RiskMonitor(), model, val=DataLoader(x, 20))] == [True]


# Outputs that are features


class Embedding(Quiet):
    """A head in the step makes classes of the outputs."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(12, num_outputs), nn.Linear(num_outputs, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.head(self(batch[0])), batch[1])


@pytest.mark.parametrize(("num_outputs", "labels", "is_said"), [
    (32, Y, True),
    (17, Y, True),
    (12, Y, False),  # three of which have no sample: a rare class, or a label that is not used
    (4, Y * 0, False),
    (400, torch.arange(200) % 100, False),  # of few samples
    (300, torch.arange(200), False),
])  # fmt: skip
def test_far_fewer_classes_than_outputs(num_outputs: int, labels: Tensor, is_said: bool) -> None:
    model = Embedding(num_outputs)
    model.head = nn.Linear(num_outputs, 200)
    texts = said(RiskMonitor(), model, DataLoader(TensorDataset(X, labels), 20))
    texts = [text for text in texts if "no reference" not in text]
    assert len(texts) == is_said
    for text in texts:
        assert f"finds only {len(labels.unique())} classes among the labels, but {num_outputs} outputs" in text


# A network that was trained on these labels


def trained(num_epochs: int = 30) -> Classifier:
    model = Classifier(0.0)
    fitted([], model, loader(200, 20), loader(), max_epochs=num_epochs)
    return model


def with_new_head(model: Any) -> Any:
    model.net[4] = nn.Linear(16, 4)
    return model


BEFORE = copy.deepcopy(Classifier(0.0).state_dict())
KNOWN: dict[str, tuple[Any, dict[str, Any], int, bool]] = {  # the model, options, the size of a batch; is it said?
    "trained before": (trained, {}, 20, True),
    "trained before, few labels": (trained, {}, 10, False),
    "trained before, with its weights from before": (trained, {"initial_weights": BEFORE}, 20, False),
    "a new head": (lambda: with_new_head(trained()), {}, 20, False),
    "new": (Classifier, {}, 20, False),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_network_that_knows_its_labels(name: str) -> None:
    make, options, batch_size, is_said = KNOWN[name]
    texts = said(RiskMonitor(**options), make(), loader(200, batch_size), max_epochs=1)
    assert len(texts) == is_said
    for text in texts:
        assert "on the first training batch before the first step, where chance has 0." in text
        assert "`initial_weights=`" in text and text.endswith("#initial-weights")


# Features that are trained


ENCODER = nn.Linear(12, 4)  # of one's own, which no gradient reaches
FEATURES: dict[str, tuple[Any, bool]] = {
    "a part of the network": (lambda model, batch: model.net[:3](batch), True),
    "a part of the network, that is written to": (lambda model, batch: model.net[:1](batch).mul_(2), True),
    "a frozen part": (lambda model, batch: model.frozen(batch), False),
    "another network": (lambda model, batch: ENCODER(batch), False),
    "inputs": (lambda model, batch: batch, False),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_the_network_computes(name: str) -> None:
    function, is_said = FEATURES[name]
    model = Quiet()
    model.frozen = nn.Linear(12, 4).requires_grad_(False)
    monitor = RiskMonitor(features=lambda batch: function(model, batch[0] if isinstance(batch, list) else batch))
    texts = said(monitor, model)
    assert len(texts) == is_said and all("computes by weights that are trained" in text for text in texts)


# A forward that computes with copies of weights


class Cached(Quiet):
    """It computes with a list of copies in validation."""

    copies: Any = None

    def on_validation_epoch_start(self) -> None:
        self.copies = [copy.deepcopy(self.net)]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else self.copies[0](x)


@pytest.mark.parametrize(("lr", "is_said"), [(1e-2, True), (0.0, False)])
def test_a_network_that_computes_with_copies_of_its_weights(lr: float, is_said: bool) -> None:
    model = Cached()
    model.lr, model.copies = lr, [copy.deepcopy(model.net)]
    texts = said(RiskMonitor(), model)
    assert len(texts) == is_said and all("compute with copies of them" in text for text in texts)


# Callbacks that look at the sensitivity

SENSITIVITY = "val/output_sensitivity"
FIRST, MOST = "one of the first epochs: sensitivity is lowest before training", "the most sensitive epoch"
WATCHING: dict[str, tuple[Any, str | None]] = {
    "EarlyStopping": (lambda path: cb.EarlyStopping(SENSITIVITY, patience=9), FIRST),
    "ModelCheckpoint": (lambda path: cb.ModelCheckpoint(path, monitor=SENSITIVITY), FIRST),
    "ModelCheckpoint, the highest": (lambda path: cb.ModelCheckpoint(path, monitor=SENSITIVITY, mode="max"), MOST),
    "another value": (lambda path: cb.ModelCheckpoint(path, monitor="train_loss"), None),
}


@pytest.mark.parametrize("name", WATCHING)
def test_a_callback_that_chooses_by_sensitivity_is_told_before_the_first_step_what_it_chooses(
    name: str, tmp_path: Any
) -> None:
    make, chosen = WATCHING[name]
    texts = said([SensitivityMonitor(), make(tmp_path)], enable_checkpointing=True, default_root_dir=tmp_path)
    assert len(texts) == (chosen is not None)
    for text in texts:
        start = f"`SensitivityMonitor` (val/*) is monitored by `{name.split(',')[0]}`, which will choose {chosen}"
        assert text.startswith(start) and text.endswith("#stop-by-sensitivity")
