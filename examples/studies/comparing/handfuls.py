# %% [markdown]
# # Which vote ranks a handful of models best?
#
# Each seed draws a pool of 12 or 24 unequal models: linear, fully connected or convolutional, narrow or wide, shallow
# or deep, with batch norm, dropout, augmentation, label smoothing or weight decay, of short or long training. They
# learn the same 150 to 2,000 images, with correct or noisy labels. Handfuls of 3 to 24 models are then drawn from each
# pool. Votes see the models' outputs for 500 or 1,000 images without labels; other images tell the true error and loss.
# The vote was chosen on the seeds of the design. The report, on other seeds, was made once.
#
#     python examples/studies/comparing/handfuls.py --data FOLDER            # the report: half an hour on one core
#     python examples/studies/comparing/handfuls.py --data FOLDER --design   # the seeds of the design
#     python examples/studies/comparing/handfuls.py --quick                  # two small pools of scikit-learn's digits
#
# `FOLDER` holds `mnist.npz`, `fashion.npz` and `cifar10.npz` with `x_train, y_train, x_test, y_test` (images uint8,
# N × C × H × W). Outputs are kept in `--out`: what is there is not trained again.

# %%
import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sensitivity.functional.consensus import calibrated_votes, consensus_errors

Array = NDArray[np.float64]

DESIGN_SEEDS = range(30)
REPORT_SEEDS = range(1000, 1024)  # fixed before any look at them
DATA = ("digits", "mnist", "fashion", "cifar10")
NOISY_SHARE = 0.3  # of noisy labels that are replaced by another class
NUM_HOLDOUT, MAX_TEST = 1000, 5000
NUM_HANDFULS = 5  # of each size, from each pool
NUM_LABELS = np.array([5, 10, 20, 50, 100, 200, 500])
NUM_RESAMPLES = 2000
NUM_CLASSES = 10
UNDECIDED = 0.95  # of the largest entropy
SMALL = 1e-12
PACKAGE = "compare_models"


# %% Models, drawn at random
@dataclass
class Spec:
    kind: str
    width: int
    depth: int
    batch_norm: bool
    dropout: float
    activation: type[nn.Module]
    optimizer: str
    weight_decay: float
    label_smoothing: float
    augment: bool
    num_steps: int
    share: float  # of the training samples


def draw_spec(rng: np.random.RandomState) -> Spec:
    kind = str(rng.choice(["linear", "mlp", "mlp", "mlp", "conv", "conv", "conv"]))
    widths = [4, 8, 16] if kind == "conv" else [16, 64, 256, 512]
    width = int(rng.choice(widths))
    return Spec(
        kind=kind,
        width=width,
        depth=int(rng.choice([1, 2, 4])),
        batch_norm=bool(rng.rand() < 0.25),
        dropout=float(rng.choice([0, 0, 0.2, 0.5])),
        activation=[nn.ReLU, nn.ReLU, nn.GELU, nn.Tanh][rng.randint(4)],
        optimizer=str(rng.choice(["adam", "adam", "sgd"])),
        weight_decay=float(rng.choice([0, 0, 0.1])),
        label_smoothing=float(rng.choice([0, 0, 0, 0.1])),
        augment=bool(rng.rand() < 0.25),
        num_steps=int(rng.choice([150, 300, 800])),
        share=float(rng.choice([1, 1, 1, 0.3])),
    )


def build(spec: Spec, shape: Sequence[int]) -> nn.Module:
    channels, size = shape[0], shape[1]
    layers: list[nn.Module] = []
    if spec.kind == "conv":
        for width in (spec.width, 2 * spec.width, 2 * spec.width):
            layers.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
            if spec.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(spec.activation())
            channels, size = width, -(-size // 2)
    layers.append(nn.Flatten())
    fan_in = channels * size**2
    if spec.kind == "mlp":
        for _ in range(spec.depth):
            layers.append(nn.Linear(fan_in, spec.width))
            if spec.batch_norm:
                layers.append(nn.BatchNorm1d(spec.width))
            layers += [spec.activation(), nn.Dropout(spec.dropout)]
            fan_in = spec.width
    elif spec.kind == "conv":
        layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(fan_in, 10))


