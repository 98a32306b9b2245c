"""Modules that nobody here wrote, with both monitors: `python examples/studies/robustness/third_party.py [name ...]`.

Two lines a package: the logged S beside that of a plain loop, and what the monitors said. Missing packages are skipped.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.model import noise_generator

Noise = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A module, its loader, how a plain loop runs it on a batch (outputs (N, K, ...)), and options of the monitors."""

    module: LightningModule
    loader: Any
    call: Callable[[Any, Any, Noise], Tensor]
    both: dict[str, Any] = field(default_factory=dict)
    s_options: dict[str, Any] = field(default_factory=dict)


class Trained(LightningModule):
    """A user's module around a network of a package."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self, batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Named(Trained):
    """The same, for batches with names."""

    def forward(self, **batch: Any) -> Any:
        return self.net(**batch)


def labelled(shape: tuple[int, ...], labels: tuple[int, ...] = (), num: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(num, *shape), torch.randint(3, (num, *labels))), 4)


def supervised(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1])


def first(module: Any, batch: Any, noise: Noise) -> Tensor:
    return module(noise(batch[0]))


def at(name: str, call: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any, Noise], Tensor]:
    def run(module: Any, batch: Any, noise: Noise) -> Tensor:
        with module.get_submodule(name).register_forward_hook(lambda module, args, result: noise(result)):
            return call(module, batch)

    return run


def lightning_boring() -> Case:
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    return Case(BoringModel(), DataLoader(RandomDataset(32, 12), 4), lambda m, b, noise: m(noise(b)))


def lightning_transformer() -> Case:
    from lightning.pytorch.demos import LightningTransformer

    class Validated(LightningTransformer):
        def prepare_data(self) -> None:  # it would load a text from the net
            pass

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().validation_step(batch, batch_idx)

    loader = DataLoader([(row[0], row[1]) for row in torch.randint(50, (12, 2, 6))], 4)
    call = at("model.embedding", lambda m, b: m(*b))
    # It returns log-probabilities, (N × T, K).
    return Case(Validated(vocab_size=50), loader, call, s_options={"at": "model.embedding", "per_output": True})


def torchvision_resnet() -> Case:
    from torchvision.models import resnet18

    return Case(Trained(resnet18(num_classes=3), supervised), labelled((3, 32, 32)), first)


def torchvision_segmentation() -> Case:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large as make

    net = make(weights=None, weights_backbone=None, num_classes=3)
    module = Trained(net, lambda m, b: cross_entropy(m(b[0])["out"], b[1]))
    call = lambda m, b, noise: m(noise(b[0]))["out"]  # noqa: E731
    return Case(module, labelled((3, 32, 32), (32, 32)), call, {"outputs": lambda y: y["out"]})


def _bert(kind: str, labels: tuple[int, ...]) -> Case:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    ids, mask = torch.randint(50, (12, 3)), torch.ones(12, 3, dtype=torch.long)
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    rows = [row | {"labels": torch.randint(3, labels)} for row in rows]
    module = Named(getattr(transformers, f"BertFor{kind}Classification")(config), lambda m, b: m(**b).loss)

    def call(m: Any, b: Any) -> Tensor:
        y = m(**b).logits
        return y.movedim(-1, 1) if labels else y

    name = "net.bert.embeddings"
    options = {"outputs": lambda y: y.logits.movedim(-1, 1)} if labels else {}  # three tokens, three classes
    return Case(module, DataLoader(rows, 4), at(name, call), options, {"at": name})


def transformers_text() -> Case:
    return _bert("Sequence", ())


def transformers_tokens() -> Case:
    return _bert("Token", (3,))


def torch_geometric_gcn() -> Case:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCN

    class Graphs(Trained):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.net(x, edge_index)

    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    graphs = [Data(torch.randn(4, 5), edges, y=torch.randint(3, (4,))) for _ in range(12)]
    module = Graphs(GCN(5, 8, 2, 3), lambda m, b: cross_entropy(m(b.x, b.edge_index), b.y))
    call = lambda m, b, noise: m(noise(b.x), b.edge_index)  # noqa: E731
    return Case(module, GraphLoader(graphs, 4), call, {"inputs": lambda batch: (batch.x, batch.edge_index)})


def segmentation_models_pytorch_unet() -> Case:
    import segmentation_models_pytorch as smp

    net = smp.Unet("resnet18", encoder_weights=None, classes=3)
    return Case(Trained(net, supervised), labelled((3, 32, 32), (32, 32)), first, {"outputs": lambda y: y})


def monai_unet() -> Case:
    from monai.networks.nets import UNet

    net = UNet(spatial_dims=2, in_channels=1, out_channels=3, channels=(4, 8), strides=(2,))
    return Case(Trained(net, supervised), labelled((1, 16, 16), (16, 16)), first)


def lightly_simclr() -> Case:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), SimCLRProjectionHead(16, 16, 8))
    views = DataLoader([((torch.randn(3, 4, 4), torch.randn(3, 4, 4)), 0) for _ in range(12)], 4)
    loss = NTXentLoss()
    module = Trained(net, lambda m, b: loss(m(b[0][0]), m(b[0][1])))
    return Case(module, views, lambda m, b, noise: m(noise(b[0][0])), {"inputs": lambda batch: batch[0][0]})


def torch_uncertainty_routine() -> Case:
    from torch_uncertainty.routines import ClassificationRoutine

    net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    optim = torch.optim.SGD(net.parameters(), lr=1e-3)
    routine = ClassificationRoutine(net, num_classes=3, loss=nn.CrossEntropyLoss(), optim_recipe=optim)
    return Case(routine, labelled((5,)), first)


def pytorch_forecasting_tft() -> Case:
    import pandas
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    steps = torch.arange(40) % 20
    frame = {"time": steps.numpy(), "group": (torch.arange(40) // 20).numpy().astype(str), "y": torch.rand(40).numpy()}
    columns = {"time_idx": "time", "target": "y", "group_ids": ["group"], "time_varying_unknown_reals": ["y"]}
    data = TimeSeriesDataSet(pandas.DataFrame(frame), max_encoder_length=6, max_prediction_length=2, **columns)
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=4, attention_head_size=1, log_interval=-1)

    def call(m: Any, b: Any, noise: Noise) -> Tensor:
        x = {key: noise(value) if value.is_floating_point() else value for key, value in b[0].items()}
        return m(x)["prediction"]

    return Case(module, data.to_dataloader(train=False, batch_size=8), call, {"outputs": lambda y: y["prediction"]})


CASES = {
    name: each for name, each in list(globals().items()) if getattr(each, "__annotations__", {}) == {"return": "Case"}
}


@torch.no_grad()
def plain_loop(case: Case) -> float:
    """S by its definition, or the mean square."""
    changes = []
    case.module.eval()
    for index, batch in enumerate(case.loader):
        generator = noise_generator(0, batch_idx=index)
        noisy = case.call(case.module, batch, lambda x: x + 0.1 * torch.randn(x.shape, generator=generator))  # noqa: B023
        change = noisy.double() - case.call(case.module, batch, lambda x: x).double()
        changes.append(change.square().mean(1) if "per_output" in case.s_options else change.mean(1).flatten())
    return float(torch.cat(changes).mean() if "per_output" in case.s_options else torch.cat(changes).var(correction=0))


def run(name: str, with_monitors: bool = True) -> tuple[Case, Trainer, list[str]]:
    seed_everything(0, verbose=False)
    case = CASES[name]()
    monitors = [SensitivityMonitor(num_samples=None, **case.both, **case.s_options), RiskMonitor(**case.both)]
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    callbacks = monitors if with_monitors else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(max_epochs=2, callbacks=callbacks, accelerator="cpu", enable_model_summary=False, **off)
        trainer.fit(case.module, case.loader, case.loader)
    return case, trainer, [text for warning in caught if "Monitor`" in (text := str(warning.message))]


def main(names: list[str]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in names or CASES:
        package = next(package for package in PACKAGES if name.startswith(package))
        try:
            case, trainer, messages = run(name)
        except ImportError as error:
            print(f"{name}: skipped, {error}")
            continue
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        bare = run(name, with_monitors=False)[0].module
        same = all(torch.equal(a, b) for a, b in zip(case.module.parameters(), bare.parameters(), strict=True))
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        value, expected = values.get("val/output_sensitivity", float("nan")), plain_loop(case)
        verdict = "right" if abs(value - expected) <= 1e-4 * expected else "WRONG"
        print(
            f"{name} ({version(package)}): S {value:.6g}, plain loop {expected:.6g}: {verdict}; training"
            f" {'the same' if same else 'CHANGED'}; risk {values.get('val/risk_estimate', 'none')}"
        )
        for text in messages:
            print(f"    {text}")


PACKAGES = [
    "lightning",
    "torchvision",
    "transformers",
    "torch_geometric",
    "segmentation_models_pytorch",
    "monai",
    "lightly",
    "torch_uncertainty",
    "pytorch_forecasting",
]

if __name__ == "__main__":
    main(sys.argv[1:])
