# %% [markdown]
# # Cross-entropy against the mean square error: L ≈ sqrt(L_MSE / 2)
#
# The paper's chain needs it between the variance term, which belongs to a square error, and the cross-entropy. It does
# not hold for every square error, so three are tried: of the class-average of the logits (what S sees, target 1 / K),
# of the logits (averaged over the classes, target one-hot; summed over them it is ten times as much, and the estimate
# √10 times), and of the probabilities (summed over the classes: the Brier score).
#
#     python examples/studies/paper/cross_entropy_and_mse.py --data FOLDER
#     python examples/studies/paper/cross_entropy_and_mse.py --quick

# %%
import numpy as np
import pandas as pd
from figures import LOSS, TITLES, Report, legend_below, log_log, panels, points
from measure import measure
from ranking import kendall
from zoo import QUICK, ZOO, parse_arguments

ERRORS = {"mse_average": "class-average", "mse_logits": "logits, mean over classes", "brier": "probabilities, sum"}

# %%
if __name__ == "__main__":
    args = parse_arguments("Cross-entropy against the mean square error.")
    report = Report(args, "cross_entropy_and_mse")
    tables = [measure(QUICK if args.quick else ZOO, data, args) for data in args.names]

    figure, axes = panels(len(tables), len(ERRORS), 4.2, 3.4)
    for table, row in zip(tables, axes, strict=True):
        for panel, (column, label) in zip(row, ERRORS.items(), strict=True):
            table[f"{column}_root"] = np.sqrt(table[column] / 2)
            points(panel, table, f"{column}_root", "loss")
            line = [table["loss"].min() / 2, table["loss"].max() * 2]
            panel.plot(line, line, "C7-", lw=1, label="L = sqrt(L_MSE / 2)")
            roots = table[f"{column}_root"]
            panel.set(xlim=(roots.min() / 2, roots.max() * 2), ylim=line)
            log_log(panel, f"sqrt(L_MSE / 2), {label}", LOSS)
            panel.set_title(TITLES[table["data"][0]])
    legend_below(figure, axes[0])
    report.figure(figure, pd.concat(tables))

    for table in tables:
        rows = []
        for name, part in [("all", table), *table.groupby("kind")]:
            values: dict[str, object] = {"networks": f"{name} ({len(part)})"}
            for column, label in ERRORS.items():
                ratio = part["loss"] / part[f"{column}_root"]
                values[label] = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
            rows.append(values)
        report.table(f"{table['data'][0]}: loss / sqrt(L_MSE / 2), median (least to most)", pd.DataFrame(rows))
        for column, label in ERRORS.items():
            report.say(f"Kendall's τ of the loss with L_MSE, {label}: {kendall(table[column], table['loss'])}")
