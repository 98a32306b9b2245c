# %% [markdown]
# # The risk estimate beyond image classification
#
# Small tables that scikit-learn brings along, with a regression or a binary task, and a fully connected network that
# can memorize them: what does early stopping on `val_risk_estimate` cost there? (The study of image classifiers is
# `early_stopping_study.py`.)
#
#     python examples/early_stopping_tabular.py

# %%
import argparse
import logging
import warnings

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_breast_cancer, load_diabetes, make_friedman1
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor

parser = argparse.ArgumentParser(description="Early stopping on the risk estimate in regression and binary tasks.")
parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
parser.add_argument("--max-epochs", type=int, default=60)
args = parser.parse_args()

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging|was lowest at).*")
torch.set_num_threads(1)
TABLES = {
    "diabetes (regression)": lambda seed: load_diabetes(return_X_y=True),
    "Friedman #1 (regression)": lambda seed: make_friedman1(1000, noise=1.0, random_state=seed),
    "breast cancer (binary)": lambda seed: load_breast_cancer(return_X_y=True),
}
NUM_TRAIN, NUM_HOLDOUT = 150, 100


# %%
class Network(LightningModule):
    def __init__(self, num_features: int, binary: bool) -> None:
        super().__init__()
        widths = [nn.Linear(num_features, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)]
        self.net = nn.Sequential(*widths)
        self.binary = binary

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (binary_cross_entropy_with_logits if self.binary else mse_loss)(outputs, targets.float())

    def risk(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs.sigmoid() if self.binary else outputs) - targets).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass  # no labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Recorder(Callback):
    """The estimate, the true risk and the test loss of each epoch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.rows: list[tuple[float, float, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Network) -> None:
        pl_module.eval()
        with torch.no_grad():
            outputs = pl_module(self.x)
        pl_module.train()
        estimate = trainer.callback_metrics["val_risk_estimate"]
        self.rows.append((*map(float, (estimate, pl_module.risk(outputs, self.y), pl_module.loss(outputs, self.y))),))


# %%
print(f"{len(args.seeds)} runs each; regret of the test loss in %, median (worst)\n")
print("                           stop at the minimum   never stop       estimate / true risk: median (range)")
for name, table in TABLES.items():
    regrets, ratios = [], []
    for seed in args.seeds:
        seed_everything(seed, verbose=False)
        x, y = table(seed)
        order = np.random.default_rng(seed).permutation(len(x))
        x, y = x[order], y[order]
        x = (x - x[:NUM_TRAIN].mean(0)) / x[:NUM_TRAIN].std(0)
        binary = y.dtype.kind == "i"
        y = y if binary else (y - y[:NUM_TRAIN].mean()) / y[:NUM_TRAIN].std()
        inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y if binary else y.astype(np.float32))
        end = NUM_TRAIN + NUM_HOLDOUT
        recorder = Recorder(inputs[end:], targets[end:])
        trainer = Trainer(
            max_epochs=args.max_epochs,
            accelerator="cpu",
            callbacks=[SensitivityMonitor(task="binary" if binary else "regression"), recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train = DataLoader(TensorDataset(inputs[:NUM_TRAIN], targets[:NUM_TRAIN]), 32, shuffle=True)
        trainer.fit(Network(x.shape[1], binary), train, DataLoader(inputs[NUM_TRAIN:end], NUM_HOLDOUT))
        estimate, risk, loss = np.array(recorder.rows).T
        chosen = int(np.argmin(estimate))
        regrets.append([100 * (loss[epoch] / loss.min() - 1) for epoch in (chosen, -1)])
        ratios.append(estimate[chosen] / risk[chosen])
    (stop, never), (worst, never_worst) = np.median(regrets, 0), np.max(regrets, 0)
    sizes = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:25s}  {stop:6.1f} ({worst:6.1f})      {never:6.1f} ({never_worst:6.1f})      {sizes}")
