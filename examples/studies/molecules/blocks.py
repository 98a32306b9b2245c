"""What pages tell of molecules with several labels."""

from pathlib import Path

from summaries import Runs, Values, across, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
SETS = {"tox21": "tox21", "SIDER": "sider", "ClinTox": "clintox"}
MLPS = RUNS.where("kind == 'mlp'")
NAMES: dict[str, object] = {name: MLPS.where(f"set == '{name}'") for name in SETS.values()}
NAMES |= {"all": MLPS, "chemprop": RUNS.where("kind == 'chemprop'")}
ABOUT = "{{{name}.num_labels:.0f}} labels, {{{name}.unknown:.0f}} % unknown ({{{name}.count}})"
ROWS = {f"{label}: {ABOUT.format(name=name)}": name for label, name in SETS.items()} | {"**all** ({all.count})": "all"}
CHEMPROP = {"chemprop ({chemprop.count})": "chemprop"}
RULES = {
    "last epoch": "never",
    "**expected AUROC**": "expected_auroc",
    "expected loss": "expected_loss",
    "a tenth, its AUROC": "tenth",
}
LOST = across(RULES, "{ROW.COLUMN_auroc_lost:.1f}")
LEVEL = {
    "level of it off": "{ROW.auroc_level_error:.1f}",
    "of the loss, %": "{ROW.loss_level_error:.0f}",
}
LOSS = across({"last epoch": "never", "**expected loss**": "expected_loss"}, "{ROW.COLUMN_loss_lost:.0f}")
ITSELF = {
    "labels told, of all": "{ROW.num_told:.1f} of {ROW.num_labels:.0f}",
    "AUROC of these: the network, at its best": "{ROW.told_auroc:.0f}",
    "the reference": "{ROW.reference_auroc:.0f}",
    "seconds for a fit, one thread": "{ROW.fit_seconds:.0f}",
}
SPREAD = "{ROW.COLUMN_auroc_lost.stderr:.2f}, {ROW.COLUMN_auroc_lost.worst:.1f}"


def met(ours: Values, limit: float) -> str:
    return f"{ours:.1f} | {limit:.1f} | {'yes' if ours.mean <= limit else '**no**'}"


BLOCKS = {
    "molecules: asked for": "\n".join(
        [
            "| asked for, points of AUROC | came | at most | met |",
            "|---|---|---|---|",
            f"| lost, as by a tenth's | {met(MLPS.expected_auroc_auroc_lost, float(MLPS.tenth_auroc_lost.mean))} |",
            f"| level off | {met(MLPS.auroc_level_error, 4)} |",
        ]
    ),
    "molecules: AUROC lost": table("AUROC lost, points", ROWS | CHEMPROP, LOST | LEVEL),
    "molecules: in words": """
By fingerprints of three sets of molecules, in {all.count} runs of MLPs, the epoch of the highest expected AUROC loses
{all.expected_auroc_auroc_lost:.1f} points, the last {all.never_auroc_lost:.1f}, that of a tenth of the labels
{all.tenth_auroc_lost:.1f}; what is expected is {all.auroc_level_error:.1f} points off. In {chemprop.count} runs of
chemprop it is {chemprop.expected_auroc_auroc_lost:.1f}, {chemprop.never_auroc_lost:.1f},
{chemprop.tenth_auroc_lost:.1f} and {chemprop.auroc_level_error:.1f}.""",
    "molecules: loss": table("loss above the lowest, %", ROWS | CHEMPROP, LOSS),
    "molecules: spread": table("standard error, worst", ROWS, across(RULES, SPREAD)),
    "molecules: differences": table(
        "expected AUROC minus, points [95 %]",
        ROWS,
        across(
            {"last epoch": "never", "a tenth": "tenth"},
            "{ROW.expected_auroc_auroc_lost.minus[COLUMN_auroc_lost].interval:+.1f}",
        ),
    ),
    "molecules: by itself": table("means over runs", ROWS, ITSELF),
}
