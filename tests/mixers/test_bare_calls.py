"""Calls that pass by `nn.Module.__call__`: what hangs on a module is never passed by."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.parts.calls import applied, call_of, is_bare
from longmix.mixers.parts.head_options import HeadNorm
from longmix.model.backbone import LanguageModel

SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48}
MODULES = {
    "linear": lambda: nn.Linear(8, 8, bias=False),
    "linear-bias": lambda: nn.Linear(8, 8),
    "rms": lambda: nn.RMSNorm(8, eps=0.3),
    "rms-plain": lambda: nn.RMSNorm(8, elementwise_affine=False),
    "head": lambda: HeadNorm(8, eps=0.3),
    "identity": nn.Identity,
    "layer": lambda: nn.LayerNorm(8),
}


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Other(nn.Linear):
    """A linear layer with a `forward` of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def model(mixer=Flash) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(mixer, 20, **SIZES).eval()


def logits_of_steps(net: LanguageModel, count: int = 3) -> torch.Tensor:
    session = Session(net, 2)
    session.prefill([torch.arange(1, 6), torch.arange(7, 12)])
    for step in range(count):
        session.step(torch.tensor([step, step + 3]))
    return session.logits


@pytest.mark.parametrize("name", MODULES)
def test_the_output_is_that_of_the_call(name):
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(2, 3, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        assert is_bare(module)
        assert torch.equal(applied(module, x), module(x))
        assert torch.equal(call_of(module)(x), module(x))


def test_with_gradients_modules_are_called():
    layer = nn.Linear(8, 8)
    assert not is_bare(layer) and call_of(layer) is layer
    assert applied(layer, torch.randn(1, 8)).requires_grad


@pytest.mark.parametrize("register", ["forward", "pre", "global"])
def test_hooks_are_called_and_change_what_they_return(register):
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    hook = {
        "forward": lambda: layer.register_forward_hook(lambda module, inputs, output: output + 1),
        "pre": lambda: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
        "global": lambda: register_module_forward_hook(lambda module, inputs, output: output + 1),
    }[register]
    with torch.no_grad():
        plain = applied(layer, x)
        handle = hook()
        try:
            assert torch.equal(applied(layer, x), layer(x)) and not torch.equal(layer(x), plain)
        finally:
            handle.remove()
        assert torch.equal(applied(layer, x), plain)


def test_what_replaces_a_forward_is_run():
    x = torch.randn(2, 8)
    patched, parametrized, compiled = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    patched.forward = lambda x: x + 5
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    compiled._compiled_call_impl = lambda x: x + 7
    with torch.no_grad():
        for layer in (patched, parametrized, compiled, Other(8, 8)):
            assert torch.equal(applied(layer, x), layer(x))
        assert torch.equal(applied(patched, x), x + 5) and torch.equal(applied(compiled, x), x + 7)


def test_every_module_of_a_model_is_reached_by_hooks_in_a_step():
    net = model()
    called: list[str] = []
    wanted = [name for name, part in net.named_modules() if not isinstance(part, nn.ModuleList)]
    for name, part in net.named_modules():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    session = Session(net, 1)
    session.prefill([torch.arange(1, 6)])
    called.clear()
    session.step(torch.tensor([3]))
    assert sorted(called) == sorted(wanted)


def test_steps_with_hooks_give_what_they_give_without():
    net = model()
    plain = logits_of_steps(net)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert torch.equal(logits_of_steps(net), plain)
    finally:
        handle.remove()


@pytest.mark.parametrize("mixer", [Flash, GLA])
def test_what_a_step_leaves_is_ordinary(mixer):
    """States go on under `no_grad` outside of the session, and the model learns as if it had never generated."""
    net = model(mixer)
    other = copy.deepcopy(net)
    session = Session(net, 2)
    session.prefill([torch.arange(1, 6), torch.arange(7, 12)])
    for step in range(70):  # beyond the room of the first buffer
        session.step(torch.tensor([step % 20, 3]))
    assert session.logits is not None and not session.logits.is_inference() and not session.logits.requires_grad
    with torch.no_grad():
        output = net(torch.tensor([[1], [2]]), state=session.state)
    session.step(torch.tensor([1, 2]))
    session.logits.add_(1.0)
    assert output.hidden.isfinite().all()
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1))
    for each in (net, other):
        each.train()(tokens, tokens).token_losses.sum().backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
