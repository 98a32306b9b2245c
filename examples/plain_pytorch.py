"""What to expect on unlabelled samples, and output sensitivity, in a plain PyTorch loop, without Lightning.

    python examples/plain_pytorch.py  # a quarter of a minute

The data are scikit-learn's breast cancer table; a fifth of the labels is wrong. Copy the loop below the model.
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_sensitivity import OutputSensitivity, Reference
from lightning_sensitivity.functional import expected_loss, expected_metric

parser = argparse.ArgumentParser(description="Watch the expected loss and sensitivity without Lightning.")
parser.add_argument("--max-epochs", type=int, default=25)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
torch.set_num_threads(1)

table = load_breast_cancer()
order = torch.randperm(len(table.data))
x = torch.tensor(table.data, dtype=torch.float32)[order]
x = (x - x[:300].mean(0)) / x[:300].std(0)
correct = torch.tensor(table.target)[order]
y = torch.where(torch.rand(len(x)) < 0.2, 1 - correct, correct)
x_train, y_train, x_new, y_new = x[:300], y[:300], x[300:], y[300:]  # y_new is only for comparison

model = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# The reference, a small model of the training labels, stands in for labels of the new rows. It is fitted once.
reference = Reference().fit(x_train, y_train)
assert reference.is_trusted_, "it has learned nothing: fit it to features, (N, D), of a pretrained network"
print(f"{reference}: left out, it predicts {reference.accuracy_:.0%} of the training labels.")
print(f"About {reference.unexplained_:.0%} of them can't be explained.\n")
q = torch.tensor(reference.predict_proba(x_new))
accuracy = MulticlassAccuracy(2, average="micro")  # or any other metric of torchmetrics

history = []
print("epoch  expected loss  loss  expected accuracy  accuracy  sensitivity ± its error")
for epoch in range(args.max_epochs):
    for batch in torch.randperm(len(x_train)).split(30):
        optimizer.zero_grad()
        cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

    model.eval()
    generator = torch.Generator().manual_seed(0)  # the same noise in every epoch
    sensitivity = OutputSensitivity(per_output=True)
    with torch.no_grad():
        logits = model(x_new)
        sensitivity.update(logits, model(x_new + 0.1 * torch.randn(x_new.shape, generator=generator)))
    model.train()
    loss, true_loss = float(expected_loss(logits, q)), float(cross_entropy(logits, y_new))
    expected = float(expected_metric(accuracy, logits, q))
    true = float((logits.argmax(1) == y_new).float().mean())
    history.append((expected, epoch, true))
    print(f"{epoch:5d}  {loss:13.4f}  {true_loss:.3f}  {expected:17.3f}  {true:8.3f}", end="")
    print(f"  {sensitivity.compute():11.2g} ± {sensitivity.stderr:.1g}")

_, epoch, true = max(history, key=lambda each: each[0])
best, last = max(each[2] for each in history), history[-1][2]
print(
    f"\nHighest expected accuracy in epoch {epoch}: accuracy {true:.3f}; last epoch {last:.3f}, best epoch {best:.3f}."
)
both = (logits.softmax(1) + q) / 2
by_both = float((both.argmax(1) == y_new).float().mean())
print(f"The reference by itself: {reference.score(x_new, y_new):.3f}; the mean of both, last epoch: {by_both:.3f}.")
