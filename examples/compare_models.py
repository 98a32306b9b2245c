# %% [markdown]
# # Compare models without labels
#
# Six networks learn 300 real images (scikit-learn's digits), or do not: one is left untrained. `compare_models` puts
# them side by side on other images. It needs no labels there; ours show how well the scores did.
#
#     python examples/compare_models.py

# %%
import argparse
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import compare_models

parser = argparse.ArgumentParser(description="Compare small networks on scikit-learn's digits.")
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--out", type=Path, default=Path("runs/compare_models"))
args = parser.parse_args()

warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval).*")
torch.set_num_threads(1)  # the networks are small: a second thread would only wait for the first

# %%
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # 1,797 images, 1 × 8 × 8, in [0, 1]
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, val = (TensorDataset(images[part], labels[part]) for part in (order[:300], order[300:]))


# %%
def fully_connected(width: int, depth: int, dropout: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers += [nn.Linear(width if index else 64, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutional() -> nn.Module:
    features = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


NETWORKS = {
    "narrow": partial(fully_connected, 16, 1),
    "wide": partial(fully_connected, 1024, 1),
    "deep": partial(fully_connected, 64, 6),
    "dropout": partial(fully_connected, 256, 2, dropout=0.5),
    "convolutional": convolutional,
    "untrained": convolutional,
}


class Classifier(LightningModule):
    def __init__(self, network: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = NETWORKS[network]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


# %%
checkpoints = {}
for name in NETWORKS:
    seed_everything(0, verbose=False)
    model = Classifier(name)
    trainer = Trainer(
        max_epochs=0 if name == "untrained" else args.max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
    checkpoints[name] = args.out / f"{name}.ckpt"
    trainer.save_checkpoint(checkpoints[name])

# %%
models = {name: partial(Classifier.load_from_checkpoint, path) for name, path in checkpoints.items()}
result = compare_models(models, DataLoader(val, batch_size=500))
print(result)
table = pd.DataFrame(result).set_index("name")
images, labels = val[:]
with torch.no_grad():
    logits = {name: load().cpu().eval()(images) for name, load in models.items()}
table["true loss"] = {name: float(cross_entropy(each, labels)) for name, each in logits.items()}
table["true error"] = {name: float((each.argmax(1) != labels).float().mean()) for name, each in logits.items()}
table.to_csv(args.out / "comparison.csv")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for axis, score, truth in zip(axes, ("consensus_error", "sensitivity"), ("true error", "true loss"), strict=True):
    for name, row in table.iterrows():
        axis.plot(row[score], row[truth], "o", label=name)
    axis.set(xlabel=f"{score} (without labels)", ylabel=truth)
axes[1].set_xscale("log")
axes[0].legend(fontsize="small")
figure.savefig(args.out / "compare_models.png", dpi=100)
print(f"\nFigure: {args.out / 'compare_models.png'}\nTable with all digits: {args.out / 'comparison.csv'}")
