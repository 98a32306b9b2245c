"""What many people do, and nothing else would say: it is said, once, or refused, and not where it must not be."""

import re
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, logsigmoid, mse_loss, one_hot, sigmoid, softplus
from torch.utils.data import DataLoader, TensorDataset

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.expected.doubts import say_unused
from lightning_sensitivity.running import isolated
from tests.helpers import Filling, Quiet, fitted_and_said, inputs, labelled, module, quick_risk, refused, trainer

X, Y = labelled(200).tensors
VAL = DataLoader(inputs(90, seed=1), 20)


def of(*tensors: Tensor, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), 30, **options)


def said(monitor: Any, model: Any = None, train: Any = None, val: Any = VAL, **kwargs: Any) -> list[str]:
    return fitted_and_said(monitor, model or Quiet(), train or of(X, Y), val, **kwargs)[1]


# Samples


def test_a_missing_number_costs_its_sample_and_is_said() -> None:
    x, new, scores = X.clone(), inputs(90, seed=1), []
    x[5, 2] = new[7, 1] = torch.nan
    for is_there in (True, False):
        rows, others = (torch.arange(200) != 5) | is_there, (torch.arange(90) != 7) | is_there
        model = Filling()
        model.lr = 0.0
        texts = said(monitor := quick_risk(), model, of(x[rows], Y[rows]), DataLoader(new[others], 20))
        scores.append(monitor.history[0]["expected_loss"])
        assert monitor.summary["num_training"] == 199 and len(texts) == 2 * is_there
        assert all("leaves out 1 " in text and "with nan or inf in inputs or features" in text for text in texts)
    assert scores[0] == pytest.approx(scores[1], abs=0.01)  # labels are drawn by the place of a sample


@pytest.mark.parametrize("has_labels", [True, False])
def test_where_nothing_is_expected_of_a_loader_labels_choose_or_callbacks_take_the_last_epoch(
    has_labels: bool, tmp_path: Path
) -> None:
    def features(batch: Any) -> Tensor:
        return batch[0] if len(batch[0]) == 30 else batch[0] / 0

    checkpoint = cb.ModelCheckpoint(tmp_path, monitor="val/expected_loss", filename="{epoch}")
    monitor, options = quick_risk(features=features, validation_labels=has_labels), {"enable_checkpointing": True}
    val = DataLoader(labelled(80, seed=1), 20)
    texts = fitted_and_said([monitor, checkpoint], Quiet(), of(X[:180], Y[:180]), val, max_epochs=3, **options)[1]
    assert any("can't estimate anything for dataloader 0: No sample has finite inputs" in text for text in texts)
    assert monitor.summary["chosen_by"] == ("labels" if has_labels else "nothing")
    assert has_labels or checkpoint.best_model_path.endswith("epoch=2.ckpt")
    assert [row["reference_score"] for row in monitor.history] == [None] * 3


