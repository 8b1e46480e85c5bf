"""Compiled blocks and steps: no mixer breaks the graph, layers share it, and so do the tokens of generation."""

from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from small_mixers import small_mixer
from torch._dynamo.utils import counters

from longmix.config import ModelConfig, resolved
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.build import build_model

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
SMALL = ("model.num_layers=12", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16")
LENGTH = 64
FAST = ("block_sparse", "flash")

TRAINING, EVALUATION = 2, 1
"""Graphs of one kind of rows: a statistic that is observed is None at first; the first layer gives a value residual."""

MORE = {"rwkv7": 1, "hgrn2": 1}
"""The first layer has fewer weights than the others: it gives the value residual, or has no bound."""


@pytest.fixture
def fresh():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FILES])
def test_layers_share_whole_graphs(name, packed, compose_config, fresh):
    node = resolved(compose_config(f"mixer={name}", *SMALL))
    node["mixer"] = small_mixer(node["mixer"], 16)
    model = build_model(ModelConfig.of(node), 47)
    for block in model.blocks:
        block.compile(backend="eager")
    tokens = torch.randint(47, (2, LENGTH))
    ids = (torch.arange(LENGTH) // 25).int().expand(2, -1).contiguous() if packed else None
    for _ in range(2):
        output = model(tokens, tokens, document_ids=ids)
        (output.token_losses.mean() + sum(output.losses.values())).backward()
        finish_step(model, True, lambda value: value)
    with torch.no_grad():
        model.eval()(tokens, tokens, document_ids=ids)
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= TRAINING + EVALUATION + MORE.get(name, 0)


STEPS = 3
"""The first steps may have a graph each: the third is where a constant state must have no more."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gla" else pytest.mark.slow) for name in FILES]
)
@torch.no_grad()
def test_steps_are_whole_graphs(name, compose_config, fresh):
    node = resolved(compose_config(f"mixer={name}", *SMALL, "model.num_layers=1"))
    node["mixer"] = small_mixer(node["mixer"], 16)
    torch.manual_seed(0)
    model = build_model(ModelConfig.of(node), 47).eval().double()
    tokens = torch.randint(47, (2, LENGTH))
    # a state of their own, since a step may use up the one that it gets
    state, compiled_state = (model(tokens[:, :-STEPS], state=model.init_state(2)).state for _ in range(2))
    step = torch.compile(model, fullgraph=True, backend="eager")
    for place in range(LENGTH - STEPS, LENGTH):
        token = tokens[:, place : place + 1]
        expected, found = model(token, state=state), step(token, state=compiled_state)
        state, compiled_state = expected.state, found.state
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-10, atol=1e-10)
    assert not counters["graph_break"]
    if all(mixer.state_bytes(8) == mixer.state_bytes(LENGTH) for mixer in model.mixers()):
        assert counters["stats"]["unique_graphs"] <= 2
