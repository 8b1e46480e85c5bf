"""A mixer that lacks something is refused where the model is built, and the message says what is missing."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from longmix.config import ModelConfig, resolved
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.model.build import build_model, check_model

SMALL = ("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=8")


class Complete(Mixer):
    """Passes tokens on."""

    def __init__(self, shape, layer_index):
        super().__init__()

    def forward(self, x, *, state=None, document_ids=None):
        return MixerOutput(x, state)

    def init_state(self, batch):
        return {"seen": torch.zeros(batch)}

    def state_bytes(self, length):
        return 4

    def flops(self, length):
        return 0


def without(*names: str) -> type:
    """`Complete` with what the base says of some methods."""
    return type("Lacking", (Complete,), {name: getattr(Mixer, name) for name in names})


class OnlyX(Complete):
    def forward(self, x):
        return MixerOutput(x)


class Positional(Complete):
    def forward(self, x, mask, *, state=None, document_ids=None):
        return MixerOutput(x)


class NoValue(Complete):
    value_residual = True


class NotBegun(Complete):
    def __init__(self, shape, layer_index):
        self.output = nn.Linear(4, 4)


class OtherArguments(Complete):
    def __init__(self, shape, layer_index):
        super().__init__(shape)


class NotAMixer(nn.Module):
    def __init__(self, shape, layer_index):
        super().__init__()


CANNOT_BE_BUILT = {
    "no-forward": (without("forward"), r"Lacking lacks forward\(x, \*, state, document_ids\)"),
    "no-flops": (without("flops"), r"Lacking lacks flops\(length\); longmix"),
    "no-state": (without("init_state", "state_bytes"), r"Lacking lacks init_state\(batch\), state_bytes\(length\)"),
    "nothing": (without("forward", "flops", "init_state", "state_bytes"), r"forward\(.*init_state\(.*flops\(length\)"),
    "only-x": (OnlyX, r"OnlyX.forward must be forward\(self, x, \*, state=None, document_ids=None\): .*'state'"),
    "another-argument": (Positional, r"Positional.forward must be forward\(self, x, \*, .*'mask'"),
    "first-value": (NoValue, r"NoValue.forward must be .*value_residual=None\): .*'value_residual'"),
    "not-begun": (NotBegun, r"NotBegun cannot be built: .*__init__\(\) call"),
    "other-arguments": (OtherArguments, r"OtherArguments cannot be built: .*positional"),
    "no-mixer": (NotAMixer, "is a NotAMixer; it must be a subclass of longmix.mixers.parts.base.Mixer"),
}


@pytest.fixture
def node_of(compose_config, monkeypatch):
    """The configuration of a model with the class that is given, from a module of somebody else."""

    def node(kind: type) -> dict:
        module = ModuleType("somebody")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, "somebody", module)
        return {**resolved(compose_config(*SMALL)), "mixer": {"_target_": f"somebody.{kind.__name__}"}}

    return node


def test_a_complete_mixer_is_built_and_called(node_of):
    model = build_model(ModelConfig.of(node_of(Complete)), 8)
    output = model(torch.zeros(2, 3, dtype=torch.int64), state=model.init_state(2))
    assert output.hidden.shape == (2, 3, 16) and output.state[0].mixer["seen"].shape == (2,)


@pytest.mark.parametrize(("kind", "words"), CANNOT_BE_BUILT.values(), ids=CANNOT_BE_BUILT)
def test_what_is_missing_is_said_before_any_work(node_of, kind, words):
    with pytest.raises(ConfigError, match=rf"mixer\._target_=somebody\..*{words}"):
        check_model(ModelConfig.of(node_of(kind)))


class ReturnsTensor(Complete):
    def forward(self, x, *, state=None, document_ids=None):
        return x


class ReturnsTuple(Complete):
    def forward(self, x, *, state=None, document_ids=None):
        return x, state


class ReturnsHalf(Complete):
    def forward(self, x, *, state=None, document_ids=None):
        return MixerOutput(x[:, 1:])


RETURNS = {
    ReturnsTensor: r"ReturnsTensor.forward returned a Tensor; it must return MixerOutput\(y, state\)",
    ReturnsTuple: "ReturnsTuple.forward returned a tuple",
    ReturnsHalf: r"ReturnsHalf.forward returned y of shape \[2, 2, 16\]; x has \[2, 3, 16\]",
}


@pytest.mark.parametrize(("kind", "words"), RETURNS.items(), ids=[kind.__name__ for kind in RETURNS])
def test_what_forward_returns_is_checked_when_it_is_called(node_of, kind, words):
    model = build_model(ModelConfig.of(node_of(kind)), 8)
    with pytest.raises(ConfigError, match=words):
        model(torch.zeros(2, 3, dtype=torch.int64))
