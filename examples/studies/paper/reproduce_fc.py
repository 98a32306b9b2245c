# %% [markdown]
# # The authors' published example
#
# A fully connected network (4 hidden layers of 300 units, weights and biases ~ N(0, 1)) is trained on 1,000 CIFAR-10
# images until it has memorized them (batch 128, Adam 1e-3, until the mean batch loss stays below 1e-5 for 10 epochs,
# 2,000 epochs at most). The authors report over 10 runs S = 6.08e8 ± 1.40e8, a test cross-entropy of 92,611 ± 4,439
# and an accuracy of 27.5 ± 0.9 % (https://github.com/mahf93/sensitivity).
#
#     python examples/studies/paper/reproduce_fc.py --data cifar10.npz
#
# With `--init default` the same network starts from PyTorch's own initialization: Equation 9 is then far too low.
#
# Each seed adds one row to a CSV file, and seeds that it has already are skipped, so a run that was cut off goes on
# where it stopped. Two seeds at a time on two cores:
#
#     seq 0 9 | xargs -P2 -I{} python examples/studies/paper/reproduce_fc.py --data cifar10.npz --seeds {}

# %%
import argparse
import csv
import logging
import time
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.functional import loss_estimate

parser = argparse.ArgumentParser(description="Reproduce the fully connected example of the paper.")
parser.add_argument(
    "--data",
    type=Path,
    required=True,
    help="an .npz file with x_train, y_train, x_test, y_test (uint8 images N×3×32×32), or a folder in which torchvision"
    " keeps CIFAR-10 or downloads it to",
)
parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
parser.add_argument("--init", choices=["normal", "default"], default="normal", help="N(0, 1), or PyTorch's default")
parser.add_argument("--max-epochs", type=int, default=2000)
parser.add_argument("--out", type=Path, help="CSV file of the results [runs/reproduce_paper_fc_INIT.csv]")
args = parser.parse_args()
args.out = args.out or Path(f"runs/reproduce_paper_fc_{args.init}.csv")

PUBLISHED = {"sensitivity": (6.08e8, 1.40e8), "loss": (92_611, 4_439), "accuracy": (0.275, 0.009)}
COLUMNS = ["seed", "epochs", "seconds", "sensitivity", "stderr", "loss_estimate", "loss", "accuracy"]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|LeafSpec).*")
torch.set_num_threads(1)


# %%
def load(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return dict(np.load(path))
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(path, train=train, download=True) for train in (True, False))
    return {
        "x_train": train.data.transpose(0, 3, 1, 2),
        "y_train": np.array(train.targets),
        "x_test": test.data.transpose(0, 3, 1, 2),
        "y_test": np.array(test.targets),
    }


arrays = load(args.data)
subset = np.random.default_rng(0).permutation(len(arrays["x_train"]))[:1000]  # the same for all runs, as the authors do
x_train, x_test = (torch.tensor(x / 255, dtype=torch.float32) for x in (arrays["x_train"][subset], arrays["x_test"]))
train_set = TensorDataset(x_train, torch.tensor(arrays["y_train"][subset]).long())
test_set = TensorDataset(x_test, torch.tensor(arrays["y_test"]).long())


# %%
class FullyConnected(LightningModule):
    def __init__(self, width: int = 300, depth: int = 4) -> None:
        super().__init__()
        widths = [3 * 32 * 32, *[width] * depth]
        hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
        if args.init == "normal":
            for parameter in self.net.parameters():
                nn.init.normal_(parameter)
        self.losses: list[Tensor] = []
        self.epochs_below = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        mean_loss = torch.stack(self.losses).mean()
        self.losses.clear()
        self.epochs_below += int(mean_loss < 1e-5)
        self.trainer.should_stop = self.epochs_below >= 10
        if self.current_epoch % 100 == 0:
            print(f"  epoch {self.current_epoch:4d}: training loss {mean_loss:.4g}", flush=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("loss", cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


# %%
def rows() -> list[dict[str, float]]:
    if not args.out.exists():
        return []
    with args.out.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


args.out.parent.mkdir(parents=True, exist_ok=True)
if not args.out.exists():
    args.out.write_text(",".join(COLUMNS) + "\n")
for seed in args.seeds:
    if seed in [row["seed"] for row in rows()]:
        print(f"seed {seed}: already in {args.out}")
        continue
    print(f"seed {seed}", flush=True)
    start = time.perf_counter()
    seed_everything(seed, verbose=False)
    model = FullyConnected()
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=args.max_epochs, enable_checkpointing=False, limit_val_batches=0, **quiet)
    trainer.fit(model, DataLoader(train_set, batch_size=128, shuffle=True))
    epochs = trainer.current_epoch
    evaluator = Trainer(callbacks=[SensitivityMonitor(noise=0.1, num_samples=None, seed=seed, prefix="")], **quiet)
    (values,) = evaluator.validate(model, DataLoader(test_set, batch_size=500), verbose=False)
    row = {"seed": seed, "epochs": epochs, "seconds": round(time.perf_counter() - start, 1), **values}
    row["loss_estimate"] = float(loss_estimate(row["sensitivity"], x_test.square().mean(), 0.1, num_outputs=10))
    row["stderr"] = row.pop("sensitivity_stderr")
    with args.out.open("a") as file:
        file.write(",".join(f"{row[column]:.6g}" for column in COLUMNS) + "\n")

# %%
done = rows()
print(f"\n{len(done)} runs in {args.out}, mean ± standard deviation over runs:")
for name in ("sensitivity", "loss", "loss_estimate", "accuracy"):
    values = np.array([row[name] for row in done])
    published = "published {:.4g} ± {:.2g}".format(*PUBLISHED[name]) if name in PUBLISHED else "Equation 9"
    print(f"  {name:13s} {values.mean():10.4g} ± {values.std():8.2g}   {published if args.init == 'normal' else ''}")
ratio = np.mean([row["loss_estimate"] for row in done]) / np.mean([row["loss"] for row in done])
print(f"  mean loss estimate / mean test loss: {ratio:.2f}")
