"""bf16-mixed, in which a GPU trains: every strategy computes what one process computes, with every mixer."""

from pathlib import Path

import pytest
import torch
from sliced import VOCABULARY
from small_mixers import small_mixer
from strategic import Trained, dtypes, trained

from longmix.config import ModelConfig
from longmix.model.build import build_model

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))

HALVED = 2.0**-8
"""Distance of gradients whose halves over the rows were rounded to bfloat16 before they were added; seen: 0.0029."""

SLICED = 2.0**-6
"""That of gradients of slices: halves over tokens, and activations that are rounded at other places; seen: 0.0072."""


def model_of(node: dict) -> torch.nn.Module:
    """In which nothing begins at zero."""
    torch.manual_seed(3)
    model = build_model(ModelConfig.of(node), VOCABULARY)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture
def small_node(node_of):
    def node(name: str) -> dict:
        found = node_of(name)
        found["model"] |= {"d_model": 32, "num_layers": 2}
        found["mixer"] = small_mixer(found["mixer"], 4)
        if "input_bias" in found["mixer"]:
            found["mixer"]["input_bias"] = -1  # at -10 what is read is as small as rounding
        return found

    return node


def distance(run: Trained, other: Trained) -> float:
    """Norm of the difference of all gradients, relative to theirs."""
    assert run.gradients.keys() == other.gradients.keys()
    off = [run.gradients[name] - gradient for name, gradient in other.gradients.items()]
    return float(torch.nn.utils.get_total_norm(off) / torch.nn.utils.get_total_norm(list(other.gradients.values())))


def trained_from(group, node, strategy):
    return trained(group, model_of(node), strategy)


def dtypes_of(group, node):
    return dtypes(group, model_of(node))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", FILES)
def test_every_strategy_trains_as_one_process(pool, small_node, name):
    node = small_node(name)
    alone = trained_from(None, node, "single")
    together = {strategy: pool.run(2, trained_from, node, strategy) for strategy in ("ddp", "fsdp", "slices")}
    for strategy, runs in together.items():
        for run in runs:
            assert run.losses == pytest.approx(alone.losses, rel=1e-3), strategy
            assert distance(run, alone) < (SLICED if strategy == "slices" else HALVED), strategy
    for divided, copied in zip(together["fsdp"], together["ddp"], strict=True):
        assert divided.losses == pytest.approx(copied.losses, rel=1e-6)
        assert distance(divided, copied) < 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_a_sharded_model_computes_in_the_dtypes_of_a_whole_one(pool, small_node, name):
    node = small_node(name)
    whole = dtypes_of(None, node)
    for found in pool.run(2, dtypes_of, node):
        assert found == whole
    weights = {name: kind for name, kind in whole.items() if not name.endswith("()")}
    assert set(weights.values()) == {torch.float32}
    assert whole["blocks.0()"] == whole["blocks.1()"] == torch.float32


def trained_compiled(group, node, strategy):
    """As run.py does it: blocks are compiled, then divided."""
    model = model_of(node)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return trained(group, model, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "mlstm_tfla", "rwkv7"])
def test_compiled_blocks_train_as_others_under_each_strategy(pool, small_node, name):
    node = small_node(name)
    alone = trained_from(None, node, "single")
    for strategy in ("ddp", "fsdp", "slices"):
        for run in pool.run(2, trained_compiled, node, strategy):
            assert run.losses == pytest.approx(alone.losses, rel=1e-3), strategy
            assert distance(run, alone) < SLICED, strategy
