"""The recipes of the guide, section by section, on small networks without weights: nothing is downloaded."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import fitted, fitted_and_said, small_forests
from tests.test_docs import DOCS, README, RECIPES

NUM_TRAINING, NUM_UNSEEN, NUM_CLASSES = 150, 60, 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
NEUTRAL, BAD, GOOD = ["film", "plot", "cast", "was", "is", "very"], ["bad", "poor", "dull"], ["good", "great", "fine"]
WORDS = [*SPECIAL, *NEUTRAL, *BAD, *GOOD]


class Network(LightningModule):
    """The base of what recipes judge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Binary(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).squeeze(1)

    def loss(self, batch: Any) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())


class Spectrograms(Network):
    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.model(spectrogram)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch["spectrogram"], batch["label"]))


class Named(Network):
    """A batch and a result with names of the user's own."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"features": image.flatten(1), "logits": self.model(image)}

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch["image"])["logits"], batch["class_id"])


class Texts(Network):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])


class Rows(Dataset):
    """A dict for each row of tensors by name."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.tensors.items()}


def small_bert(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertConfig(vocab_size=len(WORDS), **sizes, **options)


def loaders(rows: Dataset) -> dict[str, Any]:
    """A loader for training, and one of other samples."""
    training, unseen = Subset(rows, range(NUM_TRAINING)), Subset(rows, range(NUM_TRAINING, NUM_TRAINING + NUM_UNSEEN))
    return {"train_loader": DataLoader(training, 30), "val_loader": DataLoader(unseen, 30)}


def pictures(size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise, brighter in one of three colors."""
    labels = torch.arange(NUM_TRAINING + NUM_UNSEEN) % NUM_CLASSES
    colors = torch.eye(3)[labels][:, :, None, None]
    return 0.5 * torch.rand(len(labels), 3, size, size) + 0.5 * colors * torch.rand(len(labels), 1, 1, 1), labels


def cnn(num_outputs: int = NUM_CLASSES) -> nn.Module:
    last = nn.Linear(8, num_outputs)
    nn.init.constant_(last.bias, -1.0)  # so that no outputs look like probabilities
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def of_images() -> dict[str, Any]:
    return {"model": Network(cnn()), **loaders(TensorDataset(*pictures()))}


def of_named_images() -> dict[str, Any]:
    x, labels = pictures(8)
    return {"model": Named(cnn()), **loaders(Rows(image=x, class_id=labels))}


def of_waves() -> dict[str, Any]:
    labels = torch.arange(NUM_TRAINING + NUM_UNSEEN) % 2
    waves = torch.sin((1 + labels[:, None]) * torch.arange(800) / 8) + 0.1 * torch.randn(len(labels), 800)
    spectrogram = waves.unfold(1, 80, 80).abs()
    model = Spectrograms(nn.Sequential(nn.Flatten(), nn.Linear(800, 2)))
    return {"model": model, **loaders(Rows(spectrogram=spectrogram, waves=waves, label=labels))}


def of_few_positives() -> dict[str, Any]:
    x, net = torch.randn(NUM_TRAINING + NUM_UNSEEN, 5), nn.Linear(5, 1)
    nn.init.constant_(net.bias, -2.0)
    return {"model": Binary(net), **loaders(TensorDataset(x, (x[:, 0] > 1).long()))}


def drawn(words: list[str], least: int, most: int) -> list[str]:
    number = int(torch.randint(least, most, ()))
    return [words[int(place)] for place in torch.randint(len(words), (number,))]


def of_texts() -> dict[str, Any]:
    """Sentences with good or bad words, in token ids of a small tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    whole = tokenizers.Tokenizer(words)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **special)
    labels = torch.arange(NUM_TRAINING + NUM_UNSEEN) % 2
    texts = [" ".join([*drawn(NEUTRAL, 2, 7), *drawn(GOOD if label else BAD, 1, 2)]) for label in labels]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    rows = Rows(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels)
    model = Texts(transformers.BertForSequenceClassification(small_bert(num_labels=2)))
    return {"model": model, "tokenizer": tokenizer, **loaders(rows)}


def of_files() -> dict[str, Any]:
    augmented, plain = (TensorDataset(*pictures()) for _ in range(2))
    return {"augmented": augmented, "plain": plain, "model": Network(cnn())}


# What takes the place of networks with weights
def torchvision(folder: Path, patch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    block = models.resnet.BasicBlock
    patch.setattr(models, "resnet50", lambda weights: models.ResNet(block, [1, 1, 1, 1]))


def timm(folder: Path, patch: pytest.MonkeyPatch) -> None:
    timm, create = pytest.importorskip("timm"), pytest.importorskip("timm").create_model
    sizes = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    patch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **sizes, **options))


