"""The runs of the check half by what they are, for the report of this study and for the guide."""

from pathlib import Path
from typing import Any

import pandas as pd
from summaries import Runs

from lightning_sensitivity.functional.expected import ESTIMATES

MOST_Z = 4.0  # of two mean predictions, above which shares of classes differ

HERE = Path(__file__).parent
EVERY = Runs.read(HERE / "results.csv.gz").frame.sort_values("version", kind="stable")
TENTH = [name for name in EVERY if name.startswith(("held_out_by", "retrained"))]
EVERY[TENTH] = EVERY.groupby(["run", "judge"])[TENTH].ffill()  # by labels alone, which no version changes
FOUND = EVERY.drop_duplicates(["run", "judge"], keep="last").reset_index(drop=True)  # the newest row of each
IS_NUMBER = FOUND["task"] == "regression"
MORE = pd.DataFrame(
    {
        "share": FOUND["kind"].str.extract(r"(\d+) % (?:wrong|redrawn)")[0].astype(float),  # percent of the labels
        "reference_leads": (FOUND["reference_accuracy"] > FOUND["chosen_accuracy"])
        .astype(float)
        .where(FOUND["chosen_accuracy"].notna()),
        "gained": (FOUND["held_out_by_loss_accuracy_lost"] - FOUND["expected_accuracy_accuracy_lost"]).fillna(
            (FOUND["held_out_by_loss_loss_lost"] - FOUND["expected_loss_loss_lost"]).where(IS_NUMBER)
        ),  # points of accuracy, or % of squared error, against the tenth
        "alarm": (FOUND["shares_z"] > MOST_Z).astype(float).where(FOUND["shares_z"].notna()),
    }
)
ALL = Runs(pd.concat([FOUND, MORE], axis=1))
CHECK = ALL.where("not is_design")
SEEN = {"": "inputs", "_body": "body", "_lite0": "lite0", "_lite2": "lite2"}  # by judges
SHARES = {"": "inputs", "_known": "known shares"}
PHOTOS = "pool in ['photos', 'photos_more']"
SIGNALS = "pool in ['signals', 'signals_more', 'waves']"
CONDITIONS = {
    "tables": "pool == 'tables'",
    "as_they_are": "pool == 'tables' and not is_redrawn",
    "fifth": "pool == 'tables' and is_redrawn",
    "large": "pool == 'large'",
    "few": "pool == 'few' and way != 'undersampled'",
    "few_plain": "pool == 'few' and way == 'plain'",
    "few_weights": "pool == 'few' and way == 'weights'",
    "few_large": "pool == 'few_large'",
    "numbers": "pool == 'numbers'",
    "clear": "pool == 'numbers' and not kind.str.contains('noisy')",
    "noisy": "pool == 'numbers' and kind.str.contains('noisy')",
    "numbers_large": "pool == 'numbers_large'",
    "clear_large": "pool == 'numbers_large' and not kind.str.contains('noisy')",
    "noisy_large": "pool == 'numbers_large' and kind.str.contains('noisy')",
    "transformer": "pool == 'transformer'",
    "series": "pool == 'series'",
    "photos_9": f"{PHOTOS} and share < 25",
    "photos_40": f"{PHOTOS} and share > 25",
    "texts": "pool in ['texts', 'texts_more'] and kind.str.contains('by people')",
    "rules": "pool == 'texts' and kind.str.contains('by rules')",
    "signals": SIGNALS,
    "correct": "pool == 'redrawn' and not is_redrawn",
    "redrawn": "pool == 'redrawn' and is_redrawn",
    "made": "pool == 'made'",
}
CONDITIONS = {name: f"{condition} and judge == 'inputs'" for name, condition in CONDITIONS.items()}
JUDGED = {"photos": PHOTOS, "minilm": "pool in ['minilm', 'minilm_more']"}
JUDGED |= {name: f"pool == '{name}'" for name in ("tuned", "pretrained", "resnet18")}
for name, condition in JUDGED.items():
    CONDITIONS |= {f"{name}{end}": f"{condition} and judge == '{judge}'" for end, judge in SEEN.items()}
CONDITIONS["texts_words"] = "pool == 'texts_more' and judge == 'inputs'"
CONDITIONS["texts_minilm"] = "pool == 'texts_more' and judge == 'minilm'"
for way in ("sampler", "undersampled"):
    CONDITIONS |= {
        f"few_{way}{end}": f"pool == 'few' and way == '{way}' and judge == '{judge}'" for end, judge in SHARES.items()
    }
NAMES: dict[str, Any] = {name: CHECK.where(condition) for name, condition in CONDITIONS.items()}
NAMES |= {f"{name}_held": NAMES[name].where("gained.notna()") for name in CONDITIONS}  # without a tenth, too
NAMES |= {f"{name}_stopped": NAMES[name].where("stopped_loss_epochs.notna()") for name in CONDITIONS}
NAMES |= {"all": ALL, "check": CHECK.where("judge == 'inputs'"), "design": ALL.where("is_design")}
NAMES["texts_seen"] = NAMES["texts"].where("its_is_trusted")
NAMES["texts_blind"] = NAMES["texts"].where("not its_is_trusted")
NAMES["same_shares"] = NAMES["check"].where("way in ['plain', 'weights'] and shares_z.notna()")
NAMES["large_but_one"] = NAMES["large"].where("best_loss > 0.001")
NAMES["no_loss"] = NAMES["large"].where("best_loss <= 0.001")  # the network knows all
COMPARED = pd.read_csv(HERE / "compared.csv.gz").sort_values("version", kind="stable")
COMPARED = COMPARED.drop_duplicates(["pool", "judge", "group"], keep="last")
NAMES["alike"] = Runs(COMPARED.query("pool == 'alike'"))
for end, judge in SEEN.items():
    NAMES[f"photos_alike{end}"] = Runs(COMPARED.query(f"pool == 'photos_alike' and judge == '{judge}'"))
