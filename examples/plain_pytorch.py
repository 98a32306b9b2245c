"""Sensitivity and the risk estimate in a plain PyTorch loop, without Lightning.

    python examples/plain_pytorch.py

The data are scikit-learn's digits, with 20 % of the training labels wrong. The loop below the model is what you copy.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import risk_estimate
from lightning_sensitivity.twins import initial_weights, twin

parser = argparse.ArgumentParser(description="Watch sensitivity and the risk estimate without Lightning.")
parser.add_argument("--max-epochs", type=int, default=40)
parser.add_argument("--label-noise", type=float, default=0.2)
args = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
order = torch.randperm(len(digits.images))
x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)[order]
y = torch.tensor(digits.target)[order]
x_train, y_train, x_new, y_new = x[:500], y[:500], x[500:], y[500:]  # y_new is for comparison alone
wrong = torch.rand(500) < args.label_noise
y_train = torch.where(wrong, y_train + torch.randint(1, 10, (500,)), y_train) % 10

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# The loop
NUM_TWINS, STRENGTH, SIGMA = 8, 0.5, 0.1
before = initial_weights(model)
print("epoch  estimate  claim  overconfidence  variance  sensitivity  true loss")
for epoch in range(args.max_epochs):
    for batch in torch.randperm(len(x_train)).split(50):
        optimizer.zero_grad()
        cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

    model.eval()
    generator = torch.Generator().manual_seed(0)  # the same noise in every epoch
    sensitivity = OutputSensitivity()
    with torch.no_grad():
        outputs, train_outputs = model(x_new), model(x_train)
        sensitivity.update(outputs, model(x_new + SIGMA * torch.randn(x_new.shape, generator=generator)))
        estimates = []
        for _ in range(NUM_TWINS):
            with twin(model, before, generator, STRENGTH):
                twin_outputs = model(x_new)
            estimates.append(
                torch.stack(risk_estimate(outputs, twin_outputs, train_outputs, y_train, strength=STRENGTH))
            )
    model.train()
    risk, claim, overconfidence, variance = torch.stack(estimates).mean(0).tolist()
    print(
        f"{epoch:5d}  {risk:8.3f}  {claim:5.3f}  {overconfidence:14.3f}  {variance:8.3f}"
        f"  {sensitivity.compute():11.2g}  {cross_entropy(outputs, y_new):9.3f}"
    )
