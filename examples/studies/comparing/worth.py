# %% [markdown]
# # How many labels is a comparison without labels worth?
#
# The same 24 networks learn 5,000 images of CIFAR-10 and 1,000 of Fashion-MNIST, one seed each. `compare_models` sees
# 2,000 test images without labels, the other 8,000 say what the true loss and error are. Kendall's τ between each score
# and the truth stands beside that of a ranking by n labelled images of those 2,000, the mean of 200 draws of them. A
# score is worth the n at which labels reach its τ. `consensus_loss` and `num_parameters` were columns of version 0.1.0
# of the package, and are computed here.
#
#     python examples/studies/comparing/worth.py --data FOLDER  # 35 minutes on one core
#     python examples/studies/comparing/worth.py --data FOLDER --only fashion
#     python examples/studies/comparing/worth.py --quick        # six networks learn little of scikit-learn's digits
#
# `FOLDER` holds `cifar10.npz` and `fashion.npz` with `x_train, y_train, x_test, y_test` (images uint8, N × C × H × W).
# What was trained and measured is kept in `--out`, and is not done again.

# %%
import argparse
import csv
import logging
import warnings
import zlib
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import compare_models

NUM_POOL, NUM_DRAWS, NUM_RESAMPLES = 2000, 200, 1000
SIZES = np.array([10, 20, 50, 100, 200, 500, 1000])
TITLES = {"cifar10": "CIFAR-10", "fashion": "Fashion-MNIST", "digits": "digits", "both": "mean of both"}
# What is higher is to have the higher loss and error: fixed before the first look.
SCORES = ("consensus_error", "consensus_loss", "sensitivity", "num_parameters")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


# %% What somebody could try on such images; fixed before the first look
class Spec(NamedTuple):
    convs: tuple[int, ...] = ()  # channels of 3 × 3 convolutions; each halves the image
    dense: tuple[int, ...] = ()
    halving: str = "max"  # by max-pooling, or by "strides"
    average: bool = False  # over what is left of the image, before the logits
    batch_norm: bool = False
    dropout: float = 0.0
    weight_decay: float = 0.0
    augment: bool = False  # shifts by up to four pixels, and reflections
    epochs: int = 30


MLP, CNN = Spec(dense=(512, 512)), Spec(convs=(16, 32, 64))
CHANGES: dict[str, dict[str, Any]] = {
    "batch-norm": {"batch_norm": True},
    "dropout": {"dropout": 0.3},
    "weight-decay": {"weight_decay": 0.5},
    "augmented": {"augment": True},
    "short": {"epochs": 5},
    "long": {"epochs": 90},
}
NETWORKS = {
    "linear": Spec(),
    "mlp": MLP,
    "mlp-128": Spec(dense=(128,)),
    "mlp-1024": Spec(dense=(1024,)),
    "mlp-deep": Spec(dense=(256,) * 4),
    **{f"mlp-{name}": MLP._replace(**change) for name, change in CHANGES.items()},
    "cnn": CNN,
    "cnn-small": Spec(convs=(8, 16, 32)),
    "cnn-wide": Spec(convs=(32, 64)),
    "cnn-dense": CNN._replace(dense=(128,)),
    "cnn-strides": CNN._replace(halving="strides"),
    "cnn-average": CNN._replace(average=True),
    **{f"cnn-{name}": CNN._replace(**change) for name, change in CHANGES.items()},
    "cnn-everything": CNN._replace(batch_norm=True, dropout=0.3, weight_decay=0.5, augment=True, epochs=60),
}


class Network(LightningModule):
    def __init__(self, name: str, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.spec = spec = NETWORKS[name]
        layers: list[nn.Module] = []
        channels = shape[0]
        for width in spec.convs:
            strided = spec.halving == "strides"
            layers += [nn.Conv2d(channels, width, 3, 2 if strided else 1, padding=1)]
            if spec.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            if not strided:
                layers.append(nn.MaxPool2d(2))
            if spec.dropout:
                layers.append(nn.Dropout(spec.dropout))
            channels = width
        if spec.average:
            layers.append(nn.AdaptiveAvgPool2d(1))
        layers.append(nn.Flatten())
        fan_in = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
        for width in spec.dense:
            layers.append(nn.Linear(fan_in, width))
            if spec.batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.ReLU())
            if spec.dropout:
                layers.append(nn.Dropout(spec.dropout))
            fan_in = width
        self.net = nn.Sequential(*layers, nn.Linear(fan_in, 10)).train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(augmented(x) if self.spec.augment else x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=self.spec.weight_decay)


def augmented(x: Tensor) -> Tensor:
    padded, size = pad(x, (4, 4, 4, 4)), x.shape[-1]
    moves = torch.randint(0, 9, (len(x), 2)).tolist()
    x = torch.stack([image[:, i : i + size, j : j + size] for image, (i, j) in zip(padded, moves, strict=True)])
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