ONE_HOT = one_hot((3.999 * inputs(400, seed=5)[:, :4]).long(), 4).float().flatten(1)[:, :12]  # 97 % and 99 % recur
REPEATED: dict[str, tuple[Any, Any, bool]] = {  # training samples, validation samples, and is it said?
    "the same": (X, X[50:], True),
    "a few": (X, torch.cat([X[:5], inputs(90, seed=1)]), False),
    "a fifth": (X, torch.cat([X[:20], inputs(80, seed=1)]), True),
    "some of some that a sampler repeats": (X[:40].repeat(5, 1), torch.cat([X[:40], inputs(40, seed=1)]), False),
    "one-hot categories": (ONE_HOT[:200], ONE_HOT[200:400], False),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_validation_samples_that_are_training_samples_are_said(name: str) -> None:
    x, val, is_said = REPEATED[name]
    texts = said(monitor := quick_risk(), None, of(x, x[:, :4].argmax(1)), DataLoader(val, 20))
    assert sum("of the samples of dataloader 0 are training samples" in text for text in texts) == is_said
    assert monitor.summary["is_trusted"]


# Training and validation differ


def test_of_class_shares_with_a_class_that_training_lacks_nothing_is_expected() -> None:
    texts = said(monitor := quick_risk(class_shares=[0.25] * 4), None, of(X[Y > 0], Y[Y > 0]), VAL)
    assert len(texts) == 1 and "`class_shares=` has class 0, of which no training sample is kept" in texts[0]
    assert monitor.summary["chosen_by"] == "nothing"


UNDERSAMPLED = torch.cat([(Y == 0).nonzero()[:, 0], (Y > 0).nonzero()[:25, 0]])


@pytest.mark.parametrize("shares", [None, [0.25] * 4])
def test_shares_of_classes_that_differ_between_training_and_validation_are_said(shares: Any) -> None:
    data, match = of(X[UNDERSAMPLED], Y[UNDERSAMPLED]), "predicts class 0 for .* set `class_shares=`"
    texts = said(quick_risk(class_shares=shares), None, data, [VAL, VAL], max_epochs=3)
    assert len(texts) == 2 * (shares is None)  # one for each loader, once
    assert all(re.search(match, text) and f"dataloader {index}" in text for index, text in enumerate(texts))


# What can't be read


class Beside(Quiet):
    """It gets more than its numbers."""

    def forward(self, x: Tensor, more: Any) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["x"], batch["more"]), batch["y"])


