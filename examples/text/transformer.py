"""Two transformers on text: a classifier of sentences and a classifier of tokens.

    python examples/text/transformer.py                  # which package does a sentence document?
    python examples/text/transformer.py --task tokens    # which role does a name play in a line of Python?

The models are built from a small `BertConfig`, and the text lies on disk: docstrings and source code of the installed
PyTorch, scikit-learn and SciPy. Nothing is downloaded. Token ids can take no noise, so that `SensitivityMonitor` adds
it to what the embeddings return.
"""

import argparse
import ast
import importlib
import io
import keyword
import logging
import re
import tokenize
import warnings
import zlib
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Text and token classification with transformers.")
parser.add_argument("--task", choices=("sentences", "tokens"), default="sentences")
parser.add_argument("--num-train", type=int, default=1000)
parser.add_argument("--max-epochs", type=int, default=15)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="few samples and epochs")
parser.add_argument("--figure", type=Path, help="where to put a picture of the curves")
args = parser.parse_args()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging|found the lowest).*")
seed_everything(args.seed, verbose=False)
torch.set_num_threads(1)
NUM_TRAIN, NUM_EPOCHS = (64, 2) if args.quick else (args.num_train, args.max_epochs)
NUM_WORDS, MAX_LENGTH = 4000, 32
PACKAGES = ("torch", "sklearn", "scipy")
ROLES = ("variable", "attribute", "called", "argument", "keyword of Python")
Sample = tuple[list[str], list[int]]  # words, and one label, or one for each word


# %% Text on disk
def sources(package: str, num_files: int) -> list[str]:
    root = Path(str(importlib.import_module(package).__file__)).parent
    paths = [path for path in sorted(root.rglob("*.py")) if "test" not in str(path.relative_to(root))]
    return [path.read_text(encoding="utf-8") for path in Random(0).sample(paths, num_files)]


def sentences(source: str, label: int) -> list[Sample]:
    """Sentences of docstrings, without those that name the package or hold code."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    found = []
    for text in docstrings:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            words = re.findall("[a-z]+", sentence.lower())
            if 6 <= len(words) <= MAX_LENGTH and not re.search(
                r"torch|sklearn|scikit|scipy|tensor|[\\<>=_:]", sentence
            ):
                found.append((words, [label]))
    return found


def roles_of_names(source: str) -> list[Sample]:
    """The words of each line of code, without punctuation, and the role of each."""
    lines: list[list[tokenize.TokenInfo]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines[-1].append(token)
        if token.type == tokenize.NEWLINE:
            lines.append([])
    found = []
    for line in lines:
        words, roles = [], []
        for before, token, after in zip(line, line[1:], line[2:], strict=False):
            if token.type == tokenize.NAME:
                is_argument = after.string == "=" and before.string in ("(", ",")
                role = 3 if is_argument else 2 if after.string == "(" else 1 if before.string == "." else 0
                words.append(token.string)
                roles.append(4 if keyword.iskeyword(token.string) else role)
        if 4 <= len(words) <= MAX_LENGTH:
            found.append((words, roles))
    return found


def load() -> list[Sample]:
    """Samples in random order, each only once, as many of each package."""
    found: list[Sample] = []
    for label, package in enumerate(PACKAGES):
        texts = sources(package, 10 if args.quick else 150)
        own = [
            each
            for text in texts
            for each in (sentences(text, label) if args.task == "sentences" else roles_of_names(text))
        ]
        unique = list({tuple(words): (words, labels) for words, labels in own}.values())
        found += Random(args.seed).sample(unique, min(len(unique), (2 * NUM_TRAIN + 2) // 3))
    return Random(args.seed).sample(found, len(found))


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """A batch as transformers takes it. A word's id is its hash; 0 is padding."""
    ids = [torch.tensor([1 + zlib.crc32(word.encode()) % (NUM_WORDS - 1) for word in words]) for words, _ in samples]
    labels = [torch.tensor(each) for _, each in samples]
    input_ids = pad_sequence(ids, batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids > 0).long(),
        "labels": torch.cat(labels) if args.task == "sentences" else pad_sequence(labels, True, -100),
    }


