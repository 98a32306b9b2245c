"""Clean outputs come from the step where they can, and are computed where they can't: counted in forward passes."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.reuse import Witness, why_not
from tests.helpers import Classifier, inputs, loader, trainer, unlabelled_loader

NUM_BATCHES = 4


class Counting(Classifier):
    """Counts the passes in eval mode after the sanity check; its step is given."""

    def __init__(self, step: Callable[[Any, Any], Any] | None = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.step = step
        self.passes = 0
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += not self.training and not self.trainer.sanity_checking
        return self.scale * super().forward(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.step is not None:
            self.step(self, batch)


def fit(model: LightningModule, monitor: SensitivityMonitor | None = None, val: Any = None, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    run = trainer(callbacks=[] if monitor is None else [monitor], max_epochs=1, **kwargs)
    run.fit(model, loader(32, 16, seed=1), loader(16 * NUM_BATCHES) if val is None else val)
    return run


def add_ones(model: Any, batch: Any) -> None:
    batch[0].add_(1)
    model(batch[0])


def add_ones_later(model: Any, batch: Any) -> None:
    model(batch[0])
    batch[0].add_(1)


def softmax_in_place(model: Any, batch: Any) -> None:
    model(batch[0]).mul_(2)


def write_into_the_module(model: Any, batch: Any) -> None:
    model(batch[0])
    model.net[1].running_mean.add_(0.1)


def in_training_mode(model: Any, batch: Any) -> None:
    model.net[3].train()
    model(batch[0])
    model.net[3].eval()


def in_another_precision(model: Any, batch: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(batch[0])


def with_other_weights(model: Any, batch: Any) -> None:
    """As an average of weights is put in place, which no version counter sees."""
    own = [parameter.data.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data / 2)
    model(batch[0])
    for parameter, data in zip(model.parameters(), own, strict=True):
        parameter.data.copy_(data)


def with_slightly_other_weights(model: Any, batch: Any) -> None:
    """As at the start of an average of weights."""
    torch.func.functional_call(model, {name: 1.001 * value for name, value in model.named_parameters()}, (batch[0],))


def with_weights_that_stay(model: Any, batch: Any) -> None:
    model(batch[0])
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


def with_an_adapter_off(model: Any, batch: Any) -> None:
    model.scale = 3.0
    model(batch[0])
    model.scale = 1.0


def write_into_the_outputs_memory(model: Any, batch: Any) -> None:
    with torch.no_grad():
        model(batch[0]).numpy()[:] = 0


def in_inference_mode(model: Any, batch: Any) -> None:
    with torch.inference_mode():
        model(batch[0])


# What the step does, how many passes it needs, and why its outputs can't be used (or None).
STEPS: dict[str, tuple[Callable[[Any, Any], Any] | None, int, str | None]] = {
    "self(x)": (lambda model, batch: model(batch[0]), 1, None),
    "self(x=x)": (lambda model, batch: model(x=batch[0]), 1, None),
    "self(x) twice": (lambda model, batch: [model(batch[0]), model(batch[0])], 2, None),
    "self(x), and another x": (lambda model, batch: [model(batch[0] * 2), model(batch[0])], 2, None),
    "self(x), with gradients": (lambda model, batch: torch.enable_grad()(model)(batch[0]).sum(), 1, None),
    "writes into the batch later": (add_ones_later, 1, None),
    "a stub": (None, 0, "did not call the module on the batch's own tensors"),
    "another x": (lambda model, batch: model(batch[0] * 2), 1, "did not call the module on the batch's own tensors"),
    "a copy of x": (lambda model, batch: model(batch[0].clone()), 1, "did not call the module on the batch's own"),
    "a submodule": (lambda model, batch: model.net(batch[0]), 0, "did not call the module"),
    "writes into the batch": (add_ones, 1, "wrote into the batch"),
    "writes into the outputs": (softmax_in_place, 1, None),
    "writes into the module": (write_into_the_module, 1, "wrote into the module"),
    "training mode": (in_training_mode, 1, "a part of the module is in training mode"),
    "other weights": (with_other_weights, 1, "is not what the module gave before it"),
    "slightly other weights": (with_slightly_other_weights, 1, "ran it with other weights"),
    "other weights that stay": (with_weights_that_stay, 1, "wrote into the module"),
    "an adapter": (with_an_adapter_off, 1, "is not what the module gave before it"),
    "writes into the outputs' memory": (write_into_the_outputs_memory, 1, None),
    "inference mode": (in_inference_mode, 1, None),
    "another precision": (in_another_precision, 1, "called the module in another precision"),
}


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_the_number_of_forward_passes_and_the_value(
    name: str, num_draws: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="lightning_sensitivity")
    step, own, problem = STEPS[name]
    model = Counting(step)
    run = fit(model, SensitivityMonitor(num_draws=num_draws, task=None))
    # The first batch of each loader and validation also shows by a pass of our own whether the step's can be trusted.
    more = NUM_BATCHES if problem else 1
    assert model.passes == NUM_BATCHES * (own + num_draws) + more
    assert not model._forward_hooks
    assert (problem or "takes the clean outputs of dataloader 0 from the step") in caplog.text
    if name not in ("writes into the module", "other weights that stay"):
        without = fit(Counting(), SensitivityMonitor(num_draws=num_draws, task=None))
        assert run.callback_metrics["val_sensitivity"] == without.callback_metrics["val_sensitivity"]


def test_one_twin_a_batch_comes_on_top_with_the_risk_estimate() -> None:
    model = Counting(STEPS["self(x)"][0])
    fit(model, SensitivityMonitor(num_training_samples=16), loader(16 * 8))
    kept, training = 1, 1
    assert model.passes == 8 * (1 + 1 + 1) + 1 + kept + training


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_every_precision_reuses(precision: str) -> None:
    model = Counting(STEPS["self(x)"][0])
    run = fit(model, SensitivityMonitor(noise_std=0.5, task=None), precision=precision)
    assert model.passes == NUM_BATCHES * 2 + 1
    without = fit(Counting(), SensitivityMonitor(noise_std=0.5, task=None), precision=precision)
    assert run.callback_metrics["val_sensitivity"] == without.callback_metrics["val_sensitivity"]


def test_a_profile_reuses() -> None:
    model = Counting(STEPS["self(x)"][0])
    fit(model, SensitivityMonitor(at=["net.0", "net.2"], task=None))
    assert model.passes == NUM_BATCHES * 3 + 1


def test_a_batch_that_is_a_tensor_and_a_dict_batch() -> None:
    for val, step in (
        (unlabelled_loader(16 * NUM_BATCHES), lambda model, batch: model(batch)),
        ([{"x": x, "id": [1, "a"]} for x in inputs(16 * NUM_BATCHES).split(16)], lambda m, batch: m(batch["x"])),
    ):
        model = Counting(step)
        loaders = val if isinstance(val, DataLoader) else DataLoader(val, batch_size=None)
        fit(model, SensitivityMonitor(task=None), loaders)
        assert model.passes == NUM_BATCHES * 2 + 1


def test_what_a_step_leaves_behind_is_what_is_measured() -> None:
    """Weights that stay changed are those of the batch's own passes, both of them: from before its step."""

    def multiply(model: Any, batch: Any) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1.2)

    def call_and_multiply(model: Any, batch: Any) -> None:
        with_weights_that_stay(model, batch)

    values = [
        fit(Counting(step), SensitivityMonitor(task=None)).callback_metrics["val_sensitivity"]
        for step in (multiply, call_and_multiply)
    ]
    assert values[0] == values[1]


