# %% [markdown]
# # Output sensitivity beside its peers: which score orders networks by their test loss and error?
#
# Kendall's τ with both, with 95 % bootstrap intervals over the networks, for each data set, over the whole zoo and over
# its two halves: scores may be designed on the first (every other network, from the first on), and are reported on the
# second. No single score s can be good at both unless loss and error agree: without ties
# τ(s, loss) + τ(s, error) ≤ 1 + τ(loss, error), by the triangle inequality of Kendall's distance.
#
#     pip install weightwatcher
#     python examples/studies/paper/peers.py --data FOLDER
#     python examples/studies/paper/peers.py --quick

# %%
import contextlib
import io
import math
import time
from argparse import Namespace
from collections.abc import Callable

import pandas as pd
import torch
from figures import TITLES, Report, legend_below, panels
from measure import PASS_SCORES, Subject, measure
from ranking import intervals, kendall, rank, written
from torch import Tensor
from torch.nn.functional import nll_loss, pad
from torch.nn.utils import parameters_to_vector
from zoo import QUICK, ZOO, Spec, parse_arguments

JACOBIAN_IMAGES = 1000
MOVED_IMAGES = 2000
MOVED: dict[tuple[str, Spec], Tensor] = {}  # for both scores of a network


# %% Scores of the weights
def weightwatcher(subject: Subject, summary: str) -> float:
    """Martin and Mahoney: the exponent α of the spectrum's tail, or α̂ = α · log10 λ_max, mean over the layers."""
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher as ww

        watcher = ww.WeightWatcher(model=subject.model.net, log_level="ERROR")
        return watcher.get_summary(watcher.analyze())[summary]


def alpha(subject: Subject) -> float:
    return weightwatcher(subject, "alpha")


def alpha_hat(subject: Subject) -> float:
    return weightwatcher(subject, "alpha_weighted")


@torch.no_grad()
def parameter_norm(subject: Subject) -> Tensor:
    return parameters_to_vector(subject.model.parameters()).norm()


@torch.no_grad()
def distance_from_start(subject: Subject) -> Tensor:
    start, end = (parameters_to_vector(model.parameters()) for model in (subject.untrained, subject.model))
    return (end - start).norm()


# %% Scores of the network on the test images
def jacobian_norm(subject: Subject, of_probabilities: bool) -> Tensor:
    """E‖J‖_F, J the derivative of all logits, or of the softmax of them, with respect to the input."""
    norms = []
    for x in subject.images.test_set.tensors[0][:JACOBIAN_IMAGES].split(250):
        x.requires_grad_()
        outputs = subject.model(x).softmax(1) if of_probabilities else subject.model(x)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in outputs.unbind(1)]
        norms.append(torch.stack(rows, 1).flatten(1).norm(dim=1))
    return torch.cat(norms).mean()


def jacobian_logits(subject: Subject) -> Tensor:
    return jacobian_norm(subject, of_probabilities=False)


def jacobian_softmax(subject: Subject) -> Tensor:
    """What Novak et al. (2018) use."""
    return jacobian_norm(subject, of_probabilities=True)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Images moved by whole pixels; the pixels of the edge are repeated in the gap."""
    height, width = images.shape[2:]
    padded = pad(images, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)), mode="replicate")
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, :, top : top + height, left : left + width]


def by_moved_images(subject: Subject) -> Tensor:
    """Expected loss and error, if labels were drawn from the network's own predictions for images moved by 2 pixels."""
    if (found := MOVED.get((subject.data, subject.spec))) is None:
        batches = subject.images.test_set.tensors[0][:MOVED_IMAGES].split(500)
        parts = []
        with torch.no_grad():
            for x in batches:
                log_p = subject.model(x).double().log_softmax(1)
                for move in ((2, 0), (-2, 0), (0, 2), (0, -2)):
                    labels = subject.model(shifted(x, *move)).double().softmax(1)
                    error = 1 - labels.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1)
                    parts.append(torch.stack([-(labels * log_p).sum(1), error], 1))
        found = MOVED[subject.data, subject.spec] = torch.cat(parts).mean(0)
    return found


def shift_loss(subject: Subject) -> Tensor:
    return by_moved_images(subject)[0]


def shift_error(subject: Subject) -> Tensor:
    return by_moved_images(subject)[1]


def forward(subject: Subject) -> float:
    """No score: CPU seconds of one pass over the test images, for the time of the others."""
    network, batches = subject.model, list(subject.images.val_dataloader())
    start = time.process_time()
    with torch.no_grad():
        for x, _ in batches:
            network(x)
    return time.process_time() - start


# A score of one's own is one more line here (of a Subject) or in measure.PASS_SCORES (of the outputs alone).
SUBJECT_SCORES: dict[str, Callable[[Subject], float | Tensor]] = {
    "shift_loss": shift_loss,
    "shift_error": shift_error,
    "jacobian_softmax": jacobian_softmax,
    "jacobian_logits": jacobian_logits,
    "alpha": alpha,
    "alpha_hat": alpha_hat,
    "parameter_norm": parameter_norm,
    "distance_from_start": distance_from_start,
}
CONSENSUS = ["consensus_loss", "consensus_error"]
SCORES = [*PASS_SCORES, *CONSENSUS, "sensitivity_untrained", *SUBJECT_SCORES, "parameters"]
SCORES.remove("equation9")  # orders as S does
# Passes over the test images; two, where it is not said.
PASSES = {"entropy": 1, "confidence": 1, **dict.fromkeys(CONSENSUS, 1), "parameters": 0}