# %% Training and measuring
def load(name: str, folder: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """What is learned, and the test images: those of the comparison first."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = digits.images[:, None] / 16 * 255, digits.target
        arrays = {"x_train": x[:400], "y_train": y[:400], "x_test": x[400:], "y_test": y[400:]}
    elif folder is None:
        raise SystemExit("Say with --data where the images are, or --quick to use embedded ones.")
    else:
        arrays = dict(np.load(folder / f"{name}.npz"))
    size = {"cifar10": 5000, "fashion": 1000, "digits": 300}[name]
    chosen = np.random.default_rng(0).permutation(len(arrays["x_train"]))[:size]
    pairs = (arrays["x_train"][chosen], arrays["y_train"][chosen]), (arrays["x_test"], arrays["y_test"])
    train, test = (TensorDataset(torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y).long()) for x, y in pairs)
    return train, test


def trained(name: str, data: TensorDataset, file: Path, quick: bool) -> Path:
    if not file.exists():
        seed_everything(0, verbose=False)
        model = Network(name, tuple(data[0][0].shape))
        trainer = Trainer(max_epochs=min(model.spec.epochs, 15 if quick else 90), accelerator="cpu", **QUIET)
        trainer.fit(model, DataLoader(data, batch_size=50, shuffle=True))
        trainer.save_checkpoint(file.with_suffix(".part"), weights_only=True)
        file.with_suffix(".part").rename(file)  # what was cut off leaves no checkpoint
    print(f"trained: {file}", flush=True)
    return file


@torch.no_grad()
def predicted(file: Path, test: TensorDataset) -> np.ndarray:
    """Log-probabilities of the classes of each test image."""
    network = Network.load_from_checkpoint(file, map_location="cpu").eval()
    return torch.cat([network(x).log_softmax(1) for x, _ in DataLoader(test, batch_size=500)]).numpy()


def graded(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Loss and error of each test image, (networks, 2, images)."""
    losses = -log_p[:, np.arange(len(labels)), labels]
    return np.stack([losses, log_p.argmax(2) != labels], 1)


def consensus_losses(log_p: np.ndarray, has_vote: np.ndarray) -> np.ndarray:
    """The loss of each network if labels were what the other networks predict."""
    votes = np.eye(log_p.shape[2])[log_p.argmax(2)] * has_vote[:, None, None]
    others = (votes.sum(0) - votes) / (has_vote.sum() - has_vote)[:, None, None]
    return -(others * log_p).sum(2).mean(1)


def num_parameters(file: Path) -> int:
    network = Network.load_from_checkpoint(file, map_location="cpu")
    return sum(parameter.numel() for parameter in network.parameters())


def measured(data: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """The scores of each network; loss and error of each image that the comparison saw, and of the others."""
    folder = args.out / data
    folder.mkdir(parents=True, exist_ok=True)
    train, test = load(data, args.data)
    size = min(NUM_POOL, 3 * len(test) // 4)
    names = list(NETWORKS)[::4] if args.quick else list(NETWORKS)
    files = {name: trained(name, train, folder / f"{name}.ckpt", args.quick) for name in names}
    if not (table := folder / "comparison.csv").exists():
        pool = DataLoader(TensorDataset(test.tensors[0][:size]), batch_size=500)  # without labels
        models = {name: partial(Network.load_from_checkpoint, file) for name, file in files.items()}
        rows = [scores._asdict() for scores in compare_models(models, pool)]
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if not (predictions := folder / "log_probabilities.npy").exists():
        np.save(predictions, np.stack([predicted(file, test) for file in files.values()]))
    log_p = np.load(predictions)
    with table.open() as file:
        by_name = {row["name"]: row for row in csv.DictReader(file)}
    rows = [by_name[name] for name in names]
    has_vote = np.array([not row["note"] for row in rows])  # undecided networks have none
    losses = consensus_losses(log_p[:, :size], has_vote)
    for row, loss, file in zip(rows, losses, files.values(), strict=True):
        row |= {"consensus_loss": loss, "num_parameters": num_parameters(file)}
    return rows, *np.split(graded(log_p, test.tensors[1].numpy()), [size], axis=2)


# %% What the scores are worth
def taus(scores: np.ndarray, truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Kendall's τ-b of scores (..., networks) with the truth, for each draw of networks; 0 if all are tied."""
    a, b = (np.sign(values[..., :, None] - values[..., None, :]) for values in (scores, truth))
    pairs = (a * b, a * a, b * b)
    agreed, in_a, in_b = (np.einsum("ri,...ij,rj->...r", draws, each, draws, optimize=True) for each in pairs)
    return agreed / np.sqrt(np.maximum(in_a * in_b, 1e-9))


def ranked(data: str, args: argparse.Namespace) -> dict[str, dict[str, np.ndarray]]:
    """For each truth the τ of each score and of n labels, for all networks and for each resample of them."""
    rows, seen, unseen = measured(data, args)
    rng = np.random.default_rng(zlib.crc32(data.encode()))
    draws = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), NUM_RESAMPLES)
    draws = np.vstack([np.ones_like(draws[:1]), draws]).astype(float)
    labelled = {n: [rng.choice(seen.shape[2], n, replace=False) for _ in range(NUM_DRAWS)] for n in SIZES}
    scores = np.array([[float(row[name]) for row in rows] for name in SCORES])
    truths, found = unseen.mean(2, dtype=float), {}
    print(f"\n| {TITLES[data]} | loss | error |\n|---|---|---|")
    for index in truths[:, 0].argsort():
        print(f"| {rows[index]['name']} | {truths[index, 0]:.3g} | {truths[index, 1]:.3f} |")
    print(f"\nτ of loss and error: {taus(*truths.T, draws[:1])[0]:.2f}")
    for truth, values, grades in zip(("loss", "error"), truths.T, seen.swapaxes(0, 1), strict=True):
        found[truth] = dict(zip(SCORES, taus(scores, values, draws), strict=True))
        for n, picks in labelled.items():
            means = np.stack([grades[:, pick].mean(1, dtype=float) for pick in picks])
            found[truth][f"{n} labels"] = taus(means, values, draws).mean(0)
    return found


def worth(tau: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The n at which labels reach τ, interpolated in its logarithm; 10 and 1,000 stand for less and more."""
    curves = np.maximum.accumulate(labels).T
    return np.exp([np.interp(t, curve, np.log(SIZES)) for t, curve in zip(tau, curves, strict=True)])


def interval(values: np.ndarray) -> list[float]:
    """Of all networks, and the ends of the 95 % bootstrap interval over networks."""
    return [values[0], *np.quantile(values[1:], (0.025, 0.975))]


def in_words(sizes: list[float]) -> str:
    value, *ends = ["under 10" if n < 10.01 else "over 1,000" if n > 999 else f"{n:.0f}" for n in sizes] or [""]
    return value if set(ends) <= {value} else f"{value} ({ends[0]} to {ends[1]})"


def report(found: dict[str, dict[str, dict[str, np.ndarray]]]) -> tuple[list[str], list[list[str]]]:
    """The table of the page, with the worth by the mean τ of all data sets, and the lines of the CSV file."""
    columns, last = list(product(found, ("loss", "error"))), list(found)[-1]
    titles = ["ranked by", *(f"{TITLES[data]}, {truth}" for data, truth in columns if data != "both")]
    titles += ["worth in labels, loss", "worth in labels, error"]
    lines, rows = [titles, ["---"] * len(titles)], []
    for name in [*SCORES, *(f"{n} labels" for n in SIZES)]:
        cells, worths = [name], []
        for data, truth in columns:
            every = found[data][truth]
            tau, size = interval(every[name]), []
            if data != "both":
                cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*tau))
            if name in SCORES:
                size = interval(worth(every[name], np.stack([every[f"{n} labels"] for n in SIZES])))
            if data == last:
                worths.append(in_words(size))
            rows.append([data, truth, name, *(f"{value:.4g}" for value in (*tau, *size))])
        lines.append([*cells, *worths])
    return ["| " + " | ".join(cells).replace("-0.", "−0.") + " |" for cells in lines], rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What compare_models is worth in labels.")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and fashion.npz; --quick needs none")
    parser.add_argument("--quick", action="store_true", help="six networks, little training: does it run")
    parser.add_argument("--only", choices=["cifar10", "fashion"], help="one of the data sets")
    parser.add_argument("--out", type=Path, help="folder of what is measured [runs/worth or runs/worth_quick]")
    args = parser.parse_args()
    args.out = args.out or Path("runs/worth_quick" if args.quick else "runs/worth")
    warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval|LeafSpec).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = [args.only] if args.only else ["cifar10", "fashion"]
    if args.quick:
        names = ["digits"]
    found = {data: ranked(data, args) for data in names}
    if len(found) > 1:  # with the networks drawn for each data set by itself
        pairs = {truth: [of_data[truth] for of_data in found.values()] for truth in ("loss", "error")}
        found["both"] = {truth: {name: (a[name] + b[name]) / 2 for name in a} for truth, (a, b) in pairs.items()}
    lines, rows = report(found)
    print("", *lines, sep="\n")
    file = (args.out if args.quick else Path(__file__).parent) / "worth.csv"
    with file.open("w", newline="") as handle:
        header = ["data", "truth", "ranked_by", "tau", "tau_low", "tau_high", "worth", "worth_low", "worth_high"]
        csv.writer(handle, lineterminator="\n").writerows([header, *rows])
    print(f"\nAs numbers: {file}")
