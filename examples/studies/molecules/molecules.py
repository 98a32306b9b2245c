"""Molecules with several labels, many of them unknown: the epoch that expected AUROC and expected loss choose.

    python examples/studies/molecules/molecules.py FOLDER RUNS          # needs rdkit; results.csv
    python examples/studies/molecules/molecules.py FOLDER RUNS --quick  # shows that it runs; ignore its numbers
    python examples/studies/tables.py                                   # results.csv -> the pages

FOLDER has `tox21.csv`, `sider.csv` and `clintox.csv`; the README says where they come from. Labels of all molecules
that are not for training only tell how well it went, but those of a tenth, which stand for held-out labels. RUNS gets
the outputs of all epochs of a network, one file a run; what is there is not made again, and is judged anew by the
package at hand. Runs of chemprop are made if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAUROC

from lightning_sensitivity import Reference
from lightning_sensitivity.functional import expected_loss, expected_metric
from lightning_sensitivity.functional.expected import ESTIMATES

sys.path.insert(0, str(Path(__file__).parents[1] / "stopping"))
from networks import draw_mlp, draw_optimizer

SETS = ("tox21", "sider", "clintox")
NUM_BITS, RADIUS = 1024, 2  # of Morgan fingerprints, which count
SIZES, NUM_UNSEEN, MOST_NEW = (600, 1000), 600, 2000
SEEDS, EPOCHS, BATCH_SIZE = 4, 40, 50
CHEMPROP_EPOCHS = 20
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


# %% Data
class Molecules(NamedTuple):
    smiles: np.ndarray
    x: Tensor  # fingerprints (N, 1024)
    y: Tensor  # labels (N, L), nan where unknown

    def take(self, rows: np.ndarray) -> Molecules:
        return Molecules(self.smiles[rows], self.x[torch.tensor(rows)], self.y[torch.tensor(rows)])


def read(folder: Path, name: str) -> Molecules:
    """Read molecules with their labels, and count substructures around each atom."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    RDLogger.DisableLog("rdApp.*")
    frame = pd.read_csv(folder / f"{name}.csv")
    found = [Chem.MolFromSmiles(smiles) for smiles in frame.pop("smiles").tolist()]
    known = np.array([each is not None and each.GetNumAtoms() > 1 for each in found])
    generator = GetMorganGenerator(radius=RADIUS, fpSize=NUM_BITS)
    counts = [generator.GetCountFingerprintAsNumPy(found[row]) for row in np.flatnonzero(known)]
    smiles = np.array([Chem.MolToSmiles(found[row]) for row in np.flatnonzero(known)])
    x = torch.tensor(np.log1p(np.stack(counts)), dtype=torch.float32)
    return Molecules(smiles, x, torch.tensor(frame[known].to_numpy("float32")))


