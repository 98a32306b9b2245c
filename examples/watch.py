"""Watch output sensitivity, by the callback and by the metric, while a network memorizes noisy labels.

    python examples/watch.py  # a quarter of a minute

Images of digits come with scikit-learn; a fifth of the labels is drawn anew. Validation labels only show the gap
between losses of validation and training, which sensitivity follows without them.
"""

import argparse
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import OutputSensitivity, SensitivityMonitor

parser = argparse.ArgumentParser(description="Watch output sensitivity beside the gap between losses.")
parser.add_argument("--max-epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)

images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(images))  # they lie in the order of their writers
x, y = torch.tensor(images)[order].float() / 16, torch.tensor(digits)[order]
y[::5] = torch.randint(10, y[::5].shape)
train_set, val_set = TensorDataset(x[:500], y[:500]), TensorDataset(x[500:1100], y[500:1100])


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.sensitivity = OutputSensitivity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val/loss", cross_entropy(logits, y))  # only to compare
        generator = torch.Generator(x.device).manual_seed(batch_idx)  # the same noise in each epoch
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        self.sensitivity.update(logits, self(x + 0.1 * noise))
        self.log("val/by_the_metric", self.sensitivity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Table(Callback):
    """Prints a row for each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        gap = found["val/loss"] - found["train/loss_epoch"]
        rows.append([gap, found["val/output_sensitivity"], found["val/by_the_metric"]])
        print(f"{trainer.current_epoch:5d}  {gap:7.3f}  {rows[-1][1]:22.3g}  {rows[-1][2]:17.3g}")


rows: list[list[float]] = []
print("epoch  the gap  val/output_sensitivity  val/by_the_metric")
trainer = Trainer(
    max_epochs=args.max_epochs,
    accelerator="cpu",
    callbacks=[SensitivityMonitor(), Table()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=100))
gap, sensitivity, _ = torch.tensor(rows).T
correlation = torch.corrcoef(torch.stack([gap, sensitivity]))[0, 1]
print(f"\nOver epochs, the correlation of the gap and sensitivity is {correlation:.2f}.")
