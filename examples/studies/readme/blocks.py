"""README's five questions, and what each answer was worth: the phrases of `pages/blocks.py`."""

import runpy
from pathlib import Path

PAGES = runpy.run_path(str(Path(__file__).parents[1] / "pages" / "blocks.py"))
NAMES = PAGES["NAMES"]
WORTH = {name.removeprefix("README: "): text.strip() for name, text in PAGES["BLOCKS"].items()}
TENTH = """
On @tenth of tables@, training on all samples and choosing the epoch without labels reached @tenth gained@ points more
test accuracy than training on nine tenths and choosing by the lowest loss on the rest (@tenth, trained again@, if then
trained again on all); on large ones @tenth of large@, on texts @tenth of texts@. On photos and few positives the
difference may be [chance](docs/guide/hold_out.md).
"""
QUESTIONS = """
| ask | then | it was worth |
|---|---|---|
| Did rules or a model, not people, make the labels? Is each pixel or token labelled? |
  **Not for you**: it can't see their errors.
  [Label some by hand](docs/guide/labels.md#rule-generated-labels), or take
  [`SensitivityMonitor`](docs/guide/sensitivity.md) alone | |
| Do you augment, and does the learning rate end at zero? |
  [Train to the end](docs/guide/stopping.md#schedules) | |
| Is the network pretrained? | Take a stronger one as [`features=`](docs/guide/encoders.md); without it, train to
  the end | @pretrained@ |
| Are positives few, or does AUROC or F1 count? | `RiskMonitor("binary")`; [monitor](docs/guide/few_positives.md)
  `"val/expected_auroc"` or `"val/expected_f1"`, `mode="max"` | @few positives@ |
| Are targets numbers, of any kind of data? | [`RiskMonitor("regression")`](docs/guide/regression.md) | @regression@ |
| Is it a table? | [`RiskMonitor()`](docs/guide/data.md#tables) | @tables@; from 5,000 rows on @large tables@ |
| Is it images? | [`RiskMonitor(features=encoder)`](docs/guide/encoders.md); without one, train to the end |
  photos: @encoder@ |
| Texts, signals? | [`RiskMonitor()`](docs/guide/data.md), or with an encoder |
  texts @texts@; [signals](docs/guide/data.md#signals): may be chance |

Can you spare hundreds of labels? Add [`validation_labels=True`](docs/guide/labels.md): @labels@.
""".replace("\n  ", " ")
SENTENCES = """
**The level**: over all epochs, expected accuracy is @level@, on labels as noisy as yours.

**Your network may lose to the reference**: @rival@. Then use [either](docs/guide/stopping.md#the-mean-of-both).
"""
BLOCKS = {"tenth": TENTH, "five questions": QUESTIONS, "level and rival": SENTENCES}
for name, text in WORTH.items():
    BLOCKS = {block: whole.replace(f"@{name}@", text) for block, whole in BLOCKS.items()}