# %%
def seconds(table: pd.DataFrame, score: str) -> float:
    """Median CPU time for a network, on one core."""
    if score in ("shift_loss", "shift_error"):  # the first of them that is asked for pays for both
        return (table["shift_loss_seconds"] + table["shift_error_seconds"]).median()
    if score in SUBJECT_SCORES:
        return table[f"{score}_seconds"].median()
    return PASSES.get(score, 2) * table["forward"].median()


def add_consensus(table: pd.DataFrame, specs: list[Spec], args: Namespace) -> pd.DataFrame:
    """Scores that need the other networks: all of the table."""
    data = table["data"][0]
    logits = {spec.name: Subject(spec, data, args.data, args.out).outputs.clean for spec in specs}
    log_p = {name: values.double().log_softmax(1) for name, values in logits.items()}
    errors = consensus_errors(log_p)
    losses = {name: consensus_loss(name, log_p) for name in log_p}
    return table.assign(
        consensus_loss=[losses[name] for name in table["network"]],
        consensus_error=[errors[name] for name in table["network"]],
    )


def consensus_errors(log_p: dict[str, Tensor]) -> dict[str, float]:
    """The expected error of each network if labels were drawn from the product of their calibrated votes.

    It is what `compare_models` computed up to version 0.3.0. A vote is as sure as the other networks agree with it.
    """
    predicted = torch.stack([values.argmax(1) for values in log_p.values()])
    joint = torch.zeros(())
    for values, own in zip(log_p.values(), predicted, strict=True):
        agreement = float(((predicted == own).sum(0) - 1).double().mean()) / (len(predicted) - 1)
        confidence = min(max(agreement, 1.2 / values.shape[1]), 0.995)
        low, high = 0.05, 20.0
        for _ in range(20):
            power = math.sqrt(low * high)
            is_unsure = float((power * values).softmax(1).amax(1).mean()) < confidence
            low, high = (power, high) if is_unsure else (low, power)
        joint = joint + (math.sqrt(low * high) * values).log_softmax(1).clamp(min=math.log(1e-12))
    p = joint.softmax(1)
    return {name: 1 - float(p.gather(1, values.argmax(1)[:, None]).mean()) for name, values in log_p.items()}


def consensus_loss(name: str, log_p: dict[str, Tensor]) -> float:
    """The loss of a network if labels were what the other networks predict."""
    losses = [nll_loss(log_p[name], log_p[other].argmax(1)) for other in log_p if other != name]
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    args = parse_arguments("Output sensitivity and its peers.")
    report = Report(args, "peers")
    zoo = QUICK if args.quick else ZOO
    design = [spec.name for spec in zoo[::2]]
    measured = [measure(zoo, data, args, SUBJECT_SCORES | {"forward": forward}) for data in args.names]
    tables = [add_consensus(table, zoo, args) for table in measured]
    truths = {"loss": "loss", "error": "error"}
    ranks, bounds = [], []
    for table in tables:
        data = table["data"][0]
        subsets = {
            "all": table,
            "without N(0, 1)": table[table["init"] != "normal"],
            "design half": table[table["network"].isin(design)],
            "report half": table[~table["network"].isin(design)],
        }
        for subset, part in subsets.items():
            ranked = rank(part, SCORES, truths).assign(data=data, networks=subset)
            ranks.append(ranked.assign(seconds=[seconds(table, score) for score in SCORES]))
            agreement = kendall(part["loss"], part["error"])
            bound = {"τ(loss, error)": str(agreement), "highest sum of two τ": f"{1 + agreement.value:.2f}"}
            bounds.append({"data": data, "networks": f"{subset} ({len(part)})"} | bound)
    ranks = pd.concat(ranks, ignore_index=True)

    figure, ((*axes,),) = panels(1, len(tables), 5.6, 5)
    for panel, table in zip(axes, tables, strict=True):
        data = table["data"][0]
        intervals(panel, ranks[(ranks["data"] == data) & (ranks["networks"] == "all")].reset_index(), truths)
        panel.set_title(f"{TITLES[data]}, {len(table)} networks")
    legend_below(figure, axes)
    report.figure(figure, ranks)

    for subset, part in ranks.groupby("networks", sort=False):
        columns = {"score": SCORES}
        for data, of_data in part.groupby("data"):
            strings = written(of_data, truths)
            columns |= {f"{data}: {truth}": strings[truth].to_list() for truth in truths}
            columns[f"{data}: CPU s"] = [f"{value:.3g}" for value in of_data["seconds"]]
        report.table(f"Kendall's τ, networks: {subset}", pd.DataFrame(columns))
    report.table("What a single score can reach (0.85 and 0.65 need a sum of 1.50)", pd.DataFrame(bounds))
    unfinished = [
        {"data": data, "epochs": epochs, "network": network, "training error": f"{training_error:.3f}"}
        for table in tables
        for data, network, epochs, training_error in table.loc[
            ~table["converged"], ["data", "network", "epochs", "training_error"]
        ].itertuples(index=False)
    ]
    report.table("Not below the authors' threshold when training ended", pd.DataFrame(unfinished))
