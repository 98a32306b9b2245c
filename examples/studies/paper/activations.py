# %% [markdown]
# # Activations that are not positive-homogeneous
#
# The paper's argument is for ReLU, which scales with its input. Does the loss follow the sensitivity with tanh, GELU
# and SiLU, too?
#
#     python examples/studies/paper/activations.py --data FOLDER
#     python examples/studies/paper/activations.py --quick

# %%
import pandas as pd
from figures import LOSS, SENSITIVITY, TITLES, Report, legend_below, log_log, panels
from measure import measure, shrunk
from ranking import rank, written
from zoo import ACTIVATIONS, SMOOTH, parse_arguments

SCORES = ["sensitivity", "sensitivity_centred", "variance", "flips", "entropy"]
TRUTHS = {"loss": "loss", "error": "error"}

# %%
if __name__ == "__main__":
    args = parse_arguments("Other activations.")
    report = Report(args, "activations")
    tables = [measure(shrunk(SMOOTH, args.quick), data, args) for data in args.names]

    figure, ((*axes,),) = panels(1, len(tables))
    for panel, table in zip(axes, tables, strict=True):
        table["body"] = table["network"].str.extract(r"^((?:fc|conv)\d+)", expand=False)
        for activation, color in zip(ACTIVATIONS, ("tab:blue", "tab:red", "tab:green", "tab:purple"), strict=True):
            panel.plot([], [], "o", color=color, label=activation)
            for network in table[table["activation"] == activation].itertuples():
                marker = {"fc4": "s", "fc2": "o", "conv3": "^"}[network.body]
                panel.plot(network.sensitivity, network.loss, marker, color=color, ms=7)
        for marker, body in (("o", "two fully connected"), ("s", "four fully connected"), ("^", "three convolutional")):
            panel.plot([], [], marker, color="gray", label=body)
        log_log(panel, SENSITIVITY, LOSS)
        panel.set_title(TITLES[table["data"][0]])
    legend_below(figure, axes)
    table = pd.concat(tables)
    report.figure(figure, table)

    columns = ["data", "body", "activation", "epochs", "training_error", "sensitivity", "loss", "equation9", "error"]
    report.table("Networks", table[columns].sort_values(["data", "body"]))
    for data, of_data in table.groupby("data"):
        for name, part in (("all", of_data), ("all but ReLU", of_data[of_data["activation"] != "relu"])):
            report.table(f"{data}, {name} ({len(part)}): Kendall's τ", written(rank(part, SCORES, TRUTHS), TRUTHS))
        bodies = [rank(part, ["sensitivity"], TRUTHS).assign(body=body) for body, part in of_data.groupby("body")]
        report.table(f"{data}: τ of S over the four activations of one body", pd.concat(bodies)[["body", *TRUTHS]])
