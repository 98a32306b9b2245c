# %% [markdown]
# # Tune without labels
#
# Which of eight settings is best, if 30 % of the training labels are wrong, and there are no others? Each run keeps
# its checkpoint of the highest expected accuracy. `compare_models` then ranks the runs by the accuracy to expect on 600
# unlabelled images, by a reference, a small model of the training labels. Correct labels of other images show how well
# that did.
#
#     python examples/tuning.py          # a minute

# %%
import argparse
import warnings
from itertools import product
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor, compare_models

parser = argparse.ArgumentParser(description="Choose among eight settings on scikit-learn's digits.")
parser.add_argument("--max-epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
args = parser.parse_args()

warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval|Checkpoint directory|LeafSpec).*")
torch.set_num_threads(1)  # the networks are small: a second thread would only wait

# %% [markdown]
# The data: 400 images to train on, 600 without labels, and 797 that show the true error.

# %%
seed_everything(0, verbose=False)
digits = load_digits()
order = torch.randperm(len(digits.target))
x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]  # 1,797 images, 1 × 8 × 8
y = torch.tensor(digits.target)[order]
is_wrong = torch.rand(400) < 0.3
y_train = torch.where(is_wrong, y[:400] + torch.randint(1, 10, (400,)), y[:400]) % 10
train_loader = DataLoader(TensorDataset(x[:400], y_train), batch_size=50, shuffle=True)
unlabelled_loader = DataLoader(x[400:1000], batch_size=100)
x_test, y_test = x[1000:], y[1000:]


# %%
class Digits(LightningModule):
    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


# %% [markdown]
# Eight runs: two learning rates, two widths, with and without dropout. A tool that tunes, such as Optuna, can maximize
# `risk.summary["expected_accuracy"]`, that of the chosen epoch, which is what `compare_models` ranks by.

# %%
paths = {}
for lr, width, dropout in product([3e-4, 3e-3], [16, 512], [0.0, 0.5]):
    name = f"lr {lr:g}, width {width}, dropout {dropout:g}"
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(args.out / name, monitor="val/expected_accuracy", mode="max")
    trainer = Trainer(
        max_epochs=args.max_epochs,
        accelerator="cpu",
        callbacks=[RiskMonitor(), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(lr, width, dropout), train_loader, unlabelled_loader)
    paths[name] = checkpoint.best_model_path

# %% [markdown]
# Two lines rank them. All that `may_be_best` are as good as the samples can tell.

# %%
models = {name: Digits.load_from_checkpoint(path) for name, path in paths.items()}
result = compare_models(models, unlabelled_loader, training=train_loader)
print(result)

# %% [markdown]
# How well did that do? The mean of all models' probabilities is a model, too, often a better one than the best of them.


# %%
@torch.no_grad()
def probabilities(name: str) -> Tensor:
    model = models[name].eval()
    p: Tensor = model(x_test).softmax(1)
    return p


def error(p: Tensor) -> float:
    return float((p.argmax(1) != y_test).float().mean())


p = {model.name: probabilities(model.name) for model in result}
errors = {name: error(each) for name, each in p.items()}
chosen, best = result[0].name, min(errors, key=errors.__getitem__)
mean = sum(errors.values()) / len(errors)
error_of_mean = error(torch.stack(list(p.values())).mean(0))
print(f"\nChosen: {chosen}, true error {errors[chosen]:.1%}. The best is {best}: {errors[best]:.1%}.")
print(f"One of the eight at random: {mean:.1%}. The mean of all eight predictions: {error_of_mean:.1%}.")
