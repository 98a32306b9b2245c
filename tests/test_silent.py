"""No number is wrong in silence: batches × outputs × labels, each of them right, refused or warned of.

To add a case, say what is expected of SensitivityMonitor (``s``) and of RiskMonitor (``r``), how a batch is made of
inputs and labels, what ``forward`` does, and how a step calls the model, on inputs to which noise may be added:

    "labels first": Case(r="!class indices integers", batch=lambda x, y: (y, x),
        step=lambda m, b, noise: m(noise(b[1])), options={"inputs": lambda b: b[1]}),
"""

from __future__ import annotations

import re
from collections import UserDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.running import noise_generator
from tests.callbacks.plain_loop import by_kind, expected_by, fit_reference, label_matrix
from tests.helpers import Linear, inputs, quick_estimator, quick_risk, said, trainer

RIGHT = "=plain loop"  # else "!", an error before the first step, or a "?" for each warning, and what the first says
HEAD = r"!`outputs` should .*dict of 'loss', 'a'"
DENSE, LAST = "!are dense", "!`outputs` should move the classes"
Pair, Weighted = namedtuple("Pair", "x y"), namedtuple("Weighted", "y weight x")
Noise = Callable[[Tensor], Tensor]


def classes(f: Tensor) -> Tensor:
    return f[:, :4].argmax(1)


def is_upper(f: Tensor) -> Tensor:
    return classes(f) > 1


def ids(f: Tensor) -> Tensor:
    return (9 * f[:, :5]).long()


def sequence(f: Tensor) -> Tensor:
    return f[:, None] * torch.arange(1, 6)[:, None]  # (N, 5, 12)


def image(f: Tensor) -> Tensor:
    return f[..., None, None].repeat(1, 1, 3, 3)


def masked(m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return m.net(x if mask is None else x * mask)


def counting(m: Any, x: Tensor) -> Tensor:
    m.history["calls"].append(len(x))
    return len(m.history["calls"]) * m.net(x)


def writing(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.net[0].bias.mul_(0.9)
    return m.net(x)


def text_classifier(m: Any, input_ids: Tensor, attention_mask: Any = None, labels: Tensor | None = None) -> Any:
    return SimpleNamespace(loss=0.0, logits=m.net(m.embedding(input_ids) * attention_mask[..., None]).mean(1))


def part(key: Any) -> Callable[[Any, Any, Noise], Tensor]:
    return lambda m, batch, noise: m(noise(batch[key]))


def output(key: Any) -> Callable[[Any, Any, Noise], Tensor]:
    return lambda m, batch, noise: m(noise(batch[0]))[key]


def at_embedding(call: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any, Noise], Tensor]:
    def step(m: Any, batch: Any, noise: Noise) -> Tensor:
        with m.embedding.register_forward_hook(lambda module, args, result: noise(result)):
            return call(m, batch)

    return step


@dataclass(frozen=True)
class Case:
    """What is expected of both monitors; how a batch is made of features, and how a step of the user runs the model.

    Attributes:
        s: What SensitivityMonitor does; None is not asked.
        r: What RiskMonitor does.
        batch: Makes a batch of inputs and labels.
        forward: The ``forward`` of the model, which has a network, an embedding and a history.
        step: Gives the outputs for a batch; ``noise`` is called on what is perturbed.
        x: Makes inputs of features ``(N, 12)``.
        y: Makes labels of features.
        options: Options of both monitors.
        s_options: Options of SensitivityMonitor.
        r_options: Options of RiskMonitor.
        num_outputs: How many outputs the network has.
        seen: What the reference sees of a batch; None for no reference.
    """

    s: str | None = RIGHT
    r: str = RIGHT
    batch: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)
    forward: Callable[..., Any] = lambda m, x: m.net(x)
    step: Callable[[Any, Any, Noise], Tensor] = lambda m, batch, noise: m(noise(batch[0]))
    x: Callable[[Tensor], Tensor] = lambda f: f
    y: Callable[[Tensor], Tensor] = classes
    options: dict[str, Any] = field(default_factory=dict)
    s_options: dict[str, Any] = field(default_factory=dict)
    r_options: dict[str, Any] = field(default_factory=dict)
    num_outputs: int = 4
    seen: Callable[[Any], Any] | None = lambda batch: batch[0]