# %% The module
class Text(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        kind = AutoModelForSequenceClassification if args.task == "sentences" else AutoModelForTokenClassification
        config = BertConfig(
            vocab_size=NUM_WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=MAX_LENGTH,
            num_labels=len(PACKAGES) if args.task == "sentences" else len(ROLES),
        )
        self.model = kind.from_config(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        result = self(**batch)
        counts = batch["labels"] != -100
        logits, labels = result.logits[counts], batch["labels"][counts]
        truth = torch.nn.functional.one_hot(labels, logits.shape[-1])
        self.log("val_loss", result.loss, batch_size=len(labels))
        self.log("val_accuracy", (logits.argmax(-1) == labels).float().mean(), batch_size=len(labels))
        self.log("val_brier", (logits.softmax(-1) - truth).square().sum(-1).mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Table(Callback):
    """Prints what was logged, epoch by epoch, and keeps it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        numbers = "  ".join(f"{self.rows[-1][name]:8.3f}" for name in COLUMNS[:-1])
        print(f"{len(self.rows) - 1:5d}  {numbers}  {self.rows[-1][COLUMNS[-1]]:8.2g}", flush=True)


TITLES = ["train", "val loss", "score", "estimate", "variance", "S"]
COLUMNS = ["train_loss", "val_loss", "val_brier", "val_risk_estimate", "val_risk_variance", "val_sensitivity"]

# %% Both monitors. A token classifier has outputs for padding, too: those are left out, of the labels as well.
samples = load()
real: dict[str, Any] = {}
if args.task == "tokens":
    real["outputs"] = lambda result, batch: result.logits[batch["attention_mask"].bool()]
    real["targets"] = lambda batch: batch["labels"][batch["attention_mask"].bool()]
risk = RiskMonitor(**real)
real.pop("targets", None)
sensitivity = SensitivityMonitor(at="model.bert.embeddings", noise_std=0.1, **real)

train = DataLoader(samples[:NUM_TRAIN], 32, shuffle=True, collate_fn=collate)
val = DataLoader(samples[NUM_TRAIN : 2 * NUM_TRAIN], 125, collate_fn=collate)
print(
    f"{NUM_TRAIN} training samples, {len(samples) - NUM_TRAIN} for validation; the first: {' '.join(samples[0][0])!r}"
)
print("epoch  " + "  ".join(f"{title:>8}" for title in TITLES))
table = Table()
trainer = Trainer(
    max_epochs=NUM_EPOCHS,
    accelerator="auto",
    callbacks=[risk, sensitivity, table],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Text(), train, val)

# %%
curves = {name: [row[name] for row in table.rows] for name in table.rows[0]}
chosen, best = (min(range(NUM_EPOCHS), key=curves[name].__getitem__) for name in ("val_risk_estimate", "val_loss"))
print("\nstop at ...            epoch  validation loss  accuracy  estimate / true score")
for what, epoch in {"the lowest estimate": chosen, "the lowest loss": best, "the end": NUM_EPOCHS - 1}.items():
    loss, accuracy, ratio = (curves[name][epoch] for name in ("val_loss", "val_accuracy", "val_risk_estimate"))
    print(f"{what:21}  {epoch:5d}  {loss:15.3f}  {accuracy:8.3f}  {ratio / curves['val_brier'][epoch]:21.2f}")
if args.figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, names_of_axis in zip(axes, (COLUMNS[:2], COLUMNS[2:5], COLUMNS[5:]), strict=True):
        for name in names_of_axis:
            axis.plot(curves[name], label=name)
        axis.axvline(chosen, color="gray", linestyle="--", label="lowest estimate")
        axis.set(xlabel="epoch", **({"yscale": "log"} if axis is axes[2] else {"ylim": (0, None)}))
        axis.legend(fontsize="small")
    figure.savefig(args.figure, dpi=100)
