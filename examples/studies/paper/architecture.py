# %% [markdown]
# # Depth against width, regularization, initialization
#
# The paper: depth rather than width, batch norm, dropout and max-pooling, and initialization techniques lower the
# sensitivity, and with it the loss. Everything is drawn in the plane of the two; what was switched on is a point for
# each pair of networks with and without it, at the ratios of their sensitivities and losses.
#
#     python examples/studies/paper/architecture.py --data FOLDER
#     python examples/studies/paper/architecture.py --quick
#     python examples/studies/paper/architecture.py --draw         # the figure alone, from results/architecture.csv

# %%
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from figures import LOSS, SENSITIVITY, TITLES, Report, legend_below, log_log, panels, save
from matplotlib.figure import Figure
from measure import measure, shrunk
from zoo import DEPTH_WIDTH, INITS, REGULARIZED, Spec, parse_arguments

QUANTITIES = ["sensitivity", "loss", "error"]
TECHNIQUES = {"batch_norm": "batch norm", "dropout": "dropout", "pool": "max-pooling"}


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Each network that has a technique beside the one that lacks only this, with the ratios of what was measured."""
    by_spec = {tuple(row[field] for field in Spec._fields): row for _, row in table.iterrows()}
    rows = []
    for spec, with_it in by_spec.items():
        for field, technique in TECHNIQUES.items():
            without = by_spec.get(tuple(Spec(*spec)._replace(**{field: Spec._field_defaults[field]})))
            if with_it[field] and without is not None:
                row = {"data": with_it["data"], "technique": technique, "network": with_it["network"]}
                row |= {f"{q}_ratio": with_it[q] / without[q] for q in QUANTITIES}
                row |= {f"{q}_{when}": of[q] for q in QUANTITIES for when, of in (("off", without), ("on", with_it))}
                rows.append(row)
    return pd.DataFrame(rows)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Least squares of log quantity over log depth and log width, ± standard errors."""
    design = np.column_stack([np.log(table["fc_depth"]), np.log(table["fc_width"]), np.ones(len(table))])
    rows = []
    for quantity in QUANTITIES:
        fitted, (residual,), *_ = np.linalg.lstsq(design, np.log(table[quantity]))
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * residual / (len(table) - 3))
        depth, width, _ = (f"{value:+.2f} ± {error:.2f}" for value, error in zip(fitted, errors, strict=True))
        rows.append({"quantity": quantity, "depth": depth, "width": width})
    return pd.DataFrame(rows)


def pairs_of_all(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs of each data set."""
    return pd.concat([pairs(part) for _, part in table[table["experiment"] == "regularization"].groupby("data")])


def draw(table: pd.DataFrame) -> Figure:
    """A row of panels for each data set."""
    switched, names = pairs_of_all(table), list(table["data"].unique())
    figure, axes = panels(len(names), 3, 4.4, 3.6)
    for data, (grid, ratios, starts) in zip(names, axes, strict=True):
        parts = dict(list(table[table["data"] == data].groupby("experiment")))
        for (width, part), marker in zip(parts["depth and width"].groupby("fc_width"), "osD", strict=False):
            grid.plot(part["sensitivity"], part["loss"], f"{marker}-", label=f"width {width}", ms=5)
            for network in part.itertuples():
                offset = {"xytext": (4, 3), "textcoords": "offset points"}
                grid.annotate(str(network.fc_depth), (network.sensitivity, network.loss), fontsize=8, **offset)
        for technique, style in zip(TECHNIQUES.values(), ("C3o", "C2s", "C4^"), strict=True):
            of_it = switched[(switched["data"] == data) & (switched["technique"] == technique)]
            ratios.plot(of_it["sensitivity_ratio"], of_it["loss_ratio"], style, label=f"{technique} switched on")
        ratios.axvline(1, color="C7", linewidth=1)
        ratios.axhline(1, color="C7", linewidth=1)
        for network in parts["initialization"].itertuples():
            layers, color = ("convolutional", "C1") if network.conv_depth else ("fully connected", "C0")
            marker = {"default": "o", "kaiming": "s", "normal": "^"}[network.init]
            label = f"{layers}, {network.init}"
            starts.plot(network.sensitivity, network.loss, marker, color=color, label=label, ls="", alpha=0.8)
        for panel, title in zip(
            (grid, ratios, starts), ("number: depth", "with / without", "initialization"), strict=True
        ):
            names_of_axes = ("ratio of S", "ratio of the losses") if panel is ratios else (SENSITIVITY, LOSS)
            log_log(panel, *names_of_axes)
            panel.set_title(f"{TITLES[data]}, {title}")
            panel.margins(0.15)
    legend_below(figure, axes[0])
    return figure


# %%
if __name__ == "__main__":
    if "--draw" in sys.argv:
        file = Path(__file__).parent / "results" / "architecture.csv"
        save(draw(pd.read_csv(file)), file.with_suffix(".png"))
        sys.exit()
    args = parse_arguments("Depth and width, regularization, initialization.")
    report = Report(args, "architecture")
    groups = {"depth and width": DEPTH_WIDTH, "regularization": REGULARIZED, "initialization": INITS}
    tables = [
        measure(shrunk(specs, args.quick), data, args).assign(experiment=experiment)
        for data in args.names
        for experiment, specs in groups.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    report.figure(draw(table), table)

    switched = pairs_of_all(table)
    report.table("Switched on / off", switched[["data", "technique", "network", *[f"{q}_ratio" for q in QUANTITIES]]])
    lower = []
    for (data, technique), part in switched.groupby(["data", "technique"]):
        ratios = part[[f"{q}_ratio" for q in QUANTITIES]].set_axis(QUANTITIES, axis=1)
        means = {q: f"{np.exp(np.log(ratios[q]).mean()):.2f} ({(ratios[q] < 1).sum()})" for q in QUANTITIES}
        lower.append({"data": data, "technique": technique, "pairs": len(part)} | means)
    report.table("Geometric mean of the ratios (in how many pairs it is below 1)", pd.DataFrame(lower))
    for (data, experiment), part in table[table["experiment"] != "regularization"].groupby(["data", "experiment"]):
        report.table(f"{data}, {experiment}", part[["network", "parameters", "epochs", "training_error", *QUANTITIES]])
        if experiment == "depth and width":
            report.table(f"{data}: exponents of depth and width", exponents(part))
