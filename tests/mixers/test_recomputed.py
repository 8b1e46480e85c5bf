"""What is computed again in the backward pass: on a GPU, where little is kept, and with nothing changed by it."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longmix.mixers.deltanet import DeltaNet
from longmix.mixers.gated_deltanet import GatedDeltaNet
from longmix.mixers.gla import GLA
from longmix.mixers.kda import KDA
from longmix.mixers.parts import recomputed as module
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.recomputed import recomputed
from longmix.mixers.rwkv7 import RWKV7
from longmix_kernels.delta import blocked

SHAPE = ModelShape(d_model=64, num_layers=2, num_heads=4)
MIXERS: dict[str, tuple[type[Mixer], dict]] = {
    "deltanet": (DeltaNet, {}),
    "gated_deltanet": (GatedDeltaNet, {}),
    "kda": (KDA, {}),
    "gla": (GLA, {}),
    "rwkv7": (RWKV7, {"head_dim": 16}),
    "rwkv7-state": (RWKV7, {"head_dim": 16}),
}
"""With "-state", rows go on from a state."""
every_mixer = pytest.mark.parametrize("name", MIXERS)


@pytest.fixture(params=["float32", "autocast"])
def autocast(request):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param == "autocast"):
        yield


def made(name: str) -> tuple[Mixer, dict[str, Tensor | None]]:
    """A mixer, and what it is called with."""
    torch.manual_seed(0)
    kind, settings = MIXERS[name]
    mixer = kind(SHAPE, 1, **settings)
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.arange(40).expand(2, 40) // 15
    given = {"value_residual": torch.randn(2, 40, 64, requires_grad=True)} if mixer.value_residual else {}
    if name.endswith("-state"):
        given["state"] = mixer.init_state(2)
    return mixer, {"x": torch.randn(2, 40, 64, requires_grad=True), "document_ids": ids.int(), **given}


def run(name: str, around=lambda function: function()) -> list[Tensor]:
    """Output and all gradients."""
    mixer, inputs = made(name)
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad] + list(mixer.parameters())
    output = around(lambda: mixer(**inputs).y)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, wanted, grad)]


@every_mixer
def test_gradients_are_the_same_bit_for_bit(name, autocast, monkeypatch):
    expected = run(name)
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    assert all(map(torch.equal, run(name), expected))


@every_mixer
def test_an_engine_runs_once(name, monkeypatch):
    """Its output is kept; what it is given is computed again."""
    calls, forward = [], blocked.blocked_forward
    monkeypatch.setattr(blocked, "blocked_forward", lambda inputs: calls.append(inputs) or forward(inputs))
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    run(name)
    assert len(calls) == 1


def test_a_state_makes_nothing_else_be_kept(monkeypatch):
    """What the backward pass is given with a state, it is given without one, and the state."""
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    kept = []
    for name in ("rwkv7", "rwkv7-state"):
        mixer, inputs = made(name)
        sizes: dict[int, int] = {}
        pack = lambda x, sizes=sizes: sizes.setdefault(x.untyped_storage().data_ptr(), x.nbytes) and x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = mixer(**inputs)
        kept.append(sum(sizes.values()))
    assert kept[1] - kept[0] <= sum(leaf.nbytes for leaf in tree_leaves(output.state))


@every_mixer
def test_within_a_layer_that_is_computed_again(name, monkeypatch):
    expected = run(name)
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    found = run(name, lambda function: checkpoint(function, use_reentrant=False))
    assert all(map(torch.equal, found, expected))


def test_the_cpu_computes_nothing_again():
    calls = []

    def square(x: Tensor) -> Tensor:
        calls.append(x)
        return x * x

    recomputed(square, torch.ones(3, requires_grad=True)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_nothing_is_kept_or_computed_again(grad, monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    calls = []

    def square(x: Tensor) -> Tensor:
        calls.append(x)
        return x * x

    with torch.set_grad_enabled(grad):
        result = recomputed(square, torch.ones(3, requires_grad=True))
    if grad:
        result.sum().backward()
    assert len(calls) == 1 + grad