def train(spec: Spec, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build(spec, x.shape[1:])
    if spec.optimizer == "adam":
        decay = spec.weight_decay
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=decay, fused=True)
    else:
        decay = spec.weight_decay / 50  # here the loss pulls back, not each step
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=decay)
    count = int(spec.share * len(x))
    batches: list[Tensor] = []
    for _ in range(spec.num_steps):
        if not batches:
            batches = list(torch.randperm(count).split(50))
        chosen = batches.pop(0)
        images = x[chosen]
        if spec.augment:
            images = images.roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
        optimizer.zero_grad()
        cross_entropy(model(images), y[chosen], label_smoothing=spec.label_smoothing).backward()
        optimizer.step()
    return model.eval()


# %% Data and pools
@dataclass
class Pool:
    name: str
    outputs: Array  # probabilities of the unlabelled holdout samples, (models, samples, classes)
    losses: Array  # of the same samples, (models, samples): labels to compare with
    errors: Array
    true_loss: Array  # of other samples, (models,)
    true_error: Array

    def __getitem__(self, chosen: Array) -> "Pool":
        arrays = (self.outputs, self.losses, self.errors, self.true_loss, self.true_error)
        return Pool(self.name, *(array[chosen] for array in arrays))


def load_images(name: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    if name == "digits":
        digits = load_digits()
        return torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target).long()
    if folder is None:
        raise SystemExit("Say with --data where the images are, or --quick to use embedded ones.")
    arrays = np.load(folder / f"{name}.npz")
    chosen = np.random.RandomState(0).permutation(len(arrays["x_train"]))[:12_000]
    return torch.tensor(arrays["x_train"][chosen]).float() / 255, torch.tensor(arrays["y_train"][chosen]).long()


def draw_pool(seed: int, folder: Path | None, quick: bool) -> tuple[str, list[Tensor], list[Spec]]:
    """The name of a pool; images and labels to learn, of the holdout, and to judge by; and what its models are."""
    rng = np.random.RandomState(seed)
    name = "digits" if quick else DATA[seed % 4]
    is_noisy = seed // 4 % 2 == 1
    x, y = load_images(name, folder)
    num_training = int(rng.choice([150, 300, 600] if name == "digits" else [300, 600, 1000, 2000]))
    order = rng.permutation(len(x))[: num_training + NUM_HOLDOUT + MAX_TEST]
    num_holdout = 500 if name == "digits" else NUM_HOLDOUT
    parts = np.split(order, [num_training, num_training + num_holdout])
    tensors = [tensor[part] for part in parts for tensor in (x, y)]
    if is_noisy:
        replaced = torch.tensor(rng.rand(num_training) < NOISY_SHARE)
        others = (tensors[1] + torch.tensor(rng.randint(1, 10, num_training))) % 10
        tensors[1] = torch.where(replaced, others, tensors[1])
    num_models = 24 if seed % 5 == 0 else 12
    if quick:
        num_models = 6
    specs = [draw_spec(rng) for _ in range(num_models)]
    if quick:
        specs = [replace(spec, num_steps=150) for spec in specs]
    labels = "noisy" if is_noisy else "correct"
    return f"{name}, {labels} labels, {num_training} samples", tensors, specs


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(500)])


def train_pool(seed: int, folder: Path | None, quick: bool, path: Path) -> None:
    name, (x, y, x_holdout, y_holdout, x_test, y_test), specs = draw_pool(seed, folder, quick)
    start = time.perf_counter()
    logits, tests = [], []
    for index, spec in enumerate(specs):
        model = train(spec, x, y, 1000 * seed + index)
        logits.append(logits_of(model, x_holdout))
        tests.append(logits_of(model, x_test))
    print(f"{seed}: {name}, {len(specs)} models, {time.perf_counter() - start:.0f} s", flush=True)
    kept = {"name": name, "specs": [str(spec) for spec in specs]}
    for part, outputs, labels in (("holdout", logits, y_holdout), ("test", tests, y_test)):
        kept[f"{part}_loss"] = torch.stack([cross_entropy(each, labels, reduction="none") for each in outputs])
        kept[f"{part}_error"] = torch.stack([(each.argmax(1) != labels).float() for each in outputs])
    partial = path.with_suffix(".part.npz")
    np.savez(partial, logits=torch.stack(logits), **kept)
    partial.rename(path)  # what was interrupted leaves no pool