@pytest.mark.filterwarnings("ignore:.*may be off by more than its error bar")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_constant_among_the_logits_hides_nothing(precision: str) -> None:
    class Masked(Counting):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cat([y, torch.full_like(y[:, :1], -1e9)], 1)

    values = []
    for step in (None, with_slightly_other_weights):
        run = fit(Masked(step), SensitivityMonitor(noise_std=0.5, task=None, per_output=True), precision=precision)
        values.append(run.callback_metrics["val_sensitivity"])
    assert values[0] == values[1]


class Dict(Counting):
    """Takes and returns dicts, and needs them whole."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x), "more": x}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["x"])["logits"], batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch["x"])["logits"], batch["y"]))


FUNCTIONS: dict[str, dict[str, Any]] = {
    "outputs, in place": {"outputs": lambda result: result["logits"].sub_(1)},
    "outputs, taken out": {"outputs": lambda result: result.pop("logits")},
    "outputs, at random": {"outputs": lambda result: result["logits"][:, torch.randperm(4)[:2]]},
    "outputs and the batch": {"outputs": lambda result, batch: result["logits"] + 0 * batch["x"].mul_(2).sum()},
    "inputs, in place": {"inputs": lambda batch: (batch["x"].mul_(2),)},
    "inputs, taken out": {"inputs": lambda batch: (batch.pop("x"),)},
    "targets, in place": {"targets": lambda batch: batch["y"].zero_(), "task": "multiclass"},
    "targets, taken out": {"targets": lambda batch: batch.pop("y"), "task": "multiclass"},
}


@pytest.mark.filterwarnings("ignore:The rows of the outputs")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_users_functions_do_stays_with_us(name: str) -> None:
    batches = [{"x": x, "y": torch.arange(16) % 4} for x in inputs(16 * NUM_BATCHES).split(16)]
    found = []
    for monitor in (None, SensitivityMonitor(**{"task": None, **FUNCTIONS[name]})):
        torch.manual_seed(0)
        model = Dict()
        run = trainer(callbacks=[] if monitor is None else [monitor], max_epochs=2)
        run.fit(model, *(DataLoader(copy.deepcopy(batches), batch_size=None) for _ in range(2)))
        found.append((model.state_dict(), run.callback_metrics["val_loss"]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_functions_that_choose_parts_cost_no_pass() -> None:
    batches = [{"x": x, "y": torch.arange(16) % 4} for x in inputs(16 * NUM_BATCHES).split(16)]
    model = Dict()
    monitor = SensitivityMonitor(
        inputs=lambda batch: (batch["x"],),
        outputs=lambda result, batch: result["logits"][:, : batch["y"].max()],
        task=None,
    )
    run = trainer(callbacks=[monitor], max_epochs=1)
    run.fit(model, *(DataLoader(batches, batch_size=None) for _ in range(2)))
    assert model.passes == NUM_BATCHES * 2 + 1


def test_outputs_in_memory_that_the_next_pass_writes_to() -> None:
    class Reusing(Counting):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if torch.is_grad_enabled():
                return y
            self.__dict__.setdefault("memory", torch.empty_like(y)).copy_(y)
            return self.__dict__["memory"]

    for step in (None, STEPS["self(x)"][0]):
        found = [
            fit(kind(step), SensitivityMonitor(num_training_samples=16), precision="64-true").callback_metrics
            for kind in (Reusing, Counting)
        ]
        for name in ("val_sensitivity", "val_risk_variance"):
            assert found[0][name] == found[1][name] > 0


def test_each_pass_finds_the_buffers_that_the_step_finds() -> None:
    class Normalizing(Counting):
        """Keeps a running mean of what it sees, in eval mode, too."""

        def __init__(self, step: Any) -> None:
            super().__init__(step)
            self.register_buffer("mean", torch.zeros(12))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean += (x.mean(0) - self.mean) / 2
            return self.net(x - self.mean)

    def differences(model: Normalizing, batches: Any) -> Tensor:
        """By a plain loop, as each step finds the mean."""
        changes, mean = [], model.mean.clone()
        for batch_idx, (x, _) in enumerate(batches):
            noisy = x + 0.1 * torch.randn(x.shape, generator=noise_generator(0, 0, 0, batch_idx))
            outputs = [model.net(x - mean - (x.mean(0) - mean) / 2) for x in (noisy, x)]
            changes.append((outputs[0].double() - outputs[1].double()).mean(1))
            mean += (x.mean(0) - mean) / 2
        return torch.cat(changes)

    model = Normalizing(STEPS["self(x)"][0])
    run = trainer(callbacks=[SensitivityMonitor()], num_sanity_val_steps=0, inference_mode=False)
    torch.manual_seed(0)
    before = model.mean.clone()
    run.validate(model, loader(16 * NUM_BATCHES), verbose=False)
    after, model.mean = model.mean.clone(), before.clone()
    with torch.no_grad():
        expected = differences(model.eval(), loader(16 * NUM_BATCHES)).var(correction=0).item()
    assert not after.equal(before)
    assert run.callback_metrics["val_sensitivity"].item() == pytest.approx(expected, rel=1e-6)
    model = Normalizing(None).eval()
    x = inputs(8)
    probe = Probe(model, x, None, None)
    before = model.mean.clone()
    with torch.no_grad():
        assert probe.clean().equal(probe.clean()) and probe.perturbed(lambda x: x + 1).equal(
            probe.perturbed(lambda x: x + 1)
        )
    assert model.mean.equal(before)


def test_a_module_can_be_scripted_at_the_end_of_an_epoch() -> None:
    class Scripting(Counting):
        def on_validation_epoch_end(self) -> None:
            assert not self._forward_hooks

    fit(Scripting(STEPS["self(x)"][0]), SensitivityMonitor(task=None))


def test_a_step_that_fails_leaves_no_hook() -> None:
    def fail(model: Any, batch: Any) -> None:
        raise RuntimeError("mine")

    model = Counting(fail)
    with pytest.raises(RuntimeError, match="mine"):
        fit(model, SensitivityMonitor(task=None))
    assert not model._forward_hooks


def test_what_rules_it_out_before_the_step_runs() -> None:
    model = Classifier()
    run = trainer()
    assert why_not(run, model) is None
    with torch.inference_mode():
        assert "inference tensors" in str(why_not(run, model))
    model.compile(backend="eager")
    assert "compiled as a whole" in str(why_not(run, model))


def test_arguments_are_the_same_only_if_all_of_them_are() -> None:
    class Two(Classifier):
        def forward(self, x: Any, mask: Any = None, scale: float = 1.0) -> Any:
            return x["x"] * scale

    x, mask = {"x": torch.ones(2, 3), "ids": [torch.zeros(2)]}, torch.ones(2)
    model = Two().eval()
    witness = Witness(model)
    for args, kwargs, is_same in (
        ((x, mask, 2.0), {}, True),
        ((x,), {"mask": mask, "scale": 2.0}, True),
        ((dict(x), mask, 2.0), {}, True),
        ((x, mask), {}, False),
        ((x, mask, 3.0), {}, False),
        ((x, mask.clone(), 2.0), {}, False),
        (({"x": x["x"]}, mask, 2.0), {}, False),
        (({**x, "ids": []}, mask, 2.0), {}, False),
    ):
        witness.watch(((x, mask), {"scale": 2.0}), [(x["x"], x["x"]), (x["ids"][0], x["ids"][0]), (mask, mask)])
        model(*args, **kwargs)
        assert (witness.result() is not None) == is_same
    model(x, mask, 2.0)  # between batches
    assert witness.result() is None
    with pytest.raises(TypeError):
        witness.watch(((), {}), ())
    witness.close()
    assert not model._forward_hooks


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="before torch 2.6 its mode can't be read")
def test_a_compiled_submodule_reuses_and_a_compiled_module_does_not() -> None:
    model = Counting(STEPS["self(x)"][0])
    model.net = torch.compile(model.net, backend="eager")
    fit(model, SensitivityMonitor(task=None))
    assert model.passes == NUM_BATCHES * 2 + 1


def test_the_model_that_validation_calls_without_arguments_is_no_match() -> None:
    class Stateful(Counting):
        def forward(self, x: Tensor | None = None) -> Tensor:
            return super().forward(torch.zeros(16, 12) if x is None else x)

    model = Stateful(lambda model, batch: model())
    fit(model, SensitivityMonitor(task=None))
    assert model.passes == NUM_BATCHES * 3


def test_buffers_that_a_model_changes_do_not_leave_with_it() -> None:
    class Observing(Counting):
        def __init__(self) -> None:
            super().__init__(STEPS["self(x)"][0])
            self.register_buffer("seen", torch.zeros(()))
            self.observer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x)

    with_monitor, without = Observing(), Observing()
    fit(with_monitor, SensitivityMonitor(task=None))
    fit(without)
    assert with_monitor.seen == without.seen


def test_a_step_that_pickles_and_copies_the_module() -> None:
    copies = []

    def copy_it(model: Any, batch: Any) -> None:
        model(batch[0])
        copies.append(copy.deepcopy(model.net))
        pickle.loads(pickle.dumps(model._forward_hooks))

    model = Counting(copy_it)
    fit(model, SensitivityMonitor(task=None))
    assert model.passes == NUM_BATCHES * 2 + 1


def test_what_forward_logs_is_what_it_logged_in_the_step() -> None:
    class Logging(Counting):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.log("spread", x.std())
                self.log_dict({"mean": x.mean()})
            return super().forward(x)

    values = []
    for monitor in (None, SensitivityMonitor(noise_std=2.0)):
        run = fit(Logging(STEPS["self(x)"][0]), monitor)
        values.append((run.callback_metrics["spread"], run.callback_metrics["mean"]))
    assert values[0] == values[1]


def test_what_draws_in_inputs_does_not_change_training() -> None:
    weights = []
    for monitor in (None, SensitivityMonitor(inputs=lambda batch: (batch[0] + torch.rand(1),), task=None)):
        model = Counting(STEPS["self(x)"][0])
        fit(model, monitor)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_arguments_that_forward_does_not_take_are_explained() -> None:
    class Two(Counting):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(MisconfigurationException, match="could not run the model.*inputs="):
        fit(Two(), SensitivityMonitor(task=None), unlabelled_loader(32))


class Sparse(Counting):
    def __init__(self, step: Any, buffer: Tensor) -> None:
        super().__init__(step)
        self.register_buffer("mixing", buffer)

    def forward(self, x: Tensor) -> Tensor:
        mixing = self.mixing.float() if self.mixing.layout == torch.strided else self.mixing
        return super().forward((mixing @ x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr, lambda eye: eye.to(torch.float8_e4m3fn)])
def test_no_run_is_lost_over_buffers_that_can_not_be_compared(convert: Callable[[Tensor], Tensor]) -> None:
    model = Sparse(STEPS["self(x)"][0], convert(torch.eye(12)))
    run = fit(model, SensitivityMonitor(task=None))
    assert model.passes == NUM_BATCHES * (1 + 1) + NUM_BATCHES  # the clean ones are computed
    same = fit(Counting(), SensitivityMonitor(task=None)).callback_metrics["val_sensitivity"]
    assert run.callback_metrics["val_sensitivity"].item() == pytest.approx(same.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("task", ["multiclass", None])
def test_lazy_modules(task: str | None) -> None:
    class Lazy(Counting):
        def __init__(self, step: Any) -> None:
            super().__init__(step)
            self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))

    model = Lazy(STEPS["self(x)"][0])
    values = fit(model, SensitivityMonitor(task=task)).callback_metrics
    assert values["val_sensitivity"] > 0
    assert ("val_risk_estimate" in values) == (task is not None)


def test_none_is_no_tensor_that_the_batch_has_not() -> None:
    class Masked(Counting):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    first = inputs(16)

    def with_mask(batch: Any) -> tuple[Tensor, Tensor]:  # the first batch has nothing to mask
        return batch[0], torch.ones(12) if batch[0].equal(first) else torch.tensor([0.0, 1.0]).repeat(6)

    values = [
        fit(Masked(step), SensitivityMonitor(inputs=with_mask, task=None)).callback_metrics["val_sensitivity"]
        for step in (None, lambda model, batch: model(batch[0], None))
    ]
    assert values[0] == values[1]


def test_our_own_passes_are_not_taken_for_the_steps() -> None:
    """Of arguments without a tensor, none of which says whose they are."""

    class Text(Counting):
        def __init__(self, step: Any) -> None:
            super().__init__(step)
            self.embedding = nn.Embedding(9, 12)

        def forward(self, words: Any) -> Tensor:
            lengths = torch.tensor([len(word) for word in words])
            return super().forward(self.embedding(lengths))

    batches = [([c * (1 + (i + ord(c)) % 8) for c in "abcdef"], torch.arange(6) % 4) for i in range(NUM_BATCHES)]
    values = []
    for step in (None, with_other_weights):
        torch.manual_seed(0)
        loaders = [DataLoader(batches, batch_size=None) for _ in range(2)]
        run = trainer(callbacks=[SensitivityMonitor(at="embedding", task=None)], max_epochs=1)
        run.fit(Text(step), *loaders)
        values.append(run.callback_metrics["val_sensitivity"])
    assert values[0] == values[1]


def test_weights_that_later_steps_exchange() -> None:
    """The first batch has shown nothing of it."""

    class Exchanging(Counting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            own = [parameter.data for parameter in self.parameters()]
            for parameter in self.parameters() if batch_idx else ():
                parameter.data = parameter.data / 2
            self(batch[0])
            for parameter, data in zip(self.parameters(), own, strict=True):
                parameter.data = data

    values = [fit(kind(), SensitivityMonitor(task=None)).callback_metrics for kind in (Counting, Exchanging)]
    assert values[0]["val_sensitivity"] == values[1]["val_sensitivity"]