def transformers(folder: Path, patch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(small_bert())
    patch.setattr(transformers.AutoModel, "from_pretrained", lambda name: bert)


def sentence_transformers(folder: Path, patch: pytest.MonkeyPatch) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    pytest.importorskip("transformers").BertModel(small_bert()).save_pretrained(folder)
    of_texts()["tokenizer"].save_pretrained(folder)
    made = sentences.SentenceTransformer(str(folder))
    patch.setattr(sentences, "SentenceTransformer", lambda name: made)


def wave_encoder(folder: Path, patch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Wav2Vec2Config(**convolutions, **sizes, num_conv_pos_embeddings=16)
    encoder = transformers.Wav2Vec2Model(config)
    patch.setattr(transformers.AutoModel, "from_pretrained", lambda name: encoder)


Prepare = Callable[[Path, pytest.MonkeyPatch], None]
SECTIONS: dict[str, tuple[Callable[[], dict[str, Any]], Prepare | None]] = {
    "Pretrained encoders": (lambda: of_images() | {"encoder": cnn(16)}, None),
    "torchvision": (of_images, torchvision),
    "timm": (of_images, timm),
    "transformers": (of_texts, transformers),
    "sentence-transformers": (of_texts, sentence_transformers),
    "Sound": (of_waves, wave_encoder),
    "A whole script for a table": (dict, None),
    "Your data": (of_images, None),
    "Images": (of_files, None),
    "Texts": (of_texts, None),
    "Other batches": (of_named_images, None),
    "Few positives, AUC and F1": (of_few_positives, None),
    "F1 and others": (of_few_positives, None),
    "Thresholds": (dict, None),
}
IN_OTHER_WORDS = {"timm": (r"name, side = .*", 'name, side = "vit_base_patch32_clip_224.openai", 224')}


def sections() -> dict[str, str]:
    """The code of each section of the pages that has some, and what the sections above it import."""
    found = {}
    for page in RECIPES:
        imports: list[str] = []
        parts = re.split(r"^#+ (.*)$", (DOCS / "guide" / f"{page}.md").read_text(), flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            if code:
                found[name] = "\n".join([*imports, *code])
            imports += re.findall(r"^(?:from|import) .*$", found.get(name, ""), re.MULTILINE)
    return found


@pytest.fixture(autouse=True)
def quick_learners() -> Iterator[None]:
    with small_forests():
        yield


def test_every_recipe_is_tried() -> None:
    assert sections().keys() == SECTIONS.keys()


def run(code: str, names: dict[str, Any]) -> RiskMonitor | None:
    """Run a recipe, and fit, if it does not; the monitor that it makes, if any."""
    exec(compile(re.sub(r"max_epochs=\d+", "max_epochs=3", code), "recipe", "exec"), names)
    if "trainer" in names:
        return next(each for each in names["trainer"].callbacks if isinstance(each, RiskMonitor))
    if "model" not in names:
        return None
    risk = names.get("risk") or RiskMonitor()
    monitors = [risk, names["sensitivity"]] if "sensitivity" in names else [risk]
    fitted(monitors, names["model"], names["train_loader"], names["val_loader"])
    return risk


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists")
@pytest.mark.parametrize("name", SECTIONS)
def test_a_recipe_runs_as_it_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "lightning.pytorch")
    seed_everything(0, verbose=False)
    make, prepare = SECTIONS[name]
    if prepare is not None:
        prepare(tmp_path / "network", monkeypatch)
    code = sections()[name]
    versions = [code, re.sub(*IN_OTHER_WORDS[name], code)] if name in IN_OTHER_WORDS else [code]
    for version in versions:
        risk = run(version, {"__name__": "recipe", **make()})
        if risk is not None:
            assert risk.summary["is_trusted"] and risk.summary["skill"] > 0.1
            assert risk.summary["skill"] > 0.05
            assert (risk.summary["features"] == "features") == ("features=" in version)
    if risk is not None:
        assert "is expected to reach" in caplog.text


# README's table of settings


def of_rows(num_outputs: int, loss: Any, kept: slice = slice(3)) -> dict[str, Any]:
    """Rows of a table, their labels or numbers, and the machine that each is of; `kept` says which a batch has."""
    x, net = torch.randn(NUM_TRAINING + NUM_UNSEEN, 5), nn.Linear(5, num_outputs)
    y = {cross_entropy: (x[:, 0] > 1).long(), mse_loss: x[:, :1] + 0.1 * torch.randn(len(x), 1)}
    labels = y.get(loss, (x[:, :num_outputs] > 0).float())
    model = Network(net)
    model.loss = lambda batch: loss(model(batch[0]), batch[1])  # type: ignore[method-assign]
    return {"model": model, **loaders(TensorDataset(*(x, labels, torch.arange(len(x)) // 10)[kept]))}


def of_pixels() -> dict[str, Any]:
    x, _ = pictures(8)
    model = Network(nn.Conv2d(3, 4, 3, padding=1))
    return {"model": model, **loaders(TensorDataset(x, x.argmax(1)))}


PAIR = slice(2)
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    'RiskMonitor("binary")': of_few_positives,
    "RiskMonitor()": lambda: of_rows(2, cross_entropy, PAIR),
    'RiskMonitor("regression")': lambda: of_rows(1, mse_loss, PAIR),
    'RiskMonitor("regression", inputs=lambda b: b[0], targets=lambda b: b[1], groups=lambda b: b[2])': (
        lambda: of_rows(1, mse_loss)
    ),
    'RiskMonitor("multilabel")': lambda: of_rows(3, binary_cross_entropy_with_logits, PAIR),
    "RiskMonitor(features=encoder)": lambda: of_images() | {"encoder": cnn(16)},
    "RiskMonitor(validation_labels=True)": of_images,
    "SensitivityMonitor()": of_pixels,
    'SensitivityMonitor(at="model.bert.embeddings")': of_texts,
    "SensitivityMonitor(noise=0.4)": of_images,
    "SensitivityMonitor(per_output=True)": lambda: of_rows(2, cross_entropy, PAIR),
}


def test_every_setting_of_readme_is_tried() -> None:
    table = README.read_text().partition("## Which setting")[2].partition("## Limits")[0]
    assert {*re.findall(r"`(\w+Monitor\([^`]*\))`", table)} == ROWS.keys()


@pytest.mark.parametrize("code", ROWS)
def test_a_setting_of_readme_runs_as_it_stands(code: str) -> None:
    seed_everything(0, verbose=False)
    names = ROWS[code]()
    monitor = eval(code, {"RiskMonitor": RiskMonitor, "SensitivityMonitor": SensitivityMonitor, **names})
    run, texts = fitted_and_said([monitor], names["model"], names["train_loader"], names["val_loader"])
    wanted = {"regression": "expected_loss", "Risk": "expected_auroc", "per_output": "per_output_sensitivity"}
    name = next((value for word, value in wanted.items() if word in code), "output_sensitivity")
    assert math.isfinite(run.callback_metrics[f"val/{name}"]) and texts == []