def auroc(logits: Tensor, y: Tensor) -> float:
    """Return the mean AUROC, in percent, over labels of which both classes are known."""
    values = []
    for column, labels in zip(logits.T.numpy(), y.T.numpy(), strict=True):
        ranks, is_positive = rankdata(column[~np.isnan(labels)]), labels[~np.isnan(labels)] == 1
        num_positive, num_negative = is_positive.sum(), (~is_positive).sum()
        if num_positive and num_negative:
            above = ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2
            values.append(above / num_positive / num_negative)
    return 100 * float(np.mean(values))


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over known labels."""
    is_known = ~y.isnan()
    return binary_cross_entropy_with_logits(logits[is_known], y[is_known])


# %% Networks
class Assays(LightningModule):
    def __init__(self, network: nn.Module, make_optimizer: Any) -> None:
        super().__init__()
        self.network, self.make_optimizer = network, make_optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return bce(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Setting(NamedTuple):
    """What is trained, on what, for how long, and how to get the logits of new molecules."""

    name: str
    module: LightningModule
    training: Any
    logits: Callable[[LightningModule], Tensor]
    epochs: int


def mlp(r: np.random.RandomState, known: Molecules, new: Molecules) -> Setting:
    make_network, network = draw_mlp(r, NUM_BITS, known.y.shape[1])
    make_optimizer, optimizer = draw_optimizer(r)
    training = DataLoader(TensorDataset(known.x, known.y), BATCH_SIZE, shuffle=True, drop_last=True)
    module = Assays(make_network(), make_optimizer)
    return Setting(f"{network}, {optimizer}", module, training, lambda module: module(new.x), EPOCHS)


def chemprop(r: np.random.RandomState, known: Molecules, new: Molecules) -> Setting:
    """Make chemprop's message passing over atoms and bonds, with fingerprints as further descriptors."""
    from chemprop import data, models
    from chemprop import nn as layers

    def loader(molecules: Molecules, **options: Any) -> Any:
        rows = zip(molecules.smiles.tolist(), molecules.y.numpy(), molecules.x.numpy(), strict=True)
        points = [data.MoleculeDatapoint.from_smi(smiles, y, x_d=x) for smiles, y, x in rows]
        return data.build_dataloader(data.MoleculeDataset(points), batch_size=BATCH_SIZE, num_workers=0, **options)

    def logits(module: LightningModule) -> Tensor:
        return torch.logit(torch.cat([module(batch.bmg, batch.V_d, batch.X_d) for batch in judged]), 1e-6)

    passing = layers.BondMessagePassing()
    head = layers.BinaryClassificationFFN(n_tasks=known.y.shape[1], input_dim=passing.output_dim + NUM_BITS)
    module = models.MPNN(passing, layers.MeanAggregation(), head, batch_norm=True)
    judged = list(loader(new, shuffle=False))
    return Setting("chemprop", module, loader(known, seed=int(r.randint(2**31))), logits, CHEMPROP_EPOCHS)


class Outputs(Callback):
    """Keeps the logits of new molecules after each epoch."""

    def __init__(self, logits: Callable[[LightningModule], Tensor]) -> None:
        self.logits = logits
        self.found: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.found.append(self.logits(pl_module))
        pl_module.train()


class Case(NamedTuple):
    set: str
    n: int
    seed: int
    kind: str  # of network

    def split(self, molecules: Molecules) -> tuple[np.random.RandomState, Molecules, Molecules]:
        """Return molecules for training, and others; of those for chemprop fewer, since it is slow."""
        r = np.random.RandomState(1000 * self.seed + 10 * self.n + SETS.index(self.set))
        order = r.permutation(len(molecules.y))
        most = MOST_NEW if self.kind == "mlp" else NUM_UNSEEN
        return r, molecules.take(order[: self.n]), molecules.take(order[self.n : self.n + most])


def record(case: Case, molecules: Molecules, epochs: int | None) -> tuple[str, Tensor]:
    """Train a network; return its name, and the logits of new molecules in each epoch, (E, N, L)."""
    r, known, new = case.split(molecules)
    seed_everything(case.seed, verbose=False)
    setting = {"mlp": mlp, "chemprop": chemprop}[case.kind](r, known, new)
    outputs = Outputs(setting.logits)
    trainer = Trainer(max_epochs=epochs or setting.epochs, accelerator="cpu", callbacks=[outputs], **QUIET)
    trainer.fit(setting.module, setting.training)
    return setting.name, torch.stack(outputs.found)


