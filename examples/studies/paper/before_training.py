# %% [markdown]
# # Sensitivity before training against the loss after it
#
# The paper: S of the untrained network foretells the loss of the trained one.
#
#     python examples/studies/paper/before_training.py --data FOLDER
#     python examples/studies/paper/before_training.py --quick

# %%
import pandas as pd
from figures import TITLES, Report, legend_below, log_log, panels, points
from measure import measure
from ranking import rank, written
from zoo import QUICK, ZOO, parse_arguments

# %%
if __name__ == "__main__":
    args = parse_arguments("Sensitivity before training.")
    report = Report(args, "before_training")
    tables = [measure(QUICK if args.quick else ZOO, data, args) for data in args.names]

    figure, ((*axes,),) = panels(1, len(tables))
    for panel, table in zip(axes, tables, strict=True):
        points(panel, table, "sensitivity_untrained", "loss")
        log_log(panel, "S before training (logits²)", "test cross-entropy after (nats)")
        panel.set_title(TITLES[table["data"][0]])
    legend_below(figure, axes)
    report.figure(figure, pd.concat(tables))

    for table in tables:
        subsets = {
            "all": table,
            "without N(0, 1)": table[table["init"] != "normal"],
            "N(0, 1)": table[table["init"] == "normal"],
            "fully connected, default": table[(table["kind"] == "fully connected") & (table["init"] == "default")],
            "convolutional, default": table[(table["kind"] == "convolutional") & (table["init"] == "default")],
        }
        truths = {"loss after": "loss", "error after": "error", "S after": "sensitivity"}
        rows = [
            written(rank(part, ["sensitivity_untrained"], truths), truths).assign(score=f"{name} ({len(part)})")
            for name, part in subsets.items()
            if len(part) > 2
        ]
        report.table(
            f"{table['data'][0]}: Kendall's τ of S before training",
            pd.concat(rows).rename(columns={"score": "networks"}),
        )
