"""README's five questions, and what each answer was worth: the phrases of `pages/blocks.py`."""

import runpy
from pathlib import Path

PAGES = runpy.run_path(str(Path(__file__).parents[1] / "pages" / "blocks.py"))
COST = runpy.run_path(str(Path(__file__).parents[1] / "cost" / "blocks.py"))
NAMES = PAGES["NAMES"]
WORTH = {name.removeprefix("README: "): text.strip() for name, text in PAGES["BLOCKS"].items()}
QUESTIONS = """
| ask, in this order | then | it was worth |
|---|---|---|
| Did rules or a model make the labels? Does each pixel or token have one? | **No**: it can't see their errors.
  [Label some by hand](docs/guide/labels.md#rule-generated-labels), or take
  [`SensitivityMonitor`](docs/guide/sensitivity.md) alone | |
| Do you augment, and does the learning rate end at zero? | **No**:
  [train to the end](docs/guide/stopping.md#schedules) | |
| Is the network pretrained? | **No**: train to the end, or stop by [hundreds of labels](docs/guide/hold_out.md); and
  compare it with [a probe of its features](docs/guide/finetuning.md) | nothing: @pretrained@ |
| Are positives few, or does AUC or F1 count? |
  [stop by `val/expected_auroc`, `mode="max"`](docs/guide/few_positives.md) |
  @few positives@ |
| Can you spare hundreds of labels? | [`RiskMonitor(validation_labels=True)`](docs/guide/labels.md); thousands:
  [`RefinedScore` alone](docs/guide/hold_out.md) | @labels@ |
| What are your data? A table | [`RiskMonitor()`](docs/guide/data.md#tables) | @tables@; on large ones @large tables@ |
| a table with numbers as targets | [`RiskMonitor("regression")`](docs/guide/regression.md) | @regression@ |
| everything else | [`RiskMonitor()`](docs/guide/data.md) | photos: @photos@; texts @texts@; signals @signals@ |
""".replace("\n  ", " ")
SENTENCES = """
**Read the level on tables, not on images.** Over all epochs, expected accuracy is @level@. What is
expected is the value on labels as noisy as yours.

**Your network may lose to the reference**, a random forest or ridge regression: on the study's tables it mostly did.
Then use that, or [the mean of both](docs/guide/stopping.md#the-mean-of-both).
"""
SLOWER = f"With both monitors, an epoch of 10,000 training samples takes {COST['both'](10_000)} % longer."
BLOCKS = {"five questions": QUESTIONS, "level and rival": SENTENCES, "slower": SLOWER}
for name, text in WORTH.items():
    BLOCKS = {block: whole.replace(f"@{name}@", text) for block, whole in BLOCKS.items()}