# %% What is expected of them, and what they reach
def true_curves(logits: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    curves = {"auroc": [auroc(each, y) for each in logits], "loss": [float(bce(each.double(), y)) for each in logits]}
    return {name: np.array(curve) for name, curve in curves.items()}


def expected_curves(q: Tensor, logits: Tensor) -> dict[str, np.ndarray]:
    """Return expected AUROC, in percent, and expected loss in each epoch, as a monitor logs them."""
    metric = MultilabelAUROC(q.shape[1])
    return {
        "auroc": np.array([100 * float(expected_metric(metric, each, q, "multilabel")) for each in logits]),
        "loss": np.array([float(expected_loss(each, q, "multilabel")) for each in logits]),
    }


def fitted(known: Molecules) -> tuple[Reference, list[int], float]:
    """Fit a reference; return which labels it can tell, and how long it took on one thread."""
    start = time.process_time()
    reference = Reference("multilabel").fit(known.x, known.y)
    seconds = time.process_time() - start
    blind = {*reference.blind_labels_.tolist()} if reference.is_trusted_ else {*range(known.y.shape[1])}
    return reference, [label for label in range(known.y.shape[1]) if label not in blind], seconds


def judge(case: Case, molecules: Molecules, network: str, logits: Tensor) -> dict[str, Any]:
    """Say what each choice of an epoch loses, over all labels, and how far what is expected of those told is off."""
    _, known, new = case.split(molecules)
    reference, told, seconds = fitted(known)
    q = torch.as_tensor(reference.predict_proba(new.x)).double()
    found = case._asdict() | {
        "version": ESTIMATES,
        "network": network,
        "num_new": len(new.y),
        "num_labels": known.y.shape[1],
    }
    found |= {"unknown": 100 * float(known.y.isnan().float().mean()), "num_told": len(told), "fit_seconds": seconds}
    found["reference_auroc"] = auroc(q[:, told], new.y[:, told]) if told else float("nan")
    truth, last = true_curves(logits, new.y), len(logits) - 1
    tenth = true_curves(logits[:, : case.n // 10], new.y[: case.n // 10])
    epochs = {"never": last, "tenth": int(tenth["auroc"].argmax()), "expected_auroc": last, "expected_loss": last}
    if told:
        expected = expected_curves(q[:NUM_UNSEEN, told], logits[:, :NUM_UNSEEN, told])
        of_told = true_curves(logits[:, :, told], new.y[:, told])
        off = {"auroc": expected["auroc"] - of_told["auroc"], "loss": 100 * (expected["loss"] / of_told["loss"] - 1)}
        for name, curve in off.items():
            found |= {f"{name}_off": curve.mean(), f"{name}_level_error": np.abs(curve).mean()}
        epochs["expected_auroc"], epochs["expected_loss"] = expected["auroc"].argmax(), expected["loss"].argmin()
        found["told_auroc"] = of_told["auroc"].max()
    found |= {"best_auroc": truth["auroc"].max(), "last_auroc": truth["auroc"][-1]}
    for name, epoch in epochs.items():
        found[f"{name}_auroc_lost"] = truth["auroc"].max() - truth["auroc"][epoch]
        found[f"{name}_loss_lost"] = 100 * (truth["loss"][epoch] / truth["loss"].min() - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose epochs of networks with several labels, by AUROC to expect.")
    parser.add_argument("folder", type=Path, help="folder of the sets")
    parser.add_argument("runs", type=Path, help="folder of recorded runs")
    parser.add_argument("--quick", action="store_true", help="one run of two epochs on 200 molecules")
    parser.add_argument("--record", action="store_true", help="do not judge")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    cases = [Case(name, n, seed, "mlp") for seed in range(SEEDS) for name in SETS for n in SIZES]
    if importlib.util.find_spec("chemprop"):
        cases += [Case(name, SIZES[0], 0, "chemprop") for name in SETS]
    cases, epochs = ([Case("clintox", 200, 0, "mlp")], 2) if args.quick else (cases, None)
    sets = {name: read(args.folder, name) for name in dict.fromkeys(case.set for case in cases)}
    rows: list[dict[str, Any]] = []
    for case in cases:
        file = args.runs / f"{' '.join(map(str, case))}.pt"
        if not file.exists():
            torch.save(record(case, sets[case.set], epochs), file)
        if not args.record:
            rows.append(judge(case, sets[case.set], *torch.load(file)))
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    if rows and not args.quick:
        pd.DataFrame(rows).to_csv(Path(__file__).with_name("results.csv"), index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