@pytest.mark.parametrize("is_chance", [True, False])
def test_an_input_that_can_not_be_read_is_named_once_and_then_the_reference_needs_more_skill(
    is_chance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sensitivity.reference.reference._LEAST_SKILL", 0.04)
    y = X[torch.randperm(200, generator=torch.Generator().manual_seed(1)), :4].argmax(1) if is_chance else Y
    y = y.where(torch.arange(200) % 5 > 0, Y)  # a little skill
    more, monitor = torch.arange(2000, 2200), quick_risk()  # names
    train, val = ([{"x": x[rows], "more": more[rows], "y": y[rows]} for rows in torch.arange(len(x)).split(30)]
        for x in (X, inputs(90, seed=1)))  # fmt: skip
    texts = said(monitor, Beside(), DataLoader(train, None), DataLoader(val, None), max_epochs=3)
    assert "can't show the reference all of `more`. Set `features=` if it matters" in texts[0]
    assert sum("can't show" in text for text in texts) == 1
    assert monitor.reference.is_trusted_ and monitor.summary["is_trusted"] == (not is_chance)
    assert said(monitor) == []  # a second fit forgets it


def test_a_reference_that_has_seen_one_class_says_so_but_in_a_debugging_run() -> None:
    texts = said(RiskMonitor(), None, of(X, 0 * Y))
    assert len(texts) == 1 and "logs nothing: the reference has seen labels of only one class" in texts[0]
    assert said(RiskMonitor(), None, of(X, 0 * Y), fast_dev_run=True) == []


def test_features_of_the_user_need_more_skill_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sensitivity.reference.reference._LEAST_SKILL", 0.04)
    y = Y.where(torch.arange(200) % 4 == 0, Y[torch.randperm(200, generator=torch.Generator().manual_seed(1))])
    monitor = quick_risk(features=torch.nn.Identity())
    said(monitor, Quiet(), of(X, y), VAL)
    assert monitor.reference.is_trusted_ and not monitor.summary["is_trusted"]


# The step does something else


class Changed(Quiet):
    """Its step changes targets."""

    def __init__(self, change: Any, num_outputs: int) -> None:
        super().__init__()
        self.net, self.change = nn.Linear(12, num_outputs), change

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = mse_loss if self.net.out_features == 1 else cross_entropy
        return loss(self(batch[0]), self.change(batch[1]))


PRICES = 2e5 + 1e5 * (X[:, :1] + X[:, 1:2]) / 2
CHANGED: dict[str, tuple[Tensor, Any, bool]] = {  # labels, what the step makes of them, and is it said?
    "standardized": (PRICES, lambda y: (y - 2.5e5) / 1e5, True),
    "logarithms": (PRICES, torch.log, True),
    "as they are": (X[:, :1] + X[:, 1:2], lambda y: y, False),
    "classes, mapped": (Y, lambda y: (y + 1) % 4, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_targets_that_the_step_changes_are_said_after_three_validations(name: str) -> None:
    labels, change, is_said = CHANGED[name]
    task = "regression" if labels.is_floating_point() else "multiclass"
    model = Changed(change, 1 if task == "regression" else 4)
    model.lr = 0.1
    for max_epochs in (2, 5):
        texts = said(quick_risk(task), model, of(X, labels), max_epochs=max_epochs)
        found = [f"worse than a constant prediction in {3} validations" in text for text in texts]
        assert found == [True] * (is_said and max_epochs == 5)


def test_a_good_regression_that_does_not_improve_is_not_asked_about_its_targets() -> None:
    model = Changed(CHANGED["as they are"][1], 1)
    model.lr, model.net.weight.data = 0.0, 0.8 * torch.eye(12)[:2].sum(0, keepdim=True)
    assert said(quick_risk("regression"), model, of(X, X[:, :1] + X[:, 1:2]), max_epochs=5) == []


# Outputs that are no logits


class Sigmoid(Quiet):
    """The usual way of a beginner."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return binary_cross_entropy(self(batch[0])[:, 0], batch[1].float())


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_outputs_of_torchs_sigmoid_are_refused_before_the_first_step(task: str) -> None:
    y = (X[:, :1] < 0.5).float()
    match = r"outputs are probabilities, and logits are needed: `outputs=lambda p: p.logit\(1e-6\)`"
    refused(quick_risk(task), Sigmoid(), of(X, y), VAL, match=match)
    model = Sigmoid()
    model.training_step = lambda batch, batch_idx: binary_cross_entropy(model(batch[0]), batch[1])
    assert said(quick_risk(task, outputs=lambda p: p.logit(1e-6)), model, of(X, y)) == []


GATES = {  # what networks that nobody has trained give: logits, of any sign, of some, of one, or in [0, 1]
    "a linear layer": lambda z: z,
    "zeros": lambda z: 0 * z,
    "in [0, 1]": lambda z: 0.5 + 0.01 * z,
    "rectified": lambda z: z.relu(),
    "softplus": softplus,
    "clamped": lambda z: z.clamp(0, 1),
    "by hand": lambda z: z.tanh() / 2 + 0.5,
    "gated": lambda z: z * z.sigmoid(),
    "a gate within": lambda z: z + z.sigmoid().mean(1, keepdim=True),
    "between bounds": lambda z: 10 * z.sigmoid() - 5,
    "cosines": lambda z: z / z.norm(dim=1, keepdim=True),
    "logarithms": logsigmoid,
}
PROBABILITIES = {
    "a sigmoid": torch.sigmoid,
    "a layer": nn.Sigmoid(),
    "of functional": sigmoid,
    "special": torch.special.expit,
    "in place": lambda z: z.clone().sigmoid_(),
    "in 16 bits": lambda z: z.bfloat16().sigmoid().float(),
    "of one more dimension": lambda z: z[:, None].sigmoid()[:, 0],
    "the first of two": lambda z: [z.sigmoid(), z.exp().sigmoid()][0],
    "inexact, as on a GPU": lambda z: (z + 1e-6 * (next(PASSES) % 2)).sigmoid(),
}
PASSES = count()


def checked(task: str, forward: Any, num_samples: int, seed: int) -> None:
    """Check a linear layer and a function before the first step."""
    torch.manual_seed(seed)
    gate = module(lambda self, z: forward(z))
    monitor, model = quick_risk(task), nn.Sequential(nn.Linear(12, 1 if task == "binary" else 10), gate)
    with isolated(model) as run:
        monitor.check_model(run, monitor.reader.call(model, inputs(num_samples, seed)))


@pytest.mark.parametrize("name", GATES)
def test_logits_of_fresh_networks_are_never_refused(name: str) -> None:
    for task, num_samples, seed in product(("multiclass", "binary", "multilabel"), (1, 2, 60), range(4)):
        checked(task, GATES[name], num_samples, seed)


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_by_a_sigmoid_of_torch_are_refused_but_not_where_a_softmax_may_follow(name: str) -> None:
    for task, num_samples in product(("binary", "multilabel"), (1, 60)):
        with pytest.raises(MisconfigurationException, match="outputs are probabilities"):
            checked(task, PROBABILITIES[name], num_samples, seed=0)
    checked("multiclass", PROBABILITIES[name], 60, seed=0)


# Labels of the wrong kind


def test_integers_as_targets_of_a_regression_are_refused() -> None:
    match = "leave `task='regression'` out if they are classes, make them floating if not"
    refused(RiskMonitor("regression"), Sigmoid(), of(X, Y), VAL, match=match)


def test_another_ignore_index_that_comes_late_leaves_out_its_batches_and_is_said_once() -> None:
    class Ignoring(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1].long(), ignore_index=255)

    is_ignored = (torch.arange(200) % 20 == 7) & (torch.arange(200) >= 100)  # one in each of the last five batches
    train = DataLoader(TensorDataset(X, Y.where(~is_ignored, 255).byte()), 20)
    texts = said(monitor := quick_risk(), Ignoring(), train)
    assert len(texts) == 1 and "labels from 0 to 3, or -100 to be ignored, but got" in texts[0]
    assert monitor.summary["num_training"] == 100


def test_outputs_of_which_most_are_no_class_are_said_to_be_features() -> None:
    class Body(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Linear(12, 32), nn.Linear(32, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.head(self(batch[0])), batch[1])

    for number in (200, 100, 90):
        texts = said(quick_risk(), Body(), of(X[:number], Y[:number]))
        match = f"gets 32 outputs, of which 28 are the class of none of {number} training"
        assert [match in text for text in texts] == [True] * (number >= 100)
    assert say_unused([1 / 60] * 60 + [0.0] * 140, 100) == ""  # of 200 classes, most are not yet seen
    assert said(quick_risk(outputs=lambda features: features[:, :4]), Body()) == []


@pytest.mark.parametrize("has_hooks", [False, True])
def test_predictions_without_the_hooks_of_a_data_module_are_said(has_hooks: bool) -> None:
    class Data(LightningDataModule):
        train_dataloader = staticmethod(lambda: of(X, Y))
        val_dataloader = staticmethod(lambda: VAL)
        if has_hooks:
            on_after_batch_transfer = staticmethod(lambda batch, dataloader_idx: batch)

    trainer(monitor := quick_risk(), max_epochs=1).fit(model := Quiet(), datamodule=Data())
    with helpers.said() as texts:
        monitor.predict(model, VAL)
    assert ["such as `on_after_batch_transfer`" in text for text in texts] == [True] * has_hooks


# Callbacks that choose by sensitivity

SENSITIVITY = "val/output_sensitivity"
# Options of EarlyStopping, and whether we warn of them.
CHOOSING: dict[str, tuple[dict[str, Any], bool]] = {
    "the minimum": ({"patience": 9}, True),
    "a bound": ({"divergence_threshold": 9.0, "patience": 9}, False),
    "a name of one's own": ({"monitor": "val/sensitivity", "patience": 9}, False),
}


@pytest.mark.parametrize("what", CHOOSING)
def test_a_callback_that_chooses_by_an_extreme_of_sensitivity_is_told_of_early_stopping(what: str) -> None:
    options, is_told = CHOOSING[what]
    stop = cb.EarlyStopping(**{"monitor": SENSITIVITY, "strict": False, **options})
    texts = said([SensitivityMonitor(), stop], max_epochs=4, limit_train_batches=1)
    assert len(texts) == is_told
    for text in texts:
        assert f"finds that `EarlyStopping` chooses by `{SENSITIVITY}`" in text and "#stop-by-sensitivity" in text
        assert "use the monitor's `early_stopping`" in text
