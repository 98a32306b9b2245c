# %% [markdown]
# # The classification error, which the paper leaves open
#
# Which score without labels, from the same two forward passes, orders networks by their test error? As they are, and
# with logits / T, where the temperature T is fitted to the labels of one half of the test images; everything calibrated
# is measured on the other half.
#
#     python examples/studies/paper/error.py --data FOLDER
#     python examples/studies/paper/error.py --quick

# %%
import pandas as pd
from figures import TITLES, Report, legend_below, log_ticks, panels, points
from measure import PASS_SCORES, measure
from ranking import intervals, kendall, rank, written
from zoo import QUICK, ZOO, parse_arguments

# %%
if __name__ == "__main__":
    args = parse_arguments("Scores without labels against the error.")
    report = Report(args, "error")
    tables = [measure(QUICK if args.quick else ZOO, data, args) for data in args.names]
    truths = {"loss": "loss", "error": "error"}
    calibrated_truths = {"calibrated loss": "loss_calibrated", "calibrated error": "error_calibrated"}
    ranks = []
    for table in tables:
        ranked = rank(table, PASS_SCORES, truths)
        calibrated = rank(table, [f"{score}_calibrated" for score in PASS_SCORES], calibrated_truths)
        ranks.append(pd.concat([ranked, calibrated.drop(columns="score")], axis=1).assign(data=table["data"][0]))

    figure, axes = panels(2, len(tables), 5.4, 3.6)
    for table, ranked, (top, bottom) in zip(tables, ranks, zip(*axes, strict=True), strict=True):
        intervals(top, ranked, ["loss", "error", "calibrated error"])
        points(bottom, table, "sensitivity_relative", "error")
        bottom.set(xscale="log", xlabel="relative sensitivity: centred S / variance of the logits", ylabel="test error")
        log_ticks(bottom.xaxis)
        bottom.grid(alpha=0.25)
        top.set_title(TITLES[table["data"][0]])
    legend_below(figure, [axes[0][0], *axes[1]])
    report.figure(figure, pd.concat(ranks))

    for table, ranked in zip(tables, ranks, strict=True):
        data = table["data"][0]
        report.table(f"{data}, all {len(table)} networks: Kendall's τ", written(ranked, [*truths, *calibrated_truths]))
        before, after = (kendall(table[f"loss{form}"], table[f"error{form}"]) for form in ("", "_calibrated"))
        report.say(f"τ of the loss with the error {before}, after temperature scaling {after}.")
        report.say(
            f"Temperature: median {table['temperature'].median():.3g}, highest {table['temperature'].max():.3g}."
        )
        subsets = {
            "without N(0, 1)": table["init"] != "normal",
            "fully connected": table["kind"] == "fully connected",
            "convolutional": table["kind"] == "convolutional",
            "regularized": table["kind"].isin(["dropout", "max-pooling", "batch norm"]),
        }
        for name, chosen in subsets.items():
            if chosen.sum() > 2:
                title = f"{data}, {name} ({chosen.sum()})"
                report.table(title, written(rank(table[chosen], PASS_SCORES, truths), truths))
