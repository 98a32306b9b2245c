"""The risk criterion and output sensitivity in a plain PyTorch loop, without Lightning.

    python examples/plain_pytorch.py

The data are scikit-learn's digits, with 40 % noisy training labels. Copy the loop below the model.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from lightning_sensitivity import OutputSensitivity, RiskEstimate
from lightning_sensitivity.functional import fit_reference, principal_components
from lightning_sensitivity.model.twins import copy_weights, twin_weights

parser = argparse.ArgumentParser(description="Watch sensitivity and the risk criterion without Lightning.")
parser.add_argument("--max-epochs", type=int, default=25)
args = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)

digits = load_digits()
order = torch.randperm(len(digits.images))
x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)[order]
y = torch.tensor(digits.target)[order]
x_train, x_new, y_new = x[:500], x[500:], y[500:]  # y_new is only for comparison
y_train = torch.where(torch.rand(500) < 0.4, y[:500] + torch.randint(1, 10, (500,)), y[:500]) % 10

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

# The loop
NUM_TWINS, STRENGTH, SIGMA = 4, 0.5, 0.1
initial = copy_weights(model.state_dict())
num_weights = sum(weight.numel() for weight in model.parameters())
features, new_features = principal_components(x_train, x_new)
reference = fit_reference(features, one_hot(y_train, 10), new_features)
print(f"About {reference.noise:.0%} of the training labels look wrong.\n")
risk = RiskEstimate(strength=STRENGTH, num_training=len(x_train), num_weights=num_weights, reference=reference)
history = []
print("epoch  criterion  sensitivity ± its error  true accuracy")
for epoch in range(args.max_epochs):
    for batch in torch.randperm(len(x_train)).split(50):
        optimizer.zero_grad()
        cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

    model.eval()
    generator = torch.Generator().manual_seed(0)  # the same noise in every epoch
    risk.reset()
    sensitivity = OutputSensitivity()
    with torch.no_grad():
        outputs = model(x_new)
        sensitivity.update(outputs, model(x_new + SIGMA * torch.randn(x_new.shape, generator=generator)))
        twins = [twin_weights(model, initial, generator, STRENGTH) for _ in range(NUM_TWINS)]
        twin_outputs = [functional_call(model, weights, x_new) for weights in twins]
        risk.update(outputs, twin_outputs, reference=reference.predictions)
        risk.update_training(model(x_train), y_train)
    model.train()
    criterion = float(risk.compute()["risk_criterion"])
    accuracy = float((outputs.argmax(1) == y_new).float().mean())
    history.append((criterion, epoch, accuracy))
    print(f"{epoch:5d}  {criterion:9.3f}  {sensitivity.compute():11.2g} ± {sensitivity.stderr:.1g}  {accuracy:18.3f}")

_, epoch, accuracy = min(history)
best, last = max(each[2] for each in history), history[-1][2]
print(f"Lowest criterion in epoch {epoch}: accuracy {accuracy:.3f}; last epoch {last:.3f}, best epoch {best:.3f}.")
by_reference = float((reference.predictions.argmax(1) == y_new).float().mean())
print(f"The reference by itself: {by_reference:.3f}. Where it is better than the network, use it instead.")
