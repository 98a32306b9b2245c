"""Perturbations other than Gaussian noise, and noise at other places than the input, through the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.perturbations import Interpolation, RademacherNoise, SaltAndPepper, UniformNoise
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Linear, csv_rows, inputs, loader, trainer

LAYERS = ["net.0", "net.2", "net.4"]


def validate(monitor: SensitivityMonitor, model: Any, val: Any = None) -> dict[str, float]:
    run = trainer(callbacks=[monitor])
    run.validate(model, loader() if val is None else val, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}


class Deep(Classifier):
    """Linear after the first layer, so that the sensitivity of each layer is known."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Linear(8, 6), nn.Linear(6, NUM_CLASSES))


def test_a_linear_models_layers_have_the_sensitivities_that_their_weights_give() -> None:
    model, val = Deep(), loader(4000, 100)
    metrics = validate(SensitivityMonitor(at=["net.0", "net.1", "net.2"], noise_std=0.5, num_samples=None), model, val)
    first, second = model.net[1].weight, model.net[2].weight
    for name, matrix in (("net.0", second @ first), ("net.1", second), ("net.2", torch.eye(NUM_CLASSES))):
        expected = 0.25 * matrix.mean(0).square().sum().item()
        error = metrics[f"val_sensitivity_stderr/{name}"]
        assert metrics[f"val_sensitivity/{name}"] == pytest.approx(expected, abs=4 * error)
        assert error < 0.1 * expected
    # C is that of the layer's own outputs.
    x = torch.cat([batch[0] for batch in val])
    power = model.net[0](x).square().mean().item()
    estimate = (0.5 * 0.75 * metrics["val_sensitivity/net.0"] * power / 0.25) ** 0.5
    assert metrics["val_loss_estimate/net.0"] == pytest.approx(estimate)


class Recurrent(Linear):
    """Uses the last state of an LSTM, and not the outputs, which come first in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(NUM_FEATURES, 5, batch_first=True), nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[1][0][-1])


def test_a_perturbation_that_reaches_no_output_is_said_once() -> None:
    run = trainer(callbacks=[SensitivityMonitor(at=["lstm", "head"])], max_epochs=3)
    with pytest.warns(UserWarning, match="`val_sensitivity/lstm`: no output changed under the perturbation") as caught:
        run.fit(Recurrent(), loader(), loader())
    assert run.callback_metrics["val_sensitivity/lstm"] == 0 < run.callback_metrics["val_sensitivity/head"]
    assert sum("no output changed" in str(warning.message) for warning in caught) == 1


def test_each_thing_that_is_wrong_is_said_once() -> None:
    class Late(Linear):
        """Of outputs that are all 0 at first, and later so large that their rounding is above the changes."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.current_epoch > 0) + 3e4 * (self.current_epoch > 0)

    run = trainer(callbacks=[SensitivityMonitor(noise_std=1e-3, task=None)], max_epochs=4, num_sanity_val_steps=0)
    with pytest.warns(UserWarning) as caught:
        run.fit(Late(), loader(), loader())
    messages = [str(warning.message) for warning in caught if "`val_sensitivity`" in str(warning.message)]
    assert ["no output changed" in message for message in messages] == [True, False]
    assert "the rounding of the outputs" in messages[1]


def test_a_last_sample_that_a_model_squeezes() -> None:
    class Squeezing(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0].squeeze()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    metrics = validate(SensitivityMonitor(), Squeezing(), loader(33, 16))
    assert metrics["val_sensitivity"] > 0