def load_pool(path: Path) -> Pool:
    """A pool, without the models that have learned nothing: the table of compare_models marks them."""
    kept = np.load(path)
    outputs = torch.tensor(kept["logits"]).double().softmax(2).numpy()
    entropies = -(outputs * np.log(outputs + SMALL)).sum(2).mean(1)
    true_loss = kept["test_loss"].mean(1, dtype=float)
    true_error = kept["test_error"].mean(1, dtype=float)
    pool = Pool(str(kept["name"]), outputs, kept["holdout_loss"], kept["holdout_error"], true_loss, true_error)
    return pool[entropies < UNDECIDED * np.log(NUM_CLASSES)]


# %% Votes: probabilities of the labels by which each model is judged, (models, samples, classes)
def one_hot(predicted: Array) -> Array:
    return np.eye(NUM_CLASSES)[predicted]


def others(votes: Array) -> Array:
    """For each model the mean vote of the others."""
    return (votes.sum(0) - votes) / (len(votes) - 1)


def everybody(vote: Array, num_models: int) -> Array:
    """The same labels for all models."""
    return np.broadcast_to(vote, (num_models, *vote.shape))


def likeliest(votes: Array) -> Array:
    """The label of most votes; classes of as many votes share it."""
    first = (votes >= votes.max(-1, keepdims=True) - 1e-9).astype(float)
    return first / first.sum(-1, keepdims=True)


def softmax(log_p: Array) -> Array:
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def dawid_skene(hard: Array, has_confusions: bool) -> Array:
    """Dawid and Skene (1979): labels weighted by agreement, with one accuracy or one confusion matrix a model."""
    labels = hard.mean(0)
    for _ in range(12):  # steps of expectation and maximization
        confusions = labels.T @ hard + 0.2 + 4 * np.eye(NUM_CLASSES)  # (models, true class, predicted class)
        if not has_confusions:
            accuracies = np.einsum("mkk->m", confusions) / confusions.sum((1, 2))
            diagonal = accuracies[:, None, None] * np.eye(NUM_CLASSES)
            confusions = diagonal + ((1 - accuracies) / (NUM_CLASSES - 1))[:, None, None] * (1 - np.eye(NUM_CLASSES))
        confusions = confusions / confusions.sum(2, keepdims=True)
        labels = softmax((hard @ np.log(confusions).swapaxes(1, 2)).sum(0))
    return labels


def votes(p: Array) -> dict[str, Array]:
    """Every vote that is a distribution over labels."""
    count = len(p)
    hard = one_hot(p.argmax(2))
    log_p = torch.tensor(np.log(p + SMALL))[:, :, None]
    calibrated = np.stack([vote[:, 0].numpy() for vote in calibrated_votes(list(log_p))])
    return {
        "soft votes of the others (as it was)": others(p),
        "soft votes of all": everybody(p.mean(0), count),
        "hard votes of the others": others(hard),
        "most frequent label": everybody(likeliest(hard.sum(0)), count),
        "label of the mean prediction": everybody(likeliest(p.mean(0)), count),
        "label of the others' mean prediction": likeliest(others(p)),
        "Dawid and Skene, one accuracy": everybody(dawid_skene(hard, False), count),
        "Dawid and Skene, confusion matrices": everybody(dawid_skene(hard, True), count),
        "calibrated votes of all": everybody(softmax(calibrated.sum(0)), count),
        "calibrated votes of the others": softmax(calibrated.sum(0) - calibrated),
    }


