from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.perturbations import GaussianNoise, noise_generator
from lightning_sensitivity.probe import Probe, apply, check_submodule

IDS = torch.tensor([[0, 2], [1, 1]])


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(3, 4)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)
        self.spare = nn.Linear(1, 1)

    def forward(self, ids: Tensor) -> Any:
        hidden, _ = self.rnn(self.embeddings(ids))
        return SimpleNamespace(logits=self.head(hidden.mean(1)))


def plus_one(x: Tensor) -> Tensor:
    return x + 1


@torch.no_grad()
def test_the_output_of_a_submodule_is_perturbed_and_the_hook_goes_away() -> None:
    model = Text()
    probe = Probe(model, {"ids": IDS, "label": IDS[:, 0]}, None, None, perturbs_inputs=False)
    clean = probe.clean()
    expected = model.head(model.rnn(model.embeddings(IDS) + 1)[0].mean(1))
    torch.testing.assert_close(probe.perturbed(plus_one, "embeddings"), expected, rtol=0, atol=0)
    expected = model.head((model.rnn(model.embeddings(IDS))[0] + 1).mean(1))
    torch.testing.assert_close(probe.perturbed(plus_one, "rnn"), expected)  # the outputs, not the last state
    torch.testing.assert_close(probe.perturbed(plus_one, "head"), clean + 1)
    torch.testing.assert_close(probe.clean(), clean, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_submodule_that_runs_twice_is_perturbed_twice() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - 2 * self.net(x)

    x = torch.ones(2, 3)
    assert torch.equal(Probe(Siamese(), x, None, None, False).perturbed(plus_one, "net"), 2 * x - 4)


def test_an_exception_leaves_no_hook() -> None:
    model = Text()
    probe = Probe(model, IDS, None, None, perturbs_inputs=False)
    for error in (ValueError, KeyboardInterrupt):

        def fail(x: Tensor) -> Tensor:
            raise error  # noqa: B023

        with pytest.raises(error):
            probe.perturbed(fail, "embeddings")
        assert not model.embeddings._forward_hooks


def test_a_submodule_that_does_not_run_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="submodule that `forward` calls, got 'spare', which did not"):
        Probe(Text(), IDS, None, None, perturbs_inputs=False).perturbed(plus_one, "spare")


@pytest.mark.parametrize(
    ("at", "match"),
    [
        ("embedding", "`at` should name a submodule of Text, such as 'embeddings', got 'embedding'"),
        ("xyz", "such as 'embeddings', 'rnn', 'head', got 'xyz'"),
        ("rnn.weight_hh_l0", "should name a submodule"),
        ("spare", "takes hooks, got 'spare', a scripted one"),
    ],
)
def test_names_that_are_none(at: str, match: str) -> None:
    model = Text()
    model.spare = torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1))
    with pytest.raises(MisconfigurationException, match=match):
        check_submodule(model, at)


def test_names_in_a_compiled_submodule() -> None:
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"))
    check_submodule(model, "0.1")
    check_submodule(model, "0._orig_mod.1")


@torch.no_grad()
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 and newer")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_is_left_out_where_a_submodule_is_perturbed_and_is_not_compiled_again(whole: bool) -> None:
    torch.compiler.reset()
    compilations = 0

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model: Any = (
        torch.compile(inner, backend=backend) if whole else nn.Sequential(torch.compile(inner, backend=backend))
    )
    x = torch.rand(5, 3)
    probe = Probe(model, x, None, None, perturbs_inputs=False)
    for _ in range(3):
        torch.testing.assert_close(probe.clean(), inner(x))
        perturbed = probe.perturbed(plus_one, "1" if whole else "0.1")
        torch.testing.assert_close(perturbed, inner[2](inner[1](inner[0](x)) + 1))
    assert compilations == 1


@pytest.mark.parametrize(
    ("perturbation", "match"),
    [
        (lambda x, generator: None, r"like the one it got \(torch.float32, shape \(2, 3\), on cpu\), got NoneType"),
        (lambda x, generator: x[:1], r"got a tensor \(torch.float32, shape \(1, 3\)\) on cpu"),
        (lambda x, generator: x.double(), r"got a tensor \(torch.float64"),
        (lambda x, generator: x.to("meta"), "on meta"),
    ],
)
def test_a_perturbation_that_gives_something_else_is_refused(perturbation: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        apply(perturbation, torch.zeros(2, 3), noise_generator(0))


def test_a_perturbation_may_write_into_what_it_gets() -> None:
    x = torch.zeros(2, 3)
    new = apply(lambda x, generator: x.add_(1), x, noise_generator(0))
    assert new.sum() == 6
    assert x.sum() == 0


def test_the_noise_of_channels_last_is_the_same() -> None:
    x = torch.rand(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    new, new_last = (apply(GaussianNoise(0.1), images, noise_generator(0)) for images in (x, last))
    assert torch.equal(new, new_last)
    assert new_last.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_outputs_in_a_buffer_are_those_of_their_pass() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.memory.copy_(x)

    model, x = Written(), torch.ones(2, 3)
    probe = Probe(model, x, None, None)
    assert torch.equal(probe.clean(), x)
    assert torch.equal(probe.perturbed(plus_one), x + 1)
    assert not model.memory.any()
