"""Train twins beside a run, to see how far the simulated twin is off on your problem.

    python examples/twins/twins.py                  # digits, 20 % of labels wrong, one minute
    python examples/twins/twins.py --label-noise 0  # an easy, clean task
    python examples/twins/twins.py --data FOLDER/mnist.npz

Put your own data into `samples`, and your own model into `network`. The rest stays.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lightning_sensitivity.functional import risk_estimate
from lightning_sensitivity.twins import initial_weights, twin

STRENGTH, NUM_TWINS = 0.5, 8  # of the simulated twin, as in RiskMonitor

parser = argparse.ArgumentParser(description="Compare the simulated twin with trained ones.")
parser.add_argument("--data", type=Path, help="an .npz file with x_train (uint8 images) and y_train; else digits")
parser.add_argument("--label-noise", type=float, default=0.2)
parser.add_argument("--num-train", type=int, default=500)
parser.add_argument("--max-epochs", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--quick", action="store_true", help="three epochs")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, their labels, a share of which is wrong, and true labels; more than twice ``--num-train``."""
    if args.data:
        with np.load(args.data) as file:
            x, true = torch.tensor(file["x_train"][:5000]) / 255, torch.tensor(file["y_train"][:5000])
    else:
        digits = load_digits()
        x, true = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, true = x[order].flatten(1), true[order]
    wrong = torch.rand(len(x)) < args.label_noise
    return x, torch.where(wrong, true + torch.randint(1, 10, true.shape), true) % 10, true


def network(num_inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


# %% The same start, three training sets of one size: the run's, a bootstrap sample of it, and other samples.
x, y, true = samples()
n = args.num_train
sets = {"run": torch.arange(n), "bootstrap": torch.randint(n, (n,)), "real": torch.arange(n, 2 * n)}
x_new, y_new, true_new = x[2 * n :], y[2 * n :], true[2 * n :]  # labels here only check the estimate
models = {name: network(x.shape[1]) for name in sets}
for model in models.values():
    model.load_state_dict(models["run"].state_dict())
optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()}
before, y_hot, y_new_hot = initial_weights(models["run"]), one_hot(y[:n], 10), one_hot(y_new, 10)

print("       true   estimate, with a twin that is  V of the twin that is     V that")
print("epoch  score  simulated  bootstrap   real  simulated  bootstr.   real  is exact  identity")
rows: list[list[float]] = []
for epoch in range(3 if args.quick else args.max_epochs):
    for name, model in models.items():
        for batch in sets[name][torch.randperm(n)].split(50):
            optimizers[name].zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizers[name].step()
    model, generator = models["run"], torch.Generator().manual_seed(0)
    with torch.no_grad():
        simulated, out, out_train = [], model(x_new), model(x[:n])
        for _ in range(NUM_TWINS):
            with twin(model, before, generator, STRENGTH):
                simulated.append(risk_estimate(out, model(x_new), out_train, y[:n], strength=STRENGTH))
        boot, real = (risk_estimate(out, models[name](x_new), out_train, y[:n]) for name in ("bootstrap", "real"))
        p, p_train, loss = out.softmax(1), out_train.softmax(1), cross_entropy(out, true_new)
    # R = B - (E_train |p|^2 - E |p|^2) + 2 (E_train p_y - E p_y), exactly
    score, train_score = (p - y_new_hot).square().sum(1).mean(), (p_train - y_hot).square().sum(1).mean()
    powers = p_train.square().sum(1).mean() - p.square().sum(1).mean()
    identity = train_score - powers + 2 * ((p_train * y_hot).sum(1).mean() - (p * y_new_hot).sum(1).mean())
    risk, *_, variance = torch.tensor(simulated).mean(0)
    rest = real.claim + real.overconfidence
    estimates = [risk, rest + 2 * boot.variance, real.risk]  # a bootstrap sample shares data with the run: 2 V
    variances = [variance, 2 * boot.variance, real.variance, score - rest]
    rows.append([float(value) for value in (score, *estimates, *variances, identity, loss)])
    line = "{:5d}  {:5.3f}  {:9.3f}  {:9.3f}  {:5.3f}  {:9.3f}  {:8.3f}  {:5.3f}  {:8.3f}  {:8.3f}"
    print(line.format(epoch, *rows[-1][:-1]))

# %%
table = np.array(rows)
losses = table[:, -1]
print("\nstop at the lowest ...        epoch  loss on true labels  estimate / true score there")
for index, name in enumerate(
    ("true score", "estimate, simulated twin", "estimate, bootstrap twin", "estimate, real twin")
):
    epoch = int(table[:, index].argmin())
    print(f"{name:29} {epoch:5d}  {losses[epoch]:19.3f}  {table[epoch, index] / table[epoch, 0]:27.2f}")
print(f"{'never':29} {len(losses) - 1:5d}  {losses[-1]:19.3f}")
print(f"{'loss on true labels':29} {losses.argmin():5d}  {losses.min():19.3f}")