def scores_of(p: Array) -> dict[str, tuple[Array, Array]]:
    """Expected loss and error of each model by every vote, by the package, and by the models' own confidence."""
    log_p = np.log(p + SMALL)
    predicted = p.argmax(2)[..., None]
    found = {}
    for name, labels in votes(p).items():
        errors = 1 - np.take_along_axis(labels, predicted, 2)[..., 0]
        found[name] = -(labels * log_p).sum(2).mean(1), errors.mean(1)
    by_model = {str(index): torch.tensor(each)[:, None] for index, each in enumerate(log_p)}
    errors = consensus_errors(by_model, by_model)
    # Version 0.1.0 of the package computed this loss, too, as `consensus_loss`.
    found[PACKAGE] = found["hard votes of the others"][0], np.array(list(errors.values()))
    found["own confidence"] = -(p * log_p).sum(2).mean(1), 1 - p.max(2).mean(1)
    return found


# %% What the votes are worth
GROUPS = {"3 to 7": (3, 4, 5, 6, 7), "12": (12,), "24": (24,), "3 to 6 of the better half": (3, 4, 5, 6)}


@dataclass
class Result:
    """How well one score agrees with the truth of a handful."""

    tau: float  # Kendall's τ-b
    lost: float  # by taking the model that the score ranks first
    bias: float  # mean of the score minus the truth


def judge(score: Array, truth: Array) -> Result:
    signs, true_signs = (np.sign(values[:, None] - values) for values in (score, truth))
    num_untied = np.sqrt(np.abs(signs).sum() * np.abs(true_signs).sum())
    tau = (signs * true_signs).sum() / max(num_untied, 1)  # Kendall's τ-b; 0 if all are tied
    lost = truth[score.argmin()] - truth.min()
    return Result(float(tau), float(lost), float((score - truth).mean()))


def judge_handful(pool: Pool, rng: np.random.RandomState) -> Iterator[tuple[str, str, Result]]:
    """Judge each score of a handful by loss and error, and rankings by labels."""
    for name, (loss, error) in scores_of(pool.outputs).items():
        yield "loss", name, judge(loss, pool.true_loss)
        yield "error", name, judge(error, pool.true_error)
    for count in NUM_LABELS:
        labelled = rng.permutation(pool.losses.shape[1])[:count]
        yield "loss", f"{count} labels", judge(pool.losses[:, labelled].mean(1), pool.true_loss)
        yield "error", f"{count} labels", judge(pool.errors[:, labelled].mean(1), pool.true_error)


