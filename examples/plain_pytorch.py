"""Output sensitivity, and when to stop, in a plain PyTorch loop, without Lightning.

    python examples/plain_pytorch.py

The data are scikit-learn's digits, with 40 % noisy training labels. Copy the loop below the model.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_sensitivity import OutputSensitivity, RefinedScore
from lightning_sensitivity.functional import fit_reference

parser = argparse.ArgumentParser(description="Watch sensitivity and the score against a reference without Lightning.")
parser.add_argument("--max-epochs", type=int, default=25)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
torch.set_num_threads(1)

digits = load_digits()
order = torch.randperm(len(digits.images))
x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
y = torch.tensor(digits.target)[order]
x_train, x_new, y_new = x[:500], x[500:], y[500:]  # y_new is only for comparison
y_train = torch.where(torch.rand(500) < 0.4, y[:500] + torch.randint(1, 10, (500,)), y[:500]) % 10

hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

# The reference, a small model of the training labels, stands in for labels of the new images. It is fitted once.
reference = fit_reference(x_train, y_train, x_new)
assert reference.is_trusted, "it sees too little of the inputs: fit it to features, (N, D), of a pretrained network"
print(f"About {reference.unexplained:.0%} of the training labels can't be explained.\n")

history = []
print("epoch  score against the reference  sensitivity ± its error  true accuracy")
for epoch in range(args.max_epochs):
    for batch in torch.randperm(len(x_train)).split(50):
        optimizer.zero_grad()
        cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

    model.eval()
    generator = torch.Generator().manual_seed(0)  # the same noise in every epoch
    score, sensitivity = RefinedScore(), OutputSensitivity()
    with torch.no_grad():
        outputs = model(x_new)
        score.update(outputs, reference.predictions)  # or labels, if there are some
        sensitivity.update(outputs, model(x_new + 0.1 * torch.randn(x_new.shape, generator=generator)))
    model.train()
    accuracy = float((outputs.argmax(1) == y_new).float().mean())
    history.append((float(score.compute()), epoch, accuracy))
    print(f"{epoch:5d}  {score.compute():27.3f}  {sensitivity.compute():11.2g} ± {sensitivity.stderr:.1g}", end="")
    print(f"  {accuracy:18.3f}")

_, epoch, accuracy = min(history)
best, last = max(each[2] for each in history), history[-1][2]
print(f"Lowest score in epoch {epoch}: accuracy {accuracy:.3f}; last epoch {last:.3f}, best epoch {best:.3f}.")
by_reference = float((reference.predictions.argmax(1) == y_new).float().mean())
print(f"The reference by itself: {by_reference:.3f}. Where it is better than the network, use it instead.")
