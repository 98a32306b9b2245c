# %% [markdown]
# # Convolutional or fully connected layers added to a base classifier
#
# The base has one convolutional and one fully connected layer. Up to three more of either kind are added. The paper:
# convolutional ones lower the sensitivity and the loss, fully connected ones do not.
#
#     python examples/studies/paper/added_layers.py --data FOLDER
#     python examples/studies/paper/added_layers.py --quick

# %%
import pandas as pd
from figures import LOSS, SENSITIVITY, TITLES, Report, legend_below, log_ticks, panels
from measure import measure, shrunk
from zoo import ADDED_CONV, ADDED_FC, parse_arguments

QUANTITIES = {"sensitivity": SENSITIVITY, "loss": LOSS, "error": "test error (share)"}

# %%
if __name__ == "__main__":
    args = parse_arguments("Added layers.")
    report = Report(args, "added_layers")
    added = {"convolutional": shrunk(ADDED_CONV, args.quick), "fully connected": shrunk(ADDED_FC, args.quick)}
    tables = []
    for data in args.names:
        for layers, specs in added.items():
            table = measure(specs, data, args)
            tables.append(table.assign(layers=layers, added=table["conv_depth"] + table["fc_depth"] - 2))
    table = pd.concat(tables)

    figure, axes = panels(len(args.names), len(QUANTITIES), 4.2, 3.2)
    for data, row in zip(args.names, axes, strict=True):
        for panel, (quantity, label) in zip(row, QUANTITIES.items(), strict=True):
            for (layers, part), marker in zip(table[table["data"] == data].groupby("layers"), "so", strict=True):
                panel.plot(part["added"], part[quantity], f"{marker}-", label=f"{layers} layers added")
            panel.set(xlabel="added layers", xticks=range(4), ylabel=label, title=TITLES[data])
            if quantity != "error":
                panel.set_yscale("log")
                log_ticks(panel.yaxis)
            panel.grid(alpha=0.25)
    legend_below(figure, axes[0])
    report.figure(figure, table)

    report.table("Added layers", table[["data", "layers", "added", "epochs", "sensitivity_stderr", *QUANTITIES]])
    lower = []
    for data, part in table.groupby("data"):
        by_count = part.pivot_table(index="added", columns="layers", values=list(QUANTITIES)).loc[1:]
        ratio = {q: by_count[q]["convolutional"] / by_count[q]["fully connected"] for q in QUANTITIES}
        lower.append({"data": data} | {q: ", ".join(f"{value:.2f}" for value in ratio[q]) for q in QUANTITIES})
    report.table("One, two, three convolutional layers added / as many fully connected ones", pd.DataFrame(lower))
