"""The runs of the check half by what they are, for the report of this study and for the guide."""

from pathlib import Path
from typing import Any

import pandas as pd
from summaries import Runs

FOUND = Runs.read(Path(__file__).with_name("results.csv")).frame
SHARES = FOUND["kind"].str.extract(r"(\d+) % (?:wrong|redrawn)")[0].astype(float)  # percent of the labels
LEADS = (FOUND["reference_accuracy"] > FOUND["chosen_accuracy"]).astype(float)  # over the network's chosen epoch
ALL = Runs(pd.concat([FOUND, SHARES.rename("share"), LEADS.rename("reference_leads")], axis=1))
CHECK = ALL.where("not is_design")
CONDITIONS = {
    "tables": "pool == 'tables'",
    "as_they_are": "pool == 'tables' and not is_redrawn",
    "fifth": "pool == 'tables' and is_redrawn",
    "large": "pool == 'large'",
    "few": "pool == 'few'",
    "few_plain": "pool == 'few' and way == 'plain'",
    "few_weights": "pool == 'few' and way == 'weights'",
    "few_sampler": "pool == 'few' and way == 'sampler'",
    "numbers": "pool == 'numbers'",
    "clear": "pool == 'numbers' and not kind.str.contains('noisy')",
    "noisy": "pool == 'numbers' and kind.str.contains('noisy')",
    "series": "pool == 'series'",
    "photos": "pool == 'photos'",
    "photos_9": "pool == 'photos' and share < 25",
    "photos_40": "pool == 'photos' and share > 25",
    "texts": "pool == 'texts' and kind.str.contains('by people')",
    "rules": "pool == 'texts' and kind.str.contains('by rules')",
    "signals": "pool == 'signals'",
    "correct": "pool == 'redrawn' and not is_redrawn",
    "redrawn": "pool == 'redrawn' and is_redrawn",
    "redrawn_20": "pool == 'redrawn' and share == 20",
    "redrawn_40": "pool == 'redrawn' and share == 40",
    "tuned": "pool == 'tuned' and not given_features",
    "tuned_features": "pool == 'tuned' and given_features",
    "pretrained": "pool == 'pretrained' and not given_features",
    "pretrained_features": "pool == 'pretrained' and given_features",
    "pretrained_all": "pool == 'pretrained' and given_features and kind.str.contains('all weights')",
    "pretrained_head": "pool == 'pretrained' and given_features and kind.str.contains('head')",
}
NAMES: dict[str, Any] = {name: CHECK.where(condition) for name, condition in CONDITIONS.items()}
NAMES |= {f"{name}_new": runs.where("is_new") for name, runs in NAMES.items()}  # judged after the labels' worth was set
NAMES |= {"all": ALL, "check": CHECK, "design": ALL.where("is_design")}
COMPARED = Runs.read(Path(__file__).with_name("compared.csv"))
NAMES["alike"] = COMPARED.where("pool == 'alike'")
NAMES["photos_alike"] = COMPARED.where("pool == 'photos_alike'")
CLASSES = {
    "tables": "as_they_are",
    "tables, a fifth of the labels redrawn": "fifth",
    "large tables": "large",
    "few positives": "few",
    "photos, human labels": "photos",
    "texts, human labels": "texts",
    "texts, rule-generated labels": "rules",
    "signals": "signals",
    "pretrained network": "pretrained",
    "pretrained network, `features=`": "pretrained_features",
    "fine-tuning": "tuned",
    "fine-tuning, `features=`": "tuned_features",
    "20 or 40 % redrawn": "redrawn",
    "the same data, correct labels": "correct",
}


def counted(rows: dict[str, str]) -> dict[str, str]:
    """Add the numbers of runs to the labels of rows, and leave out rows of which no run was recorded."""
    return {f"{label} ({{{name}.count}})": name for label, name in rows.items() if NAMES[name].count}


def lost(rule: str, measure: str, form: str = ".1f") -> str:
    """Give a cell: what a rule loses in a row."""
    return f"{{ROW.{rule}_{measure}_lost:{form}}}"


def difference(first: str, second: str, measure: str, form: str = "+.1f") -> str:
    """Give a cell: by how much more a rule loses than another, with its interval."""
    return f"{{ROW.{first}_{measure}_lost.minus[{second}_{measure}_lost].interval:{form}}}"