BINARY: dict[str, Any] = {"num_outputs": 1, "r_options": {"task": "binary"}}
REGRESSION: dict[str, Any] = {"num_outputs": 2, "r_options": {"task": "regression"}}
DEFAULT: dict[str, Any] = {"reference": None}  # its own learners, where a quick one is blind
CASES = {
    # forms of batches
    "tuple": Case(),
    "labels first": Case(r="!should fit the outputs", batch=lambda x, y: (y, x), step=part(1),
        options={"inputs": lambda b: b[1]}),
    "dict of an input and labels": Case(batch=lambda x, y: {"z": x, "label": y}, step=part("z"),
        seen=lambda b: b["z"]),
    "dict of other names": Case("!`inputs", "!`inputs", batch=lambda x, y: {"z": x, "w": 2 * x, "label": y},
        forward=lambda m, *args: m.net(args[0]), step=part("z")),
    "dict for a forward that takes it": Case(batch=lambda x, y: {"z": x, "n": ids(x)[:, 1], "Y": y},
        forward=lambda m, b: m.net(b["z"]) + b["n"][:, None], step=lambda m, b, noise: m({**b, "z": noise(b["z"])}),
        seen=lambda b: torch.cat([b["z"], b["n"][:, None]], 1)),
    "dict for a forward that takes a tensor": Case("!set `inputs=`", "!set `inputs=`",
        batch=lambda x, y: {"z": x, "n": ids(x)[:, 1], "y": y}, step=part("z")),
    "dict of several floating tensors": Case(r"!got `b\['z'\]`, `b\['scale'\]` among.*`at=",
        batch=lambda x, y: {"z": x, "scale": x[:, :1], "y": y}, forward=lambda m, b: m.net(b["z"]) * b["scale"],
        step=lambda m, b, noise: m(b),
        seen=lambda b: torch.cat([b["z"], b["scale"]], 1)),
    "dict with labels that the network does not read": Case(None, "!among the inputs, in `b\\['answer'\\]`",
        batch=lambda x, y: {"z": x, "answer": 1 * y, "y": y}, forward=lambda m, b: m.net(b["z"]),
        step=lambda m, b, noise: m(b), seen=lambda b: b["z"]),
    "dict with a name like labels": Case(None, "?can't show the reference all of `decoder_target`",
        batch=lambda x, y: {"z": x, "decoder_target": 1 + 2 * y, "y": y},
        forward=lambda m, b: m.net(b["z"]), step=lambda m, b, noise: m(b), seen=lambda b: b["z"]),
    "dict of arguments, inputs=": Case("!got `x`, `mask`", options={"inputs": lambda b: {"x": b[0], "mask": b[0]}},
        forward=masked, step=lambda m, b, noise: m(noise(b[0]), b[0]),
        seen=lambda b: torch.cat([b[0], b[0]], 1)),
    "tuple of inputs": Case(r"!got `x\[0\]`, `x\[1\]` among.*`at=", batch=lambda x, y:
        ((x[:, :6], x[:, 6:]), y), forward=lambda m, x: m.net(torch.cat(x, 1)), step=lambda m, b, noise: m(b[0]),
        seen=lambda b: torch.cat(b[0], 1)),
    "pair of inputs, labels": Case(batch=lambda x, y: ((x[:, :6], x[:, 6:]), y),
        forward=lambda m, a, b: m.net(torch.cat([a, b], 1)), step=lambda m, b, noise: m(noise(b[0][0]), b[0][1]),
        seen=lambda b: torch.cat(b[0], 1)),
    "inputs, labels, names": Case(batch=lambda x, y: [x, y, ["name"] * len(x)]),
    "inputs, labels, lists of indices": Case(batch=lambda x, y: [x, y, [y, y]]),
    "inputs, labels, weights": Case(r="!`targets", batch=lambda x, y: (x, y, x[:, 0])),
    "call= and features=": Case(None, batch=lambda x, y: {"z": x, "label": y}, forward=lambda m, x, y, z: None,
        r_options={"call": lambda m, b: m.net(b["z"]), "features": lambda b: b["z"]},
        step=lambda m, b, noise: m.net(b["z"]), seen=lambda b: b["z"]),
    "mapping with a mask": Case(batch=lambda x, y: UserDict(x=x, mask=x > 0.5, y=y, weight=x[:, 0]), forward=masked,
        step=lambda m, b, noise: m(noise(b["x"]), b["mask"]), seen=lambda b: torch.cat([b["x"], b["mask"]], 1)),
    "object": Case("!`inputs=", "!the reference can read nothing of", batch=lambda x, y: SimpleNamespace(x=x, y=y),
        forward=lambda m, b: m.net(b.x), step=lambda m, b, noise: m(SimpleNamespace(x=noise(b.x), y=b.y))),
    "nested, inputs=": Case(batch=lambda x, y: Pair(Pair(x, ({"b": [2 * x]}, (9 * x).long(), "name")), y),
        options={"inputs": lambda b: b.x}, forward=lambda m, pair: m.net(pair.x + pair.y[0]["b"][0] + pair.y[1]),
        step=lambda m, b, noise: m(Pair(noise(b.x.x), ({"b": [noise(b.x.y[0]["b"][0])]}, *b.x.y[1:]))),
        seen=lambda b: torch.cat([b.x.x, b.x.y[0]["b"][0], b.x.y[1]], 1)),
    "named tuple with weights": Case(batch=lambda x, y: Weighted(y, x[:, 0], x), step=lambda m, b, noise: m(noise(b.x)),
        seen=lambda b: b.x),
    "numbers and categories": Case(batch=lambda x, y: (x, ids(x), y), forward=lambda m, x, ids: m.net(x) + ids[:, :4],
        step=lambda m, b, noise: m(noise(b[0]), b[1]), seen=lambda b: torch.cat(b[:2], 1)),
    "a column of names": Case(r="?can't show the reference all of `n`", batch=lambda x, y: {"x": x, "y": y,
        "n": torch.stack([(9999 * x[:, 0]).long(), ids(x)[:, 1]], 1)}, forward=lambda m, x, n: m.net(x) + n[:, 1:],
        step=lambda m, b, noise: m(noise(b["x"]), b["n"])),
    "no labels": Case(r="!`targets", batch=lambda x, y: x, step=lambda m, b, noise: m(noise(b))),
    "targets= that fails": Case(None, r"!`targets` failed on tuple of 2: .*IndexError",
        r_options={"targets": lambda b: b[2]}),
    "list of sequences": Case(s_options={"inputs": lambda b: (b[0],)}, batch=lambda x, y: (list(sequence(x)), y),
        seen=lambda b: torch.stack(b[0]).mean(1),
        forward=lambda m, sequences: torch.stack([m.net(each.mean(0)) for each in sequences]),
        step=lambda m, b, noise: m([noise(each) for each in b[0]]),
        r_options={"features": lambda b: torch.stack(b[0]).mean(1)}),
    "token ids": Case("!`at=", x=ids, r_options=DEFAULT, forward=lambda m, x: m.net(m.embedding(x)).mean(1)),
    "transformers": Case(batch=lambda x, y: {"input_ids": x, "attention_mask": x > 2, "labels": y}, x=ids,
        forward=text_classifier, s_options={"at": "embedding"}, step=at_embedding(lambda m, b: m(**b).logits),
        seen=lambda b: b["input_ids"].where(b["attention_mask"], -1), r_options=DEFAULT),
    "object for a forward of tensors": Case("!set `inputs=`\\.", "!set `inputs=`\\.",
        batch=lambda x, y: SimpleNamespace(x=x, y=y), step=lambda m, b, noise: m(b.x)),
    # positions: S counts each of them, and there is no risk
    "(N, T, K)": Case(LAST, LAST, x=sequence),
    "(N, T, K), outputs=": Case(r=DENSE, x=sequence, options={"outputs": lambda y: y.mT},
        step=lambda m, b, noise: m(noise(b[0])).mT),
    "(N, K, T), T == K": Case(LAST, LAST, x=lambda f: sequence(f)[:, :4], forward=lambda m, x: m.net(x).mT),
    "(N, K, H, W)": Case(r=DENSE, x=image, forward=lambda m, x: m.net(x.movedim(1, -1)).movedim(-1, 1)),
    # outputs
    "softmax": Case("!`outputs", "!`outputs", forward=lambda m, x: m.net(x).softmax(1)),
    "log-softmax": Case("!`outputs", forward=lambda m, x: m.net(x).log_softmax(1)),
    "sigmoid": Case(RIGHT, "!set `task='multilabel'`", forward=lambda m, x: m.net(x).sigmoid(),
        y=lambda f: (f[:, :4] > 0.5).long()),
    "squeezed": Case(forward=lambda m, x: m.net(x).squeeze(1), y=is_upper, **BINARY),
    "sigmoid of one": Case(RIGHT, "!p.logit", y=is_upper, forward=lambda m, x: (m.net(x) + 9 * x[:, :1] - 4).sigmoid(),
        **BINARY),
    "two opposite logits": Case("?per_output=", forward=lambda m, x: m.net(x)[:, :1] * torch.tensor([1.0, -1.0]),
        y=lambda f: is_upper(f).long()),
    "dict with logits": Case(forward=lambda m, x=None: {"z": x, "logits": m.net(x)}, step=output("logits")),
    "dict of heads": Case(HEAD, HEAD, forward=lambda m, x: {"loss": None, "a": m.net(x)}, step=output("a")),
    "features and logits": Case("!which of several", "!which of several", forward=lambda m, x: (x, m.net(x)),
        step=output(1)),
    "(N, 1, K)": Case(None, forward=lambda m, x: m.net(x)[:, None], step=lambda m, b, noise: m(b[0])[:, 0]),
    "(N, D, 1) and targets (N, D, 1)": Case(None, forward=lambda m, x: m.net(x)[..., None],
        y=lambda f: (f[:, :2] + f[:, 2:4])[..., None], **REGRESSION),
    # what a pass would change and leave so
    "forward that reads a nested list that it fills": Case("!gives other outputs", "!gives other outputs",
        forward=counting),
    "forward that draws from NumPy": Case("!gives other outputs", "!gives other outputs",
        forward=lambda m, x: np.random.rand() * m.net(x)),
    "forward that writes to a weight": Case("!writes to parameters", "!writes to parameters", forward=writing),
    # labels, which say nothing to S
    "-100": Case(None, y=lambda f: classes(f).masked_fill(is_upper(f), -100)),
    "from 1": Case(None, "!`targets", y=lambda f: classes(f) + 1),
    "(N, 1)": Case(None, y=lambda f: classes(f)[:, None]),
    "floating": Case(None, "!one label per output", y=lambda f: classes(f).float()),
    "soft": Case(None, y=lambda f: 0.9 * one_hot(classes(f), 4) + 0.025),
    "0.0 and 1.0, task=": Case(None, y=lambda f: is_upper(f).float(), **BINARY),
    "measurements": Case(y=lambda f: f[:, :2] + f[:, 2:4], **REGRESSION),
    "quantiles of several numbers": Case(None, DENSE,
        x=sequence, y=lambda f: f[:, :5] + f[:, 5:10], r_options={"task": "regression"}),
    "quantiles of several numbers, outputs=": Case(None, num_outputs=2,
        forward=lambda m, x: m.net(x)[..., None] + torch.arange(3), y=lambda f: f[:, :2] + f[:, 2:4],
        r_options={"task": "regression", "outputs": lambda y: y[..., 1]}, step=lambda m, b, noise: m(b[0])[..., 1]),
    "measurements that are nan": Case(None, "?No training sample has a label", y=lambda f: f[:, :2] / 0 * 0,
        **REGRESSION),
}  # fmt: skip