class Centred(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs - outputs.mean(1, keepdim=True)


@pytest.mark.parametrize("method", ["noise", "gradient"])
def test_centred_outputs_are_said(method: str) -> None:
    with pytest.warns(UserWarning, match="rows of the outputs all sum to the same value|no output changed"):
        validate(SensitivityMonitor(method=method), Centred())


def test_one_name_takes_the_place_of_the_input() -> None:
    model = Classifier()
    one = validate(SensitivityMonitor(at="net.2"), model)
    several = validate(SensitivityMonitor(at=LAYERS), model)
    assert {name for name in one if name.startswith("val_s")} == {
        "val_sensitivity",
        "val_sensitivity_stderr",
        "val_sensitivity_log10",
    }
    assert one["val_sensitivity"] == several["val_sensitivity/net.2"]
    assert "val_sensitivity" not in several
    assert len({several[f"val_sensitivity/{at}"] for at in LAYERS}) == len(LAYERS)


def test_noise_at_the_identity_is_noise_at_the_input() -> None:
    class First(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(0, nn.Identity())

    model = First()
    assert validate(SensitivityMonitor(at="net.0", num_draws=2), model) == validate(
        SensitivityMonitor(num_draws=2), model
    )


@pytest.mark.parametrize("num_loaders", [1, 2])
def test_a_profile_is_logged_every_epoch_beside_one_risk_estimate(tmp_path: Path, num_loaders: int) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[SensitivityMonitor(at=LAYERS, before_training=True)], logger=logger)
    run.fit(Classifier(), loader(), [loader() for _ in range(num_loaders)])
    suffixes = [""] if num_loaders == 1 else ["/dataloader_idx_0", "/dataloader_idx_1"]
    names = {f"val_{name}/{at}" for name in ("sensitivity", "loss_estimate") for at in LAYERS} | {"val_risk_estimate"}
    expected = {name + suffix for name in names for suffix in suffixes}
    rows = csv_rows(logger.log_dir)
    assert expected <= rows[0].keys()
    assert not any(name.startswith("val_risk_estimate/net") for name in rows[0])
    for name in expected:
        assert sum(bool(row[name]) for row in rows) == 2 + ("risk" not in name)  # and before training


def test_the_number_of_forward_passes_of_a_profile() -> None:
    passes = 0

    class Counting(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return super().forward(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    validate(SensitivityMonitor(at=LAYERS, num_draws=2), Counting())
    assert passes == 4 * (1 + 2 * len(LAYERS))


class Text(Classifier):
    """Token ids, a mask, and logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, 8, padding_idx=0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embeddings(input_ids)
        mean = (hidden * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return {"logits": self.net(hidden + mean).movedim(-1, 1)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["input_ids"], batch["attention_mask"])["logits"], batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def sentences(length: int) -> list[dict[str, Tensor]]:
    """Batches of one length each; the last tokens of every second sentence are padding."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 20, (8, length), generator=generator)
    mask = torch.ones(8, length, dtype=torch.bool)
    mask[::2, -2:] = False
    ids[~mask] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask, ids % NUM_CLASSES, -100)}


def batches() -> DataLoader:
    return DataLoader([sentences(length) for length in (5, 9, 7)], batch_size=None)


def test_token_ids_of_variable_lengths_with_padding_train_end_to_end() -> None:
    torch.manual_seed(0)
    model = Text()
    run = trainer(callbacks=[SensitivityMonitor(at="embeddings")], max_epochs=3)
    run.fit(model, batches(), batches())
    assert run.callback_metrics["val_sensitivity"] > 0
    assert run.callback_metrics["val_risk_estimate"].isfinite()


def test_padding_is_left_out_by_a_mask_in_the_batch() -> None:
    def tokens(result: Any, batch: Any) -> Tensor:
        return result["logits"].movedim(1, -1)[batch["attention_mask"]]

    seen = []

    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=generator)
        seen.append((x + 0.1 * noise, x))
        return x + 0.1 * noise

    model = Text()
    metrics = validate(SensitivityMonitor(at="embeddings", outputs=tokens, perturbation=noise), model, batches())
    changes = []
    for (noisy, clean), batch in zip(seen, batches(), strict=True):
        mask = batch["attention_mask"]
        logits = []
        for hidden in (noisy, clean):
            mean = (hidden * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            logits.append(model.net(hidden + mean)[mask])
        changes.append((logits[0].double() - logits[1].double()).mean(1))
    expected = torch.cat(changes).var(unbiased=False).item()
    assert metrics["val_sensitivity"] == pytest.approx(expected, rel=1e-4)
    everything = validate(SensitivityMonitor(at="embeddings", perturbation=noise), model, batches())
    assert everything["val_sensitivity"] != pytest.approx(expected, rel=1e-2)
    assert "val_loss_estimate" not in metrics  # a function does not state its second moment


@pytest.mark.parametrize("perturbation", [UniformNoise(0.1), RademacherNoise(0.1)])
def test_noise_of_another_kind_has_the_linear_models_value_and_its_c(perturbation: Any) -> None:
    model, val = Linear(), DataLoader(inputs(4000), 100)
    metrics = validate(SensitivityMonitor(perturbation=perturbation), model, val)
    error = metrics["val_sensitivity_stderr"]
    assert metrics["val_sensitivity"] == pytest.approx(model.sensitivity(0.1), abs=4 * error)
    gaussian = validate(SensitivityMonitor(), model, val)
    assert metrics["val_loss_estimate"] == pytest.approx(gaussian["val_loss_estimate"], rel=0.2)
    assert metrics["val_sensitivity"] != gaussian["val_sensitivity"]


@pytest.mark.parametrize("perturbation", [SaltAndPepper(0.1), Interpolation(0.2), lambda x, generator: x * 1.1])
def test_a_perturbation_without_a_second_moment_gives_no_loss_estimate(perturbation: Any) -> None:
    metrics = validate(SensitivityMonitor(perturbation=perturbation), Classifier())
    assert metrics["val_sensitivity"] > 0
    assert "val_loss_estimate" not in metrics


def test_a_perturbation_that_writes_into_the_batch_does_not_reach_validation_step() -> None:
    class Checking(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert torch.equal(batch[0], inputs(50)[batch_idx * 16 :][:16])

    validate(SensitivityMonitor(perturbation=lambda x, generator: x.mul_(2)), Checking())


def test_several_inputs_are_perturbed_with_noise_of_their_own() -> None:
    class Two(Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a) - self.net(b)

    model = Two()
    x = inputs(4000)
    val = DataLoader(TensorDataset(x, x), 100)
    metrics = validate(SensitivityMonitor(inputs=[0, 1]), model, val)
    expected = 2 * model.sensitivity(0.1)  # with the same noise it would be 0
    assert metrics["val_sensitivity"] == pytest.approx(expected, abs=4 * metrics["val_sensitivity_stderr"])
    metrics = validate(SensitivityMonitor(inputs=1), model, val)
    assert metrics["val_sensitivity"] == pytest.approx(expected / 2, abs=4 * metrics["val_sensitivity_stderr"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"at": ""}, "`at` should be a submodule's name, a list of them or None, got ''"),
        ({"at": []}, "`at` should be"),
        ({"at": ["a", "a"]}, "`at` should be"),
        ({"at": ["a", 3]}, "`at` should be"),
        ({"at": 3}, "`at` should be"),
        ({"inputs": []}, "`inputs` should be a list of different keys"),
        ({"inputs": ["a", "a"]}, "`inputs` should be a list of different keys"),
        ({"inputs": ["a", None]}, "`inputs` should be a list of different keys"),
        ({"perturbation": 0.1}, r"`perturbation` should be a callable \(x, generator\) -> x', .*, got 0.1"),
        ({"perturbation": UniformNoise}, "`perturbation` should be a callable"),
        ({"perturbation": UniformNoise(0.1), "noise_std": 0.2}, "`noise_std` should be left out beside a `pertur"),
        ({"save_training_samples": 1}, "`save_training_samples` should be a bool, got 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        SensitivityMonitor(**kwargs)


@pytest.mark.parametrize("at", ["net.9", ["net.0", "embeddings"]])
def test_a_name_that_is_none_is_found_before_training(at: Any) -> None:
    run = trainer(callbacks=[SensitivityMonitor(at=at)], num_sanity_val_steps=0)
    model = Classifier()
    with pytest.raises(MisconfigurationException, match="`at` should name a submodule of Classifier"):
        run.fit(model, loader(), loader())
    assert run.global_step == 0


def test_layers_that_configure_model_builds_are_found() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            self.net = Classifier().net

    assert validate(SensitivityMonitor(at="net.0"), Late())["val_sensitivity"] > 0