CLASSES = {
    "tables": "as_they_are",
    "tables, a fifth of the labels redrawn": "fifth",
    "large tables": "large",
    "few positives": "few",
    "few positives, large tables": "few_large",
    "FT-Transformer on tables": "transformer",
    "photos, human labels: by patches": "photos",
    "photos: by Lite0 at 96 pixels": "photos_lite0",
    "photos: by Lite2 at 128": "photos_lite2",
    "ResNet-18 on photos: by patches": "resnet18",
    "ResNet-18 on photos: by Lite0 at 96": "resnet18_lite0",
    "texts, human labels: by words": "texts",
    "texts: by MiniLM": "texts_minilm",
    "texts, rule-generated labels": "rules",
    "signals": "signals",
    "Lite0 fine-tuned: by patches": "pretrained",
    "Lite0 fine-tuned: by its own body": "pretrained_body",
    "Lite0 fine-tuned: by Lite0 at 96": "pretrained_lite0",
    "Lite0 fine-tuned: by Lite2 at 128": "pretrained_lite2",
    "ResNet fine-tuned: by patches": "tuned",
    "ResNet fine-tuned: by its own body": "tuned_body",
    "ResNet fine-tuned: by Lite0 at 96": "tuned_lite0",
    "MiniLM fine-tuned: by words": "minilm",
    "MiniLM fine-tuned: by its own body": "minilm_body",
    "20 or 40 % redrawn": "redrawn",
    "the same data, correct labels": "correct",
    "tables that a network made, correct labels": "made",
}


def dagger(runs: Runs) -> str:
    """Mark runs of which one was judged by an older version of the estimates."""
    return "†" if (runs.frame["version"] < ESTIMATES).any() else ""


def counted(rows: dict[str, str], column: str = "run") -> dict[str, str]:
    """Add the numbers of runs to the labels of rows, and leave out rows of which not even two runs have a column."""
    return {
        f"{label}{dagger(NAMES[name])} ({{{name}.{column}.count}})": name
        for label, name in rows.items()
        if NAMES[name].frame[column].notna().sum() > 1
    }


def lost(rule: str, measure: str, form: str = ".1f") -> str:
    """Give a cell: what a rule loses in a row."""
    return f"{{ROW.{rule}_{measure}_lost:{form}}}"


def difference(first: str, second: str, measure: str, form: str = "+.1f") -> str:
    """Give a cell: by how much more a rule loses than another, with its interval."""
    return f"{{ROW.{first}_{measure}_lost.minus[{second}_{measure}_lost].interval:{form}}}"


def changed() -> str:
    """Say what the mark means, and what another version of the estimates changed in the same runs."""
    kinds = [
        ("tables", "tables", "accuracy_accuracy", ""),
        ("tables, by the loss,", "tables", "loss_noisy_loss", " %"),
        ("few positives", "few", "auc_auc", ""),
        ("few positives, by the loss,", "few", "loss_noisy_loss", " %"),
        ("numbers", "numbers", "loss_loss", " %"),
        ("texts", "texts", "accuracy_accuracy", ""),
    ]
    found = []
    for label, name, values, unit in kinds:
        rows = EVERY.query(f"not is_design and ({CONDITIONS[name]})")
        lost = rows.pivot(index="run", columns="version", values=f"expected_{values}_lost").dropna()
        if len(lost) and len(lost.columns) > 1:
            before, now = lost[ESTIMATES - 1].mean(), lost[ESTIMATES].mean()
            found.append(f"of {label} {before:.2f} and {now:.2f}{unit} ({len(lost)} runs)")
    return f"""
†: judged by version {ESTIMATES - 1} of the estimates, before predictions that are too sure of rare classes were mended.
Where both versions judged the same runs, the kept epoch lost, before and now, {", ".join(found)}."""


def told(part: str, text: str) -> str:
    """Say something of runs, if there are any."""
    return text if NAMES[part].count else ""


SIZES = {
    "minilm_body": ("MiniLM", "22 million weights", "fine-tuned"),
    "resnet18_lite0": ("ResNet-18", "11 million", "from scratch"),
    "pretrained_lite0": ("EfficientNet-Lite0", "5 million", "fine-tuned"),
    "tuned_lite0": ("a ResNet", "5 million", "fine-tuned"),
    "transformer": ("FT-Transformer", "1 million", "from scratch"),
}  # the largest networks first
ROWS_OF = {"classes": "large", "few positives": "few_large", "numbers": "numbers_large"}


def sizes() -> str:
    """Say how large the networks and the tables were."""
    tried = [f"{', '.join(what)} ({NAMES[name].count} runs)" for name, what in SIZES.items() if NAMES[name].count > 1]
    rows = [
        f"{label} {NAMES[name].frame['n'].max():,} ({NAMES[name].count} runs)"
        for label, name in ROWS_OF.items()
        if NAMES[name].count
    ]
    told = {"The largest networks": tried, "The most rows in training": rows}
    return " ".join(f"{what}: {'; '.join(found)}." for what, found in told.items() if found)