def judge_pool(pool: Pool, seed: int, num_handfuls: int) -> Iterator[dict[str, object]]:
    """One row for each group of handfuls, truth and score: the mean over handfuls."""
    rng = np.random.RandomState(seed)
    better = np.argsort(pool.true_error)[: len(pool.true_error) // 2]
    for group, sizes in GROUPS.items():
        candidates = better if "half" in group else np.arange(len(pool.true_error))
        results: dict[tuple[str, str], list[Result]] = {}
        for size in sizes:
            if size > len(candidates):
                continue
            for _ in range(num_handfuls if size < len(candidates) else 1):
                handful = pool[rng.choice(candidates, size, replace=False)]
                for truth, name, result in judge_handful(handful, rng):
                    results.setdefault((truth, name), []).append(result)
        for (truth, name), each in results.items():
            means = {field: np.mean([getattr(result, field) for result in each]) for field in ("tau", "lost", "bias")}
            yield {"seed": seed, "group": group, "truth": truth, "ranked by": name, **means}


def interval(values: Array) -> tuple[float, float, float]:
    """The mean over pools, and its 95 % bootstrap interval."""
    means = resampled(values)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def resampled(values: Array) -> Array:
    """Means over pools that are drawn with replacement, the same draws for all values."""
    drawn = np.random.RandomState(0).randint(0, len(values), (NUM_RESAMPLES, len(values)))
    return values[drawn].mean(1)


def worth(tau: Array, labels: Array) -> Array:
    """How many labels rank as well, interpolated in the logarithm; 5 and 500 stand for less and more."""
    curves = np.maximum.accumulate(labels, 1)
    return np.exp([np.interp(t, curve, np.log(NUM_LABELS)) for t, curve in zip(tau, curves, strict=True)])


def in_words(count: float) -> str:
    if count < NUM_LABELS[0] + 0.01:
        return f"under {NUM_LABELS[0]}"
    return f"over {NUM_LABELS[-1]}" if count > NUM_LABELS[-1] - 1 else f"{count:.0f}"


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals over pools."""
    lines = []
    for (group, truth), part in rows.groupby(["group", "truth"], sort=False):
        taus = part.pivot(index="seed", columns="ranked by", values="tau")
        means = part.groupby("ranked by")[["lost", "bias"]].mean()
        columns = [f"{count} labels" for count in NUM_LABELS]
        mean_curve = taus[columns].mean().to_numpy()[None]
        curves = np.stack([resampled(taus[column].to_numpy()) for column in columns], 1)
        for name in part["ranked by"].unique():
            values = taus[name].to_numpy()
            mean, low, high = interval(values)
            better, better_low, better_high = interval((taus[PACKAGE] - taus[name]).to_numpy())
            ends = np.quantile(worth(resampled(values), curves), (0.025, 0.975))
            lines.append({
                "group": group, "truth": truth, "ranked by": name, "pools": len(values),
                "tau": mean, "tau_low": low, "tau_high": high,
                "worth": worth(np.array([mean]), mean_curve)[0], "worth_low": ends[0], "worth_high": ends[1],
                "package_minus": better, "package_minus_low": better_low, "package_minus_high": better_high,
                "lost": means.loc[name, "lost"], "bias": means.loc[name, "bias"],
            })  # fmt: skip
    return pd.DataFrame(lines)


def print_table(summary: pd.DataFrame, group: str) -> None:
    print(f"\nHandfuls of {group}")
    print("| ranked by | τ, error | worth in labels | error lost | τ, loss | worth in labels |")
    print("|---|---|---|---|---|---|")
    part = summary[summary["group"] == group]
    for name in part["ranked by"].unique():
        cells = [name]
        for truth in ("error", "loss"):
            row = part[(part["ranked by"] == name) & (part["truth"] == truth)].iloc[0]
            cells.append(f"{row['tau']:.2f} [{row['tau_low']:.2f}, {row['tau_high']:.2f}]")
            bounds = f"{in_words(row['worth_low'])} to {in_words(row['worth_high'])}"
            cells.append("" if name.endswith("labels") else f"{in_words(row['worth'])} ({bounds})")
            if truth == "error":
                cells.append(f"{100 * row['lost']:.1f} %")
        print("| " + " | ".join(cells).replace("-0.", "−0.") + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Which vote ranks a handful of models best.")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz, fashion.npz and cifar10.npz")
    parser.add_argument("--design", action="store_true", help="the seeds on which the vote was chosen")
    parser.add_argument("--quick", action="store_true", help="two small pools of embedded data: does it run")
    parser.add_argument("--out", type=Path, help="folder of pools [runs/handfuls or runs/handfuls_quick]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or Path("runs/handfuls_quick" if args.quick else "runs/handfuls")
    out.mkdir(parents=True, exist_ok=True)
    seeds = DESIGN_SEEDS if args.design else REPORT_SEEDS
    if args.quick:
        seeds = range(2)
    rows = []
    for seed in seeds:
        path = out / f"{seed}.npz"
        if not path.exists():
            train_pool(seed, args.data, args.quick, path)
        rows += judge_pool(load_pool(path), seed, 2 if args.quick else NUM_HANDFULS)
    summary = summarize(pd.DataFrame(rows))
    for group in summary["group"].unique():
        print_table(summary, group)
    table = (out if args.quick or args.design else Path(__file__).parent) / "handfuls.csv"
    summary.to_csv(table, index=False, float_format="%.4g", lineterminator="\n")
    print(f"\nAs numbers: {table}")


if __name__ == "__main__":
    main()
