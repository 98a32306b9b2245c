"""What SensitivityMonitor logs is what a plain loop over the same batches, weights and noise gives."""

import math
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, Linear, brute_force, inputs, loader, trainer, unlabelled_loader, validated


def expected(changes: Tensor) -> dict[str, float]:
    """S, and its error bar clustered by sample."""
    value, count = changes.var(correction=0), len(changes)
    by_sample = ((changes - changes.mean()).square() - value).sum(1)
    error = (by_sample.square().sum() * count / (count - 1)).sqrt() / changes.numel()
    return {"val_output_sensitivity": value.item(), "val_output_sensitivity_stderr": error.item()}


def close(values: dict[str, float], truth: dict[str, float]) -> None:
    assert {name: values[name] for name in truth} == pytest.approx(truth, rel=1e-5, abs=0)  # joint passes round


@pytest.mark.parametrize(("batch_size", "num_draws"), [(1, 1), (7, 3), (50, 1), (16, 2)])
def test_the_values_are_those_of_a_plain_loop(batch_size: int, num_draws: int) -> None:
    model, monitor = Classifier(), SensitivityMonitor(num_draws=num_draws, seed=3)
    values = validated(monitor, model, loader(50, batch_size))
    changes = brute_force(model.eval(), inputs(50).split(batch_size), num_draws, seed=3)
    close(values, expected(changes))
    per_sample = (changes - changes.mean()).square().mean(1)
    torch.testing.assert_close(monitor.metrics[0].per_sample, per_sample, rtol=1e-4, atol=1e-9)


class EverySecond(SensitivityMonitor):
    def should_measure(self, trainer: Any) -> bool:
        return trainer.current_epoch % 2 == 0


