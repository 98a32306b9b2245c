# %% [markdown]
# # The bias-variance decomposition itself
#
# Four cheap kinds of network are trained on five disjoint sets of 1,000 samples, each from initial weights of its own,
# and the fully connected ones also all from the same. Variance over the five (unbiased), and bias² as what is left of
# the mean square error, are taken of three outputs: the class-average of the logits, which S sees (target 1 / K); the
# logits (mean over the classes, target one-hot); the probabilities (sum over the classes: the Brier score). Beside the
# variance stands what the sensitivity of that output says of it, S · C and its likes, averaged over the five networks.
#
#     python examples/studies/paper/bias_variance.py --data FOLDER
#     python examples/studies/paper/bias_variance.py --quick

# %%
import numpy as np
import pandas as pd
import torch
from figures import TITLES, Report, legend_below, log_log, panels
from measure import Outputs, Subject, measure, sensitivity, shrunk, variance
from torch.nn.functional import one_hot
from zoo import Spec, parse_arguments

from lightning_sensitivity.functional import output_sensitivity

FULLY_CONNECTED = [Spec(2, 100), Spec(4, 100), Spec(4, 100, init="normal")]
CONVOLUTIONAL = [Spec(conv_depth=2)]
BODIES = [*FULLY_CONNECTED, *CONVOLUTIONAL]
OUTPUTS = {
    "class-average": (lambda o: o.clean.mean(1, keepdim=True), lambda o: o.factor * sensitivity(o)),
    "logits": (lambda o: o.clean, lambda o: o.factor * output_sensitivity(o.clean, o.noisy, per_output=True)),
    "probabilities": (lambda o: o.probabilities * 10**0.5, variance),  # a sum over the classes, as a mean over them
}


# %%
def variance_over_sets(predictions: torch.Tensor) -> float:
    return float(predictions.var(0).mean())


def jackknife(predictions: torch.Tensor) -> float:
    """Standard error of the variance over training sets."""
    rest = [variance_over_sets(torch.cat([predictions[:i], predictions[i + 1 :]])) for i in range(len(predictions))]
    return float(np.sqrt((len(rest) - 1) * np.var(rest)))


def decompose(networks: list[Outputs], labels: torch.Tensor) -> list[dict[str, object]]:
    rows = []
    for name, (output, prediction) in OUTPUTS.items():
        predictions = torch.stack([output(outputs) for outputs in networks])
        target = one_hot(labels, 10) * (10**0.5 if name == "probabilities" else 1)
        target = target.double().mean(1, keepdim=True) if name == "class-average" else target
        total, spread = float((predictions - target).square().mean()), variance_over_sets(predictions)
        said = np.array([float(prediction(outputs)) for outputs in networks])
        row = {"output": name, "mse": total, "variance": spread, "variance_stderr": jackknife(predictions)}
        row |= {"bias2": total - spread, "variance_share": spread / total}
        row |= {"s_c": said.mean(), "s_c_low": said.min(), "s_c_high": said.max()}
        rows.append(row)
    return rows


# %%
if __name__ == "__main__":
    args = parse_arguments("Bias and variance over training sets.")
    report = Report(args, "bias_variance")
    folds = range(3 if args.quick else 5)
    rows: list[dict[str, object]] = []
    for data in args.names:
        for varied in ("training set and weights", "training set"):
            for body in shrunk(BODIES if varied != "training set" else FULLY_CONNECTED, args.quick):
                specs = [body._replace(fold=fold, seed=fold * (varied != "training set")) for fold in folds]
                table = measure(specs, data, args)
                subjects = [Subject(spec, data, args.data, args.out) for spec in specs]
                common = {"data": data, "varied": varied, "network": body.name.removesuffix("-s0")}
                common |= {"loss": table["loss"].mean(), "error": table["error"].mean()}
                decomposed = decompose([subject.outputs for subject in subjects], subjects[0].labels)
                rows += [common | row for row in decomposed]
    table = pd.DataFrame(rows)

    figure, axes = panels(len(args.names), len(OUTPUTS), 4.4, 3.6)
    for data, row in zip(args.names, axes, strict=True):
        for panel, output in zip(row, OUTPUTS, strict=True):
            part = table[(table["data"] == data) & (table["output"] == output)]
            for index, (network, of_network) in enumerate(part.groupby("network", sort=False)):
                panel.plot([], [], "s", color=f"C{index}", label=network)
                for point in of_network.itertuples():
                    panel.errorbar(
                        point.s_c,
                        point.variance,
                        xerr=[[point.s_c - point.s_c_low], [point.s_c_high - point.s_c]],
                        yerr=min(point.variance_stderr, 0.99 * point.variance),
                        fmt="o",
                        color=f"C{index}",
                        mfc="none" if point.varied == "training set" else f"C{index}",
                        lw=1,
                    )
            line = np.array([part[["s_c", "variance"]].min().min() / 2, part[["s_c", "variance"]].max().max() * 2])
            panel.plot(line, line, "C7-", lw=1, label="variance = S · C")
            panel.plot([], [], "o", color="gray", mfc="none", label="same initial weights")
            panel.plot([], [], "o", color="gray", label="different initial weights")
            xlim, ylim = ((part[column].min() / 2, part[column].max() * 2) for column in ("s_c", "variance"))
            panel.set(xlim=xlim, ylim=ylim)
            log_log(panel, f"S · C, {output}", "variance over training sets")
            panel.set_title(TITLES[data])
    legend_below(figure, axes[0], 5)
    table["variance / s_c"] = table["variance"] / table["s_c"]
    report.figure(figure, table)

    columns = ["network", "loss", "error", "bias2", "variance", "variance_stderr", "variance_share", "s_c"]
    for keys, part in table.groupby(["data", "varied", "output"], sort=False):
        report.table(", ".join(keys), part[[*columns, "variance / s_c"]])
