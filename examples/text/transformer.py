"""Two transformers on text: one classifies sentences, one predicts the next word.

    python examples/text/transformer.py                # which package does a sentence document?
    python examples/text/transformer.py --task words   # the next word of such sentences

It needs `pip install -e ".[text]"`. The models are built from a small `BertConfig` and `GPT2Config`, and the text lies
on disk: docstrings of the installed PyTorch, scikit-learn and SciPy. Nothing is downloaded. Token ids can take no
noise, so `SensitivityMonitor` adds it to what the embeddings return. See docs/guide/data.md.
"""

import argparse
import ast
import importlib
import re
import warnings
import zlib
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config

from lightning_sensitivity import RiskMonitor, SensitivityMonitor

parser = argparse.ArgumentParser(description="Sentence classification and next-word prediction with transformers.")
parser.add_argument("--task", choices=("sentences", "words"), default="sentences")
parser.add_argument("--quick", action="store_true", help="few samples and epochs")
args = parser.parse_args()
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|smaller than the logging).*")
seed_everything(0, verbose=False)
torch.set_num_threads(1)
NUM_TRAIN, NUM_EPOCHS = (64, 2) if args.quick else (1000, 15)
NUM_WORDS, MAX_LENGTH = 2000, 32
PACKAGES = ("torch", "sklearn", "scipy")
Sample = tuple[list[str], int]  # the words of a sentence, and its package


# %% Text on disk
def sentences(package: str, label: int) -> list[Sample]:
    """Sentences of docstrings, without those that name the package or hold code."""
    root = Path(str(importlib.import_module(package).__file__)).parent
    paths = [path for path in sorted(root.rglob("*.py")) if "test" not in str(path.relative_to(root))]
    found = {}
    for path in Random(0).sample(paths, 10 if args.quick else 150):
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        text = "\n\n".join(ast.get_docstring(node) or "" for node in nodes)
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            words = re.findall("[a-z]+", sentence.lower())
            has_code = re.search(r"torch|sklearn|scikit|scipy|tensor|[\\<>=_:]", sentence)
            if 6 <= len(words) <= MAX_LENGTH and not has_code:
                found[tuple(words)] = (words, label)
    return Random(0).sample(list(found.values()), min(len(found), (2 * NUM_TRAIN + 2) // 3))


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """A batch as transformers takes it. A word's id is its hash; 0 is padding."""
    ids = [torch.tensor([1 + zlib.crc32(word.encode()) % (NUM_WORDS - 1) for word in words]) for words, _ in samples]
    input_ids = pad_sequence(ids, batch_first=True)
    mask = input_ids > 0
    labels = torch.tensor([label for _, label in samples])
    labels = labels if args.task == "sentences" else input_ids.where(mask, -100)  # transformers shifts them
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


# %% The module
class Text(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        if args.task == "sentences":
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
            config = BertConfig(
                vocab_size=NUM_WORDS, max_position_embeddings=MAX_LENGTH, num_labels=len(PACKAGES), **sizes
            )
            self.model = AutoModelForSequenceClassification.from_config(config)
        else:
            sizes = {"n_positions": MAX_LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
            config = GPT2Config(vocab_size=NUM_WORDS, **sizes, bos_token_id=None, eos_token_id=None)
            self.model = AutoModelForCausalLM.from_config(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4 if args.task == "sentences" else 3e-3)


class Curves(Callback):
    """Prints what was logged, epoch by epoch, and keeps it."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in columns:
            columns[name].append(float(trainer.callback_metrics[name]))
        *numbers, sensitivity = (values[-1] for values in columns.values())
        print(
            f"{trainer.current_epoch:5d}  {'  '.join(f'{n:10.3f}' for n in numbers)}  {sensitivity:11.2g}", flush=True
        )


# %% What to copy
if args.task == "sentences":
    at = "model.bert.embeddings"
    monitors: list[Callback] = [
        RiskMonitor(validation_labels=True),
        SensitivityMonitor(at=at, per_output=True),
    ]
    names = ["train_loss", "val/loss", "val/expected_loss", "val/per_output_sensitivity"]
else:  # classes come last, (N, T, K); nothing can be expected of words
    at = "model.transformer.wte"
    monitors = [SensitivityMonitor(at=at, per_output=True, outputs=lambda result: result.logits.movedim(-1, 1))]
    names = ["train_loss", "val/loss", "val/per_output_sensitivity"]

columns: dict[str, list[float]] = {name: [] for name in names}
samples = [sample for label, package in enumerate(PACKAGES) for sample in sentences(package, label)]
Random(0).shuffle(samples)
train = DataLoader(samples[:NUM_TRAIN], 32, shuffle=True, collate_fn=collate)
val = DataLoader(samples[NUM_TRAIN : 2 * NUM_TRAIN], 125, collate_fn=collate)
print("epoch  " + "  ".join(f"{name.removeprefix('val/').removeprefix('per_output_'):>10}" for name in names))
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
Trainer(max_epochs=NUM_EPOCHS, callbacks=[*monitors, Curves()], **quiet).fit(Text(), train, val)

losses = columns["val/loss"]
gaps = [loss - train_loss for loss, train_loss in zip(losses, columns["train_loss"], strict=True)]
correlation = spearmanr(columns["val/per_output_sensitivity"], gaps)[0]
print(f"\nSpearman correlation of sensitivity with the gap: {correlation:.2f}")
best = losses.index(min(losses))
print(f"The validation loss is lowest at epoch {best}, {losses[best]:.3f}, and {losses[-1]:.3f} at the end.")
if "val/expected_loss" in columns:
    chosen = columns["val/expected_loss"].index(min(columns["val/expected_loss"]))
    print(f"The expected loss is lowest at epoch {chosen}, where the validation loss is {losses[chosen]:.3f}.")