@pytest.mark.parametrize("monitor", [SensitivityMonitor(), SensitivityMonitor(every_n_epochs=2), EverySecond()])
def test_epochs_are_logged_and_before_training_by_validate_at_step_0(monitor: Any, tmp_path: Any) -> None:
    every_n_epochs = 2 if isinstance(monitor, EverySecond) else monitor.every_n_epochs
    model, history, logger = Classifier(), helpers.History(), CSVLogger(tmp_path)
    run = trainer(callbacks=[monitor, RiskMonitor(every_n_epochs=every_n_epochs), history], logger=logger, max_epochs=4)
    untrained = expected(brute_force(model.eval(), inputs(50, seed=1).split(16)))
    run.validate(model.train(), loader(seed=1), verbose=False)
    run.fit(model, loader(), loader(seed=1))
    close(history.epochs[0], untrained)
    rows = helpers.csv_rows(logger.log_dir)
    curve = {int(row["step"]): float(row["val_output_sensitivity"]) for row in rows if row["val_output_sensitivity"]}
    assert [*curve] == [0, *range(3, 16, 4 * every_n_epochs)] and len(set(curve.values())) == len(curve)
    assert all(history.epochs[(step + 1) // 4]["val_output_sensitivity"] == value for step, value in curve.items())
    assert sum(bool(row["val_risk_estimate"]) for row in rows) == 4 // every_n_epochs


IN_TEST = {"val_": "test_", "val/": "test/", "a_": "test_a_", "eval_": "test_eval_", "valid/": "test_valid/"}


@pytest.mark.parametrize("prefix", IN_TEST)
def test_names_of_trainer_test(prefix: str) -> None:
    run = trainer(callbacks=[SensitivityMonitor(prefix=prefix), RiskMonitor(prefix=prefix)])
    (values,) = run.test(Classifier(), loader(), verbose=False)
    assert values.keys() == {"test_loss", *(IN_TEST[prefix] + name for name in SensitivityMonitor.names)}


def test_of_each_output_the_value_is_the_mean_square_of_its_changes() -> None:
    model, monitor = Linear(), SensitivityMonitor(per_output=True, outputs=lambda y: y[:, 0])
    changes = brute_force(lambda x: model(x)[:, 0], inputs(50).split(16))
    close(validated(monitor, model, loader()), {"val_output_sensitivity": changes.square().mean().item()})


def test_several_loaders_one_of_them_empty() -> None:
    model, run = Classifier(), trainer(callbacks=[SensitivityMonitor()])
    with pytest.warns(UserWarning) as caught:
        results = run.validate(model, [loader(50), loader(0), unlabelled_loader(20, seed=1)], verbose=False)
    texts = ["DataLoader` across ranks is zero", "dataloader 1: There is no value: a variance needs two"]
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert all(text in message for text, message in zip(texts, messages, strict=True))
    for idx, values, x in ((0, results[0], inputs(50)), (2, results[-1], inputs(20, seed=1))):
        truth = expected(brute_force(model.eval(), x.split(16), loader=idx))
        close(values, {f"{name}/dataloader_idx_{idx}": value for name, value in truth.items()})
    assert math.isnan(run.callback_metrics["val_output_sensitivity/dataloader_idx_1"])


def test_the_printed_table_has_each_loaders_value_in_its_column(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # of the terminal
    results = trainer(callbacks=[SensitivityMonitor()]).validate(Classifier(), [loader(), loader(seed=1)])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if " val_output_sensitivity " in line)
    values = [values[f"val_output_sensitivity/dataloader_idx_{idx}"] for idx, values in enumerate(results)]
    cells = [float(cell) for cell in re.findall(r"\d\S*\.\S*\d", row)]
    assert cells == values and values[0] != values[1]


# Which batches are measured, and what it costs


PAIRS = torch.tensor([[0, 1], [1, 0]])


class Pairs(helpers.Quiet):
    """Two samples are neighbours, as two rows of pairs say, which look like samples themselves."""

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs.index_add(0, pairs[1], outputs[pairs[0]])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch, PAIRS).square().mean()


class Threshold(Pairs):
    """Its outputs are larger in a pass that is larger than those of the sanity check."""

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        return self.net(x) * (1 if len(x) <= 4 else 2)


@pytest.mark.parametrize("kind", [Pairs, Threshold])
def test_batches_whose_outputs_would_change_in_a_joint_pass_are_measured_one_by_one(kind: Any) -> None:
    model, loaders = kind(), [unlabelled_loader(size, 2) for size in (4, 20)]
    run = helpers.fitted(SensitivityMonitor(inputs=lambda x: (x, PAIRS)), model, *loaders)
    changes = brute_force(lambda x: model.eval()(x, PAIRS), inputs(20).split(2))
    close(helpers.logged(run), expected(changes))


@pytest.mark.parametrize(("options", "chosen"), [
    ({"num_samples": None, "num_draws": 2}, range(20)),
    ({"num_samples": 50}, range(0, 20, 4)),
    ({"num_samples": 50, "num_draws": 2}, [0, 7, 14]),
    ({"num_samples": 51}, [0, 4, 7, 10, 14, 17]),
])  # fmt: skip
def test_a_budget_picks_evenly_spaced_whole_batches_and_counts_passes(options: Any, chosen: Any) -> None:
    model, sizes, draws = helpers.Quiet(), list[int](), options.get("num_draws", 1)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    values = validated(SensitivityMonitor(**options), model, unlabelled_loader(200, 10))
    joint = 10 * len(chosen)  # samples in a pass: clean and noisy; before, once a run, checks of one, two and all
    assert sizes == [10, 10, 10, joint] + [joint] * (1 + draws)
    batches = {idx: x for idx, x in enumerate(inputs(200).split(10)) if idx in chosen}
    close(values, expected(brute_force(model.eval(), batches, draws)))


@pytest.mark.parametrize(("options", "val", "num_samples"), [
    ({"inputs": lambda x: x.expand(30, *x.shape), "outputs": lambda y: y[:, 0]}, DataLoader(inputs(100), 5), 60),
    # loaders without a length
    ({}, DataLoader(helpers.Stream(300), 5), 40),
    ({"num_draws": 2}, DataLoader(helpers.Stream(300), 5), 20),
    # whole batches, after a small and a large one
    ({}, DataLoader([inputs(1), *inputs(300).split(15)], None), 46),
    ({}, DataLoader([inputs(30), *inputs(300).split(1)], None), 31),
])  # fmt: skip
def test_a_budget_counts_samples(options: Any, val: Any, num_samples: int) -> None:
    monitor = SensitivityMonitor(num_samples=40, **options)
    validated(monitor, Linear(), val)
    assert monitor.metrics[0].estimate.num_samples == num_samples


class Large(dict):
    """A cache of which nobody may go through the entries."""

    def __iter__(self) -> Any:
        raise AssertionError("gone through")

    __copy__ = __deepcopy__ = copy = keys = values = items = __iter__


def test_after_the_first_epoch_no_batch_waits_for_the_device_and_none_goes_through_a_large_dict() -> None:
    operations, start, stop, model = list[Any](), Callback(), Callback(), Classifier()
    model.net.cache = Large((index, torch.zeros(1)) for index in range(50_000))
    watch = helpers.Watch(lambda function, *_: operations.append(function))
    for hook in ("on_validation_batch_start", "on_validation_batch_end"):  # by the epoch
        setattr(start, hook, lambda run, *_: watch.__enter__() if run.current_epoch else None)
        setattr(stop, hook, lambda run, *_: watch.__exit__(None, None, None) if run.current_epoch else None)
    monitors = [SensitivityMonitor(num_draws=2), SensitivityMonitor(at="net", prefix="b_"), RiskMonitor()]
    val = [loader(50, 10), loader(50, 10)]
    with pytest.warns(UserWarning, match="cannot copy these attributes of the model.*'cache'"):
        run = helpers.fitted([start, *monitors, stop], model, val=val, num_sanity_val_steps=0)
    assert "val_risk_estimate/dataloader_idx_1" in run.callback_metrics and len(model.net.cache) == 50_000
    assert {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}.isdisjoint(operations)
    assert torch.ops.aten.addmm.default in operations
