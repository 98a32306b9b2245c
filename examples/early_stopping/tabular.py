"""The risk estimate in regression and binary tasks: small tables, and networks that can memorize them.

python examples/early_stopping/tabular.py  # a few minutes; --quick: one short run a table
"""

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

from lightning_sensitivity import RiskMonitor

parser = argparse.ArgumentParser(description="Early stopping on the risk estimate in regression and binary tasks.")
parser.add_argument("--seeds", type=int, nargs="+", default=list(range(300, 308)))
parser.add_argument("--max-epochs", type=int, default=60)
parser.add_argument("--quick", action="store_true", help="one run a table, three epochs")
args = parser.parse_args()
if args.quick:
    args.seeds, args.max_epochs = args.seeds[:1], 3

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging|lowest estimate).*")
torch.set_num_threads(1)
TABLES = {
    "diabetes (regression)": lambda seed: load_diabetes(return_X_y=True),
    "Friedman #1 (regression)": lambda seed: make_friedman1(1000, noise=1.0, random_state=seed),
    "breast cancer (binary)": lambda seed: load_breast_cancer(return_X_y=True),
    "breast cancer, 20 % of labels wrong": lambda seed: load_breast_cancer(return_X_y=True),
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

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass  # no labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Recorder(Callback):
    """The estimate and the test loss of each epoch, and losses on disjoint sets of 20 labelled samples."""

    def __init__(self, holdout: list[Tensor], test: list[Tensor]) -> None:
        self.holdout, self.test = holdout, test
        self.rows: list[list[float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Network) -> None:
        pl_module.eval()
        with torch.no_grad():
            loss = pl_module.loss(pl_module(self.test[0]), self.test[1])
            x, y = (v.split(20) for v in self.holdout)
            labelled = [pl_module.loss(pl_module(a), b) for a, b in zip(x, y, strict=True)]
        pl_module.train()
        self.rows.append([*map(float, (trainer.callback_metrics["val_risk_estimate"], loss, *labelled))])


# %%
print(f"{len(args.seeds)} runs each; regret of the test loss in %: median / mean / worst\n")
print("| table | minimum of the estimate | never stop | 20 labels |\n|---|---|---|---|")
for name, table in TABLES.items():
    regrets: list[tuple[float, float, float]] = []
    for seed in args.seeds:
        seed_everything(seed, verbose=False)
        x, y = table(seed)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(x))
        x, y = x[order], y[order]
        x = (x - x[:NUM_TRAIN].mean(0)) / x[:NUM_TRAIN].std(0)
        binary = y.dtype.kind == "i"
        y = y.astype(np.int64) if binary else (y - y[:NUM_TRAIN].mean()) / y[:NUM_TRAIN].std()
        if "wrong" in name:
            y[:NUM_TRAIN] ^= rng.random(NUM_TRAIN) < 0.2
        inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y if binary else y.astype(np.float32))
        end = NUM_TRAIN + NUM_HOLDOUT
        holdout = [v[NUM_TRAIN:end] for v in (inputs, targets)]
        recorder = Recorder(holdout, [v[end:] for v in (inputs, targets)])
        trainer = Trainer(
            max_epochs=args.max_epochs,
            accelerator="cpu",
            callbacks=[RiskMonitor(task="binary" if binary else "regression"), recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train = DataLoader(TensorDataset(inputs[:NUM_TRAIN], targets[:NUM_TRAIN]), 32, shuffle=True)
        trainer.fit(Network(x.shape[1], binary), train, DataLoader(holdout[0], NUM_HOLDOUT))
        estimate, loss, *labelled = np.array(recorder.rows).T
        regret = 100 * (loss / loss.min() - 1)
        by_labels = np.mean([regret[np.argmin(values)] for values in labelled])
        regrets.append((regret[np.argmin(estimate)], regret[-1], float(by_labels)))
    cells = [f"{np.median(v):.1f} / {np.mean(v):.1f} / {np.max(v):.1f}" for v in np.transpose(regrets)]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