class Model(Linear):
    """A model of a case; its validation step is a stub."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.embedding, self.history = case, nn.Embedding(9, 12), {"calls": []}
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, case.num_outputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.1 * (self.case.step(self, batch, lambda x: x) + 1).square().mean()


@torch.no_grad()
def plain_sensitivity(case: Case, model: Model, _: Any, batches: list[Any], labels: Any) -> dict[str, Any]:
    def outputs(std: float) -> Tensor:
        generators = [noise_generator(0, batch_idx=index) for index in range(len(batches))]
        noise = [lambda x, g=g: x + std * torch.randn(x.shape, generator=g) for g in generators]
        return torch.cat([case.step(model, *each) for each in zip(batches, noise, strict=True)])

    change = (outputs(0.1) - outputs(0.0)).double()
    return {"val/output_sensitivity": (change.mean(1) if change.ndim > 1 else change).var(correction=0)}


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


@torch.no_grad()
def plain_risk(case: Case, model: Model, training: Any, batches: Any, labels: Tensor) -> dict[str, Any]:
    """What the reference expects."""
    unseen = torch.cat([case.step(model, b, lambda x: x) for b in batches]).double()
    task, num_outputs = case.r_options.get("task", "multiclass"), unseen.shape[-1]
    counts = labels.reshape(len(labels), -1)[:, 0] != -100
    seen, new = (join([by_kind(case.seen(b)) for b in part]) for part in (training, batches))  # type: ignore[misc]
    labels = labels if labels.is_floating_point() else labels.reshape(-1, *labels.shape[2:])  # (N, 1) as (N,)
    y = label_matrix(labels[counts], task, num_outputs)
    known = {kind: x[counts] for kind, x in seen.items()}
    reference = fit_reference(known, y, task, case.r_options.get("reference", quick_estimator(task)))
    return expected_by(reference, unseen, new)


ROWS = [(name, SensitivityMonitor) for name in CASES if CASES[name].s] + [(name, quick_risk) for name in CASES]
SIZES = (20, 17, 3), (11, 8)  # of training batches, and of validation batches


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_no_number_is_silently_wrong(name: str, kind: Any) -> None:
    case, plain = CASES[name], plain_risk if kind is quick_risk else plain_sensitivity
    verdict, options = (case.r, case.r_options) if kind is quick_risk else (case.s, case.s_options)
    model = type("CaseModel", (Model,), {"forward": case.forward})(case)
    features = [inputs(sum(sizes), seed=len(sizes)) for sizes in SIZES]
    parts = [part.split(sizes) for part, sizes in zip(features, SIZES, strict=True)]
    batches = [[case.batch(case.x(f), case.y(f)) for f in part] for part in parts]
    loaders = [DataLoader(part, batch_size=None, collate_fn=lambda batch: batch) for part in batches]
    run = trainer(callbacks=[kind(**case.options, **options)], max_epochs=1, num_sanity_val_steps=1)
    sign = verdict[0]
    refused = pytest.raises(MisconfigurationException) if sign == "!" else nullcontext()
    with said() as messages, refused as error:
        run.fit(model, *loaders)
    says = verdict.lstrip("?!")
    assert len(messages) == (len(verdict) - len(says)) * (sign == "?"), messages
    assert sign == "=" or re.search(says, str(error.value) if error else messages[0])
    assert run.global_step == (0 if sign == "!" else 3)
    if sign == "=":
        for key, value in plain(case, model.eval(), *batches, case.y(features[0])).items():
            assert float(run.callback_metrics[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-9)
