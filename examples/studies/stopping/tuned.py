"""Runs that go on from a network that has seen other data, of photos and texts; their judges see with encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import data
import networks
import numpy as np
import torch
from encoders import WIDTH, ImageFeatures, TextFeatures, image_features, minilm_ids, text_features
from runs import Run, draw_images, photo_judges, redrawn, seeded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NUM_BEFORE, PASSES_BEFORE = 12_000, 4  # samples on which a body is trained
NUM_UNSEEN, NUM_TEST = 400, 1000
SIDES, LABELS = (48, 64), ("worse_label", "aggre_label", "")


def _run(
    pool: str, index: int, told: str, x: Tensor, noisy: Tensor, y: Tensor, num_classes: int,
    make: networks.Make, r: np.random.RandomState, rates: tuple[float, float], **more: Any,
) -> Run:  # fmt: skip
    """Draw what fine-tuning is done with, for samples in random order."""
    rate = 10 ** r.uniform(*rates)
    training, unseen, test = torch.arange(len(x)).split([len(x) - NUM_UNSEEN - NUM_TEST, NUM_UNSEEN, NUM_TEST])
    return Run(
        pool, index, False, f"{told}, {len(training)}, adamw {rate:.1g}", "multiclass", num_classes, x[training],
        noisy[training], x[unseen], noisy[unseen], y[unseen], x[test], y[test], noisy[test], seeded(make, index),
        lambda parameters: torch.optim.AdamW(parameters, rate), batch_size=32, has_schedule=bool(r.rand() < 0.25),
        **more,
    )  # fmt: skip


class Tuned(nn.Module):
    """A body and a new head; all weights are trained."""

    def __init__(self, body: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Sequential(nn.Dropout(0.1), networks.Head(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def pretrained(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Fine-tune EfficientNet-Lite0, which knows ImageNet, at 48 or 64 pixels: human labels, or correct ones."""
    side, labels = SIDES[index % 2], LABELS[index // 2 % 3]
    n = int(r.randint(600, 1201))
    x, y, chosen = draw_images(r, "cifar10", folder, n + NUM_UNSEEN + NUM_TEST)
    said = data.labels_by_people(labels, folder)[chosen] if labels else y
    told = f"Lite0 at {side}, {100 * float((said != y).float().mean()):.0f} % wrong"
    body = partial(image_features, size=0, side=side, folder=folder)
    return _run(
        "pretrained", index, told, x, said, y, 10, lambda: Tuned(ImageFeatures(0, side), WIDTH, 10), r, (-4, -3),
        epochs=int(r.randint(8, 13)), judges={"body": body} | photo_judges(folder),
    )  # fmt: skip


def tuned(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Fine-tune a small ResNet that has learned five classes of CIFAR-10 on the other five."""
    share, half, n = (0.0, 0.2, 0.4)[index // 2 % 3], index % 2, int(r.randint(300, 1201))
    number, body = n + NUM_UNSEEN + NUM_TEST, trained_resnet(half, folder)
    x, y, _ = draw_images(r, "cifar10", folder, 2 * number + 500)
    x, y = x[y % 2 != half][:number], y[y % 2 != half][:number] // 2
    return _run(
        "tuned", index, f"ResNet, {100 * share:.0f} % redrawn", x, redrawn(r, y, share), y, 5,
        lambda: Tuned(copy.deepcopy(body), RESNET_WIDTH, 5), r, (-4, -3), epochs=12,
        judges={"body": frozen(body)} | photo_judges(folder, ["lite0"]),
    )  # fmt: skip


RESNET_WIDTH = 512


@cache
def trained_resnet(half: int, folder: Path) -> nn.Module:
    """Train a ResNet of torchvision, with one block in each layer, on the even or the odd classes, once."""
    from torchvision.models.resnet import BasicBlock, ResNet

    file = folder / f"resnet_{half}.pt"
    torch.manual_seed(half)
    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    body = nn.Sequential(nn.Upsample(size=64, mode="bilinear"), resnet)
    if not file.exists():
        x, y = data.images("cifar10", folder)
        chosen = (y % 2 == half).nonzero()[:NUM_BEFORE, 0]
        x, y = x[chosen].float() / 255, y[chosen] // 2
        optimizer = torch.optim.Adam(body.parameters(), 1e-3)
        for batch in torch.cat([torch.randperm(len(x)) for _ in range(PASSES_BEFORE)]).split(64):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = body(x[batch].contiguous(memory_format=torch.channels_last))
            cross_entropy(outputs.float(), y[batch]).backward()
            optimizer.step()
        torch.save(body.state_dict(), file)
    body.load_state_dict(torch.load(file))
    resnet.fc = nn.Identity()  # type: ignore[assignment]
    return body.eval()


def frozen(body: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the features of a body, before it is trained further."""

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([body(part) for part in x.split(250)])

    return features


def minilm(r: np.random.RandomState, index: int, folder: Path) -> Run:
    """Fine-tune all-MiniLM-L6-v2 on sentences, each labelled by one of its raters."""
    source = list(data.FILES)[index % 4]
    words, ratings, _ = data.sentences(source, folder)
    found = []
    for place in r.permutation(len(words)):
        votes = [each for each in ratings[place] if each]
        if votes and sum(votes):
            found.append((" ".join(words[place]), int(r.choice(votes) > 0), int(sum(votes) > 0)))
    n = int(r.randint(500, 1001))
    texts, noisy, correct = zip(*found[: n + NUM_UNSEEN + NUM_TEST], strict=True)
    wrong = float(np.mean(np.array(noisy) != np.array(correct)))
    return _run(
        "minilm", index, f"MiniLM, {source}, {100 * wrong:.0f} % wrong", minilm_ids(list(texts)), torch.tensor(noisy),
        torch.tensor(correct), 2, lambda: Tuned(TextFeatures(), TextFeatures.WIDTH, 2), r, (-4.7, -4),
        epochs=6, judges={"body": text_features},
    )  # fmt: skip
