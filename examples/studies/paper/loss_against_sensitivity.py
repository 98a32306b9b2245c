# %% [markdown]
# # Loss against sensitivity: fully connected networks of growing width and depth, N(0, 1) initialization
#
# Equation 9 says L ≈ sqrt((K − 1)/K · S · C / 2) with C = E[x²] / σ². Do the networks lie on that line?
#
#     python examples/studies/paper/loss_against_sensitivity.py --data FOLDER
#     python examples/studies/paper/loss_against_sensitivity.py --quick

# %%
import numpy as np
import pandas as pd
from figures import LOSS, SENSITIVITY, TITLES, Report, legend_below, log_log, panels, points
from measure import measure, shrunk
from ranking import kendall
from zoo import FC_NORMAL, parse_arguments

from lightning_sensitivity.functional import loss_estimate

# What the authors' repository holds (https://github.com/mahf93/sensitivity, temp2.pkl, temp.pkl and temp3.pkl): means
# and standard deviations over ten runs of four hidden layers on CIFAR-10, by width, and the E[x²] of their notebook.
PUBLISHED = pd.DataFrame(
    {
        "width": [200, 300, 500],
        "sensitivity": [1.2706e8, 6.0827e8, 5.4838e9],
        "sensitivity_std": [3.632e7, 1.3993e8, 9.695e8],
        "loss": [35_511, 92_611, 317_055],
        "loss_std": [3_551, 4_439, 14_020],
    }
)
PUBLISHED_POWER = 0.2648

# %%
if __name__ == "__main__":
    args = parse_arguments("Loss against sensitivity.")
    report = Report(args, "loss_against_sensitivity")
    tables = [measure(shrunk(FC_NORMAL, args.quick), data, args) for data in args.names]

    figure, ((*axes,),) = panels(1, len(tables))
    for panel, table in zip(axes, tables, strict=True):
        data, factor = table["data"][0], table["factor"][0]
        points(panel, table, "sensitivity", "loss")
        for spec in table.itertuples():
            panel.annotate(
                f"{spec.fc_depth}×{spec.fc_width}",
                (spec.sensitivity, spec.loss),
                fontsize=7,
                xytext=(5, -8) if spec.fc_depth == 4 else (-24, 5),
                textcoords="offset points",
            )
        line = np.geomspace(table["sensitivity"].min() / 2, table["sensitivity"].max() * 2)
        panel.plot(line, [loss_estimate(s, factor, 1.0, 10) for s in line], "C7-", lw=1, label="Equation 9")
        if data == "cifar10":
            panel.errorbar(
                *PUBLISHED[["sensitivity", "loss"]].to_numpy().T,
                xerr=PUBLISHED["sensitivity_std"],
                yerr=PUBLISHED["loss_std"],
                fmt="C7o",
                mfc="none",
                ms=11,
                lw=1,
                label="published: 4×200, 4×300, 4×500, mean ± std of ten",
            )
        panel.margins(0.1)
        log_log(panel, SENSITIVITY, LOSS)
        panel.set_title(TITLES[data])
    legend_below(figure, axes)
    report.figure(figure, pd.concat(tables))

    for table in tables:
        table["estimate / loss"] = table["equation9"] / table["loss"]
        columns = [
            "network",
            "epochs",
            "training_error",
            "sensitivity",
            "loss",
            "equation9",
            "estimate / loss",
            "error",
        ]
        report.table(f"{table['data'][0]}, C = {table['factor'][0]:.2f}", table[columns])
        slope, _ = np.polyfit(np.log10(table["sensitivity"]), np.log10(table["loss"]), 1)
        ratio = table["estimate / loss"]
        report.say(f"Kendall's τ of S with the loss {kendall(table['sensitivity'], table['loss'])}")
        report.say(f"slope of log L over log S {slope:.2f} (Equation 9: 0.5)")
        report.say(f"estimate / loss: median {ratio.median():.2f}, {ratio.min():.2f} to {ratio.max():.2f}")
    published = loss_estimate(1.0, PUBLISHED_POWER, 0.1, 10).item() * np.sqrt(PUBLISHED["sensitivity"])
    report.say(f"\nEquation 9 / loss of the authors' means: {(published / PUBLISHED['loss']).round(2).tolist()}")
